"""Chooses the precision that ``trainer.precision=auto`` stands for on this machine."""

import logging

import torch

from sodaops.config.schema import Config
from sodaops.training.resume import FULL_PRECISION, checkpoint_precision

log = logging.getLogger(__name__)
MIXED_PRECISION = "bf16-mixed"


def with_precision(config: Config) -> Config:
    """Replaces ``trainer.precision=auto``, and logs the choice and its reason.

    A resumed run takes the precision of its checkpoint. Otherwise: 32-true with fsdp and on devices without bfloat16
    instructions, bf16-mixed elsewhere. In bf16-mixed only matrix products are in bfloat16; parameters, optimizer state,
    normalization and loss stay in float32.
    """
    if config.trainer.get("precision") != "auto":
        return config
    saved, device = checkpoint_precision(config.ckpt_path), device_of(str(config.trainer.get("accelerator")))
    if saved is not None:
        precision, reason = saved, f"as in {config.ckpt_path}"
    elif config.trainer.get("strategy") == "fsdp":
        precision, reason = FULL_PRECISION, "the default of trainer=fsdp"
    else:
        precision, other = MIXED_PRECISION, FULL_PRECISION
        if not has_bfloat16(device):
            precision, other = other, precision
        reason = f"the faster one on this {device.upper()}; trainer.precision={other} for the other"
    log.info("precision: %s, %s", precision, reason)
    return config.model_copy(update={"trainer": {**config.trainer, "precision": precision}})


def device_of(accelerator: str) -> str:
    """The device type that an accelerator's name stands for on this machine: cuda, cpu, mps, or another name.

    >>> device_of("cpu"), device_of("gpu") == device_of("cuda")
    ('cpu', True)
    """
    if accelerator == "auto" and not torch.cuda.is_available():
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return "cuda" if accelerator in ("auto", "gpu", "cuda") else accelerator


def has_bfloat16(device: str) -> bool:
    """Whether a device has instructions for matrix products in bfloat16; without them they are slower than in float32."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
