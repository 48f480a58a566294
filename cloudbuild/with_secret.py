"""Runs a command with secrets from Secret Manager in its environment, read with the machine's service account.

A Vertex AI job has no field for secrets, and its ``env`` is visible to everyone who can read the job. So the job runs this
file's text (`python -c`) with the secret's name.

python with_secret.py WANDB_API_KEY=projects/P/secrets/S/versions/latest sodaops train
"""

import base64
import json
import os
import sys
import urllib.error
import urllib.request

METADATA = "http://" + os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
SECRETS = os.environ.get("SECRET_MANAGER_ENDPOINT", "https://secretmanager.googleapis.com")


def read(url: str, headers: dict[str, str]) -> dict:
    """JSON from a URL."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return json.load(answer)


def main(rest: list[str]) -> None:
    """Replaces this process with the command, its environment extended."""
    wanted = []
    while rest and "=projects/" in rest[0]:
        wanted.append(rest.pop(0).split("=", 1))
    account = f"{METADATA}/computeMetadata/v1/instance/service-accounts/default/token"
    try:
        token = read(account, {"Metadata-Flavor": "Google"})["access_token"]
        for name, version in wanted:
            secret = read(f"{SECRETS}/v1/{version}:access", {"Authorization": f"Bearer {token}"})
            os.environ[name] = base64.b64decode(secret["payload"]["data"]).decode().strip()
    except urllib.error.HTTPError as error:
        fix = {
            403: "the job's account needs roles/secretmanager.secretAccessor on it",
            404: "add a version: gcloud secrets versions add NAME --data-file=-",
        }
        sys.exit(f"error: {wanted}: HTTP {error.code}; {fix.get(error.code, 'try again')}.")
    except OSError as error:
        sys.exit(f"error: {wanted}: could not be read ({error}); this works only on Google Cloud.")
    os.execvp(rest[0], rest)


if __name__ == "__main__":
    main(sys.argv[1:])
