"""The builds of Google Cloud: their files, and each step as a program with a `gcloud` that writes down how it is called."""

import contextlib
import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO
from tests.gcloud import OLD, VERSION, FakeGcloud, Predictor, serving, unknown

FOLDER = REPO / "cloudbuild"
BUILDS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
DENIED = "ERROR: (gcloud.x) PERMISSION_DENIED: Permission '{}' denied on resource (or it may not exist)."


@pytest.fixture
def gcloud(tmp_path):
    return FakeGcloud(tmp_path / "bin")


@pytest.fixture
def module(monkeypatch):
    """Imports a program of cloudbuild/ as it is started there: beside the others."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


# --- files


def test_the_published_schema_takes_the_builds():
    check = pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed; `pip install check-jsonschema`")
    assert set(BUILDS) == {"ci", "ci_cd", "drift", "train"}
    command = [sys.executable, "-m", check.__name__, "--builtin-schema", "vendor.cloudbuild", *map(str, BUILDS.values())]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("name", BUILDS)
def test_what_the_schema_lets_pass_is_right_too(name, module):
    assert module("lint").faults(BUILDS[name].read_text()) == []


@pytest.mark.parametrize(
    ("broken", "by", "said"),
    [
        ("timeout: 28800s", "timout: 28800s", "no field 'timout' at the top"),
        ("    waitFor: [push,", "    waitFor: [pusch,", "step train: waits for pusch, which is no step before it"),
        ("  - id: push\n", "  - id: image\n", "step image: a second step of this id"),
        ("    name: gcr.io/cloud-builders/docker\n    args: [push", "    args: [push", "step push: has no name"),
        ("  _TRAIN_ARGS: ''", "  _OTHER: ''", "_TRAIN_ARGS is used and has no default"),
        ("  _TRAIN_ARGS: ''", "  _OTHER: ''", "_OTHER is never used"),
        ("  _REPLICAS: '1'", "  _REPLICAS: 1", "_REPLICAS: 1 is no text"),
        ("  dynamicSubstitutions: true\n", "", "dynamicSubstitutions must be true"),
        ("  _REGION: ''", "  _REGION: europe-west1", "'europe-west1': has a region in it"),
        ("--region=${_REGION}", "--region=us-central1", "has a region in it"),
        ("gs://${_BUCKET}/runs", "gs://acme/runs", "has a bucket in it"),
        ("sodaops-train@${PROJECT_ID}", "sodaops-train@acme", "has an account in it"),
        ("  _WANDB_SECRET: ''", f"  _WANDB_SECRET: {'0af' * 13}0", "has a secret in it"),
    ],
)
def test_a_broken_build_is_told(broken, by, said, module):
    text = BUILDS["train"].read_text()
    assert broken in text
    assert any(said in fault for fault in module("lint").faults(text.replace(broken, by)))


def filled(build, **values):
    """A build's steps with its defaults, and others, in place of names."""
    given = {
        **build.get("substitutions", {}), "PROJECT_ID": "acme-1", "BUILD_ID": "b-1",
        "_REGION": "europe-west1", "_BUCKET": "data", "_TAG": "1a2b3c4", **values,
    }  # fmt: skip

    def fill(text):
        for _ in range(2):  # some refer to others
            text = re.sub(r"\$\{(\w+)\}", lambda name: given[name[1]], text)
        return text

    return {step["id"]: [fill(part) for part in step.get("args", [])] for step in build["steps"]}


@pytest.mark.parametrize("name", BUILDS)
def test_every_step_gives_its_program_what_it_asks_for(name, module):
    build = yaml.safe_load(BUILDS[name].read_text())
    steps = filled(build)
    programs = {step: args for step, args in steps.items() if any(re.search(r"cloudbuild/\w+\.py", part) for part in args)}
    assert len(programs) >= {"ci": 0, "train": 3, "drift": 2, "ci_cd": 6}[name]
    for args in programs.values():
        n, script = next((n, part) for n, part in enumerate(args) if part.endswith(".py"))
        program = module(script.rpartition("/")[2].removesuffix(".py"))
        if program.__name__ == "check":
            assert program.faults(args[n + 1 :]) == []
        elif program.__name__ != "compose":
            assert program.arguments(args[n + 1 :])


@pytest.mark.skipif(not (REPO / "docker").is_dir(), reason="the images' files, docker/, are not in this checkout")
@pytest.mark.parametrize("name", BUILDS)
def test_every_image_has_a_file_with_that_stage_and_those_arguments(name):
    steps = filled(yaml.safe_load(BUILDS[name].read_text())).values()
    built = [dict(part.split("=", 1) for part in args if "=" in part) for args in steps if "build" in args]
    assert len(built) >= {"ci": 2, "train": 2, "drift": 2, "ci_cd": 4}[name]
    for options in built:
        text = (REPO / options["--file"]).read_text()
        assert "--target" not in options or f" AS {options['--target']}\n" in text
    for args in steps:
        arguments = [part.split("=")[1] for part in args if part.startswith("--build-arg=")]
        file = next((part.partition("=")[2] for part in args if part.startswith("--file=")), None)
        assert all(f"ARG {name}" in (REPO / file).read_text() for name in arguments if name != "BUILDKIT_INLINE_CACHE")


def test_docstrings_hold(module):
    for path in sorted(FOLDER.glob("*.py")):
        assert doctest.testmod(module(path.stem)).failed == 0, path


# --- check


def test_missing_substitutions_are_refused_together(gcloud):
    done = gcloud.run("check.py", "_REGION=", "_BUCKET=gs://data", "_TAG=1a2b3c4", "_REPLICAS=0")
    assert done.returncode == 2 and gcloud.calls == []
    assert "_REGION is missing: a region" in done.stderr
    assert "_BUCKET=gs://data: expected a bucket's name, without gs://" in done.stderr
    assert "--substitutions=_REGION=…,_BUCKET=…,_REPLICAS=…" in done.stderr
    assert gcloud.run("check.py", "_REGION=europe-west1", "_BUCKET=data", "_TAG=1a2b3c4").returncode == 0


def test_arguments_of_the_training_and_the_gate_are_words(module):
    faults = module("check").faults
    good = [
        "_TRAIN_ARGS=",
        "_TRAIN_ARGS=experiment=amazon +callbacks.x.y=1 'data.name=a b'",
        "_GATE_ARGS=registry.gate.max_ece=0.1",
    ]
    assert faults(good) == []
    (told,) = faults(["_TRAIN_ARGS=model=tiny 'data.name=a b"])
    assert told.startswith("_TRAIN_ARGS=model=tiny 'data.name=a b: No closing quotation; expected words as one would type them")
    assert "'--multirun': expected KEY=VALUE of sodaops train" in faults(["_TRAIN_ARGS=model=tiny --multirun"])[0]
    assert [line.split(": expected")[0] for line in faults(["_GATE_ARGS=--force registry.path=x"])] == [
        "_GATE_ARGS=--force registry.path=x: '--force'", "_GATE_ARGS=--force registry.path=x: 'registry.path=x'",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [("train", "trainer.max_epoch=3", "did you mean max_epochs?"), ("ci_cd", "optim.lr=-3", "greater than 0"),
     ("ci_cd", "experiment=amazon", "")],
)  # fmt: skip
def test_a_misspelt_key_is_told_before_the_training(name, args, said, gcloud, tmp_path, monkeypatch):
    """With the real `sodaops`, in a folder where it finds no registry, as in the image."""
    build = yaml.safe_load(BUILDS[name].read_text())
    assert "compose" in next(step for step in build["steps"] if step["id"] == "train")["waitFor"]
    command = filled(build, _TRAIN_ARGS=args)["compose"]
    given = command[command.index("/workspace/cloudbuild/compose.py") + 1 :]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.chdir(tmp_path)
    done = gcloud.run("compose.py", *given)
    assert (done.returncode, said in done.stderr) == (2 if said else 0, True), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("name", ["train", "ci_cd", "drift"])
def test_a_build_without_values_ends_at_its_first_step(name, gcloud):
    build = yaml.safe_load(BUILDS[name].read_text())
    args = filled(build, _REGION="", _BUCKET="", _TAG="")["check"]
    done = gcloud.run("check.py", *args[1:])
    assert done.returncode == 2 and build["steps"][0]["id"] == "check"
    assert all(f"{missing} is missing" in done.stderr for missing in ("_REGION", "_BUCKET", "_TAG"))
    assert all(step.get("waitFor") for step in build["steps"][1:])  # so that none runs beside the check


def test_a_build_lasts_longer_than_the_longest_training(module):
    assert module("check").faults(["_TRAIN_TIMEOUT_S=24999"]) == []
    assert len(module("check").faults([f"_TRAIN_TIMEOUT_S={value}" for value in ("25000", "1e3", "9")])) == 3
    for name in ("train", "ci_cd"):
        assert int(yaml.safe_load(BUILDS[name].read_text())["timeout"].removesuffix("s")) > 24999 + 1800


# --- vertex

JOB = "projects/1/locations/europe-west1/customJobs/9"
TRAIN = (
    "--region=europe-west1", "--project=acme-1", "--image=i/train:1a2b3c4", "--account=train@acme",
    "--output=gs://data/runs/r-1",
)  # fmt: skip
QUICK = ("--poll-s=0.05", "--timeout-s=0.3", "--queue-s=0.1")
WHERE = "--project=acme-1 --region=europe-west1"
LIST = f"ai custom-jobs list {WHERE} --filter=displayName=sodaops-r-1 --format=value(name)"
CANCELLED = [LIST, f"ai custom-jobs cancel {JOB} {WHERE}"]


def test_a_training_is_started_and_waited_for(gcloud):
    gcloud.answer("custom-jobs (create|list)", JOB)
    states = ("PENDING", "RUNNING", "RUNNING", "SUCCEEDED")
    gcloud.answer("custom-jobs describe", *({"state": f"JOB_STATE_{state}"} for state in states))
    done = gcloud.run("vertex.py", *TRAIN, "--poll-s=0.01", "--args=model=tiny 'data.name=a b'")
    assert done.returncode == 0, done.stderr
    assert [command.split()[2] for command in gcloud.commands] == ["create", *["describe"] * 4]
    create = gcloud.calls[0]
    assert {"--project=acme-1", "--region=europe-west1", "--display-name=sodaops-r-1"} <= set(create["command"])
    spec = json.loads(create["config"])
    (pool,) = spec["workerPoolSpecs"]
    assert pool["machineSpec"] == {"machineType": "n1-standard-8"} and pool["replicaCount"] == 1
    told = ["train", "run_dir=gs://data/runs/r-1", "ckpt_path=last", "model=tiny", "data.name=a b"]
    assert pool["containerSpec"] == {"imageUri": "i/train:1a2b3c4", "args": told}
    assert spec["scheduling"] == {"timeout": "7200s", "restartJobOnWorkerRestart": True}
    assert spec["serviceAccount"] == "train@acme" and spec["enableWebAccess"] is False
    assert spec["baseOutputDirectory"] == {"outputUriPrefix": "gs://data/runs/r-1"}
    assert "JOB_STATE_RUNNING" in done.stdout and done.stdout.count("JOB_STATE_") == 3
    assert "trained: gs://data/runs/r-1" in done.stdout


def test_several_machines_with_gpus_and_a_secret(module):
    vertex = module("vertex")
    gpus = ["--machine-type=g2-standard-24", "--accelerator=NVIDIA_L4", "--accelerator-count=2"]
    spec = vertex.job_spec(vertex.arguments([*TRAIN, *gpus, "--replicas=3", "--wandb-secret=wandb"]))
    first, others = spec["workerPoolSpecs"]
    assert (first["replicaCount"], others["replicaCount"]) == (1, 2)
    assert first["machineSpec"] == {"machineType": "g2-standard-24", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 2}
    assert first["containerSpec"] == others["containerSpec"]
    secret, *command = first["containerSpec"]["args"]
    assert secret == "WANDB_API_KEY=projects/acme-1/secrets/wandb/versions/latest"
    assert command[:2] == ["sodaops", "train"] and {"trainer=ddp", "trainer.num_nodes=3", "logger=wandb"} <= set(command)
    assert first["containerSpec"]["command"][:2] == ["python", "-c"]


def test_a_training_that_fails_fails_the_build_with_its_own_words(gcloud):
    gcloud.answer("custom-jobs (create|list)", JOB)
    gcloud.answer("custom-jobs describe", {"state": "JOB_STATE_FAILED", "error": {"message": "replica 0 exited with 2"}})
    done = gcloud.run("vertex.py", *TRAIN)
    assert done.returncode == 1
    assert "JOB_STATE_FAILED: replica 0 exited with 2" in done.stderr and f"stream-logs {JOB}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_training_that_never_ends_is_cancelled(gcloud):
    gcloud.answer("custom-jobs (create|list)", JOB)
    gcloud.answer("custom-jobs describe", {"state": "JOB_STATE_RUNNING"})
    done = gcloud.run("vertex.py", *TRAIN, *QUICK)
    assert done.returncode == 1 and gcloud.commands[-2:] == CANCELLED
    assert "still JOB_STATE_RUNNING after 0 s" in done.stderr and "_TRAIN_TIMEOUT_S" in done.stderr
    assert "sodaops-r-1: cancelled" in done.stderr


def test_a_build_that_is_cancelled_cancels_the_training(gcloud):
    gcloud.answer("custom-jobs (create|list)", JOB)
    gcloud.answer("custom-jobs describe", {"state": "JOB_STATE_RUNNING"})
    with gcloud.start("vertex.py", *TRAIN, "--poll-s=0.05") as process:
        for line in process.stdout:
            if "JOB_STATE_RUNNING" in line:
                break
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and "stopped from outside" in said and "Traceback" not in said
    assert gcloud.commands[-2:] == CANCELLED


def test_looks_may_fail_until_the_time_is_over(gcloud):
    gcloud.answer("custom-jobs (create|list)", JOB)
    gcloud.answer("custom-jobs describe", *[(1, "ERROR: unavailable")] * 7, {"state": "JOB_STATE_SUCCEEDED"})
    done = gcloud.run("vertex.py", *TRAIN, "--poll-s=0.01")
    assert done.returncode == 0 and done.stderr.count("could not be looked at: ERROR: unavailable") == 7
    gcloud.answer("custom-jobs describe", (1, "ERROR: unavailable"))
    done = gcloud.run("vertex.py", *TRAIN, *QUICK)
    assert done.returncode == 1 and "still unseen after 0 s" in done.stderr and gcloud.commands[-2:] == CANCELLED


@pytest.mark.parametrize(
    ("command", "answer", "said"),
    [
        ("describe", (1, DENIED.format("aiplatform.customJobs.get")), "roles/aiplatform.user"),
        ("describe", (1, "ERROR: NOT_FOUND: CustomJob does not exist."), "NOT_FOUND"),
        ("describe", "no JSON", "JSONDecodeError"),
        ("create", (1, "ERROR: connection reset"), "connection reset"),
    ],
)
def test_a_training_that_cannot_be_followed_is_cancelled(gcloud, command, answer, said):
    gcloud.answer("custom-jobs (create|list)", JOB)
    gcloud.answer(f"custom-jobs {command}", answer)
    done = gcloud.run("vertex.py", *TRAIN, "--poll-s=0.01")
    assert done.returncode == 1 and said in done.stderr
    assert gcloud.commands[-2:] == CANCELLED and len(gcloud.calls) == (3 if command == "create" else 4)


def test_a_training_that_cannot_be_cancelled_is_told(gcloud):
    gcloud.answer("custom-jobs (create|list)", JOB)
    gcloud.answer("custom-jobs describe", {"state": "JOB_STATE_RUNNING"})
    gcloud.answer("custom-jobs cancel", (1, "ERROR: unavailable"))
    done = gcloud.run("vertex.py", *TRAIN, *QUICK)
    assert done.returncode == 1 and "was not cancelled, and may cost for 0 s: ERROR: unavailable" in done.stderr


def test_a_gcloud_that_says_nothing_has_a_time_limit(gcloud, module, monkeypatch):
    cloud = module("cloud")
    (gcloud.folder / "gcloud").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setenv("PATH", str(gcloud.folder), prepend=os.pathsep)
    answer = cloud.ask(["run", "deploy"], timeout_s=0.1)
    assert (answer.code, answer.denied, answer.missing) == (124, False, False)
    assert "no answer within 0.1 s; it may have been done all the same" in cloud.reason(["run", "deploy"], answer)


@pytest.mark.parametrize(
    ("permission", "role"),
    [
        ("aiplatform.customJobs.create", "roles/aiplatform.user"),
        ("iam.serviceAccounts.actAs", "roles/iam.serviceAccountUser"),
        ("storage.objects.create", "roles/storage.objectUser"),
    ],
)
def test_who_has_no_right_is_told_the_role(gcloud, permission, role):
    gcloud.answer("custom-jobs create", (1, DENIED.format(permission)))
    gcloud.answer("custom-jobs list", "")
    done = gcloud.run("vertex.py", *TRAIN)
    assert done.returncode == 1 and f"needs {role}." in done.stderr and permission in done.stderr
    assert not any("cancel" in command for command in gcloud.commands)


# --- secrets in a job


class Cloud(BaseHTTPRequestHandler):
    """The metadata of a machine, and Secret Manager."""

    status = 200

    def do_GET(self):
        if "/computeMetadata/" in self.path:
            good, body = self.headers["Metadata-Flavor"] == "Google", {"access_token": "of-the-account"}
        else:
            good = self.headers["Authorization"] == "Bearer of-the-account" and self.status == 200
            body = {"payload": {"data": "cy0zY3IzdAo="}}
        self.send_response(200 if good else self.status)
        self.end_headers()
        self.wfile.write(json.dumps(body if good else {}).encode())

    def log_message(self, *_):
        pass


def with_secret(url, *command):
    text = (FOLDER / "with_secret.py").read_text()
    where = {"GCE_METADATA_HOST": url.removeprefix("http://"), "SECRET_MANAGER_ENDPOINT": url}
    secret = "WANDB_API_KEY=projects/acme-1/secrets/wandb/versions/latest"
    started = [sys.executable, "-c", text, secret, *command]
    return subprocess.run(started, env=where, capture_output=True, text=True, check=False)


def test_a_job_fetches_its_secret_itself():
    code = "import os, sys; sys.exit(0 if os.environ['WANDB_API_KEY'] == 's-3cr3t' else 9)"
    with serving(Cloud) as url:
        done = with_secret(url, sys.executable, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("status", "mend"), [(403, "roles/secretmanager.secretAccessor"), (404, "versions add")])
def test_a_secret_that_cannot_be_read_stops_the_job(status, mend):
    with serving(type("Refusing", (Cloud,), {"status": status})) as url:
        done = with_secret(url, sys.executable, "-c", "print('it ran')")
    assert done.returncode == 1 and mend in done.stderr and f"HTTP {status}" in done.stderr and "it ran" not in done.stdout


def test_a_secret_is_read_on_google_cloud_alone():
    done = with_secret("http://127.0.0.1:9", sys.executable, "-c", "print('it ran')")
    assert done.returncode == 1 and "this runs on Google Cloud alone" in done.stderr and done.stdout == ""


# --- deploy

NEW = "sodaops-00002-new"
SERVE = (
    "serve", "--service=sodaops", "--region=europe-west1", "--project=acme-1", "--image=i/serve:1a2b3c4", "--tag=1a2b3c4",
    "--account=serve@acme", "--requests=gs://data-requests/requests", "--smoke-s=0.5",
)  # fmt: skip
DRIFT = (*("drift", *SERVE[1:]), "--service=sodaops-drift", "--bundle=gs://data/registry@champion")


@contextlib.contextmanager
def deployable(gcloud, tmp_path, **behaviour):
    """A service whose new revision behaves in some way; gives what was asked of it."""
    handler = type("Behaving", (Predictor,), {**behaviour, "seen": []})
    (tmp_path / "release.json").write_text(json.dumps({"version": VERSION, "bundle": f"gs://data/registry/versions/{VERSION}"}))
    with serving(handler) as url:
        targets = [
            {"revisionName": OLD, "percent": 100},
            {"revisionName": NEW, "tag": "c-1a2b3c4", "url": f"{url}/tag"},
            {"revisionName": "sodaops-00000-older", "tag": "c-0000000", "url": f"{url}/older"},
        ]
        handler.url, handler.targets = url, targets
        gcloud.answer("services describe", {"status": {"url": f"{url}/all", "traffic": targets}})
        gcloud.answer("print-identity-token", "id-token")
        gcloud.answer("versions access", "s-3cr3t,other")
        yield handler


def release(gcloud, tmp_path, *more):
    files = (f"--release={tmp_path / 'release.json'}", f"--done={tmp_path / 'done.txt'}")
    return gcloud.run("deploy.py", *SERVE, *files, *more)


def changes(gcloud):
    return [command for command in gcloud.commands if re.search("run deploy|update-traffic", command)]


def moves(gcloud):
    return [command.partition("--to-revisions=")[2] for command in changes(gcloud) if "--to-revisions=" in command]


@pytest.mark.parametrize("behaviour", [{}, {"private": True}, {"private": True, "key": "s-3cr3t"}])
def test_a_deployment_is_tried_before_it_has_traffic(gcloud, tmp_path, behaviour):
    with deployable(gcloud, tmp_path, **behaviour) as service:
        done = release(gcloud, tmp_path, *(["--keys-secret=keys"] if "key" in behaviour else []))
    assert done.returncode == 0, done.stderr
    deploy, move, forget = changes(gcloud)
    model = f"SODAOPS_BUNDLE=gs://data/registry/versions/{VERSION},SODAOPS_RELOAD_S=null"
    for flag in (f"--update-labels=sodaops-previous={OLD}", "--image=i/serve:1a2b3c4", "--service-account=serve@acme", model):
        assert flag in deploy
    assert "--no-traffic --tag=c-1a2b3c4" in deploy
    assert ("SODAOPS_API_KEYS=keys:latest" in deploy) == ("key" in behaviour) and "s-3cr3t" not in deploy
    assert f"--to-revisions={NEW}=100" in move and "--remove-tags=c-0000000" in forget
    answered = [path for path, status in service.seen if status == 200]
    assert answered == ["/tag/info", "/tag/predict", "/all/info", "/all/predict"]
    asked = [command for command in gcloud.commands if "print-identity-token" in command]
    assert len(asked) == (2 if behaviour.get("private") else 0) and all(command.endswith("/all") for command in asked)
    assert json.loads((tmp_path / "done.txt").read_text()) == {"revision": NEW, "good": True}
    assert "id-token" not in done.stdout + done.stderr and "s-3cr3t" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"broken": "/tag/predict"}, "no good answer within"),
        ({"version": "ddddeeeeffff"}, f"it serves ddddeeeeffff, and {VERSION} was to be deployed"),
        ({"private": True, "key": "unknown"}, "roles/run.invoker"),
    ],
)
def test_a_smoke_test_that_fails_leaves_the_traffic(gcloud, tmp_path, behaviour, said):
    with deployable(gcloud, tmp_path, **behaviour) as service:
        done = release(gcloud, tmp_path)
    assert done.returncode == 1 and said in done.stderr
    (only,) = changes(gcloud)
    assert "--no-traffic" in only
    assert re.search(rf"traffic stays on {OLD}. {NEW} failed its smoke test; look at it at .*tag .tag c-1a2b3c4", done.stderr)
    assert not any(path.startswith("/all") for path, _ in service.seen) and not (tmp_path / "done.txt").exists()


def test_a_service_that_fails_under_traffic_gets_the_old_revision_back(gcloud, tmp_path):
    with deployable(gcloud, tmp_path, broken="/all"):
        done = release(gcloud, tmp_path)
    assert done.returncode == 1 and f"traffic is back on {OLD} (100 %)" in done.stderr and not (tmp_path / "done.txt").exists()
    assert moves(gcloud) == [f"{NEW}=100", f"{OLD}=100"]


def test_the_old_revision_may_answer_for_a_while_after_the_traffic_has_moved(gcloud, tmp_path):
    with deployable(gcloud, tmp_path, n_old=2) as service:
        done = release(gcloud, tmp_path, "--smoke-s=5")
    assert done.returncode == 0, done.stderr
    assert moves(gcloud) == [f"{NEW}=100"]
    assert [path for path, _ in service.seen if path.startswith("/all")] == ["/all/info"] * 3 + ["/all/predict"]
    with deployable(gcloud, tmp_path, n_old=10**6):
        assert f"it serves 0ld, and {VERSION} was to be deployed" in release(gcloud, tmp_path).stderr
    assert moves(gcloud)[1:] == [f"{NEW}=100", f"{OLD}=100"]


def test_a_build_that_is_cancelled_under_traffic_gets_the_old_revision_back(gcloud, tmp_path):
    with deployable(gcloud, tmp_path, broken="/all") as service:
        files = (f"--release={tmp_path / 'release.json'}", f"--done={tmp_path / 'done.txt'}")
        with gcloud.start("deploy.py", *SERVE, *files, "--smoke-s=60") as process:
            while not any(path.startswith("/all") for path, _ in service.seen):
                assert process.poll() is None
                time.sleep(0.01)
            process.terminate()
            _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and f"traffic is back on {OLD}" in said and "stopped from outside" in said
    assert moves(gcloud) == [f"{NEW}=100", f"{OLD}=100"] and not (tmp_path / "done.txt").exists()


def test_traffic_that_somebody_else_moved_is_left_there(gcloud, tmp_path):
    with deployable(gcloud, tmp_path) as service:
        before = {"status": {"url": f"{service.url}/all", "traffic": service.targets}}
        other = {"status": {"url": f"{service.url}/all", "traffic": [{"revisionName": "sodaops-00009", "percent": 100}]}}
        gcloud.answer("services describe", *[before] * 3, other)
        done = release(gcloud, tmp_path)
    assert done.returncode == 1 and f"from {OLD} (100 %) to sodaops-00009 (100 %), so it was left there" in done.stderr
    assert moves(gcloud) == [] and not (tmp_path / "done.txt").exists()


def test_traffic_that_cannot_be_given_back_is_told(gcloud, tmp_path):
    with deployable(gcloud, tmp_path, broken="/all"):
        gcloud.answer(f"to-revisions={OLD}=100", (1, "ERROR: unavailable"))
        done = release(gcloud, tmp_path)
    assert done.returncode == 1 and f"{NEW} may have the traffic; see to it by hand" in done.stderr
    assert json.loads((tmp_path / "done.txt").read_text()) == {"revision": NEW, "good": False}


def test_a_release_does_not_fail_by_old_tags(gcloud, tmp_path):
    with deployable(gcloud, tmp_path):
        gcloud.answer("remove-tags", (1, "ERROR: unavailable"))
        done = release(gcloud, tmp_path)
    assert done.returncode == 0 and "warning: older tags stay" in done.stdout and (tmp_path / "done.txt").exists()


def test_a_revision_that_does_not_start_changes_nothing(gcloud, tmp_path):
    with deployable(gcloud, tmp_path) as service:
        gcloud.answer("run deploy", (1, "ERROR: The user-provided container failed to start and listen on the port"))
        done = release(gcloud, tmp_path)
    assert done.returncode == 1 and "failed to start" in done.stderr and f"traffic stays on {OLD}" in done.stderr
    assert len(changes(gcloud)) == 1 and service.seen == []


def test_a_service_that_was_never_made_is_told(gcloud, tmp_path):
    with deployable(gcloud, tmp_path):
        gcloud.answer("services describe", (1, "ERROR: (gcloud.run.services.describe) Cannot find service [sodaops]"))
        done = release(gcloud, tmp_path)
    assert done.returncode == 1 and "`make gcp-apply` makes it" in done.stderr and changes(gcloud) == []


@pytest.mark.parametrize(("there", "verb"), [("sodaops-drift", "update"), ((1, "ERROR: NOT_FOUND: Job not found"), "create")])
def test_drift_is_looked_for_on_a_schedule(gcloud, tmp_path, there, verb):
    with deployable(gcloud, tmp_path):
        gcloud.answer("jobs describe", there)
        done = gcloud.run("deploy.py", *DRIFT)
    assert done.returncode == 0, done.stderr
    assert "SODAOPS_DRIFT_BUNDLE=gs://data/registry@champion" in changes(gcloud)[0]
    last = gcloud.calls[-1]["command"]
    assert last[:5] == ["scheduler", "jobs", verb, "http", "sodaops-drift"]
    url = next(part for part in last if part.startswith("--uri=")).partition("=")[2]
    assert url.endswith("/all/look") and f"--oidc-token-audience={url.removesuffix('/look')}" in last
    assert {"--schedule=*/30 * * * *", "--http-method=post", "--oidc-service-account-email=serve@acme"} <= set(last)


def test_gcloud_knows_every_command_and_flag_of_the_steps(gcloud, tmp_path):
    with deployable(gcloud, tmp_path, private=True):
        gcloud.answer("jobs describe", (1, "NOT_FOUND"), "there")
        assert release(gcloud, tmp_path, "--keys-secret=keys").returncode == 0
        assert [gcloud.run("deploy.py", *DRIFT).returncode for _ in range(2)] == [0, 0]
    gcloud.answer("custom-jobs (create|list)", JOB)
    gcloud.answer("custom-jobs describe", {"state": "JOB_STATE_RUNNING"})
    assert gcloud.run("vertex.py", *TRAIN, *QUICK).returncode == 1
    commands = [call["command"] for call in gcloud.calls]
    assert len(commands) > 20
    assert [fault for command in commands for fault in unknown(command)] == []


# --- gate and settle


@pytest.fixture
def sodaops(tmp_path):
    fake = FakeGcloud(tmp_path / "bin", "sodaops")
    fake.answer("^registry list", {"aliases": {"champion": "1111"}, "versions": {}})
    fake.answer("^register", "2222: in gs://data/registry, and its challenger\ngo on: sodaops promote 2222")
    fake.answer("^resolve", "gs://data/registry/versions/2222")
    return fake


RELEASE = {"version": "2222", "bundle": "gs://data/registry/versions/2222", "before": "1111"}


def gate(sodaops, tmp_path):
    return sodaops.run(
        "gate.py", "--bundle=gs://data/run/bundle", "--registry=gs://data/registry", "--reports=gs://data/gate",
        f"--release={tmp_path / 'release.json'}",
        "--args=experiment=amazon model=tiny", "--gate=registry.gate.min_gain=-0.01", "--reason=commit 1a2b3c4",
    )  # fmt: skip


def test_the_gate_registers_and_promotes(sodaops, tmp_path):
    assert gate(sodaops, tmp_path).returncode == 0
    assert sodaops.commands == [
        "registry list --json registry.path=gs://data/registry",
        "preprocess experiment=amazon model=tiny",
        "register gs://data/run/bundle registry.path=gs://data/registry --reason=commit 1a2b3c4",
        "resolve 2222 registry.path=gs://data/registry",
        "promote 2222 experiment=amazon model=tiny registry.path=gs://data/registry --reason=commit 1a2b3c4 "
        "registry.report_dir=gs://data/gate registry.gate.min_gain=-0.01",
    ]
    assert json.loads((tmp_path / "release.json").read_text()) == RELEASE


def test_a_model_that_is_refused_ends_the_build_with_3(sodaops, tmp_path):
    sodaops.answer("^promote", (3, "RefusedError: 2222 is refused (max_ece); 1111 stays champion."))
    done = gate(sodaops, tmp_path)
    assert done.returncode == 3 and "is refused" in done.stderr
    assert "champion is 1111, which this build did not make, so it stays" in done.stderr
    assert not any(command.startswith("rollback") for command in sodaops.commands)


def test_a_promotion_that_fails_when_it_was_made_is_taken_back(sodaops, tmp_path):
    sodaops.answer("^registry list", {"aliases": {"champion": "1111"}}, {"aliases": {"champion": "2222"}})
    sodaops.answer("^promote", (2, "the mirror is gone"))
    assert gate(sodaops, tmp_path).returncode == 2
    assert sodaops.commands[-1] == "rollback registry.path=gs://data/registry --reason=it was not deployed"


def test_the_champion_itself_is_deployed_without_a_judgement(sodaops, tmp_path):
    sodaops.answer("^registry list", {"aliases": {"champion": "2222"}, "versions": {}})
    assert gate(sodaops, tmp_path).returncode == 0
    assert not any(command.startswith("promote") for command in sodaops.commands)
    assert json.loads((tmp_path / "release.json").read_text()) == {**RELEASE, "before": "2222"}


@pytest.mark.parametrize(
    ("champion", "before", "done", "code", "n_calls", "said"),
    [
        ("2222", "1111", '{"revision": "r", "good": true}', 0, 0, ""),
        ("2222", "1111", None, 1, 2, "2222 was not deployed"),
        ("2222", "2222", None, 1, 1, "2222 was champion before this build"),
        ("2222", None, None, 1, 1, "2222 stays champion, as there was none before it"),
        ("3333", "1111", None, 1, 1, "champion is 3333, which this build did not make"),
        (
            "2222",
            "1111",
            '{"revision": "r", "good": false}',
            1,
            0,
            "r may have the traffic, so the registry's champion stays 2222",
        ),
    ],
)
def test_a_deployment_that_failed_takes_its_own_promotion_back(sodaops, tmp_path, champion, before, done, code, n_calls, said):
    release, file = tmp_path / "release.json", tmp_path / "done.txt"
    release.write_text(json.dumps({**RELEASE, "before": before}))
    if done:
        file.write_text(done)
    sodaops.answer("^registry list", {"aliases": {"champion": champion}})
    ended = sodaops.run("settle.py", f"--release={release}", f"--done={file}", "--registry=gs://data/registry")
    assert ended.returncode == code and said in ended.stderr and len(sodaops.calls) == n_calls
    assert code or ended.stdout == "r serves 2222\n"
    rolled = ["rollback registry.path=gs://data/registry --reason=it was not deployed"]
    assert [command for command in sodaops.commands if command.startswith("rollback")] == (rolled if n_calls == 2 else [])


def test_a_registry_that_cannot_be_read_is_left(sodaops, tmp_path):
    release = tmp_path / "release.json"
    release.write_text(json.dumps(RELEASE))
    sodaops.answer("^registry list", (2, "StorageError: 503"))
    ended = sodaops.run("settle.py", f"--release={release}", f"--done={tmp_path / 'none'}", "--registry=gs://data/registry")
    assert ended.returncode == 1 and "StorageError: 503" in ended.stderr and "could not be read" in ended.stderr
    assert len(sodaops.calls) == 1
