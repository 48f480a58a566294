"""Dropout whose masks are cheap to draw on a CPU, where torch's own took an eighth of a training step (docs/scaling.md)."""

import numpy as np
import torch
from torch import Tensor, nn

_STEPS = 2**16


class CpuDropout(nn.Dropout):
    """As ``torch.nn.Dropout``; on a CPU its masks come from NumPy's SFC64, sixteen bits an element, seeded by torch.

    The probability is rounded to a multiple of 2**-16, and what is kept is scaled by it, so that the mean stays as it was
    (in bfloat16 that factor is rounded too, as torch rounds its own).
    On other devices, in evaluation and in a compiled model it is torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Zeroes elements of a tensor of any shape and float dtype."""
        n_dropped = round(self.p * _STEPS)
        if torch.compiler.is_compiling() or not self.training or input.device.type != "cpu" or n_dropped in (0, _STEPS):
            return super().forward(input)
        seed = int(torch.randint(2**62, ()))
        drawn = np.random.SFC64(seed).random_raw(-(-input.numel() // 4)).view(np.uint16)[: input.numel()]
        mask = np.multiply(drawn >= n_dropped, np.float32(_STEPS / (_STEPS - n_dropped)), dtype=np.float32)
        return input * torch.from_numpy(mask).view(input.shape).to(input.dtype)


def use_cpu_dropout(model: nn.Module) -> None:
    """Puts :class:`CpuDropout` in place of every ``torch.nn.Dropout`` of a model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CpuDropout(child.p))
