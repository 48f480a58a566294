"""Reads commands from documents and workflows, and checks that the files, targets and keys that they name exist."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.conftest import REPO

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])
NOT_RUN = re.compile(r"<!-- not run: (\S.+?) -->")  # on the line above a block
TARGETS = set(re.findall(r"^([a-z][a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
_COMMAND = re.compile(r"^(\w+=\S+ +)*(sodaops|make|dvc|python|uvicorn|pip|gcloud|gh|docker|podman|curl|promtool|git) ")


class Block(NamedTuple):
    """A fenced code block of a page."""

    path: Path
    line: int  # of the opening fence, from 1
    language: str
    not_run: str | None  # the reason why it is not run, if there is one
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPO)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands, without comments; a line that ends with a backslash is joined with the next one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s+)#(\s.*|$)", "", line).strip())]

    @property
    def has_command(self) -> bool:
        """Whether a line starts with one of the programs that the documents use."""
        return any(_COMMAND.match(line.strip()) for line in self.text.splitlines())


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page."""
    parsed, lines, start = [], path.read_text(encoding="utf-8").splitlines(), None
    for number, line in enumerate(lines):
        fence = re.match(r"\s*```+(.*)$", line)
        if fence and start is None:
            start, language, above = number, fence[1].strip(), NOT_RUN.search(lines[number - 1]) if number else None
        elif fence and not fence[1].strip():
            text = "\n".join(lines[start + 1 : number])
            parsed.append(Block(path, start + 1, language, above[1] if above else None, text))
            start = None
    assert start is None, f"{path}:{start + 1}: the block has no closing fence"
    return parsed


def faults(command: str) -> list[str]:
    """Faults of a command: a make target, sodaops command, Python file or configuration key that does not exist."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return [f"{command}: {error}"]
    while words and re.match(r"\w+=", words[0]):
        del words[0]
    if not words:
        return []
    program, *rest = words
    program = program.rpartition("/")[2].replace("python3", "python")
    if program == "make":
        targets = [word for word in rest if re.fullmatch(r"[a-z][a-z-]+", word)]
        return [f"make {target}: no such target" for target in targets if target not in TARGETS]
    if program == "python" and rest and rest[0].endswith(".py") and not (REPO / rest[0]).is_file():
        return [f"{rest[0]}: no such file"]
    if program == "sodaops" or (program == "python" and rest[:1] == ["train.py"]):
        return _sodaops(rest if program == "sodaops" else ["train", *rest[1:]])
    return []


def _sodaops(words: list[str]) -> list[str]:
    """Faults in the arguments of ``sodaops``, whose overrides are composed."""
    from hydra.errors import HydraException

    from sodaops.cli import MODULE_OF
    from sodaops.config.compose import compose, explain_error
    from sodaops.errors import SodaOpsError

    if not words or words[0].startswith("-"):
        return []
    if words[0] not in MODULE_OF:
        return [f"sodaops {words[0]}: no such command"]
    # Overrides without placeholders such as $NAME or <name>.
    keys = [word for word in words[1:] if re.match(r"[+~a-z][\w./@]*=", word) and not re.search(r"[$<>]|=.*…", word)]
    if not keys:
        return []
    swept = {"-m", "--multirun"} & {*words}  # then of KEY=A,B only KEY=A is composed
    try:
        compose([re.sub(r"=([^,{\[]+),.*", r"=\1", key) if swept else key for key in keys])
    except (HydraException, SodaOpsError) as error:
        return [f"{' '.join(keys)}: {explain_error(error) or error}"]
    return []
