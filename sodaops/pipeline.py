"""The pipeline's stages as functions, called by the Python API and the command line: preprocess, train, export, evaluate."""

import contextlib
import dataclasses
import html
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sodaops.config.schema import Config
from sodaops.errors import BundleError, ConfigError
from sodaops.io import ranks, remote
from sodaops.io.runs import read_run

if TYPE_CHECKING:
    from sodaops.bundle.layout import BundleInfo
    from sodaops.evaluation.result import Evaluated
    from sodaops.export.onnx_export import Exported

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a training produced; parts that were not requested are None. Jupyter shows the report.

    In distributed training, the launching process and all ranks but the first have at most ``run_dir`` and ``score``.

    >>> sorted(Run("outputs/first").metrics)  # an earlier run
    ['test', 'val']
    """

    run_dir: str  # a local folder or a remote address
    score: float | None = None  # the monitored metric on val, at the epoch that was kept
    bundle_dir: Path | None = None
    info: "BundleInfo | None" = None
    exported: "Exported | None" = None
    evaluated: "Evaluated | None" = None

    @property
    def bundle(self) -> str:
        """The folder with all that prediction needs."""
        return remote.join(self.run_dir, "bundle")

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Split -> metric -> value: of the best epoch on val, and of the evaluation."""
        return read_run(self.run_dir).fields["metrics"]

    @property
    def report(self) -> str | None:
        """The HTML page of the evaluation."""
        from sodaops.evaluation.result import FOLDERS, REPORT

        settings = read_run(self.run_dir).fields["params"]["evaluate"]
        folder = settings["output_dir"] or remote.join(self.run_dir, FOLDERS.get(settings["split"], ""))
        return remote.join(folder, REPORT) if settings["split"] in self.metrics else None

    def _repr_html_(self) -> str | None:
        page = html.escape(remote.read_if_exists(self.report).decode()) if self.report else None
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>' if page else None


def prepare(config: Config) -> dict[str, Any]:
    """Writes the Parquet splits of ``config.data``.

    Returns:
        The manifest of the splits.

    Raises:
        DataError: a table, column or label is missing or not valid.
    """
    from sodaops.data.preprocess import preprocess
    from sodaops.tasks.make import make_task

    return preprocess(config.data, config.splits_dir, task=make_task(config.task))


def train(config: Config) -> Run:
    """Preprocesses if needed, trains, writes the bundle, exports and evaluates it.

    A run with a ``run_dir`` at gs:// is written to a local folder and uploaded during the training.

    Raises:
        SodaOpsError: a problem that the user can fix.
        KeyboardInterrupt: the user stopped the training; the message says how to resume.
    """
    from sodaops.training import launch
    from sodaops.training.preflight import check_targets
    from sodaops.training.upload import download_checkpoint, uploading

    check_targets(config)
    config = download_checkpoint(config)
    if not remote.is_address(config.run_dir):
        return _train_locally(config)
    address, n_nodes = config.run_dir, config.trainer["num_nodes"]
    knows_rank = n_nodes == 1 or ranks.is_distributed(os.environ)
    uploads = ranks.is_rank_zero(os.environ) if knows_rank else launch.node_of(os.environ, n_nodes).rank == 0
    with uploading(config, uploads) as local:
        result = _train_locally(local)
    if uploads:
        log.info("run: %s", address)
    return result


def _train_locally(config: Config) -> Run:
    from sodaops.evaluation.evaluate import evaluate_split
    from sodaops.search.context import trial_of
    from sodaops.search.pruning import trial_callbacks
    from sodaops.training import launch
    from sodaops.training.fit import fit
    from sodaops.training.precision import with_precision
    from sodaops.training.resume import resolve_last_checkpoint
    from sodaops.training.tracking import tracked

    config = resolve_last_checkpoint(config)
    n_processes, n_nodes = launch.processes(config)
    if n_processes * n_nodes > 1 and not ranks.is_distributed(os.environ):
        return Run(config.run_dir, launch.launch(config, n_processes, n_nodes))
    config = with_precision(config)
    trial = trial_of(os.environ) if ranks.is_rank_zero(os.environ) else None
    with _teacher_folders(config) as teachers, tracked(config, trial.as_dict() if trial else None) as tracker:
        trained = fit(config, tracker, trial_callbacks(trial, config.checkpoint.monitor), teachers)
        if trained.bundle_dir is None:
            if ranks.is_rank_zero(os.environ):
                log.warning("no bundle was written, because no epoch was validated with checkpoints enabled")
            return Run(config.run_dir)
        evaluated = None
        if config.evaluate.split != "none":
            settings = config.evaluate.model_copy(update={"bundle": None})
            evaluated = evaluate_split(config.model_copy(update={"evaluate": settings}), trained.bundle_dir, teachers)
            tracker.evaluated(evaluated)
    return Run(config.run_dir, trained.score, trained.bundle_dir, trained.info, trained.exported, evaluated)


@contextlib.contextmanager
def _teacher_folders(config: Config) -> Iterator[list[Path]]:
    """Local copies of the bundles of ``teacher``, checked as far as is possible without the splits."""
    if not config.teachers:
        yield []
        return
    from sodaops.bundle import layout
    from sodaops.registry.bundles import bundle_at
    from sodaops.training.teacher import check_teacher

    def files(info: "BundleInfo") -> list[str]:
        models = [layout.ONNX[variant] for variant in {"float32", config.evaluate.variant}]
        return [name for name in (layout.TOKENIZER, layout.CONFIG, layout.DATA, layout.DRIFT, *models) if name in info.files]

    with contextlib.ExitStack() as stack:
        folders = []
        for name in config.teachers:
            try:
                folders.append(stack.enter_context(bundle_at(name, files)))
                check_teacher(config, name, folders[-1])
            except BundleError as error:
                raise BundleError(f"teacher={name}: {error}") from error
        yield folders


def export_bundle(config: Config, bundle: str | Path) -> "Exported":
    """Adds the ONNX variants of ``config.export.variants`` to a local bundle, after checks on its training's splits.

    Thresholds for ``evaluate.target_accuracy`` and the like are chosen too, by default for the targets that it had before.

    Raises:
        ConfigError: the bundle is remote, the splits are not those of its training, or no threshold reaches a target.
        ModelError: the outputs of the ONNX graph differ from torch's.
    """
    from sodaops.bundle.layout import read_info, task_of
    from sodaops.data.preprocess import read_manifest
    from sodaops.export.abstention import add_promises, check_promises, promises_of
    from sodaops.export.onnx_export import export_onnx
    from sodaops.registry.bundles import local_bundle

    if remote.is_address(str(bundle)):
        raise ConfigError(f"sodaops export {bundle}: export needs a local bundle; download it first.")
    bundle = local_bundle(bundle)
    info = read_info(bundle)
    splits_dir, promises = config.splits_of(info.data["name"]), promises_of(config.evaluate, info)
    if promises:
        check_promises(promises, task_of(bundle, info), read_manifest(splits_dir))
    exported = export_onnx(bundle, splits_dir, config.export.variants)
    return dataclasses.replace(exported, info=add_promises(bundle, splits_dir, promises))


def evaluate(config: Config) -> "Evaluated":
    """Evaluates ``config.evaluate.bundle``, or the run's own bundle, on ``config.evaluate.split``; writes the results.

    Raises:
        BundleError, ConfigError, DataError, RegistryError, StorageError: a problem that the user can fix.
    """
    from sodaops.bundle.layout import CONFIG, DATA
    from sodaops.evaluation.evaluate import evaluate_split
    from sodaops.registry.bundles import bundle_at, predictor_files

    settings = config.evaluate
    if settings.bundle is None:
        return evaluate_split(config)
    output_dir = settings.output_dir or _output_dir_of(settings.bundle, settings.split)
    settings = settings.model_copy(update={"bundle": None, "output_dir": output_dir})
    files = predictor_files(settings.variant)
    with (
        bundle_at(config.evaluate.bundle, lambda info: [*files(info), CONFIG, DATA]) as folder,
        _teacher_folders(config) as teachers,
    ):
        return evaluate_split(config.model_copy(update={"evaluate": settings}), folder, teachers)


def _output_dir_of(bundle: str, split: str) -> str | None:
    """The default folder for the evaluation of a remote bundle; None for a local one, whose folder evaluate chooses."""
    from sodaops.evaluation.result import FOLDERS
    from sodaops.registry.registry import address_of

    if address_of(bundle) != bundle:
        raise ConfigError(f"evaluate.output_dir is missing; {bundle} is in a registry, so name a folder or gs://BUCKET/FOLDER.")
    return remote.join(bundle.rstrip("/").rpartition("/")[0], FOLDERS.get(split, "")) if remote.is_address(bundle) else None
