"""Versions of bundles that never change, and names that point at them: champion, challenger.

```
versions/VERSION/…        the bundle's files and card.md; VERSION is its bundle_id, a hash of what answers
history/00000007.json     the seventh thing that happened: who, when, why, and how the registry stood after it
```

Nothing else is kept: the newest entry of the history is the registry's state. An entry is created under the next number,
which one of any number of processes can do; the others see that they were late. So no update is lost, there is no lock to
be left behind, and what happened is written down because it could not have happened otherwise.
"""

import getpass
import json
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sodaops.bundle import layout
from sodaops.errors import RegistryError, nearest, some
from sodaops.registry.card import card
from sodaops.registry.store import open_store

CHAMPION, CHALLENGER = "champion", "challenger"
CARD = "card.md"
FORMAT = 1
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,40}")


@dataclass(frozen=True)
class State:
    """How a registry stands."""

    n: int = 0  # entries of its history
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)  # version -> who, when, why, metrics, data
    aliases: dict[str, str] = field(default_factory=dict)
    past: dict[str, list[str]] = field(default_factory=dict)  # alias -> where it pointed before, the newest last
    collected: list[str] = field(default_factory=list)  # folders that gc deletes or has deleted; they are not used again


class Registry:
    """A registry in a folder, or at ``gs://BUCKET/FOLDER``; an empty or missing one is an empty registry.

    Args:
        root: where it is.
    """

    def __init__(self, root: str) -> None:
        self._store = open_store(str(root))
        self.root = self._store.root

    def state(self) -> State:
        """How it stands now.

        Raises:
            RegistryError: a history that cannot be read.
        """
        names = self._store.names("history")
        return self._entry(names[-1])[1] if names else State()

    def history(self) -> list[dict[str, Any]]:
        """What happened, oldest first, each with where the aliases pointed afterwards."""
        entries = map(self._entry, self._store.names("history"))
        return [{**entry, "aliases": state.aliases} for entry, state in entries]

    def register(self, bundle_dir: str | Path, why: str = "", metrics: Mapping[str, Any] | None = None) -> str:
        """Adds a bundle and points ``challenger`` at it; one that is here already stays as it is.

        Args:
            bundle_dir: a bundle with ONNX models.
            why: a reason, for the history.
            metrics: split -> metrics, where more is known than the bundle says.

        Returns:
            The version.

        Raises:
            BundleError: damaged, or without an ONNX model.
            StorageError: the registry cannot be written to.
        """
        info = layout.read_info(bundle_dir)
        layout.verify(bundle_dir, info)
        if info.default_variant is None:
            raise RegistryError(f"{bundle_dir}: holds no ONNX model to serve; make one with `sodaops export {bundle_dir}`.")
        version, told = info.bundle_id, {**info.metrics, **(metrics or {})}
        about = {"when": _now(), "who": _who(), "why": why, "metrics": told, "data": info.data, "created": info.created}

        def add(state: State) -> State:
            if _folder(state, version) != folder:
                raise _CollectedError
            known = state.versions.get(version, {**about, "folder": folder})  # what is there stays
            return replace(_point(state, CHALLENGER, version), versions={**state.versions, version: known})

        while True:
            folder = _folder(self.state(), version)
            if layout.INFO not in self._store.names(f"versions/{folder}"):
                self._put(Path(bundle_dir), info, told, folder)
            try:
                self._append("register", add, version=version, why=why)
            except _CollectedError:  # gc took it meanwhile
                continue
            return version

    def _put(self, bundle_dir: Path, info: layout.BundleInfo, metrics: Mapping[str, Any], name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for file in (*info.files, layout.INFO):
                shutil.copyfile(bundle_dir / file, Path(folder) / file)
            (Path(folder) / CARD).write_text(card(info, layout.read_config(bundle_dir), metrics), encoding="utf-8")
            self._store.put(Path(folder), f"versions/{name}", layout.INFO)

    def move(self, alias: str, version: str, expected: str | None, why: str, event: str = "promote", **more: Any) -> State:
        """Points an alias at a version, if it still points where it did when that was decided.

        Args:
            alias: its name.
            version: where it is to point.
            expected: where it must point now; None: nowhere.
            why: a reason, for the history.
            event: what this is called there.
            more: what else the history is to hold.

        Raises:
            RegistryError: no such version, a bad name, or the alias was moved meanwhile.
        """
        if not _ALIAS.fullmatch(alias):
            raise RegistryError(f"alias {alias!r}: expected lower-case letters, digits, - and _, a letter first.")

        def point(state: State) -> State:
            if version not in state.versions:
                raise RegistryError(f"{version}: no version of {self.root} any more.")
            found = state.aliases.get(alias)
            if found != expected:
                raise RegistryError(
                    f"{alias} was moved from {expected or 'nothing'} to {found or 'nothing'} meanwhile, so what was decided no "
                    "longer holds. Nothing has changed; run it again."
                )
            return _point(state, alias, version)

        return self._append(event, point, alias=alias, version=version, before=expected, why=why, **more)

    def roll_back(self, why: str, alias: str = CHAMPION) -> str:
        """Points an alias where it pointed before; once more, and it goes one further back.

        Returns:
            The version that it points at now.

        Raises:
            RegistryError: there was none before.
        """

        def back(state: State) -> State:
            past = [version for version in state.past.get(alias, []) if version in state.versions]
            if not past:
                raise RegistryError(f"{alias} pointed nowhere before; nothing to roll back to in {self.root}.")
            return replace(state, aliases={**state.aliases, alias: past[-1]}, past={**state.past, alias: past[:-1]})

        before = self.state().aliases.get(alias)
        return self._append("rollback", back, alias=alias, before=before, why=why).aliases[alias]

    def version(self, name: str) -> str:
        """The version that an alias, a version or the beginning of one means.

        Raises:
            RegistryError: none, or several.
        """
        return self._version(self.state(), name)

    def _version(self, state: State, name: str) -> str:
        if name in state.aliases:
            return state.aliases[name]
        found = [version for version in state.versions if len(name) >= 4 and version.startswith(name)]
        if len(found) == 1:
            return found[0]
        known = [*state.aliases, *state.versions]
        if found:
            raise RegistryError(f"{name} may be {some(found)}; give more of it.")
        if name in (CHAMPION, CHALLENGER):
            mend = "`sodaops promote VERSION` makes one" if state.versions else "`sodaops register BUNDLE` puts a version here"
            raise RegistryError(f"{name} points to nothing in {self.root}; {mend}.")
        has = some(known) or "none"
        raise RegistryError(f"{name}: no alias or version of {self.root}{nearest(name, known)}; it has {has}.")

    def resolve(self, name: str) -> str:
        """The path or address of a version's folder.

        Raises:
            RegistryError: no such alias or version.
        """
        state = self.state()
        return f"{self.root}/versions/{_folder(state, self._version(state, name))}"

    def local(self, version: str) -> AbstractContextManager[Path]:
        """A context with a version's folder on this machine; one afar is copied for as long as it lasts."""
        return self._store.local(f"versions/{_folder(self.state(), version)}")

    def gc(self, keep: int = 3, dry: bool = False) -> list[str]:
        """Deletes versions to which nothing points, but not those that a roll back may need.

        Args:
            keep: so many earlier targets of each alias stay.
            dry: only say which.

        Returns:
            The versions that are gone, or would be.
        """
        taken: list[str] = []
        folders: list[str] = []

        def without(state: State) -> State:
            taken[:] = _unused(state, keep)
            folders[:] = [_folder(state, version) for version in taken]
            kept = {version: about for version, about in state.versions.items() if version not in taken}
            return replace(state, versions=kept, collected=[*state.collected, *folders])

        if dry or not _unused(self.state(), keep):
            return _unused(self.state(), keep)
        self._append("gc", without, why=f"kept {keep} earlier targets of each alias", taken=taken)
        for folder in folders:
            self._store.delete(f"versions/{folder}")
        return taken

    def _append(self, event: str, change: Callable[[State], State], **fields: Any) -> State:
        """Writes the next entry; where another process wrote it first, decides anew on what then is."""
        while True:
            state = self.state()
            after = replace(change(state), n=state.n + 1)
            told = {"format": FORMAT, "n": after.n, "event": event, "when": _now(), "who": _who(), **fields}
            standing = {key: value for key, value in vars(after).items() if key != "n"}
            entry = {**told, "nonce": uuid.uuid4().hex, "state": standing}
            content = json.dumps(entry, indent=1, ensure_ascii=False, allow_nan=False).encode()
            if self._store.create(f"history/{after.n:08d}.json", content):
                return after

    def _entry(self, name: str) -> tuple[dict[str, Any], State]:
        try:
            entry = json.loads(self._store.read(f"history/{name}"))
            state = State(entry["n"], **entry.pop("state"))
            if entry["format"] != FORMAT or f"{state.n:08d}.json" != name:
                raise ValueError(f"format {entry['format']}, number {state.n}")
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"{self.root}/history/{name}: damaged ({error}); bring a copy back, or move it away to stand as before it."
            ) from None
        return {key: value for key, value in entry.items() if key not in ("nonce", "format")}, state


def address_of(source: str) -> str:
    """Where a bundle is: ``ROOT@ALIAS`` is looked up in the registry at ROOT, anything else is taken as it is.

    Raises:
        RegistryError: no such alias or version there.
    """
    root, at, name = source.rpartition("@")
    if not at or not root or "/" in name or Path(source).is_dir():
        return source
    return Registry(root).resolve(name)


def _point(state: State, alias: str, version: str) -> State:
    """An alias that points elsewhere; the past of the champion is what a roll back needs."""
    before = state.aliases.get(alias)
    past = [*state.past.get(alias, []), before] if before not in (None, version) else state.past.get(alias, [])
    return replace(state, aliases={**state.aliases, alias: version}, past={**state.past, alias: past})


class _CollectedError(Exception):
    """A version was collected between two looks at it."""


def _folder(state: State, version: str) -> str:
    """Where a version lies, or would: after it was collected, in a folder of another name, which no gc is about to delete."""
    if version in state.versions:
        return state.versions[version]["folder"]
    n = sum(folder.partition("-")[0] == version for folder in state.collected)
    return f"{version}-{n + 1}" if n else version


def _unused(state: State, keep: int) -> list[str]:
    needed = {*state.aliases.values()}
    for past in state.past.values():
        needed |= {*past[-keep:]} if keep else set()
    return [version for version in state.versions if version not in needed]


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
