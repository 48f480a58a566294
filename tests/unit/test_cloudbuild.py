"""The Cloud Build files, and each step as a program run with a recording `gcloud`."""

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
BUILDS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
DENIED = "ERROR: (gcloud.x) PERMISSION_DENIED: Permission '{}' denied on resource (or it may not exist)."


@pytest.fixture
def gcloud(tmp_path):
    return FakeGcloud(tmp_path / "bin")


@pytest.fixture
def module(monkeypatch):
    """Imports a program of cloudbuild/ with its folder on the path, as when it is started."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


# --- files; `make lint-cloudbuild` runs the published schema and lint.py on them


@pytest.mark.parametrize(("text", "replacement", "named"), [
    ("timeout: 28800s", "timout: 28800s", "'timout'"),
    ("    waitFor: [push,", "    waitFor: [pusch,", "step train: .*pusch"),
    ("  - id: push\n", "  - id: image\n", "step image: .*id"),
    ("    name: gcr.io/cloud-builders/docker\n    args: [push", "    args: [push", "step push: .*name"),
    ("  _TRAIN_ARGS: ''", "  _OTHER: ''", "_TRAIN_ARGS .*default"),
    ("  _TRAIN_ARGS: ''", "  _OTHER: ''", "_OTHER .*never used"),
    ("  _REPLICAS: '1'", "  _REPLICAS: 1", "_REPLICAS: 1"),
    ("  dynamicSubstitutions: true\n", "", "dynamicSubstitutions"),
    ("  _REGION: ''", "  _REGION: europe-west1", "europe-west1.*a region"),
    ("--region=${_REGION}", "--region=us-central1", "us-central1.*a region"),
    ("gs://${_BUCKET}/runs", "gs://acme/runs", "gs://acme.*a bucket"),
    ("sodaops-train@${PROJECT_ID}", "sodaops-train@acme", "sodaops-train@acme.*an account"),
    ("  _WANDB_SECRET: ''", f"  _WANDB_SECRET: {'0af' * 13}0", "a secret"),
])  # fmt: skip
def test_faults_of_a_build_are_reported(text, replacement, named, module):
    build = (FOLDER / "train.yaml").read_text()
    assert text in build and module("lint").faults(build) == []
    assert any(re.search(named, fault) for fault in module("lint").faults(build.replace(text, replacement)))


def filled(build, **values):
    """Step id -> arguments, with substitutions replaced by their defaults and by values."""
    substitutions = {
        **build.get("substitutions", {}), "PROJECT_ID": "acme-1", "BUILD_ID": "b-1",
        "_REGION": "europe-west1", "_BUCKET": "data", "_TAG": "1a2b3c4", **values,
    }  # fmt: skip

    def fill(text):
        for _ in range(2):  # some refer to others
            text = re.sub(r"\$\{(\w+)\}", lambda name: substitutions[name[1]], text)
        return text

    return {step["id"]: [fill(part) for part in step.get("args", [])] for step in build["steps"]}


@pytest.mark.parametrize(("name", "n_programs"), [("ci", 0), ("train", 3), ("drift", 2), ("ci_cd", 6)])
def test_every_step_gives_its_program_valid_arguments(name, n_programs, module):
    programs = [args for args in filled(BUILDS[name]).values() if any(re.search(r"cloudbuild/\w+\.py", part) for part in args)]
    assert len(programs) >= n_programs
    for args in programs:
        n, script = next((n, part) for n, part in enumerate(args) if part.endswith(".py"))
        program = module(Path(script).stem)
        if program.__name__ == "check":
            assert program.faults(args[n + 1 :]) == []
        elif program.__name__ != "compose":
            assert program.arguments(args[n + 1 :])


@pytest.mark.skipif(not (REPO / "docker").is_dir(), reason="the images' files, docker/, are not in this checkout")
@pytest.mark.parametrize(("name", "n_images"), [("ci", 2), ("train", 2), ("drift", 2), ("ci_cd", 4)])
def test_every_image_has_a_file_with_that_stage_and_those_arguments(name, n_images):
    steps = [args for args in filled(BUILDS[name]).values() if "build" in args]
    assert len(steps) >= n_images
    for args in steps:
        options = dict(part.split("=", 1) for part in args if "=" in part)
        text = (REPO / options["--file"]).read_text()
        assert "--target" not in options or f" AS {options['--target']}\n" in text
        arguments = {part.split("=")[1] for part in args if part.startswith("--build-arg=")} - {"BUILDKIT_INLINE_CACHE"}
        assert all(f"ARG {argument}" in text for argument in arguments)


def test_docstrings_hold(module):
    assert [path for path in FOLDER.glob("*.py") if doctest.testmod(module(path.stem)).failed] == []


# --- check and compose


def test_missing_substitutions_are_refused_together(gcloud):
    done = gcloud.run("check.py", "_REGION=", "_BUCKET=gs://data", "_TAG=1a2b3c4", "_REPLICAS=0")
    assert done.returncode == 2 and gcloud.calls == []
    assert all(name in done.stderr for name in ("_REGION", "_BUCKET=gs://data", "_REPLICAS=0")) and "_TAG" not in done.stderr
    assert gcloud.run("check.py", "_REGION=europe-west1", "_BUCKET=data", "_TAG=1a2b3c4").returncode == 0


@pytest.mark.parametrize(("pair", "named"), [
    ("_TRAIN_ARGS=", []),
    ("_TRAIN_ARGS=experiment=amazon +callbacks.x.y=1 'data.name=a b'", []),
    ("_GATE_ARGS=registry.gate.max_ece=0.1", []),
    ("_TRAIN_ARGS=model=tiny 'data.name=a b", ["No closing quotation"]),
    ("_TRAIN_ARGS=model=tiny --multirun", ["'--multirun'"]),
    ("_GATE_ARGS=--force registry.path=x", ["'--force'", "'registry.path=x'"]),
    ("_TRAIN_TIMEOUT_S=24999", []),
    *((f"_TRAIN_TIMEOUT_S={value}", [value]) for value in ("25000", "1e3", "9")),
])  # fmt: skip
def test_substitutions_are_checked(pair, named, module):
    faults = module("check").faults([pair])
    assert len(faults) == len(named) and all(name in fault for name, fault in zip(named, faults, strict=True))


@pytest.mark.parametrize(("name", "args", "named"), [
    ("train", "trainer.max_epoch=3", "max_epochs"),
    *(
        pytest.param("ci_cd", *values, marks=pytest.mark.slow)
        for values in (("optim.lr=-3", "optim.lr"), ("experiment=amazon", ""))
    ),
])  # fmt: skip
def test_a_misspelt_key_fails_before_the_training(name, args, named, gcloud, tmp_path, monkeypatch):
    """With the real `sodaops`, in a folder without a registry, as in the image."""
    assert "compose" in next(step for step in BUILDS[name]["steps"] if step["id"] == "train")["waitFor"]
    command = filled(BUILDS[name], _TRAIN_ARGS=args)["compose"]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.chdir(tmp_path)
    done = gcloud.run("compose.py", *command[command.index("/workspace/cloudbuild/compose.py") + 1 :])
    assert done.returncode == (2 if named else 0) and named in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("name", ["train", "ci_cd", "drift"])
def test_a_build_without_values_ends_at_its_first_step(name, gcloud):
    done = gcloud.run("check.py", *filled(BUILDS[name], _REGION="", _BUCKET="", _TAG="")["check"][1:])
    assert done.returncode == 2 and BUILDS[name]["steps"][0]["id"] == "check"
    assert all(missing in done.stderr for missing in ("_REGION", "_BUCKET", "_TAG"))
    assert all(step.get("waitFor") for step in BUILDS[name]["steps"][1:])  # so that none runs beside the check
    longest_s = 24999 + 1800  # the longest training that check.py allows, and the wait for machines
    assert name == "drift" or int(BUILDS[name]["timeout"].removesuffix("s")) > longest_s


# --- vertex

JOB = "projects/1/locations/europe-west1/customJobs/9"
TRAIN = (
    "--region=europe-west1", "--project=acme-1", "--image=i/train:1a2b3c4", "--account=train@acme",
    "--output=gs://data/runs/r-1", "--poll-s=0.01",
)  # fmt: skip
SHORT = ("--timeout-s=0.3", "--queue-s=0.1")
WHERE = "--project=acme-1 --region=europe-west1"
LIST = f"ai custom-jobs list {WHERE} --filter=displayName=sodaops-r-1 --format=value(name)"
CANCELLED = [LIST, f"ai custom-jobs cancel {JOB} {WHERE}"]


@pytest.fixture
def vertex(gcloud):
    """A gcloud that creates a job which then runs for ever."""
    gcloud.answer("custom-jobs (create|list)", JOB)
    gcloud.answer("custom-jobs describe", {"state": "JOB_STATE_RUNNING"})
    return gcloud


def test_a_training_is_started_and_waited_for(vertex):
    states = ("PENDING", "RUNNING", "RUNNING", "SUCCEEDED")
    vertex.answer("custom-jobs describe", *({"state": f"JOB_STATE_{state}"} for state in states))
    done = vertex.run("vertex.py", *TRAIN, "--args=model=tiny 'data.name=a b'")
    assert done.returncode == 0, done.stderr
    assert [command.split()[2] for command in vertex.commands] == ["create", *["describe"] * 4]
    create = vertex.calls[0]
    assert {"--project=acme-1", "--region=europe-west1", "--display-name=sodaops-r-1"} <= set(create["command"])
    spec = json.loads(create["config"])
    (pool,) = spec["workerPoolSpecs"]
    assert pool["machineSpec"] == {"machineType": "n1-standard-8"} and pool["replicaCount"] == 1
    args = ["train", "run_dir=gs://data/runs/r-1", "ckpt_path=last", "model=tiny", "data.name=a b"]
    assert pool["containerSpec"] == {"imageUri": "i/train:1a2b3c4", "args": args}
    assert spec["scheduling"] == {"timeout": "7200s", "restartJobOnWorkerRestart": True}
    assert spec["serviceAccount"] == "train@acme" and spec["enableWebAccess"] is False
    assert spec["baseOutputDirectory"] == {"outputUriPrefix": "gs://data/runs/r-1"}
    assert done.stdout.count("JOB_STATE_") == 3 and "gs://data/runs/r-1" in done.stdout


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


def test_a_training_that_fails_fails_the_build(vertex):
    vertex.answer("custom-jobs describe", {"state": "JOB_STATE_FAILED", "error": {"message": "replica 0 exited with 2"}})
    done = vertex.run("vertex.py", *TRAIN)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "JOB_STATE_FAILED: replica 0 exited with 2" in done.stderr and f"stream-logs {JOB}" in done.stderr


def test_a_training_that_never_ends_is_cancelled(vertex):
    done = vertex.run("vertex.py", *TRAIN, *SHORT)
    assert done.returncode == 1 and vertex.commands[-2:] == CANCELLED
    assert "JOB_STATE_RUNNING" in done.stderr and "_TRAIN_TIMEOUT_S" in done.stderr
    vertex.answer("custom-jobs cancel", (1, "ERROR: unavailable"))
    done = vertex.run("vertex.py", *TRAIN, *SHORT)
    assert done.returncode == 1 and "ERROR: unavailable" in done.stderr


def test_a_build_that_is_cancelled_cancels_the_training(vertex):
    with vertex.start("vertex.py", *TRAIN) as process:
        next(line for line in process.stdout if "JOB_STATE_RUNNING" in line)
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in stderr
    assert vertex.commands[-2:] == CANCELLED


def test_describe_may_fail_until_the_time_is_over(vertex):
    vertex.answer("custom-jobs describe", *[(1, "ERROR: unavailable")] * 7, {"state": "JOB_STATE_SUCCEEDED"})
    done = vertex.run("vertex.py", *TRAIN)
    assert done.returncode == 0 and done.stderr.count("ERROR: unavailable") == 7
    vertex.answer("custom-jobs describe", (1, "ERROR: unavailable"))
    assert vertex.run("vertex.py", *TRAIN, *SHORT).returncode == 1 and vertex.commands[-2:] == CANCELLED


@pytest.mark.parametrize(("command", "answer", "named"), [
    ("describe", (1, DENIED.format("aiplatform.customJobs.get")), "roles/aiplatform.user"),
    ("describe", (1, "ERROR: NOT_FOUND: CustomJob does not exist."), "NOT_FOUND"),
    ("describe", "no JSON", "JSONDecodeError"),
    ("create", (1, "ERROR: connection reset"), "connection reset"),
])  # fmt: skip
def test_a_training_that_cannot_be_followed_is_cancelled(vertex, command, answer, named):
    vertex.answer(f"custom-jobs {command}", answer)
    done = vertex.run("vertex.py", *TRAIN)
    assert done.returncode == 1 and named in done.stderr
    assert vertex.commands[-2:] == CANCELLED and len(vertex.calls) == (3 if command == "create" else 4)


def test_a_gcloud_that_hangs_has_a_time_limit(gcloud, module, monkeypatch):
    cloud = module("cloud")
    (gcloud.folder / "gcloud").write_text("#!/bin/sh\nexec sleep 300\n")
    monkeypatch.setenv("PATH", str(gcloud.folder), prepend=os.pathsep)
    result = cloud.ask(["run", "deploy"], timeout_s=0.1)
    assert (result.code, result.denied, result.missing) == (124, False, False)
    assert "0.1 s" in cloud.explain_failure(["run", "deploy"], result)


@pytest.mark.parametrize(("permission", "role"), [
    ("aiplatform.customJobs.create", "roles/aiplatform.user"),
    ("iam.serviceAccounts.actAs", "roles/iam.serviceAccountUser"),
    ("storage.objects.create", "roles/storage.objectUser"),
])  # fmt: skip
def test_a_missing_permission_names_the_role(gcloud, permission, role):
    gcloud.answer("custom-jobs create", (1, DENIED.format(permission)))
    gcloud.answer("custom-jobs list", "")
    done = gcloud.run("vertex.py", *TRAIN)
    assert done.returncode == 1 and f"{role}." in done.stderr and permission in done.stderr
    assert not any("cancel" in command for command in gcloud.commands)


# --- secrets in a job


class Cloud(BaseHTTPRequestHandler):
    """A machine's metadata server, and Secret Manager."""

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
    env = {"GCE_METADATA_HOST": url.removeprefix("http://"), "SECRET_MANAGER_ENDPOINT": url}
    secret = "WANDB_API_KEY=projects/acme-1/secrets/wandb/versions/latest"
    return subprocess.run([sys.executable, "-c", text, secret, *command], env=env, capture_output=True, text=True, check=False)


def test_a_job_fetches_its_secret_itself():
    code = "import os, sys; sys.exit(0 if os.environ['WANDB_API_KEY'] == 's-3cr3t' else 9)"
    with serving(Cloud) as url:
        done = with_secret(url, sys.executable, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("status", "named"), [(403, "roles/secretmanager.secretAccessor"), (404, "versions add"), (0, "")])
def test_a_secret_that_cannot_be_read_stops_the_job(status, named):
    with serving(type("Refusing", (Cloud,), {"status": status})) as url:
        done = with_secret(url if status else "http://127.0.0.1:9", sys.executable, "-c", "print('it ran')")
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert named in done.stderr and (f"HTTP {status}" if status else "WANDB_API_KEY") in done.stderr


# --- deploy

NEW = "sodaops-00002-new"
SERVE = (
    "serve", "--service=sodaops", "--region=europe-west1", "--project=acme-1", "--image=i/serve:1a2b3c4", "--tag=1a2b3c4",
    "--account=serve@acme", "--requests=gs://data-requests/requests", "--smoke-s=0.5",
)  # fmt: skip
DRIFT = (*("drift", *SERVE[1:]), "--service=sodaops-drift", "--bundle=gs://data/registry@champion")


@contextlib.contextmanager
def deployable(gcloud, tmp_path, **behaviour):
    """A service whose new revision behaves in some way; yields its request handler."""
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


def deployed_settings(gcloud, settings, monkeypatch):
    """The settings that the service reads from the variables of the deployment."""
    command = next(call["command"] for call in gcloud.calls if call["command"][:2] == ["run", "deploy"])
    variables = next(part for part in command if part.startswith("--set-env-vars=")).partition("=")[2]
    with monkeypatch.context() as patch:
        for variable in variables.split(","):
            patch.setenv(*variable.split("=", 1))
        return settings.from_environment([])


@pytest.fixture
def done_file(tmp_path):
    """The file that says which revision has the traffic."""
    return tmp_path / "done.txt"


@pytest.fixture
def release(gcloud, tmp_path, done_file):
    """Runs deploy.py serve; start=True returns the process."""

    def run(*more, start=False):
        files = (f"--release={tmp_path / 'release.json'}", f"--done={done_file}")
        return (gcloud.start if start else gcloud.run)("deploy.py", *SERVE, *files, *more)

    return run


def changes(gcloud):
    return [command for command in gcloud.commands if re.search("run deploy|update-traffic", command)]


@pytest.mark.parametrize("behaviour", [{}, {"private": True}, {"private": True, "key": "s-3cr3t"}])
def test_a_deployment_is_tested_before_it_has_traffic(gcloud, tmp_path, release, done_file, behaviour, monkeypatch):
    from sodaops.serving.settings import ServeSettings

    with deployable(gcloud, tmp_path, **behaviour) as service:
        done = release(*(["--keys-secret=keys"] if "key" in behaviour else []))
    assert done.returncode == 0, done.stderr
    deploy, move, remove_tags = changes(gcloud)
    model = f"SODAOPS_BUNDLE=gs://data/registry/versions/{VERSION},SODAOPS_RELOAD_S=null"
    for flag in (f"--update-labels=sodaops-previous={OLD}", "--image=i/serve:1a2b3c4", "--service-account=serve@acme", model):
        assert flag in deploy
    assert deployed_settings(gcloud, ServeSettings, monkeypatch).trusted_proxies == ["169.254.0.0/16"]
    assert "--no-traffic --tag=c-1a2b3c4" in deploy
    assert ("SODAOPS_API_KEYS=keys:latest" in deploy) == ("key" in behaviour) and "s-3cr3t" not in deploy
    assert f"--to-revisions={NEW}=100" in move and "--remove-tags=c-0000000" in remove_tags
    answered = [path for path, status in service.seen if status == 200]
    assert answered == ["/tag/info", "/tag/predict", "/all/info", "/all/predict"]
    tokens = [command for command in gcloud.commands if "print-identity-token" in command]
    assert len(tokens) == (2 if behaviour.get("private") else 0) and all(command.endswith("/all") for command in tokens)
    assert json.loads(done_file.read_text()) == {"revision": NEW, "good": True}
    assert "id-token" not in done.stdout + done.stderr and "s-3cr3t" not in done.stdout + done.stderr


@pytest.mark.parametrize(("behaviour", "named"), [
    ({"broken": "/tag/predict"}, "/tag/predict"),
    ({"version": "ddddeeeeffff"}, "ddddeeeeffff"),
    ({"private": True, "key": "unknown"}, "roles/run.invoker"),
])  # fmt: skip
def test_a_smoke_test_that_fails_leaves_the_traffic(gcloud, tmp_path, release, done_file, behaviour, named):
    with deployable(gcloud, tmp_path, **behaviour) as service:
        done = release()
    assert done.returncode == 1 and named in done.stderr
    (only,) = changes(gcloud)
    assert "--no-traffic" in only
    assert re.search(rf"{OLD}.*{NEW}.*/tag .*c-1a2b3c4", done.stderr)
    assert not any(path.startswith("/all") for path, _ in service.seen) and not done_file.exists()


@pytest.mark.slow
def test_a_service_that_fails_under_traffic_gets_the_old_revision_back(gcloud, tmp_path, release, done_file):
    with deployable(gcloud, tmp_path, broken="/all"):
        done = release()
        assert done.returncode == 1 and f"{OLD} (100 %)" in done.stderr and not done_file.exists()
        assert gcloud.moves == [f"{NEW}=100", f"{OLD}=100"]
        gcloud.answer(f"to-revisions={OLD}=100", (1, "ERROR: unavailable"))
        done = release()
    assert done.returncode == 1 and NEW in done.stderr and "ERROR: unavailable" in done.stderr
    assert json.loads(done_file.read_text()) == {"revision": NEW, "good": False}


@pytest.mark.slow
def test_the_old_revision_may_answer_for_a_while_after_the_traffic_has_moved(gcloud, tmp_path, release):
    with deployable(gcloud, tmp_path, n_old=1) as service:
        done = release("--smoke-s=10")
    assert done.returncode == 0, done.stderr
    assert gcloud.moves == [f"{NEW}=100"]
    assert [path for path, _ in service.seen if path.startswith("/all")] == ["/all/info"] * 2 + ["/all/predict"]
    with deployable(gcloud, tmp_path, n_old=10**6):
        assert "0ld" in release().stderr
    assert gcloud.moves[1:] == [f"{NEW}=100", f"{OLD}=100"]


def test_a_build_that_is_cancelled_under_traffic_gets_the_old_revision_back(gcloud, tmp_path, release, done_file):
    with deployable(gcloud, tmp_path, broken="/all") as service, release("--smoke-s=600", start=True) as process:
        while not any(path.startswith("/all") for path, _ in service.seen):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and OLD in stderr and "Traceback" not in stderr
    assert gcloud.moves == [f"{NEW}=100", f"{OLD}=100"] and not done_file.exists()


def test_traffic_that_someone_else_moved_is_left(gcloud, tmp_path, release, done_file):
    with deployable(gcloud, tmp_path) as service:
        before = {"status": {"url": f"{service.url}/all", "traffic": service.targets}}
        other = {"status": {"url": f"{service.url}/all", "traffic": [{"revisionName": "sodaops-00009", "percent": 100}]}}
        gcloud.answer("services describe", *[before] * 3, other)
        done = release()
    assert done.returncode == 1 and f"{OLD} (100 %)" in done.stderr and "sodaops-00009 (100 %)" in done.stderr
    assert gcloud.moves == [] and not done_file.exists()


@pytest.mark.parametrize(("command", "error", "code", "named", "n_changes"), [
    ("remove-tags", "ERROR: unavailable", 0, "unavailable", 3),
    ("run deploy", "ERROR: The user-provided container failed to start and listen on the port", 1, "failed to start", 1),
    ("services describe", "ERROR: (gcloud.run.services.describe) Cannot find service [sodaops]", 1, "make gcp-apply", 0),
])  # fmt: skip
def test_a_command_that_fails(gcloud, tmp_path, release, done_file, command, error, code, named, n_changes):
    """Old tags that stay fail no release; a revision that does not start and a missing service change nothing."""
    with deployable(gcloud, tmp_path) as service:
        gcloud.answer(command, (1, error))
        done = release()
    assert done.returncode == code and named in done.stdout + done.stderr
    assert len(changes(gcloud)) == n_changes and done_file.exists() == (code == 0) == bool(service.seen)


@pytest.mark.parametrize(("job", "action"), [("sodaops-drift", "update"), ((1, "ERROR: NOT_FOUND: Job not found"), "create")])
def test_drift_is_checked_on_a_schedule(gcloud, tmp_path, job, action, monkeypatch):
    from sodaops.drift.settings import WatchSettings

    with deployable(gcloud, tmp_path):
        gcloud.answer("jobs describe", job)
        done = gcloud.run("deploy.py", *DRIFT)
    assert done.returncode == 0, done.stderr
    settings = deployed_settings(gcloud, WatchSettings, monkeypatch)
    assert settings.bundle == "gs://data/registry@champion" and settings.trusted_proxies == ["169.254.0.0/16"]
    last = gcloud.calls[-1]["command"]
    assert last[:5] == ["scheduler", "jobs", action, "http", "sodaops-drift"]
    url = next(part for part in last if part.startswith("--uri=")).partition("=")[2]
    assert url.endswith("/all/look") and f"--oidc-token-audience={url.removesuffix('/look')}" in last
    assert {"--schedule=*/30 * * * *", "--http-method=post", "--oidc-service-account-email=serve@acme"} <= set(last)


@pytest.mark.slow
def test_gcloud_knows_every_command_and_flag_of_the_steps(vertex, tmp_path, release):
    unknown([])  # skips without a gcloud
    with deployable(vertex, tmp_path, private=True):
        vertex.answer("jobs describe", (1, "NOT_FOUND"), "there")
        assert release("--keys-secret=keys").returncode == 0
        assert [vertex.run("deploy.py", *DRIFT).returncode for _ in range(2)] == [0, 0]
    assert vertex.run("vertex.py", *TRAIN, *SHORT).returncode == 1
    commands = [call["command"] for call in vertex.calls]
    assert len(commands) > 20
    assert [fault for command in commands for fault in unknown(command)] == []


# --- gate and settle

RELEASE = {"version": "2222", "bundle": "gs://data/registry/versions/2222", "before": "1111"}
ROLLBACK = "rollback registry.path=gs://data/registry --reason=it was not deployed"


@pytest.fixture
def sodaops(tmp_path):
    fake = FakeGcloud(tmp_path / "bin", "sodaops")
    fake.answer("^registry list", {"aliases": {"champion": "1111"}, "versions": {}})
    fake.answer("^register", "2222: in gs://data/registry, and its challenger\ngo on: sodaops promote 2222")
    fake.answer("^resolve", "gs://data/registry/versions/2222")
    return fake


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


@pytest.mark.parametrize(("champions", "failure", "last"), [
    (["1111"], (3, "RefusedError: 2222 is refused (max_ece); 1111 stays champion."), "registry list"),
    (["1111", "2222"], (2, "the mirror is gone"), ROLLBACK),  # promoted, and then failed
])  # fmt: skip
def test_a_promotion_that_fails_ends_the_build_with_its_code(sodaops, tmp_path, champions, failure, last):
    sodaops.answer("^registry list", *({"aliases": {"champion": champion}} for champion in champions))
    sodaops.answer("^promote", failure)
    done = gate(sodaops, tmp_path)
    assert done.returncode == failure[0] and failure[1] in done.stderr
    assert sodaops.commands[-1].startswith(last)


def test_the_champion_itself_is_deployed_without_the_gate(sodaops, tmp_path):
    sodaops.answer("^registry list", {"aliases": {"champion": "2222"}, "versions": {}})
    assert gate(sodaops, tmp_path).returncode == 0
    assert not any(command.startswith("promote") for command in sodaops.commands)
    assert json.loads((tmp_path / "release.json").read_text()) == {**RELEASE, "before": "2222"}


@pytest.mark.parametrize(("champion", "before", "done", "code", "n_calls"), [
    ("2222", "1111", {"revision": "r", "good": True}, 0, 0),
    ("2222", "1111", None, 1, 2),  # rolled back
    ("2222", "2222", None, 1, 1),
    ("2222", None, None, 1, 1),
    ("3333", "1111", None, 1, 1),
    (None, "1111", None, 1, 1),  # the registry cannot be read
    ("2222", "1111", {"revision": "r", "good": False}, 1, 0),
])  # fmt: skip
def test_a_deployment_that_failed_undoes_its_own_promotion(sodaops, tmp_path, done_file, champion, before, done, code, n_calls):
    release = tmp_path / "release.json"
    release.write_text(json.dumps({**RELEASE, "before": before}))
    if done:
        done_file.write_text(json.dumps(done))
    sodaops.answer("^registry list", {"aliases": {"champion": champion}} if champion else (2, "StorageError: 503"))
    ended = sodaops.run("settle.py", f"--release={release}", f"--done={done_file}", "--registry=gs://data/registry")
    assert ended.returncode == code and len(sodaops.calls) == n_calls and "Traceback" not in ended.stderr
    assert code == 0 or "2222" in ended.stderr
    assert [command for command in sodaops.commands if command.startswith("rollback")] == [ROLLBACK] * (n_calls == 2)
