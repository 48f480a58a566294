"""Lightning callbacks: checkpoints, early stopping, SIGTERM, compilation and profiles."""

import logging
import os
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sodaops.errors import ConfigError

log = logging.getLogger(__name__)


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint that keeps the best epoch when a run resumes in another folder.

    Lightning forgets the best epoch when the folder changes. A resumed run would then choose among its own epochs only, and
    differ from a run without interruption.

    Args:
        folder: for the checkpoints.
        resumed_from: the checkpoint that the run resumes from.
        options: of ModelCheckpoint.
    """

    def __init__(self, folder: Path, resumed_from: str | None, **options: Any) -> None:
        super().__init__(folder, enable_version_counter=False, **options)
        self._resumed_from = resumed_from

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the best checkpoint from the folder of the resumed one, and replaces that folder in the saved paths."""
        best = state_dict["best_model_path"]
        if best and self.monitor is not None:
            source, copy = Path(self._resumed_from).parent / Path(best).name, Path(self.dirpath) / Path(best).name
            if not source.is_file():
                raise ConfigError(f"ckpt_path={self._resumed_from}: {source.name} is missing in the same folder; restore it.")
            if source.resolve() != copy.resolve():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
        state = {key: self._moved(value) if "path" in key else value for key, value in state_dict.items()}
        state["best_k_models"] = {self._moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state, "dirpath": self.dirpath})

    def _moved(self, path: str) -> str:
        return str(Path(self.dirpath) / Path(path).name) if path else path


class Patience(EarlyStopping):
    """EarlyStopping that works in resumed runs.

    Lightning would train one more epoch of a run that had stopped early, and use the patience of the checkpoint instead of
    the configured one.

    Args:
        resumed_from: the checkpoint of another run, which must not have stopped early; None: a run that resumes in its own
            folder, and stays as it is if it had stopped.
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
                f"ckpt_path={self._resumed_from}: that run stopped early, after {self.wait_count} epochs without improvement; "
                f"set early_stopping.patience above {self.wait_count}, or null, to train further."
            )
        trainer.should_stop = True


class Terminate(Callback):
    """Writes a checkpoint on SIGTERM, after the current optimizer step, and ends the training.

    During a validation, and after the last batch of an epoch, the epoch is finished and saved first.

    Lightning's own handler would end a validation halfway, so that a resumed run counts part of its metrics, and would
    communicate between processes within the handler. This callback replaces it during training, unless something else, such
    as submitit, handles SIGTERM already.

    Args:
        path: for the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._received = False
        in_main_thread = threading.current_thread() is threading.main_thread()  # only there handlers can be set
        self._handles = in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._handles:  # Lightning restores the previous handler at the end
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _any_received(self, trainer: L.Trainer) -> bool:
        """Whether any of the processes received SIGTERM."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(float(self._received), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(received, reduce_op="max") > 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # checkpoints hold no accumulated gradients
        if stepped and not trainer.is_last_batch and self._any_received(trainer):
            trainer.save_checkpoint(self._path)
            raise SIGTERMException

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._any_received(trainer):
            raise SIGTERMException

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._any_received(trainer):
            raise SIGTERMException


def make_profiler(name: str | None, run_dir: Path) -> Profiler | str | None:
    """The profiler of this name; ``simple`` and ``advanced`` write their whole report into the run folder."""
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}
    return kinds[name](dirpath=run_dir, filename="profile") if name in kinds else name


def profile_table(durations_s: Mapping[str, Sequence[float]], n_rows: int = 12) -> str:
    """A table of the parts of a training that took longest.

    Args:
        durations_s: part -> seconds of each call; parts may contain other parts.
        n_rows: the number of parts to show.

    >>> print(profile_table({"run_training_epoch": [4.0], "[Strategy]Single.backward": [1.0, 2.0]}))
    part                                       seconds   share    calls     ms each
    run_training_epoch                             4.0    100%        1    4000.000
    backward                                       3.0     75%        2    1500.000
    """
    rows = sorted(((sum(calls), len(calls), part) for part, calls in durations_s.items() if calls), reverse=True)
    total = next((seconds for seconds, _, part in rows if part == "run_training_epoch"), rows[0][0])
    lines = [f"{'part':<40}{'seconds':>10}{'share':>8}{'calls':>9}{'ms each':>12}"]
    for seconds, n_calls, part in rows[:n_rows]:
        name = part.split("]")[-1].split(".")[-1] if part.startswith("[") else part
        lines.append(f"{name:<40}{seconds:>10.1f}{seconds / total:>8.0%}{n_calls:>9}{1000 * seconds / n_calls:>12.3f}")
    return "\n".join(lines)


class Compile(Callback):
    """Compiles the model with torch.compile, for batches of any length.

    Turn it on with ``+callbacks.compile._target_=sodaops.training.callbacks.Compile``. Checkpoints and bundle do not change.

    Args:
        backend: torch.compile's.

    Raises:
        ConfigError: a training on the CPU without a C++ compiler.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Marks the model; it is compiled during the first batches."""
        compilers = [os.environ.get("CXX", "g++"), "clang++", "cl"]
        if trainer.strategy.root_device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise ConfigError("callbacks: torch.compile needs a C++ compiler on a CPU; install g++, or remove the callback.")
        module.model.compile(dynamic=True, backend=self._backend)


class Trace(Callback):
    """Records the operators that torch runs in a few training batches.

    Writes RUN/trace.json for Perfetto or chrome://tracing, and logs a table.

    Args:
        first: the first batch to record; those before it warm up.
        n_batches: the number of batches to record.
    """

    def __init__(self, first: int = 5, n_batches: int = 3) -> None:
        self._first, self._n_batches = first, n_batches
        self._profile: torch.profiler.profile | None = None
        self._n_recorded = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts recording; earlier in an epoch that is too short."""
        first = max(0, min(self._first, int(trainer.num_training_batches) - self._n_batches))
        if trainer.current_epoch == 0 and batch_idx == first and trainer.is_global_zero:
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts recorded batches, and writes the trace after the last one."""
        if self._profile is not None:
            self._n_recorded += 1
            if self._n_recorded == self._n_batches:
                self._write(trainer, self._profile)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Writes the trace if the training ended before all batches were recorded."""
        if self._profile is not None and self._n_recorded:
            self._write(trainer, self._profile)

    def _write(self, trainer: L.Trainer, profile: torch.profiler.profile) -> None:
        profile.stop()
        path = Path(trainer.default_root_dir) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = sorted(profile.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
        total = sum(event.self_cpu_time_total for event in events)
        lines = [f"{'operator':<40}{'ms a batch':>12}{'share':>8}{'calls':>9}"]
        for event in events[:12]:
            ms_per_batch = event.self_cpu_time_total / 1000 / self._n_recorded
            lines.append(f"{event.key[:39]:<40}{ms_per_batch:>12.1f}{event.self_cpu_time_total / total:>8.0%}{event.count:>9}")
        log.info("%s", "\n".join([*lines, f"trace: {os.path.relpath(path)}"]))
        self._profile = None
