"""Checks Cloud Build files for what the published schema misses: unknown names, and values of one account.

python cloudbuild/lint.py [FILE …]; it needs PyYAML, so it runs in the project's environment and not in a build.
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
    """Faults of a build's configuration.

    >>> faults("steps: [{name: a, id: x, waitFor: [y], arg: []}]")
    ["step x: unknown field 'arg'", 'step x: waits for y, which is no earlier step']
    """
    build = yaml.safe_load(text)
    problems = [f"unknown field {name!r} at the top level" for name in build if name not in TOP]
    return [*problems, *_steps(build.get("steps") or []), *_substitutions(build), *_literals(build)]


def _steps(steps: list[dict[str, Any]]) -> Iterator[str]:
    earlier = {"-"}
    for number, step in enumerate(steps, 1):
        name = f"step {step.get('id', number)}"
        yield from (f"{name}: unknown field {key!r}" for key in step if key not in STEP)
        if not step.get("name"):
            yield f"{name}: has no name (its image)"
        missing = [other for other in step.get("waitFor", []) if other not in earlier]
        yield from (f"{name}: waits for {other}, which is no earlier step" for other in missing)
        if step.get("id") in earlier:
            yield f"{name}: its id is used twice"
        earlier.add(step.get("id", ""))


def _substitutions(build: dict[str, Any]) -> Iterator[str]:
    defaults = build.get("substitutions") or {}
    used = {name for text in _texts(build) for name in re.findall(r"(?<!\$)\$\{?([A-Z_][A-Z0-9_]*)\}?", text)}
    yield from (f"{name} is used and has no default" for name in sorted(used - set(defaults) - BUILT_IN))
    yield from (f"{name} is never used" for name in sorted(set(defaults) - used))
    yield from (f"{name}: {value!r} is not a string" for name, value in defaults.items() if not isinstance(value, str))
    refers = any("$" in str(value) for value in defaults.values())
    if refers and not (build.get("options") or {}).get("dynamicSubstitutions"):
        yield "substitutions use others, so options.dynamicSubstitutions must be true"


def _literals(build: dict[str, Any]) -> Iterator[str]:
    for text in _texts(build):
        yield from (f"{text!r}: contains {kind}" for kind, pattern in LITERALS.items() if re.search(pattern, text))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(part)


def main(names: Sequence[str]) -> int:
    """Prints the faults of each file; returns 1 if there are any."""
    paths = [Path(name) for name in names] or sorted(Path(__file__).parent.glob("*.yaml"))
    problems = [f"{path}: {fault}" for path in paths for fault in faults(path.read_text(encoding="utf-8"))]
    print("\n".join(problems) or f"{len(paths)} files: no faults")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
