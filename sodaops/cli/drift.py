"""The commands of the request log: drift, watch, log forget and log prune."""

import argparse
import os
import sys
from pathlib import Path

from sodaops.cli.training import configured, explicit_keys, shown_path
from sodaops.config.schema import Config
from sodaops.errors import AlarmError, ConfigError, StorageError
from sodaops.io import remote


def run_drift(options: argparse.Namespace) -> None:
    """`sodaops drift BUNDLE`."""
    from sodaops.drift.check import PAGE, check_drift, format_result

    config = configured(options)
    result = check_drift(config.drift, options.bundle, request_log_path(config))
    print(format_result(result))
    print(f"report: {shown_path(remote.join(config.drift.output_dir, PAGE))}")
    if result.drifted and options.fail_on_drift:
        raise AlarmError(f"{result.bundle_id}: drift ({', '.join(cause.name for cause in result.causes)}).")


def run_watch(options: argparse.Namespace) -> None:
    """`sodaops watch BUNDLE`: replaces this process by the drift service."""
    from sodaops.drift.settings import PREFIX
    from sodaops.web.settings import as_environment

    config = configured(options)
    section = config.drift.model_copy(update={"request_log": request_log_path(config)})
    explicit = explicit_keys(options, "drift") | {"request_log"}
    variables = {**os.environ, **as_environment(section, explicit, PREFIX), f"{PREFIX}BUNDLE": options.bundle}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "sodaops.drift"], variables)


def run_log_prune(options: argparse.Namespace) -> None:
    """`sodaops log prune`."""
    from sodaops.request_log.parts import all_logs
    from sodaops.request_log.retention import prune

    config = configured(options)
    days = options.days if options.days is not None else config.serve.keep_days
    if days is None:
        raise ConfigError("the number of days to keep is missing; give --days N or serve.keep_days=N.")
    if not 1 <= days <= 36_500:
        raise ConfigError(f"--days {days}: expected a number of days, 1 to 36500.")
    deleted = [path for log in all_logs(request_log_path(config)) for path in prune(log, days)]
    print("\n".join(f"{path}: deleted" for path in deleted) or f"nothing is older than {days} days")


def run_log_forget(options: argparse.Namespace) -> None:
    """`sodaops log forget`: deletes rows from the log, its journal and the annotation store.

    Raises:
        StorageError: a part could not be read, or a running service still holds rows.
    """
    from sodaops.request_log.retention import forget

    config, request_ids, text_hashes = configured(options), options.request_id, options.text_hash
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
