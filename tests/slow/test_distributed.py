"""Training in several processes, over gloo on loopback. The agent that starts them runs in the test's process where it can."""

import csv
import json
import os
import subprocess
import sys

import pytest

from sodaops.cli import main
from sodaops.inference.predictor import Predictor
from sodaops.io import runs
from tests.conftest import REPO, configured, free_port, lazy, run_overrides

pipeline = lazy("sodaops.pipeline")
torch = lazy("torch")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NO_DROPOUT = ("model.dropout=0", *(f"+model.overrides.{key}_dropout_prob=0" for key in ("hidden", "attention_probs")))
STEADY = (
    *NO_DROPOUT, "logger=csv", "optim.scheduler.decay=constant", "early_stopping.patience=null", "export.variants=[float32]",
    "+metrics.kappa._target_=torchmetrics.classification.MulticlassCohenKappa",
)  # fmt: skip
CSV_FILES = ("metrics.csv", "hparams.yaml")
BARE = ("export.variants=[]", "evaluate.split=none")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "optim.batch_tokens=512")
CALLBACKS = "tests.integration.stop"
KILL = "+callbacks.kill={{_target_: tests.integration.stop.KillOnce, rank: {}, file: {}}}"


@pytest.fixture(autouse=True)
def _one_thread_each(monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def start(*command, **variables):
    """A Python process of its own."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", *command], env={**os.environ, **variables}, text=True, **streams)


def ended(process, code=0):
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    return out, err


def validations(run, metrics="metrics"):
    with open(run / metrics / "metrics.csv", newline="") as file:
        return [
            {k: float(v) for k, v in row.items() if k.startswith("val/")} for row in csv.DictReader(file) if row["val/loss"]
        ]


def last(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def files(run):
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def two(folder, tweets, *more):
    return ["train", *run_overrides(folder, tweets, *STEADY, *TWO, *more)]


@pytest.fixture(scope="module")
def alone(small_tweets, tmp_path_factory):
    """The same training in one process, with batches of the same tokens."""
    folder = tmp_path_factory.mktemp("alone")
    pipeline.train(configured(*run_overrides(folder, small_tweets, *STEADY, "optim.batch_tokens=1024")))
    return folder / "run"


@pytest.mark.parametrize("is_killed", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_two_processes_train_as_one_would_also_after_a_restart(alone, small_tweets, tmp_path, capfd, is_killed):
    both, more = tmp_path / "run", []
    if is_killed:
        kill = KILL.format(1, tmp_path / "killed")
        more = ["trainer=fsdp", f"+callbacks.x._target_={CALLBACKS}.Sharded", kill, "checkpoint.restarts=1"]
    assert main(two(tmp_path, small_tweets, *more)) == 0
    out, err = capfd.readouterr()
    for message in ("process 1 of 2 was killed by SIGKILL", "restart 1 of 1"):
        assert (message in err) == is_killed
    assert "Traceback" not in err
    # Only the first process logs, prints and writes.
    assert err.count("epoch 1/2") == err.count("epoch 2/2") == 1 and out.count("bundle: ") == out.count("this model") == 1
    before = ["metrics.1"] if is_killed else []  # the metrics up to the restart
    assert files(both) == files(alone) | {"ranks.yaml"} | {f"{name}/{file}" for name in before for file in CSV_FILES}
    assert runs.read_run(both).status == "finished"
    measured = [row for name in (*before, "metrics") for row in validations(both, name)]
    for one, other in zip(validations(alone), measured, strict=True):
        assert other == pytest.approx(one, abs=2e-4)
    first, second = (Predictor(run / "bundle", "float32").probs(["a good day", "I hate this"]) for run in (alone, both))
    assert abs(first - second).max() < 1e-3


@pytest.mark.deep
def test_two_processes_train_adapters_as_one_would(small_tweets, tmp_path):
    lora = ("model.lora={r: 4}", "optim.lr=0.01", "optim.batch_texts=100", *BARE)
    assert main(two(tmp_path, small_tweets, *lora)) == 0
    pipeline.train(configured(*run_overrides(tmp_path / "one", small_tweets, *STEADY, "optim.batch_tokens=1024", *lora)))
    one, both = last(tmp_path / "one/run"), last(tmp_path / "run")
    assert one["global_step"] == both["global_step"] and one["state_dict"].keys() == both["state_dict"].keys()
    assert any("lora_" in name for name in both["state_dict"])
    for name, weights in one["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], weights, atol=1e-3, rtol=1e-2)


@pytest.mark.deep
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_from_a_teacher_as_one_would(alone, small_tweets, tmp_path, strategy):
    student = (f"teacher={alone}/bundle", "model.layers=1", *BARE)
    assert main(two(tmp_path, small_tweets, *student, f"trainer={strategy}")) == 0
    pipeline.train(configured(*run_overrides(tmp_path / "one", small_tweets, *STEADY, "optim.batch_tokens=1024", *student)))
    for one, other in zip(validations(tmp_path / "one/run"), validations(tmp_path / "run"), strict=True):
        assert other == pytest.approx(one, abs=2e-4)


@pytest.mark.deep
def test_sigterm_to_the_agent_saves_a_checkpoint_that_both_resume_from(alone, small_tweets, tmp_path, capfd):
    stop = f"+callbacks.stop={{_target_: {CALLBACKS}.SendSigterm, where: batch, batch: 3, rank: 1, to_parent: true}}"
    run = tmp_path / "run"
    assert main(two(tmp_path, small_tweets, *BARE, stop, "trainer.max_epochs=500")) == 143
    err = capfd.readouterr().err
    assert err.strip().splitlines()[-1].endswith(f"run_dir={run} ckpt_path=last") and "Traceback" not in err
    assert runs.read_run(run).status == "interrupted"
    epoch = last(run)["epoch"]
    assert main(two(tmp_path, small_tweets, *BARE, "ckpt_path=last", f"trainer.max_epochs={epoch + 2}")) == 0
    assert last(run)["epoch"] == epoch + 1 and last(run)["global_step"] == (epoch + 2) * last(alone)["global_step"] // 2
    assert runs.read_run(run).status == "finished"


@pytest.mark.deep
def test_two_machines_with_unlike_tables_do_not_train(monkeypatch, small_tweets, tmp_path, capfd):
    header, *rows = small_tweets.read_text().splitlines(keepends=True)
    (tmp_path / "other.csv").write_text(header + "".join(rows[1:]))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    more = (*BARE, "trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.max_epochs=1")
    tables = (small_tweets, tmp_path / "other.csv")
    arguments = [["train", *run_overrides(tmp_path / str(rank), path, *more)] for rank, path in enumerate(tables)]
    second = start("sodaops.cli", *arguments[1], **address, NODE_RANK="1")
    for name, value in {**address, "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(arguments[0]) == 2
    err = ended(second, 2)[1] + capfd.readouterr().err
    assert "process 1 of 2" in err and "the data's fingerprint=" in err and "Traceback" not in err
    assert not list(tmp_path.glob("*/run/bundle"))


@pytest.mark.deep
@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_end_when_one_is_killed(small_tweets, tmp_path, capfd, rank):
    kill = KILL.format(rank, tmp_path / "killed")
    assert main(two(tmp_path, small_tweets, *BARE, kill, "checkpoint.restarts=0")) == 2
    err = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"process {rank} of 2 was killed by SIGKILL" in err and f"run_dir={tmp_path / 'run'}" in err
    assert runs.read_run(tmp_path / "run").status in ("failed", "lost", "interrupted")


@pytest.mark.deep
def test_sigterm_to_one_of_two_keeps_the_finished_batches(small_tweets, tmp_path):
    stop = f"+callbacks.stop={{_target_: {CALLBACKS}.SendSigterm, where: batch, batch: 4, rank: 1}}"
    run, fsdp = tmp_path / "run", (*BARE, "trainer=fsdp")
    assert main(two(tmp_path, small_tweets, *fsdp, stop)) == 143 and runs.read_run(run).status == "interrupted"
    assert (last(run)["epoch"], last(run)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]) == (1, 5)
    assert main(two(tmp_path, small_tweets, *fsdp, "ckpt_path=last")) == 0
    assert last(run)["epoch"] == 1 and runs.read_run(run).status == "finished"


@pytest.mark.deep
def test_restarts_of_torchrun_resume_from_the_last_epoch(small_tweets, tmp_path):
    """Two machines that meet by torchrun's elastic rendezvous; the process of one is killed."""
    arguments = [text for text in two(tmp_path, small_tweets, *BARE, "trainer.max_epochs=4") if "devices" not in text]
    more = ("trainer.devices=1", "trainer.num_nodes=2", "ckpt_path=last", KILL.format(1, tmp_path / "killed"))
    torchrun = (
        "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1", "-m", "sodaops.cli",
    )  # fmt: skip
    nodes = [start(*torchrun, *arguments, *more, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for _ in range(2)]
    both = [ended(node) for node in nodes]
    assert sum(out.count("bundle: ") for out, _ in both) == 1, both
    assert last(tmp_path / "run")["epoch"] == 3 and (tmp_path / "run/metrics.1/metrics.csv").is_file()


@pytest.mark.deep
def test_two_replicas_of_vertex_ai(small_tweets, tmp_path):
    cluster = {"workerpool0": [f"127.0.0.1:{free_port()}"], "workerpool1": ["127.0.0.1:1"]}
    arguments = run_overrides(tmp_path, small_tweets, *BARE, "trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2")
    replicas = []
    for pool in cluster:
        spec = {"cluster": cluster, "environment": "cloud", "task": {"type": pool, "index": 0}}
        replicas.append(start("sodaops.cli", "train", *arguments, "trainer.max_epochs=1", CLUSTER_SPEC=json.dumps(spec)))
    (first, _), (second, _) = map(ended, replicas)
    assert "bundle: " in first and "bundle: " not in second
    assert (tmp_path / "run/bundle/bundle.json").is_file()


@pytest.mark.deep
def test_a_sweep_of_trainings_in_two_processes(small_tweets, tmp_path):
    command, *arguments = [text for text in two(tmp_path, small_tweets, *BARE, "trainer.max_epochs=1") if "run_dir" not in text]
    ended(start("sodaops.cli", command, "-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep", *arguments))
    found = runs.find_runs([tmp_path / "sweep"])
    assert [run.status for run in found] == ["finished", "finished"] and {run.params["seed"] for run in found} == {1, 2}
