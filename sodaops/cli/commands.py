"""Every command with its arguments, the configuration keys that it reads, and an example; nothing here imports a stage."""

from pathlib import Path
from typing import Any, NamedTuple

COMPLETE = "SODAOPS_COMPLETE"  # the environment variable with the line that the shell completes
Argument = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        summary: what it does, in one line.
        example: a command that can be copied.
        arguments: names and options, as for ``ArgumentParser.add_argument``.
        keys: configuration keys and sections that it reads; ``*``: all groups; ``SECTION.*`` is not listed key by key. Without
            any, it takes no KEY=VALUE.
        note: more about it, for its help.
    """

    summary: str
    example: str
    arguments: tuple[Argument, ...] = ()
    keys: tuple[str, ...] = ()
    note: str = ""


def _command(summary: str, example: str, *arguments: Argument, keys: tuple[str, ...] = (), note: str = "") -> Command:
    return Command(summary, example, arguments, keys, note)


def _arg(*names: str, **options: Any) -> Argument:
    return names, options


_PLACES = "a run's folder, RUN/bundle, gs://BUCKET/FOLDER or REGISTRY@champion"
_BUNDLE = _arg("bundle", metavar="BUNDLE", help=_PLACES)
_REASON = _arg("--reason", default="", help="for the history")
_JSON = _arg("--json", action="store_true", help="all fields, for programs")
_REGISTRY = ("registry.path", "registry.wandb", "logger.wandb.*")
_REQUEST_LOG = ("drift.request_log", "serve.request_log")
# Of Hydra, which parses these itself.
HYDRA = (
    _arg("-m", "--multirun", action="store_true", help="a run for each of the values KEY=A,B, or a sweep with search=NAME"),
    _arg("-c", "--cfg", choices=["job", "hydra", "all"], help="print the configuration, and do not train"),
    _arg("--resolve", action="store_true", help="with --cfg: replace ${...}"),
    _arg("-p", "--package", help="with --cfg: print only this section"),
    _arg("-i", "--info", nargs="?", choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"],
         help="print how the configuration is composed"),
    _arg("-cp", "--config-path", metavar="FOLDER", help="a folder with your own config.yaml"),
    _arg("-cn", "--config-name", metavar="NAME", help="of that file, if not config"),
    _arg("--hydra-help", action="store_true", help="Hydra's own help"),
)  # fmt: skip
# What every command that reads the configuration accepts.
CONFIG = (
    _arg("--config-dir", metavar="FOLDER", help="a folder with more groups and options"),
    _arg("--params", metavar="FILE", help="a composed configuration, as DVC's stages read it, in place of conf/"),
)

COMMANDS = {
    "train": _command(
        "preprocess if needed, train, write the bundle, evaluate", "python train.py model=minilm trainer.max_epochs=3",
        *HYDRA, keys=("*", "seed", "run_dir", "ckpt_path", "checkpoint", "early_stopping", "export", "callbacks", "metrics"),
        note="`python train.py` is the same.",
    ),
    "preprocess": _command(
        "make the Parquet splits and their manifest", "sodaops preprocess data=csv data.path=reviews.csv",
        keys=("data", "evaluate.splits_dir"),
    ),
    "export": _command(
        "add ONNX models to a bundle (train does so by itself), or write it for transformers",
        "sodaops export outputs/first --format=transformers --output outputs/tweets",
        _arg("bundle", metavar="BUNDLE", help=f"{_PLACES}; for ONNX a local one"),
        _arg("--format", choices=["onnx", "transformers"], default="onnx", help="default: onnx"),
        _arg("--output", metavar="FOLDER", help="for --format=transformers, which does not change the bundle"),
        keys=("export", "evaluate.splits_dir", "evaluate.target_accuracy", "evaluate.set_coverage"),
    ),
    "evaluate": _command(
        "measure a bundle on a split", "sodaops evaluate outputs/first/bundle evaluate.split=val",
        _arg("bundle", metavar="BUNDLE", nargs="?", help=f"{_PLACES} (default: evaluate.bundle)"),
        keys=("evaluate", "metrics", "run_dir"),
    ),
    "predict": _command(
        "answer for texts, a table or standard input", 'sodaops predict outputs/first "I love this"',
        _arg("bundle", metavar="BUNDLE", help=_PLACES),
        _arg("texts", nargs="*", metavar="TEXT", help="a text, or JSON for several columns; -: standard input, one a line"),
        _arg("--file", metavar="TABLE", help="input table, local or at gs://: .csv, .tsv, .jsonl or .parquet"),
        _arg(
            "--text-column", metavar="NAME", action="append",
            help="the column with the texts, once for each of several (default: that of the training)",
        ),
        _arg("--delimiter", metavar="CHARACTER", help="of a CSV or TSV table, or tab (default: detected)"),
        _arg("--encoding", metavar="NAME", help="of the table, such as windows-1252 (default: UTF-8)"),
        _arg("--output", metavar="TABLE", help="local file for the table with label, score and probabilities added"),
        _arg("--variant", choices=["float32", "int8"], help="default: int8 where it passed its gate"),
        _arg("--abstain", action="store_true", help="say which answers are below the bundle's thresholds"),
    ),
    "serve": _command(
        "answer over HTTP", "sodaops serve outputs/first/bundle serve.port=8000",
        _arg("bundle", metavar="BUNDLE", nargs="?", help=f"{_PLACES} (default: SODAOPS_BUNDLE)"), keys=("serve",),
        note="Each key is also an environment variable: serve.max_queue is SODAOPS_MAX_QUEUE.",
    ),
    "drift": _command(
        "compare the request log with the reference", "sodaops drift registry@champion drift.request_log=outputs/requests",
        _BUNDLE,
        _arg("--fail-on-drift", action="store_true", help="exit code 4 when there is drift, for cron and CI"),
        keys=("drift", "serve.request_log"),
    ),
    "watch": _command(
        "the drift service, which checks repeatedly",
        "sodaops watch registry@champion drift.request_log=outputs/requests drift.port=8002",
        _BUNDLE, keys=("drift", "serve.request_log"),
        note="Each key is also an environment variable: drift.last is SODAOPS_DRIFT_LAST.",
    ),
    "alerts check": _command(
        "evaluate the alert rules once; exit code 4 when one fires",
        "sodaops alerts check --wait 30 alerts.rules.errors.above=0.05",
        _arg("--wait", type=float, default=0.0, metavar="SECONDS", help="between two scrapes, which rules on rates need"),
        _arg("--notify", action="store_true", help="send what fires to the Apprise URL in SODAOPS_ALERT_URL"),
        keys=("alerts",),
    ),
    "alerts render": _command(
        "write files for Prometheus, Alertmanager, Grafana and Google Cloud",
        "sodaops alerts render --output outputs/alerts alerts.rules.drift=null",
        _arg("--output", default="outputs/alerts", metavar="FOLDER", help="default: outputs/alerts"), keys=("alerts",),
    ),
    "log forget": _command(
        "delete texts from the request log and the annotation store",
        "sodaops log forget --request-id 01HX serve.request_log=requests",
        _arg("--request-id", action="append", default=[], metavar="ID", help="all rows of this request; may be repeated"),
        _arg("--text-hash", action="append", default=[], metavar="SHA256", help="all rows of this text; may be repeated"),
        keys=(*_REQUEST_LOG, "serve.journal_dir", "drift.output_dir", "annotate.store"),
    ),
    "log prune": _command(
        "delete old parts of the request log", "sodaops log prune --days 30 serve.request_log=requests",
        _arg("--days", type=int, metavar="N", help="delete parts older than this (default: serve.keep_days)"),
        keys=(*_REQUEST_LOG, "serve.keep_days"),
    ),
    "labels check": _command(
        "rank rows by how likely their label is an error; trains labels.folds models, as train does",
        "sodaops labels check data=tweets model.layers=3", keys=("labels", "data", "evaluate.splits_dir", "model.*", "optim.*"),
    ),
    "annotate pick": _command(
        "pick texts to label from the request log, or suspected labels; makes the store",
        "sodaops annotate pick registry@champion drift.request_log=requests",
        _arg("bundle", metavar="BUNDLE", nargs="?", help=f"{_PLACES}; needed with --from log"),
        _arg("--from", dest="origin", choices=["log", "labels"], default="log", help="labels: what `labels check` found"),
        keys=("annotate.store", "annotate.n", "annotate.shares", "labels", "drift.request_log", "drift.last", "drift.since",
              "drift.until", "drift.max_rows", "serve.request_log", "evaluate.splits_dir"),
    ),
    "annotate import": _command(
        "read texts and answers of other tools; makes the store with data.labels",
        "sodaops annotate import labels.csv annotate.store=STORE data.labels=[bad,good]",
        _arg("file", metavar="FILE", help="Label Studio's JSON or CSV, or a table with text (and task, label, annotator)"),
        keys=("annotate.store", "annotate.text_key", "annotate.label_key", "data.labels", "data.label_map", "data.delimiter",
              "data.encoding"),
    ),
    "annotate serve": _command(
        "the page on which people label texts", "sodaops annotate serve STORE annotate.port=8001",
        _arg("store", metavar="STORE", nargs="?", help="the store's folder (default: annotate.store)"),
        keys=("annotate.store", "annotate.host", "annotate.port"),
    ),
    "annotate status": _command(
        "progress, agreement and conflicts", "sodaops annotate status annotate.store=STORE",
        keys=("annotate.store",),
    ),
    "annotate export": _command(
        "write texts and answers for other tools", "sodaops annotate export labels.json annotate.store=STORE",
        _arg("file", metavar="FILE", help="NAME.json for Label Studio (with its labeling config, NAME.xml), or NAME.csv"),
        keys=("annotate.store",),
    ),
    "annotate merge": _command(
        "write accepted labels to a new raw table", "sodaops annotate merge annotate.store=STORE annotate.min_annotators=2",
        keys=("annotate.store", "annotate.min_annotators", "annotate.near_test", "labels.test", "data", "evaluate.splits_dir"),
    ),
    "runs": _command(
        "a table of runs", "sodaops runs --sort=-val/macro_f1 --where 'optim.lr>1e-4'",
        _arg("folders", nargs="*", metavar="FOLDER", help="where to look (default: outputs, multirun, artifacts)"),
        _arg("--where", action="append", default=[], metavar="KEY=VALUE", help="also != < > <= >=; may be repeated"),
        _arg("--sort", metavar="KEY", help="--sort=-val/macro_f1 puts the largest first"),
        _JSON,
    ),
    "runs compare": _command(
        "runs side by side", "sodaops runs compare outputs/first outputs/second",
        _arg("folders", nargs="+", metavar="RUN", help="run folders, at least two"),
    ),
    "report": _command(
        "one page about a run, for readers outside the team", "sodaops report outputs/first",
        _arg("run", metavar="RUN", help="a run's folder, or a version or alias (champion) that a run here has made"),
        _arg("--output", type=Path, metavar="FILE", help="the page (default: RUN/project_report.html)"),
        keys=("registry.path", "registry.report_dir", "registry.gate.slice_rows", "drift.output_dir"),
    ),
    "sweep report": _command(
        "the page of a sweep", "sodaops sweep report multirun/smoke",
        _arg("folder", type=Path, metavar="SWEEP", help="multirun/STUDY"),
        _arg("--copy-to", metavar="gs://BUCKET/FOLDER", help="also upload it there"),
    ),
    "sweep wandb": _command(
        "run a search as a sweep on W&B", "sodaops sweep wandb search=smoke --agents 2",
        _arg("--agents", type=int, default=1, metavar="N", help="runs at the same time (default 1)"),
        _arg("--write", action="store_true", help="only write the sweep's file"),
        keys=("search.*", "logger.wandb.*", "checkpoint.monitor"),
    ),
    "select": _command(
        "the best run of a sweep, on validation", "sodaops select multirun/smoke",
        _arg("sweep", metavar="SWEEP", help="a sweep's folder, any folder with runs, or wandb:ENTITY/PROJECT/SWEEP"),
        _arg("--metric", help="on validation (default: the runs' checkpoint.monitor, of a W&B sweep val/macro_f1)"),
        _arg("--direction", choices=["maximize", "minimize"], help="default: by the metric's name"),
        _arg("--tolerance", type=float, default=0.0, help="differences up to this count as equal; the fastest is chosen"),
        _JSON,
    ),
    "register": _command(
        "put a bundle into the registry", 'sodaops register outputs/first/bundle --reason "the first try"',
        _arg("bundle", metavar="BUNDLE", help="a run's folder, RUN/bundle, or gs://BUCKET/FOLDER"),
        _REASON,
        keys=_REGISTRY,
    ),
    "push": _command(
        "upload a bundle and its export for transformers to the Hugging Face hub",
        "sodaops push outputs/first you/tweets --dry-run",
        _BUNDLE,
        _arg("repo", metavar="REPO", help="OWNER/NAME; made if missing, private"),
        _arg("--public", action="store_true", help="if it is made, everybody can read it"),
        _arg("--dry-run", action="store_true", help="only print the files"),
    ),
    "promote": _command(
        "make a version champion if it passes the gate; exit code 3 if not", "sodaops promote challenger",
        _arg("version", metavar="VERSION", help="a version, its first characters, or an alias (challenger)"),
        _REASON,
        _arg("--force", action="store_true", help="even if the gate refuses it; needs --reason, and is recorded"),
        keys=("registry", "evaluate.splits_dir", "drift.request_log", "annotate.store", "logger.wandb.*"),
    ),
    "rollback": _command(
        "bring the previous champion back", 'sodaops rollback --reason "slow"',
        _arg("--reason", required=True, help="for the history"), keys=_REGISTRY,
    ),
    "resolve": _command(
        "the path or address of a version", "sodaops resolve champion",
        _arg("version", metavar="VERSION", help="champion, another alias, or a version"), keys=("registry.path",),
    ),
    "registry list": _command("the versions of the registry", "sodaops registry list", _JSON, keys=("registry.path",)),
    "registry history": _command("the events of the registry", "sodaops registry history", _JSON, keys=("registry.path",)),
    "registry gc": _command(
        "delete unused versions", "sodaops registry gc --keep 3 --dry-run",
        _arg("--keep", type=int, default=3, metavar="N", help="earlier champions to keep for a rollback (default 3)"),
        _arg(
            "--grace-hours", type=float, default=24.0, metavar="N",
            help="age at which what killed processes left is deleted too (default 24)",
        ),
        _arg("--dry-run", action="store_true", help="only print what would be deleted"),
        keys=("registry.path",),
    ),
    "config show": _command(
        "what a key or a section of the configuration means", "sodaops config show model.pooling",
        _arg("key", metavar="KEY", nargs="?", help="a key, a section or a group (default: all sections)"), keys=("*",),
        note="KEY=VALUE changes what is shown as the default: `sodaops config show trainer.devices trainer=ddp`.",
    ),
    "completion": _command(
        "Tab completion for your shell", 'eval "$(sodaops completion bash)"',
        _arg("shell", choices=["bash", "zsh"]),
        note="Put the example into ~/.bashrc, or with zsh into ~/.zshrc after compinit.",
    ),
}  # fmt: skip

# The module of sodaops.cli with the function of each first word.
MODULE_OF = {
    **dict.fromkeys(("train", "preprocess", "evaluate", "predict", "serve"), "training"),
    **dict.fromkeys(("export", "push"), "export"),
    **dict.fromkeys(("runs", "report", "sweep", "select"), "runs"),
    **dict.fromkeys(("drift", "watch", "log"), "drift"),
    **dict.fromkeys(("register", "promote", "rollback", "resolve", "registry"), "registry"),
    "alerts": "alerts",
    **dict.fromkeys(("annotate", "labels"), "annotation"),
    "config": "configuration",
    "completion": "completion",
}


def find_command(words: list[str]) -> tuple[str, list[str]]:
    """Splits words into the longest name of a command, or as much of one as they have, and the rest.

    >>> find_command(["runs", "compare", "a"]), find_command(["runs", "a"]), find_command(["annotate", "impot"])
    (('runs compare', ['a']), ('runs', ['a']), ('annotate', ['impot']))
    """
    if " ".join(words[:2]) in COMMANDS:
        return " ".join(words[:2]), words[2:]
    return (words[0], words[1:]) if words else ("", [])


def subcommands(word: str) -> list[str]:
    """The second words of the commands that start with this one.

    >>> subcommands("log"), subcommands("train")
    (['forget', 'prune'], [])
    """
    return [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{word} ")]
