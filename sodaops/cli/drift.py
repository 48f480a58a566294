"""The commands of the request log: drift, watch and log."""

import argparse
import os
import sys
from pathlib import Path

from sodaops.cli.registry import parse_with_overrides
from sodaops.cli.training import shown_path
from sodaops.config.schema import Config
from sodaops.errors import AlarmError, ConfigError, StorageError
from sodaops.io import remote

_BUNDLE = "RUN/bundle, gs://BUCKET/FOLDER or REGISTRY@champion"


def run_drift(rest: list[str]) -> None:
    """`sodaops drift BUNDLE`."""
    parser = argparse.ArgumentParser(prog="sodaops drift", description="Compares the request log with a bundle's reference.")
    parser.add_argument("bundle", help=_BUNDLE)
    parser.add_argument("--fail-on-drift", action="store_true", help="exit code 4 when there is drift, for cron and CI")
    options, config = parse_with_overrides(parser, rest)
    from sodaops.drift.check import PAGE, check_drift, format_result

    result = check_drift(config.drift, options.bundle, request_log_path(config))
    print(format_result(result))
    print(f"report: {shown_path(remote.join(config.drift.output_dir, PAGE))}")
    if result.drifted and options.fail_on_drift:
        raise AlarmError(f"{result.bundle_id}: drift ({', '.join(cause.name for cause in result.causes)}).")


def run_watch(rest: list[str]) -> None:
    """`sodaops watch BUNDLE`: replaces this process by the drift service."""
    parser = argparse.ArgumentParser(prog="sodaops watch", description="Runs the drift service, which checks repeatedly.")
    parser.add_argument("bundle", help=_BUNDLE)
    options, config = parse_with_overrides(parser, rest)
    from sodaops.drift.settings import PREFIX
    from sodaops.web.settings import as_environment

    section = config.drift.model_copy(update={"request_log": request_log_path(config)})
    explicit = {text.partition("=")[0].removeprefix("drift.") for text in rest} | {"request_log"}
    variables = {**os.environ, **as_environment(section, explicit, PREFIX), f"{PREFIX}BUNDLE": options.bundle}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "sodaops.drift"], variables)


def run_log(rest: list[str]) -> None:
    """`sodaops log forget` and `sodaops log prune`."""
    parser = argparse.ArgumentParser(prog="sodaops log", description="Deletes rows of the request log.")
    parser.add_argument("action", choices=["forget", "prune"])
    parser.add_argument("--request-id", action="append", default=[], help="forget: all rows of this request")
    parser.add_argument("--text-hash", action="append", default=[], help="forget: all rows of the text with this SHA-256")
    parser.add_argument("--days", type=int, help="prune: delete parts older than this (default: serve.keep_days)")
    options, config = parse_with_overrides(parser, rest)
    if options.action == "prune":
        _prune(config, options.days if options.days is not None else config.serve.keep_days)
    else:
        _forget(config, options.request_id, options.text_hash)


def _prune(config: Config, days: int | None) -> None:
    from sodaops.request_log.retention import prune

    if days is None:
        raise ConfigError("the number of days to keep is missing; give --days N or serve.keep_days=N.")
    if not 1 <= days <= 36_500:
        raise ConfigError(f"--days {days}: expected a number of days, 1 to 36500.")
    deleted = prune(request_log_path(config), days)
    print("\n".join(f"{path}: deleted" for path in deleted) or f"nothing is older than {days} days")


def _forget(config: Config, request_ids: list[str], text_hashes: list[str]) -> None:
    """Deletes rows from the log, its journal and the annotation store.

    Raises:
        StorageError: a part could not be read, or a running service still holds rows.
    """
    from sodaops.request_log.retention import forget

    if not (request_ids or text_hashes):
        raise ConfigError("nothing to forget; give --request-id ID or --text-hash SHA256, each as often as needed.")
    log = request_log_path(config)
    journal = config.serve.journal_dir or (None if remote.is_address(log) else str(Path(log) / "journal"))
    outcome = forget(log, journal, request_ids, text_hashes)
    print(outcome.summary())
    if journal is None:
        print("note: the journal was not searched; recent rows are in the service's serve.journal_dir until they are in a part")
    if remote.is_address(config.drift.output_dir) or Path(config.drift.output_dir).is_dir():
        print(f"note: {config.drift.output_dir} may show these texts until the next drift check; delete it, or check again")
    _forget_annotations(config, request_ids, text_hashes)
    if outcome.held or outcome.unread:
        raise StorageError("some rows may remain in files that could not be searched; see above.")


def _forget_annotations(config: Config, request_ids: list[str], text_hashes: list[str]) -> None:
    """Deletes the texts from the annotation store, if there is one."""
    from sodaops.annotation.database import INFO
    from sodaops.annotation.store import Store

    store = Path(config.annotate.store)
    if (store / INFO).exists() and (n_texts := Store(store).forget(request_ids, text_hashes)):
        print(f"{store}: {n_texts:,} texts to annotate deleted")


def request_log_path(config: Config) -> str:
    """The request log to read: drift.request_log, else serve.request_log.

    Raises:
        ConfigError: neither is set.
    """
    log = config.drift.request_log or config.serve.request_log
    if log is None:
        raise ConfigError("drift.request_log is missing; give the folder or gs:// address of serve.request_log.")
    return log
