"""Plans and creates the resources of a Google Cloud project, and rolls a deployment back.

python3 cloudbuild/gcp.py plan|apply --project=… --region=… --bucket=… --email=… [--github=OWNER/NAME] [--budget=50]
python3 cloudbuild/gcp.py rollback --project=… --region=… [--keys-secret=…]
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from check import FORMS
from cloud import GcloudResult, StepError, as_shell, ask, explain_failure, gcloud, log, run_step
from deploy import PREVIOUS, Service, key_of, move_traffic
from resources import Step, Values, steps
from smoke import Smoke, check_predictor

_PLACEHOLDER = re.compile(r"\$\{([A-Z_]+)\}")
# Required make variables of each command, and the patterns of all.
NEEDS = {"plan": ("project", "region", "bucket", "email"), "rollback": ("project", "region")}
NEEDS["apply"] = NEEDS["plan"]
SHAPES = {
    "project": (r"[a-z][a-z0-9-]{4,28}[a-z0-9]", "a project's id"),
    "region": FORMS["_REGION"],
    "bucket": (r"[a-z0-9][a-z0-9_-]{1,51}[a-z0-9]", "a bucket's name without gs://, at most 53 characters: -requests is added"),
    "email": (r"[^@\s,]+@[^@\s,]+\.[^@\s,]+", "the address that alerts go to"),
    "budget": (r"[1-9]\d{0,6}", "a whole number, in the billing account's currency, a month"),
    "github": (r"([\w.-]+/[\w.-]+)?", "OWNER/NAME"),
    "keys_secret": (r"[\w-]+", "the name of the secret with the service's own API keys, if it has any"),
}


@dataclass
class Project:
    """What is known about the project: values for placeholders, and earlier results of gcloud."""

    values: dict[str, str] = field(default_factory=dict)
    results: dict[tuple[str, ...], GcloudResult] = field(default_factory=dict)

    def fill(self, step: Step) -> Step:
        """A step with the values known so far; other placeholders stay ``${NAME}``."""

        def replaced(text: str) -> str:
            return _PLACEHOLDER.sub(lambda name: self.values.get(name[1], name[0]), text)

        look, make, wants = ([replaced(text) for text in texts] for texts in (step.look, step.make, step.wants))
        return replace(step, look=look, make=make, wants=tuple(wants), stdin=step.stdin and replaced(step.stdin))

    def exists(self, step: Step, refresh: bool = False) -> tuple[bool, GcloudResult]:
        """Whether a resource exists; keeps the value that the step gives.

        Args:
            step: with its placeholders filled.
            refresh: run the command again even if its result is known.
        """
        command = tuple(step.look)
        if refresh or command not in self.results:
            self.results[command] = ask(step.look)
        result = self.results[command]
        exists = not result.code and bool(result.stdout) and set(step.wants) <= set(result.stdout.splitlines())
        if exists and step.gives:
            self.values[step.gives] = result.stdout.splitlines()[0].removeprefix("billingAccounts/")
        return exists, result


def plan(todo: Sequence[Step]) -> None:
    """Prints every command and which of them are needed; changes nothing."""
    project, readable, n_missing = Project(), True, 0
    for number, step in enumerate(todo, 1):
        step = project.fill(step)
        if not readable or _PLACEHOLDER.search(" ".join(step.look)):
            state = "not checked"
        else:
            exists, error = _check(project, step)
            state = "unknown" if error else "exists" if exists else "missing"
            if error:
                log(f"# {error}".replace("\n", "\n# "))
            if number == 1 and not exists:
                readable = False
                log("# the project cannot be read, so this shows what an empty one needs\n")
        n_missing += state != "exists"
        log(f"# {number}. {step.what}: {state}")
        if step.make:
            log(_typed(step) if state != "exists" else f"#    {as_shell(step.make)}")
        elif state != "exists":
            log(f"# do this by hand: {step.todo}")
    log(f"\n# {n_missing} of {len(todo)} to create: `make gcp-apply` with the same values. Nothing was changed.")


def _check(project: Project, step: Step) -> tuple[bool, str]:
    """Whether a resource exists, and the error if that cannot be determined."""
    try:
        exists, result = project.exists(step)
    except StepError as error:
        return False, str(error)
    return exists, explain_failure(step.look, result) if result.code and not (result.missing or result.disabled) else ""


def _typed(step: Step) -> str:
    return as_shell(step.make) + (f" <<'END'\n{step.stdin.rstrip()}\nEND" if step.stdin is not None else "")


def apply(todo: Sequence[Step]) -> None:
    """Creates what is missing, in order.

    Raises:
        StepError: a resource could not be created, or must be created by hand; the message lists the remaining ones.
    """
    project, n_created = Project(), 0
    for number, step in enumerate(todo, 1):
        try:
            n_created += _create(project, project.fill(step), f"{number}/{len(todo)} {step.what}")
        except StepError as error:
            left = [f"  {later.what}" for later in todo[number - 1 :]]
            lines = [str(error), f"Not done ({len(left)} of {len(todo)}):", *left, "Fix this, then run it again."]
            raise StepError("\n".join(lines)) from None
    log(f"done: {n_created} created, {len(todo) - n_created} existed")


def _create(project: Project, step: Step, title: str) -> bool:
    """Creates a resource unless it exists; returns whether it was created."""
    exists, error = _check(project, step)
    if error:
        raise StepError(f"{step.what}: could not be checked\n{error}")
    if exists:
        log(f"{title}: exists")
        return False
    if not step.make:
        raise StepError(f"{step.what}: missing; {step.todo}.")
    log(f"{title}: {as_shell(step.make)}")
    gcloud(step.make, step.stdin)
    if step.gives and not project.exists(step, refresh=True)[0]:
        raise StepError(f"{step.what}: was created but is not visible yet; run it again in a minute.")
    return True


def rollback(project: str, region: str, keys_secret: str, smoke_s: float, name: str = "sodaops") -> None:
    """Moves the traffic to the previous revision, if that still answers.

    Raises:
        StepError: there is none, it does not answer, or the traffic is split.
    """
    service = Service(name, region, project)
    traffic = service.traffic()
    if len(traffic) > 1:
        raise StepError(
            f"{name}: the traffic is split ({traffic}); move it to one revision with `gcloud run services update-traffic`."
        )
    current = next(iter(traffic))
    previous = service.label(current, PREVIOUS)
    if not previous or not service.label(previous, PREVIOUS):  # the placeholder of `gcp-apply` has no such label
        raise StepError(f"{name}: {current} is the first revision that was deployed; there is no previous one.")
    target, url = service.tagged(revision=previous), service.status()["url"]
    if not target:
        raise StepError(
            f"{name}: {previous} no longer has a tag (only the last two revisions do), so it cannot be tested without traffic. "
            "Deploy its commit again."
        )
    key = key_of(keys_secret, project)
    smoke = Smoke(target["url"], url, smoke_s, key)
    version = str(smoke.fields("/info").get("bundle_version"))
    check_predictor(smoke, version)
    move_traffic(service, traffic, previous, lambda: check_predictor(Smoke(url, url, smoke_s, key), version))
    log(f"{name}: {previous} has the traffic again, instead of {current}")
    log("The registry's champion is unchanged; roll it back: sodaops rollback --reason=… registry.path=gs://BUCKET/registry")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The program's options; exits with code 2 and all faults if some are missing or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=sorted(NEEDS))
    for name in SHAPES:
        parser.add_argument(f"--{name.replace('_', '-')}", default="50" if name == "budget" else "")
    parser.add_argument("--smoke-s", type=float, default=120, help="seconds for a revision to answer")
    parser.add_argument("--policies", type=Path, help="gcp-alert-policies.json from `sodaops alerts render`")
    options = parser.parse_args(given)
    faults = [f"{name.upper()} is missing: {SHAPES[name][1]}" for name in NEEDS[options.command] if not getattr(options, name)]
    for name, (form, meaning) in SHAPES.items():
        value = getattr(options, name)
        if value and not re.fullmatch(form, value):
            faults.append(f"{name.upper()}={value}: expected {meaning}")
    if faults:
        needed = " ".join(f"{name.upper()}=…" for name in NEEDS[options.command])
        print("\n".join(faults), f"Usage: make gcp-{options.command} {needed}", sep="\n", file=sys.stderr)
        sys.exit(2)
    return options


def main(given: Sequence[str]) -> int:
    """Plans, creates, or rolls back."""
    options = arguments(given)
    if options.command == "rollback":
        rollback(options.project, options.region, options.keys_secret, options.smoke_s)
        return 0
    values = Values(options.project, options.region, options.bucket, options.email, options.budget, options.github)
    policies = json.loads(options.policies.read_text(encoding="utf-8")) if options.policies else []
    (plan if options.command == "plan" else apply)(list(steps(values, policies)))
    return 0


if __name__ == "__main__":
    run_step(main)
