"""Calls gcloud for the build steps and gcp.py; an error names the command, the reason and the missing role.

All steps use only Python's standard library, because gcloud's image has nothing else.
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

# Prefix of a permission -> the smallest role that has it.
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
# Prefix of the permissions that a gcloud command needs, for errors that name none.
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


TIMED_OUT = 124  # as in timeout(1)


class StepError(Exception):
    """A build or deployment cannot continue; the message says what to do."""


@dataclass(frozen=True)
class GcloudResult:
    """Exit code and output of a gcloud command."""

    code: int
    stdout: str
    stderr: str

    @property
    def denied(self) -> bool:
        """A permission is missing."""
        return bool(self.code and _DENIED.search(self.stderr)) and not self.disabled

    @property
    def disabled(self) -> bool:
        """The API is not enabled in this project, so nothing of its kind exists."""
        return bool(self.code and _DISABLED.search(self.stderr))

    @property
    def missing(self) -> bool:
        """The resource does not exist."""
        return bool(self.code and _NOT_FOUND.search(self.stderr)) and not self.denied


def as_shell(command: Sequence[str]) -> str:
    """A gcloud command as typed in a shell.

    >>> as_shell(["run", "deploy", "--set-env-vars=A=b c"])
    "gcloud run deploy '--set-env-vars=A=b c'"
    """
    return shlex.join(["gcloud", *command])


def ask(command: Sequence[str], stdin: str | None = None, timeout_s: float = 600) -> GcloudResult:
    """Runs gcloud without prompts; after ``timeout_s`` the exit code is TIMED_OUT.

    Raises:
        StepError: gcloud is not installed.
    """
    try:
        done = subprocess.run(
            ["gcloud", *command], input=stdin if stdin is not None else "", capture_output=True, text=True, check=False,
            env={**os.environ, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}, timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return GcloudResult(TIMED_OUT, "", f"no answer within {timeout_s:g} s; it may have taken effect")
    except FileNotFoundError:
        raise StepError("gcloud is not installed; see https://cloud.google.com/sdk/docs/install.") from None
    return GcloudResult(done.returncode, done.stdout.strip(), done.stderr.strip())


def gcloud(command: Sequence[str], stdin: str | None = None) -> str:
    """Runs gcloud, and returns its standard output.

    Raises:
        StepError: it failed.
    """
    result = ask(command, stdin)
    if result.code:
        raise StepError(explain_failure(command, result))
    return result.stdout


def explain_failure(command: Sequence[str], result: GcloudResult) -> str:
    """The command that failed, why, and the role to grant where a permission is missing."""
    message = f"{as_shell(command)}\nfailed ({result.code}): {result.stderr[-2000:] or 'no output'}"
    if not result.denied:
        return message
    permission = next(filter(role_for, _PERMISSION.findall(result.stderr)), COMMANDS.get(command[0], ""))
    role = role_for(permission) or "roles/viewer"
    return f"{message}\nThe account that ran it needs {role}. `make gcp-apply` grants the roles in cloudbuild/resources.py."


def role_for(permission: str) -> str | None:
    """The smallest role in ROLES that has a permission.

    >>> role_for("run.services.get"), role_for("run.routes.invoke"), role_for("www.googleapis.com")
    ('roles/run.developer', 'roles/run.invoker', None)
    """
    return next((role for begin, role in ROLES.items() if permission.startswith(begin)), None) if permission else None


def log(text: str) -> None:
    """Prints a line at once, since a build's log is read while it grows."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Prints a line to standard error at once."""
    print(text, file=sys.stderr, flush=True)


def run_step(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a step as a program: a StepError is printed and the exit code is 1.

    Cancelling the build sends SIGTERM, which is handled like Ctrl-C, so that the step can undo what it began.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except StepError as error:
        warn(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        warn("error: interrupted")
        sys.exit(1)


@contextlib.contextmanager
def undo_on_failure(undo: Callable[[], None]) -> Iterator[None]:
    """Runs ``undo`` if the block fails or is interrupted, ignoring further signals; the error is raised again."""
    try:
        yield
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        undo()
        raise
