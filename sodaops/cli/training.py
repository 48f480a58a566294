"""The commands preprocess, train, export, evaluate, predict and serve."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sodaops.cli.console import configure_logging
from sodaops.errors import ConfigError
from sodaops.io import remote

if TYPE_CHECKING:
    from sodaops.config.schema import Config
    from sodaops.evaluation.result import Evaluated
    from sodaops.export.onnx_export import Exported


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
    """Prints which ONNX variants were written, with the measurements of their checks."""
    for variant, gate in exported.gates.items():
        passed = variant in exported.info.onnx
        print(
            f"{variant:<8}{'written' if passed else 'NOT WRITTEN'}: {gate.as_text()}",
            file=sys.stdout if passed else sys.stderr,
        )


def show_evaluation(evaluated: "Evaluated") -> None:
    """Prints an evaluation as a table."""
    m = evaluated.metrics
    low, high = m["interval_95"]["macro_f1"]["low"], m["interval_95"]["macro_f1"]["high"]
    names = {"majority": "most frequent label", "tfidf": "TF-IDF + logistic regression"}
    print(
        f"\n{evaluated.split} split, {m['n_rows']:,} rows           macro-F1   95 % interval   accuracy   weighted F1     ECE"
    )
    print(
        f"{'this model':<31}{m['macro_f1']:10.3f}   {low:.3f} to {high:.3f}  {m['accuracy']:8.3f}"
        f"   {m['weighted_f1']:11.3f}   {m['ece']:.3f}"
    )
    for name, values in evaluated.baselines.items():
        print(f"{names[name]:<31}{values['macro_f1']:10.3f}{values['accuracy']:27.3f}   {values['weighted_f1']:11.3f}")
    if not evaluated.same_data:
        print("note: the bundle was trained with other splits, so these rows may include its training data")
    print(f"\nreport: {shown_path(evaluated.report_path)}")


def shown_path(path: str | Path) -> str:
    """Shortens a path inside the current folder to a relative one; leaves remote addresses unchanged."""
    if remote.is_address(path):
        return str(path)
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else str(path)


def run_train(rest: list[str]) -> None:
    """Runs `sodaops train` and train.py."""
    from sodaops.config.compose import load_params, run_hydra

    params, rest = option(rest, "--params")
    if params is not None:
        train_and_show(load_params(params, rest))
    else:
        run_hydra(train_and_show, rest)


def run_preprocess(rest: list[str]) -> None:
    """Runs `sodaops preprocess`."""
    from sodaops import pipeline
    from sodaops.data.preprocess import summarize_manifest

    config = configured(rest)
    print(summarize_manifest(pipeline.prepare(config)))
    print(f"splits: {config.splits_dir}")


def run_export(rest: list[str]) -> None:
    """Runs `sodaops export BUNDLE`."""
    from sodaops import pipeline

    if not rest or not _is_positional(rest[0]):
        raise ConfigError("the bundle is missing; give it as `sodaops export RUN/bundle`.")
    bundle, *rest = rest
    exported = pipeline.export_bundle(configured(rest), bundle)
    show_export(exported)
    print(f"bundle: {bundle} ({exported.info.bundle_id})")


def run_evaluate(rest: list[str]) -> None:
    """Runs `sodaops evaluate [BUNDLE]`."""
    from sodaops import pipeline

    if rest and _is_positional(rest[0]):
        rest = [f"evaluate.bundle='{rest[0]}'", *rest[1:]]
    show_evaluation(pipeline.evaluate(configured(rest)))


def _is_positional(argument: str) -> bool:
    return "=" not in argument and not argument.startswith("-")


def run_serve(rest: list[str]) -> None:
    """Runs `sodaops serve BUNDLE`: passes conf/serve as environment variables and replaces this process by the service."""
    import importlib.util

    from sodaops.config.schema import ServeConfig

    if importlib.util.find_spec("fastapi") is None:
        raise ConfigError("fastapi is not installed; install it with `pip install 'sodaops[serve]'`.")
    from sodaops.web.settings import as_environment

    if rest and _is_positional(rest[0]):
        os.environ["SODAOPS_BUNDLE"], *rest = rest
    if "SODAOPS_BUNDLE" not in os.environ:
        raise ConfigError("the bundle is missing; give it as `sodaops serve RUN/bundle`, or in SODAOPS_BUNDLE.")
    explicit = [override.partition("=")[0].removeprefix("serve.") for override in rest]
    serve = configured(rest).serve if rest else ServeConfig()  # a test checks that the defaults equal conf/serve
    sys.stdout.flush()
    command = [sys.executable, "-m", "sodaops.serving"]
    os.execve(sys.executable, command, {**os.environ, **as_environment(serve, explicit)})


def configured(rest: list[str]) -> "Config":
    """Composes the configuration from a command's overrides and conf/, or ``--params FILE``."""
    from sodaops.config.compose import compose, load_params

    params, rest = option(rest, "--params")
    folder, rest = option(rest, "--config-dir")
    return load_params(params, rest) if params is not None else compose(rest, folder)


def option(rest: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Removes ``flag VALUE`` from the arguments; returns the value, or None, and the other arguments."""
    parser = argparse.ArgumentParser(prog="sodaops", add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    parsed, others = parser.parse_known_args(rest)
    return parsed.value, others


def run_predict(rest: list[str]) -> None:
    """Runs `sodaops predict BUNDLE TEXT ...`, or with `--file TABLE --output TABLE` for a table."""
    from sodaops.inference.predictor import Predictor
    from sodaops.inference.table import bulk_predictor, predict_table
    from sodaops.registry.bundles import bundle_at, predictor_files

    parser = argparse.ArgumentParser(prog="sodaops predict", description="Predict the labels of texts or of a table.")
    parser.add_argument("bundle", help="RUN/bundle, gs://BUCKET/FOLDER or REGISTRY@champion")
    parser.add_argument("texts", nargs="*", metavar="text")
    parser.add_argument("--file", help="input table, local or at gs://: .csv, .tsv, .jsonl or .parquet")
    parser.add_argument("--text-column", default="text", help="the column with the texts (default: text)")
    parser.add_argument("--output", help="local file for the table with label, score and probabilities added")
    parser.add_argument("--variant", help="float32 or int8 (default: int8 where it passed its gate)")
    arguments = parser.parse_args(rest)
    if bool(arguments.texts) == bool(arguments.file) or bool(arguments.file) != bool(arguments.output):
        parser.error("give texts, or --file TABLE with --output TABLE")
    with bundle_at(arguments.bundle, predictor_files(arguments.variant)) as folder:
        predictor = (bulk_predictor if arguments.file else Predictor)(folder, arguments.variant)
    if arguments.file:
        written = predict_table(predictor, arguments.file, arguments.text_column, arguments.output)
        resumed = f", {written.n_resumed:,} of them predicted by an earlier run" if written.n_resumed else ""
        print(f"{arguments.output}: {written.n_rows:,} rows{resumed}")
        return
    for text, answer in zip(arguments.texts, predictor.predict(arguments.texts), strict=True):
        probs = "  ".join(f"{label} {prob:.3f}" for label, prob in answer.probs.items())
        print(f"{answer.label}\t{answer.score:.3f}\t{text}\t({probs})")
