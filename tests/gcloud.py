"""A `gcloud` for tests: it writes down how it was called, and answers as it was told."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import REPO

_PROGRAM = """\
#!{python} -IS
import json, re, sys
from pathlib import Path
folder = Path({folder!r})
command = sys.argv[1:]
read = {{text: Path(text.partition("=")[2]).read_text() for text in command if text.startswith("--config=")}}
stdin = sys.stdin.read()
with (folder / "calls").open("a") as file:
    file.write(json.dumps({{"command": command, "stdin": stdin, "read": read}}) + "\\n")
for n, (form, answers) in enumerate(json.loads((folder / "answers").read_text())):
    if re.search(form, " ".join(command)):
        told = folder / f"told{{n}}"
        before = int(told.read_text()) if told.exists() else 0
        told.write_text(str(before + 1))
        answer = answers[min(before, len(answers) - 1)]
        print(answer.get("out", ""))
        print(answer.get("err", ""), file=sys.stderr)
        sys.exit(answer.get("code", 0))
"""


class FakeGcloud:
    """A folder with a program `gcloud` in it, to be put before PATH.

    Args:
        folder: an empty one.
        name: of the program.
    """

    def __init__(self, folder: Path, name: str = "gcloud") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._rules = folder, []
        program = folder / name
        program.write_text(_PROGRAM.format(python=sys.executable, folder=str(folder)))
        program.chmod(0o755)
        self.answer("^$")

    def answer(self, form: str, *answers: Any) -> None:
        """What it answers to commands that a pattern is found in: these in turn, then the last for ever.

        Args:
            form: what is told later goes first.
            answers: text for standard output; a pair of exit code and text for standard error; or what is written as JSON.
        """
        self._rules.insert(0, (form, [_answer(answer) for answer in answers]))
        (self._folder / "answers").write_text(json.dumps(self._rules))

    def forget(self) -> None:
        """Begins anew with the calls and with the turns of the answers."""
        for path in [self._folder / "calls", *self._folder.glob("told*")]:
            path.unlink(missing_ok=True)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """How it was called, in order: command, stdin, and files that were named."""
        path = self._folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def commands(self) -> list[str]:
        """The same as lines."""
        return [" ".join(call["command"]) for call in self.calls]

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of cloudbuild/ where this is the gcloud."""
        path = f"{self._folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [sys.executable, str(REPO / "cloudbuild" / script), *arguments], capture_output=True, text=True, timeout=60,
            env={**os.environ, "PATH": path, **variables}, check=False,
        )  # fmt: skip


def _answer(answer: Any) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"out": answer}
    if isinstance(answer, tuple):
        return {"code": answer[0], "err": answer[1]}
    return {"out": json.dumps(answer)}
