"""Where a process stands among those that train together."""

import json
import os
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from sodaops.errors import ConfigError
from sodaops.io import ranks
from sodaops.io.run_record import RunRecord
from sodaops.training import launch as launching
from sodaops.training.fit import _check_same_run, _run_signature, make_trainer, trainer_arguments
from sodaops.training.launch import KilledError, Node, launch, node_of, processes
from tests.conftest import configured

CPU = "trainer.accelerator=cpu"


def spec(kind, index, n_workers=3):
    workers = [f"worker-{i}:2222" for i in range(n_workers)]
    about = {"cluster": {"workerpool0": ["primary:2222"], "workerpool1": workers}, "task": {"type": kind, "index": index}}
    return {"CLUSTER_SPEC": json.dumps(about)}


def test_replicas_of_vertex_ai_know_their_place():
    assert node_of(spec("workerpool0", 0), 4) == Node(0, "primary", 2222)
    assert node_of(spec("workerpool1", 2), 4) == Node(3, "primary", 2222)
    assert node_of({**spec("workerpool1", 0), "MASTER_PORT": "3333"}, 4) == Node(1, "primary", 3333)


def test_other_schedulers_say_it_in_variables():
    given = {"MASTER_ADDR": "first", "MASTER_PORT": "29500", "NODE_RANK": "1", "RANK": "9"}
    assert node_of(given, 2) == Node(1, "first", 29500)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "this machine must be told its place .*MASTER_ADDR, MASTER_PORT and NODE_RANK"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "x", "RANK": "0"}, "invalid literal"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "2"}, "machine 2 of 2"),
        ({"CLUSTER_SPEC": "{"}, "must be told its place"),
        ({"CLUSTER_SPEC": "[]"}, "must be told its place"),
        (spec("workerpool1", 0, 5), "num_nodes=2, but this is machine 1 of 6; set it to 6"),
    ],
)
def test_a_place_that_is_none(environment, said):
    with pytest.raises(ConfigError, match=said):
        node_of(environment, 2)


def test_what_the_configuration_asks_for():
    assert processes(configured()) == (1, 1)
    assert processes(configured("trainer=ddp", CPU, "trainer.devices=2", "trainer.num_nodes=3")) == (2, 3)
    assert processes(configured("trainer=ddp", CPU)) == (1, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("preset", ["gpu1", "gpu8", "gpu2x8"])
def test_presets_are_refused_where_there_is_no_such_machine(preset, tmp_path):
    arguments = trainer_arguments(configured(f"experiment={preset}").trainer)
    with pytest.raises(ConfigError, match="accelerator=gpu.*Ask for what this machine has"):
        make_trainer(arguments, [], [], tmp_path)


def test_what_torchrun_started_must_be_what_is_asked_for(monkeypatch):
    started = {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
    }
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning keeps it for the whole process; it is put back afterwards
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert processes(configured("trainer=ddp", CPU, "trainer.devices=2")) == (2, 1)
    with pytest.raises(
        ConfigError, match="torchrun started 2 processes, 2 on this machine; trainer.devices=1.*trainer.devices=2"
    ):
        processes(configured(CPU))


def test_the_first_process_leads():
    assert ranks.is_rank_zero({}) and ranks.is_rank_zero({"RANK": "1"})  # a scheduler's variable alone starts no process
    agent = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}
    assert ranks.is_rank_zero({**agent, "RANK": "0"}) and not ranks.is_rank_zero({**agent, "RANK": "1"})
    assert ranks.world_size({**agent, "RANK": "1"}) == 2 and ranks.world_size({"WORLD_SIZE": "2"}) == 1


def test_the_composed_configuration_survives_the_way_to_the_processes(tmp_path):
    import yaml

    from sodaops.config.compose import from_params

    config = configured("data.label_map={yes: positive}", f"run_dir={tmp_path}", "+callbacks.c={_target_: x.Y, z: [1, null]}")
    path = Path(tmp_path / "tree.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    assert from_params(path) == config


@pytest.fixture
def killed(monkeypatch, tmp_path):
    """Trainings over processes of which all are killed but the last, and what each was told; ``writes`` keep a checkpoint."""
    told, last = [], tmp_path / launching.LAST

    def make(*writes):
        def run(config, *_):
            told.append(config.ckpt_path)
            if writes[len(told) - 1]:
                last.parent.mkdir(exist_ok=True)
                last.write_bytes(b"")
                os.utime(last, ns=(0, len(told)))
            if len(told) == len(writes):
                RunRecord(tmp_path, {}).add_metrics("val", {"macro_f1": 0.5})
                return
            raise KilledError("process 1 of 2 ended by SIGKILL; go on")

        monkeypatch.setattr(launching, "_run", run)
        return configured(f"run_dir={tmp_path}", "checkpoint.restarts=2")

    return make, told, last


def test_a_restart_goes_on_from_its_own_checkpoint(killed, capsys):
    make, told, last = killed
    assert launch(make(True, True, False), 2, 1) == 0.5
    assert told == [None, str(last), str(last)] and "starting again from" in capsys.readouterr().err


def test_a_restart_takes_no_checkpoint_of_an_earlier_run(killed):
    make, told, last = killed
    last.parent.mkdir()
    last.write_bytes(b"of another run")
    with pytest.raises(KilledError):
        launch(make(False, True), 2, 1)
    assert told == [None]


def test_ddp_and_fsdp_do_not_resume_each_other(tmp_path):
    manifest = {"labels": ["a", "b"], "fingerprint": "f"}
    begun = {name: _run_signature(configured(f"trainer={name}", CPU), manifest) for name in ("ddp", "fsdp")}
    for name, of in begun.items():
        torch.save({"begun_with": of}, tmp_path / name)
        _check_same_run(str(tmp_path / name), of)
    older = {key: value for key, value in begun["ddp"].items() if key != "trainer.strategy=fsdp"}
    torch.save({"begun_with": older}, tmp_path / "older")
    _check_same_run(str(tmp_path / "older"), begun["ddp"])
    for path, of, said in (
        ("fsdp", "ddp", "False, begun with True"),
        ("ddp", "fsdp", "True, begun with False"),
        ("older", "fsdp", "True"),
    ):
        with pytest.raises(ConfigError, match=f"{path}: another run than this .*trainer.strategy=fsdp={said}"):
            _check_same_run(str(tmp_path / path), begun[of])
