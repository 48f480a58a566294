"""Tracks a run in run.json and in the loggers of conf/logger: CSV, TensorBoard, Weights & Biases, and the user's."""

import contextlib
import importlib.util
import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from traceback import walk_tb
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from sodaops.bundle.layout import BundleInfo
from sodaops.bundle.save import git_commit
from sodaops.config.extensions import accepts, build, load
from sodaops.config.schema import Config, WandbConfig
from sodaops.errors import ConfigError, PrunedError, reason_of
from sodaops.evaluation.result import FOLDERS, Evaluated
from sodaops.io import ranks, remote, runs, storage
from sodaops.io.run_record import RunRecord
from sodaops.training.resume import run_dir_of
from sodaops.training.wandb_server import check_key, check_reachable

log = logging.getLogger(__name__)
_MAX_POINTS = 200  # of a curve in W&B


class Tracker:
    """The run.json and the loggers of a run, from its start to the end of its evaluation.

    Args:
        config: of the run.
        trial: of a sweep: study, number, n_seeds.
    """

    def __init__(self, config: Config, trial: Mapping[str, Any] | None = None) -> None:
        if remote.is_address(config.run_dir):
            raise ConfigError(f"run_dir={config.run_dir}: only `sodaops train` uploads a run; from Python give a local folder.")
        self.run_dir = run_dir_of(config)
        self.loggers: list[Logger] = []
        self._config, self._trial = config, trial
        self._record: RunRecord | None = None

    def start(self, config: Config, manifest: Mapping[str, Any]) -> None:
        """Creates run.json and the loggers, and logs the configuration to each.

        Args:
            config: of the run, with numbers in place of ``auto``.
            manifest: of the splits.

        Raises:
            ConfigError: W&B online without a key or a network.
            StorageError: the run folder cannot be written to.
        """
        if not ranks.is_rank_zero(os.environ):
            return
        self._config = config
        wandb_id = _wandb_id_of(self._config.ckpt_path)
        with storage.writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            make_loggers(self._config, self.run_dir, self.loggers, wandb_id)
        params = self._config.model_dump(mode="json", exclude={"serve", "search", "run_dir"})
        self._record = RunRecord(
            self.run_dir, params, data_fingerprint=manifest["fingerprint"], git_commit=git_commit(),
            trial=self._trial, wandb_id=next((logger.experiment.id for logger in self._of(WandbLogger)), None),
        )  # fmt: skip
        for run in self._wandb_runs():
            _log_files(run, f"splits-{self._config.data.name}", "dataset", self._config.splits_dir / "manifest.json", manifest)

    def trained(self, info: BundleInfo, metrics: Mapping[str, float]) -> None:
        """Records the metrics of the best epoch on val."""
        self._record.update(bundle_id=info.bundle_id)
        self._record.add_metrics("val", metrics)
        for run in self._wandb_runs():  # W&B's summary has those of the last epoch
            run.summary.update({f"val/{name}": value for name, value in metrics.items()})

    def evaluated(self, evaluation: Evaluated) -> None:
        """Records the metrics of an evaluation in run.json and all loggers, and its charts and worst errors in W&B."""
        values = {key: value for key, value in evaluation.metrics.items() if isinstance(value, int | float)}
        self._record.add_metrics(evaluation.split, values)
        for logger in self.loggers:
            logger.log_metrics({f"{evaluation.split}/{key}": float(value) for key, value in values.items()})
            logger.save()
        for run in self._wandb_runs():
            run.log(_charts(evaluation))
        if not remote.is_address(evaluation.output_dir):
            self._log_artifacts(evaluation.output_dir, FOLDERS[evaluation.split])

    def bundled(self, bundle_dir: Path, info: BundleInfo) -> None:
        """Records the id of the finished bundle, and logs it as an artifact; to W&B if ``logger.wandb.bundle`` is set."""
        self._record.update(bundle_id=info.bundle_id)
        if self._config.logger.wandb is not None and self._config.logger.wandb.bundle:
            metadata = {"bundle_id": info.bundle_id, "data": info.data, "labels": info.labels, "metrics": info.metrics}
            for run in self._wandb_runs():
                _log_files(run, f"bundle-{info.data['name']}", "model", bundle_dir, metadata)
        self._log_artifacts(bundle_dir, "bundle")

    def end(self, error: BaseException | None) -> None:
        """Closes run.json and all loggers.

        Args:
            error: that ended the run; None: it finished.
        """
        kinds = {type(None): "finished", PrunedError: "pruned", KeyboardInterrupt: "interrupted"}
        status = next((status for kind, status in kinds.items() if isinstance(error, kind)), "failed")
        succeeded = status in ("finished", "pruned")
        with contextlib.ExitStack() as closing:  # closes each of them, even if another one raises
            for run in self._wandb_runs():
                closing.callback(run.finish, exit_code=0 if succeeded else 1)
                closing.callback(run.summary.update, {"status": status})
            for logger in self.loggers:
                closing.callback(logger.finalize, "success" if succeeded else "failed")
            if self._record is not None:
                closing.callback(self._record.finish, status, None if error is None else str(error) or type(error).__name__)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raises an error from a method of a user's logger, or below one, as a ConfigError with the logger's key."""
        try:
            yield
        except Exception as error:
            for origin in filter(None, (error, error.__cause__)):  # a StorageError may have been an OSError of the logger
                if (section := self._section_of(origin)) is not None:
                    raise _logger_error(*section, origin) from error
            raise

    def _section_of(self, error: BaseException) -> tuple[str, Mapping[str, Any]] | None:
        """Name and section of the user's logger that an error passed through."""
        settings = self._config.logger
        n_built_in = sum(getattr(settings, name) is not None for name in type(settings).model_fields)
        callers = {id(frame.f_locals.get("self")) for frame, _ in walk_tb(error.__traceback__)}
        sections = zip((settings.model_extra or {}).items(), self.loggers[n_built_in:], strict=False)
        return next((section for section, logger in sections if id(logger) in callers), None)

    def _of(self, kind: type[Logger]) -> list[Any]:
        return [logger for logger in self.loggers if isinstance(logger, kind)]

    def _wandb_runs(self) -> list[Any]:
        return [logger.experiment for logger in self._of(WandbLogger)]

    def _log_artifacts(self, folder: str | Path, name: str) -> None:
        """Copies a folder to the loggers that have a method ``log_artifacts``, or whose client has, as MLflow's does."""
        for logger in self.loggers:
            owners = (logger, getattr(logger, "experiment", None))
            method = next((owner.log_artifacts for owner in owners if hasattr(owner, "log_artifacts")), None)
            if method is not None:
                run = {"run_id": logger.run_id} if accepts(method, "run_id") else {}
                method(local_dir=str(folder), artifact_path=name, **run)


@contextlib.contextmanager
def tracked(config: Config, trial: Mapping[str, Any] | None = None) -> Iterator[Tracker]:
    """A tracker that is closed at the end of the block, also after an error.

    Raises:
        ConfigError: another training is running in the run folder, or a logger of the user's raised an error.
    """
    tracker = Tracker(config, trial)
    with _exclusive(tracker.run_dir) if ranks.is_rank_zero(os.environ) else contextlib.nullcontext():
        try:
            with tracker.explained():
                yield tracker
        except BaseException as error:
            try:
                tracker.end(error)
            except Exception as failure:  # the error that ended the run is the one to raise
                log.warning("while closing the run: %s", failure)
            raise
        with tracker.explained():
            tracker.end(None)


@contextlib.contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """Locks the run folder. One that it makes is removed if it is empty at the end."""
    created, lock = not run_dir.exists(), FileLock(run_dir / ".lock", timeout=0)
    with storage.writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"run_dir={run_dir}: another training is running in this folder; wait until it ends, or set another run_dir."
            ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # another process that waits for it notices that it is gone
        lock.release()
        if created and not any(run_dir.iterdir()):
            run_dir.rmdir()


def check_loggers(config: Config) -> None:
    """Checks the loggers of conf/logger.

    Raises:
        ConfigError: a package is missing, or W&B is online without a key or a network.
    """
    for package in ("tensorboard", "wandb"):
        if getattr(config.logger, package) is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logger: {package} is not installed; get it with `pip install 'sodaops[{package}]'`, or set logger=csv."
            )
    if config.logger.wandb is not None and _wandb_mode(config.logger.wandb) == "online":
        offline = "set logger.wandb.mode=offline and upload the run later with `wandb sync`"
        check_key("logger.wandb.mode=online", offline)
        check_reachable(offline)


def make_loggers(config: Config, run_dir: Path, loggers: list[Logger], wandb_id: str | None) -> None:
    """Adds the loggers of conf/logger to ``loggers``, one by one, so that those made before a failure can be closed.

    Raises:
        ConfigError: W&B refuses the run, or a logger of the user's cannot be made or refuses the configuration.
    """
    if config.logger.csv is not None:
        _rename_earlier(run_dir / "metrics")
        loggers.append(CSVLogger(run_dir, name="", version="metrics"))
    if config.logger.tensorboard is not None:
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if config.logger.wandb is not None:
        loggers.append(_wandb(config.logger.wandb, run_dir, wandb_id))
    params = config.model_dump(mode="json")
    for logger in loggers:
        logger.log_hyperparams(params)
    for name, section in (config.logger.model_extra or {}).items():
        key, target = f"logger.{name}", section["_target_"]
        places = accepts(load(f"{key}._target_", target), "save_dir") and "save_dir" not in section
        loggers.append(build(key, section, kind=Logger, **({"save_dir": str(run_dir / name)} if places else {})))
        try:
            loggers[-1].log_hyperparams(params)
        except Exception as error:  # a user's class, or its server, may raise anything
            raise _logger_error(name, section, error) from error


def _logger_error(name: str, section: Mapping[str, Any], error: BaseException) -> ConfigError:
    return ConfigError(f"logger.{name}: {section['_target_']} raised {type(error).__name__}: {reason_of(error)}")


def _rename_earlier(folder: Path) -> None:
    """Renames the metrics of an earlier run in this folder to metrics.1, metrics.2, …; Lightning would delete them."""
    if folder.is_dir():
        names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))


def _wandb_mode(config: WandbConfig) -> str:
    return config.mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def _wandb(config: WandbConfig, run_dir: Path, wandb_id: str | None) -> WandbLogger:
    mode = _wandb_mode(config)
    import wandb

    logger = WandbLogger(
        project=config.project, name=config.name, group=config.group, tags=config.tags, save_dir=str(run_dir),
        entity=config.entity, mode=mode, id=wandb_id, resume="allow" if wandb_id and mode == "online" else None,
    )  # fmt: skip
    try:
        logger.experiment.id  # noqa: B018 - the run is created on first access
    except wandb.Error as error:
        raise ConfigError(f"logger.wandb: {str(error).splitlines()[0]}. Fix that, or set logger=csv.") from error
    return logger


def _wandb_id_of(ckpt_path: str | None) -> str | None:
    """The id of the W&B run that a resumed run continues, from the run.json of the checkpoint's run."""
    if ckpt_path is None or not (Path(ckpt_path).parent.parent / runs.RECORD).is_file():
        return None
    return runs.read_run(Path(ckpt_path).parent.parent).fields.get("wandb_id")


def _log_files(run: Any, name: str, kind: str, path: Path, metadata: Mapping[str, Any]) -> None:
    import wandb

    artifact = wandb.Artifact(name, type=kind, metadata={"about": dict(metadata)})
    artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
    if kind == "dataset" and not run.offline:
        run.use_artifact(artifact)  # makes it the run's input; W&B refuses that offline
    else:
        run.log_artifact(artifact)


def _charts(evaluation: Evaluated) -> dict[str, Any]:
    """Confusion matrix, curves and worst errors as W&B charts and tables."""
    import wandb

    charts: dict[str, Any] = {}
    if "confusion" in evaluation.charts:
        columns, fields = ["label", "predicted", "rows"], {"Actual": "label", "Predicted": "predicted", "nPredictions": "rows"}
        matrix, labels = evaluation.charts["confusion"].tolist(), evaluation.labels
        counts = [[labels[i], labels[j], n] for i, row in enumerate(matrix) for j, n in enumerate(row)]
        table = wandb.Table(columns=columns, data=counts)
        charts["confusion_matrix"] = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "Confusion matrix"})
    curves = evaluation.charts.get("curves", {})
    for name, x, y in (("roc", "fpr", "tpr"), ("precision_recall", "recall", "precision")):
        # Every k-th point of each label's curve, so that at most _MAX_POINTS remain.
        steps = {label: -(-len(curve[x]) // _MAX_POINTS) for label, curve in curves.items()}
        xs = [curve[x][:: steps[label]].tolist() for label, curve in curves.items()]
        ys = [curve[y][:: steps[label]].tolist() for label, curve in curves.items()]
        if xs:
            charts[name] = wandb.plot.line_series(xs, ys, keys=list(curves), title=name.replace("_", " "), xname=x)
    if evaluation.errors:
        columns = [key for key in evaluation.errors[0] if key != "votes"]
        charts["errors"] = wandb.Table(columns=columns, data=[[error[key] for key in columns] for error in evaluation.errors])
    return {f"{evaluation.split}/{name}": chart for name, chart in charts.items()}
