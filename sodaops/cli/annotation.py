"""The commands `sodaops labels check`, and `sodaops annotate` pick, serve, status, export, import and merge."""

import argparse
import importlib.util
import itertools
import os
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sodaops.cli.training import configured, explicit_keys, shown_path
from sodaops.config.schema import Config
from sodaops.data.preprocess import read_split
from sodaops.errors import ConfigError, some
from sodaops.io import remote

if TYPE_CHECKING:
    from sodaops.annotation.state import AnnotationState
    from sodaops.annotation.store import Store


def run_annotate_serve(options: argparse.Namespace) -> None:
    """`sodaops annotate serve`: replaces this process by the service, which needs no Hydra in memory."""
    if importlib.util.find_spec("fastapi") is None:
        raise ConfigError("fastapi is not installed; install it with `pip install 'sodaops[serve]'`.")
    from sodaops.annotation.settings import PREFIX
    from sodaops.web.settings import as_environment

    settings, explicit = configured(options).annotate, explicit_keys(options, "annotate")
    if options.store is not None:
        settings, explicit = settings.model_copy(update={"store": options.store}), {*explicit, "store"}
    sys.stdout.flush()
    command = [sys.executable, "-m", "sodaops.annotation"]
    os.execve(sys.executable, command, {**os.environ, **as_environment(settings, explicit, PREFIX)})


def run_annotate_status(options: argparse.Namespace) -> None:
    """`sodaops annotate status`: prints progress, agreement and conflicts."""
    store = _store(configured(options))
    print(format_status(store, store.state()))


def format_status(store: "Store", state: "AnnotationState") -> str:
    """Formats progress, agreement and conflicts for the terminal."""
    progress, conflicts = state.progress(), state.conflicts()
    lines = [f"{store.folder}: {progress.tasks:,} texts, {progress.answered:,} with a label ({some(state.labels, 20)})"]
    for name in state.annotators():
        lines.append(f"{name:<24}{progress.labelled.get(name, 0):>7,} labelled{progress.skipped.get(name, 0):>7,} skipped")
    for one, other in itertools.combinations(state.annotators(), 2):
        pair = state.agreement(one, other)
        if pair.raw is not None:
            kappa = "not defined" if pair.kappa is None else f"{pair.kappa:.2f}"
            share = f"{100 * pair.raw:.0f} % of {pair.n_shared:,} shared texts"
            lines.append(f"{one} and {other}: agree on {share}, kappa {kappa}")
    for task in conflicts[:5]:
        labels = ", ".join(f"{name} {label}" for name, label in sorted(state.labels_of(task.task).items()))
        lines.append(f"conflict: {task.task}: {labels}")
    if len(conflicts) > 5:
        lines.append(f"conflict: {len(conflicts) - 5:,} more")
    if state.n_strays:
        lines.append(f"warning: {state.n_strays:,} answers to deleted texts are not counted")
    return "\n".join(lines)


def run_annotate_export(options: argparse.Namespace) -> None:
    """`sodaops annotate export`: writes tasks and answers for other tools."""
    from sodaops.annotation.exchange import export_file

    n_tasks = export_file(_store(configured(options)), options.file)
    print(f"{options.file}: {n_tasks:,} texts")
    if options.file.lower().endswith(".json"):
        print(f"{Path(options.file).with_suffix('.xml')}: the labeling config")


def run_annotate_import(options: argparse.Namespace) -> None:
    """`sodaops annotate import`: reads texts and answers of other tools; makes the store with data.labels if there is none."""
    from sodaops.annotation.database import INFO
    from sodaops.annotation.exchange import ImportKeys, read_import
    from sodaops.annotation.state import AnnotationState
    from sodaops.annotation.store import Store
    from sodaops.data.sources import Layout
    from sodaops.tasks import make_task

    config = configured(options, "data.vote_columns=null")  # which must fit data.labels, and is not read here
    folder, ml_task = Path(config.annotate.store), make_task(config.task)
    labels = ml_task.labels_without_data(config.data)
    if (folder / INFO).exists():
        given = "labels" in explicit_keys(options, "data")  # else data.labels are those of the default data
        state = Store(folder, labels if given else None).state()
    elif labels:
        columns = config.data.text_columns if len(config.data.text_columns) > 1 else ["text"]
        state = AnnotationState(labels, [], {}, 0, ml_task, columns)
    else:
        raise ConfigError(f"{folder}: there is no store yet; give its labels with data.labels=[A,B].")
    keys = ImportKeys(config.annotate.text_key, config.annotate.label_key)
    layout = Layout(config.data.delimiter, config.data.encoding)
    planned = read_import(options.file, state, keys, config.data.label_map, layout)
    result = planned.write(
        Store.create(folder, state.labels, state.ml_task, state.text_columns)
    )  # only now, so that a refused file leaves no store
    print(f"{folder}: {result.n_tasks:,} new texts, {result.n_answers:,} new answers")


def run_labels_check(options: argparse.Namespace) -> None:
    """`sodaops labels check`: ranks rows by how likely their label is an error."""
    from sodaops import pipeline
    from sodaops.labels.check import PAGE, check_labels

    config = configured(options)
    summary = check_labels(config, pipeline.train)
    counts = ", ".join(f"{split} {n:,} of {summary['n_rows'][split]:,}" for split, n in summary["n_suspected"].items())
    print(f"suspected labels: {counts}")
    for one in summary["slices"]:
        print(f"suspicious slice: {one['column']}={one['value']}: {one['n_suspected']:,} of {one['n_rows']:,}")
    for warning in summary["warnings"]:
        print(f"warning: {warning}")
    print(f"report: {shown_path(remote.join(config.labels.output_dir, PAGE))}\nnext: sodaops annotate pick --from labels")


def _pick_suspects(config: Config) -> None:
    """Adds the texts whose labels are most suspicious; annotators do not see the present ones."""
    from sodaops.annotation.store import Store
    from sodaops.annotation.tasks import LABEL
    from sodaops.data.preprocess import read_manifest
    from sodaops.data.splits import text_hash
    from sodaops.labels.check import read_suspects
    from sodaops.tasks import make_task

    manifest, columns = read_manifest(config.splits_dir), config.data.text_columns
    suspects = list(read_suspects(config.labels.output_dir, manifest, columns))
    store = Store.create(config.annotate.store, manifest["labels"], make_task(config.task), columns)
    known = {task.text_sha256 for task in store.state().tasks}
    texts = [row["text"] for row in suspects if config.labels.test or row["split"] != "test"]
    tasks = [{"text": text, "text_sha256": text_hash(text), "why": LABEL} for text in texts if text_hash(text) not in known]
    n_new = store.add_tasks(f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}", tasks[: config.annotate.n])
    print(f"{store.folder}: {n_new:,} texts with suspected labels\nnext: sodaops annotate serve {store.folder}")


def run_annotate_pick(options: argparse.Namespace) -> None:
    """`sodaops annotate pick`: adds texts that are worth annotating; makes the store if there is none."""
    from sodaops.annotation.pick import pick_tasks
    from sodaops.annotation.store import Store
    from sodaops.bundle.layout import task_of
    from sodaops.cli.drift import request_log_path
    from sodaops.data.splits import SPLITS, text_hash
    from sodaops.drift.check import load_reference
    from sodaops.request_log.parts import read_disagreements
    from sodaops.request_log.window import read_window

    config = configured(options)
    if options.origin == "labels":
        _pick_suspects(config)
        return
    if options.bundle is None:
        raise ConfigError("the bundle is missing; expected for example `sodaops annotate pick registry@champion`.")
    info, reference = load_reference(options.bundle)
    window = read_window(
        request_log_path(config), config.drift.last, config.drift.since, config.drift.until, config.drift.max_rows
    )
    store = Store.create(config.annotate.store, info.labels, task_of(options.bundle, info), info.text_columns)
    splits_dir = config.splits_of(info.data["name"])
    known = {text_hash(text) for split in SPLITS for text in read_split(splits_dir, split)["text"].to_pylist()}
    settings = config.annotate
    disagreed, shares = read_disagreements(request_log_path(config), info.bundle_id), settings.shares.model_dump()
    picked = pick_tasks(info, reference, window.rows, store, known, settings.n, shares, disagreed)
    n_new = store.add_tasks(f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}", picked.tasks)
    whys = ", ".join(f"{n} {why}" for why, n in Counter(task["why"] for task in picked.tasks).most_common())
    print(f"{store.folder}: {n_new:,} new texts ({whys or 'none'}) of {picked.n_candidates:,} candidates")
    if picked.n_known or picked.n_hidden:
        print(f"left out: {picked.n_known:,} texts in the data or the store, {picked.n_hidden:,} requests without text")
    print(f"next: sodaops annotate serve {store.folder}")


def run_annotate_merge(options: argparse.Namespace) -> None:
    """`sodaops annotate merge`: writes the labels on which annotators agree to a new raw table."""
    from sodaops.annotation.merge import merge_answers
    from sodaops.tasks import make_task

    config = configured(options)
    settings, ml_task = config.annotate, make_task(config.task)
    near, least, with_test = settings.near_test, settings.min_annotators, config.labels.test
    result = merge_answers(_store(config), config.data, config.splits_dir, least, near, ml_task, with_test)
    print(result.describe())
    if result.path or result.corrections:
        print("next: dvc repro, or python train.py")


def _store(config: Config) -> "Store":
    from sodaops.annotation.store import Store

    return Store(config.annotate.store)
