"""The resources of a Google Cloud project as a list of steps: how to see that each exists, and how to create it.

``${NAME}`` in a command is a value from an earlier step.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).parent
APIS = (
    "aiplatform", "artifactregistry", "billingbudgets", "cloudbilling", "cloudbuild", "cloudresourcemanager", "cloudscheduler",
    "compute", "iam", "iamcredentials", "logging", "monitoring", "run", "secretmanager", "storage",
)  # fmt: skip
ACCOUNTS = {
    "ci": "tests pull requests",
    "build": "builds, starts trainings, deploys",
    "train": "trains on Vertex AI",
    "serve": "serves on Cloud Run",
    "drift": "checks for drift on Cloud Run",
}
PROJECT_ROLES = {
    "ci": ["logging.logWriter"],
    "build": ["logging.logWriter", "aiplatform.user", "run.developer", "cloudscheduler.admin"],
    "train": ["logging.logWriter"],
    "serve": ["logging.logWriter", "monitoring.metricWriter"],
    "drift": ["logging.logWriter"],
}
SECRETS = {"sodaops-wandb": ["train"], "sodaops-api-keys": ["serve", "build"], "sodaops-metrics": ["serve"]}
COLLECTED = """\
apiVersion: monitoring.googleapis.com/v1beta
kind: RunMonitoring
metadata:
  name: sodaops
spec:
  endpoints:
    - port: 8080
      path: /metrics
      interval: 30s
"""
PLACEHOLDER = "us-docker.pkg.dev/cloudrun/container/hello"


@dataclass(frozen=True)
class Values:
    """The user's values."""

    project: str
    region: str
    bucket: str
    email: str
    budget: str = "50"
    github: str = ""  # OWNER/NAME; empty: no triggers

    def account(self, name: str) -> str:
        """A service account's address."""
        return f"sodaops-{name}@{self.project}.iam.gserviceaccount.com"


@dataclass(frozen=True)
class Step:
    """One resource.

    Args:
        what: its description.
        look: gcloud command that shows it.
        make: gcloud command that creates it; empty if only the user can.
        wants: lines that the output of ``look`` must have; empty: any output.
        stdin: input of ``make``.
        gives: name of the placeholder that the output of ``look`` fills.
        todo: what the user has to do if ``make`` is empty.
    """

    what: str
    look: list[str]
    make: list[str] = field(default_factory=list)
    wants: tuple[str, ...] = ()
    stdin: str | None = None
    gives: str = ""
    todo: str = ""


def steps(values: Values, policies: list[dict]) -> Iterator[Step]:
    """All resources in the order of their creation.

    Args:
        values: the user's values.
        policies: alert policies from `sodaops alerts render`.
    """
    yield from _project(values)
    yield from _storage(values)
    yield from _accounts(values)
    yield from _secrets(values)
    yield from _services(values)
    yield from _watch(values, policies)
    if values.github:
        yield from _triggers(values)


def _project(v: Values) -> Iterator[Step]:
    yield Step(
        "the project", ["projects", "describe", v.project, "--format=value(projectNumber)"], gives="PROJECT_NUMBER",
        todo="create it, or log in: gcloud auth login",
    )  # fmt: skip
    apis = tuple(f"{api}.googleapis.com" for api in APIS)
    look = ["services", "list", "--enabled", f"--project={v.project}", "--format=value(config.name)"]
    yield Step("the APIs", look, ["services", "enable", *apis, f"--project={v.project}"], apis)
    yield Step(
        "its billing account", ["billing", "projects", "describe", v.project, "--format=value(billingAccountName)"],
        gives="BILLING_ACCOUNT", todo=f"gcloud billing projects link {v.project} --billing-account=ACCOUNT",
    )  # fmt: skip


def _storage(v: Values) -> Iterator[Step]:
    for bucket, rules in ((v.bucket, "bucket.json"), (f"{v.bucket}-requests", "requests.json")):
        url = f"gs://{bucket}"
        yield Step(
            f"bucket {bucket}", ["storage", "buckets", "describe", url, "--format=value(name)"],
            ["storage", "buckets", "create", url, f"--project={v.project}", f"--location={v.region}",
             "--uniform-bucket-level-access", "--public-access-prevention", f"--lifecycle-file={HERE / rules}"],
        )  # fmt: skip
    url = f"gs://{v.bucket}"
    look = ["storage", "buckets", "describe", url, "--format=value(versioning_enabled)"]
    yield Step(f"versions in bucket {v.bucket}", look, ["storage", "buckets", "update", url, "--versioning"], ("True",))
    where = [f"--location={v.region}", f"--project={v.project}"]
    yield Step(
        "the images' repository", ["artifacts", "repositories", "describe", "sodaops", *where, "--format=value(name)"],
        ["artifacts", "repositories", "create", "sodaops", *where, "--repository-format=docker"],
    )  # fmt: skip


def _accounts(v: Values) -> Iterator[Step]:
    for name, duty in ACCOUNTS.items():
        look = ["iam", "service-accounts", "describe", v.account(name), f"--project={v.project}", "--format=value(email)"]
        make = ["iam", "service-accounts", "create", f"sodaops-{name}", f"--project={v.project}", f"--display-name={duty}"]
        yield Step(f"account sodaops-{name}", look, make)
    for name, roles in PROJECT_ROLES.items():
        for role in roles:
            yield _binding(v, ["projects"], [v.project], role, v.account(name), ["--condition=None"])
    repository = ["sodaops", f"--location={v.region}", f"--project={v.project}"]
    yield _binding(v, ["artifacts", "repositories"], repository, "artifactregistry.writer", v.account("build"))
    yield _binding(v, ["artifacts", "repositories"], repository, "artifactregistry.reader", v.account("train"))
    everything, plain = [f"gs://{v.bucket}"], ["--condition=None"]  # required once another binding has a condition
    for name in ("build", "train", "serve", "drift"):
        role = "objectUser" if name == "build" else "objectViewer"
        yield _binding(v, ["storage", "buckets"], everything, f"storage.{role}", v.account(name), plain)
    # Trainings run the code of any branch: they may read the bucket but write only below runs/, not the registry.
    runs = f'expression=resource.name.startsWith("projects/_/buckets/{v.bucket}/objects/runs/"),title=runs'
    flags = [f"--condition={runs}"]
    yield _binding(v, ["storage", "buckets"], everything, "storage.objectUser", v.account("train"), flags, "runs")
    for name, role in (("serve", "objectUser"), ("drift", "objectViewer")):
        yield _binding(v, ["storage", "buckets"], [f"gs://{v.bucket}-requests"], f"storage.{role}", v.account(name))
    for name in ("train", "serve", "drift"):
        used = [v.account(name), f"--project={v.project}"]
        yield _binding(v, ["iam", "service-accounts"], used, "iam.serviceAccountUser", v.account("build"))
    itself = [v.account("build"), f"--project={v.project}"]
    yield _binding(v, ["iam", "service-accounts"], itself, "iam.serviceAccountOpenIdTokenCreator", v.account("build"))


def _secrets(v: Values) -> Iterator[Step]:
    where = f"--project={v.project}"
    for name, readers in SECRETS.items():
        make = ["secrets", "create", name, where, "--replication-policy=automatic"]
        yield Step(f"secret {name}", ["secrets", "describe", name, where, "--format=value(name)"], make)
        for reader in readers:
            yield _binding(v, ["secrets"], [name, where], "secretmanager.secretAccessor", v.account(reader))
    yield Step(  # not secret, but Cloud Run mounts files only from secrets
        "the metrics collector's configuration",
        ["secrets", "versions", "list", "sodaops-metrics", where, "--filter=state=ENABLED", "--format=value(name)"],
        ["secrets", "versions", "add", "sodaops-metrics", where, "--data-file=-"], stdin=COLLECTED,
    )  # fmt: skip


def _services(v: Values) -> Iterator[Step]:
    """Services with a placeholder image, so that rights can be granted and the first release has a fallback."""
    where = [f"--region={v.region}", f"--project={v.project}"]
    for name, callers in (("serve", ["build"]), ("drift", ["build", "drift"])):
        service = "sodaops" if name == "serve" else f"sodaops-{name}"
        make = [
            "run", "deploy", service, *where, f"--service-account={v.account(name)}", "--no-allow-unauthenticated",
            "--container=app", f"--image={PLACEHOLDER}", "--port=8080",
        ]  # fmt: skip
        look = ["run", "services", "describe", service, *where, "--format=value(metadata.name)"]
        yield Step(f"service {service}", look, make)
        for caller in callers:
            yield _binding(v, ["run", "services"], [service, *where], "run.invoker", v.account(caller))
    look = ["run", "services", "describe", "sodaops", *where, "--format=value(status.url.basename())"]
    yield Step("the service's host", look, gives="HOST", todo="look at `gcloud run services describe sodaops`")


def _watch(v: Values, policies: list[dict]) -> Iterator[Step]:
    where = f"--project={v.project}"
    yield Step(
        f"mail to {v.email}",
        ["beta", "monitoring", "channels", "list", where, f'--filter=displayName="sodaops {v.email}"', "--format=value(name)"],
        ["beta", "monitoring", "channels", "create", where, f"--display-name=sodaops {v.email}", "--type=email",
         f"--channel-labels=email_address={v.email}"], gives="NOTIFICATION_CHANNEL",
    )  # fmt: skip
    yield Step(
        "the uptime check",
        ["monitoring", "uptime", "list-configs", where, '--filter=displayName="sodaops"', "--format=value(name.basename())"],
        ["monitoring", "uptime", "create", "sodaops", where, "--resource-type=uptime-url",
         f"--resource-labels=host=${{HOST}},project_id={v.project}", "--protocol=https", "--path=/", "--period=5",
         "--validate-ssl=true", "--service-agent-auth=oidc-token"], gives="CHECK",
    )  # fmt: skip
    agent = "service-${PROJECT_NUMBER}@gcp-sa-monitoring-notification.iam.gserviceaccount.com"
    service = ["sodaops", f"--region={v.region}", where]
    yield _binding(v, ["run", "services"], service, "run.invoker", agent)
    look = ["monitoring", "policies", "list", where, "--format=value(displayName)"]
    for policy in [*policies, *_policies()]:
        make = ["monitoring", "policies", "create", where, "--policy-from-file=-"]
        yield Step(f"alert {policy['displayName']}", look, make, (policy["displayName"],), json.dumps(policy, indent=1))
    budget, billed = f"sodaops {v.project}", ["--billing-account=${BILLING_ACCOUNT}", f"--billing-project={v.project}"]
    yield Step(
        "the budget", ["billing", "budgets", "list", *billed, "--format=value(displayName)"],
        ["billing", "budgets", "create", *billed, f"--display-name={budget}", f"--budget-amount={v.budget}",
         f"--filter-projects=projects/{v.project}", "--threshold-rule=percent=0.5", "--threshold-rule=percent=0.9",
         "--threshold-rule=percent=1.0", "--notifications-rule-monitoring-notification-channels=${NOTIFICATION_CHANNEL}"],
        (budget,),
    )  # fmt: skip


def _policies() -> Iterator[dict]:
    """Alerts on metrics of Google Cloud: the service does not answer, drift was found, or the drift check failed."""
    passed = 'metric.type="monitoring.googleapis.com/uptime_check/check_passed" AND metric.labels.check_id="${CHECK}"'
    failing = {
        "filter": f'resource.type="uptime_url" AND {passed}', "comparison": "COMPARISON_GT", "thresholdValue": 1,
        "duration": "60s", "trigger": {"count": 1},
        "aggregations": [{"alignmentPeriod": "1200s", "perSeriesAligner": "ALIGN_NEXT_OLDER",
                          "crossSeriesReducer": "REDUCE_COUNT_FALSE", "groupByFields": ["resource.label.*"]}],
    }  # fmt: skip
    yield _policy("uptime", "CRITICAL", "The service does not answer from outside.", {"conditionThreshold": failing})
    ours = 'resource.type="cloud_run_revision" AND resource.labels.service_name="sodaops-drift"'
    logged = {
        "drift": ("The texts have drifted from the reference.", f'{ours} AND jsonPayload.outcome="drift"'),
        "drift unseen": (
            "The scheduled drift check failed, or there were no requests to check.",
            'resource.type="cloud_scheduler_job" AND resource.labels.job_id="sodaops-drift" AND severity>=ERROR',
        ),
    }
    for name, (says, lines) in logged.items():
        rate = {"alertStrategy": {"notificationRateLimit": {"period": "86400s"}, "autoClose": "86400s"}}
        yield {**_policy(name, "WARNING", says, {"conditionMatchedLog": {"filter": lines}}), **rate}


def _policy(name: str, severity: str, says: str, condition: dict) -> dict:
    return {
        "displayName": f"sodaops {name}", "documentation": {"content": says, "mimeType": "text/markdown"}, "combiner": "OR",
        "conditions": [{"displayName": name, **condition}], "severity": severity, "enabled": True,
        "notificationChannels": ["${NOTIFICATION_CHANNEL}"],
    }  # fmt: skip


def _triggers(v: Values) -> Iterator[Step]:
    where = [f"--region={v.region}", f"--project={v.project}"]
    agent = "service-${PROJECT_NUMBER}@gcp-sa-cloudbuild.iam.gserviceaccount.com"
    connection = ["builds", "connections", "describe", "sodaops", *where]
    look, make = [*connection, "--format=value(name)"], ["builds", "connections", "create", "github", "sodaops", *where]
    # Cloud Build stores the connection's token as a secret; docs/google_cloud.md shows how to remove this role afterwards.
    right = _binding(v, ["projects"], [v.project], "secretmanager.admin", agent, ["--condition=None"])
    yield replace(right, what=f"{right.what}, for the connection to GitHub", look=look, wants=())
    yield Step("the connection to GitHub", look, make)
    todo = "open the link that `gcloud builds connections describe` shows in a browser, then run this again"
    yield Step("GitHub's consent", [*connection, "--format=value(installationState.stage)"], wants=("COMPLETE",), todo=todo)
    repository = f"projects/{v.project}/locations/{v.region}/connections/sodaops/repositories/sodaops"
    yield Step(
        f"repository {v.github}",
        ["builds", "repositories", "describe", "sodaops", "--connection=sodaops", *where, "--format=value(name)"],
        ["builds", "repositories", "create", "sodaops", "--connection=sodaops", *where,
         f"--remote-uri=https://github.com/{v.github}.git"],
    )  # fmt: skip
    given = f"--substitutions=_REGION={v.region},_BUCKET={v.bucket}"
    pull = ["--pull-request-pattern=^main$", "--comment-control=COMMENTS_ENABLED_FOR_EXTERNAL_CONTRIBUTORS_ONLY"]
    push, code = ["--branch-pattern=^main$", given], "constraints.txt,sodaops/**"
    triggers = {
        "ci": ("ci", pull),
        "ci_cd": ("build", [*push, f"--included-files=conf/**,data/**,docker/serve.Dockerfile,docker/train.Dockerfile,{code}"]),
        "drift": ("build", [*push, f"--included-files=docker/drift.Dockerfile,{code}"]),
    }
    for file, (account, flags) in triggers.items():
        name = f"sodaops-{file.replace('_', '-')}"
        yield Step(
            f"trigger {name}", ["builds", "triggers", "describe", name, *where, "--format=value(name)"],
            ["builds", "triggers", "create", "github", f"--name={name}", *where, f"--repository={repository}",
             f"--build-config=cloudbuild/{file}.yaml", *flags,
             f"--service-account=projects/{v.project}/serviceAccounts/{v.account(account)}"],
        )  # fmt: skip


def _binding(
    v: Values, kind: list[str], on: list[str], role: str, account: str, flags: Sequence[str] = (), title: str = ""
) -> Step:
    """A role of an account on one resource; ``title`` is the title of the condition in ``flags``, if any."""
    columns = "bindings.role,bindings.members,bindings.condition.title"
    flatten = ["--flatten=bindings[].members", f"--format=csv[no-heading]({columns})"]
    member = f"serviceAccount:{account}"
    make = [*kind, "add-iam-policy-binding", *on, f"--member={member}", f"--role=roles/{role}", *flags]
    target = on[0].removeprefix("gs://").partition("@")[0]
    what = f"{account.partition('@')[0]}: {role} on {'the project' if target == v.project else target}"
    return Step(what, [*kind, "get-iam-policy", *on, *flatten], make, (f"roles/{role},{member},{title}",))
