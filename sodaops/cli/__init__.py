"""The command line, with one command for each stage.

Exit codes: 2 for an error that the user can fix, with a message and no traceback; 3 if the gate refuses a model; 4 if an
alert rule fires; 130 after Ctrl-C; 143 after SIGTERM.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from sodaops.cli.console import configure_logging
from sodaops.errors import ConfigError, SodaOpsError, Terminated, nearest

USAGE = """\
usage: sodaops COMMAND [KEY=VALUE ...]

  train        preprocess if needed, train, write the bundle, evaluate     (any Hydra flag: --cfg job, --multirun, …)
  preprocess   make the Parquet splits and their manifest
  export       add ONNX models to a bundle: sodaops export BUNDLE          (train does so by itself)
  evaluate     measure a bundle: sodaops evaluate BUNDLE evaluate.split=test
  predict      answer from a bundle: sodaops predict BUNDLE "a text"       (or --file TABLE --output TABLE)
  serve        answer over HTTP: sodaops serve BUNDLE serve.port=8000      (or environment variables SODAOPS_…)

  drift        compare the request log with the reference: sodaops drift BUNDLE drift.request_log=FOLDER
  watch        the drift service: sodaops watch BUNDLE drift.request_log=FOLDER
  alerts       alert rules: sodaops alerts check, render (for Prometheus, Alertmanager, Grafana, Google Cloud)
  log          delete from the request log: sodaops log forget --request-id ID, sodaops log prune --days 30

  annotate     people label texts: sodaops annotate serve STORE            (also status, export FILE, import FILE)

  runs         a table of runs: sodaops runs --sort=-val/macro_f1          (sodaops runs compare A B: two beside each other)
  report       one page about a run: sodaops report RUN
  sweep        a sweep's page: sodaops sweep report SWEEP                  (sodaops sweep wandb search=…: a sweep on W&B)
  select       the best run of a sweep: sodaops select SWEEP

  register     put a bundle into the registry: sodaops register BUNDLE
  promote      make a version champion if the gate lets it: sodaops promote VERSION
  rollback     bring the previous champion back: sodaops rollback --reason "…"
  resolve      the address of a version: sodaops resolve champion
  registry     sodaops registry list, history or gc

KEY=VALUE changes the configuration in conf/ (model=distilbert, trainer.max_epochs=3). --config-dir FOLDER adds your own
groups. --params FILE reads a composed configuration, as DVC's stages do, in place of conf/.
"""
_COMMANDS = {
    "training": ("train", "preprocess", "export", "evaluate", "predict", "serve"),
    "runs": ("runs", "report", "sweep", "select"),
    "drift": ("drift", "watch", "log"),
    "alerts": ("alerts",),
    "annotation": ("annotate",),
    "registry": ("register", "promote", "rollback", "resolve", "registry"),
}
MODULE_OF = {command: module for module, commands in _COMMANDS.items() for command in commands}
# Packages that a command may lack, and the extra that installs them.
_EXTRA_OF = dict.fromkeys(
    ("hydra", "lightning", "matplotlib", "omegaconf", "onnx", "onnxscript", "safetensors", "sklearn", "torch", "torchmetrics",
     "transformers"), "train",
) | {"optuna": "search", "plotly": "search", "wandb": "wandb", "evidently": "drift"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command not in MODULE_OF:
        hint = nearest(command, MODULE_OF)
        print(
            f"sodaops: {command!r} is not a command{hint}; expected one of {', '.join(MODULE_OF)}.\n\n{USAGE}",
            end="",
            file=sys.stderr,
        )
        return 2
    configure_logging()
    try:
        getattr(importlib.import_module(f"sodaops.cli.{MODULE_OF[command]}"), f"run_{command}")(rest)
    except KeyboardInterrupt as stop:
        print(f"stopped; {stop}" if str(stop) else "stopped", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except Exception as error:
        explained = _explained(error)
        if explained is None or os.environ.get("SODAOPS_TRACEBACK"):
            raise
        print(f"{type(explained).__name__}: {explained}", file=sys.stderr)
        return explained.exit_code
    return 0


def _explained(error: Exception) -> SodaOpsError | None:
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
