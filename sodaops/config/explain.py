"""Errors of Hydra and of missing packages, as errors that a user can fix."""

import sys

from sodaops.errors import ConfigError, SodaOpsError

# Packages that a command may lack, and the extra that installs them.
_EXTRA_OF = dict.fromkeys(
    ("huggingface_hub", "hydra", "lightning", "matplotlib", "omegaconf", "onnx", "onnxscript", "safetensors", "sklearn",
     "torch", "torchmetrics", "transformers"), "train",
) | {"optuna": "search", "plotly": "search", "wandb": "wandb", "evidently": "drift"}  # fmt: skip


def explain(error: Exception) -> SodaOpsError | None:
    """An error as one of this package; None if the user cannot fix it."""
    if isinstance(error, SodaOpsError):
        return error
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package == "fcntl":  # the request log's locks
        return ConfigError("serving and its request log need Linux or macOS; on Windows use WSL, or the image of docker/.")
    if isinstance(error, ModuleNotFoundError) and package in _EXTRA_OF:
        return ConfigError(f"{error.name} is not installed; get it with `pip install 'sodaops[{_EXTRA_OF[package]}]'`.")
    if "hydra" not in sys.modules:
        return None
    from sodaops.config.compose import explain_error

    return explain_error(error)
