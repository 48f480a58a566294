"""The history of a registry: numbered files that are never changed, each with an event and the state after it."""

import getpass
import itertools
import json
import logging
import os
import re
import socket
import uuid
from collections.abc import Callable
from dataclasses import field, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from sodaops.bundle.files import parse_json, printable
from sodaops.errors import RegistryError
from sodaops.registry.store import LocalStore, RemoteStore

FORMAT = 1
log = logging.getLogger(__name__)
_FILE = re.compile(r"[0-9]{8}\.json")
_reported: set[str] = set()  # files that this process has logged, since a service reads the history again and again


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class State:
    """The versions and aliases of a registry after an event."""

    n: int = 0  # number of the event
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)  # version -> who, when, why, metrics, data
    aliases: dict[str, str] = field(default_factory=dict)  # alias -> version
    past: dict[str, list[str]] = field(default_factory=dict)  # alias -> its earlier versions, the newest last
    collected: list[str] = field(default_factory=list)  # folders that gc deletes or has deleted; they are not used again

    def point(self, alias: str, version: str) -> "State":
        """The state after an alias was moved to a version."""
        before = self.aliases.get(alias)
        past = self.past.get(alias, [])
        if before not in (None, version):
            past = [*past, before]
        return replace(self, aliases={**self.aliases, alias: version}, past={**self.past, alias: past})

    def folder(self, version: str) -> str:
        """The name of a version's folder, now or once it is added. A collected version gets a new one when it comes back."""
        if version in self.versions:
            return self.versions[version]["folder"]
        names = itertools.chain([version], (f"{version}-{n}" for n in itertools.count(2)))
        return next(name for name in names if name not in self.collected)

    def unused(self, keep: int) -> list[str]:
        """The versions that are neither an alias's target nor among the last ``keep`` earlier targets of one."""
        needed = {*self.aliases.values()}
        for past in self.past.values():
            needed |= {*past[-keep:]} if keep else set()
        return [version for version in self.versions if version not in needed]


class History:
    """The history of the registry in a store."""

    def __init__(self, store: LocalStore | RemoteStore) -> None:
        self._store = store

    def state(self) -> State:
        """The state after the newest event; stray and damaged files are logged and skipped.

        Raises:
            RegistryError: all files are damaged, or a later version of this package wrote one.
        """
        return self._newest()[1]

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first, each with the aliases after it; stray and damaged files are logged and skipped."""
        entries = filter(None, map(self._read_or_log, self._names()))
        return [{**event, "aliases": state.aliases} for event, state in entries]

    def append(self, event: str, change: Callable[[State], State], **fields: Any) -> State:
        """Adds an event, and returns the state after it.

        Of several processes that write the same number one succeeds; the others call ``change`` again on the new state.
        Nothing is added after a damaged file, since the state after it is not known.

        Args:
            event: what happens: register, promote, rollback, gc.
            change: the new state, from the current one; it may raise.
            fields: what else to record.
        """
        while True:
            name, state = self._newest()
            if name is not None and name != f"{state.n:08d}.json":
                raise self._damaged(name)
            after = replace(change(state), n=state.n + 1)
            entry = {"format": FORMAT, "n": after.n, "event": event, "when": timestamp(), "who": author(), **fields}
            entry["nonce"] = uuid.uuid4().hex  # makes the content unique, so that a store can tell whose file was created
            entry["state"] = {key: value for key, value in vars(after).items() if key != "n"}
            content = json.dumps(entry, indent=1, ensure_ascii=False, allow_nan=False).encode()
            if self._store.create(f"history/{after.n:08d}.json", content):
                return after

    def _newest(self) -> tuple[str | None, State]:
        """The name of the newest file, and the state after the newest one that is not damaged."""
        names = self._names()
        if not names:
            return None, State()
        entry = next(filter(None, map(self._read_or_log, reversed(names))), None)
        if entry is None:
            raise self._damaged(names[-1])
        return names[-1], entry[1]

    def _names(self) -> list[str]:
        """The names of the events' files; others are logged."""
        names = self._store.names("history")
        for name in names:
            if not _FILE.fullmatch(name):
                self._log(f"{self._store.root}/history/{printable(name)}: not a file of the history; move it elsewhere.")
        return [name for name in names if _FILE.fullmatch(name)]

    def _read_or_log(self, name: str) -> tuple[dict[str, Any], State] | None:
        try:
            return self._read(name)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._log(f"{self._damaged(name)} ({printable(repr(error))})")
            return None

    def _log(self, message: str) -> None:
        if message not in _reported:
            log.warning(message)
            _reported.add(message)

    def _read(self, name: str) -> tuple[dict[str, Any], State]:
        """An event and the state after it; raises various errors for a damaged file."""
        entry = parse_json(self._store.read(f"history/{name}") or b"")
        written = entry.pop("format")
        if written != FORMAT:
            raise RegistryError(
                f"{self._store.root}/history/{name}: format={printable(repr(written))}; this version reads {FORMAT}. "
                "Install the version that wrote it."
            )
        state = State(entry["n"], **entry.pop("state"))
        _check(name, entry, state)
        entry.pop("nonce", None)
        return entry, state

    def _damaged(self, name: str) -> RegistryError:
        return RegistryError(
            f"{self._store.root}/history/{name}: damaged; restore it from a backup, or delete it to return to the state "
            "before it."
        )


def _check(name: str, entry: dict[str, Any], state: State) -> None:
    """Checks what pydantic does not.

    Raises:
        ValueError: a text or the number is wrong, or a version's folder is not one of its own.
    """
    if f"{state.n:08d}.json" != name or not all(isinstance(entry[key], str) for key in ("event", "when", "who", "why")):
        raise ValueError(f"number {state.n}, or the event is incomplete")
    for version, about in state.versions.items():
        if not re.fullmatch(f"{re.escape(version)}(-[0-9]+)?", about["folder"]) or not re.fullmatch("[0-9a-z]+", version):
            raise ValueError(f"version {version!r} has the folder {about['folder']!r}")


def author() -> str:
    """USER@HOST of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def timestamp() -> str:
    """The current time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
