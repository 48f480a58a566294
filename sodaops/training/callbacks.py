"""What is kept of a training, and what a person sees of it: a bar on a terminal, a line an epoch anywhere."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sodaops.errors import ConfigError


class Checkpoint(ModelCheckpoint):
    """A checkpoint that a resumed run takes along into its own folder.

    Lightning forgets the best epoch when the folder changes; a run that resumed would then keep the best of its own
    epochs only, and differ from one that never stopped.

    Args:
        folder: where checkpoints go.
        resumed_from: the checkpoint that the run begins with.
        options: of ModelCheckpoint.
    """

    def __init__(self, folder: Path, resumed_from: str | None, **options: Any) -> None:
        super().__init__(folder, enable_version_counter=False, **options)
        self._resumed_from = resumed_from

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the best checkpoint from beside the resumed one, and moves the paths in the state to this folder."""
        best = state_dict["best_model_path"]
        if best and self.monitor is not None:
            kept, mine = Path(self._resumed_from).parent / Path(best).name, Path(self.dirpath) / Path(best).name
            if not kept.is_file():
                raise ConfigError(f"ckpt_path={self._resumed_from}: {kept.name} of that run is gone; it belongs beside it.")
            if kept.resolve() != mine.resolve():
                mine.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(kept, mine)
        state = {key: self._moved(value) if "path" in key else value for key, value in state_dict.items()}
        state["best_k_models"] = {self._moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state, "dirpath": self.dirpath})

    def _moved(self, path: str) -> str:
        return str(Path(self.dirpath) / Path(path).name) if path else path


class Patience(EarlyStopping):
    """Early stopping that a resumed run keeps to: Lightning would train one more epoch of a run that had stopped, and with
    that run's patience in place of the one that is asked for.

    Args:
        resumed_from: the checkpoint of another run folder that the run begins with, which must not have stopped.
        options: of EarlyStopping.
    """

    def __init__(self, resumed_from: str | None, **options: Any) -> None:
        super().__init__(**options)
        self._resumed_from = resumed_from

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if self.wait_count < self.patience:
            return
        if self._resumed_from is not None:
            raise ConfigError(
                f"ckpt_path={self._resumed_from}: that run had stopped early, after {self.wait_count} epochs without a better "
                f"one; set early_stopping.patience above {self.wait_count}, or null, to go on."
            )
        trainer.should_stop = True


class Terminate(Callback):
    """On SIGTERM: a checkpoint after the step in hand, and an end. In a validation, and after an epoch's last batch, it
    lets the epoch be finished and kept first.

    Lightning ends a validation in its midst, whose metrics a resumed run would then count in part, and has processes talk
    to each other within the signal's handler; so this takes the signal over while batches are trained, unless somebody
    else, such as submitit, had taken it.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._asked = False
        main = threading.current_thread() is threading.main_thread()  # no other may take signals
        self._free = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._free:  # Lightning gives the handler before back
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _all_asked(self, trainer: L.Trainer) -> bool:
        if trainer.world_size == 1:
            return self._asked
        asked = torch.tensor(float(self._asked), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(asked, reduce_op="max") > 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # a checkpoint holds no gradients
        if stepped and not trainer.is_last_batch and self._all_asked(trainer):
            trainer.save_checkpoint(self._path)
            raise SIGTERMException

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._all_asked(trainer):
            raise SIGTERMException

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._all_asked(trainer):
            raise SIGTERMException


class EpochLines(Callback):
    """Prints a line after each validation, so that a log without a terminal tells the story too."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start_s = time.perf_counter()

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

    def on_train_epoch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        super().on_train_epoch_start(trainer, *arguments)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}")

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)


def make_profiler(name: str | None, run_dir: Path) -> Profiler | str | None:
    """Lightning's profiler of this name, its whole report in the run folder."""
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}
    return kinds[name](dirpath=run_dir, filename="profile") if name in kinds else name


def profile_table(durations_s: Mapping[str, Sequence[float]], n_rows: int = 12) -> str:
    """The parts of a training that took longest.

    Args:
        durations_s: part -> seconds of each call; parts may hold other parts.
        n_rows: parts to show.

    >>> print(profile_table({"run_training_epoch": [4.0], "[Strategy]Single.backward": [1.0, 2.0]}))
    part                                       seconds   share    calls     ms each
    run_training_epoch                             4.0    100%        1    4000.000
    backward                                       3.0     75%        2    1500.000
    """
    rows = sorted(((sum(spent), len(spent), part) for part, spent in durations_s.items() if spent), reverse=True)
    whole = max((seconds for seconds, _, part in rows if part == "run_training_epoch"), default=rows[0][0])
    lines = [f"{'part':<40}{'seconds':>10}{'share':>8}{'calls':>9}{'ms each':>12}"]
    for seconds, calls, part in rows[:n_rows]:
        name = part.split("]")[-1].split(".")[-1] if part.startswith("[") else part
        lines.append(f"{name:<40}{seconds:>10.1f}{seconds / whole:>8.0%}{calls:>9}{1000 * seconds / calls:>12.3f}")
    return "\n".join(lines)


def progress(wanted: bool | None) -> list[Callback]:
    """The bar where there is a terminal or where it is asked for, and the lines; neither when it is refused."""
    if wanted is False:
        return []
    return [Bar(), EpochLines()] if wanted or sys.stderr.isatty() else [EpochLines()]


class Compile(Callback):
    """Compiles the model with torch.compile, for any length of batch: ``+callbacks.compile._target_=`` this class.

    Off by default, and docs/serving.md has what it measured. Checkpoints and the bundle are the same with it.

    Args:
        backend: torch.compile's.

    Raises:
        ConfigError: a training on the CPU without a C++ compiler.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Asks for it; the first batches then take the time."""
        compilers = [os.environ.get("CXX", "g++"), "clang++", "cl"]
        if trainer.strategy.root_device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise ConfigError("callbacks: torch.compile needs a C++ compiler here (g++); install one, or leave it out.")
        module.model.compile(dynamic=True, backend=self._backend)


class Trace(Callback):
    """Records what torch runs in a few training batches: RUN/trace.json for Perfetto or chrome://tracing, and a table.

    Args:
        first: batches to let pass, which warm up.
        n_batches: to record.
    """

    def __init__(self, first: int = 5, n_batches: int = 3) -> None:
        self._first, self._n_batches = first, n_batches
        self._profile: torch.profiler.profile | None = None
        self._n_recorded = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins; in an epoch of fewer batches sooner."""
        first = max(0, min(self._first, int(trainer.num_training_batches) - self._n_batches))
        if trainer.current_epoch == 0 and batch_idx == first and trainer.is_global_zero:
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends, writes and prints."""
        if self._profile is not None:
            self._n_recorded += 1
            if self._n_recorded == self._n_batches:
                self._tell(trainer, self._profile)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The same, where the training ended first."""
        if self._profile is not None and self._n_recorded:
            self._tell(trainer, self._profile)

    def _tell(self, trainer: L.Trainer, profile: torch.profiler.profile) -> None:
        profile.stop()
        path = Path(trainer.default_root_dir) / "trace.json"
        profile.export_chrome_trace(str(path))
        spent = sorted(profile.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
        whole = sum(event.self_cpu_time_total for event in spent)
        lines = [f"{'operator':<40}{'ms a batch':>12}{'share':>8}{'calls':>9}"]
        for event in spent[:12]:
            each = event.self_cpu_time_total / 1000 / self._n_recorded
            lines.append(f"{event.key[:39]:<40}{each:>12.1f}{event.self_cpu_time_total / whole:>8.0%}{event.count:>9}")
        print("\n".join([*lines, f"trace: {os.path.relpath(path)}"]))
        self._profile = None
