"""Callbacks and a logger for the tests: they end a training in different ways, or note what they see."""

import builtins
import os
import signal
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger


class Crash(Callback):
    """Raises an error after ten batches of epoch 1."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 10:
            raise KeyError("crash")


class SendSigterm(Callback):
    """Sends SIGTERM in an epoch, after a batch or in the validation; with ``rank``, only this process does.

    To its own process, or to its parent: the agent.
    """

    def __init__(self, where, epoch=1, rank=None, batch=10, to_parent=False):
        self.where, self.epoch, self.rank, self.batch, self.to_parent = where, epoch, rank, batch, to_parent

    def send(self, trainer, where):
        if (trainer.current_epoch, where) == (self.epoch, self.where) and self.rank in (None, trainer.global_rank):
            os.kill(os.getppid() if self.to_parent else os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            self.send(trainer, "batch")

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.send(trainer, "validation")


class KillOnce(Callback):
    """Kills the process of a rank after a batch of epoch 1, unless the file exists, which is then made."""

    def __init__(self, rank, file):
        self.rank, self.file = rank, Path(file)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == (1, 3, self.rank) and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Seen(Callback):
    """Notes the labels, the learning rate and the random state of every training batch."""

    batches: ClassVar[list] = []
    rates: ClassVar[list] = []
    seeds: ClassVar[list] = []

    def on_train_start(self, trainer, module):
        for notes in (self.batches, self.rates, self.seeds):
            notes.clear()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append([row.sum().item() for row in batch["input_ids"]])
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.seeds.append(torch.initial_seed())


class Sharded(Callback):
    """Checks that each of two processes holds about half of the parameters."""

    def on_train_start(self, trainer, module):
        n_all = sum(parameter.numel() for parameter in module.parameters())
        n_local = sum(parameter.to_local().numel() for parameter in module.parameters())
        if not 0.45 < n_local / n_all < 0.55:
            raise RuntimeError(f"this process holds {n_local} of {n_all} parameters")


class Gradients(Callback):
    """Records the norm of the gradient in every optimizer step, and whether the optimizer is fused."""

    norms: ClassVar[list[float]] = []
    fused: ClassVar[set[bool]] = set()

    def on_before_zero_grad(self, trainer, module, optimizer):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
        self.norms.append(float(torch.stack(norms).norm()) if norms else 0.0)
        self.fused.update(group["fused"] for group in optimizer.param_groups)


class Interrupt(Callback):
    """Sends Ctrl-C after a batch of epoch 1."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)


class Failing(Logger):
    """A logger that raises an error in one of its methods."""

    name, version = "failing", 0

    def __init__(self, method, error):
        super().__init__()
        self.method, self.error = method, error

    def log_hyperparams(self, params):
        self.fail("log_hyperparams")

    def log_metrics(self, metrics, step=None):
        self.fail("log_metrics")

    def finalize(self, status):
        self.fail("finalize")

    def fail(self, method):
        if method == self.method:
            raise getattr(builtins, self.error)("connection lost")
