"""Metrics, optimizers, schedulers and loggers of a user's own package: what a training with them does."""

import pytest

from sodaops.errors import Terminated
from sodaops.io import runs
from tests.conftest import lazy, run_overrides

compose = lazy("sodaops.config.compose")
fit = lazy("sodaops.training.fit")
torch = lazy("torch")

BARE = ("export.variants=[]", "evaluate.split=none")
SGD = (
    "optim.optimizer._target_=torch.optim.SGD", "+optim.optimizer.momentum=0.9", "~optim.scheduler",
    "+optim.scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR",
)  # fmt: skip


@pytest.fixture
def config_of(extensions, small_tweets, tmp_path):
    """Composes a short training in a folder, with the package's YAML files."""

    def make(name, *overrides):
        return compose.compose(run_overrides(tmp_path / name, small_tweets, *overrides), str(extensions))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [("optim=lion",), SGD])
def test_an_optimizer_and_a_scheduler_resume_bit_for_bit(config_of, tmp_path, optimizer):
    overrides = (*BARE, *optimizer)
    fit.fit(config_of("complete", *overrides))
    stop = "+callbacks.stop={_target_: tests.integration.stop.SendSigterm, where: batch, epoch: 1, batch: 3}"
    with pytest.raises(Terminated):
        fit.fit(config_of("stopped", *overrides, stop))
    fit.fit(config_of("stopped", *overrides, "ckpt_path=last"))
    files = (tmp_path / name / "run/checkpoints/last.ckpt" for name in ("complete", "stopped"))
    first, second = (torch.load(file, weights_only=True) for file in files)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        pairs = zip(leaves(first[key]), leaves(second[key]), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs), key
    state = first["optimizer_states"][0]
    assert state["state"][0].keys() == ({"mean"} if "lion" in optimizer[0] else {"momentum_buffer"})
    assert len({group["initial_lr"] for group in state["param_groups"]}) > 2  # each layer has its own learning rate
    run = runs.read_run(tmp_path / "complete/run")
    assert run.params["optim.optimizer._target_"] in ("textlab.lion.Lion", "torch.optim.SGD")


def leaves(value):
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in leaves(value[key])]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]
