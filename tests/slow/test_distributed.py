"""Training over several processes: real ones, over gloo on loopback, that live and die."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from sodaops.inference.predictor import Predictor
from sodaops.io import runs
from tests.conftest import REPO, free_port, run_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEADY = (
    "logger=csv",
    "model.dropout=0",
    "+model.overrides.hidden_dropout_prob=0",
    "+model.overrides.attention_probs_dropout_prob=0",
)
BARE = ("export.variants=[]", "evaluate.split=none")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def sodaops(*arguments, **more):
    """`sodaops train` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "sodaops.cli", "train", *arguments], cwd=REPO, env=environment(**more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    return out, err


def validations(run, metrics="metrics"):
    with open(run / metrics / "metrics.csv", newline="") as file:
        return [
            {k: float(v) for k, v in row.items() if k.startswith("val/")} for row in csv.DictReader(file) if row["val/loss"]
        ]


@pytest.fixture(scope="module")
def alone(small_tweets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    ended(sodaops(*run_overrides(folder, small_tweets, *STEADY, "optim.batch_tokens=1024")))
    return folder / "run"


@pytest.mark.parametrize("more", [(), ("trainer=fsdp", "+callbacks.x._target_=tests.integration.stop.Sharded")])
def test_two_processes_do_what_one_does_and_the_first_alone_writes(alone, small_tweets, tmp_path, more):
    both = tmp_path / "run"
    out, err = ended(sodaops(*run_overrides(tmp_path, small_tweets, *STEADY, *TWO, *more, "optim.batch_tokens=512")))
    assert out.count("this model") == 1 and out.count("epoch 1/2") == 1 and "Traceback" not in err
    for one, two in zip(validations(alone), validations(both), strict=True):
        assert two == pytest.approx(one, abs=2e-4)
    first, second = (Predictor(run / "bundle", "float32").probs(["a good day", "I hate this"]) for run in (alone, both))
    assert abs(first - second).max() < 1e-3
    files = {str(path.relative_to(both)) for path in both.rglob("*") if path.is_file()}
    assert files == {str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file()} | {"ranks.yaml"}


def rank_pids(process, n=2, timeout_s=120):
    """The processes that the agent started, rank -> pid, once all of them train."""
    for _ in range(10 * timeout_s):
        found = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                variables = child.environ()
            except psutil.Error:
                continue
            if variables.get("TORCHELASTIC_RUN_ID"):
                found[int(variables["RANK"])] = child.pid
        if len(found) == n:
            return found
        time.sleep(0.1)
    raise AssertionError("no ranks")


def wait_for(path, timeout_s=120):
    for _ in range(10 * timeout_s):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def long(folder, tweets, *more):
    return run_overrides(
        folder, tweets, *TWO, *BARE, "logger=csv", "early_stopping.patience=null", "trainer.max_epochs=8", *more
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_ends_when_one_dies(small_tweets, tmp_path, rank):
    process = sodaops(*long(tmp_path, small_tweets, "checkpoint.restarts=0"))
    wait_for(tmp_path / "run/checkpoints/last.ckpt")
    pids = rank_pids(process)
    os.kill(pids[rank], signal.SIGKILL)
    _, err = ended(process, 2)
    last = err.strip().splitlines()[-1]
    assert f"process {rank} of 2 ended by SIGKILL, and the others with it; go on with run_dir=" in last, err
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]
    assert runs.read_run(tmp_path / "run").status in ("failed", "lost", "interrupted")


def last_epochs(run):
    weights = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return weights["epoch"], weights["state_dict"]


def test_after_a_kill_they_start_again_from_the_last_epoch(small_tweets, tmp_path):
    few = ("trainer=fsdp", "trainer.max_epochs=3", "checkpoint.restarts=1")
    ended(sodaops(*long(tmp_path / "whole", small_tweets, *few)))
    process = sodaops(*long(tmp_path / "killed", small_tweets, *few))
    wait_for(tmp_path / "killed/run/checkpoints/last.ckpt")
    os.kill(rank_pids(process)[1], signal.SIGKILL)
    out, err = ended(process)
    assert "process 1 of 2 ended by SIGKILL, and the others with it; starting again from " in err and "1 of at most 1" in err
    assert out.count("bundle: ") == 1 and "Traceback" not in err
    (epoch, whole), (same_epoch, killed) = last_epochs(tmp_path / "whole/run"), last_epochs(tmp_path / "killed/run")
    assert epoch == same_epoch == 2 and all(torch.equal(whole[name], killed[name]) for name in whole)
    earlier = validations(tmp_path / "killed/run", "metrics.1")
    assert (earlier + validations(tmp_path / "killed/run"))[-3:] == validations(tmp_path / "whole/run")
    assert runs.read_run(tmp_path / "killed/run").status == "finished"


def stopped(process, run):
    _, err = ended(process, 143)
    assert err.strip().splitlines()[-1] == f"stopped; go on with run_dir={run} ckpt_path=last" and "Traceback" not in err
    assert runs.read_run(run).status == "interrupted"


def test_sigterm_to_the_agent(small_tweets, tmp_path):
    process = sodaops(*long(tmp_path, small_tweets))
    wait_for(tmp_path / "run/checkpoints/last.ckpt")
    process.send_signal(signal.SIGTERM)
    stopped(process, tmp_path / "run")


def test_sigterm_to_one_of_two_keeps_the_batches_that_were_done(small_tweets, tmp_path):
    stop = "+callbacks.stop={_target_: tests.integration.stop.SendSigterm, where: batch, batch: 4, rank: 1}"
    run, few = tmp_path / "run", ("trainer.max_epochs=2", "trainer=fsdp")
    stopped(sodaops(*long(tmp_path, small_tweets, *few, stop)), run)
    kept = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert (kept["epoch"], kept["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]) == (1, 5)
    ended(sodaops(*long(tmp_path, small_tweets, *few, "ckpt_path=last")))
    assert last_epochs(run)[0] == 1 and runs.read_run(run).status == "finished"


def test_torchruns_own_restarts_go_on_from_the_last_epoch(small_tweets, tmp_path):
    """Two machines that meet by torchrun's elastic rendezvous; a process of the second one is killed."""
    nodes, port = [], free_port()
    for _ in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
                   "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
                   "-m", "sodaops.cli", "train"]  # fmt: skip
        more = ("trainer.devices=1", "trainer.num_nodes=2", "ckpt_path=last")
        arguments = [text for text in long(tmp_path, small_tweets, "trainer.max_epochs=4") if "devices" not in text]
        own_stores = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        nodes.append(subprocess.Popen([*command, *arguments, *more], cwd=REPO, env=own_stores, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
    wait_for(tmp_path / "run/checkpoints/last.ckpt")
    os.kill(
        next(pid for rank, pid in (*rank_pids(nodes[0], 1).items(), *rank_pids(nodes[1], 1).items()) if rank), signal.SIGKILL
    )
    both = [ended(node) for node in nodes]
    assert sum(out.count("bundle: ") for out, _ in both) == 1, both
    assert last_epochs(tmp_path / "run")[0] == 3 and (tmp_path / "run/metrics.1/metrics.csv").is_file()


def test_two_replicas_of_vertex_ai(small_tweets, tmp_path):
    cluster = {"workerpool0": [f"127.0.0.1:{free_port()}"], "workerpool1": ["127.0.0.1:1"]}
    arguments = run_overrides(tmp_path, small_tweets, *BARE, "trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2")
    replicas = []
    for pool in cluster:
        spec = {"cluster": cluster, "environment": "cloud", "task": {"type": pool, "index": 0}}
        replicas.append(sodaops(*arguments, "trainer.max_epochs=1", CLUSTER_SPEC=json.dumps(spec)))
    (first, _), (second, _) = (ended(replica) for replica in replicas)
    assert "bundle: " in first and "bundle: " not in second
    assert (tmp_path / "run/bundle/bundle.json").is_file()


def test_a_sweep_of_trainings_over_two_processes(small_tweets, tmp_path):
    arguments = [
        text for text in run_overrides(tmp_path, small_tweets, *TWO, *BARE, "trainer.max_epochs=1") if "run_dir" not in text
    ]
    ended(sodaops("-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep", *arguments))
    found = runs.find_runs([tmp_path / "sweep"])
    assert [run.status for run in found] == ["finished", "finished"] and {run.params["seed"] for run in found} == {1, 2}


def test_a_process_that_refuses_ends_the_training_with_its_words(small_tweets, tmp_path):
    wrong = long(tmp_path, small_tweets, "+callbacks.x._target_=tests.integration.stop.Missing")
    _, err = ended(sodaops(*wrong), 2)
    assert "callbacks.x" in err and "ended with exit code 2, and the others with it; what it said stands above" in err
    assert "Traceback" not in err


def on_two_machines(folder, tables, *more):
    """A training over two machines, each with a table of its own; gives how each ended, and the first one's folder."""
    port, nodes = str(free_port()), []
    for rank, path in enumerate(tables):
        arguments = run_overrides(folder / str(rank), path, *BARE, "trainer=ddp", "trainer.accelerator=cpu", *more)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank)}
        nodes.append(sodaops(*arguments, "trainer.num_nodes=2", "trainer.max_epochs=1", **place))
    return [ended(node, 2)[1] for node in nodes]


def test_machines_with_unlike_tables_do_not_train(small_tweets, tmp_path):
    header, *rows = small_tweets.read_text().splitlines(keepends=True)
    (tmp_path / "other.csv").write_text(header + "".join(rows[1:]))
    said = on_two_machines(tmp_path, (small_tweets, tmp_path / "other.csv"))
    assert any("process 1 of 2 would train with the data's fingerprint=" in err for err in said), said
    assert not list(tmp_path.glob("*/run/bundle")) and "Traceback" not in "".join(said)


def test_a_machine_that_does_not_see_the_table_ends_the_others(small_tweets, tmp_path):
    began = time.monotonic()
    first, second = on_two_machines(tmp_path, (small_tweets, tmp_path / "missing.csv"))
    assert f"DataError: {tmp_path}/missing.csv: no such file" in second
    assert "process 1 of 2 could not begin (DataError: " in first and "Traceback" not in first + second
    assert time.monotonic() - began < 120
