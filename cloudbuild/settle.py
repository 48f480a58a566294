"""The last step: undoes the promotion if the deployment failed, so that the registry's champion is what serves.

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
    parser.add_argument("--done", required=True, type=Path, help="the file that deploy.py writes when it moves the traffic")
    parser.add_argument("--registry", required=True)
    return parser.parse_args(given)


def undo_promotion(release: dict[str, Any], registry: str) -> None:
    """Rolls the registry back if its champion is still the one of this release; otherwise prints why not.

    Args:
        release: the contents of the file that gate.py wrote.
        registry: its path.
    """
    version, before, path = release["version"], release["before"], f"registry.path={registry}"
    done = subprocess.run(["sodaops", "registry", "list", "--json", path], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        warn(f"The registry could not be read and was not changed; before this build its champion was {before}.")
        return
    champion = json.loads(done.stdout)["aliases"].get("champion")
    if champion != version:
        warn(f"The registry's champion is {champion}, not the one of this build, so it stays.")
    elif before == version:
        warn(f"{version} was champion before this build and stays champion.")
    elif before is None:
        warn(f"{version} stays champion without serving, because there was none before it; see docs/google_cloud.md.")
    elif subprocess.run(["sodaops", "rollback", path, "--reason=it was not deployed"], check=False).returncode:
        warn(f"The registry's champion is still {version}: the rollback failed.")


def main(given: Sequence[str]) -> int:
    """Returns 0 if the release was deployed, else 1."""
    options = arguments(given)
    release = json.loads(options.release.read_text(encoding="utf-8"))
    if not options.done.is_file():
        warn(f"error: {release['version']} was not deployed; see the step deploy")
        undo_promotion(release, options.registry)
        return 1
    done = json.loads(options.done.read_text(encoding="utf-8"))
    if done["good"]:
        print(f"{done['revision']} serves {release['version']}")
        return 0
    warn(
        f"error: {done['revision']} may have the traffic, so the registry's champion stays {release['version']}. Look at the "
        "service, then run make gcp-rollback and sodaops rollback, or neither."
    )
    return 1


if __name__ == "__main__":
    run_step(main)
