"""A `gcloud` for tests: it records its calls and gives the configured answers."""

import contextlib
import functools
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO

# In bash, which starts ten times as fast as Python: setting up a project calls it a hundred times.
_HEAD = """\
#!/usr/bin/env bash
cd {folder} || exit 99
n=$(<count); echo $((n + 1)) >count
printf '%s\\0' "$@" >"call.$n"
cat >"stdin.$n"
for text in "$@"; do [[ $text != --config=* ]] || cat "${{text#*=}}" >"config.$n"; done
answer() {{
    local turn=0
    [[ ! -f turn.$1 ]] || turn=$(<"turn.$1")
    echo $((turn + 1)) >"turn.$1"
    ((turn < $2)) || turn=$(($2 - 1))
    cat "out.$1.$turn"; cat "err.$1.$turn" >&2; exit "$(<"code.$1.$turn")"
}}
"""


class FakeGcloud:
    """A folder with a program `gcloud`, to put first on PATH.

    Args:
        folder: an empty folder.
        name: the program's name.
    """

    def __init__(self, folder: Path, name: str = "gcloud") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._program, self._rules = folder / name, []
        self._write()
        self._program.chmod(0o755)
        self.forget()

    def _write(self) -> None:
        head = _HEAD.format(folder=shlex.quote(str(self.folder)))
        self._program.write_text(head + "".join(reversed(self._rules)))

    def answer(self, form: str, *answers: Any) -> None:
        """Configures the answers to commands that match a pattern: in turn, the last one repeated.

        Args:
            form: an extended regular expression; later ones have precedence.
            answers: text for standard output; a pair of exit code and text for standard error; or a value written as JSON.
        """
        number = len(self._rules)
        for turn, answer in enumerate(answers):
            code, err = answer if isinstance(answer, tuple) else (0, "")
            out = "" if isinstance(answer, tuple) else answer if isinstance(answer, str) else json.dumps(answer)
            for kind, text in {"out": out, "err": err, "code": code}.items():
                (self.folder / f"{kind}.{number}.{turn}").write_text(f"{text}\n")
        self._rules.append(f"form={shlex.quote(form)}; [[ ! $* =~ $form ]] || answer {number} {len(answers)}\n")
        self._write()

    def forget(self) -> None:
        """Forgets the calls and starts the answers from their first."""
        for path in [path for kind in ("call", "stdin", "config", "turn") for path in self.folder.glob(f"{kind}.*")]:
            path.unlink()
        (self.folder / "count").write_text("0")

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The calls in order: command, stdin, and the contents of the file of --config=."""
        calls = []
        for n in range(int((self.folder / "count").read_text())):
            config = self.folder / f"config.{n}"
            command = (self.folder / f"call.{n}").read_text().split("\0")[:-1]
            stdin = (self.folder / f"stdin.{n}").read_text()
            calls.append({"command": command, "stdin": stdin, "config": config.read_text() if config.exists() else ""})
        return calls

    @property
    def commands(self) -> list[str]:
        """The commands as lines."""
        return [" ".join(call["command"]) for call in self.calls]

    @property
    def moves(self) -> list[str]:
        """The traffic that each `update-traffic --to-revisions` asked for."""
        return [command.partition("--to-revisions=")[2] for command in self.commands if "--to-revisions=" in command]

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Starts a program of cloudbuild/ with this gcloud on PATH."""
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, str(REPO / "cloudbuild" / script), *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env={**os.environ, "PATH": path}, text=True, **pipes)

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of cloudbuild/ to its end."""
        with self.start(script, *arguments) as process:
            out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@functools.cache
def _known() -> dict[str, Any]:
    program = shutil.which("gcloud")
    path = Path(program).resolve().parents[1] / "data/cli/gcloud_completions.py" if program else None
    if path is None or not path.is_file():
        pytest.skip("no gcloud here; https://cloud.google.com/sdk/docs/install")
    spec = importlib.util.spec_from_file_location("gcloud_completions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.STATIC_COMPLETION_CLI_TREE


def unknown(command: Sequence[str]) -> list[str]:
    """The command or flags that the installed gcloud does not know, in its stable or alpha track; skips without a gcloud."""
    for track in ([], ["alpha"]):
        node, words = _known(), ["gcloud"]
        for word in [*track, *command]:
            if word not in node.get("commands", {}):
                break
            node = node["commands"][word]
            words.append(word)
        if not node.get("commands"):
            flags = [text.partition("=")[0] for text in command if text.startswith("--")]
            known = {*node["flags"], *_known()["flags"]}
            left = [flag for flag in flags if not {flag, f"--{flag.removeprefix('--no-')}"} & known]
            return [f"{' '.join(words)}: {flag}" for flag in left]
    return [" ".join(["gcloud", *command])]


OLD, VERSION = "sodaops-00001-old", "aaaabbbbcccc"


class Predictor(BaseHTTPRequestHandler):
    """A `sodaops serve` on Cloud Run: /tag is a new revision, /all the service, where n_old requests go to the old one."""

    version, private, key, broken, n_old = VERSION, False, "", "nowhere", 0
    seen: list[tuple[str, int]]

    def answer(self) -> tuple[int, str]:
        if self.private and self.headers["Authorization"] != "Bearer id-token":
            return 403, "Forbidden"
        if self.key and self.headers["X-API-Key"] != self.key:
            return 401, "no key"
        if self.path.startswith(self.broken):
            return 500, "it fell over"
        version = self.version
        if self.path.startswith("/all") and sum(path.startswith("/all") for path, _ in self.seen) < self.n_old:
            version = "0ld"
        if self.path.endswith("/metrics"):
            return 200, "sodaops_drift_window_rows 0"
        if self.path.endswith("/info"):
            return 200, json.dumps({"bundle_version": version})
        return 200, json.dumps({"label": "good", "probs": {"good": 1.0}, "bundle_version": version})

    def do_GET(self) -> None:
        if self.command == "POST":
            self.rfile.read(int(self.headers["Content-Length"]))
        status, text = self.answer()
        self.seen.append((self.path, status))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves on loopback; yields the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
