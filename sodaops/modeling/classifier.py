"""The LightningModule that trains a model: loss, metrics, optimizer."""

import warnings
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection

from sodaops.config.extensions import build
from sodaops.config.schema import OptimConfig
from sodaops.errors import ModelError
from sodaops.modeling.encoder import EncoderOutput, TextEncoder
from sodaops.modeling.large import frozen_weights
from sodaops.modeling.losses import Loss
from sodaops.modeling.metrics import OwnMetrics
from sodaops.modeling.optim import layers_of, make_optimizer, make_scheduler, parameter_groups
from sodaops.modeling.probe import check_loss
from sodaops.tasks.base import Task
from sodaops.tasks.make import SINGLE_LABEL

SIGNATURE_KEY = "begun_with"  # in checkpoints; older ones have it too


class TextClassifier(L.LightningModule):
    """Trains a :class:`TextEncoder`.

    A batch, as :class:`sodaops.data.batching.TokenLoader` makes it, has

    - ``input_ids``, ``attention_mask`` and, of long texts, ``windows``: the inputs of :meth:`TextEncoder.forward`;
    - ``targets``, float [n_examples, ...], of the loss, and ``truth``, [n_examples, ...], of the metrics, as the task makes
      them: for one label per text, rows of targets sum to 1, and truth is label ids, int64 [n_examples];
    - ``share``, float, a scalar: the weight of this process's loss. Processes that train together split each batch, and with
      these weights the mean of their losses is the mean over all examples. It is 0 in a process that got no example of a
      batch and computes a copy of another process's.

    Dropout depends on seed, epoch and batch index alone, so that a resumed run repeats what a run without interruption does.

    Args:
        model: the encoder with its head.
        optim: conf/optim.
        loss: of a batch (:mod:`sodaops.modeling.losses`).
        seed: of dropout.
        run_signature: settings that a resumed run must share, saved in every checkpoint.
        metrics: on validation, besides the built-in ones.
        task: makes answers of logits, and names the built-in metrics.
        n_labels: number of labels.
        hidden: weight of the distance to a teacher's embeddings, which batches then have as ``embeddings``.
    """

    def __init__(
        self,
        model: TextEncoder,
        optim: OptimConfig,
        loss: Loss,
        seed: int,
        run_signature: dict[str, Any] | None = None,
        metrics: OwnMetrics | None = None,
        task: Task = SINGLE_LABEL,
        n_labels: int | None = None,
        hidden: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.seed = seed
        self.run_signature = run_signature or {}
        self.loss = loss
        self.hidden = hidden
        self.task = task
        self.val_loss = MeanMetric(nan_strategy="disable")
        sections = task.val_metrics(n_labels or model.n_labels)
        with warnings.catch_warnings():  # such as that Spearman's needs all rows
            warnings.simplefilter("ignore")
            built_in = {name: build(f"metrics.{name}", section) for name, section in sections.items()}
        self.val_metrics = MetricCollection(built_in, prefix="val/")
        self.own_metrics = metrics

    def configure_model(self) -> None:
        """With ``trainer.strategy=fsdp``, shards the parameters of each transformer layer over the processes."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in layers_of(self.model.transformer):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        seeds = np.random.SeedSequence([self.seed, self.current_epoch, batch_idx, self.global_rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))

    def forward(self, batch: dict[str, Tensor]) -> EncoderOutput:
        """The output of the model for a batch."""
        return self.model(batch["input_ids"], batch["attention_mask"], batch.get("windows"))

    def logits_of(self, batch: dict[str, Tensor]) -> Tensor:
        """The logits of a batch, float [n_examples, n_outputs]."""
        return self(batch).logits

    def loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch, and ``hidden`` times the mean of 1 - cosine to its ``embeddings``; those with NaN count as 0."""
        output = self(batch)
        loss = self.loss(output.logits, batch["targets"])
        if not self.hidden:
            return loss
        targets = batch["embeddings"]
        distance = 1 - F.cosine_similarity(output.embeddings.float(), targets.nan_to_num(), dim=-1)  # [n_examples]
        return loss + self.hidden * (distance * ~targets.isnan().any(-1)).mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss_of(batch)
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == 0:
            check_loss(loss)
        synced = {"sync_dist": self.trainer.world_size > 1}
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(batch["targets"]), **synced)
        return loss * batch["share"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self.logits_of(batch)
        if not batch["share"]:  # a copy of an example that another process counts
            return
        if hasattr(self.loss, "validate"):
            self.val_loss.update(self.loss.validate(logits, batch["truth"]))
        else:
            # MeanMetric ignores weights with nan_strategy="disable", so each example gets a value.
            self.val_loss.update(self.loss(logits, batch["targets"]).expand(len(logits)))
        probs = self.task.torch_probs(logits)
        self.val_metrics.update(self.task.torch_answers(probs), batch["truth"])
        if self.own_metrics is not None:
            self.own_metrics.update(probs, batch["truth"])

    def on_validation_epoch_end(self) -> None:
        loss = self.val_loss.compute()
        self.val_loss.reset()
        if not torch.isfinite(loss):
            raise ModelError(
                f"the validation loss is {loss.item()} after epoch {self.current_epoch}; training has diverged. "
                "Lower optim.lr, or set trainer.gradient_clip_val."
            )
        synced = {"sync_dist": self.trainer.world_size > 1}  # torchmetrics has synchronized them; Lightning warns without it
        self.log("val/loss", loss, **synced)
        try:
            values = self.val_metrics.compute()
        except ValueError as error:  # R² of one row is not defined
            raise ModelError(f"val has too few rows ({error}); give it more rows, see data.fractions.") from error
        self.log_dict(values, prog_bar=True, **synced)
        self.val_metrics.reset()
        if self.own_metrics is not None:
            self.log_dict({f"val/{name}": value for name, value in self.own_metrics.compute(synced=True).items()}, **synced)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the frozen weights, which :meth:`on_save_checkpoint` left out."""
        if frozen := frozen_weights(self, self.model.transformer):  # with fsdp the checkpoint has no state_dict any more
            checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = frozen_weights(self, self.model.transformer)
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in frozen}
        metrics = self.trainer.callback_metrics.items()
        checkpoint[SIGNATURE_KEY] = self.run_signature
        checkpoint["val_metrics"] = {name.removeprefix("val/"): float(v) for name, v in metrics if name.startswith("val/")}

    def configure_optimizers(self) -> dict[str, Any]:
        n_steps = self.trainer.estimated_stepping_batches
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = make_optimizer(parameter_groups(self.model, self.optim), self.optim, scaled)
        # Lightning refuses to clip gradients for an optimizer that could unscale them itself, as a fused AdamW can. With
        # bfloat16 no gradients are scaled, so clipping is safe.
        optimizer._step_supports_amp_scaling = False
        scheduler = make_scheduler(optimizer, self.optim, None if n_steps == float("inf") else int(n_steps))
        if scheduler is None:
            return {"optimizer": optimizer}
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "val/loss"}}
