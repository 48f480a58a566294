"""--help, the parsing of arguments, and Tab completion in real shells."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from sodaops.cli import main
from sodaops.cli.commands import COMMANDS, MODULE_OF
from sodaops.cli.completion import complete
from sodaops.cli.parsing import parse
from sodaops.errors import ConfigError
from tests.conftest import REPO

HEAVY = {"torch", "lightning", "transformers", "hydra", "pydantic", "onnxruntime", "pyarrow"}
_HELPS = """
import contextlib, io, json, runpy, sys
from sodaops.cli import main
from sodaops.cli.commands import COMMANDS

texts = {}
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([*name.split(), "--help"])
    texts[name] = (code, out.getvalue())
sys.argv = ["train.py", "model=tiny", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    runpy.run_path("train.py", run_name="__main__")
print(json.dumps([texts, out.getvalue(), sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def helps():
    done = subprocess.run([sys.executable, "-c", _HELPS], capture_output=True, text=True, cwd=REPO, check=True)
    return json.loads(done.stdout)


def test_help_imports_nothing_heavy(helps):
    texts, train_py, modules = helps
    assert not HEAVY & set(modules)
    assert train_py == texts["train"][1]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(helps, name):
    code, text = helps[0][name]
    command = COMMANDS[name]
    assert code == 0 and text.startswith(f"usage: sodaops {name} ") and text.endswith(f"\n  {command.example}\n")
    assert all(key in text for key in command.keys if key != "*")
    assert all(flag in text for names, _ in command.arguments for flag in names if flag.startswith("-"))


def test_keys_and_examples_exist():
    from sodaops.config.compose import compose
    from sodaops.config.keys import group_options, groups

    tree = compose(["search=default", "logger=many"]).model_dump() | {"experiment": None, "debug": None}

    def exists(key):
        inside = tree
        for part in key.split("."):
            if not isinstance(inside, dict) or part not in inside:
                return False
            inside = inside[part]
        return True

    for name, command in COMMANDS.items():
        assert all(exists(key.removesuffix(".*")) for key in command.keys if key != "*"), name
        program, *words = shlex.split(command.example.removeprefix('eval "$(').removesuffix(')"'))
        assert " ".join(words).startswith(name if program == "sodaops" else "train.py")
        options = vars(parse(words)[1]) if program == "sodaops" else {}
        for word in options.get("overrides", []) if program == "sodaops" else words[1:]:
            key, _, value = word.partition("=")
            assert exists(key) if key not in groups() else value in group_options(key), word


def test_help_lists_every_group(helps):
    from sodaops.config.keys import conf_dir, group_options, groups

    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()} - {"hydra"}
    assert set(groups()) == folders  # without a comment in conf/config.yaml a group is not listed
    for group in folders:
        line = next(line for line in helps[0]["train"][1].splitlines() if line.startswith(f"  {group} "))
        assert line.endswith(f": {', '.join(group_options(group))}") and len(line) <= 120


@pytest.mark.parametrize(("words", "lines"), [
    ("model.pooling", ["model.pooling: ", "default mean", "allowed mean, cls"]),
    ("model.pooling model=distilbert", ["default cls"]),
    ("optim.batch_tokens", ["default 768", "allowed whole number from 1"]),
    ("trainer.max_epochs", ["default auto", "allowed auto or Optional[int]"]),
    ("logger.wandb.project", ["default sodaops", "allowed text"]),
    ("experiment", ["experiment: ", "experiment=smoke The whole pipeline"]),
    ("data", ["data: ", "data=tweets 4,200", "data.files.train=null", "data.path=data/raw/tweets.csv"]),
    ("data.files", ["data.files: ", "data.files.val=null"]),
    ("", ["data ", "seed=42 ", "checkpoint ", "debug "]),
])  # fmt: skip
def test_config_show(capsys, words, lines):
    assert main(["config", "show", *words.split()]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert all(any(line.startswith(start.rstrip()) for line in shown) for start in lines)


@pytest.mark.parametrize(("key", "meant"), [("optim.lrr", "lr"), ("pooling", "model.pooling"), ("experimnt", "experiment")])
def test_config_show_of_no_key(capsys, key, meant):
    assert main(["config", "show", key]) == 2
    assert f"{key} is not a key (did you mean {meant}?)" in capsys.readouterr().err


def test_config_show_knows_every_key():
    """Also those of sections that are null by default, with what the schema says about them."""
    from sodaops.config.compose import compose
    from sodaops.config.reference import describe_keys

    keys = describe_keys(compose(["logger=many", "search=default"]))
    assert keys["logger.wandb.mode"].allowed == "`online`, `offline` or null" and keys["search.n_trials"].default == 20
    assert set(describe_keys()) <= set(keys) and keys["trainer.max_epochs"].default == "auto"


def test_every_command_has_a_function():
    import importlib

    for name in COMMANDS:
        module = importlib.import_module(f"sodaops.cli.{MODULE_OF[name.split()[0]]}")
        assert callable(getattr(module, f"run_{name.replace(' ', '_')}"))


def test_overviews_and_unknown_commands(capsys):
    assert main([]) == main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.split()[: len(name.split())] == name.split() for line in lines) for name in COMMANDS)
    assert main(["annotate", "-h"]) == 0
    assert "annotate merge" in capsys.readouterr().out
    for words, named in [
        (["trian"], ["'trian'", "did you mean train?", "evaluate"]), (["annotate", "impot"], ["did you mean import?", "pick"]),
        (["log"], ["forget", "prune"]), (["-sc", "query=bash"], ["'-sc'"]), (["train", "-sc", "install=bash"], ["completion"]),
    ]:  # fmt: skip
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("ConfigError: ") and all(text in error for text in named)


@pytest.mark.parametrize(("line", "expected"), [
    ("drift drift.last=3 A drift.since=null", {"bundle": "A", "overrides": ["drift.last=3", "drift.since=null"]}),
    ("drift A --fail-on-drift drift.last=3", {"bundle": "A", "overrides": ["drift.last=3"], "fail_on_drift": True}),
    ("evaluate evaluate.split=val", {"bundle": None, "overrides": ["evaluate.split=val"]}),
    ("evaluate --params p.yaml A ~logger", {"bundle": "A", "overrides": ["~logger"], "params": "p.yaml"}),
    ("evaluate lr=1/bundle", {"bundle": "lr=1/bundle", "overrides": []}),  # a path that exists
    ("register gs://b/lr=1 --reason 'lr=2 was worse'", {"bundle": "gs://b/lr=1", "reason": "lr=2 was worse"}),
    ("predict A --variant int8 'lr=1' b", {"bundle": "A", "texts": ["lr=1", "b"], "variant": "int8"}),
    ("runs --where optim.lr=1 A B", {"folders": ["A", "B"], "where": ["optim.lr=1"]}),
    ("log prune --days 3 serve.request_log=A", {"days": 3, "overrides": ["serve.request_log=A"]}),
])  # fmt: skip
def test_arguments_and_overrides_in_any_order(workdir, line, expected):
    (workdir / "lr=1/bundle").mkdir(parents=True)
    options = vars(parse(shlex.split(line))[1])
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize(
    "line", ["drift drift.last=3", "drift A B", "evaluate --nope", "log prune A", "runs compare", "drift --bundl A", "select"]
)
def test_arguments_that_are_not_understood(line, capsys):
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: sodaops ") and "Traceback" not in error


@pytest.mark.parametrize(("line", "expected"), [
    ("sodaops an", ["annotate"]),
    ("sodaops annotate me", ["merge"]),
    ("sodaops runs ", ["compare"]),
    ("sodaops nonsense ", []),
    ("sodaops select --dir", ["--direction"]),
    ("sodaops select --direction ", ["maximize", "minimize"]),
    ("sodaops predict A --file ", []),  # the shell completes the file
    ("sodaops predict A optim.l", []),  # it reads no configuration
    ("sodaops drift ", []),  # the bundle is a path
    ("sodaops drift A drift.la", ["drift.last="]),
    ("python train.py mod", ["model=", "model."]),
    (".venv/bin/python ./train.py model=t", ["model=tiny"]),
    ("python train.py -m model=tiny,dis", ["model=tiny,distilbert"]),
    ("python train.py optim.layer", ["optim.layer_decay="]),
    ("python train.py registry.gate.behaviour.fl", ["registry.gate.behaviour.floors."]),
    ("python train.py ++optim.lr", ["++optim.lr="]),
    ("python train.py evaluate.baselines=", ["evaluate.baselines=true", "evaluate.baselines=false"]),
    ("python train.py data.cleaning=", ["data.cleaning=minimal", "data.cleaning=social", "data.cleaning=letters"]),
    ("sodaops evaluate A evaluate.split=t", ["evaluate.split=train", "evaluate.split=test"]),
    ("python train.py export.variants=", []),  # a list
    ("python train.py trainer.barebones=", ["trainer.barebones=true", "trainer.barebones=false"]),
    ("python train.py run_dir=", []),
    ("sodaops config show model.poo", ["model.pooling"]),
    ("python train.py --config-dir own data=mi", ["data=mine"]),
    ("python train.py --mult", ["--multirun"]),
    ("python train.py 'open", []),
    ("python other.py mod", []),
])  # fmt: skip
def test_completions(workdir, line, expected):
    (workdir / "own/data").mkdir(parents=True)
    (workdir / "own/data/mine.yaml").touch()
    assert complete(line) == expected


def type_into(shell: list[str], setup: str, cases: list[tuple[str, str]]) -> None:
    """Types lines and Tab into a shell in a pseudo-terminal, and waits until it shows what is expected."""
    import pty
    import select

    reader, terminal = pty.openpty()
    programs = os.path.dirname(sys.executable)
    variables = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PS1": "$ ", "TERM": "dumb"}
    running = subprocess.Popen(
        shell, stdin=terminal, stdout=terminal, stderr=terminal, cwd=REPO, env=variables, start_new_session=True
    )
    os.close(terminal)
    try:
        for typed, expected in [(f"{setup}; echo ready$((1+1))\r", "ready2"), *cases]:
            os.write(reader, typed.encode())
            shown, deadline = "", time.monotonic() + 60
            while expected not in shown:
                assert time.monotonic() < deadline, (typed, shown)
                if select.select([reader], [], [], 1)[0]:
                    shown += os.read(reader, 65536).decode(errors="replace").replace("\a", "")
            assert "usage:" not in shown
            os.write(reader, b"\x15")  # deletes the line
    finally:
        running.kill()
        running.wait()
        with contextlib.suppress(OSError):
            os.close(reader)


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
@pytest.mark.parametrize(("shell", "setup"), [
    (["bash", "--norc", "--noprofile", "-i"], 'eval "$(sodaops completion bash)"'),
    (["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(sodaops completion zsh)"'),
], ids=["bash", "zsh"])  # fmt: skip
def test_completion_in_a_terminal(shell, setup):
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    type_into(shell, setup, [
        ("sodaops annot\t", "sodaops annotate "),
        ("sodaops annotate imp\t", "import "),
        ("sodaops select --dir\t", "--direction "),
        ("python train.py model=ti\t", "model=tiny "),
        ("python train.py trainer.max_e\t", "trainer.max_epochs="),
        ("sodaops predict CHANGE\t", "CHANGELOG.md"),  # a file
        ("sodaops preprocess data.path=CHANGE\t", "data.path=CHANGELOG.md"),
    ])  # fmt: skip


def test_no_such_shell():
    for words in (["completion", "fish"], ["complete", "bash"]):
        with pytest.raises(ConfigError, match="completion"):
            parse(words)
