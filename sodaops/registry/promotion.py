"""Promotion of a version to champion, if the gate lets it pass or if it is forced."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from sodaops.bundle.layout import read_info, task_of
from sodaops.config.schema import Config
from sodaops.errors import ConfigError, RefusedError, RegistryError, SodaOpsError
from sodaops.io import remote
from sodaops.registry.checks import LiveTest
from sodaops.registry.gate import GateResult, run_gate, write_gate_report
from sodaops.registry.registry import CHAMPION, Registry


@dataclass(frozen=True)
class Promotion:
    """The outcome of a promotion."""

    version: str
    champion: str | None  # the one before
    promoted: bool
    result: GateResult | None  # None: the gate failed with an error, and the promotion was forced
    page: str | None  # the gate's report
    error: SodaOpsError | None = None  # of the gate

    def check(self) -> None:
        """Raises a RefusedError unless the version was promoted."""
        if self.promoted or self.result is None:
            return
        failed = ", ".join(verdict.rule for verdict in self.result.verdicts if not verdict.passed)
        champion = f"{self.champion} remains champion" if self.champion else "there is still no champion"
        raise RefusedError(
            f"{self.version} is refused, failed checks: {failed}; {champion}. Train a better model, or accept this "
            f"one by adding to the command: {' '.join(self.result.accept)}"
        )


def promote(config: Config, name: str, reason: str, force: bool, judge: Callable[[Config, str, str], LiveTest]) -> Promotion:
    """Runs the gate on a version, and makes it champion if all checks passed or if it is forced.

    Args:
        config: ``registry`` and ``evaluate.splits_dir`` are read.
        name: a version or an alias.
        reason: for the history.
        force: promote it even if a check or the gate fails.
        judge: counts labelled live disagreements of the champion and this version, if ``min_disagreements`` asks for some.

    Raises:
        ConfigError: it is forced without a reason.
        RegistryError: no such version, it is champion already, or the champion was changed meanwhile.
        SodaOpsError: the gate failed, and the promotion is not forced.
    """
    if force and not reason.strip():
        raise ConfigError("--force: give a reason for the history, --reason TEXT.")
    registry = Registry(config.registry.path)
    version, champion = registry.version(name), registry.state().aliases.get(CHAMPION)
    if version == champion:
        raise RegistryError(f"{version} is the champion of {registry.root} already.")
    with contextlib.ExitStack() as stack:
        challenger_dir = stack.enter_context(registry.local(version))
        champion_bundle = (champion, stack.enter_context(registry.local(champion))) if champion else None
        info = read_info(challenger_dir)
        task, splits_dir = task_of(challenger_dir, info), config.splits_of(info.data["name"])
        try:
            rules = config.registry.gate
            live = judge(config, champion, version) if champion and rules.min_disagreements is not None else None
            result = run_gate(version, challenger_dir, champion_bundle, splits_dir, rules, live)
        except SodaOpsError as error:
            if not force:
                raise
            registry.move(CHAMPION, version, champion, reason, forced=True, gate={"passed": False, "error": str(error)})
            return Promotion(version, champion, True, None, None, error)
    introduction = _introduction(registry, result.test["sha256"], reason)
    page = write_gate_report(remote.join(config.registry.report_dir, version), result, introduction, task)
    if result.passed or force:
        forced = not result.passed
        registry.move(CHAMPION, version, champion, reason, "promote", forced=forced, gate=result.summary())
    return Promotion(version, champion, result.passed or force, result, page)


def _introduction(registry: Registry, test_hash: str, reason: str) -> str:
    """The first sentences of the gate's report: test-set reuse, and the reason."""
    n_reused = sum((event.get("gate") or {}).get("test", {}).get("sha256") == test_hash for event in registry.history())
    reuse = [f"Test-set reuse: {n_reused} earlier promotions were decided on this test split."] if n_reused else []
    return " ".join([*reuse, *([f"Reason given: {reason}."] if reason else [])])
