"""A table, a run, a bundle, a registry and reports at gs://, on an emulated bucket, as a shell sees them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sodaops.bundle import layout
from sodaops.data.preprocess import preprocess
from sodaops.evaluation.result import WRITTEN
from sodaops.io.storage import sha256_of
from tests.conftest import REPO, TINY, configured, lazy
from tests.gcs import refusing
from tests.serving import DRIFT, Server
from tests.watching import fill

check = lazy("sodaops.drift.check")
upload = lazy("sodaops.training.upload")

pytestmark = pytest.mark.slow
DENIED = "sa@p.iam.gserviceaccount.com does not have storage.objects.create access"


@pytest.fixture
def run(run, workdir, monkeypatch):
    """With a cache of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir.parent / "cache"))
    return run


def test_a_table(run, bucket, cloud, small_tweets, tmp_path):
    cloud.put_file(str(small_tweets), "bucket/data/tweets.csv")
    address = f"{bucket}/data/tweets.csv"
    code, out, err = run("preprocess", f"data.path={address}")
    assert code == 0 and "600 rows" in out, err
    manifest = json.loads(Path("data/processed/tweets/manifest.json").read_text())
    here = preprocess(configured(f"data.path={small_tweets}").data, tmp_path / "here")
    assert manifest["sources"] == [{"path": address, "sha256": sha256_of(small_tweets)}]
    assert (
        manifest["fingerprint"] == here["fingerprint"]
        and manifest["splits"]["val"]["labels"] == here["splits"]["val"]["labels"]
    )
    given = [f"data.files.{split}={address}" for split in ("train", "val", "test")]
    code, _, err = run("preprocess", "data.path=null", *given)
    assert code == 2 and address in err, "the same rows in three splits are named by their source"
    cloud.pipe("bucket/data/bad.csv", b"text,sentiment\n\xff,positive\n")
    code, _, err = run("preprocess", "data=csv", f"data.path={bucket}/data/bad.csv", "data.label_column=sentiment")
    assert code == 2 and f"DataError: {bucket}/data/bad.csv line 2, byte 1: 0xff" in err
    code, _, err = run("preprocess", f"data.path={bucket}/data/none.csv")
    assert code == 2 and f"StorageError: {bucket}/data/none.csv: " in err


def test_a_bundle(run, bucket, cloud, trained):
    cloud.put(f"{trained}/run/bundle/", "bucket/run/bundle/", recursive=True)
    cloud.put_file(f"{trained}/run/run.json", "bucket/run/run.json")
    bundle, splits = f"{bucket}/run/bundle", f"evaluate.splits_dir={trained / 'splits'}"
    Path("texts.csv").write_text("text\nwhat a day\n")
    code, answer, err = run("predict", bundle, "what a day")
    assert code == 0 and "what a day" in answer, err
    cloud.put_file("texts.csv", "bucket/texts.csv")
    assert run("predict", bundle, "--file", f"{bucket}/texts.csv", "--output", "answers.csv")[0] == 0
    assert "what a day" in Path("answers.csv").read_text()
    assert f"--output {bucket}/a.csv: " in run("predict", bundle, "--file", "texts.csv", "--output", f"{bucket}/a.csv")[2]

    code, out, err = run("evaluate", bundle, splits, *TINY[2:4])
    assert code == 0 and f"report: {bucket}/run/evaluation/report.html" in out, err
    written = {path.removeprefix("bucket/run/evaluation/").partition("/")[0] for path in cloud.find("bucket/run/evaluation")}
    assert written == set(WRITTEN) - {".gitignore"}
    local = json.loads((trained / "run/evaluation/metrics.json").read_text())["test"]
    assert json.loads(cloud.cat("bucket/run/evaluation/metrics.json"))["test"]["macro_f1"] == local["macro_f1"]

    registry = f"registry.path={bucket}/registry"
    code, out, err = run("register", bundle, registry)
    version = layout.read_info(trained / "run/bundle").bundle_id
    assert code == 0 and out.startswith(f"{version}: ") and f"{bucket}/registry" in out, err
    listed = json.loads(run("registry", "list", "--json", registry)[1])["versions"][version]
    assert listed["metrics"]["test"]["macro_f1"] == local["macro_f1"], "the run's record lies beside the bundle"
    assert run("predict", f"{bucket}/registry@challenger", "what a day")[1] == answer
    code, _, err = run("evaluate", f"{bucket}/registry@challenger", splits)
    assert code == 2 and "ConfigError: evaluate.output_dir is missing" in err
    gate = ["registry.gate.behaviour=null", "registry.gate.n_bootstrap=1000", f"registry.report_dir={bucket}/gate", splits]
    code, out, err = run("promote", "challenger", registry, *gate)
    assert code == 3 and f"report: {bucket}/gate/{version}/gate.html" in out, err
    assert json.loads(cloud.cat(f"bucket/gate/{version}/gate.json"))["passed"] is False
    assert f"ConfigError: sodaops export {bundle}: " in run("export", bundle)[2]


def test_half_a_bundle(run, bucket, cloud, trained):
    half, whole = f"{bucket}/half", trained / "run/bundle"
    for path in whole.iterdir():
        if path.name != layout.INFO:
            cloud.put_file(str(path), f"bucket/half/{path.name}")
    for ask in (("predict", half, "x"), ("evaluate", half), ("register", half), ("drift", half, "drift.request_log=log")):
        code, _, err = run(*ask)
        assert code == 2 and f"BundleError: {half}: " in err
    server = Server(half, wait=False)
    assert server.signal(0) == 2 and f"BundleError: {half}: " in "".join(server.lines)
    cloud.put_file(str(whole / layout.INFO), f"bucket/half/{layout.INFO}")
    cloud.pipe("bucket/half/model.onnx", b"other")
    cloud.rm("bucket/half/tokenizer.json")
    code, _, err = run("predict", half, "x", "--variant", "float32")
    assert code == 2 and f"BundleError: {half}: damaged bundle: model.onnx has been changed, tokenizer.json is missing." in err


def test_a_version_that_was_half_registered_is_no_version(run, bucket, cloud, trained):
    """What an upload left behind that was cut off is not taken for a version by the next one."""
    bundle, registry = trained / "run/bundle", f"registry.path={bucket}/cut"
    version = layout.read_info(bundle).bundle_id
    with refusing(lambda method, path, body: b"model.onnx" in body[:300], message=DENIED):
        code, _, err = run("register", bundle, registry)
    assert code == 2 and DENIED in err and "roles/storage.objectUser" in err
    assert "empty" in run("registry", "list", registry)[1]
    assert f"bucket/cut/versions/{version}/{layout.INFO}" not in cloud.find("bucket/cut")
    assert run("register", bundle, registry)[0] == 0
    assert run("predict", f"{bucket}/cut@{version}", "x")[0] == 0
    code, _, err = run("resolve", "champion", "registry.path=gs://no-bucket/registry")
    assert code == 2 and "gs://no-bucket/registry" in err and "buckets create gs://no-bucket" in err


@pytest.mark.deep
def test_a_drift_report(run, bucket, cloud, drift_bundle, logged_rows):
    fill(Path("log"), logged_rows.others)
    cloud.pipe("bucket/drift/evidently.html", b"of an earlier look")
    asked = ("drift", drift_bundle, "drift.request_log=log", f"drift.output_dir={bucket}/drift", "drift.last=40")
    code, out, err = run(*asked)
    assert code == 0 and f"report: {bucket}/drift/{check.PAGE}" in out, err
    assert {path.rpartition("/")[2] for path in cloud.find("bucket/drift")} == {check.PAGE, "drift.json"}
    shutil.copytree(drift_bundle, "run/bundle")
    assert run("report", "run", f"drift.output_dir={bucket}/drift")[0] == 0
    assert "No drift look was given" not in Path("run/project_report.html").read_text()
    code, _, err = run("report", "run", f"evaluate.output_dir={bucket}/evaluation")
    assert code == 2 and f"evaluate.output_dir={bucket}/evaluation: " in err
    settings = {"request_log": Path("log").resolve(), "output_dir": f"{bucket}/watched", "every_s": 9999}
    with Server(drift_bundle, prefix=DRIFT, **settings) as server, server.client() as client:
        client.post("/look")
        assert client.get("/report").content == cloud.cat(f"bucket/watched/{check.PAGE}")
    with refusing(lambda method, path, body: method == "POST", message=DENIED):
        code, _, err = run(*asked)
    assert code == 2 and f"{bucket}/drift: " in err and "roles/storage.objectUser" in err


OVERRIDES = ("model=tiny", "logger=csv", "export.variants=[]", "evaluate.split=none", "early_stopping.patience=null")


@contextlib.contextmanager
def started(folder, *overrides):
    """`sodaops train` on another machine, so to speak."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(REPO), "XDG_CACHE_HOME": str(folder / "cache")}
    code = "import sys; from sodaops import cli; from sodaops.training import upload; upload._INTERVAL_S = 0.2; "
    code += "sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", *OVERRIDES, *overrides]
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        yield process
        process.kill()


def test_a_run_that_was_killed_goes_on_elsewhere_and_lands_whole(run, bucket, cloud, small_tweets, tmp_path):
    cloud.put_file(str(small_tweets), "bucket/train/tweets.csv")
    asked = (f"data.path={bucket}/train/tweets.csv", f"run_dir={bucket}/runs/one", "ckpt_path=last", "trainer.max_epochs=8")
    with started(tmp_path / "first", *asked) as first:
        until = time.monotonic() + 120
        while not cloud.exists("bucket/runs/one/checkpoints/last.ckpt") and time.monotonic() < until and first.poll() is None:
            time.sleep(0.1)
        first.kill()
        output = first.communicate()[0]
    assert cloud.exists("bucket/runs/one/checkpoints/last.ckpt"), output
    assert json.loads(cloud.cat(f"bucket/runs/one/{upload.UPLOAD_RECORD}"))["whole"] is False
    assert json.loads(cloud.cat("bucket/runs/one/run.json"))["status"] == "running", "it was in the middle"

    code, out, err = run("train", *OVERRIDES, *asked)
    assert code == 0 and f"run: {bucket}/runs/one" in out + err, err
    assert "epoch 8/8" in err and "epoch 1/8" not in err, "it went on"
    account = json.loads(cloud.cat(f"bucket/runs/one/{upload.UPLOAD_RECORD}"))
    here = Path("outputs/gs/bucket/runs/one")
    there = {path.removeprefix("bucket/runs/one/") for path in cloud.find("bucket/runs/one")}
    assert list(account["files"])[-3:] == ["checkpoints/last.ckpt", "bundle/bundle.json", "run.json"]
    assert account["whole"] and set(account["files"]) == there - {upload.UPLOAD_RECORD}
    assert {name: sha256_of(here / name) for name in account["files"]} == account["files"]
    assert {"bundle/bundle.json", "bundle/model.safetensors", "checkpoints/best.ckpt", "metrics/metrics.csv"} <= there
    assert json.loads(cloud.cat("bucket/runs/one/run.json"))["status"] == "finished"


def test_an_interrupted_run_names_the_arguments_that_resume_it(run, bucket, cloud, small_tweets):
    stop = "+callbacks.stop={_target_: tests.integration.stop.SendSigterm, where: batch, epoch: 0, batch: 2}"
    code, _, err = run("train", *OVERRIDES, f"data.path={small_tweets}", f"run_dir={bucket}/runs/stopped", stop)
    assert code == 143 and f"run_dir={bucket}/runs/stopped ckpt_path=last" in err
    assert json.loads(cloud.cat("bucket/runs/stopped/run.json"))["status"] == "interrupted"
    assert cloud.exists("bucket/runs/stopped/checkpoints/last.ckpt")


def test_a_remote_checkpoint(run, bucket, cloud, trained, small_tweets):
    for name in ("best.ckpt", "last.ckpt"):
        cloud.put_file(f"{trained}/run/checkpoints/{name}", f"bucket/runs/old/checkpoints/{name}")
    asked = ("train", *TINY, f"data.path={small_tweets}", f"evaluate.splits_dir={trained / 'splits'}", "run_dir=here")
    code, _, err = run(*asked, f"ckpt_path={bucket}/runs/old/checkpoints/last.ckpt")
    assert code == 2 and "last.ckpt: " in err and "2 epochs" in err and "trainer.max_epochs" in err
    code, _, err = run(*asked, f"ckpt_path={bucket}/runs/none/checkpoints/last.ckpt")
    assert code == 2 and f"ConfigError: ckpt_path={bucket}/runs/none/checkpoints/last.ckpt: no such file" in err


@pytest.mark.deep
def test_a_teacher(run, bucket, cloud, trained, small_tweets):
    cloud.put(f"{trained}/run/bundle/", "bucket/teacher/", recursive=True)
    shutil.copytree(trained / "splits", "splits")
    own = (f"data.path={small_tweets}", "evaluate.splits_dir=splits", "run_dir=student", "trainer.max_epochs=1")
    code, _, err = run("train", *OVERRIDES, *own, "model.layers=1", f"teacher={bucket}/teacher")
    assert code == 0, err
    learnt = layout.read_json("student/bundle", layout.read_info("student/bundle"), layout.DATA)["distillation"]
    assert learnt["teachers"] == [layout.read_info(trained / "run/bundle").bundle_id]


def test_a_run_without_rights_fails_before_it_trains(run, bucket, small_tweets):
    with refusing(lambda method, path, body: method == "POST", message=DENIED):
        code, out, err = run("train", *TINY, f"data.path={small_tweets}", f"run_dir={bucket}/runs/two")
    assert code == 2 and "epoch" not in out and not Path("outputs/gs").exists()
    assert f"{bucket}/runs/two/landed.json: " in err and "roles/storage.objectUser" in err


def test_a_run_that_cannot_land_is_whole_here(run, bucket, cloud, small_tweets):
    with refusing(lambda method, path, body: b"bundle/bundle.json" in body[:300], message=DENIED):
        code, _, err = run(
            "train", *OVERRIDES, f"data.path={small_tweets}", f"run_dir={bucket}/runs/three", "trainer.max_epochs=1"
        )
    here = Path("outputs/gs/bucket/runs/three")
    assert code == 2 and "roles/storage.objectUser" in err and str(here) in err
    layout.verify(here / "bundle", layout.read_info(here / "bundle"))
    assert json.loads(cloud.cat(f"bucket/runs/three/{upload.UPLOAD_RECORD}"))["whole"] is False
    assert "BundleError: " in run("predict", f"{bucket}/runs/three/bundle", "x")[2]


def test_what_stays_on_this_machine(run):
    for key in ("annotate.store", "serve.journal_dir", "serve.feedback_store", "evaluate.splits_dir", "data.added"):
        code, _, err = run("preprocess", f"{key}=gs://bucket/x")
        assert code == 2 and f"{key}='gs://bucket/x': " in err
    code, _, err = run("train", "hydra.run.dir=gs://bucket/x")
    assert code == 2 and "hydra.run.dir=gs://bucket/x: " in err and "run_dir=gs://BUCKET/FOLDER" in err
    code, _, err = run("train", "run_dir=gs://bucket")
    assert code == 2 and "run_dir=gs://bucket: expected a folder in a bucket" in err
    assert not Path("gs:").exists()
