"""The challenger beside the bundle in use: unseen as a shadow, for a share of the requests as a canary."""

import asyncio
import json
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from sodaops.bundle import layout
from sodaops.errors import ConfigError
from sodaops.inference.predictor import Predictor
from sodaops.registry.registry import Registry
from sodaops.serving.batcher import Batcher, ModelOutput
from sodaops.serving.canary import position
from sodaops.serving.models import Models
from sodaops.serving.settings import ServeSettings
from tests.conftest import configured, lazy, wait_until
from tests.serving import copy_bundle, detail, refresh_info, rewrite_info, swap_bundle
from tests.watching import metrics

service_metrics = lazy("sodaops.serving.metrics")
shadow_module = lazy("sodaops.serving.shadow")

KEY = {"x-api-key": "root"}
TEXTS = [f"text number {n} <b>" for n in range(6)]


@pytest.fixture
def other(bundle, tmp_path):
    """A bundle with the same answers and another id."""
    return copy_bundle(bundle, tmp_path / "other")


@pytest.fixture(scope="module")
def contrary(trained, tmp_path_factory):
    """A bundle for which the least probable label is the most probable one."""
    folder = copy_bundle(trained / "run/bundle", tmp_path_factory.mktemp("contrary") / "bundle", "contrary")
    change_models(folder, negate_logits)
    return folder


def change_models(folder, change):
    import onnx

    for name in json.loads((folder / layout.INFO).read_text())["onnx"]:
        model = onnx.load(folder / layout.ONNX[name])
        change(model.graph, onnx.helper.make_node)
        onnx.save(model, folder / layout.ONNX[name])
    refresh_info(folder)


def negate_logits(graph, make_node):
    node = next(node for node in graph.node if "logits" in node.output)
    node.output[list(node.output).index("logits")] = "positive"
    graph.node.append(make_node("Neg", ["positive"], ["logits"]))


def read_sixth_token(graph, make_node):
    """Fails for a batch whose texts are all shorter; the trial's are not."""
    import onnx

    node = next(node for node in graph.node if "logits" in node.output)
    node.output[list(node.output).index("logits")] = "before"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([6]), "sixth"))
    graph.node.append(make_node("Gather", ["input_ids", "sixth"], ["token"], axis=1))
    graph.node.append(make_node("Cast", ["token"], ["number"], to=onnx.TensorProto.FLOAT))
    graph.node.append(make_node("Sub", ["number", "number"], ["zero"]))
    graph.node.append(make_node("Add", ["before", "zero"], ["logits"]))


def bundle_id(folder):
    return layout.read_info(folder).bundle_id


def answered(client, folder, role):
    """How many texts a bundle has answered in a role."""
    return sum(
        value for name, value in metrics(client).items()
        if name.startswith("sodaops_compared_predictions_total") and f"role={role}" in name and bundle_id(folder) in name
    )  # fmt: skip


def ask(client, request_id, **headers):
    response = client.post("/predict", json={"text": "a word"}, headers={"x-request-id": request_id, **headers})
    return response.raise_for_status().json()["bundle_version"]


def rows(log):
    return [row for path in Path(log).glob("date=*/*.parquet") for row in pq.read_table(path, partitioning=None).to_pylist()]


def test_the_answers_stay_the_same_and_those_of_the_shadow_are_counted_and_logged(serve, bundle, contrary, tmp_path):
    log = tmp_path / "log"
    plain, client = serve(), serve(shadow=str(contrary), request_log=str(log), log_texts=True)
    requests = [("/predict", {"text": text}) for text in TEXTS] + [("/predict/batch", {"texts": TEXTS[:3]})]
    for number, (path, body) in enumerate(requests):
        one, two = (each.post(path, json=body, headers={"x-request-id": f"r{number}"}) for each in (plain, client))
        assert one.content == two.content and one.headers.raw == two.headers.raw
    wait_until(lambda: answered(client, contrary, "shadow") == 9)
    values, of = metrics(client), f"{{bundle_id={bundle_id(contrary)}}}{{role=shadow}}"
    assert answered(client, bundle, "live") == 9 and values["sodaops_shadow_disagreements_total"] == 9
    confidence = values[f"sodaops_compared_confidence_sum{of}"] / values[f"sodaops_compared_confidence_count{of}"]
    assert values["sodaops_compared_estimate{metric=accuracy}{role=shadow}"] == pytest.approx(confidence)
    page = client.get("/shadow")
    assert page.status_code == 200 and bundle_id(contrary) in page.text and bundle_id(bundle) in page.text
    assert "9 of the last 9 texts" in page.text and "text number" not in page.text
    assert "shadow" not in plain.get("/metrics").text and detail(plain.get("/shadow"), 404)
    client.__exit__()
    live = {(row["request_id"], row["place"]): row for row in rows(log)}
    found = rows(tmp_path / "log-shadow")
    assert len(found) == len(live) == 9 and "disagreed" not in next(iter(live.values()))
    for row in found:
        of_live = live[row["request_id"], row["place"]]
        assert row["disagreed"] and row["text"] is None and row["bundle_id"] == bundle_id(contrary)
        assert {key: row[f"live_{key}"] for key in ("bundle_id", "label", "score", "probs")} == {
            key: of_live[key] for key in ("bundle_id", "label", "score", "probs")
        }
        assert row["text_sha256"] == of_live["text_sha256"] and row["label"] != row["live_label"]


def test_a_canary_answers_a_stable_share(serve, bundle, other, tmp_path):
    log = tmp_path / "log"
    client = serve(shadow=str(other), shadow_share=0.0, canary=0.3, admin_keys=["root"], request_log=str(log))
    live, challenger = map(bundle_id, (bundle, other))
    ids = [f"r{n}" for n in range(40)]
    expected = [challenger if position(each) < 0.3 else live for each in ids]
    assert [ask(client, each) for each in ids] == expected == [ask(client, each) for each in ids]
    assert 4 < expected.count(challenger) < 20
    low = next(each for each in ids if position(each) < 0.3)
    assert {ask(client, each, **{"x-canary-key": low}) for each in ids} == {challenger}
    explained = client.post("/explain", json={"text": "a word"}, headers={"x-request-id": low})
    assert explained.json()["bundle_version"] == challenger
    assert answered(client, other, "canary") == 41 + 2 * expected.count(challenger)
    for share in (-0.1, 1.1, "1", True, None):
        assert detail(client.post("/admin/canary", json={"share": share}, headers=KEY), 422)
    assert client.post("/admin/canary", json={"share": 0}).status_code == 401
    for share, versions in ((1, {challenger}), (0, {live})):
        changed = client.post("/admin/canary", json={"share": share}, headers=KEY)
        assert changed.json() == {"share": share}
        assert {ask(client, each) for each in ids} == versions and metrics(client)["sodaops_canary_share"] == share
    client.__exit__()
    logged = {row["request_id"]: row["bundle_id"] for row in rows(log) if row["request_id"] != low}
    assert set(logged.values()) == {live}, "the last answers of these ids"
    assert {row["bundle_id"] for row in rows(log)} == {live, challenger}


def other_labels(folder):
    rewrite_info(folder, labels=["a", "b", "c"])


def other_task(folder):
    rewrite_info(folder, task={"_target_": "sodaops.tasks.multi_label.MultiLabel"})


def damaged(folder):
    (folder / layout.TOKENIZER).write_text("half")


@pytest.mark.parametrize(("change", "named"), [
    (other_labels, "labels"), (other_task, "multi_label"), (damaged, layout.TOKENIZER), (Path.rmdir, "no/where"),
])  # fmt: skip
def test_a_challenger_that_cannot_be_compared_is_refused_at_the_start(serve, other, capsys, change, named):
    source = other
    if change is Path.rmdir:
        source = "no/where"
    else:
        change(other)
    with pytest.raises(SystemExit, match="2"):
        serve(shadow=str(source))
    error = capsys.readouterr().err
    assert error.startswith(f"ConfigError: SODAOPS_SHADOW={source} ") and named in error


def test_answers_of_a_bundle_that_was_replaced_meanwhile_are_not_compared(serve, bundle, other):
    service = serve(shadow=str(other), shadow_share=0.0).app.state.service
    for holder, folder in ((service.shadow.challenger, other), (service.models, bundle)):
        old, holder.current = holder.current, Predictor(folder)
        output = ModelOutput(np.full(len(old.info.labels), 1 / len(old.info.labels), np.float32), None)
        service.shadow.observe(old, ["a"], ["a"], [old.prediction(output.probs)], [output], "r", 0.1)
        assert service.shadow.recent == {}


def test_a_canary_without_a_challenger_or_beyond_one_is_refused(serve, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        serve(canary=0.1)
    assert capsys.readouterr().err.startswith("ConfigError: SODAOPS_CANARY=0.1 ")
    for share in ("1.5", "-1"):
        with pytest.raises(ConfigError, match=r"^serve\.canary="):
            configured(f"serve.canary={share}")
        monkeypatch.setenv("SODAOPS_CANARY", share)
        with pytest.raises(ConfigError, match="^SODAOPS_CANARY="):
            ServeSettings(bundle="b")


def test_reload_promotion_and_rollback_with_a_canary(serve, bundle, other, tmp_path):
    """The share outlives new bundles on both sides; while both are the same one, there is no canary."""
    client = serve(shadow=str(other), shadow_share=0.0, canary=1.0, admin_keys=["root"])
    first, second = map(bundle_id, (bundle, other))
    foreign, third = copy_bundle(bundle, tmp_path / "foreign"), copy_bundle(bundle, tmp_path / "third", "third")
    other_labels(foreign)
    swap_bundle(other, foreign)
    assert client.post("/admin/reload", headers=KEY).json()["changed"] is False
    assert ask(client, "r") == second and metrics(client)["sodaops_bundle_loads_total{outcome=refused}"] == 1
    swap_bundle(other, third)
    promoted = bundle_id(other)
    client.post("/admin/reload", headers=KEY)
    assert ask(client, "r") == promoted and answered(client, other, "canary") == 1
    swap_bundle(bundle, copy_bundle(other, tmp_path / "copy", "third"))
    (bundle / layout.CONFIG).write_bytes((other / layout.CONFIG).read_bytes())
    refresh_info(bundle)
    assert bundle_id(bundle) == promoted and client.post("/admin/reload", headers=KEY).json()["changed"] is True
    assert ask(client, "r") == promoted and answered(client, bundle, "live") == 1
    assert detail(client.post("/admin/canary", json={"share": 0.5}, headers=KEY), 409)
    assert client.post("/admin/rollback", headers=KEY).json()["bundle_version"] == first
    assert ask(client, "r") == promoted, "the canary goes on"
    client.post("/admin/canary", json={"share": 0}, headers=KEY)
    assert ask(client, "r") == first


def test_an_alias_is_followed_and_the_worker_too(serve, bundle, other, contrary, tmp_path):
    registry = Registry(str(tmp_path / "registry"))
    registry.register(other)
    client = serve(shadow=f"{registry.root}@challenger", reload_s=0.05)
    ask(client, "r")
    wait_until(lambda: answered(client, other, "shadow") == 1)
    registry.register(contrary)
    wait_until(lambda: bundle_id(contrary) in client.get("/shadow").text)
    ask(client, "r")  # the worker sees that there is a new challenger
    ask(client, "r")
    wait_until(lambda: answered(client, contrary, "shadow"))
    assert metrics(client)["sodaops_shadow_restarts_total"] == 0


def test_a_text_on_which_the_challenger_fails_is_dropped(serve, bundle, other):
    change_models(other, read_sixth_token)
    client = serve(shadow=str(other))
    texts = ["a", "one two three four five six"]
    assert client.post("/predict/batch", json={"texts": texts}).json()["bundle_version"] == bundle_id(bundle)
    wait_until(lambda: answered(client, other, "shadow") == 1)
    values = metrics(client)
    assert sum(value for name, value in values.items() if name.startswith("sodaops_shadow_dropped_total")) == 1
    assert values["sodaops_shadow_restarts_total"] == 0


def test_a_worker_that_is_stopped_or_killed_does_not_touch_the_service(serve, other):
    def worker():
        return next(p for p in psutil.Process().children() if "sodaops.serving.worker" in p.cmdline())

    client = serve(shadow=str(other), max_queue=4)
    ask(client, "r")
    wait_until(lambda: answered(client, other, "shadow") == 1)
    first = worker().pid
    os.kill(first, signal.SIGSTOP)
    for n in range(8):
        ask(client, f"r{n}")
    dropped = {name: value for name, value in metrics(client).items() if name.startswith("sodaops_shadow_dropped_total")}
    assert dropped == {"sodaops_shadow_dropped_total{reason=queue full}": 3}, "one is with the worker, four wait"
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: metrics(client)["sodaops_shadow_restarts_total"] == 1)
    wait_until(lambda: answered(client, other, "shadow") == 5)
    assert worker().pid != first and client.get("/readyz").json()["ready"]
    assert metrics(client)["sodaops_shadow_dropped_total{reason=worker ended}"] == 1
    client.__exit__()
    assert not [p for p in psutil.Process().children() if "sodaops.serving.worker" in p.cmdline()]


def test_live_texts_come_first(bundle, other):
    async def offer():
        batcher = Batcher(0, 8, 256, lambda n: None)  # without threads, so that texts wait
        settings, live = ServeSettings(bundle=str(bundle), shadow=str(other)), service_metrics.Metrics()
        models = Models(settings.bundle, None, live)
        shadow = shadow_module.open_shadow(settings, models, batcher, live)
        output = ModelOutput(np.array([0.2, 0.3, 0.5], np.float32), None)
        predictions = [models.current.prediction(output.probs)] * 3

        def observe():
            shadow.observe(models.current, TEXTS[:3], TEXTS[:3], predictions, [output] * 3, "r", 0.1)

        observe()
        before = dict(shadow.dropped)
        waiting = batcher.submit(models.current, [np.arange(3)])
        observe()
        waiting.cancel()
        return before, shadow.dropped

    assert asyncio.run(offer()) == ({}, {"live texts wait": 3})
