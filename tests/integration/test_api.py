"""The Python API: the same runs as the command line's, tables in memory, predictions, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sodaops
from sodaops.bundle import layout
from sodaops.cli import main
from sodaops.errors import BundleError, ConfigError, DataError, RefusedError
from sodaops.io import storage
from tests.conftest import REPO, TINY, lazy, make_rows, table
from tests.watching import fill

keywords = lazy("sodaops.config.keywords")
compose = lazy("sodaops.config.compose")
frames = lazy("sodaops.data.frames")
pd = lazy("pandas")

ROWS = [{"review": text, "stars": label} for text, label in make_rows()]
SHORT = [*(word for word in TINY if not word.startswith("trainer.")), "trainer.precision=32-true", "export.variants=[]"]
SHORT += ["evaluate.split=none", "optim.batch_tokens=256"]  # several batches in an epoch
SAME = [layout.WEIGHTS, layout.TOKENIZER, layout.ENCODER, layout.CONFIG, layout.DATA]


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def digests(folder, names=SAME):
    return [storage.sha256_of(Path(folder) / "bundle" / name) for name in names]


def test_python_trains_what_the_command_line_trains(write, capsys):
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    path = write("reviews.csv", table([tuple(row.values()) for row in ROWS], ("review", "stars")))
    words = ["data=csv", f"data.path={path}", "data.text_column=review", "data.label_column=stars", "trainer.max_epochs=2"]
    assert main(["train", *words, *SHORT, "seed=7", "run_dir=cli"]) == 0
    call = {"text": "review", "label": "stars", "max_epochs": 2, "seed": 7}
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):  # as in an application of the user's
        run = sodaops.train(path, **call, run_dir="api", overrides=SHORT)
        assert GlobalHydra.instance().is_initialized()
    assert files_of("api") == files_of("cli") and digests("api") == digests("cli")
    records = [json.loads(Path(folder, "run.json").read_text()) for folder in ("api", "cli")]
    assert records[0]["params"] == records[1]["params"] and records[0]["metrics"] == records[1]["metrics"]
    assert run.metrics == records[1]["metrics"] and run.report is None and Path(run.bundle) == Path("api/bundle")

    # A table in memory, and a run that is interrupted and resumed: the same weights again.
    stop = [*SHORT, "+callbacks.stop._target_=tests.integration.stop.Interrupt"]
    with pytest.raises(KeyboardInterrupt, match="ckpt_path=last"):
        sodaops.train(pd.DataFrame(ROWS), **call, run_dir="stopped", overrides=stop)
    assert json.loads(Path("stopped/run.json").read_text())["status"] == "interrupted"
    resumed = sodaops.train(iter(ROWS), **call, run_dir="stopped", ckpt_path="last", overrides=SHORT)
    assert digests(resumed.run_dir, SAME[:3]) == digests("cli", SAME[:3])
    assert resumed.metrics.keys() == {"val"}
    assert list(resumed.metrics["val"].items()) == list(run.metrics["val"].items())


def test_importing_and_predicting_stay_light(trained, workdir):
    code = f"""
import sys, sodaops
first = [name for name in sys.modules if name.startswith("sodaops")]
model = sodaops.load({str(trained / "run")!r})
model.predict(["I love this"])
heavy = {{"torch", "lightning", "hydra", "omegaconf", "transformers", "pandas", "sklearn"}}
print(*first, "|", *sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split("|")[0].split() == ["sodaops.drift", "sodaops"] and done.stdout.split("|")[1].split() == []


def test_the_api_has_its_names():
    assert {"train", "load", "evaluate", "drift", "Registry", "Run", "Model"} <= set(dir(sodaops))
    assert callable(sodaops.drift) and sodaops.drift.__path__
    with pytest.raises(AttributeError, match="trian"):
        _ = sodaops.trian


def test_every_keyword_is_a_key():
    from sodaops.config.keys import groups
    from sodaops.config.reference import unknown_key

    keys = {key for of_function in keywords.KEYWORDS.values() for key in of_function.values()} - {*groups()}
    assert [key for key in keys if unknown_key(key)] == [] and unknown_key("optim.lrr")


@pytest.mark.parametrize("text", ["it's", "a\\", "a\\'b", "x,y=z", "${oc.env:HOME}", "\\${x}", "true", "01", "[a]", "", " x\n"])
def test_any_text_reaches_the_configuration(text):
    composed = compose.compose(
        ["data=csv", "data.path=a.csv", *keywords.as_overrides("train", {"text": text, "labels": [text, "b", 1]})]
    )
    assert composed.data.text_column == text and composed.data.labels == [text, "b", 1]


@pytest.mark.parametrize("number", ["auto", 2])
def test_the_number_of_epochs(number):
    assert compose.compose(keywords.as_overrides("train", {"max_epochs": number})).trainer["max_epochs"] == number


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        ({"epochs": 1}, ["epochs", "did you mean max_epochs?"]),
        ({"max_epoch": 1, "txt": "a"}, ["did you mean max_epochs?", "did you mean text?"]),
        ({"model": "minilmm"}, ["model=minilmm", "did you mean minilm?"]),
        ({"lr": -1.0}, ["optim.lr=-1.0"]),
        ({"lr": object()}, ["optim.lr="]),
        ({"overrides": ["optim.lrr=1"]}, ["optim.lrr", "did you mean lr?"]),
        ({"overrides": ["-m"]}, ["-m"]),
        ({"overrides": "optim.lrr=1"}, ["optim.lrr"]),
        ({"max_epochs": "many"}, ["trainer.max_epochs='many'", "auto"]),
        ({"max_epochs": 0}, ["trainer.max_epochs=0"]),
        ({"max_epochs": -5}, ["trainer.max_epochs=-5"]),
        (
            {"overrides": ["hydra.mode=MULTIRUN", "++hydra.sweep.dir=x", "hydra/launcher=joblib"]},
            ["hydra.mode", "hydra.sweep.dir", "hydra/l"],
        ),
        ({"max_epochs": 1, "overrides": ["trainer.max_epochs=2"]}, ["trainer.max_epochs=2"]),
        ({"data": "tweetss"}, ["data=tweetss", "did you mean tweets?"]),
    ],
)
def test_keywords_are_checked(workdir, call, parts):
    with pytest.raises(ConfigError) as error:
        sodaops.train(**call)
    assert all(part in str(error.value) for part in parts)


def test_a_table_in_memory_is_one_file_whatever_holds_it(workdir):
    text, label = [row["review"] for row in ROWS], [row["stars"] for row in ROWS]
    frame = pd.DataFrame(ROWS)
    tables = {
        "rows": ROWS,
        "generator": iter(ROWS),
        "Arrow": pa.table({"review": pa.array(text, pa.large_string()), "stars": pa.array(label).dictionary_encode()}),
        "reader": pa.table({"review": text, "stars": label}).to_reader(),
        "frame": frame,
        "categories": frame.astype({"stars": pd.CategoricalDtype(["good", "unused", "bad"])}),
        "nullable": frame.astype("string"),
        "index": frame.set_index(pd.Index(range(5, 5 + len(frame)), name="id")),
        "filtered": pd.concat([frame, frame]).iloc[: len(frame)],
    }
    paths = {name: frames.write_table(data, ["review", "stars"]) for name, data in tables.items()}
    assert set(paths.values()) == {paths["rows"]} and paths["rows"].startswith("data/tables/table-")
    assert pq.read_table(paths["rows"]).to_pylist() == ROWS


def test_cells_without_a_value_and_names_that_are_numbers(workdir):
    frame = pd.DataFrame({0: ["a", None, "c"], 1: pd.array([1, None, 2], dtype="Int64"), "odd": [1, "a", {}]})
    read = pq.read_table(frames.write_table(frame, ["0", "1"]))
    assert read.to_pylist() == [{"0": "a", "1": 1}, {"0": None, "1": None}, {"0": "c", "1": 2}]
    rows = [{"a": 1}, {"b": 2}]
    assert pq.read_table(frames.write_table(rows, ["a", "b"])).to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": 2}]


BAD = {
    "a name that is no text": (lambda: pd.DataFrame({("a", "b"): ["x"]}), "('a', 'b')"),
    "two columns of one name": (lambda: pd.DataFrame([["x", "y"]], columns=["review", "review"]), "review"),
    "the index": (lambda: pd.DataFrame(ROWS).set_index("review"), "reset_index"),
    "mixed types": (lambda: pd.DataFrame({"review": ["x", "y"], "stars": ["a", 1]}), "stars: cells of int, str"),
    "no rows": (lambda: pd.DataFrame(ROWS).iloc[:0], "row"),
    "no columns": (lambda: pd.DataFrame(), "row"),
    "a generator that has been read": (lambda: iter([]), "generator"),
    "a mapping": (lambda: {"review": ["x"]}, "dict"),
    "another column": (lambda: [{"text": "x", "stars": "a"}], "review"),
    "rows that are none": (lambda: ["x"], "row 1"),
    "something else": (lambda: 5, "int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_before_anything_is_written(workdir, name):
    make, part = BAD[name]
    with pytest.raises(DataError) as error:
        sodaops.train(make(), text="review", label="stars", model="tiny")
    assert part in str(error.value)
    assert not Path("data").exists() and not Path("outputs").exists()


def test_predictions(trained, small_tweets, workdir):
    model = sodaops.load(trained / "run")
    texts = ["I love this", "the train is late again"]
    predicted = model.predict(texts)
    assert [one.label for one in predicted] == [max(one.probs, key=one.probs.get) for one in predicted]

    frame = pd.DataFrame({"text": [*texts, None], "label": ["a", "b", "c"]}, index=[7, 7, 3])
    out = model.predict(frame)
    assert list(out.columns) == ["text", "label", "predicted_label", "score", *(f"prob_{label}" for label in model.labels)]
    assert list(out.index) == [7, 7, 3] and list(out["label"]) == ["a", "b", "c"]
    assert list(out["predicted_label"]) == [one.label for one in predicted] + [None] and np.isnan(out["score"].iloc[2])
    series = model.predict(frame["text"].rename("body"))
    assert list(series.index) == [7, 7, 3] and list(series["label"]) == list(out["predicted_label"])
    renamed = model.predict(frame.rename(columns={"text": "body"}), text="body")
    assert list(renamed["predicted_label"]) == list(out["predicted_label"])

    assert model.predict_file(small_tweets, "answers.parquet").n_rows == 600
    first = pq.read_table("answers.parquet").slice(0, 50)
    again = model.predict(first["text"].to_pylist())
    assert first["label"].to_pylist() == [one.label for one in again]


def test_what_a_model_refuses(trained, workdir):
    model = sodaops.load(trained / "run/bundle", "float32")
    assert model.variant == "float32"
    for texts in ([None], ["a", 1], [{"text": "a"}], ["a", "  "], "a text"):
        with pytest.raises(DataError, match="text( [12]|')"):
            model.predict(texts)
    with pytest.raises(DataError, match="text: .* body"):
        model.predict(pd.DataFrame({"body": ["a"]}))
    with pytest.raises(BundleError, match="nowhere"):
        sodaops.load("nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        _ = sodaops.Run("nowhere").metrics


def test_evaluation_of_a_table_equals_that_of_the_split(trained, workdir):
    run = sodaops.Run(str(trained / "run"))
    rows = pq.read_table(trained / "splits/test.parquet").select(["text", "label"]).rename_columns(["text", "sentiment"])
    measured = sodaops.evaluate(sodaops.load(run.run_dir, "float32"), rows, n_bootstrap=200)
    for key in ("n_rows", "accuracy", "macro_f1", "ece"):
        assert measured.metrics[key] == pytest.approx(run.metrics["test"][key], abs=1e-6)
    assert not measured.same_data and Path(measured.report_path).parts[:2] == ("outputs", "evaluation")
    few = sodaops.evaluate(run.bundle, rows.slice(0, 1).to_pandas(), n_bootstrap=200, output_dir="few")
    assert few.metrics["n_rows"] == 1 and Path("few/metrics.json").exists()
    with pytest.raises(ConfigError, match="split"):
        sodaops.evaluate(run.bundle, rows, split="val")
    with pytest.raises(DataError, match="angry"):
        sodaops.evaluate(run.bundle, [{"text": "a", "sentiment": "angry"}])
    with pytest.raises(DataError, match="fractions"):  # such splits are not for a training
        sodaops.train(rows, label="sentiment", overrides=["data.fractions=[0,0,1]", *TINY])


def test_a_run_in_jupyter_is_its_report(trained):
    page = sodaops.Run(str(trained / "run"))._repr_html_()
    assert page.startswith("<iframe srcdoc=") and "Confusion matrix" in page and "The worst errors" in page
    assert "<script" not in page and 'src="http' not in page


def test_the_registry_and_its_gate(trained, workdir):
    registry = sodaops.Registry("models")
    overrides = [f"evaluate.splits_dir={trained / 'splits'}"]
    version = registry.register(trained / "run/bundle")
    assert registry.state().versions[version]["metrics"].keys() == {"val", "test"}
    with pytest.raises(RefusedError, match=version):
        registry.promote("challenger", overrides=overrides)
    with pytest.raises(ConfigError, match="reason"):
        registry.promote("challenger", force=True, overrides=overrides)
    assert registry.promote("challenger", "a try", force=True, overrides=overrides).promoted
    assert sodaops.load("models@champion").info.bundle_id == version


def test_drift_is_a_function_and_a_package(drift_bundle, logged_rows, workdir):
    fill(Path("log"), logged_rows.others)
    result = sodaops.drift(sodaops.load(drift_bundle), "log", last=200, output_dir="found")
    assert result.drifted and result.causes and Path("found/drift.html").exists()
    from sodaops.drift import check  # the package, still

    assert callable(check.check_drift)
    with pytest.raises(ConfigError, match="did you mean last"):
        sodaops.drift(drift_bundle, "log", lasst=5)
