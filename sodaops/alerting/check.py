"""One evaluation of the alert rules against the current metrics, and its notification through Apprise."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sodaops.alerting.scrape import scrape_all
from sodaops.alerting.signals import signal_values
from sodaops.config.alerts import AlertRule, AlertsConfig
from sodaops.errors import ConfigError, DeliveryError, StorageError

API_KEY, NOTIFY_URL, NOTIFY_URL_FILE = "SODAOPS_ALERT_API_KEY", "SODAOPS_ALERT_URL", "SODAOPS_ALERT_URL_FILE"


@dataclass(frozen=True)
class RuleResult:
    """The value of a rule's signal; None where it cannot be computed from the scrapes."""

    name: str
    rule: AlertRule
    value: float | None

    @property
    def fires(self) -> bool:
        """Whether the threshold is exceeded; ``for_s`` needs a history, and is not considered."""
        return self.value is not None and self.rule.fires(self.value)


def check_rules(config: AlertsConfig, api_key: str | None, wait_s: float = 0.0) -> list[RuleResult]:
    """Evaluates every enabled rule.

    Args:
        config: the rules, and the URLs of the metrics.
        api_key: of the services.
        wait_s: seconds between two scrapes, which rates need; 0: one scrape, and rules on rates have no value.
    """
    first = None
    if wait_s > 0:
        first = scrape_all(config.metrics_urls, api_key)
        time.sleep(wait_s)
    values = signal_values(first, scrape_all(config.metrics_urls, api_key))
    return [RuleResult(name, rule, values.get(rule.signal)) for name, rule in config.enabled_rules().items()]


def notify_urls(environ: Mapping[str, str]) -> str:
    """The Apprise URLs, from SODAOPS_ALERT_URL or the file that SODAOPS_ALERT_URL_FILE names.

    Raises:
        ConfigError: neither or both are set.
        StorageError: the file cannot be read.
    """
    urls, path = environ.get(NOTIFY_URL), environ.get(NOTIFY_URL_FILE)
    if bool(urls) == bool(path):
        raise ConfigError(f"set one of {NOTIFY_URL} (an Apprise URL) and {NOTIFY_URL_FILE} (a file that holds one).")
    if urls:
        return urls
    try:
        return Path(str(path)).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{NOTIFY_URL_FILE}={path}: not readable ({type(error).__name__}).") from None


def notify(config: AlertsConfig, firing: Sequence[RuleResult], urls: str) -> None:
    """Sends one message about the rules that fire.

    Args:
        config: for the links to the runbook.
        firing: at least one result.
        urls: Apprise URLs, separated by spaces, commas or lines. They hold secrets and appear in no message.

    Raises:
        ConfigError: Apprise is not installed, or a URL is not one of Apprise's.
        DeliveryError: a message was not delivered.
    """
    try:
        from apprise import Apprise, NotifyType
    except ModuleNotFoundError:
        raise ConfigError("Apprise is not installed; get it with `pip install 'sodaops[alerts]'`.") from None

    apprise_log = logging.getLogger("apprise")
    was_disabled, apprise_log.disabled = apprise_log.disabled, True  # its messages may hold parts of a URL
    try:
        client = Apprise()
        if not client.add(urls) or not len(client):
            raise ConfigError(
                f"{NOTIFY_URL}: not an Apprise URL, such as slack://… or mailto://…; it is a secret and not shown."
            )
        title = f"SoDaOps: {', '.join(result.name for result in firing)}"
        if not client.notify(
            body="\n".join(_line(config, result) for result in firing), title=title, notify_type=NotifyType.FAILURE
        ):
            raise DeliveryError(f"the notification was not delivered; check {NOTIFY_URL}, and that its server can be reached.")
    finally:
        apprise_log.disabled = was_disabled


def _line(config: AlertsConfig, result: RuleResult) -> str:
    rule, runbook = result.rule, config.runbook(result.name)
    line = f"[{rule.severity}] {result.name}: {rule.summary}; {rule.signal} is {result.value:.4g} ({rule.limit})"
    return f"{line} {runbook}".rstrip()
