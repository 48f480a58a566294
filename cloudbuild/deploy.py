"""Deploys to Cloud Run: a new revision without traffic, a smoke test of it alone, then traffic; what fails leaves the old one.

python3 cloudbuild/deploy.py serve --service=sodaops --region=… --project=… --image=… --tag=COMMIT --release=FILE …
python3 cloudbuild/deploy.py drift --service=sodaops-drift …
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cloud import StepError, ask, gcloud, reason, run_step, tell, undone_by, warn
from smoke import Smoke, drift_answers, predictor_answers

# Google's collector, which takes /metrics of port 8080 to Cloud Monitoring as the secret says.
COLLECTOR = "us-docker.pkg.dev/cloud-ops-agents-artifacts/cloud-run-gmp-sidecar/cloud-run-gmp-sidecar:1.2.0"
PREVIOUS = "sodaops-previous"  # label of a revision: which one had the traffic when it was deployed


class Service:
    """A Cloud Run service of one name, whose revisions come and go."""

    def __init__(self, name: str, region: str, project: str) -> None:
        self.name = name
        self.where = [f"--region={region}", f"--project={project}"]

    def status(self) -> dict[str, Any]:
        """Its ``status``: url, and traffic by revision and tag."""
        look = ["run", "services", "describe", self.name, *self.where, "--format=json"]
        answer = ask(look)
        if answer.missing:
            raise StepError(f"{self.name}: there is no such service in this region; `make gcp-apply` makes it.")
        if answer.code:
            raise StepError(reason(look, answer))
        return json.loads(answer.out)["status"]

    def traffic(self) -> dict[str, int]:
        """Percent of each revision that has any.

        Raises:
            StepError: none has.
        """
        found: dict[str, int] = {}
        for target in self.status().get("traffic", []):
            if target.get("percent"):
                found[target["revisionName"]] = found.get(target["revisionName"], 0) + target["percent"]
        if not found:
            raise StepError(f"{self.name}: no revision has traffic; see `gcloud run services describe {self.name}`.")
        return found

    def tagged(self, tag: str = "", revision: str = "") -> dict[str, Any]:
        """A revision that has a tag, and so a URL of its own; empty: none is of that tag, or that name."""
        targets = [target for target in self.status()["traffic"] if target.get("tag")]
        return next((target for target in targets if tag == target["tag"] or revision == target["revisionName"]), {})

    def deploy(self, flags: Sequence[str]) -> None:
        """A new revision."""
        gcloud(["run", "deploy", self.name, *self.where, *flags])

    def move(self, traffic: dict[str, int]) -> None:
        """Gives revisions their percent of the traffic."""
        shares = ",".join(f"{revision}={percent}" for revision, percent in traffic.items())
        gcloud(["run", "services", "update-traffic", self.name, *self.where, f"--to-revisions={shares}"])

    def label(self, revision: str, name: str) -> str:
        """A label of a revision; empty where it has none."""
        look = ["run", "revisions", "describe", revision, *self.where, f"--format=value(metadata.labels.{name})"]
        return gcloud(look)


def release(
    service: Service, flags: Sequence[str], tag: str, works: Callable[[str, str], None], done: Path | None = None
) -> None:
    """Deploys, tries, and moves the traffic.

    Args:
        service: an existing one.
        flags: of `gcloud run deploy`, from the image on.
        tag: the new revision's.
        works: the smoke test, of a URL and the audience of its token; raises StepError.
        done: see ``shift``.

    Raises:
        StepError: it did not come to its end; the traffic is where it was.
    """
    old = service.traffic()
    stays = f"{service.name}: traffic stays on {', '.join(old)}"
    first = ["--no-traffic", f"--tag={tag}", f"--update-labels={PREVIOUS}={max(old, key=lambda name: old[name])}"]
    try:
        service.deploy([*first, *flags])
        new, audience = service.tagged(tag), service.status()["url"]
        if not new:
            raise StepError(f"{service.name}: has no revision with the tag {tag}, which was just deployed.")
        tell(f"{new['revisionName']}: deployed without traffic, at {new['url']}")
    except StepError as error:
        raise StepError(f"{error}\n{stays}; there is no new revision.") from None
    revision = new["revisionName"]
    try:
        works(new["url"], audience)
    except StepError as error:
        raise StepError(
            f"{error}\n{stays}. {revision} failed its smoke test; look at it at {new['url']} (tag {tag})."
        ) from None
    shift(service, old, revision, lambda: works(audience, audience), done)
    tell(f"{revision}: has the traffic of {audience}; before it: {', '.join(old)}")
    _forget_tags(service, {revision, *old})


def shift(service: Service, old: dict[str, int], new: str, works: Callable[[], None], done: Path | None = None) -> None:
    """Moves the traffic to one revision and tries the service; what fails or stops it brings the traffic back.

    Args:
        service: whose.
        old: who must have the traffic before.
        new: the revision.
        works: the smoke test of the service.
        done: a file that says which revision got the traffic, and whether well; it is not there where the old ones have it.

    Raises:
        StepError: somebody else moved the traffic meanwhile, or this did not come to its end.
    """
    now = service.traffic()
    if now != old:
        raise StepError(
            f"{service.name}: somebody else moved the traffic meanwhile, from {_percents(old)} to {_percents(now)}, so it was "
            "left there. Start again when that is settled."
        )

    def back() -> None:
        try:
            service.move(old)
        except StepError as worse:
            warn(f"{worse}\n{service.name}: {new} may have the traffic; see to it by hand.")
            return
        if done:
            done.unlink()
        warn(f"{service.name}: traffic is back on {_percents(old)}; {new} has none.")

    if done:
        _write(done, new, good=False)
    with undone_by(back):
        service.move({new: 100})
        works()
        if done:
            _write(done, new, good=True)


def _write(done: Path, revision: str, good: bool) -> None:
    done.write_text(json.dumps({"revision": revision, "good": good}) + "\n", encoding="utf-8")


def _percents(traffic: dict[str, int]) -> str:
    return ", ".join(f"{revision} ({percent} %)" for revision, percent in traffic.items())


def _forget_tags(service: Service, keep: set[str]) -> None:
    """Takes the tags of older revisions away, so that Cloud Run may delete them some day; no release fails by that."""
    try:
        targets = service.status()["traffic"]
        old = [target["tag"] for target in targets if target.get("tag") and target["revisionName"] not in keep]
        if old:
            gcloud(["run", "services", "update-traffic", service.name, *service.where, f"--remove-tags={','.join(old)}"])
    except StepError as error:
        tell(f"warning: older tags stay: {error}")


def serve_flags(asked: argparse.Namespace, bundle: str) -> list[str]:
    """The predictor. Its bundle is a version and no alias, so that code and model come and go together."""
    variables = {
        "SODAOPS_BUNDLE": bundle, "SODAOPS_RELOAD_S": "null", "SODAOPS_HOST": "0.0.0.0", "SODAOPS_PORT": "8080",
        "SODAOPS_REQUEST_LOG": asked.requests, "SODAOPS_JOURNAL_DIR": "/tmp/journal",
        "SODAOPS_MAX_JOURNAL_BYTES": str(64 * 2**20),  # the file system of an instance is its memory
    }  # fmt: skip
    secrets = [f"--set-secrets=SODAOPS_API_KEYS={asked.keys_secret}:latest"] if asked.keys_secret else ["--clear-secrets"]
    return [
        f"--service-account={asked.account}", "--execution-environment=gen2", "--no-cpu-throttling", "--cpu-boost",
        f"--min={asked.min_instances}", f"--max-instances={asked.max_instances}", "--concurrency=80", "--timeout=60",
        "--container=app", f"--image={asked.image}", "--port=8080", f"--cpu={asked.cpu}", f"--memory={asked.memory}",
        f"--set-env-vars={_joined(variables)}", *secrets,
        "--startup-probe=httpGet.path=/readyz,httpGet.port=8080,periodSeconds=5,timeoutSeconds=4,failureThreshold=24",
        "--container=metrics", f"--image={COLLECTOR}", "--depends-on=app",
        "--set-secrets=/etc/rungmp/config.yaml=sodaops-metrics:latest",
    ]  # fmt: skip


def drift_flags(asked: argparse.Namespace) -> list[str]:
    """The drift service: it looks when it starts and when the scheduler calls, and sleeps before its own schedule comes."""
    variables = {
        "SODAOPS_DRIFT_BUNDLE": asked.bundle, "SODAOPS_DRIFT_REQUEST_LOG": asked.requests, "SODAOPS_DRIFT_EVERY_S": "86400",
        "SODAOPS_DRIFT_HOST": "0.0.0.0", "SODAOPS_DRIFT_PORT": "8080", "SODAOPS_DRIFT_OUTPUT_DIR": "/tmp/drift",
    }  # fmt: skip
    return [
        f"--service-account={asked.account}", "--execution-environment=gen2", "--min=0", "--max-instances=1", "--concurrency=4",
        "--timeout=600", "--container=app", f"--image={asked.image}", "--port=8080", f"--cpu={asked.cpu}",
        f"--memory={asked.memory}", f"--set-env-vars={_joined(variables)}",
    ]  # fmt: skip


def _joined(variables: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in variables.items())


def schedule(asked: argparse.Namespace, url: str) -> None:
    """A job of Cloud Scheduler that tells the drift service to look, with a token of its account."""
    where = [f"--location={asked.region}", f"--project={asked.project}"]
    look = ["scheduler", "jobs", "describe", asked.service, *where, "--format=value(name)"]
    answer = ask(look)
    if answer.code and not answer.missing:
        raise StepError(reason(look, answer))
    gcloud([
        "scheduler", "jobs", "create" if answer.missing else "update", "http", asked.service, *where,
        f"--schedule={asked.schedule}", f"--uri={url}/look", "--http-method=post", "--attempt-deadline=600s",
        "--max-retry-attempts=2", f"--oidc-service-account-email={asked.account}", f"--oidc-token-audience={url}",
    ])  # fmt: skip
    tell(f"{asked.service}: {url}/look is called on the schedule {asked.schedule!r} (UTC)")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The step's options; what has no default is given by the build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="what", required=True)
    serve, drift = verbs.add_parser("serve"), verbs.add_parser("drift")
    for verb in (serve, drift):
        for name in ("service", "region", "project", "image", "tag", "account", "requests"):
            verb.add_argument(f"--{name}", required=True)
        verb.add_argument("--cpu", default="1")
        verb.add_argument("--memory", default="1Gi")
        verb.add_argument("--smoke-s", type=float, default=180, help="for the smoke test to succeed")
    serve.add_argument("--release", type=Path, required=True, help="what gate.py wrote")
    serve.add_argument("--done", type=Path, required=True, help="a file that says who got the traffic, for settle.py")
    serve.add_argument("--keys-secret", default="", help="a secret with the service's API keys; empty: it has none")
    serve.add_argument("--min-instances", default="0")
    serve.add_argument("--max-instances", default="4")
    drift.add_argument("--bundle", required=True, help="whose reference")
    drift.add_argument("--schedule", default="*/30 * * * *", help="in UTC, as cron has it")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Deploys one of the two services."""
    asked = arguments(given)
    service, tag = Service(asked.service, asked.region, asked.project), f"c-{asked.tag}"
    if asked.what == "drift":
        release(service, drift_flags(asked), tag, lambda url, audience: drift_answers(Smoke(url, audience, asked.smoke_s)))
        schedule(asked, service.status()["url"])
        return 0
    told = json.loads(asked.release.read_text(encoding="utf-8"))
    key = key_of(asked.keys_secret, asked.project)

    def works(url: str, audience: str) -> None:
        predictor_answers(Smoke(url, audience, asked.smoke_s, key), told["version"])

    release(service, serve_flags(asked, told["bundle"]), tag, works, asked.done)
    return 0


def key_of(secret: str, project: str) -> str:
    """The first of the service's own keys, for the smoke test; it stays in this process's memory."""
    if not secret:
        return ""
    look = ["secrets", "versions", "access", "latest", f"--secret={secret}", f"--project={project}"]
    return gcloud(look).partition(",")[0].strip()


if __name__ == "__main__":
    run_step(main)
