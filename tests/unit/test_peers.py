"""The agreement of the processes before a training, here of threads that share a store."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from sodaops.errors import ConfigError, DataError, TrainingError
from tests.conftest import lazy

distributed = lazy("torch.distributed")
peers = lazy("sodaops.training.peers")


def process(store, rank, settings, error=None, world_size=2):
    """Prepares one process and waits for the others; returns the error that ends it, or None."""
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        agreement = peers.Peers(environment, store)
        with agreement.preparing():
            if error is not None:
                raise error
            agreement.agree(settings)
    except Exception as ended:
        return ended


def train(store, *settings, errors=()):
    errors = [*errors, *[None] * (len(settings) - len(errors))]
    with ThreadPoolExecutor(len(settings)) as pool:
        ended = [
            pool.submit(process, store, rank, of, error, len(settings))
            for rank, (of, error) in enumerate(zip(settings, errors, strict=True))
        ]
    return [future.result() for future in ended]


def test_processes_with_equal_settings_agree_also_after_a_restart():
    store = distributed.HashStore()
    for _ in range(2):
        assert (
            train(store, {"seed": 1, "optim.lr": 0.1}, {"seed": 1, "optim.lr": 0.1}, {"seed": 1, "optim.lr": 0.1}) == [None] * 3
        )


@pytest.mark.parametrize("key", ["the data's fingerprint", "trainer.precision"])
def test_unlike_settings_end_all_processes(key):
    ended = train(distributed.HashStore(), {"seed": 1, key: "a"}, {"seed": 1, key: "b"})
    assert [type(error) for error in ended] == [ConfigError] * 2
    assert all("process 1 of 2" in str(error) and f"{key}=b" in str(error) and "seed" not in str(error) for error in ended)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_others(rank):
    failure = DataError("missing.csv: no such file.\nmore")
    ended = train(distributed.HashStore(), {}, {}, errors=[failure] if rank == 0 else [None, failure])
    assert ended[rank] is failure and type(ended[1 - rank]) is TrainingError
    assert f"process {rank} of 2" in str(ended[1 - rank]) and "DataError: missing.csv" in str(ended[1 - rank])
    assert "more" not in str(ended[1 - rank])


def test_a_process_that_never_comes(monkeypatch):
    monkeypatch.setattr("sodaops.training.peers.READY_S", 0.2)
    ended = process(distributed.HashStore(), 0, {})
    assert type(ended) is TrainingError and "process 1" in str(ended)


def test_one_process_needs_no_store():
    agreement = peers.Peers({"RANK": "1", "WORLD_SIZE": "2"})  # a scheduler's variables; no agent started this process
    with agreement.preparing():
        agreement.agree({"seed": 1})
