"""The verbs around the request log: drift, watch, log."""

import argparse
import os
import sys
from pathlib import Path

from sodaops.cli.registry import parse_with_overrides
from sodaops.cli.training import shown_path
from sodaops.config.schema import Config
from sodaops.errors import AlarmError, ConfigError, StorageError
from sodaops.io import remote


def run_drift(rest: list[str]) -> None:
    """`sodaops drift BUNDLE`."""
    parser = argparse.ArgumentParser(prog="sodaops drift", description="Holds the request log against a bundle's reference.")
    parser.add_argument("bundle", help="RUN/bundle, gs://BUCKET/FOLDER or REGISTRY@champion")
    parser.add_argument("--fail-on-drift", action="store_true", help="exit code 4 when there is drift, for cron and CI")
    asked, config = parse_with_overrides(parser, rest)
    from sodaops.drift.check import PAGE, check, describe

    found = check(config.drift, asked.bundle, log_of(config))
    print(describe(found))
    print(f"report: {shown_path(remote.join(config.drift.output_dir, PAGE))}")
    if found.drifted and asked.fail_on_drift:
        raise AlarmError(f"{found.bundle_id}: drift ({', '.join(cause.name for cause in found.causes)}).")


def run_watch(rest: list[str]) -> None:
    """`sodaops watch BUNDLE`: becomes the drift service, as `sodaops serve` becomes the predictor."""
    parser = argparse.ArgumentParser(prog="sodaops watch", description="The drift service: looks again and again, over HTTP.")
    parser.add_argument("bundle", help="RUN/bundle, gs://BUCKET/FOLDER or REGISTRY@champion")
    asked, config = parse_with_overrides(parser, rest)
    from sodaops.drift.settings import PREFIX
    from sodaops.web.settings import as_environment

    section = config.drift.model_copy(update={"request_log": log_of(config)})
    explicit = {text.partition("=")[0].removeprefix("drift.") for text in rest} | {"request_log"}
    variables = {**os.environ, **as_environment(section, explicit, PREFIX), f"{PREFIX}BUNDLE": asked.bundle}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "sodaops.drift"], variables)


def run_log(rest: list[str]) -> None:
    """`sodaops log forget` and `sodaops log prune`."""
    parser = argparse.ArgumentParser(prog="sodaops log", description="Deletes from the request log, and says what.")
    parser.add_argument("what", choices=["forget", "prune"])
    parser.add_argument("--request-id", action="append", default=[], help="forget: every row of this request")
    parser.add_argument("--text-hash", action="append", default=[], help="forget: every row of the text with this SHA-256")
    parser.add_argument("--days", type=int, help="prune: parts of days before that many days ago (default: serve.keep_days)")
    asked, config = parse_with_overrides(parser, rest)
    from sodaops.request_log.retention import forget, prune

    if asked.what == "prune":
        days = asked.days if asked.days is not None else config.serve.keep_days
        if days is None:
            raise ConfigError("give how many days are kept: --days N, or serve.keep_days=N.")
        if not 1 <= days <= 36_500:
            raise ConfigError(f"--days {days}: expected a number of days, 1 to 36500.")
        gone = prune(log_of(config), days)
        print("\n".join(f"{path}: deleted" for path in gone) or f"nothing is older than {days} days")
        return
    if not (asked.request_id or asked.text_hash):
        raise ConfigError("give what to forget: --request-id ID, or --text-hash SHA256; each may come several times.")
    journal = config.serve.journal_dir or (None if "://" in log_of(config) else str(Path(log_of(config)) / "journal"))
    found = forget(log_of(config), journal, asked.request_id, asked.text_hash)
    print(found.summary())
    if journal is None:
        print("note: no journal was looked at; what is in no part yet lies in serve.journal_dir of the service")
    if remote.is_address(config.drift.output_dir) or Path(config.drift.output_dir).is_dir():
        print(f"note: {config.drift.output_dir} may show such texts until the next look; delete it, or look again")
    _forget_annotations(config, asked.request_id, asked.text_hash)
    if found.held or found.unread:
        raise StorageError("there may be more of it in what could not be looked at; see above.")


def _forget_annotations(config: Config, request_ids: list[str], text_hashes: list[str]) -> None:
    """Takes the texts out of the annotation store as well, where there is one."""
    from sodaops.annotation.database import INFO
    from sodaops.annotation.store import Store

    store = Path(config.annotate.store)
    if (store / INFO).exists() and (n_texts := Store(store).forget(request_ids, text_hashes)):
        print(f"{store}: {n_texts:,} texts to annotate deleted")


def log_of(config: Config) -> str:
    log = config.drift.request_log or config.serve.request_log
    if log is None:
        raise ConfigError("drift.request_log is missing; give the folder or gs:// address that serve.request_log had.")
    return log
