"""Callbacks for the tests: one ends a training like a power cut, one notes what it sees."""

import os
import signal
from typing import ClassVar

import torch
from lightning.pytorch.callbacks import Callback


class Stop(Callback):
    """Raises after ten batches of epoch 1."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 10:
            raise KeyError("power cut")


class Told(Callback):
    """Sends SIGTERM to itself in an epoch: after a batch, or in the validation; where ``rank`` is given, there alone."""

    def __init__(self, where, epoch=1, rank=None, batch=10):
        self.where, self.epoch, self.rank, self.batch = where, epoch, rank, batch

    def tell(self, trainer, where):
        if (trainer.current_epoch, where) == (self.epoch, self.where) and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            self.tell(trainer, "batch")

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.tell(trainer, "validation")


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
    """Each of two processes holds about half of the parameters."""

    def on_train_start(self, trainer, module):
        whole = sum(parameter.numel() for parameter in module.parameters())
        mine = sum(parameter.to_local().numel() for parameter in module.parameters())
        if not 0.45 < mine / whole < 0.55:
            raise RuntimeError(f"{mine} of {whole} parameters are here")
