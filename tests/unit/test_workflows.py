"""What the schemas of GitHub's files let pass: pins, rights, limits, and commands that name what there is."""

import os
import re
import subprocess
from collections import defaultdict

import pytest
import yaml

from tests.commands import TARGETS, faults
from tests.conftest import REPO

WORKFLOWS = sorted((REPO / ".github/workflows").glob("*.yml"))
FILES = [*WORKFLOWS, *sorted((REPO / ".github/actions").glob("*/action.yml"))]
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


def every(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(REPO / ".github")))


def test_what_the_issue_names_is_there():
    assert {path.stem for path in WORKFLOWS} >= {
        "lint", "tests", "smoke", "images", "docs", "release", "data", "champion", "drift",
    }  # fmt: skip


@every(FILES)
def test_actions_are_pinned_by_hash_with_the_version_beside_it(path):
    used = re.findall(r"^\s*(?:- )?uses:(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    theirs = [text.strip() for text in used if not text.strip().startswith("./")]
    assert len(used) == sum("uses" in step for step in steps(read(path)))
    for text in theirs:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", text), text
    for text in {*used} - {f" {text}" for text in theirs}:
        assert (REPO / text.strip() / "action.yml").is_file(), text


def test_an_action_has_one_version_everywhere():
    pins = defaultdict(set)
    for path in FILES:
        for name, pin in re.findall(r"uses: ([\w.-]+/[\w./-]+)@(.+)", path.read_text(encoding="utf-8")):
            pins[name].add(pin)
    assert len(pins) > 5 and all(len(found) == 1 for found in pins.values()), pins


@every(WORKFLOWS)
def test_rights_limits_and_triggers(path):
    tree = read(path)
    triggers = tree[True]  # YAML 1.1 reads `on` so
    assert tree["permissions"] == {} and "group" in tree["concurrency"] and "cancel-in-progress" in tree["concurrency"]
    assert not {"pull_request_target", "workflow_run"} & {*triggers}
    for name, job in tree["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 120, name
        assert job["permissions"] == RIGHTS.get((path.stem, name), {"contents": "read"}), name


@every(FILES)
def test_no_secret_and_no_text_from_outside_in_a_script(path):
    text = path.read_text(encoding="utf-8")
    assert "secrets." not in text and "credentials_json" not in text and "set -x" not in text
    for step in steps(read(path)):
        script = step.get("run", "")
        assert "${{" not in script, f"{script}: give it through env"
        assert not re.search(r"(echo|printf|print-access-token).*(TOKEN|KEY|PASSWORD)", script), script
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@every(FILES)
def test_scripts_name_what_there_is(path):
    scripts = [step["run"] for step in steps(read(path)) if "run" in step]
    pattern = r"(?:^|[\s(])((?:make|\.venv/bin/sodaops|python3? \S+\.py) [^|&;)>\n]+)"
    commands = [found for script in scripts for found in re.findall(pattern, script.replace("\\\n", " "))]
    assert commands or path.stem not in ("lint", "tests", "smoke", "images", "docs", "release", "data", "champion", "drift")
    assert [fault for command in commands for fault in faults(command)] == []


def test_the_whole_matrix_is_there():
    jobs = read(REPO / ".github/workflows/tests.yml")["jobs"]
    matrix = jobs["fast"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert any(step.get("run") == "make coverage" for step in jobs["whole"]["steps"])


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
    lints = {target for target in TARGETS if target.startswith("lint-")}
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
