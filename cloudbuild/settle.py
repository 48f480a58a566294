"""The last step: takes the promotion back when the deployment did not come to its end, so that the registry says what serves.

It runs in the train image: python cloudbuild/settle.py --release=FILE --done=FILE --registry=gs://BUCKET/registry
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloud import run_step, warn


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The step's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", required=True, type=Path)
    parser.add_argument("--done", required=True, type=Path, help="what deploy.py writes when it moves the traffic")
    parser.add_argument("--registry", required=True)
    return parser.parse_args(given)


def take_back(release: dict[str, Any], registry: str) -> None:
    """Rolls the registry back, where its champion is still the one that this release made; says what stands in the way.

    Args:
        release: what gate.py wrote.
        registry: its address.
    """
    version, before, path = release["version"], release["before"], f"registry.path={registry}"
    done = subprocess.run(["sodaops", "registry", "list", "--json", path], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        warn(f"The registry could not be read, so it is as it was; its champion was {before} before this build.")
        return
    champion = json.loads(done.stdout)["aliases"].get("champion")
    if champion != version:
        warn(f"The registry's champion is {champion}, which this build did not make, so it stays.")
    elif before == version:
        warn(f"{version} was champion before this build, and stays it.")
    elif before is None:
        warn(f"{version} stays champion, as there was none before it, and serves nowhere; see docs/google_cloud.md.")
    elif subprocess.run(["sodaops", "rollback", path, "--reason=it was not deployed"], check=False).returncode:
        warn(f"The registry's champion is still {version}; see above.")


def main(given: Sequence[str]) -> int:
    """Exit code 0 if it was deployed, else 1."""
    asked = arguments(given)
    release = json.loads(asked.release.read_text(encoding="utf-8"))
    if not asked.done.is_file():
        warn(f"error: {release['version']} was not deployed; the step before this one says why")
        take_back(release, asked.registry)
        return 1
    done = json.loads(asked.done.read_text(encoding="utf-8"))
    if done["good"]:
        print(f"{done['revision']} serves {release['version']}")
        return 0
    warn(
        f"error: {done['revision']} may have the traffic, so the registry's champion stays {release['version']}; see to it by "
        "hand: make gcp-rollback, then sodaops rollback, or neither."
    )
    return 1


if __name__ == "__main__":
    run_step(main)
