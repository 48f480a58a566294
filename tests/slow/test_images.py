"""The three images, built and run by `make docker-test` with docker or podman (docs/docker.md)."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import pyarrow.parquet as pq
import pytest

from sodaops.inference.predictor import Predictor
from tests.conftest import REPO, free_port
from tests.serving import Load
from tests.watching import tweets

DOCKER = shlex.split(os.environ.get("DOCKER", "docker"))
FLAGS = shlex.split(os.environ.get("DOCKER_FLAGS", ""))
BUILD_FLAGS = shlex.split(os.environ.get("DOCKER_BUILD_FLAGS", ""))
OURS = 10001
NAMES = ("train", "serve", "drift")
# Without root, files of another user could not be deleted.
OWNER = [] if os.getuid() == 0 else ["--user", f"{os.getuid()}:{os.getgid()}"]
RUN = ["run", "--rm", "--no-healthcheck", "--read-only", "--tmpfs", "/tmp", *FLAGS]

if os.environ.get("SODAOPS_IMAGES") != "1":
    pytest.skip("takes minutes; `make docker-test` builds and runs the images", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.xdist_group("images")]


def docker(*arguments: str, allowed: Sequence[int] = (0,), timeout_s: float = 600) -> str:
    """Runs a docker command and returns its output; fails on an exit code that is not allowed."""
    done = subprocess.run(
        [*DOCKER, *arguments], cwd=REPO, text=True, timeout=timeout_s, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "BUILDAH_FORMAT": "docker"},
    )  # fmt: skip
    assert done.returncode in allowed, f"{shlex.join(arguments)}\nexit code {done.returncode}\n{done.stdout[-5000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def image() -> Callable[[str], str]:
    """Builds an image once and returns its name."""
    if shutil.which(DOCKER[0]) is None:
        pytest.skip(f"no {DOCKER[0]} on PATH; install Docker, or podman for `make docker-test DOCKER=podman`")
    version = subprocess.run([*DOCKER, "version"], capture_output=True, text=True, timeout=60)
    if version.returncode:
        pytest.skip(f"`{shlex.join(DOCKER)} version` failed; start the engine: {version.stderr.strip()[-300:]}")
    built: dict[str, str] = {}

    def build(name: str) -> str:
        if name not in built:
            tag = f"sodaops-{name}"
            docker("build", *BUILD_FLAGS, "-f", f"docker/{name}.Dockerfile", "-t", tag, ".", timeout_s=3000)
            built[name] = tag
        return built[name]

    return build


def python(name: str, code: str) -> str:
    """Runs Python in a fresh container of an image, as the image's own user."""
    return docker(*RUN, "--entrypoint", "python", name, "-c", code).strip()


class Container:
    """A container that runs until it is stopped; a service gets its port from PORT, as on Cloud Run."""

    def __init__(self, image_name: str, *options: str, arguments: Sequence[str] = ()) -> None:
        self.name, self.port = f"sodaops-test-{uuid.uuid4().hex[:8]}", free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = ["run", "-d", "--read-only", "--tmpfs", "/tmp", "--name", self.name, *OWNER, *FLAGS]
        docker(
            *command, "-p", f"127.0.0.1:{self.port}:{self.port}", "-e", f"PORT={self.port}", *options, image_name, *arguments
        )

    def wait(self, path: str) -> None:
        """Waits until it answers with 200; fails with its log when it has ended."""
        while self.state()["Running"]:
            try:
                if httpx.get(self.url + path).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(docker("logs", self.name))

    def state(self) -> dict[str, Any]:
        return json.loads(docker("inspect", "--type", "container", "--format", "{{json .State}}", self.name))

    def healthcheck(self) -> str:
        """Runs the image's HEALTHCHECK inside, since the engine may have no timer for it."""
        check = json.loads(docker("inspect", "--type", "container", "--format", "{{json .Config.Healthcheck.Test}}", self.name))
        assert check[0] == "CMD"
        return docker("exec", self.name, *check[1:])

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit code; docker would send SIGKILL after a minute."""
        docker("stop", "-t", "60", self.name)
        return self.state()["ExitCode"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        docker("rm", "-f", self.name)


@pytest.fixture(scope="session")
def outputs(image: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mounted folder after a training in the image: the default model on 600 rows, with no write elsewhere."""
    folder = tmp_path_factory.mktemp("outputs")
    folder.chmod(0o777)
    keys = ["data.max_rows=600", "trainer.max_epochs=1", "evaluate.n_bootstrap=200", "evaluate.splits_dir=outputs/splits"]
    mounted = ["-v", f"{folder}:/app/outputs"]
    docker(*RUN, *OWNER, *mounted, image("train"), "train", *keys, "run_dir=outputs/run", "model.max_tokens=32")
    return folder


def test_sigterm_writes_a_checkpoint(outputs, image):
    keys = ["data.max_rows=600", "model=tiny", "trainer.max_epochs=500", "early_stopping.patience=null"]
    arguments = ["train", *keys, "run_dir=outputs/stopped", "evaluate.splits_dir=outputs/splits"]
    with Container(image("train"), "-v", f"{outputs}:/app/outputs", arguments=arguments) as training:
        until = time.monotonic() + 300
        while (
            not (outputs / "stopped/checkpoints/last.ckpt").exists()
            and time.monotonic() < until
            and training.state()["Running"]
        ):
            time.sleep(0.2)
        assert training.stop() == 143, docker("logs", training.name)
        assert "run_dir=" in docker("logs", training.name)
    assert json.loads((outputs / "stopped/run.json").read_text())["status"] == "interrupted"


@pytest.fixture(scope="session")
def request_log(outputs: Path, image: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The log of a service that answered from that bundle until SIGTERM arrived under load."""
    folder = tmp_path_factory.mktemp("requests")
    folder.chmod(0o777)
    mounted = ["-v", f"{outputs}/run/bundle:/bundle:ro", "-v", f"{folder}:/requests", "-e", "SODAOPS_REQUEST_LOG=/requests"]
    with Container(image("serve"), *mounted) as container:
        container.wait("/readyz")
        container.healthcheck()
        predictor, texts = Predictor(outputs / "run/bundle"), tweets()[:100]
        answer = httpx.post(f"{container.url}/predict", json={"text": texts[0]}).raise_for_status().json()
        (expected,) = predictor.predict(texts[:1])
        assert answer["label"] == expected.label and answer["probs"] == pytest.approx(expected.probs, abs=1e-4)
        httpx.post(f"{container.url}/predict/batch", json={"texts": texts}).raise_for_status()
        load = Load(container.url, n_clients=4, n_texts=4)
        while len(load.acknowledged()) < 20:
            time.sleep(0.1)
        code = container.stop()
        load.stop()
        logs = docker("logs", container.name)
        assert code == 0 and '"stopped"' in logs and "Traceback" not in logs, logs
        written = {row for path in folder.glob("date=*/*.parquet") for row in pq.read_table(path)["request_id"].to_pylist()}
        assert set(load.statuses.values()) == {200} and load.acknowledged() <= written
    yield folder


def test_a_training_leaves_its_bundle_in_the_mounted_folder(outputs, image):
    assert (outputs / "run/evaluation/report.html").is_file() and (outputs / "run/bundle/model.onnx").is_file()
    assert (outputs / "run/bundle/bundle.json").stat().st_uid == (os.getuid() or OURS)
    kept = ["-v", f"{outputs}:/app/outputs"]
    registry = ["registry.path=outputs/registry", "registry.report_dir=outputs/gate", "evaluate.splits_dir=outputs/splits"]
    docker(*RUN, *OWNER, *kept, image("train"), "register", "outputs/run/bundle", *registry)
    output = docker(
        *RUN, *OWNER, *kept, image("train"), "promote", "challenger", *registry, "--force", "--reason", "600 rows are few"
    )
    assert "champion" in output and list((outputs / "registry").iterdir())
    assert "ConfigError" in docker(*RUN, image("train"), "train", "trainer.max_epoch=1", allowed=[2])


def test_the_service_drains_on_sigterm(request_log):
    assert list(request_log.glob("date=*/*.parquet"))


def test_the_drift_service_checks_that_log(outputs, request_log, image):
    mounted = ["-v", f"{outputs}/run/bundle:/bundle:ro", "-v", f"{request_log}:/requests:ro"]
    settings = ["-e", "SODAOPS_DRIFT_BUNDLE=/bundle", "-e", "SODAOPS_DRIFT_REQUEST_LOG=/requests"]
    with Container(image("drift"), *mounted, *settings) as container:
        container.wait("/healthz")
        container.healthcheck()
        drift = httpx.post(f"{container.url}/look", timeout=120).raise_for_status().json()
        assert drift["judged"] and drift["n_rows"] > 100
        assert "root_metric_" in httpx.get(f"{container.url}/report/evidently", timeout=60).raise_for_status().text
        assert container.stop() == 0 and "Traceback" not in docker("logs", container.name)


@pytest.mark.parametrize(("name", "options", "named"), [
    ("serve", [], "/bundle: .*bundle.json"),
    ("serve", [], "-v RUN/bundle:/bundle:ro"),
    ("serve", ["-e", "PORT=http"], "PORT=http"),
    ("drift", [], "SODAOPS_DRIFT_BUNDLE"),
])  # fmt: skip
def test_a_container_that_cannot_serve_exits_with_2(image, name, options, named):
    output = docker(*RUN, *options, image(name), allowed=[2], timeout_s=60)
    assert re.search(named, output) and "Traceback" not in output


def test_a_healthcheck_of_nothing_fails(image):
    code = "import subprocess, sys; print(subprocess.run([sys.executable, 'healthcheck.py', '/readyz', 'X']).returncode)"
    assert python(image("serve"), code).endswith("1")


@pytest.mark.parametrize("name", NAMES)
def test_user_secrets_and_size_of_an_image(image, name):
    description = json.loads(docker("image", "inspect", image(name)))[0]
    config = description["Config"]
    assert config["User"] == f"{OURS}:{OURS}"
    assert python(image(name), "import os; print(os.getuid())") == str(OURS)
    visible = " ".join(config["Env"]) + docker("history", "--no-trunc", image(name))
    local = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    assert "PIP_" not in visible and not [word for word in re.findall(r"[^\s'=]*/[^\s'=]*", local) if word in visible]
    code = (  # as root, who may read everything
        "import pathlib; names = 'pip.conf', '.netrc', '.pypirc'; "
        "print([str(p) for top in ('/etc', '/root', '/app', '/opt') for p in pathlib.Path(top).rglob('*') if p.name in names])"
    )
    assert docker(*RUN, "--user", "0", "--entrypoint", "python", image(name), "-c", code).strip() == "[]"
    assert name != "serve" or description["Size"] <= 650e6


@pytest.mark.parametrize("name", NAMES)
def test_packages_match_the_constraints(image, name):
    code = "import importlib.metadata as m; print('\\n'.join(f'{d.name}=={d.version}' for d in m.distributions(path=['LIB'])))"
    lib = python(image(name), "import sysconfig; print(sysconfig.get_path('purelib'))")
    installed = dict(
        line.lower().replace("_", "-").split("==") for line in python(image(name), code.replace("LIB", lib)).split()
    )
    lines = (REPO / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    cuda = [package for package in installed if package.startswith(("nvidia-", "cuda-", "triton"))]
    others = {package: version.partition("+")[0] for package, version in installed.items() if package not in cuda}
    assert others == {package: pins.get(package) for package in others}
    torch = {"torch", "lightning", "transformers"} & set(installed)
    assert torch == ({"torch", "lightning", "transformers"} if name == "train" else set())
    assert not {"pytest", "ruff", "playwright", "pip"} & set(installed)
    assert not cuda or "+cpu" not in installed["torch"]
