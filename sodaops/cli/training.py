"""The commands preprocess, train, evaluate, predict and serve."""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sodaops.cli.console import configure_logging
from sodaops.errors import ConfigError, DataError
from sodaops.io import remote
from sodaops.text.columns import text_of_word

if TYPE_CHECKING:
    from sodaops.config.schema import Config
    from sodaops.evaluation.result import Evaluated
    from sodaops.export.onnx_export import Exported
    from sodaops.inference.predictor import Predictor


def train_and_show(config: "Config") -> float | None:
    """Trains as configured and prints the results.

    Returns:
        The monitored metric on val at the epoch that was kept, for sweeps; None if no epoch was kept.
    """
    from sodaops import pipeline

    configure_logging()  # also here, since launchers call this function in new processes
    result = pipeline.train(config)
    if result.exported is not None:
        show_export(result.exported)
    if result.evaluated is not None:
        show_evaluation(result.evaluated)
    if result.bundle_dir is not None:
        print(f"bundle: {shown_path(result.bundle_dir)}")
    return result.score


def show_export(exported: "Exported") -> None:
    """Prints the ONNX variants that were written, with the measurements of their checks; the export has logged the others."""
    for variant in exported.info.onnx:
        print(f"{variant:<8}written: {exported.gates[variant].as_text()}")


def show_evaluation(evaluated: "Evaluated") -> None:
    """Prints an evaluation as a table."""
    from sodaops.evaluation.result import describe_abstention, own_metrics

    task, m = evaluated.task, evaluated.metrics
    first, *others = task.metrics
    low, high = (m["interval_95"][first.name][end] for end in ("low", "high"))
    rows = [("this model", m, f"{low:.3f} to {high:.3f}")]
    rows += [(title, values, "") for title, values in evaluated.others]
    table = [[f"{evaluated.split} split, {m['n_rows']:,} rows", first.title, "95 % interval", *(one.title for one in others)]]
    for title, values, interval in rows:
        cells = [f"{values[metric.name]:.3f}" if metric.name in values else "" for metric in task.metrics]
        table.append([title, cells[0], interval, *cells[1:]])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for title, *cells in table:
        print(f"{title:<{widths[0]}}" + "".join(f"   {cell:>{n}}" for cell, n in zip(cells, widths[1:], strict=True)).rstrip())
    if teacher := m.get("teacher"):
        low, high = teacher["gain"]["low"], teacher["gain"]["high"]
        difference = f"{first.title} {teacher['gain']['measured']:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
        print(f"against its teacher: {difference}, {teacher['speed']:.2f} times as fast")
    for line in describe_abstention(m.get("abstention", {})):
        print(line)
    if own := own_metrics(task, m):
        print("  ".join(f"{name} {'–' if value is None else format(value, '.4g')}" for name, value in own.items()))
    if not evaluated.same_data:
        print("note: the bundle was trained with other splits, so these rows may include its training data")
    for warning in evaluated.warnings:
        print(f"\nwarning: {warning}")
    print(f"\nreport: {shown_path(evaluated.report_path)}")


def shown_path(path: str | Path) -> str:
    """Shortens a path inside the current folder to a relative one; leaves remote addresses unchanged."""
    if remote.is_address(path):
        return str(path)
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else str(path)


def run_train(options: argparse.Namespace) -> None:
    """Runs `sodaops train` and train.py."""
    from sodaops.config.compose import load_params, run_hydra

    if any(word.split("=")[0] in ("-sc", "--shell-completion") for word in options.words):
        raise ConfigError("--shell-completion: use `sodaops completion bash`, or zsh, in its place.")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--params")
    parser.add_argument("--config-path")
    own, words = parser.parse_known_args([re.sub("^-cp(?==|$)", "--config-path", word) for word in options.words])
    if own.params is not None and own.config_path is not None:
        raise ConfigError("--params and --config-path: give one of them.")
    if own.params is not None:
        train_and_show(load_params(own.params, words))
    else:
        run_hydra(train_and_show, words, own.config_path)


def run_preprocess(options: argparse.Namespace) -> None:
    """Runs `sodaops preprocess`."""
    from sodaops import pipeline
    from sodaops.data.preprocess import summarize_manifest

    config = configured(options)
    print(summarize_manifest(pipeline.prepare(config)))
    print(f"splits: {config.splits_dir}")


def run_evaluate(options: argparse.Namespace) -> None:
    """Runs `sodaops evaluate [BUNDLE]`."""
    from sodaops import pipeline

    config = configured(options)
    if options.bundle is not None:
        config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"bundle": options.bundle})})
    show_evaluation(pipeline.evaluate(config))


def run_serve(options: argparse.Namespace) -> None:
    """Runs `sodaops serve BUNDLE`: passes conf/serve as environment variables and replaces this process by the service."""
    import importlib.util

    from sodaops.config.schema import ServeConfig

    if importlib.util.find_spec("fastapi") is None:
        raise ConfigError("fastapi is not installed; install it with `pip install 'sodaops[serve]'`.")
    from sodaops.web.settings import as_environment

    bundle = options.bundle or os.environ.get("SODAOPS_BUNDLE")
    if bundle is None:
        raise ConfigError("the bundle is missing; give it as `sodaops serve RUN/bundle`, or in SODAOPS_BUNDLE.")
    composed = options.overrides or options.params or options.config_dir  # else there is no need for Hydra
    serve = configured(options).serve if composed else ServeConfig()  # a test checks that the defaults equal conf/serve
    variables = {**os.environ, **as_environment(serve, explicit_keys(options, "serve")), "SODAOPS_BUNDLE": bundle}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "sodaops.serving"], variables)


def configured(options: argparse.Namespace, *more: str) -> "Config":
    """Composes the configuration from a command's KEY=VALUE, ``more`` of them, and conf/ or ``--params FILE``."""
    from sodaops.config.compose import compose, load_params

    overrides = [*options.overrides, *more]
    return load_params(options.params, overrides) if options.params is not None else compose(overrides, options.config_dir)


def explicit_keys(options: argparse.Namespace, section: str) -> set[str]:
    """The keys of a section that the command line sets, without the section's name."""
    return {word.partition("=")[0].lstrip("+").removeprefix(f"{section}.").partition(".")[0] for word in options.overrides}


def run_predict(options: argparse.Namespace) -> None:
    """Runs `sodaops predict BUNDLE TEXT ...`, or with `--file TABLE --output TABLE` for a table."""
    from sodaops.data.text_files import layout_of
    from sodaops.inference.predictor import Predictor
    from sodaops.inference.table import bulk_predictor, predict_table
    from sodaops.registry.bundles import bundle_at, predictor_files

    if bool(options.texts) == bool(options.file) or bool(options.file) != bool(options.output):
        raise ConfigError("sodaops predict: give texts, - for standard input, or --file TABLE with --output TABLE.")
    with bundle_at(options.bundle, predictor_files(options.variant)) as folder:
        predictor = (bulk_predictor if options.file else Predictor)(folder, options.variant)
    if options.abstain:
        predictor.require_thresholds("--abstain")
    if options.file:
        layout = layout_of(options.delimiter, options.encoding)
        table = predictor, options.file, options.text_column, options.output
        written = predict_table(*table, layout=layout, abstain=options.abstain)
        resumed = f", {written.n_resumed:,} of them predicted by an earlier run" if written.n_resumed else ""
        print(f"{options.output}: {written.n_rows:,} rows{resumed}")
    elif options.texts == ["-"]:
        n_lines = 0
        for lines in _lines_of_stdin():
            numbered = {number: line for number, line in enumerate(lines, n_lines + 1) if line.strip()}
            texts = _texts_of(predictor, numbered, "standard input, line")
            _print_predictions(
                predictor, [(line, text) for line, text in texts if predictor.clean(text)], options.abstain
            )  # no empty lines
            n_lines += len(lines)
    else:
        _print_predictions(predictor, _texts_of(predictor, dict(enumerate(options.texts, 1)), "text"), options.abstain)


def _texts_of(predictor: "Predictor", words: Mapping[int, str], place: str) -> list[tuple[str, str]]:
    """Numbered words of the command line or lines, each with its raw text."""
    return [(word, text_of_word(word, predictor.info.text_columns, f"{place} {i}")) for i, word in words.items()]


def _lines_of_stdin() -> Iterator[list[str]]:
    """The lines of standard input that are there, again and again until its end, so that a slow program gets answers too."""
    rest, n_lines = b"", 0
    while block := sys.stdin.buffer.read1(65_536):  # type: ignore[union-attr]  # typed as BinaryIO
        *lines, rest = (rest + block).split(b"\n")
        yield [_decoded(line, number) for number, line in enumerate(lines, n_lines + 1)]
        n_lines += len(lines)
    if rest:
        yield [_decoded(rest, n_lines + 1)]


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input, line {number}: not UTF-8 ({error}); convert it, for example with iconv.") from None


def _print_predictions(predictor: "Predictor", texts: Sequence[tuple[str, str]], abstain: bool) -> None:
    """Prints a line for each text, as it was given, if wanted with the reason to abstain."""
    for (given, _), answer in zip(texts, predictor.predict([text for _, text in texts]), strict=True):
        shown, details = predictor.task.shown(answer)
        why = predictor.reason(answer) if abstain else None
        print(f"{shown}\t{given}\t({details}{(why and f'; abstains: {why}') or ''})", flush=True)
