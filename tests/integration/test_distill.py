"""A student that learns from teachers: its bundle, its report, resuming, and teachers that cannot teach it."""

import json
import shutil
from pathlib import Path

import pyarrow.csv
import pytest

from sodaops.bundle import layout
from sodaops.data.preprocess import read_split
from sodaops.errors import ConfigError
from sodaops.inference.predictor import Predictor
from tests.conftest import configured, lazy, run_overrides, table

fit = lazy("sodaops.training.fit")
pipeline = lazy("sodaops.pipeline")
teacher = lazy("sodaops.training.teacher")

STUDENT = ("experiment=distill", "model=tiny", "model.layers=1", "trainer.max_epochs=1")


def overrides(folder, small_tweets, *more):
    return [*STUDENT, *(key for key in run_overrides(folder, small_tweets, *more) if not key.startswith("trainer.max_epochs"))]


@pytest.fixture(scope="module")
def home(trained, tmp_path_factory):
    """A folder with the teacher's splits and bundle, and texts without labels: 20 new ones, and 4 that stand in a split."""
    folder = tmp_path_factory.mktemp("distill")
    shutil.copytree(trained / "splits", folder / "splits")
    shutil.copytree(trained / "run/bundle", folder / "teacher")
    held = [read_split(folder / "splits", split)["text"][0].as_py() for split in ("train", "val", "test", "test")]
    texts = [[f"{word} {i} and more"] for i in range(10) for word in ("lovely", "awful")]
    (folder / "more.csv").write_text(table([*texts, *([f"{text}"] for text in held[:3]), [held[3] + " !!"]], ["text"]))
    return folder


@pytest.fixture(scope="module")
def student(home, small_tweets):
    """The run of a student, with one of the teacher's two layers."""
    keys = (f"teacher={home}/teacher", f"data.unlabelled={home}/more.csv", "distill.hidden=1")
    return pipeline.train(configured(*overrides(home, small_tweets, *keys)))


def test_a_student_is_a_bundle_like_any_other(student, home):
    predictor, large = Predictor(student.bundle), Predictor(home / "teacher")
    assert predictor.probs(["so good"]).shape == (1, 3) and json.loads((Path(student.bundle) / "config.json").read_bytes())[
        "num_hidden_layers"
    ] == 1  # fmt: skip
    learnt = layout.read_json(student.bundle, predictor.info, layout.DATA)["distillation"]
    assert learnt["teachers"] == [large.info.bundle_id] and learnt["n_unlabelled"] == 20
    assert sum(learnt["dropped"].values()) == 4 and learnt["dropped"]["like a text of val or test"] == 3


def test_the_report_compares_both(student, home, run):
    measured = json.loads((Path(student.run_dir) / "evaluation/metrics.json").read_bytes())["test"]
    compared = measured["teacher"]
    gain = compared["gain"]
    assert compared["bundle_ids"] == [layout.read_info(home / "teacher").bundle_id] and compared["speed"] > 0
    assert gain["low"] <= gain["measured"] <= gain["high"]
    own = measured["macro_f1"]
    assert gain["measured"] == pytest.approx(own - compared["summary"]["macro_f1"])
    page = Path(student.report).read_text()
    assert f"{compared['summary']['macro_f1']:.3f}" in page and f"{gain['low']:+.4f}" in page
    keys = (f"evaluate.splits_dir={home}/splits", f"evaluate.output_dir={home}/again", f"teacher={home}/teacher")
    code, _, err = run("evaluate", f"evaluate.bundle={student.bundle}", "evaluate.n_bootstrap=200", *keys)
    assert code == 0, err
    again = json.loads((home / "again/metrics.json").read_bytes())["test"]["teacher"]
    assert again["gain"] == gain and again["summary"] == compared["summary"]


def test_answers_are_computed_once(student, home, small_tweets):
    (file,) = (home / ".splits.teacher").glob("*.parquet")
    before = file.stat().st_mtime_ns
    keys = (f"teacher={home}/teacher", f"data.unlabelled={home}/more.csv", "distill.hidden=1")
    config = configured(*overrides(home, small_tweets, *keys))
    answers = teacher.teacher_answers(config, teacher_manifest(home), [home / "teacher"])
    assert file.stat().st_mtime_ns == before and len(answers.texts) == 20
    train = read_split(home / "splits", "train")["text"].to_pylist()
    large = Predictor(home / "teacher", "float32")
    for places, output in large.batches([*train, *answers.texts]):
        assert answers.probs[places] == pytest.approx(output.probs, abs=1e-6)
        assert answers.embeddings[places] == pytest.approx(output.embeddings, abs=1e-6)
    two = config.model_copy(update={"teacher": [str(home / "teacher")] * 2})
    mean = teacher.teacher_answers(two, teacher_manifest(home), [home / "teacher"] * 2)
    assert mean.probs == pytest.approx(answers.probs, abs=1e-6)
    assert mean.embeddings == pytest.approx(answers.embeddings, abs=1e-6)
    with pytest.raises(ConfigError, match=r"distill\.hidden"):
        teacher.teacher_answers(config, teacher_manifest(home), [home / "teacher"], width=7)


def teacher_manifest(home):
    return json.loads((home / "splits/manifest.json").read_bytes())


def rewritten(source, target, **fields):
    """A copy of a bundle with other fields, and with the hashes and the id that belong to them."""
    shutil.copytree(source, target)
    for name in layout.ONNX.values() if fields.get("onnx") == {} else ():
        (target / name).unlink()
    info = json.loads((source / layout.INFO).read_bytes())
    kept = {key: value for key, value in info.items() if key not in ("files", "bundle_id")}
    layout.write_info(target, **{**kept, **fields})
    return target


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"labels": ["bad", "fair", "good"]}, "labels"),
        ({"cleaning": "letters"}, "data.cleaning"),
        ({"onnx": {}}, "float32"),
        ({"task": {"_target_": "sodaops.tasks.ordinal.Ordinal", "edges": None}}, "task"),
    ],
)
def test_teachers_for_something_else_are_refused(fields, key, home, tmp_path, small_tweets, run):
    other = rewritten(home / "teacher", tmp_path / "other", **fields)
    code, _, err = run("train", *overrides(tmp_path, small_tweets, f"teacher={other}"))
    assert code == 2 and f"teacher={other}" in err and key in err
    assert not (tmp_path / "splits").exists() and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(("key", "value"), [("teacher", "nowhere"), ("data.unlabelled", "nowhere.csv")])
def test_missing_teachers_and_tables_are_named(key, value, home, tmp_path, small_tweets, run):
    keys = {"teacher": f"{home}/teacher", "data.unlabelled": f"{home}/more.csv", key: value}
    code, _, err = run("train", *overrides(tmp_path, small_tweets, *(f"{name}={one}" for name, one in keys.items())))
    assert code == 2 and f"{key}={value}" in err and not (tmp_path / "splits").exists()


def test_a_teacher_that_may_know_the_test_rows_is_refused(home, tmp_path, small_tweets, run, caplog):
    code, _, err = run("train", *overrides(tmp_path, small_tweets, f"teacher={home}/teacher", "data.fractions=[0.6,0.1,0.3]"))
    assert code == 2 and f"teacher={home}/teacher" in err and "val or test" in err
    config, manifest = configured(*overrides(home, small_tweets, f"teacher={home}/teacher")), teacher_manifest(home)
    manifest["splits"]["val"]["sha256"] = "that of a val with rows of an added table"  # which no teacher knows
    assert teacher.teacher_answers(config, manifest, [home / "teacher"]) is not None
    other = tmp_path / "other.csv"
    pyarrow.csv.write_csv(pyarrow.csv.read_csv(small_tweets).slice(100, 300), other)
    config = configured(*overrides(tmp_path, other, f"teacher={home}/teacher"))
    manifest = pipeline.prepare(config)
    assert teacher.teacher_answers(config, manifest, [home / "teacher"]) is not None and "other tables" in caplog.text


def test_a_changed_teacher_is_noticed(student, home, tmp_path, small_tweets, run):
    other = rewritten(home / "teacher", tmp_path / "other", pad_token_id=1)
    keys = (f"evaluate.splits_dir={home}/splits", f"evaluate.output_dir={tmp_path}/again", f"teacher={other}")
    code, _, err = run("evaluate", f"evaluate.bundle={student.bundle}", *keys)
    assert code == 2 and "teacher" in err and layout.read_info(other).bundle_id in err and not (tmp_path / "again").exists()
    keys = (f"teacher={other}", f"data.unlabelled={home}/more.csv", f"ckpt_path={student.run_dir}/checkpoints/last.ckpt")
    keys = (*keys, "distill.hidden=1")
    config = configured(*overrides(tmp_path, small_tweets, *keys), "trainer.max_epochs=2", f"evaluate.splits_dir={home}/splits")
    with pytest.raises(ConfigError, match="teacher"):
        fit.fit(config, teachers=[other])
