"""The verbs from a table to a bundle that answers: preprocess, train, export, evaluate, predict, serve."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sodaops.errors import ConfigError
from sodaops.io import remote

if TYPE_CHECKING:
    from sodaops.config.schema import Config
    from sodaops.evaluation.result import Evaluated
    from sodaops.export.onnx_export import Exported


def train(config: "Config") -> float | None:
    """Trains and evaluates as configured, and prints what came of it; a run whose ``run_dir`` is an address lands there.

    Returns:
        The monitored metric of the kept epoch on val, for sweeps; None after a run that kept nothing.
    """
    from sodaops.io import ranks
    from sodaops.training import launch
    from sodaops.training.upload import download_checkpoint, uploading

    config = download_checkpoint(config)
    if not remote.is_address(config.run_dir):
        return _train(config)
    n_nodes = config.trainer["num_nodes"]
    alone = n_nodes == 1 or ranks.is_distributed(os.environ)  # on this machine, or told its rank
    sends = ranks.is_rank_zero(os.environ) if alone else launch.node_of(os.environ, n_nodes).rank == 0
    with uploading(config, sends) as here:
        score = _train(here)
    if sends:
        print(f"run: {config.run_dir}")
    return score


def _train(config: "Config") -> float | None:
    from sodaops.evaluation.evaluate import evaluate
    from sodaops.export.onnx_export import export
    from sodaops.io import ranks
    from sodaops.search.pruning import trial_of
    from sodaops.training import launch
    from sodaops.training.fit import fit, resolve_last_checkpoint
    from sodaops.training.precision import with_precision
    from sodaops.training.tracking import tracked

    config = resolve_last_checkpoint(config)
    n_processes, n_nodes = launch.processes(config)
    if n_processes * n_nodes > 1 and not ranks.is_distributed(os.environ):
        return launch.launch(config, n_processes, n_nodes)
    config = with_precision(config)
    trial = trial_of(os.environ)
    if not ranks.is_rank_zero(os.environ):
        trial, sys.stdout = None, open(os.devnull, "w")  # noqa: SIM115 - for good: the first process tells
    with tracked(config, trial.as_dict() if trial else None) as tracker:
        trained = fit(config, tracker, trial.callbacks(config.checkpoint.monitor) if trial else ())
        if trained.bundle_dir is None:
            print("nothing kept: no epoch was validated with checkpoints on")
            return None
        info = trained.info
        if config.export.variants:
            exported = export(trained.bundle_dir, config.splits_dir, config.export.variants)
            info = exported.info
            show_export(exported)
        tracker.bundled(trained.bundle_dir, info)
        if config.evaluate.split != "none":
            settings = config.evaluate.model_copy(update={"bundle": None})
            found = evaluate(config.model_copy(update={"evaluate": settings}), trained.bundle_dir)
            tracker.evaluated(found)
            show(found)
    print(f"bundle: {shown_path(trained.bundle_dir)}")
    return trained.score


def show_export(found: "Exported") -> None:
    """Prints what an export wrote and what it did not, with what the gates measured."""
    for variant, gate in found.gates.items():
        passed = variant in found.info.onnx
        print(
            f"{variant:<8}{'written' if passed else 'NOT WRITTEN'}: {gate.describe()}",
            file=sys.stdout if passed else sys.stderr,
        )


def show(found: "Evaluated") -> None:
    """Prints an evaluation as a table."""
    m = found.metrics
    low, high = m["interval_95"]["macro_f1"]["low"], m["interval_95"]["macro_f1"]["high"]
    names = {"majority": "most frequent label", "tfidf": "TF-IDF + logistic regression"}
    print(f"\n{found.split} split, {m['n_rows']:,} rows           macro-F1   95 % interval   accuracy   weighted F1     ECE")
    print(
        f"{'this model':<31}{m['macro_f1']:10.3f}   {low:.3f} to {high:.3f}  {m['accuracy']:8.3f}"
        f"   {m['weighted_f1']:11.3f}   {m['ece']:.3f}"
    )
    for name, values in found.baselines.items():
        print(f"{names[name]:<31}{values['macro_f1']:10.3f}{values['accuracy']:27.3f}   {values['weighted_f1']:11.3f}")
    if not found.same_data:
        print("note: other splits than the bundle was trained with; rows that it learned from may be among these")
    print(f"\nreport: {shown_path(found.report_path)}")


def shown_path(path: str | Path) -> str:
    """A path as a person would type it from here; an address as it is."""
    if remote.is_address(path):
        return str(path)
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else str(path)


def run_train(rest: list[str]) -> None:
    from sodaops.config.compose import from_params, run_hydra

    params, rest = option(rest, "--params")
    if params is not None:
        train(from_params(params, rest))
    else:
        run_hydra(train, rest)


def run_preprocess(rest: list[str]) -> None:
    from sodaops.data.preprocess import describe, preprocess

    config = configured(rest)
    print(describe(preprocess(config.data, config.splits_dir)))
    print(f"splits: {config.splits_dir}")


def run_export(rest: list[str]) -> None:
    from sodaops.bundle.layout import read_info
    from sodaops.export.onnx_export import export

    if not rest or "=" in rest[0] or rest[0].startswith("-"):
        raise ConfigError("the bundle is missing; give it as `sodaops export RUN/bundle`.")
    bundle, *rest = rest
    if remote.is_address(bundle):
        raise ConfigError(f"sodaops export {bundle}: expected a bundle on this machine; bring it here first.")
    config = configured(rest)
    found = export(bundle, config.splits_of(read_info(bundle).data["name"]), config.export.variants)
    show_export(found)
    print(f"bundle: {bundle} ({found.info.bundle_id})")


def run_evaluate(rest: list[str]) -> None:
    from sodaops.evaluation.evaluate import evaluate
    from sodaops.registry.bundles import answering, bundle_at

    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        rest = [f"evaluate.bundle='{rest[0]}'", *rest[1:]]
    config = configured(rest)
    settings = config.evaluate
    if settings.bundle is None:
        show(evaluate(config))
        return
    given = {"bundle": None, "output_dir": settings.output_dir or _evaluation_of(settings.bundle, settings.split)}
    with bundle_at(settings.bundle, answering(settings.variant)) as folder:
        show(evaluate(config.model_copy(update={"evaluate": settings.model_copy(update=given)}), folder))


def _evaluation_of(source: str, split: str) -> str | None:
    """Where the evaluation of a bundle goes unless somebody says; None: evaluate itself knows."""
    from sodaops.evaluation.result import FOLDERS
    from sodaops.registry.registry import address_of

    if address_of(source) != source:
        raise ConfigError(f"evaluate.output_dir is missing; {source} stays as it is, so name a folder or gs://BUCKET/FOLDER.")
    return remote.below(source.rstrip("/").rpartition("/")[0], FOLDERS.get(split, "")) if remote.is_address(source) else None


def run_serve(rest: list[str]) -> None:
    """Says conf/serve in environment variables, and becomes the service, so that nothing of Hydra stays in memory."""
    import importlib.util

    from sodaops.config.schema import ServeConfig

    if importlib.util.find_spec("fastapi") is None:
        raise ConfigError("fastapi is not installed; get it with `pip install 'sodaops[serve]'`.")
    from sodaops.web.settings import as_environment

    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        os.environ["SODAOPS_BUNDLE"], *rest = rest
    if "SODAOPS_BUNDLE" not in os.environ:
        raise ConfigError("the bundle is missing; give it as `sodaops serve RUN/bundle`, or in SODAOPS_BUNDLE.")
    explicit = [override.partition("=")[0].removeprefix("serve.") for override in rest]
    serve = configured(rest).serve if rest else ServeConfig()  # what conf/serve says, as a test holds
    sys.stdout.flush()
    command = [sys.executable, "-m", "sodaops.serving"]
    os.execve(sys.executable, command, {**os.environ, **as_environment(serve, explicit)})


def configured(rest: list[str]) -> "Config":
    """The configuration that a verb's arguments ask for: overrides of conf/, or of ``--params FILE``."""
    from sodaops.config.compose import compose, from_params

    params, rest = option(rest, "--params")
    folder, rest = option(rest, "--config-dir")
    return from_params(params, rest) if params is not None else compose(rest, folder)


def option(rest: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Takes ``flag VALUE`` out of the arguments."""
    parser = argparse.ArgumentParser(prog="sodaops", add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    found, others = parser.parse_known_args(rest)
    return found.value, others


def run_predict(rest: list[str]) -> None:
    from sodaops.inference.predictor import Predictor
    from sodaops.inference.table import bulk_predictor, predict_table
    from sodaops.registry.bundles import answering, bundle_at

    parser = argparse.ArgumentParser(prog="sodaops predict", description="Answer from a bundle.")
    parser.add_argument("bundle", help="RUN/bundle, gs://BUCKET/FOLDER or REGISTRY@champion")
    parser.add_argument("texts", nargs="*", metavar="text")
    parser.add_argument("--file", help="a table, here or at gs://: .csv, .tsv, .jsonl or .parquet")
    parser.add_argument("--text-column", default="text", help="the column with the texts (default: text)")
    parser.add_argument("--output", help="where to write the table with label, score and probabilities added")
    parser.add_argument("--variant", help="float32 or int8 (default: int8 where it passed its gate)")
    asked = parser.parse_args(rest)
    if bool(asked.texts) == bool(asked.file) or bool(asked.file) != bool(asked.output):
        parser.error("give texts, or --file TABLE with --output TABLE")
    with bundle_at(asked.bundle, answering(asked.variant)) as folder:
        predictor = (bulk_predictor if asked.file else Predictor)(folder, asked.variant)
    if asked.file:
        made = predict_table(predictor, asked.file, asked.text_column, asked.output)
        before = f", {made.n_resumed:,} of them answered by an earlier run" if made.n_resumed else ""
        print(f"{asked.output}: {made.n_rows:,} rows{before}")
        return
    for text, answer in zip(asked.texts, predictor.predict(asked.texts), strict=True):
        probs = "  ".join(f"{label} {prob:.3f}" for label, prob in answer.probs.items())
        print(f"{answer.label}\t{answer.score:.3f}\t{text}\t({probs})")
