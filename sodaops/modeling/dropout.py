"""Dropout with masks that are cheap to draw on a CPU.

torch's own dropout took an eighth of a training step there (docs/scaling.md).
"""

import numpy as np
import torch
from torch import Tensor, nn

_N_VALUES = 2**16  # of a 16-bit random number


class CpuDropout(nn.Dropout):
    """``torch.nn.Dropout`` that, on a CPU, draws 16 random bits for each element from NumPy's SFC64 generator.

    The generator is seeded by torch, so that ``torch.manual_seed`` makes the masks repeatable. The probability is rounded to
    a multiple of 2**-16. On other devices, in evaluation and in a compiled model, torch's implementation runs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Sets random elements to zero and scales the others, so that the mean stays the same.

        Args:
            input: float, any shape.

        Returns:
            A tensor of the same shape and dtype.
        """
        n_dropped = round(self.p * _N_VALUES)  # of the 2**16 values of a random number, so many drop an element
        if torch.compiler.is_compiling() or not self.training or input.device.type != "cpu" or n_dropped in (0, _N_VALUES):
            return super().forward(input)
        seed = int(torch.randint(2**62, ()))
        # Each 64-bit number gives the 16-bit numbers of four elements; the surplus of the last one is cut off.
        n_words = -(-input.numel() // 4)
        random = np.random.SFC64(seed).random_raw(n_words).view(np.uint16)[: input.numel()]
        # 0 for a dropped element, 1 / (1 - p) for a kept one. The scale uses the rounded p.
        scale = np.float32(_N_VALUES / (_N_VALUES - n_dropped))
        mask = np.multiply(random >= n_dropped, scale, dtype=np.float32)
        return input * torch.from_numpy(mask).view(input.shape).to(input.dtype)


def use_cpu_dropout(model: nn.Module) -> None:
    """Replaces every ``torch.nn.Dropout`` of a model by :class:`CpuDropout`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CpuDropout(child.p))
