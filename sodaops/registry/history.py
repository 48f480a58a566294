"""The history of a registry: numbered files that are never changed, each with an event and the state after it."""

import getpass
import json
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from sodaops.errors import RegistryError
from sodaops.registry.store import LocalStore, RemoteStore

FORMAT = 1


@dataclass(frozen=True)
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
        n_collected = sum(folder.partition("-")[0] == version for folder in self.collected)
        return f"{version}-{n_collected + 1}" if n_collected else version

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
        """The state after the newest event.

        Raises:
            RegistryError: a file that cannot be read.
        """
        names = self._store.names("history")
        return self._read(names[-1])[1] if names else State()

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first, each with the aliases after it."""
        return [{**event, "aliases": state.aliases} for event, state in map(self._read, self._store.names("history"))]

    def append(self, event: str, change: Callable[[State], State], **fields: Any) -> State:
        """Adds an event, and returns the state after it.

        Of several processes that write the same number one succeeds; the others call ``change`` again on the new state.

        Args:
            event: what happens: register, promote, rollback, gc.
            change: the new state, from the current one; it may raise.
            fields: what else to record.
        """
        while True:
            state = self.state()
            after = replace(change(state), n=state.n + 1)
            entry = {"format": FORMAT, "n": after.n, "event": event, "when": timestamp(), "who": author(), **fields}
            entry["nonce"] = uuid.uuid4().hex  # makes the content unique, so that a store can tell whose file was created
            entry["state"] = {key: value for key, value in vars(after).items() if key != "n"}
            content = json.dumps(entry, indent=1, ensure_ascii=False, allow_nan=False).encode()
            if self._store.create(f"history/{after.n:08d}.json", content):
                return after

    def _read(self, name: str) -> tuple[dict[str, Any], State]:
        try:
            entry = json.loads(self._store.read(f"history/{name}") or b"")
            state = State(entry["n"], **entry.pop("state"))
            if entry["format"] != FORMAT or f"{state.n:08d}.json" != name:
                raise ValueError(f"format {entry['format']}, number {state.n}")
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"{self._store.root}/history/{name}: damaged ({error}); restore it from a backup, or delete it to return to "
                "the state before it."
            ) from None
        return {key: value for key, value in entry.items() if key not in ("nonce", "format")}, state


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
