"""The last step: takes the promotion back when the deployment did not come to its end, so that the registry says what serves.

It runs in the train image: python cloudbuild/settle.py --release=FILE --done=FILE --registry=gs://BUCKET/registry
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The step's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", required=True, type=Path)
    parser.add_argument("--done", required=True, type=Path, help="what deploy.py writes when traffic has moved")
    parser.add_argument("--registry", required=True)
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Exit code 0 if it was deployed, else 1."""
    asked = arguments(given)
    if asked.done.is_file():
        print(asked.done.read_text(encoding="utf-8").strip())
        return 0
    release = json.loads(asked.release.read_text(encoding="utf-8"))
    print(f"error: {release['version']} was not deployed; the step before this one says why", file=sys.stderr)
    if release["promoted"]:
        command = ["sodaops", "rollback", f"registry.path={asked.registry}", "--reason=the deployment failed"]
        if subprocess.run(command, check=False).returncode:
            print("The registry's champion is still that version; see above.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
