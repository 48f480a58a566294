"""The commands of the registry: register, promote, rollback, resolve, registry."""

import argparse
import json
from typing import Any

from sodaops.cli.training import configured, shown_path
from sodaops.errors import ConfigError
from sodaops.registry.bundles import register_bundle
from sodaops.registry.mirror import mirror
from sodaops.registry.registry import CHALLENGER, CHAMPION, Registry


def run_register(args: argparse.Namespace) -> None:
    """`sodaops register BUNDLE`."""
    config = configured(args)
    registry = Registry(config.registry.path)
    version = register_bundle(registry, args.bundle, args.reason)
    mirror(config, registry, version, [CHALLENGER])
    print(f"{version}: {CHALLENGER} of {registry.root}\nnext: sodaops promote {version}")


def run_promote(args: argparse.Namespace) -> None:
    """`sodaops promote VERSION`."""
    from sodaops.annotation.disagreements import judge_disagreements
    from sodaops.registry.promotion import promote

    config = configured(args)
    promotion = promote(config, args.version, args.reason, args.force, judge_disagreements)
    version, root = promotion.version, config.registry.path
    how = f", by force and without the gate: {promotion.error}"
    if promotion.result is not None:
        for verdict in promotion.result.verdicts:
            outcome = "FAILED" if not verdict.passed else "skipped" if verdict.value is None else "passed"
            print(f"{outcome:<8}{verdict.rule:<22}{verdict.limit:<10}{verdict.said}")
        print(f"report: {shown_path(promotion.page)}")
        promotion.check()
        how = "" if promotion.result.passed else ", by force"
    mirror(config, Registry(root), version, [CHAMPION])
    print(f"{version}: {CHAMPION} of {root}{how}")


def run_rollback(args: argparse.Namespace) -> None:
    """`sodaops rollback`."""
    config = configured(args)
    registry = Registry(config.registry.path)
    version = registry.roll_back(args.reason)
    mirror(config, registry, version, [CHAMPION])
    print(f"{version}: {CHAMPION} of {registry.root} again")


def run_resolve(args: argparse.Namespace) -> None:
    """`sodaops resolve ALIAS`."""
    config = configured(args)
    print(Registry(config.registry.path).resolve(args.version))


def run_registry_gc(args: argparse.Namespace) -> None:
    """`sodaops registry gc`."""
    for name, value in (("keep", args.keep), ("grace-hours", args.grace_hours)):
        if not value >= 0:
            raise ConfigError(f"--{name} {value}: expected 0 or more.")
    for version in Registry(configured(args).registry.path).gc(args.keep, args.dry_run, 3600 * args.grace_hours):
        print(f"{version}: {'would be deleted' if args.dry_run else 'deleted'}")


def run_registry_history(args: argparse.Namespace) -> None:
    """`sodaops registry history`."""
    registry = Registry(configured(args).registry.path)
    entries = registry.history()
    if args.json:
        print(json.dumps(entries, indent=2))
    else:
        print("\n".join(map(_format_event, entries)) or f"{registry.root}: no events")


def run_registry_list(args: argparse.Namespace) -> None:
    """`sodaops registry list`."""
    registry = Registry(configured(args).registry.path)
    state = registry.state()
    aliases = {version: [a for a, of in state.aliases.items() if of == version] for version in state.versions}
    if args.json:
        print(json.dumps({"aliases": state.aliases, "versions": state.versions}, indent=2))
        return
    if not state.versions:
        print(f"{registry.root}: empty; `sodaops register BUNDLE` adds a version")
        return
    print(f"{'version':<14}{'aliases':<24}{'registered':<22}{'metric':<10}{'val':>7}{'test':>8}  data")
    for version, about in sorted(state.versions.items(), key=lambda item: item[1]["when"]):
        on_val, on_test = (about["metrics"].get(split) or {} for split in ("val", "test"))
        metric = about.get("metric", "macro_f1")
        numbers = [f"{of[metric]:.3f}" if metric in of else "–" for of in (on_val, on_test)]
        names, when = ", ".join(aliases[version]), about["when"][:16].replace("T", " ")
        line = f"{version:<14}{names:<24}{when:<22}{metric:<10}{numbers[0]:>7}{numbers[1]:>8}"
        print(f"{line}  {about['data'].get('name', '–')}")


def _format_event(entry: dict[str, Any]) -> str:
    when = entry["when"][:16].replace("T", " ")
    what = f"{entry['event']} {entry.get('version') or ', '.join(entry.get('taken', []))}".strip()
    if entry["event"] in ("promote", "rollback"):
        what += f" (before: {entry['before'] or 'none'}{', BY FORCE' if entry.get('forced') else ''})"
    return f"{entry['n']:>4}  {when}  {entry['who']}  {what}" + (f": {entry['why']}" if entry["why"] else "")
