"""What the schemas for GitHub's files cannot check: pins, rights, limits, and commands that name what exists."""

import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from tests.commands import TARGETS, faults as command_faults
from tests.conftest import REPO

WORKFLOWS = sorted((REPO / ".github/workflows").glob("*.yml"))
FILES = [*WORKFLOWS, *sorted((REPO / ".github/actions").glob("*/action.yml"))]
NAMES = {"lint", "tests", "deep", "smoke", "images", "docs", "release", "data", "champion", "drift"}
# Beyond reading the repository's files. id-token is the workflow's own identity, for a registry or a cloud that trusts it.
RIGHTS = {
    ("docs", "deploy"): {"pages": "write", "id-token": "write"},
    ("release", "github"): {"contents": "write"},
    ("release", "pypi"): {"id-token": "write"},
    ("champion", "deploy"): {"contents": "read", "id-token": "write"},
    ("drift", "look"): {"contents": "read", "id-token": "write"},
}


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(tree):
    jobs = tree["jobs"].values() if "jobs" in tree else [tree["runs"]]
    return [step for job in jobs for step in job["steps"]]


def all_steps():
    """(file, step) of every workflow and action."""
    return [(path.relative_to(REPO).as_posix(), step) for path in FILES for step in steps(read(path))]


def test_the_workflows_exist():
    assert {path.stem for path in WORKFLOWS} == NAMES


def test_actions_are_pinned_by_hash_with_the_version_beside_it():
    faults, pins = [], defaultdict(set)
    for path in FILES:
        uses = re.findall(r"^\s*(?:- )?uses: *(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert len(uses) == sum("uses" in step for step in steps(read(path))), path
        for use in uses:
            name, _, pin = use.partition("@")
            pins[name].add(pin)
            if use.startswith("./"):
                valid = (REPO / use / "action.yml").is_file()
            else:
                valid = re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)
            faults += [] if valid else [f"{path}: {use}"]
    faults += [f"{name} has several versions: {versions}" for name, versions in pins.items() if len(versions) > 1]
    assert len(pins) > 5 and faults == []


def test_rights_limits_and_triggers():
    faults = []
    for path in WORKFLOWS:
        tree = read(path)
        triggers = tree[True]  # YAML 1.1 reads `on` as true
        if tree["permissions"] != {} or not {"group", "cancel-in-progress"} <= {*tree["concurrency"]}:
            faults.append(f"{path.stem}: permissions or concurrency")
        if {"pull_request_target", "workflow_run"} & {*triggers}:
            faults.append(f"{path.stem}: a trigger that runs with this repository's rights")
        for name, job in tree["jobs"].items():
            if not 0 < job["timeout-minutes"] <= 120:
                faults.append(f"{path.stem}.{name}: timeout-minutes")
            if job["permissions"] != RIGHTS.get((path.stem, name), {"contents": "read"}):
                faults.append(f"{path.stem}.{name}: {job['permissions']}")
    assert faults == []


def test_no_secret_and_no_text_from_outside_in_a_script():
    words = ("secrets.", "credentials_json", "set -x")
    faults = [f"{path}: {word}" for path in FILES for word in words if word in path.read_text(encoding="utf-8")]
    for name, step in all_steps():
        script = step.get("run", "")
        if "${{" in script:
            faults.append(f"{name}: {script}: pass the value through env")
        if re.search(r"(echo|printf|print-access-token).*(TOKEN|KEY|PASSWORD)", script):
            faults.append(f"{name}: prints a secret: {script}")
        if step.get("uses", "").startswith("actions/checkout@") and step["with"]["persist-credentials"] is not False:
            faults.append(f"{name}: persist-credentials")
    assert faults == []


def test_scripts_name_what_exists():
    pattern = r"(?:^|[\s(])((?:make|\.venv/bin/sodaops|python3? \S+\.py) [^|&;)>\n]+)"
    commands = [
        (name, command)
        for name, step in all_steps()
        for command in re.findall(pattern, step.get("run", "").replace("\\\n", " "))
    ]
    with_command = {Path(name).stem for name, _ in commands}
    assert with_command >= NAMES
    assert [f"{name}: {fault}" for name, command in commands for fault in command_faults(command)] == []


def test_the_matrix_is_whole():
    jobs = read(REPO / ".github/workflows/tests.yml")["jobs"]
    matrix = jobs["fast"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert any(step.get("run") == "make coverage" for step in jobs["whole"]["steps"])
    deep = read(REPO / ".github/workflows/deep.yml")
    assert deep[True]["schedule"] and any(step.get("run") == "make test-deep" for _, step in all_steps())


@pytest.mark.parametrize(("workflow", "job"), [("champion", "deploy"), ("drift", "look")])
def test_a_missing_variable_is_refused_before_anything_else(workflow, job):
    first = read(REPO / f".github/workflows/{workflow}.yml")["jobs"][job]["steps"][0]
    names = [*first["env"]]
    assert len(names) > 2 and all(re.fullmatch(r"\$\{\{ .*vars\..* \}\}", value) for value in first["env"].values())

    def run(values):
        bare = {"PATH": os.environ["PATH"], "GITHUB_OUTPUT": os.devnull}
        return subprocess.run(["bash", "-e", "-c", first["run"]], env=bare | values, capture_output=True, text=True)

    assert run(dict.fromkeys(names, "x")).returncode == 0
    for name in names:
        refused = run(dict.fromkeys(names, "x") | {name: ""})
        assert refused.returncode == 1 and name in refused.stdout and not re.search(r"Error(?!s)|unbound", refused.stderr)


def test_hooks_are_the_same_commands():
    (local,) = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    lints = {target for target in TARGETS if target.startswith("lint-")} - {"lint-faults"}
    assert local["repo"] == "local" and len(lints) > 6
    assert {hook["entry"] for hook in local["hooks"]} == {f"make {target}" for target in lints}
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in local["hooks"])
    assert {"make lint"} == {step["run"] for step in steps(read(REPO / ".github/workflows/lint.yml")) if "run" in step}


def test_dependabot_looks_at_all_that_is_pinned():
    updates = yaml.safe_load((REPO / ".github/dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions", "docker"}
    actions = next(update for update in updates if update["package-ecosystem"] == "github-actions")
    ours = [f"/{path.parent.relative_to(REPO)}" for path in FILES if path.name == "action.yml"]
    assert actions["directories"] == ["/", *ours]
