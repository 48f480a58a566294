"""Where a run is told: run.json in its folder, and a CSV file, TensorBoard, Weights & Biases, several or none."""

import contextlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from sodaops.bundle.layout import BundleInfo
from sodaops.bundle.save import git_commit
from sodaops.config.schema import Config, WandbConfig
from sodaops.errors import ConfigError, PrunedError
from sodaops.evaluation.result import Evaluated
from sodaops.io import ranks, remote, runs, storage
from sodaops.io.run_record import RunRecord
from sodaops.training.wandb_server import check_key, check_reachable

_POINTS = 200  # of a curve


class Tracker:
    """One run's record and loggers, from before the first epoch to after the evaluation.

    Args:
        config: the run's.
        trial: the sweep and trial that it belongs to: study, number, n_seeds.
    """

    def __init__(self, config: Config, trial: Mapping[str, Any] | None = None) -> None:
        if remote.is_address(config.run_dir):
            raise ConfigError(f"run_dir={config.run_dir}: `sodaops train` brings a run there; from Python give a folder.")
        self.run_dir = Path(config.run_dir or "outputs/run")
        self.loggers: list[Logger] = []
        self._config, self._trial = config, trial
        self._record: RunRecord | None = None

    def start(self, manifest: Mapping[str, Any]) -> None:
        """Opens the record and the loggers, each told the whole configuration.

        Args:
            manifest: of the splits that it trains on.

        Raises:
            ConfigError: W&B online without a key or a network.
            StorageError: the run folder cannot be written to.
        """
        if not ranks.is_rank_zero(os.environ):  # of several processes that train together the first one tells
            return
        wandb_id = _id_of(self._config.ckpt_path)
        with storage.writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            make_loggers(self._config, self.run_dir, self.loggers, wandb_id)
        params = self._config.model_dump(mode="json", exclude={"serve", "search", "run_dir"})
        self._record = RunRecord(
            self.run_dir, params, data_fingerprint=manifest["fingerprint"], git_commit=git_commit(),
            trial=self._trial, wandb_id=next((logger.experiment.id for logger in self._of(WandbLogger)), None),
        )  # fmt: skip
        for run in self._wandb_runs():
            _log_files(run, f"splits-{self._config.data.name}", "dataset", self._splits() / "manifest.json", manifest)

    def trained(self, info: BundleInfo, metrics: Mapping[str, float]) -> None:
        """Notes the kept epoch's metrics on val."""
        self._record.update(bundle_id=info.bundle_id)
        self._record.add_metrics("val", metrics)
        for run in self._wandb_runs():  # the bundle's, where W&B has the last epoch's
            run.summary.update({f"val/{name}": value for name, value in metrics.items()})

    def evaluated(self, found: Evaluated) -> None:
        """Notes and logs an evaluation: its metrics everywhere, its pictures and worst errors where they can be shown."""
        values = {key: value for key, value in found.metrics.items() if isinstance(value, int | float)}
        self._record.add_metrics(found.split, values)
        for logger in self.loggers:
            logger.log_metrics({f"{found.split}/{key}": float(value) for key, value in values.items()})
            logger.save()
        for run in self._wandb_runs():
            run.log(_charts(found))

    def bundled(self, bundle_dir: Path, info: BundleInfo) -> None:
        """Notes the finished bundle, and logs it as an artifact."""
        self._record.update(bundle_id=info.bundle_id)
        if self._config.logger.wandb is not None and self._config.logger.wandb.bundle:
            about = {"bundle_id": info.bundle_id, "data": info.data, "labels": info.labels, "metrics": info.metrics}
            for run in self._wandb_runs():
                _log_files(run, f"bundle-{info.data['name']}", "model", bundle_dir, about)

    def end(self, error: BaseException | None) -> None:
        """Closes everything, as failed where it did; nothing leaks into the next run of this process."""
        kinds = {type(None): "finished", PrunedError: "pruned", KeyboardInterrupt: "interrupted"}
        status = next((status for kind, status in kinds.items() if isinstance(error, kind)), "failed")
        well = status in ("finished", "pruned")
        with contextlib.ExitStack() as closing:  # each of them, whatever another one raises
            for run in self._wandb_runs():
                closing.callback(run.finish, exit_code=0 if well else 1)
                closing.callback(run.summary.update, {"status": status})
            for logger in self.loggers:
                closing.callback(logger.finalize, "success" if well else "failed")
            if self._record is not None:
                closing.callback(self._record.finish, status, None if error is None else str(error) or type(error).__name__)

    def _of(self, kind: type[Logger]) -> list[Any]:
        return [logger for logger in self.loggers if isinstance(logger, kind)]

    def _wandb_runs(self) -> list[Any]:
        return [logger.experiment for logger in self._of(WandbLogger)]

    def _splits(self) -> Path:
        return self._config.splits_dir


@contextlib.contextmanager
def tracked(config: Config, trial: Mapping[str, Any] | None = None) -> Iterator[Tracker]:
    """A tracker that is closed whatever happens, and told how it ended."""
    tracker = Tracker(config, trial)
    try:
        yield tracker
    except BaseException as error:
        try:
            tracker.end(error)
        except Exception as closing:  # what ended the run is what is to be told
            print(f"warning: while closing the run: {closing}", file=sys.stderr)
        raise
    tracker.end(None)


def make_loggers(config: Config, run_dir: Path, loggers: list[Logger], wandb_id: str | None) -> None:
    """Adds the loggers that conf/logger asks for, one by one, so that those made before a failure can be closed.

    Raises:
        ConfigError: a package that is missing, or W&B online without a key or a network.
    """
    if config.logger.csv is not None:
        _keep_earlier(run_dir / "metrics")
        loggers.append(CSVLogger(run_dir, name="", version="metrics"))
    if config.logger.tensorboard is not None:
        _need("tensorboard")
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if config.logger.wandb is not None:
        _need("wandb")
        loggers.append(_wandb(config.logger.wandb, run_dir, wandb_id))
    for logger in loggers:
        logger.log_hyperparams(config.model_dump(mode="json"))


def _keep_earlier(folder: Path) -> None:
    """Moves aside what an earlier run in this folder has logged; Lightning would delete it."""
    if folder.is_dir():
        names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"logger: {package} is not installed; get it with `pip install 'sodaops[{package}]'`, or set logger=csv."
        )


def _wandb(config: WandbConfig, run_dir: Path, wandb_id: str | None) -> WandbLogger:
    mode = config.mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    if mode == "online":
        later = "set logger.wandb.mode=offline and send the run later with `wandb sync`"
        check_key("logger.wandb.mode=online", later)
        check_reachable(later)
    import wandb

    logger = WandbLogger(
        project=config.project, name=config.name, group=config.group, tags=config.tags, save_dir=str(run_dir),
        entity=config.entity, mode=mode, id=wandb_id, resume="allow" if wandb_id and mode == "online" else None,
    )  # fmt: skip
    try:
        logger.experiment.id  # noqa: B018, it is made on first use
    except wandb.Error as error:
        raise ConfigError(f"logger.wandb: {str(error).splitlines()[0]}. Mend that, or set logger=csv.") from error
    return logger


def _id_of(ckpt_path: str | None) -> str | None:
    """The W&B run that a resumed one goes on with: its id stands in the record of the checkpoint's run."""
    if ckpt_path is None or not (Path(ckpt_path).parent.parent / runs.RECORD).is_file():
        return None
    return runs.read_run(Path(ckpt_path).parent.parent).fields.get("wandb_id")


def _log_files(run: Any, name: str, kind: str, path: Path, about: Mapping[str, Any]) -> None:
    import wandb

    artifact = wandb.Artifact(name, type=kind, metadata={"about": dict(about)})
    artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
    if kind == "dataset" and not run.offline:
        run.use_artifact(artifact)  # makes it the run's input; W&B refuses that offline
    else:
        run.log_artifact(artifact)


def _charts(found: Evaluated) -> dict[str, Any]:
    import wandb

    matrix, labels = found.confusion.tolist(), found.labels
    counts = wandb.Table(
        columns=["label", "predicted", "rows"],
        data=[[labels[i], labels[j], n] for i, row in enumerate(matrix) for j, n in enumerate(row)],
    )
    fields = {"Actual": "label", "Predicted": "predicted", "nPredictions": "rows"}
    charts: dict[str, Any] = {
        "confusion_matrix": wandb.plot_table("wandb/confusion_matrix/v1", counts, fields, {"title": "Confusion matrix"})
    }
    for name, x, y in (("roc", "fpr", "tpr"), ("precision_recall", "recall", "precision")):
        thinned = {label: slice(None, None, -(-len(of[x]) // _POINTS)) for label, of in found.curves.items()}
        xs = [of[x][thinned[label]].tolist() for label, of in found.curves.items()]
        ys = [of[y][thinned[label]].tolist() for label, of in found.curves.items()]
        if xs:
            charts[name] = wandb.plot.line_series(xs, ys, keys=list(found.curves), title=name.replace("_", " "), xname=x)
    columns = ["text", "label", "predicted", "confidence", "row"]
    charts["errors"] = wandb.Table(columns=columns, data=[[error[key] for key in columns] for error in found.errors])
    return {f"{found.split}/{name}": chart for name, chart in charts.items()}
