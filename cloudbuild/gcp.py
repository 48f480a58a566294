"""What a Google Cloud project needs for all of this: shown, made, and a deployment taken back.

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
from cloud import Answer, StepError, ask, gcloud, reason, run_step, shown, tell
from deploy import PREVIOUS, Service, key_of, shift
from resources import Step, Values, steps
from smoke import Smoke, predictor_answers

_LATE = re.compile(r"\$\{([A-Z_]+)\}")
# Make variables that each verb needs, with what they look like.
NEEDS = {"plan": ("project", "region", "bucket", "email"), "rollback": ("project", "region")}
NEEDS["apply"] = NEEDS["plan"]
SHAPES = {
    "project": (r"[a-z][a-z0-9-]{4,28}[a-z0-9]", "a project's id"),
    "region": FORMS["_REGION"],
    "bucket": (r"[a-z0-9][a-z0-9_-]{1,51}[a-z0-9]", "a bucket's name without gs://, at most 53 characters: -requests is added"),
    "email": (r"[^@\s,]+@[^@\s,]+\.[^@\s,]+", "the address that alerts go to"),
    "budget": (r"[1-9]\d{0,6}", "a whole number, in the billing account's currency, a month"),
    "github": (r"([\w.-]+/[\w.-]+)?", "OWNER/NAME"),
    "keys_secret": (r"[\w-]+", "the name of the secret with the service's own keys, where it has any"),
}


@dataclass
class Project:
    """What is known of the project: values that steps found, and answers that were given before."""

    found: dict[str, str] = field(default_factory=dict)
    answers: dict[tuple[str, ...], Answer] = field(default_factory=dict)

    def filled(self, step: Step) -> Step:
        """A step with the values that are known by now; others stay ``${NAME}``."""

        def fill(text: str) -> str:
            return _LATE.sub(lambda name: self.found.get(name[1], name[0]), text)

        look, make, wants = ([fill(text) for text in texts] for texts in (step.look, step.make, step.wants))
        return replace(step, look=look, make=make, wants=tuple(wants), stdin=step.stdin and fill(step.stdin))

    def there(self, step: Step, anew: bool = False) -> tuple[bool, Answer]:
        """Whether a thing is there; what it gives is kept.

        Args:
            step: filled.
            anew: ask again, also if that was asked before.
        """
        asked = tuple(step.look)
        if anew or asked not in self.answers:
            self.answers[asked] = ask(step.look)
        answer = self.answers[asked]
        there = not answer.code and bool(answer.out) and set(step.wants) <= set(answer.out.splitlines())
        if there and step.gives:
            self.found[step.gives] = answer.out.splitlines()[0].removeprefix("billingAccounts/")
        return there, answer


def plan(todo: Sequence[Step]) -> None:
    """Shows every command, and which of them are needed; changes nothing."""
    project, blind, n_missing = Project(), "", 0
    for number, step in enumerate(todo, 1):
        step = project.filled(step)
        if blind or _LATE.search(" ".join(step.look)):
            state = "not looked at"
        else:
            there, said = _seen(project, step)
            state = "unknown" if said else "is there" if there else "missing"
            if said:
                tell(f"# {said}".replace("\n", "\n# "))
            if number == 1 and not there:
                blind = "the project cannot be looked at, so this shows what an empty one needs"
                tell(f"# {blind}\n")
        n_missing += state != "is there"
        tell(f"# {number}. {step.what}: {state}")
        if step.make:
            tell(_typed(step) if state != "is there" else f"#    {shown(step.make)}")
        elif state != "is there":
            tell(f"# to do by hand: {step.todo}")
    tell(f"\n# {n_missing} of {len(todo)} to make; `make gcp-apply` with the same values does it. Nothing was changed.")


def _seen(project: Project, step: Step) -> tuple[bool, str]:
    """Whether a thing is there, and what stands in the way of knowing it."""
    try:
        there, answer = project.there(step)
    except StepError as error:
        return False, str(error)
    return there, reason(step.look, answer) if answer.code and not (answer.missing or answer.disabled) else ""


def _typed(step: Step) -> str:
    return shown(step.make) + (f" <<'END'\n{step.stdin.rstrip()}\nEND" if step.stdin is not None else "")


def apply(todo: Sequence[Step]) -> None:
    """Makes what is missing, one thing after another.

    Raises:
        StepError: one could not be made, or must be made by hand; the message says which are left.
    """
    project, n_made = Project(), 0
    for number, step in enumerate(todo, 1):
        try:
            n_made += _made(project, project.filled(step), f"{number}/{len(todo)} {step.what}")
        except StepError as error:
            left = [f"  {later.what}" for later in todo[number - 1 :]]
            told = [str(error), f"Not done ({len(left)} of {len(todo)}):", *left, "Run it again when that is mended."]
            raise StepError("\n".join(told)) from None
    tell(f"done: {n_made} made, {len(todo) - n_made} were there")


def _made(project: Project, step: Step, title: str) -> bool:
    there, said = _seen(project, step)
    if said:
        raise StepError(f"{step.what}: could not be looked at\n{said}")
    if there:
        tell(f"{title}: is there")
        return False
    if not step.make:
        raise StepError(f"{step.what}: missing; {step.todo}.")
    tell(f"{title}: {shown(step.make)}")
    gcloud(step.make, step.stdin)
    if step.gives and not project.there(step, anew=True)[0]:
        raise StepError(f"{step.what}: was made, and is not to be seen yet; run it again in a minute.")
    return True


def rollback(project: str, region: str, keys_secret: str, smoke_s: float, name: str = "sodaops") -> None:
    """Gives the traffic to the revision that had it before the one that has it now, if it answers still.

    Raises:
        StepError: there is none, it does not answer, or traffic is split.
    """
    service = Service(name, region, project)
    traffic = service.traffic()
    if len(traffic) > 1:
        raise StepError(f"{name}: traffic is split ({traffic}); give it to one with `gcloud run services update-traffic`.")
    now = next(iter(traffic))
    before = service.label(now, PREVIOUS)
    if not before or not service.label(before, PREVIOUS):  # what `gcp-apply` put there as a placeholder has no such label
        raise StepError(f"{name}: {now} is the first that was deployed here; there is none before it.")
    target, url = service.tagged(revision=before), service.status()["url"]
    if not target:
        raise StepError(
            f"{name}: {before} has lost its tag, as all but the last two do, so it cannot be tried before it has traffic. "
            "Deploy its commit again."
        )
    key = key_of(keys_secret, project)
    smoke = Smoke(target["url"], url, smoke_s, key)
    version = str(smoke.fields("/info").get("bundle_version"))
    predictor_answers(smoke, version)
    shift(service, traffic, before, lambda: predictor_answers(Smoke(url, url, smoke_s, key), version))
    tell(f"{name}: {before} has the traffic again; {now} had it")
    tell("The registry's champion has not moved; this moves it: sodaops rollback --reason=… registry.path=gs://BUCKET/registry")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The program's options; the process ends with code 2 and all that is missing or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=sorted(NEEDS))
    for name in SHAPES:
        parser.add_argument(f"--{name.replace('_', '-')}", default="50" if name == "budget" else "")
    parser.add_argument("--smoke-s", type=float, default=120, help="for a revision to answer")
    parser.add_argument("--policies", type=Path, help="gcp-alert-policies.json of `sodaops alerts render`")
    asked = parser.parse_args(given)
    faults = [f"{name.upper()} is missing: {SHAPES[name][1]}" for name in NEEDS[asked.verb] if not getattr(asked, name)]
    for name, (form, meaning) in SHAPES.items():
        value = getattr(asked, name)
        if value and not re.fullmatch(form, value):
            faults.append(f"{name.upper()}={value}: expected {meaning}")
    if faults:
        needed = " ".join(f"{name.upper()}=…" for name in NEEDS[asked.verb])
        print("\n".join(faults), f"Give them: make gcp-{asked.verb} {needed}", sep="\n", file=sys.stderr)
        sys.exit(2)
    return asked


def main(given: Sequence[str]) -> int:
    """Plans, applies, or rolls back."""
    asked = arguments(given)
    if asked.verb == "rollback":
        rollback(asked.project, asked.region, asked.keys_secret, asked.smoke_s)
        return 0
    values = Values(asked.project, asked.region, asked.bucket, asked.email, asked.budget, asked.github)
    policies = json.loads(asked.policies.read_text(encoding="utf-8")) if asked.policies else []
    (plan if asked.verb == "plan" else apply)(list(steps(values, policies)))
    return 0


if __name__ == "__main__":
    run_step(main)
