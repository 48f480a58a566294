"""A callback that ends a training like a power cut, in the middle of its second epoch."""

from lightning.pytorch.callbacks import Callback


class Stop(Callback):
    """Raises after ten batches of epoch 1."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 10:
            raise KeyError("power cut")
