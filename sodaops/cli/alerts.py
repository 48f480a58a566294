"""The commands `sodaops alerts check` and `render`."""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sodaops.cli.training import configured, shown_path
from sodaops.errors import AlarmError, ConfigError

if TYPE_CHECKING:
    from sodaops.alerting.check import RuleResult


def run_alerts_check(options: argparse.Namespace) -> None:
    """`sodaops alerts check`: prints a table of the rules, and sends what fires.

    Raises:
        AlarmError: a rule fires.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError("prometheus_client is not installed; get it with `pip install 'sodaops[alerts]'`.")
    from sodaops.alerting import check

    config = configured(options).alerts
    urls = check.notify_urls(os.environ) if options.notify else None
    results = check.check_rules(config, os.environ.get(check.API_KEY), options.wait)
    _print_results(results)
    firing = [result for result in results if result.fires]
    if firing and urls is not None:
        check.notify(config, firing, urls)
    if firing:
        raise AlarmError(f"{', '.join(result.name for result in firing)}: {'fires' if len(firing) == 1 else 'fire'}.")


def _print_results(results: "Sequence[RuleResult]") -> None:
    print(f"{'rule':<16}{'signal':<17}{'value':>11}  {'threshold':<14}state")
    for result in results:
        value, state = (
            ("–", "no value") if result.value is None else (f"{result.value:.4g}", "firing" if result.fires else "ok")
        )
        print(f"{result.name:<16}{result.rule.signal:<17}{value:>11}  {result.rule.limit:<14}{state}")
    if any(result.value is None for result in results):
        print("no value: rates need two scrapes (--wait SECONDS) and requests in between; traffic needs Prometheus")


def run_alerts_render(options: argparse.Namespace) -> None:
    """`sodaops alerts render`: writes the rules, receivers and dashboards.

    Raises:
        StorageError: the folder cannot be written to.
    """
    from sodaops.alerting.alertmanager import ALERTMANAGER, alertmanager_config
    from sodaops.alerting.dashboard import grafana_dashboards
    from sodaops.alerting.render import GOOGLE, PROMETHEUS, google_policies, prometheus_rules
    from sodaops.io import storage

    config, folder = configured(options).alerts, Path(options.output)
    files = {
        PROMETHEUS: prometheus_rules(config),
        ALERTMANAGER: alertmanager_config(config),
        **grafana_dashboards(config),
        GOOGLE: google_policies(config),
    }
    for name, text in files.items():
        storage.write_text(folder / name, text)
        print(shown_path(folder / name))
    if config.webhook_url_file is None and config.email is None:
        print(f"note: {ALERTMANAGER} notifies nobody; set alerts.webhook_url_file or alerts.email")
