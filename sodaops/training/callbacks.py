"""What a person sees while it trains: a bar on a terminal, a line an epoch anywhere."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class EpochLines(Callback):
    """Prints a line after each validation, so that a log without a terminal tells the story too."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start_s = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = {
            "train loss": metrics.get("train/loss_epoch"), "val loss": metrics.get("val/loss"),
            "val accuracy": metrics.get("val/accuracy"), "val macro-F1": metrics.get("val/macro_f1"),
        }  # fmt: skip
        if trainer.is_global_zero:
            text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if value is not None)
            of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
            Tqdm.write(f"epoch {trainer.current_epoch + 1}{of}  {text}  {time.perf_counter() - self._start_s:.0f} s")


class Bar(TQDMProgressBar):
    """Lightning's bar for the training batches alone, without its run number."""

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, module)
        return {"loss": shown["train/loss_step"]} if "train/loss_step" in shown else {}

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)


def progress(wanted: bool | None) -> list[Callback]:
    """The bar where there is a terminal or where it is asked for, and the lines; neither when it is refused."""
    if wanted is False:
        return []
    return [Bar(), EpochLines()] if wanted or sys.stderr.isatty() else [EpochLines()]
