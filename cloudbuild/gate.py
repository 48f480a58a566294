"""Registers a trained bundle and lets the gate judge it; says what is to be deployed.

It runs in the train image: python cloudbuild/gate.py --bundle=gs://… --registry=gs://… --reports=gs://… --release=FILE
Exit code 3: the gate refused the model. The build ends there, and what serves goes on.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cloud import run_step, undone_by
from settle import take_back


def sodaops(*command: str) -> str:
    """Runs a verb, shows what it says, and ends as it ends if it fails."""
    print(f"$ {shlex.join(['sodaops', *command])}", flush=True)
    done = subprocess.run(["sodaops", *command], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip()


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The step's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--registry", required=True)
    parser.add_argument("--reports", required=True, help="where the gate's page goes")
    parser.add_argument("--release", required=True, type=Path, help="the file to write")
    parser.add_argument("--reason", default="", help="for the history")
    parser.add_argument("--args", default="", help="those of the training, so that the data are the same")
    parser.add_argument("--gate", default="", help="keys of registry.gate, as one would type them")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Splits the data anew (the same rows, by their hash), registers, judges, and writes the release."""
    asked = arguments(given)
    registry, why = f"registry.path={asked.registry}", f"--reason={asked.reason}"
    trained = shlex.split(asked.args)
    before = json.loads(sodaops("registry", "list", "--json", registry))["aliases"].get("champion")
    sodaops("preprocess", *trained)
    version = sodaops("register", asked.bundle, registry, why).partition(":")[0]
    release = {"version": version, "bundle": sodaops("resolve", version, registry), "before": before}
    asked.release.write_text(json.dumps(release) + "\n", encoding="utf-8")
    if before == version:
        print(f"{version} is champion already: nothing to judge, it is deployed with this commit's code")
        return 0
    rules = [f"registry.report_dir={asked.reports}", *shlex.split(asked.gate)]
    with undone_by(lambda: take_back(release, asked.registry)):  # it may have been made champion, and then have failed
        sodaops("promote", version, *trained, registry, why, *rules)
    return 0


if __name__ == "__main__":
    run_step(main)
