"""What the published schema of Cloud Build's files lets pass: names that do not exist, and values that belong to one account.

python cloudbuild/lint.py [FILE …]; it needs PyYAML, and so runs with the project and not in a build.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

TOP = {
    "steps", "timeout", "queueTtl", "logsBucket", "options", "substitutions", "tags", "serviceAccount", "availableSecrets",
    "artifacts", "images",
}  # fmt: skip
STEP = {
    "name", "args", "env", "allowFailure", "allowExitCodes", "dir", "id", "waitFor", "entrypoint", "secretEnv", "volumes",
    "timeout", "script", "automapSubstitutions", "results",
}  # fmt: skip
BUILT_IN = {
    "PROJECT_ID", "PROJECT_NUMBER", "LOCATION", "BUILD_ID", "TRIGGER_NAME", "COMMIT_SHA", "SHORT_SHA", "REVISION_ID",
    "REPO_NAME", "REPO_FULL_NAME", "BRANCH_NAME", "TAG_NAME", "REF_NAME",
}  # fmt: skip
LITERALS = {
    "a region": r"\b(africa|asia|australia|europe|me|northamerica|southamerica|us)-[a-z]+\d+\b",
    "a bucket": r"gs://(?!\$)",
    "a project": r"\bprojects/(?!\$)",
    "an account": r"[\w.-]+@[\w-]+\.[\w.-]+",
    "a secret": r"\b(AIza[\w-]{30,}|ya29\.[\w-]+|[0-9a-f]{40}|-----BEGIN)",
}


def faults(text: str) -> list[str]:
    """What is wrong with a build's configuration.

    >>> faults("steps: [{name: a, id: x, waitFor: [y], arg: []}]")
    ["step x: no field 'arg'", 'step x: waits for y, which is no step before it']
    """
    build = yaml.safe_load(text)
    found = [f"no field {name!r} at the top" for name in build if name not in TOP]
    return [*found, *_steps(build.get("steps") or []), *_substitutions(build), *_literals(build)]


def _steps(steps: list[dict[str, Any]]) -> Iterator[str]:
    before = {"-"}
    for number, step in enumerate(steps, 1):
        name = f"step {step.get('id', number)}"
        yield from (f"{name}: no field {key!r}" for key in step if key not in STEP)
        if not step.get("name"):
            yield f"{name}: has no name, the image that it runs in"
        lost = [other for other in step.get("waitFor", []) if other not in before]
        yield from (f"{name}: waits for {other}, which is no step before it" for other in lost)
        if step.get("id") in before:
            yield f"{name}: a second step of this id"
        before.add(step.get("id", ""))


def _substitutions(build: dict[str, Any]) -> Iterator[str]:
    given = build.get("substitutions") or {}
    used = {name for text in _texts(build) for name in re.findall(r"(?<!\$)\$\{?([A-Z_][A-Z0-9_]*)\}?", text)}
    yield from (f"{name} is used and has no default" for name in sorted(used - set(given) - BUILT_IN))
    yield from (f"{name} is never used" for name in sorted(set(given) - used))
    yield from (f"{name}: {value!r} is no text" for name, value in given.items() if not isinstance(value, str))
    refers = any("$" in str(value) for value in given.values())
    if refers and not (build.get("options") or {}).get("dynamicSubstitutions"):
        yield "substitutions refer to others, so options.dynamicSubstitutions must be true"


def _literals(build: dict[str, Any]) -> Iterator[str]:
    for text in _texts(build):
        yield from (f"{text!r}: has {what} in it" for what, form in LITERALS.items() if re.search(form, text))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(part)


def main(given: Sequence[str]) -> int:
    """Prints what is wrong with each file; exit code 1 then."""
    paths = [Path(name) for name in given] or sorted(Path(__file__).parent.glob("*.yaml"))
    found = [f"{path}: {fault}" for path in paths for fault in faults(path.read_text(encoding="utf-8"))]
    print("\n".join(found) or f"{len(paths)} files: nothing to say")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
