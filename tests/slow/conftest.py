"""A clone of the working tree, in which commands run as a user's do; and a real browser."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import sync_playwright

from tests.conftest import REPO

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

# A command in a process of its own, which prints its peak memory at the end.
PEAK = """
import sys
from sodaops.cli import main
code = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak kB", peak.split()[1])
sys.exit(code)
"""


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a Python process in a folder, with its output in a log there; at the end it is killed with its children."""
    started: list[subprocess.Popen] = []

    def go(command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        log = folder / f"log{len(started)}.txt"
        with open(log, "a") as file:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=env, start_new_session=True
            )
        process.log = log
        started.append(process)
        return process

    yield go
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


class Clone:
    """A folder with the project's files, committed, and this environment first on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, check=True
        )
        for name in names.stdout.decode().split("\0"):
            if name and (REPO / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPO / name, folder / name)
        (folder / ".venv").symlink_to(sys.prefix)
        self("git init -q -b main && git add -A && git -c user.name=t -c user.email=t@t commit -qm clone")

    def env(self) -> dict[str, str]:
        """The environment of its commands."""
        path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
        settings = {"PATH": path, "PYTHONPATH": str(self.folder), "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
        ours = {"MAKEFLAGS", "MAKEOVERRIDES", "ARGS"}  # of the make that runs the tests
        return {**{key: value for key, value in os.environ.items() if key not in ours}, **settings}

    def __call__(self, command: str, allowed: tuple[int, ...] = (0,), timeout_s: float = 900) -> str:
        """Runs a shell command and returns what it printed.

        Raises:
            AssertionError: another exit code than those allowed.
        """
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.env(), timeout=timeout_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode in allowed, f"{command}\nexit code {done.returncode}\n{done.stdout[-3000:]}"
        return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A fresh clone."""
    (tmp_path / "clone").mkdir()
    return Clone(tmp_path / "clone")


class Opened(NamedTuple):
    """A page, the addresses that it asked for, and what its scripts printed or threw."""

    page: Any
    addresses: list[str]
    messages: list[str]


def opened(browser: Any, url: str | None = None, width: int = 1100, scheme: str = "light") -> Opened:
    """A page of its own in a window of this width, at an address if one is given."""
    found = Opened(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), [], [])
    found.page.set_default_timeout(120_000)
    found.page.on("request", lambda request: found.addresses.append(request.url))
    found.page.on("console", lambda message: found.messages.append(message.text))
    found.page.on("pageerror", lambda error: found.messages.append(str(error)))
    if url is not None:
        found.page.goto(url)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH; install Debian's, for example")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield found
        found.close()
