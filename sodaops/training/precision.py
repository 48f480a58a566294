"""Which precision ``trainer.precision=auto`` means on this machine."""

import os
import pickle

import torch

from sodaops.config.schema import Config
from sodaops.io import ranks

MIXED, FULL = "bf16-mixed", "32-true"


def with_precision(config: Config) -> Config:
    """``trainer.precision=auto`` made what it means here, and told: that of the checkpoint that the run goes on from; else
    bf16-mixed where the device multiplies bfloat16 itself, and 32-true elsewhere and with fsdp.

    In bf16-mixed the matrix products alone are in bfloat16; parameters, their updates, norms and the loss stay in float32.
    """
    if config.trainer.get("precision") != "auto":
        return config
    begun, device = _begun_in(config.ckpt_path), device_of(str(config.trainer.get("accelerator")))
    if begun is not None:
        precision, why = begun, f"as {config.ckpt_path} was begun"
    elif config.trainer.get("strategy") == "fsdp":
        precision, why = FULL, "as trainer=fsdp takes it unless told otherwise"
    else:
        precision = MIXED if bfloat16_on(device) else FULL
        other = FULL if precision == MIXED else MIXED
        why = f"as fits this {device.upper()}; trainer.precision={other} for the other"
    if ranks.is_rank_zero(os.environ):
        print(f"precision: {precision}, {why}", flush=True)
    return config.model_copy(update={"trainer": {**config.trainer, "precision": precision}})


def _begun_in(path: str | None) -> str | int | None:
    """A checkpoint's precision; None without one, and where it cannot be read, which ``fit`` tells of."""
    if path is None or not os.path.isfile(path):
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError):
        return None
    return found.get("begun_with", {}).get("trainer.precision", FULL) if isinstance(found, dict) else None


def device_of(accelerator: str) -> str:
    """What an accelerator's name stands for here: cuda, cpu, or the name of another.

    >>> device_of("cpu"), device_of("gpu") == device_of("cuda")
    ('cpu', True)
    """
    if accelerator == "auto" and not torch.cuda.is_available():
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return "cuda" if accelerator in ("auto", "gpu", "cuda") else accelerator


def bfloat16_on(device: str) -> bool:
    """Whether a device has instructions for matrix products in bfloat16; elsewhere they are slower than in float32."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return device == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))
