"""A registry of bundles: versions that never change, and aliases that point to them (champion, challenger).

```
versions/VERSION/…        the bundle's files and card.md; VERSION is its bundle_id, a hash of the content
history/00000007.json     event 7: who did what, when and why, and the registry's state after it
```

The newest file of the history is the registry's state; nothing else is stored. Each event is a new file with the next
number. If several processes write the same number, one of them succeeds and the others try again on the new state. So no
update is lost, no lock can be left behind, and no change is missing from the history.
"""

import re
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sodaops.bundle import layout
from sodaops.bundle.card import render_card
from sodaops.bundle.files import parsing
from sodaops.errors import RegistryError, nearest, some
from sodaops.io import runs
from sodaops.registry.history import History, State, author, timestamp
from sodaops.registry.store import open_store

CHAMPION, CHALLENGER = "champion", "challenger"
GRACE_S = 24 * 3600.0
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,40}")
_FOLDER = re.compile(r"[0-9a-f]{12}(-[0-9]+)?")
_TEMPORARY = re.compile(r"\.([0-9a-f]{12}(-[0-9]+)?|[0-9]{8}\.json)\.\w{8}\.(tmp|old)")  # see sodaops.io.storage


class Registry:
    """A registry in a folder or at ``gs://BUCKET/FOLDER``. A missing folder is an empty registry.

    Args:
        root: path or address.
    """

    def __init__(self, root: str) -> None:
        self._store = open_store(str(root))
        self._history = History(self._store)
        self.root = self._store.root

    def state(self) -> State:
        """The current versions and aliases.

        Raises:
            RegistryError: the history cannot be read.
        """
        return self._history.state()

    def history(self) -> list[dict[str, Any]]:
        """All events, oldest first, each with the aliases after it."""
        return self._history.events()

    def register(self, bundle_dir: str | Path, why: str = "", metrics: Mapping[str, Any] | None = None) -> str:
        """Adds a bundle and points ``challenger`` to it. A version that exists already is not changed.

        Args:
            bundle_dir: a bundle with ONNX models.
            why: a reason, for the history.
            metrics: split -> metrics that are not in the bundle; None: those of the run that the bundle lies in.

        Returns:
            The version.

        Raises:
            BundleError: damaged, or without an ONNX model.
            StorageError: the registry cannot be written to.
        """
        info = layout.read_info(bundle_dir)
        layout.verify(bundle_dir, info)
        if info.default_variant is None:
            raise RegistryError(f"{bundle_dir}: no ONNX model to serve; add one with `sodaops export {bundle_dir}`.")
        version = info.bundle_id
        all_metrics = {**info.metrics, **(run_metrics(bundle_dir, info) if metrics is None else metrics)}
        fields = {
            "when": timestamp(), "who": author(), "why": why, "metric": layout.task_of(bundle_dir, info).metrics[0].name,
            "metrics": all_metrics, "data": info.data, "created": info.created,
        }  # fmt: skip
        with parsing(Path(bundle_dir) / layout.CONFIG):
            card = render_card(info, layout.read_config(bundle_dir, info), all_metrics)
        while True:
            folder = self.state().folder(version)
            if layout.INFO not in self._store.names(f"versions/{folder}"):
                self._put(Path(bundle_dir), info, card, folder)

            def add(state: State, folder: str = folder) -> State:
                if state.folder(version) != folder:
                    raise _CollectedError
                entry = state.versions.get(version, {**fields, "folder": folder})
                return replace(state.point(CHALLENGER, version), versions={**state.versions, version: entry})

            try:
                self._history.append("register", add, version=version, why=why)
            except _CollectedError:  # gc has deleted the folder since; copy the bundle again, to a new folder
                continue
            return version

    def _put(self, bundle_dir: Path, info: layout.BundleInfo, card: str, name: str) -> None:
        with self._store.put(f"versions/{name}", {*layout.NAMES, layout.CARD}, layout.INFO) as folder:
            for file in (*info.files, layout.INFO):
                shutil.copyfile(bundle_dir / file, folder / file)
            layout.verify(folder, layout.read_info(folder))  # the copy, since the bundle may have been replaced meanwhile
            (folder / layout.CARD).write_text(card, encoding="utf-8")

    def move(self, alias: str, version: str, expected: str | None, why: str, event: str = "promote", **fields: Any) -> State:
        """Points an alias to a version, if it still points to ``expected``.

        Args:
            alias: its name.
            version: its new target.
            expected: its target when the decision was made; None: it did not exist.
            why: a reason, for the history.
            event: the event's name in the history.
            fields: what else to record.

        Raises:
            RegistryError: no such version, a malformed name, or the alias has been moved since.
        """
        if not _ALIAS.fullmatch(alias):
            raise RegistryError(f"alias {alias!r}: expected lower-case letters, digits, - and _, starting with a letter.")

        def point(state: State) -> State:
            if version not in state.versions:
                raise RegistryError(f"{version}: not a version of {self.root}; it may have been deleted.")
            actual = state.aliases.get(alias)
            if actual != expected:
                raise RegistryError(
                    f"{alias} of {self.root} was moved from {expected or 'nothing'} to {actual or 'nothing'} by another "
                    "process. Nothing was changed; run the command again."
                )
            return state.point(alias, version)

        return self._history.append(event, point, alias=alias, version=version, before=expected, why=why, **fields)

    def roll_back(self, why: str, alias: str = CHAMPION) -> str:
        """Points an alias to its earlier version; each further call goes back one more.

        Returns:
            The version that it points to now.

        Raises:
            RegistryError: there is no earlier version.
        """

        def back(state: State) -> State:
            past = [version for version in state.past.get(alias, []) if version in state.versions]
            if not past:
                raise RegistryError(f"{alias} of {self.root} has no earlier version to roll back to.")
            return replace(state, aliases={**state.aliases, alias: past[-1]}, past={**state.past, alias: past[:-1]})

        before = self.state().aliases.get(alias)
        return self._history.append("rollback", back, alias=alias, before=before, why=why).aliases[alias]

    def version(self, name: str) -> str:
        """The version that an alias, a version, or at least four first characters of one refer to.

        Raises:
            RegistryError: none, or several.
        """
        return self._find_version(self.state(), name)

    def _find_version(self, state: State, name: str) -> str:
        if name in state.aliases:
            return state.aliases[name]
        matches = [version for version in state.versions if len(name) >= 4 and version.startswith(name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise RegistryError(
                f"{name}: several versions of {self.root} start with it ({some(matches)}); give more characters."
            )
        if name in (CHAMPION, CHALLENGER):
            fix = "set it with `sodaops promote VERSION`" if state.versions else "add a version with `sodaops register BUNDLE`"
            raise RegistryError(f"{name}: {self.root} has none yet; {fix}.")
        known = [*state.aliases, *state.versions]
        raise RegistryError(
            f"{name}: no alias or version of {self.root}{nearest(name, known)}; it has {some(known) or 'none'}."
        )  # fmt: skip

    def resolve(self, name: str) -> str:
        """The path or address of a version's folder.

        Raises:
            RegistryError: no such alias or version.
        """
        state = self.state()
        return f"{self.root}/versions/{state.folder(self._find_version(state, name))}"

    def local(self, version: str) -> AbstractContextManager[Path]:
        """A context with a local folder of a version; a remote one is downloaded to a temporary folder."""
        return self._store.local(f"versions/{self.state().folder(version)}")

    def gc(self, keep: int = 3, dry: bool = False, grace_s: float = GRACE_S) -> list[str]:
        """Deletes the versions that no alias points to, except those that a rollback may need, and what killed processes left.

        Args:
            keep: how many earlier targets of each alias to keep.
            dry: only return what would be deleted.
            grace_s: seconds before a folder that is in no event, or a temporary one, counts as left by a killed process.

        Returns:
            The deleted versions, and the other deleted paths in the registry.
        """
        old = {name for name, changed in self._store.times("versions").items() if changed < time.time() - grace_s}
        taken: list[str] = []
        folders: list[str] = []  # of these versions, and of none

        def without_unused(state: State) -> State:
            taken[:] = state.unused(keep)
            kept = {version: about for version, about in state.versions.items() if version not in taken}
            in_use = {about["folder"] for about in state.versions.values()}
            orphans = {name for name in old if _FOLDER.fullmatch(name)} - in_use - {*state.collected}
            folders[:] = [*map(state.folder, taken), *sorted(orphans)]
            return replace(state, versions=kept, collected=[*state.collected, *folders])

        after = without_unused(self.state())
        if folders and not dry:
            after = self._history.append("gc", without_unused, why=f"kept {keep} earlier targets of each alias", taken=taken)
        own = {f"versions/{folder}" for folder in folders[: len(taken)]}
        leftovers = [path for path in self._deletable(after, old, grace_s) if path not in own]
        for path in [] if dry else [*own, *leftovers]:
            self._store.delete(path)
        return [*taken, *leftovers]

    def _deletable(self, state: State, old: Collection[str], grace_s: float) -> list[str]:
        """Paths of folders that were collected, also by a gc that was killed, and of old temporary files and folders."""
        versions, history = self._store.times("versions"), self._store.times("history")
        paths = [f"versions/{name}" for name in versions if name in state.collected]
        paths += [f"versions/{name}" for name in versions if name in old and _TEMPORARY.fullmatch(name)]
        limit = time.time() - grace_s
        paths += [f"history/{name}" for name, changed in history.items() if changed < limit and _TEMPORARY.fullmatch(name)]
        return sorted(paths)


def run_metrics(bundle_dir: str | Path, info: layout.BundleInfo) -> Mapping[str, Any]:
    """The metrics in the run.json beside a bundle, if it is about this bundle: split -> metric -> value."""
    folder = Path(bundle_dir).parent
    fields = runs.read_run(folder).fields if (folder / runs.RECORD).is_file() else {}
    return fields.get("metrics", {}) if fields.get("bundle_id") == info.bundle_id else {}


class _CollectedError(Exception):
    """A version was deleted by gc between two reads of the state."""


def address_of(source: str) -> str:
    """The path or address of a bundle: ``ROOT@ALIAS`` is looked up in the registry at ROOT, anything else is returned.

    Raises:
        RegistryError: no such alias or version there.
    """
    entry = entry_of(source)
    return source if entry is None else entry[0].resolve(entry[1])


def entry_of(source: str) -> tuple[Registry, str] | None:
    """The registry and the alias or version of ``ROOT@ALIAS``; None for a path or address."""
    root, at, name = source.rpartition("@")
    return None if not at or not root or "/" in name or Path(source).is_dir() else (Registry(root), name)
