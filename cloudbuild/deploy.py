"""Deploys to Cloud Run: tests a new revision before it gets the traffic. After a failure the old revision serves.

python3 cloudbuild/deploy.py serve --service=sodaops --region=… --project=… --image=… --tag=COMMIT --release=FILE …
python3 cloudbuild/deploy.py drift --service=sodaops-drift …
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cloud import StepError, ask, explain_failure, gcloud, log, run_step, undo_on_failure, warn
from smoke import Smoke, check_drift, check_predictor

# Google's collector sends /metrics to Cloud Monitoring. The secret sodaops-metrics holds its configuration.
COLLECTOR = "us-docker.pkg.dev/cloud-ops-agents-artifacts/cloud-run-gmp-sidecar/cloud-run-gmp-sidecar:1.2.0"
PROXIES = '["169.254.0.0/16"]'  # Cloud Run's proxy is link-local; it puts the client's address into X-Forwarded-For
PREVIOUS = "sodaops-previous"  # label on a revision that names the revision with the traffic before it


class Service:
    """A Cloud Run service."""

    def __init__(self, name: str, region: str, project: str) -> None:
        self.name = name
        self.where = [f"--region={region}", f"--project={project}"]

    def status(self) -> dict[str, Any]:
        """The service's ``status`` from gcloud: URL, and traffic by revision and tag."""
        look = ["run", "services", "describe", self.name, *self.where, "--format=json"]
        result = ask(look)
        if result.missing:
            raise StepError(f"{self.name}: there is no such service in this region; create it with `make gcp-apply`.")
        if result.code:
            raise StepError(explain_failure(look, result))
        return json.loads(result.stdout)["status"]

    def traffic(self) -> dict[str, int]:
        """The percentage of the traffic per revision.

        Raises:
            StepError: no revision has traffic.
        """
        shares: dict[str, int] = {}
        for target in self.status().get("traffic", []):
            if target.get("percent"):
                shares[target["revisionName"]] = shares.get(target["revisionName"], 0) + target["percent"]
        if not shares:
            raise StepError(f"{self.name}: no revision has traffic; see `gcloud run services describe {self.name}`.")
        return shares

    def tagged(self, tag: str = "", revision: str = "") -> dict[str, Any]:
        """The tagged traffic target (which has its own URL) with this tag or revision; empty if there is none."""
        targets = [target for target in self.status()["traffic"] if target.get("tag")]
        return next((target for target in targets if tag == target["tag"] or revision == target["revisionName"]), {})

    def deploy(self, flags: Sequence[str]) -> None:
        """Creates a revision."""
        gcloud(["run", "deploy", self.name, *self.where, *flags])

    def move(self, traffic: dict[str, int]) -> None:
        """Sets the percentage of the traffic per revision."""
        shares = ",".join(f"{revision}={percent}" for revision, percent in traffic.items())
        gcloud(["run", "services", "update-traffic", self.name, *self.where, f"--to-revisions={shares}"])

    def label(self, revision: str, name: str) -> str:
        """The value of a revision's label; empty if it has none."""
        look = ["run", "revisions", "describe", revision, *self.where, f"--format=value(metadata.labels.{name})"]
        return gcloud(look)


def release(
    service: Service, flags: Sequence[str], tag: str, smoke_test: Callable[[str, str], None], done: Path | None = None
) -> None:
    """Deploys a revision, tests it, and moves the traffic to it.

    Args:
        service: an existing service.
        flags: options of `gcloud run deploy`.
        tag: the new revision's tag.
        smoke_test: takes a URL and the audience of the identity token; raises StepError if the test fails.
        done: see ``move_traffic``.

    Raises:
        StepError: the release failed; the message says which revision has the traffic.
    """
    old = service.traffic()
    stays = f"{service.name}: the traffic stays on {', '.join(old)}"
    first = ["--no-traffic", f"--tag={tag}", f"--update-labels={PREVIOUS}={max(old, key=lambda name: old[name])}"]
    try:
        service.deploy([*first, *flags])
        new, audience = service.tagged(tag), service.status()["url"]
        if not new:
            raise StepError(f"{service.name}: no revision has the tag {tag} after the deployment.")
        log(f"{new['revisionName']}: deployed without traffic at {new['url']}")
    except StepError as error:
        raise StepError(f"{error}\n{stays}; the new revision was not deployed.") from None
    revision = new["revisionName"]
    try:
        smoke_test(new["url"], audience)
    except StepError as error:
        raise StepError(f"{error}\n{stays}. {revision} failed its smoke test; see {new['url']} (tag {tag}).") from None
    move_traffic(service, old, revision, lambda: smoke_test(audience, audience), done)
    log(f"{revision} now has the traffic of {audience}; before: {', '.join(old)}")
    _remove_old_tags(service, {revision, *old})


def move_traffic(
    service: Service, old: dict[str, int], new: str, smoke_test: Callable[[], None], done: Path | None = None
) -> None:
    """Moves the traffic to one revision and tests the service; after a failure or a signal moves the traffic back.

    Args:
        service: the service.
        old: the expected current traffic.
        new: the revision to move it to.
        smoke_test: raises StepError if the test fails.
        done: a file to write for settle.py: the revision, and whether its test passed. Deleted if the traffic is moved back.

    Raises:
        StepError: the traffic is not as expected, or the test failed.
    """
    now = service.traffic()
    if now != old:
        raise StepError(
            f"{service.name}: the traffic was changed during the build, from {_percents(old)} to {_percents(now)}. It stays "
            "there; run the build again."
        )

    def back() -> None:
        try:
            service.move(old)
        except StepError as error:
            warn(f"{error}\n{service.name}: {new} may still have the traffic; move it by hand.")
            return
        if done:
            done.unlink()
        warn(f"{service.name}: the traffic was moved back to {_percents(old)}; {new} has none.")

    if done:
        _write(done, new, good=False)
    with undo_on_failure(back):
        service.move({new: 100})
        smoke_test()
        if done:
            _write(done, new, good=True)


def _write(done: Path, revision: str, good: bool) -> None:
    done.write_text(json.dumps({"revision": revision, "good": good}) + "\n", encoding="utf-8")


def _percents(traffic: dict[str, int]) -> str:
    return ", ".join(f"{revision} ({percent} %)" for revision, percent in traffic.items())


def _remove_old_tags(service: Service, keep: set[str]) -> None:
    """Removes the tags of older revisions, so that Cloud Run can delete these; a failure is only logged."""
    try:
        targets = service.status()["traffic"]
        old = [target["tag"] for target in targets if target.get("tag") and target["revisionName"] not in keep]
        if old:
            gcloud(["run", "services", "update-traffic", service.name, *service.where, f"--remove-tags={','.join(old)}"])
    except StepError as error:
        log(f"warning: the tags of older revisions were not removed: {error}")


def serve_flags(options: argparse.Namespace, bundle: str) -> list[str]:
    """Options of the predictor. Its bundle is a fixed version, not an alias, so a revision determines code and model."""
    variables = {
        "SODAOPS_BUNDLE": bundle, "SODAOPS_RELOAD_S": "null", "SODAOPS_HOST": "0.0.0.0", "SODAOPS_PORT": "8080",
        "SODAOPS_TRUSTED_PROXIES": PROXIES, "SODAOPS_REQUEST_LOG": options.requests, "SODAOPS_JOURNAL_DIR": "/tmp/journal",
        "SODAOPS_MAX_JOURNAL_BYTES": str(64 * 2**20),  # an instance's file system is its memory
    }  # fmt: skip
    secrets = [f"--set-secrets=SODAOPS_API_KEYS={options.keys_secret}:latest"] if options.keys_secret else ["--clear-secrets"]
    return [
        f"--service-account={options.account}", "--execution-environment=gen2", "--no-cpu-throttling", "--cpu-boost",
        f"--min={options.min_instances}", f"--max-instances={options.max_instances}", "--concurrency=80", "--timeout=60",
        "--container=app", f"--image={options.image}", "--port=8080", f"--cpu={options.cpu}", f"--memory={options.memory}",
        f"--set-env-vars={_joined(variables)}", *secrets,
        "--startup-probe=httpGet.path=/readyz,httpGet.port=8080,periodSeconds=5,timeoutSeconds=4,failureThreshold=24",
        "--container=metrics", f"--image={COLLECTOR}", "--depends-on=app",
        "--set-secrets=/etc/rungmp/config.yaml=sodaops-metrics:latest",
    ]  # fmt: skip


def drift_flags(options: argparse.Namespace) -> list[str]:
    """Options of the drift service. Cloud Scheduler triggers its checks, so its own interval is a day."""
    variables = {
        "SODAOPS_DRIFT_BUNDLE": options.bundle, "SODAOPS_DRIFT_REQUEST_LOG": options.requests, "SODAOPS_DRIFT_EVERY_S": "86400",
        "SODAOPS_DRIFT_HOST": "0.0.0.0", "SODAOPS_DRIFT_PORT": "8080", "SODAOPS_DRIFT_OUTPUT_DIR": "/tmp/drift",
        "SODAOPS_DRIFT_TRUSTED_PROXIES": PROXIES,
    }  # fmt: skip
    return [
        f"--service-account={options.account}", "--execution-environment=gen2", "--min=0", "--max-instances=1",
        "--concurrency=4", "--timeout=600", "--container=app", f"--image={options.image}", "--port=8080",
        f"--cpu={options.cpu}", f"--memory={options.memory}", f"--set-env-vars={_joined(variables)}",
    ]  # fmt: skip


def _joined(variables: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in variables.items())


def schedule(options: argparse.Namespace, url: str) -> None:
    """Creates or updates the Cloud Scheduler job that calls the drift service with its account's token."""
    where = [f"--location={options.region}", f"--project={options.project}"]
    look = ["scheduler", "jobs", "describe", options.service, *where, "--format=value(name)"]
    result = ask(look)
    if result.code and not result.missing:
        raise StepError(explain_failure(look, result))
    gcloud([
        "scheduler", "jobs", "create" if result.missing else "update", "http", options.service, *where,
        f"--schedule={options.schedule}", f"--uri={url}/look", "--http-method=post", "--attempt-deadline=600s",
        "--max-retry-attempts=2", f"--oidc-service-account-email={options.account}", f"--oidc-token-audience={url}",
    ])  # fmt: skip
    log(f"{options.service}: Cloud Scheduler calls {url}/look on the schedule {options.schedule!r} (UTC)")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """Parses the options of this step. The build files set those without a default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    serve, drift = commands.add_parser("serve"), commands.add_parser("drift")
    for command in (serve, drift):
        for name in ("service", "region", "project", "image", "tag", "account", "requests"):
            command.add_argument(f"--{name}", required=True)
        command.add_argument("--cpu", default="1")
        command.add_argument("--memory", default="1Gi")
        command.add_argument("--smoke-s", type=float, default=180, help="seconds within which the smoke test must succeed")
    serve.add_argument("--release", type=Path, required=True, help="the file that gate.py wrote")
    serve.add_argument("--done", type=Path, required=True, help="file to write for settle.py")
    serve.add_argument("--keys-secret", default="", help="the secret with the service's API keys; empty for no keys")
    serve.add_argument("--min-instances", default="0")
    serve.add_argument("--max-instances", default="4")
    drift.add_argument("--bundle", required=True, help="the bundle with the drift reference")
    drift.add_argument("--schedule", default="*/30 * * * *", help="cron expression, UTC")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Deploys one of the two services."""
    options = arguments(given)
    service, tag = Service(options.service, options.region, options.project), f"c-{options.tag}"
    if options.what == "drift":
        release(service, drift_flags(options), tag, lambda url, audience: check_drift(Smoke(url, audience, options.smoke_s)))
        schedule(options, service.status()["url"])
        return 0
    target = json.loads(options.release.read_text(encoding="utf-8"))
    key = key_of(options.keys_secret, options.project)

    def smoke_test(url: str, audience: str) -> None:
        check_predictor(Smoke(url, audience, options.smoke_s, key), target["version"])

    release(service, serve_flags(options, target["bundle"]), tag, smoke_test, options.done)
    return 0


def key_of(secret: str, project: str) -> str:
    """The first API key of the service, for the smoke test; empty if it has none."""
    if not secret:
        return ""
    look = ["secrets", "versions", "access", "latest", f"--secret={secret}", f"--project={project}"]
    return gcloud(look).partition(",")[0].strip()


if __name__ == "__main__":
    run_step(main)
