"""Starting several processes: ranks, machines, restarts, and which process's error is raised."""

import json
import os
from pathlib import Path

import pytest

from sodaops.errors import ConfigError, PrunedError
from sodaops.io import ranks
from sodaops.io.run_record import RunRecord
from tests.conftest import configured, lazy

errors = lazy("torch.distributed.elastic.multiprocessing.errors")
launch = lazy("sodaops.training.launch")
rank_zero = lazy("lightning.fabric.utilities.rank_zero")
resume = lazy("sodaops.training.resume")
torch = lazy("torch")
trainer = lazy("sodaops.training.trainer")

CPU = "trainer.accelerator=cpu"


def spec(kind, index, n_workers=3):
    workers = [f"worker-{i}:2222" for i in range(n_workers)]
    cluster = {"cluster": {"workerpool0": ["primary:2222"], "workerpool1": workers}, "task": {"type": kind, "index": index}}
    return {"CLUSTER_SPEC": json.dumps(cluster)}


def test_ranks_of_vertex_ais_replicas():
    assert launch.node_of(spec("workerpool0", 0), 4) == launch.Node(0, "primary", 2222)
    assert launch.node_of(spec("workerpool1", 2), 4) == launch.Node(3, "primary", 2222)
    assert launch.node_of({**spec("workerpool1", 0), "MASTER_PORT": "3333"}, 4) == launch.Node(1, "primary", 3333)


def test_other_schedulers_set_variables():
    given = {"MASTER_ADDR": "first", "MASTER_PORT": "29500", "NODE_RANK": "1", "RANK": "9"}
    assert launch.node_of(given, 2) == launch.Node(1, "first", 29500)


@pytest.mark.parametrize(("environment", "cause"), [
    ({}, "MASTER_ADDR.*MASTER_PORT.*NODE_RANK"),
    ({"MASTER_ADDR": "a", "MASTER_PORT": "x", "RANK": "0"}, "ValueError.*'x'"),
    ({"MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "2"}, "2 of 2"),
    ({"CLUSTER_SPEC": "{"}, "JSONDecodeError.*CLUSTER_SPEC"),
    ({"CLUSTER_SPEC": "[]"}, "TypeError.*CLUSTER_SPEC"),
    (spec("workerpool1", 0, 5), "1 of 6"),
])  # fmt: skip
def test_an_unknown_rank_of_the_machine(environment, cause):
    with pytest.raises(ConfigError, match=rf"trainer\.num_nodes=2.*{cause}"):
        launch.node_of(environment, 2)


def test_processes_and_machines_of_the_configuration():
    assert launch.processes(configured()) == (1, 1)
    assert launch.processes(configured("trainer=ddp", CPU, "trainer.devices=2", "trainer.num_nodes=3")) == (2, 3)
    assert launch.processes(configured("trainer=ddp", CPU)) == (1, 1)


@pytest.mark.parametrize("preset", ["gpu1", "gpu8", "gpu2x8"])
def test_presets_are_refused_on_a_machine_without_their_devices(preset, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = trainer.trainer_arguments(configured(f"experiment={preset}").trainer)
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu"):
        trainer.make_trainer(arguments, [], [], tmp_path)


def test_torchrun_must_start_the_configured_number_of_processes(monkeypatch):
    numbers = {"RANK": 1, "LOCAL_RANK": 1, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": 7}
    monkeypatch.setattr(rank_zero.rank_zero_only, "rank", 0)  # Lightning changes it for the whole process; restored afterwards
    for name, value in numbers.items():
        monkeypatch.setenv(name, str(value))
    assert launch.processes(configured("trainer=ddp", CPU, "trainer.devices=2")) == (2, 1)
    with pytest.raises(ConfigError, match=r"trainer\.devices=1.*trainer\.devices=2"):
        launch.processes(configured(CPU))


def test_rank_zero_and_world_size():
    assert ranks.is_rank_zero({}) and ranks.is_rank_zero({"RANK": "1"})  # a scheduler's variable alone starts no process
    agent = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}
    assert ranks.is_rank_zero({**agent, "RANK": "0"}) and not ranks.is_rank_zero({**agent, "RANK": "1"})
    assert ranks.world_size({**agent, "RANK": "1"}) == 2 and ranks.world_size({"WORLD_SIZE": "2"}) == 1


def test_the_processes_get_the_composed_configuration(tmp_path):
    import yaml

    from sodaops.config.compose import load_params

    config = configured("data.label_map={yes: positive}", f"run_dir={tmp_path}", "+callbacks.c={_target_: x.Y, z: [1, null]}")
    path = Path(tmp_path / "tree.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    assert load_params(path) == config


@pytest.fixture
def killed(monkeypatch, tmp_path):
    """Makes trainings of which every attempt but the last is killed; ``writes``: whether each attempt writes a checkpoint.

    Also gives the ``ckpt_path`` of each attempt, and the checkpoint.
    """
    resumed_from, last = [], tmp_path / resume.LAST

    def make(*writes):
        def run(config, *_):
            resumed_from.append(config.ckpt_path)
            if writes[len(resumed_from) - 1]:
                last.parent.mkdir(exist_ok=True)
                last.write_bytes(b"")
                os.utime(last, ns=(0, len(resumed_from)))
            if len(resumed_from) == len(writes):
                RunRecord(tmp_path, {}).add_metrics("val", {"macro_f1": 0.5})
                return
            raise launch.KilledError("process 1 of 2 was killed by SIGKILL; resume")

        monkeypatch.setattr("sodaops.training.launch._run", run)
        return configured(f"run_dir={tmp_path}", "checkpoint.restarts=2")

    return make, resumed_from, last


def test_a_restart_resumes_from_the_checkpoint_of_this_run(killed):
    make, resumed_from, last = killed
    assert launch.launch(make(True, True, False), 2, 1) == 0.5
    assert resumed_from == [None, str(last), str(last)]


def test_a_restart_ignores_the_checkpoint_of_an_earlier_run(killed):
    make, resumed_from, last = killed
    last.parent.mkdir()
    last.write_bytes(b"of another run")
    with pytest.raises(launch.KilledError):
        launch.launch(make(False, True), 2, 1)
    assert resumed_from == [None]


@pytest.mark.parametrize(("exit_codes", "error", "rank"), [
    ({0: -15, 1: -9}, "KilledError", 1),  # the agent terminated rank 0 after rank 1 was killed
    ({0: 2, 1: -15}, "TrainingError", 0),
    ({0: 1, 1: -9}, "KilledError", 1),  # rank 0 failed since its peer was killed
    ({0: -6, 1: -9}, "KilledError", 1),  # gloo aborted rank 0 for the same reason
    ({0: -15, 1: 130}, "KeyboardInterrupt", None),
    ({0: 143, 1: 143}, "Terminated", None),
])  # fmt: skip
def test_the_error_of_the_process_that_ended_first(tmp_path, exit_codes, error, rank):
    failures = {k: errors.ProcessFailure(k, k + 1, code, str(tmp_path / "none")) for k, code in exit_codes.items()}
    with pytest.raises(BaseException, match=f"process {rank} of 2" if rank is not None else "no epoch") as raised:
        launch._raise_first_failure(errors.ChildFailedError("train", failures), tmp_path, 2)
    assert type(raised.value).__name__ == error


def test_a_pruned_trial_ends_as_one(tmp_path):
    RunRecord(tmp_path, {}).finish("pruned", "worse than others")
    with pytest.raises(PrunedError, match="worse than others"):
        launch._raise_first_failure(
            errors.ChildFailedError("train", {0: errors.ProcessFailure(0, 1, 2, str(tmp_path / "none"))}), tmp_path, 1
        )


def test_ddp_and_fsdp_do_not_resume_each_other(tmp_path):
    manifest = {"labels": ["a", "b"], "fingerprint": "f"}
    signatures = {name: resume.run_signature(configured(f"trainer={name}", CPU), manifest) for name in ("ddp", "fsdp")}
    older = {key: value for key, value in signatures["ddp"].items() if key != "trainer.strategy=fsdp"}
    for name, saved in {**signatures, "older": older}.items():
        torch.save({"begun_with": saved}, tmp_path / name)
    for name, resumed in (("ddp", "ddp"), ("fsdp", "fsdp"), ("older", "ddp")):
        resume.check_signature(str(tmp_path / name), signatures[resumed])
    for name, resumed in (("fsdp", "ddp"), ("ddp", "fsdp"), ("older", "fsdp")):
        with pytest.raises(ConfigError, match=rf"ckpt_path=.*{name}.*trainer\.strategy=fsdp={resumed == 'fsdp'}"):
            resume.check_signature(str(tmp_path / name), signatures[resumed])
