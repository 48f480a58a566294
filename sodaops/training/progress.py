"""Lightning callbacks that show how a training goes: a line for each epoch, and a bar, or lines where there is no terminal."""

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from sodaops.io import progress

log = logging.getLogger(__name__)
_SHOWN = {"val/loss", "val/accuracy", "val/macro_f1"}


class EpochLines(Callback):
    """Logs a line with the metrics of each epoch."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start_s = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start_s = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values = {
            "train loss": metrics.get("train/loss_epoch"), "val loss": metrics.get("val/loss"),
            "val accuracy": metrics.get("val/accuracy"), "val macro-F1": metrics.get("val/macro_f1"),
            **{name.replace("/", " "): metrics[name] for name in metrics.keys() - _SHOWN if name.startswith("val/")},
        }  # fmt: skip
        if trainer.is_global_zero:
            text = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)
            seconds = time.perf_counter() - self._start_s
            log.info("epoch %d%s  %s  %.0f s", trainer.current_epoch + 1, _of_epochs(trainer), text, seconds)


class StepLines(Callback):
    """Logs a line every 30 seconds of training, for logs without a terminal: step, loss, speed and the time that is left."""

    def __init__(self) -> None:
        self._next_s = self._start_s = 0.0
        self._start = 0.0  # what was done before, in epochs
        self._n_examples = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start_s = time.monotonic()
        self._next_s = self._start_s + progress.INTERVAL_S
        self._start = trainer.current_epoch + trainer.fit_loop.epoch_loop.batch_progress.current.ready / _n_batches(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._n_examples += len(batch["targets"])
        now_s = time.monotonic()
        if now_s < self._next_s or not trainer.is_global_zero:
            return
        self._next_s, seconds = now_s + progress.INTERVAL_S, now_s - self._start_s
        n_batches, end = _n_batches(trainer), _n_epochs(trainer)
        done = trainer.current_epoch + (batch_idx + 1) / n_batches
        left = seconds * (end - done) / (done - self._start)
        loss = trainer.callback_metrics.get("train/loss_step", float("nan"))
        log.info(
            "epoch %d%s  step %d/%d  loss %.4f  %.0f examples/s%s", trainer.current_epoch + 1, _of_epochs(trainer),
            batch_idx + 1, n_batches, float(loss), self._n_examples * trainer.world_size / seconds,
            f"  {progress.time_left(left)} left" if left < float("inf") else "",
        )  # fmt: skip


def _n_batches(trainer: L.Trainer) -> float:
    return max(1.0, trainer.num_training_batches)


def _n_epochs(trainer: L.Trainer) -> float:
    """The number of epochs at most, with a fraction where max_steps ends within one."""
    by_epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else float("inf")
    by_steps = trainer.max_steps * trainer.accumulate_grad_batches / _n_batches(trainer)
    return min(by_epochs, by_steps) if trainer.max_steps >= 0 else by_epochs


def _of_epochs(trainer: L.Trainer) -> str:
    return f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""


class Bar(TQDMProgressBar):
    """Lightning's progress bar for training batches, without a bar for validation and without the run number."""

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, module)
        return {"loss": metrics["train/loss_step"]} if "train/loss_step" in metrics else {}

    def on_train_epoch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        super().on_train_epoch_start(trainer, *arguments)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}")

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)


def progress_callbacks(wanted: bool | None) -> list[Callback]:
    """The progress callbacks: epoch lines, and a bar on a terminal or where ``wanted`` is true, else lines between them.

    None where ``wanted`` is false.
    """
    if wanted is False:
        return []
    return [Bar() if wanted or progress.has_bars() else StepLines(), EpochLines()]
