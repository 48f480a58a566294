"""Which precision ``trainer.precision=auto`` means on this machine."""

import torch

from sodaops.config import Config

MIXED, FULL = "bf16-mixed", "32-true"


def with_precision(config: Config) -> Config:
    """``trainer.precision=auto`` made bf16-mixed where the device multiplies bfloat16 itself, else 32-true, and told.

    In bf16-mixed the matrix products alone are in bfloat16; parameters, their updates, norms and the loss stay in float32.
    """
    if config.trainer.get("precision") != "auto":
        return config
    device = device_of(str(config.trainer.get("accelerator")))
    native = bfloat16_on(device) and config.trainer.get("strategy") != "fsdp"
    precision, other = (MIXED, FULL) if native else (FULL, MIXED)
    print(f"precision: {precision}, as fits this {device.upper()}; trainer.precision={other} for the other", flush=True)
    return config.model_copy(update={"trainer": {**config.trainer, "precision": precision}})


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
