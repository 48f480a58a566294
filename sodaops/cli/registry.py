"""The verbs of the registry: register, promote, rollback, resolve, registry."""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from sodaops.cli.training import configured, shown_path
from sodaops.config.schema import Config
from sodaops.errors import ConfigError, RefusedError, RegistryError, SodaOpsError
from sodaops.io import remote
from sodaops.registry.bundles import bundle_at
from sodaops.registry.registry import CHALLENGER, CHAMPION, Registry


def run_register(rest: list[str]) -> None:
    """`sodaops register BUNDLE`."""
    parser = argparse.ArgumentParser(prog="sodaops register", description="Puts a bundle into the registry.")
    parser.add_argument("bundle", help="RUN/bundle, or gs://BUCKET/FOLDER")
    parser.add_argument("--reason", default="", help="for the history")
    asked, config = asked_and_configured(parser, rest)
    registry = Registry(config.registry.path)
    with bundle_at(asked.bundle) as folder:
        version = registry.register(folder, asked.reason, _metrics_beside(asked.bundle, folder))
    _mirror(config, registry, version, [CHALLENGER])
    print(f"{version}: in {registry.root}, and its {CHALLENGER}\ngo on: sodaops promote {version}")


def run_promote(rest: list[str]) -> None:
    """`sodaops promote VERSION`."""
    parser = argparse.ArgumentParser(prog="sodaops promote", description="Makes a version champion if the gate lets it.")
    parser.add_argument("version", help=f"a version, the beginning of one, or an alias ({CHALLENGER})")
    parser.add_argument("--reason", default="", help="for the history")
    parser.add_argument("--force", action="store_true", help="also against the gate; needs --reason, and is recorded")
    asked, config = asked_and_configured(parser, rest)
    if asked.force and not asked.reason.strip():
        raise ConfigError('--force needs a reason for the history: --reason "why it must be".')
    promote(config, asked.version, asked.reason, asked.force)


def promote(config: Config, name: str, reason: str = "", force: bool = False) -> str:
    """Judges a version, and makes it champion if every rule holds or if it is forced.

    Args:
        config: of which ``registry`` and ``evaluate.splits_dir`` are read.
        name: a version or an alias.
        reason: for the history.
        force: also against the gate.

    Returns:
        The version.

    Raises:
        RefusedError: a rule is broken; nothing has changed but the report.
        RegistryError: no such version, it is champion already, or the champion changed meanwhile.
    """
    from sodaops.bundle.layout import read_info
    from sodaops.registry import gate

    registry = Registry(config.registry.path)
    version, champion = registry.version(name), registry.state().aliases.get(CHAMPION)
    if version == champion:
        raise RegistryError(f"{version} is champion already.")
    with contextlib.ExitStack() as stack:
        challenger = stack.enter_context(registry.local(version))
        against = (champion, stack.enter_context(registry.local(champion))) if champion else None
        splits_dir = config.splits_of(read_info(challenger).data["name"])
        try:
            judged = gate.judge(version, challenger, against, splits_dir, config.registry.gate)
        except SodaOpsError as error:
            if not force:
                raise
            registry.move(CHAMPION, version, champion, reason, forced=True, gate={"passed": False, "error": str(error)})
            print(f"{version}: {CHAMPION} of {registry.root}, by force and not judged: {error}")
            return version
    folder = remote.join(config.registry.report_dir, version)
    page = gate.write(folder, judged, _said(registry, judged.test["sha256"], reason))
    for verdict in judged.verdicts:
        print(f"{'holds' if verdict.passed else 'BROKEN':<8}{verdict.rule:<22}{verdict.limit:<10}{verdict.said}")
    print(f"report: {shown_path(page)}")
    if not judged.passed and not force:
        broken = [verdict.rule for verdict in judged.verdicts if not verdict.passed]
        stays = f"{champion} stays champion" if champion else "there is still no champion"
        raise RefusedError(f"{version} is refused ({', '.join(broken)}); {stays}.")
    registry.move(CHAMPION, version, champion, reason, "promote", forced=force and not judged.passed, gate=judged.summary())
    _mirror(config, registry, version, [CHAMPION])
    print(f"{version}: {CHAMPION} of {registry.root}" + (", by force" if not judged.passed else ""))
    return version


def _said(registry: Registry, test: str, reason: str) -> str:
    """What the report says first: how worn the test split is, and the reason."""
    n_before = sum((entry.get("gate") or {}).get("test", {}).get("sha256") == test for entry in registry.history())
    worn = [f"Promotions that this test split decided before: {n_before}."] if n_before else []
    return " ".join([*worn, *([f"Reason given: {reason}."] if reason else [])])


def run_rollback(rest: list[str]) -> None:
    """`sodaops rollback`."""
    parser = argparse.ArgumentParser(prog="sodaops rollback", description="Makes the champion before champion again.")
    parser.add_argument("--reason", required=True, help="for the history")
    asked, config = asked_and_configured(parser, rest)
    registry = Registry(config.registry.path)
    version = registry.roll_back(asked.reason)
    _mirror(config, registry, version, [CHAMPION])
    print(f"{version}: {CHAMPION} of {registry.root} again")


def run_resolve(rest: list[str]) -> None:
    """`sodaops resolve ALIAS`."""
    parser = argparse.ArgumentParser(prog="sodaops resolve", description="Where a version's folder is.")
    parser.add_argument("version", help=f"{CHAMPION}, another alias, or a version")
    asked, config = asked_and_configured(parser, rest)
    print(Registry(config.registry.path).resolve(asked.version))


def run_registry(rest: list[str]) -> None:
    """`sodaops registry list`, `history` and `gc`."""
    parser = argparse.ArgumentParser(prog="sodaops registry", description="What is in the registry, and what happened there.")
    parser.add_argument("what", choices=["list", "history", "gc"])
    parser.add_argument("--json", action="store_true", help="list and history: for programs")
    parser.add_argument("--keep", type=int, default=3, help="gc: earlier champions that stay, for a roll back (default 3)")
    parser.add_argument("--dry-run", action="store_true", help="gc: only say what would be deleted")
    asked, config = asked_and_configured(parser, rest)
    registry = Registry(config.registry.path)
    if asked.what == "gc":
        if asked.keep < 0:
            raise ConfigError(f"--keep {asked.keep}: expected 0 or more.")
        for version in registry.gc(asked.keep, asked.dry_run):
            print(f"{version}: {'would be deleted' if asked.dry_run else 'deleted'}")
    elif asked.what == "history":
        entries = registry.history()
        print(
            json.dumps(entries, indent=2) if asked.json else "\n".join(map(_line, entries)) or f"{registry.root}: nothing yet"
        )
    else:
        _list(registry, asked.json)


def _list(registry: Registry, as_json: bool) -> None:
    state = registry.state()
    aliases = {version: [a for a, of in state.aliases.items() if of == version] for version in state.versions}
    if as_json:
        print(json.dumps({"aliases": state.aliases, "versions": state.versions}, indent=2))
        return
    if not state.versions:
        print(f"{registry.root}: empty; `sodaops register BUNDLE` puts a version here")
        return
    print(f"{'version':<14}{'aliases':<24}{'registered':<22}{'val macro-F1':>13}{'test':>8}  data")
    for version, about in sorted(state.versions.items(), key=lambda item: item[1]["when"]):
        val, test = ((about["metrics"].get(split) or {}).get("macro_f1") for split in ("val", "test"))
        numbers = [f"{value:.3f}" if value is not None else "–" for value in (val, test)]
        names, when = ", ".join(aliases[version]), about["when"][:16].replace("T", " ")
        print(f"{version:<14}{names:<24}{when:<22}{numbers[0]:>13}{numbers[1]:>8}  {about['data']['name']}")


def _line(entry: dict[str, Any]) -> str:
    when = entry["when"][:16].replace("T", " ")
    what = f"{entry['event']} {entry.get('version') or ', '.join(entry.get('taken', []))}".strip()
    if entry["event"] in ("promote", "rollback"):
        what += f" (before: {entry['before'] or 'none'}{', BY FORCE' if entry.get('forced') else ''})"
    return f"{entry['n']:>4}  {when}  {entry['who']}  {what}" + (f": {entry['why']}" if entry["why"] else "")


def asked_and_configured(parser: argparse.ArgumentParser, rest: list[str]) -> tuple[argparse.Namespace, Config]:
    """A verb's own arguments, and the configuration that the others change."""
    parser.epilog = "KEY=VALUE changes the configuration: registry.path=gs://BUCKET/FOLDER, registry.gate.max_ece=0.1"
    asked, others = parser.parse_known_args(rest)
    unknown = [text for text in others if "=" not in text or (text.startswith("-") and not text.startswith("--config-dir="))]
    if unknown and not {"--params", "--config-dir"} & set(others):
        parser.error(f"{unknown[0]!r} is not understood; expected KEY=VALUE")
    return asked, configured(others)


def _metrics_beside(source: str, folder: Path) -> dict[str, Any]:
    """What the run's record, which lies beside a bundle, says of this very bundle; ``folder`` holds the bundle here."""
    from sodaops.bundle.layout import read_info
    from sodaops.io import runs

    if remote.is_address(source):
        record = remote.read_if_exists(remote.join(source.rstrip("/").rpartition("/")[0], runs.RECORD))
        if record is not None:
            (folder.parent / runs.RECORD).write_bytes(record)
    if not (folder.parent / runs.RECORD).is_file():
        return {}
    fields = runs.read_run(folder.parent).fields
    return fields.get("metrics", {}) if fields.get("bundle_id") == read_info(folder).bundle_id else {}


def _mirror(config: Config, registry: Registry, version: str, aliases: list[str]) -> None:
    if not config.registry.wandb:
        return
    from sodaops.registry.mirror import mirror

    try:
        with registry.local(version) as folder:
            mirror(folder, version, aliases, config.logger.wandb or configured(["logger=wandb"]).logger.wandb)
    except (ConfigError, ModuleNotFoundError) as error:  # the registry is what counts, and has changed
        print(f"warning: not mirrored to W&B: {error}", file=sys.stderr)
