"""The verb annotate and its own verbs: pick, serve, status, export, import, merge."""

import argparse
import importlib.util
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sodaops.cli.registry import asked_and_configured
from sodaops.config.schema import Config
from sodaops.data.preprocess import read_split
from sodaops.errors import ConfigError, nearest, some

if TYPE_CHECKING:
    from sodaops.annotation.state import AnnotationState
    from sodaops.annotation.store import Store


def run_annotate(rest: list[str]) -> None:
    """`sodaops annotate VERB`."""
    verb, *rest = rest or [""]
    if verb in ("-h", "--help"):
        print(f"usage: sodaops annotate {{{','.join(VERBS)}}} … [KEY=VALUE ...]; --help after one of them says more")
        return
    if verb not in VERBS:
        raise ConfigError(f"sodaops annotate {verb}: expected one of {', '.join(VERBS)}{nearest(verb, VERBS)}.")
    VERBS[verb](rest)


def serve(rest: list[str]) -> None:
    """Becomes the service, so that nothing of Hydra stays in memory."""
    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        rest = [*rest[1:], f"annotate.store={rest[0]}"]
    usage = "sodaops annotate serve [STORE] [KEY=VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, description="The page on which people label texts.")
    _, config = asked_and_configured(parser, rest)
    if importlib.util.find_spec("fastapi") is None:
        raise ConfigError("fastapi is not installed; get it with `pip install 'sodaops[serve]'`.")
    from sodaops.annotation.settings import PREFIX
    from sodaops.web.settings import as_environment

    explicit = {text.partition("=")[0].removeprefix("annotate.") for text in rest}
    sys.stdout.flush()
    command = [sys.executable, "-m", "sodaops.annotation"]
    os.execve(sys.executable, command, {**os.environ, **as_environment(config.annotate, explicit, PREFIX)})


def status(rest: list[str]) -> None:
    """Prints who answered how much, how far they agree, and what is out of order."""
    parser = argparse.ArgumentParser(prog="sodaops annotate status", description="Progress, agreement and conflicts.")
    _, config = asked_and_configured(parser, rest)
    store = _store(config)
    print(describe(store, store.state()))


def describe(store: "Store", state: "AnnotationState") -> str:
    """A few lines for a person."""
    progress, conflicts = state.progress(), state.conflicts()
    lines = [f"{store.folder}: {progress.tasks:,} texts, {progress.answered:,} with a label ({some(state.labels, 20)})"]
    for name in state.annotators():
        lines.append(f"{name:<24}{progress.labelled.get(name, 0):>7,} labelled{progress.skipped.get(name, 0):>7,} skipped")
    for one, other in itertools.combinations(state.annotators(), 2):
        found = state.agreement(one, other)
        if found.raw is not None:
            kappa = "not defined" if found.kappa is None else f"{found.kappa:.2f}"
            lines.append(f"{one} and {other}: {100 * found.raw:.0f} % of {found.n_shared:,} shared texts alike, kappa {kappa}")
    for task in conflicts[:5]:
        said = ", ".join(f"{name} {label}" for name, label in sorted(state.labels_of(task.task).items()))
        lines.append(f"conflict: {task.task}: {said}")
    if len(conflicts) > 5:
        lines.append(f"conflict: {len(conflicts) - 5:,} more")
    if state.n_strays:
        lines.append(f"warning: {state.n_strays:,} answers to texts that are not here are left out")
    return "\n".join(lines)


def export(rest: list[str]) -> None:
    """Writes tasks and answers for other tools."""
    from sodaops.annotation.exchange import export_file

    parser = argparse.ArgumentParser(prog="sodaops annotate export", description="Tasks and answers for other tools.")
    parser.add_argument("file", help="NAME.json for Label Studio (NAME.xml, its labeling config, comes with it), or NAME.csv")
    asked, config = asked_and_configured(parser, rest)
    n_tasks = export_file(_store(config), asked.file)
    beside = Path(asked.file).with_suffix(".xml")
    print(f"{asked.file}: {n_tasks:,} texts" + (f"\n{beside}: the labeling config" if asked.file.endswith(".json") else ""))


def import_(rest: list[str]) -> None:
    """Reads texts and answers of other tools; a store that is not there is made with data.labels."""
    from sodaops.annotation.exchange import import_file
    from sodaops.annotation.store import INFO, Store

    parser = argparse.ArgumentParser(prog="sodaops annotate import", description="Texts and answers of other tools.")
    parser.add_argument("file", help="Label Studio's JSON, or a table with text and, if there are, task, label, annotator")
    asked, config = asked_and_configured(parser, rest)
    folder, labels = Path(config.annotate.store), config.data.labels
    if not (folder / INFO).exists() and labels is not None:
        if not Path(asked.file).is_file():
            raise ConfigError(f"{asked.file}: no such file.")
        store = Store.create(folder, [str(label) for label in labels])
    else:
        store = _store(config)
    found = import_file(store, asked.file)
    print(f"{folder}: {found.n_tasks:,} new texts, {found.n_answers:,} new answers")


def pick(rest: list[str]) -> None:
    """Adds texts of the request log that are worth a person's time; a store that is not there is made."""
    from sodaops.annotation.pick import pick as choose
    from sodaops.annotation.store import Store
    from sodaops.cli.drift import log_of
    from sodaops.data.splits import SPLITS, text_hash
    from sodaops.drift.check import reference_of
    from sodaops.request_log.window import read_window

    parser = argparse.ArgumentParser(prog="sodaops annotate pick", description="Texts worth a person's time.")
    parser.add_argument("bundle", help="that answered: RUN/bundle, gs://BUCKET/FOLDER or REGISTRY@champion")
    asked, config = asked_and_configured(parser, rest)
    info, reference = reference_of(asked.bundle)
    window = read_window(log_of(config), config.drift.last, config.drift.since, config.drift.until, config.drift.max_rows)
    store = Store.create(config.annotate.store, info.labels)
    splits_dir = config.splits_of(info.data["name"])
    known = {text_hash(text) for split in SPLITS for text in read_split(splits_dir, split)["text"].to_pylist()}
    settings = config.annotate
    found = choose(info, reference, window.rows, store, known, settings.n, settings.shares.model_dump())
    n_new = store.add_tasks(f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}", found.tasks)
    whys = ", ".join(f"{n} {why}" for why, n in Counter(task["why"] for task in found.tasks).most_common())
    print(f"{store.folder}: {n_new:,} new texts ({whys or 'none'}) of {found.n_candidates:,} that nobody knows yet")
    if found.n_known or found.n_hidden:
        print(f"left out: {found.n_known:,} texts in the data or tasks already, {found.n_hidden:,} requests without text")
    print(f"go on: sodaops annotate serve {store.folder}")


def merge(rest: list[str]) -> None:
    """Writes the labels that annotators agree on to a new raw table."""
    from sodaops.annotation.merge import merge as write

    parser = argparse.ArgumentParser(prog="sodaops annotate merge", description="Accepted labels become a new raw table.")
    _, config = asked_and_configured(parser, rest)
    found = write(_store(config), config.data, config.splits_dir, config.annotate.min_annotators, config.annotate.near_test)
    print(found.describe())
    if found.path:
        print("go on: dvc repro, or python train.py")


# What `sodaops annotate` has; each takes the arguments after its name.
VERBS: dict[str, Callable[[list[str]], None]] = {
    "pick": pick, "serve": serve, "status": status, "export": export, "import": import_, "merge": merge,
}  # fmt: skip


def _store(config: Config) -> "Store":
    from sodaops.annotation.store import Store

    return Store(config.annotate.store)
