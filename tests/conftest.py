"""Shared fixtures and helpers: small tables of real tweets, and a trained run that many tests use."""

import contextlib
import copy
import functools
import importlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.csv
import pytest
from filelock import FileLock

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a job that a shell started with `&`; tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # other tests use the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read when gcsfs is imported; see sodaops.io.storage

REPO = Path(__file__).resolve().parents[1]
TWEETS = REPO / "data/raw/tweets.csv"
TINY = ("model=tiny", "trainer.max_epochs=2", "evaluate.n_bootstrap=200", "evaluate.baselines=false", "logger=none")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the integration tests as slow, and runs the longest tests first, so that the processes end at the same time."""
    longest = ("test_readme", "test_dvc")
    for item in items:
        if item.path.parent.name == "integration":
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (item.path.stem not in longest, item.get_closest_marker("slow") is None))


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Removes the log handlers that a test's command and Hydra added; they would write to the test's closed streams."""
    names = ("sodaops", "hydra", "hydra._internal.core_plugins.basic_launcher", "hydra_plugins")
    loggers = [logging.root, *map(logging.getLogger, names)]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            kinds = ("StreamHandler", "FileHandler", "ConsoleHandler")
            if type(handler).__name__ in kinds or logger is not logging.root:
                logger.removeHandler(handler)
                handler.close()
        if logger is not logging.root:
            logger.handlers, logger.propagate = handlers, propagate  # a service replaces them
        logger.setLevel(level)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes an empty folder the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(workdir: Path) -> Callable[..., str]:
    """Writes text or bytes to a file in the current folder, and returns the file's name."""

    def make(name: str, content: str | bytes) -> str:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return make


@pytest.fixture
def run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in an empty folder; returns its exit code, standard output and standard error."""
    from sodaops.cli import main

    def command(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return code, output.out, output.err

    return command


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of Weights & Biases, which also prints nothing."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


class lazy:  # noqa: N801
    """A module that takes long to import, and is imported when a test first uses it."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_mock_name":  # pytest asks every object of a test module for these
            raise AttributeError(name)
        return getattr(importlib.import_module(self.module), name)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an emulated bucket of Google Cloud Storage."""
    from tests.gcs import emulated_bucket

    with emulated_bucket(tmp_path_factory.mktemp("gcs")) as address:
        yield address


@pytest.fixture
def cloud(bucket: str) -> Any:
    """The bucket, as another program sees it."""
    import fsspec

    return fsspec.core.url_to_fs(bucket, token="anon", use_listings_cache=False)[0]


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Makes writes beyond a size fail, as a full disk does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_until(condition: Callable[[], Any], timeout_s: float = 120, state: Callable[[], object] = str) -> Any:
    """Polls until a condition holds, and returns its value; fails after the deadline, with what ``state`` says."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"no success within {timeout_s:g} s {state()}"
        time.sleep(0.02)
    return value


def free_port() -> int:
    """A port of 127.0.0.1 that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def configured(*overrides: str) -> Any:
    """A configuration composed from conf/, which takes Hydra 0.1 s."""
    from sodaops.config.compose import compose

    return compose(list(overrides))


@functools.cache
def _tiny_once() -> Any:
    from sodaops.modeling.pretrained import load_pretrained

    return load_pretrained(configured("model=tiny").model)


def tiny_pretrained() -> Any:
    """The encoder of model=tiny, always with the same random weights, and its tokenizer: a copy of one that is loaded once."""
    return copy.deepcopy(_tiny_once())


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ("text", "label")) -> str:
    """A small table as CSV, with every cell quoted."""
    lines = [header, *rows]
    return "".join(",".join('"' + str(cell).replace('"', '""') + '"' for cell in line) + "\n" for line in lines)


def make_rows(n: int = 120, labels: Sequence[str] = ("bad", "good")) -> list[tuple[str, str]]:
    """Distinct texts with alternating labels; enough for every split to have rows."""
    return [(f"text number {i} is {labels[i % len(labels)]}", labels[i % len(labels)]) for i in range(n)]


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A copy for this worker of a folder that only the first worker makes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    original, done = shared / f"shared_{name}", shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(original, ignore_errors=True)  # an incomplete one of a worker that failed
            original.mkdir()
            make(original)
            done.touch()
    return Path(shutil.copytree(original, tmp_path_factory.mktemp(name) / name))


@pytest.fixture
def small_disk(workdir: Path) -> Iterator[Path]:
    """A real file system with 256 KiB of space, mounted at ``disk``."""
    (workdir / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "disk"], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield Path("disk")
    subprocess.run(["umount", workdir / "disk"], check=True)


@pytest.fixture(scope="session")
def small_tweets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the first 600 tweets."""
    path = tmp_path_factory.mktemp("tweets") / "tweets.csv"
    pyarrow.csv.write_csv(pyarrow.csv.read_csv(TWEETS).slice(0, 600), path)
    return path


def run_overrides(folder: Path, tweets: Path, *more: str) -> list[str]:
    """Overrides for a short training of the tiny model in ``folder``."""
    return [
        *TINY,
        "trainer.precision=32-true",  # the same on every machine
        f"data.path={tweets}",
        f"run_dir={folder / 'run'}",
        f"evaluate.splits_dir={folder / 'splits'}",
        *more,
    ]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, small_tweets: Path) -> Any:
    """The folder of a finished run: ``run`` with checkpoints, bundle and evaluation, and ``splits``."""

    def make(folder: Path) -> None:
        from sodaops.pipeline import train

        assert train(configured(*run_overrides(folder, small_tweets, "logger=csv"))).score is not None

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture
def bundle(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained bundle."""
    return Path(shutil.copytree(trained / "run/bundle", tmp_path / "bundle"))


@pytest.fixture(scope="session")
def drift_bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained bundle with a drift reference of 2,000 tweets, instead of the 491 it was trained and validated on."""

    def make(folder: Path) -> None:
        from tests import watching

        watching.with_reference(trained / "run/bundle", folder / "bundle")

    return made_once(tmp_path_factory, "drift_bundle", make) / "bundle"


@pytest.fixture(scope="session")
def logged_rows(drift_bundle: Path) -> Any:
    """Rows of a request log that the bundle ``drift_bundle`` answered."""
    from tests.watching import Rows

    return Rows(drift_bundle)


@pytest.fixture(scope="session")
def extensions_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that tests/extensions_package is installed in, once for all workers."""
    from tests.extensions import install

    return made_once(tmp_path_factory, "extensions", install) / "site"


@pytest.fixture
def extensions(extensions_site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes the extensions of that package importable; returns its folder of YAML files, for ``--config-dir``."""
    from tests.extensions import NAME, forget

    monkeypatch.syspath_prepend(extensions_site)
    yield extensions_site / NAME / "conf"
    forget()
