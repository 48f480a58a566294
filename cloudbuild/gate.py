"""Registers a trained bundle, promotes it through the gate, and writes what to deploy.

It runs in the train image: python cloudbuild/gate.py --bundle=gs://… --registry=gs://… --reports=gs://… --release=FILE
Exit code 3: the gate refused the model. The build ends and the service stays as it is.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cloud import run_step, undo_on_failure
from settle import undo_promotion


def sodaops(*command: str) -> str:
    """Runs a sodaops command and prints its output; exits with its code if it fails."""
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
    parser.add_argument("--reports", required=True, help="folder for the gate's report")
    parser.add_argument("--release", required=True, type=Path, help="the file to write")
    parser.add_argument("--reason", default="", help="for the history")
    parser.add_argument("--args", default="", help="arguments of the training, so that the data are the same")
    parser.add_argument("--gate", default="", help="keys of registry.gate, as in a shell")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Makes the same splits, registers, writes the release, and promotes."""
    options = arguments(given)
    registry, reason = f"registry.path={options.registry}", f"--reason={options.reason}"
    trained = shlex.split(options.args)
    before = json.loads(sodaops("registry", "list", "--json", registry))["aliases"].get("champion")
    sodaops("preprocess", *trained)
    version = sodaops("register", options.bundle, registry, reason).partition(":")[0]
    release = {"version": version, "bundle": sodaops("resolve", version, registry), "before": before}
    options.release.write_text(json.dumps(release) + "\n", encoding="utf-8")
    if before == version:
        print(f"{version} is champion already; it is deployed with this commit's code")
        return 0
    rules = [f"registry.report_dir={options.reports}", *shlex.split(options.gate)]
    with undo_on_failure(lambda: undo_promotion(release, options.registry)):  # promote may fail after it changed the champion
        sodaops("promote", version, *trained, registry, reason, *rules)
    return 0


if __name__ == "__main__":
    run_step(main)
