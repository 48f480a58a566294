"""How the steps and gcp.py call gcloud: what fails is told with the command, the reason, and the role that mends it.

Python's standard library alone, since that is what the images of Cloud Build have: gcloud's own brings no more. It is one
language for all steps; bash has neither JSON nor a time limit on HTTP.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

# What a missing permission begins with, and the least role that has it.
ROLES = {
    "iam.serviceAccounts.actAs": "roles/iam.serviceAccountUser",
    "iam.serviceAccounts.getOpenIdToken": "roles/iam.serviceAccountOpenIdTokenCreator",
    "iam.": "roles/iam.serviceAccountAdmin",
    "aiplatform.": "roles/aiplatform.user",
    "artifactregistry.repositories.create": "roles/artifactregistry.admin",
    "artifactregistry.": "roles/artifactregistry.writer",
    "billing.": "roles/billing.costsManager",
    "cloudbuild.": "roles/cloudbuild.builds.editor",
    "cloudscheduler.": "roles/cloudscheduler.admin",
    "monitoring.": "roles/monitoring.editor",
    "resourcemanager.": "roles/resourcemanager.projectIamAdmin",
    "run.routes.invoke": "roles/run.invoker",
    "run.services.setIamPolicy": "roles/run.admin",
    "run.": "roles/run.developer",
    "secretmanager.versions.access": "roles/secretmanager.secretAccessor",
    "secretmanager.": "roles/secretmanager.admin",
    "serviceusage.": "roles/serviceusage.serviceUsageAdmin",
    "storage.buckets.": "roles/storage.admin",
    "storage.": "roles/storage.objectUser",
}
# Where the answer names no permission, the command tells which it must have been.
COMMANDS = {
    "ai": "aiplatform.", "artifacts": "artifactregistry.", "auth": "iam.serviceAccounts.getOpenIdToken", "beta": "monitoring.",
    "billing": "billing.", "builds": "cloudbuild.", "iam": "iam.", "monitoring": "monitoring.", "projects": "resourcemanager.",
    "run": "run.", "scheduler": "cloudscheduler.", "secrets": "secretmanager.", "services": "serviceusage.",
    "storage": "storage.",
}  # fmt: skip
_PERMISSION = re.compile(r"\b[a-z]+\.[a-zA-Z]+\.[a-zA-Z]+\b(?!\.)")
_DENIED = re.compile(r"PERMISSION_DENIED|\b403\b|does not have permission|[Pp]ermission '?[a-zA-Z.]+'? (was )?denied")
_DISABLED = re.compile(r"SERVICE_DISABLED|has not been used in project|API \[?[a-z.]+\]? (is )?not enabled|it is disabled")
_NOT_FOUND = re.compile(r"NOT_FOUND|\b404\b|[Cc]annot find|[Nn]ot found|does not exist")


TIMED_OUT = 124  # as timeout(1) has it


class StepError(Exception):
    """What stops a build or a deployment; the message says what to do."""


@dataclass(frozen=True)
class Answer:
    """What gcloud said: exit code, standard output, standard error."""

    code: int
    out: str
    said: str

    @property
    def denied(self) -> bool:
        """A right is missing."""
        return bool(self.code and _DENIED.search(self.said)) and not self.disabled

    @property
    def disabled(self) -> bool:
        """The API was never enabled in this project, so nothing of its kind is there."""
        return bool(self.code and _DISABLED.search(self.said))

    @property
    def missing(self) -> bool:
        """There is no such thing."""
        return bool(self.code and _NOT_FOUND.search(self.said)) and not self.denied


def shown(command: Sequence[str]) -> str:
    """A gcloud command as one would type it.

    >>> shown(["run", "deploy", "--set-env-vars=A=b c"])
    "gcloud run deploy '--set-env-vars=A=b c'"
    """
    return shlex.join(["gcloud", *command])


def ask(command: Sequence[str], stdin: str | None = None, timeout_s: float = 600) -> Answer:
    """Runs gcloud without prompts, and takes what it says; the code is TIMED_OUT where it took too long.

    Raises:
        StepError: gcloud is not installed.
    """
    try:
        done = subprocess.run(
            ["gcloud", *command], input=stdin if stdin is not None else "", capture_output=True, text=True, check=False,
            env={**os.environ, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}, timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(TIMED_OUT, "", f"no answer within {timeout_s:g} s; it may have been done all the same")
    except FileNotFoundError:
        raise StepError("gcloud is not installed; see https://cloud.google.com/sdk/docs/install.") from None
    return Answer(done.returncode, done.stdout.strip(), done.stderr.strip())


def gcloud(command: Sequence[str], stdin: str | None = None) -> str:
    """Runs gcloud, and returns its standard output.

    Raises:
        StepError: it failed; the message has the command, the reason, and the role where a right is missing.
    """
    answer = ask(command, stdin)
    if answer.code:
        raise StepError(reason(command, answer))
    return answer.out


def reason(command: Sequence[str], answer: Answer) -> str:
    """What failed, why, and what to do about it."""
    told = f"{shown(command)}\nfailed ({answer.code}): {answer.said[-2000:] or 'it said nothing'}"
    if not answer.denied:
        return told
    permission = next(filter(known, _PERMISSION.findall(answer.said)), COMMANDS.get(command[0], ""))
    role = known(permission) or "roles/viewer"
    return f"{told}\nThe account that ran it needs {role}. `make gcp-apply` grants what builds need (cloudbuild/resources.py)."


def known(permission: str) -> str | None:
    """The least role that has a permission, as far as ROLES knows it.

    >>> known("run.services.get"), known("run.routes.invoke"), known("www.googleapis.com")
    ('roles/run.developer', 'roles/run.invoker', None)
    """
    return next((role for begin, role in ROLES.items() if permission.startswith(begin)), None) if permission else None


def tell(text: str) -> None:
    """A line of progress, at once: a build's log is read while it grows."""
    print(text, flush=True)


def warn(text: str) -> None:
    """The same on standard error."""
    print(text, file=sys.stderr, flush=True)


def run_step(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a step as a program: what it cannot go on from goes to standard error, and the exit code is 1.

    A build that is cancelled ends it as Ctrl-C does, so that it can take back what it began.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except StepError as error:
        warn(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        warn("error: stopped from outside")
        sys.exit(1)


@contextlib.contextmanager
def undone_by(undo: Callable[[], None]) -> Iterator[None]:
    """Whatever ends the block but its own end: ``undo`` is run, which nothing from outside stops, and the error goes on."""
    try:
        yield
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        undo()
        raise
