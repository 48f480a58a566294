"""The verb of the alarms: alerts watch, check, test and render."""

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sodaops.cli.training import configured, shown_path
from sodaops.config.schema import AlertsConfig
from sodaops.errors import AlarmError, ConfigError, DeliveryError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from sodaops.alerting.alerts import Alerts

_TEXT = "%(asctime)s %(levelname)s %(message)s"


def run_alerts(rest: list[str]) -> None:
    """`sodaops alerts watch`, `check`, `test` and `render`."""
    parser = argparse.ArgumentParser(
        prog="sodaops alerts",
        description="Watches the metrics of the services, and tells people.",
        epilog="KEY=VALUE changes the configuration: alerts.rules.errors.above=0.05, alerts.rules.drift=null",
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="watch|check|test|render")
    watching = verbs.add_parser("watch", help="scrape, evaluate and tell, until stopped")
    watching.add_argument("--metrics-port", type=int, help="also offer the watch's own metrics on this port of this machine")
    checking = verbs.add_parser("check", help="look once; exit code 4 when a rule fires. Nothing is sent or saved")
    checking.add_argument("--wait", type=float, default=0.0, help="seconds after which to look again, which gives rates")
    verbs.add_parser("test", help="send a test notification to each sink")
    rendering = verbs.add_parser("render", help="write the rules for Prometheus and Google Cloud")
    rendering.add_argument("--output", default="outputs/alerts", help="the folder (default: outputs/alerts)")
    asked, others = parser.parse_known_args(rest)
    flags = [text for text in others if text.startswith("-") and text.partition("=")[0] not in ("--config-dir", "--params")]
    if flags:
        parser.error(f"{flags[0]!r} is not understood; expected KEY=VALUE")
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError("prometheus_client is not installed; get it with `pip install 'sodaops[serve]'`.")
    config = configured(others).alerts
    if asked.what == "watch":
        watch(config, asked.metrics_port)
    elif asked.what == "check":
        check(config, asked.wait)
    elif asked.what == "test":
        test(config)
    else:
        render(config, Path(asked.output))


def watch(config: AlertsConfig, metrics_port: int | None) -> None:
    """Watches in the foreground until SIGTERM or Ctrl-C.

    Raises:
        StorageError: another process watches with the same folder, or what is in it is damaged.
        ConfigError: a sink that cannot be, or a port that is taken.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    logging.basicConfig(level=logging.INFO, format=_TEXT, stream=sys.stdout)
    registry = CollectorRegistry()
    alerts = _alerts(config, registry)
    if metrics_port is not None:
        try:
            start_http_server(metrics_port, "127.0.0.1", registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--metrics-port {metrics_port}: {error}; choose another, 1024 to 65535.") from None

    async def until_told() -> None:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await alerts.watch()

    asyncio.run(until_told())


def check(config: AlertsConfig, wait_s: float = 0.0) -> None:
    """Looks once, from where a watch has left its state, and prints a table; nothing is sent or saved.

    Args:
        config: the rules.
        wait_s: seconds after which to look a second time; 0: only once.

    Raises:
        AlarmError: a rule fires.
    """
    alerts = _alerts(config)
    alerts.load()

    async def look() -> None:
        alerts.step(await alerts.scrape(), time.time())
        if wait_s > 0:
            await asyncio.sleep(wait_s)
            alerts.step(await alerts.scrape(), time.time())

    asyncio.run(look())
    print(f"{'rule':<16}{'signal':<17}{'value':>11}  {'threshold':<14}{'for':>7}  state")
    for name, state in alerts.states.items():
        rule, value = config.rules[name], alerts.values.get(config.rules[name].signal)
        shown = f"{value:.4g}" if value is not None else "–"
        print(f"{name:<16}{rule.signal:<17}{shown:>11}  {rule.limit:<14}{rule.for_s:>5g} s  {state.state}")
    missing = sorted({config.rules[name].signal for name in alerts.states} - set(alerts.values))
    if missing:
        print(f"no value: {', '.join(missing)}; rates need two looks within {config.window_s:g} s (a watch, or --wait SECONDS)")
    firing = [name for name, state in alerts.states.items() if state.state == "firing"]
    if firing:
        raise AlarmError(f"{', '.join(firing)}: {'fires' if len(firing) == 1 else 'fire'}.")


def test(config: AlertsConfig) -> None:
    """Sends a test notification to each sink and prints what came back.

    Raises:
        ConfigError: there is no sink.
        DeliveryError: one did not take it.
    """
    from sodaops.alerting.sinks import WEBHOOK, Notification, sinks_of

    sinks = sinks_of(config, os.environ)
    if not sinks:
        raise ConfigError(f"no sink is configured; set {WEBHOOK}, or alerts.email.")
    now, failed = time.time(), []
    said = "This is a test of the alerts; nothing is wrong."
    for sink in sinks:
        try:
            sink.send(Notification("test", "test", "test", 1.0, "no threshold", "ticket", said, now, now))
            print(f"{sink!r}: taken")
        except DeliveryError as error:
            failed.append(f"{sink!r}: {error}")
    if failed:
        raise DeliveryError("; ".join(failed) + ". Check the address, the login and the connection.")


def render(config: AlertsConfig, folder: Path) -> None:
    """Writes the rules for Prometheus and Google Cloud.

    Raises:
        StorageError: the folder cannot be written to.
    """
    from sodaops.alerting import render as rules_as
    from sodaops.io import storage

    for name, text in {rules_as.PROMETHEUS: rules_as.prometheus(config), rules_as.GOOGLE: rules_as.google(config)}.items():
        storage.write_text(folder / name, text)
        print(shown_path(folder / name))


def _alerts(config: AlertsConfig, registry: "CollectorRegistry | None" = None) -> "Alerts":
    from prometheus_client import CollectorRegistry

    from sodaops.alerting.alerts import Alerts

    return Alerts(config, os.environ, registry or CollectorRegistry())
