"""The command line: one verb a stage.

A fault that a user can mend ends with exit code 2 and a message without a traceback; a model that the gate refuses, with 3;
a rule of the alerts that fires, with 4.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from sodaops.errors import ConfigError, SodaOpsError, Terminated, nearest

USAGE = """\
usage: sodaops VERB [KEY=VALUE ...]

  train        preprocess if needed, train, write the bundle, evaluate     (any Hydra flag: --cfg job, --multirun, …)
  preprocess   make the Parquet splits and their manifest
  export       add ONNX models to a bundle: sodaops export BUNDLE          (train does so by itself)
  evaluate     measure a bundle: sodaops evaluate BUNDLE evaluate.split=test
  predict      answer from a bundle: sodaops predict BUNDLE "a text"       (or --file TABLE --output TABLE)
  serve        answer over HTTP: sodaops serve BUNDLE serve.port=8000      (SODAOPS_… variables say the same)

  drift        the request log against the bundle's reference: sodaops drift BUNDLE drift.request_log=FOLDER
  watch        the drift service: sodaops watch BUNDLE drift.request_log=FOLDER
  alerts       the metrics against rules: sodaops alerts watch, check, test (the sinks), render (for Prometheus, Google Cloud)
  log          delete from the request log: sodaops log forget --request-id ID, sodaops log prune --days 30

  annotate     people label texts: sodaops annotate serve STORE            (also status, export FILE, import FILE)

  runs         a table of runs: sodaops runs --sort=-val/macro_f1          (sodaops runs compare A B: two beside each other)
  report       a run on one page for people who were not there: sodaops report RUN
  sweep        a sweep's page: sodaops sweep report SWEEP                  (sodaops sweep wandb search=…: a sweep on W&B)
  select       the best run of a sweep: sodaops select SWEEP

  register     put a bundle into the registry: sodaops register BUNDLE
  promote      make a version champion if the gate lets it: sodaops promote VERSION
  rollback     the champion before: sodaops rollback --reason "…"
  resolve      where a version lies: sodaops resolve champion
  registry     sodaops registry list, history or gc

KEY=VALUE changes the configuration in conf/ (model=distilbert, trainer.max_epochs=3). --config-dir FOLDER adds your own
groups. --params FILE reads a composed configuration, as DVC's stages do, in place of conf/.
"""
_VERBS = {
    "training": ("train", "preprocess", "export", "evaluate", "predict", "serve"),
    "runs": ("runs", "report", "sweep", "select"),
    "drift": ("drift", "watch", "log"),
    "alerts": ("alerts",),
    "annotation": ("annotate",),
    "registry": ("register", "promote", "rollback", "resolve", "registry"),
}
_ROOM_OF = {verb: room for room, verbs in _VERBS.items() for verb in verbs}
# What a verb may lack, and the extra that brings it.
_EXTRA_OF = dict.fromkeys(
    ("hydra", "lightning", "matplotlib", "omegaconf", "onnx", "onnxscript", "safetensors", "sklearn", "torch", "torchmetrics",
     "transformers"), "train",
) | {"optuna": "search", "plotly": "search", "wandb": "wandb", "evidently": "drift"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code: 0, 2 for a fault that a user can mend, 3 or 4 as above, 130 after Ctrl-C,
    143 after a SIGTERM that a training was told of."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if verb not in _ROOM_OF:
        hint = nearest(verb, _ROOM_OF)
        print(f"sodaops: {verb!r} is no verb{hint}; expected one of {', '.join(_ROOM_OF)}.\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        getattr(importlib.import_module(f"sodaops.cli.{_ROOM_OF[verb]}"), f"run_{verb}")(rest)
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
    from sodaops.config.compose import explain

    return explain(error)
