"""The protocol of tasks, and ordered labels."""

import re

import numpy as np
import pyarrow as pa
import pytest

from sodaops.config.compose import compose
from sodaops.errors import ConfigError, DataError
from sodaops.tasks import SINGLE_LABEL, make_task
from sodaops.tasks.make import is_allowed
from sodaops.tasks.metrics import rank_metrics
from sodaops.tasks.ordinal import Ordinal
from sodaops.tasks.single_label import SingleLabel, softmax
from tests.conftest import REPO, configured, lazy

torch = lazy("torch")
losses = lazy("sodaops.modeling.losses")
sk = lazy("sklearn.metrics")


def test_no_stage_asks_which_task_it_is():
    names = "|".join(path.stem for path in (REPO / "conf/task").glob("*.yaml"))
    asks = re.compile(rf"""["']({names})["']|isinstance\([^)]*,\s*(SingleLabel|MultiLabel|Regression|Ordinal)\b""")
    sources = [
        path for path in (REPO / "sodaops").rglob("*") if path.suffix in (".py", ".j2", ".html") and "tasks" not in path.parts
    ]
    assert len(sources) > 100 and [str(path) for path in sources if asks.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["task._target_=sodaops.tasks.ordinal.Ordinl"], "did you mean Ordinal"),
        (["task._target_=collections.Counter"], "task._target_=collections.Counter"),
        (["+task.separator=x"], "task.separator"),
        (["task=ordinal", "task.edges=[2,1]"], "task.edges"),
        (["task=ordinal", "task.edges=[]"], "task.edges"),
        (["task=ordinal", "task.edges=[1,.nan]"], "task.edges"),
        (["task=ordinal", "checkpoint.monitor=val/rmse"], "val/quadratic_kappa"),
        (["checkpoint.monitor=val/quadratic_kappa"], "checkpoint.monitor"),
        (["task=ordinal", "+metrics.mae._target_=torchmetrics.MeanAbsoluteError"], "metrics.mae"),
    ],
)
def test_settings_that_are_refused(overrides, key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        compose(overrides)


def test_only_tasks_are_called():
    assert not is_allowed("") and not is_allowed("os.system") and is_allowed("sodaops.tasks.ordinal.Ordinal")
    code = {"_target_": "os.system", "command": "exit 1"}
    for target, more in (("make.construct", {"key": "", "section": code}), ("base.Metric", {"name": "", "title": ""})):
        with pytest.raises(ConfigError, match=f"{target}.*sodaops.tasks.base.Task"):
            make_task({"_target_": f"sodaops.tasks.{target}", **more})


class Forgetful(Ordinal):
    """Bundles would lose its argument."""

    def __init__(self, edges=None, weight=1.0):
        super().__init__(edges)


def test_arguments_that_bundles_would_lose_are_refused():
    with pytest.raises(ConfigError, match=r"task\.weight.*section"):
        compose(["task=ordinal", f"task._target_={__name__}.Forgetful", "+task.weight=2"])


def test_a_task_chooses_loss_and_monitor_unless_they_are_given():
    config = configured("task=ordinal")
    assert config.loss["_target_"].endswith("OrdinalLoss") and config.checkpoint.monitor == "val/quadratic_kappa"
    config = compose(["task=ordinal", "loss=focal", "checkpoint.monitor=val/mae"])
    assert config.loss["_target_"].endswith("FocalLoss") and config.checkpoint.monitor == "val/mae"


def test_a_section_makes_an_equal_task():
    task = make_task(compose(["task=ordinal", "task.edges=[1,2.5]"]).task)
    assert make_task(task.section()).edges == [1.0, 2.5] and make_task(SINGLE_LABEL.section()) is SINGLE_LABEL
    assert type("Own", (SingleLabel,), {"__module__": "mine"})().section() == {"_target_": "mine.Own"}


def test_ordinal_chances_are_those_that_the_loss_learns():
    logits = np.random.default_rng(0).normal(scale=4, size=(50, 3)).astype(np.float32)
    probs, targets = Ordinal().probs(logits), softmax(np.random.default_rng(1).normal(size=(50, 4)))
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    loss = losses.OrdinalLoss()(torch.from_numpy(logits).double(), torch.from_numpy(targets))
    assert float(loss) == pytest.approx(-(targets * np.log(probs)).sum(1).mean(), rel=1e-3)
    assert np.isfinite(Ordinal().probs(np.array([[1e4, -1e4, 1e4]]))).all()


def test_ordinal_answers_are_medians():
    probs = np.array([[0.4, 0.15, 0.45], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    assert Ordinal().decide(probs).tolist() == [1, 0, 2]
    assert Ordinal().torch_answers(torch.from_numpy(probs)).tolist() == [1, 0, 2]
    prediction = Ordinal().prediction(probs[0].tolist(), ["low", "middle", "high"])
    assert (prediction.label, prediction.score) == ("middle", 0.15)
    assert Ordinal().columns(probs, ["a", "b", "c"])["score"].to_pylist() == [0.15, 0.5, 1.0]


def test_rank_metrics():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, 400)
    predicted = np.clip(true + rng.integers(-2, 3, 400), 0, 4)
    values = rank_metrics(true, predicted, np.ones((2, 400)), 5)
    assert values["quadratic_kappa"] == pytest.approx(2 * [sk.cohen_kappa_score(true, predicted, weights="quadratic")])
    assert values["mae"] == pytest.approx(2 * [np.abs(true - predicted).mean()])
    assert rank_metrics(np.zeros(3, int), np.zeros(3, int), np.ones(3), 2)["quadratic_kappa"] == 0


def read(task, cells, **data):
    config = configured().data.model_copy(update={"labels": None, "label_map": None, "label_column": "stars", **data})
    return task.read_cells("t.csv", dict.fromkeys(cells, 1), config), config


def test_ordered_labels_of_a_column():
    assert read(Ordinal(), ["10", "9", "1"])[0].labels == ["1", "9", "10"]
    targets, _ = read(Ordinal(), ["good", "bad", "best"], labels=["bad", "good", "best"])
    assert targets.ids.tolist() == [1, 0, 2]
    with pytest.raises(ConfigError, match=r"data\.labels"):
        read(Ordinal(), ["good", "bad"])
    targets, config = read(Ordinal(), ["good", "awful"], labels=["bad", "good"])
    assert targets.ids.tolist() == [1, -1]
    error = Ordinal().bad_cells("t.csv stars", ["awful"], [7], targets.labels, config)
    assert isinstance(error, DataError) and "'awful'" in str(error) and "row 7" in str(error)


def test_a_numeric_column_by_edges():
    targets, config = read(Ordinal([0.0, 2.0]), ["-1.5", "0", "1.99", "2", "inf", "nan", "", "x"])
    assert Ordinal([0.0, 2.0]).labels_without_data(config) == targets.labels
    assert targets.labels == ["1", "2", "3"] and targets.ids.tolist() == [0, 1, 1, 2, -1, -1, -1, -1]
    assert isinstance(targets.columns["label"], pa.Array) and targets.columns["label_id"].to_pylist() == [0, 1, 2]
    assert "'inf'" in str(Ordinal([0.0]).bad_cells("t.csv stars", ["inf"], [5], targets.labels, config))
    with pytest.raises(ConfigError, match=r"task\.edges"):
        read(Ordinal([0.0, 2.0]), ["1"], labels=["low", "high"])
