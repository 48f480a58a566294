"""The first step of a build: checks its substitutions and reports all faults together.

python3 cloudbuild/check.py _REGION=europe-west1 _BUCKET=name _TAG=1a2b3c4
"""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence

# Substitution -> its pattern, and what it means.
FORMS = {
    "_REGION": (r"[a-z]+-[a-z]+\d+", "a region such as the one of the bucket"),
    "_BUCKET": (r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", "a bucket's name, without gs://"),
    "_TAG": (
        r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?",
        "a commit, set by a trigger; by hand $(git rev-parse --short=7 HEAD)",
    ),
    "_REPLICAS": (r"[1-9]\d?", "machines that train together, 1 to 99"),
    "_ACCELERATOR_COUNT": (r"[1-9]\d?", "GPUs of each machine"),
    "_TRAIN_TIMEOUT_S": (
        r"[1-9]\d{1,3}|1\d{4}|2[0-4]\d{3}",
        "seconds, 10 to 24999, since the build itself ends after eight hours",
    ),
}
# Substitution -> the pattern of each argument in it. Flags such as --force and --multirun are not allowed.
ARGUMENTS = {
    "_TRAIN_ARGS": (r"[+~]*[a-z][\w./@]*=.*", "KEY=VALUE of sodaops train, such as trainer.max_epochs=3"),
    "_GATE_ARGS": (r"registry\.gate\.[\w.]+=.*", "KEY=VALUE of the gate, such as registry.gate.max_ece=0.1"),
}


def faults(pairs: Sequence[str]) -> list[str]:
    """Faults of ``NAME=VALUE`` pairs, one line each.

    >>> faults(["_REGION=", "_BUCKET=gs://b", "_TAG=1a2b3c4"])[0]
    '_REGION is missing: a region such as the one of the bucket'
    """
    problems: list[str] = []
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name in ARGUMENTS:
            problems += _arguments(name, value)
            continue
        form, meaning = FORMS[name]
        if not value:
            problems.append(f"{name} is missing: {meaning}")
        elif not re.fullmatch(form, value):
            problems.append(f"{name}={value}: expected {meaning}")
    return problems


def _arguments(name: str, value: str) -> Iterator[str]:
    form, meaning = ARGUMENTS[name]
    try:
        parts = shlex.split(value)
    except ValueError as error:
        yield f"{name}={value}: {error}; expected words quoted as in a shell, such as \"data.name='a b'\""
        return
    yield from (f"{name}={value}: {part!r}: expected {meaning}" for part in parts if not re.fullmatch(form, part, re.DOTALL))


def main(pairs: Sequence[str]) -> int:
    """Prints the faults; returns 2 if there are any."""
    problems = faults(pairs)
    if problems:
        names = ",".join(f"{line.split('=')[0].split()[0]}=…" for line in problems)
        print("\n".join(problems), f"Set them with --substitutions={names}, or in the trigger.", sep="\n", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
