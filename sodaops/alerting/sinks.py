"""Who is told: a webhook that takes Slack's JSON, and e-mail. No message of theirs holds an address or a password."""

import html
import json
import logging
import re
import smtplib
import ssl
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any, Literal, Protocol, Self

from pydantic import SecretStr

from sodaops.alerting.scrape import ask
from sodaops.config.alerts import AlertsConfig, EmailConfig
from sodaops.errors import ConfigError, DeliveryError

TIMEOUT_S = 5.0
WEBHOOK, USER, PASSWORD = "SODAOPS_ALERT_WEBHOOK", "SODAOPS_SMTP_USER", "SODAOPS_SMTP_PASSWORD"
_COLOURS = {"page": "#c62828", "ticket": "#ef6c00"}
log = logging.getLogger("sodaops.alerts")


@dataclass(frozen=True)
class Notification:
    """Something that happened to a rule.

    Attributes:
        kind: test is a trial of the sinks.
        value: of the signal, then.
        limit: the threshold, as ``above 0.02``.
        since: when the rule went past its threshold, in seconds since 1970.
        at: when it fired, or recovered.
        runbook: the address of what to do; empty: none.
    """

    rule: str
    kind: Literal["firing", "recovered", "test"]
    signal: str
    value: float
    limit: str
    severity: str
    summary: str
    since: float
    at: float
    runbook: str = ""

    @property
    def id(self) -> str:
        """The same each time that it is sent, so that a receiver can tell a repetition."""
        return f"{self.rule}-{self.kind}-{self.at:.3f}"

    @property
    def subject(self) -> str:
        """One line.

        >>> Notification("errors", "firing", "error_rate", 0.25, "above 0.02", "page", "Bad.", 0, 60).subject
        '[page] errors fires: error_rate is 0.25 (above 0.02)'
        """
        verb = {"firing": "fires", "recovered": "has recovered", "test": "is a test"}[self.kind]
        return f"[{self.severity}] {self.rule} {verb}: {self.signal} is {self.value:.4g} ({self.limit})"

    @property
    def body(self) -> str:
        """The summary, since when, and where it is said what to do."""
        since, at = (datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") for when in (self.since, self.at))
        more = f"\nWhat to do: {self.runbook}" if self.runbook else ""
        return f"{self.summary}\nPast its threshold since {since}; this was seen at {at}.{more}"

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """What :meth:`as_dict` gave.

        Raises:
            TypeError: other fields.
        """
        return cls(**fields)


class Sink(Protocol):
    """Something that takes notifications."""

    name: str

    def send(self, notification: Notification) -> None:
        """Hands one over.

        Raises:
            DeliveryError: it was not taken, as far as can be told.
        """


class Webhook:
    """A POST of Slack's JSON to any URL.

    Args:
        url: http or https; all but its scheme and host is taken for a secret.
        key: where it was given, for messages.

    Raises:
        ConfigError: it is no such URL.
    """

    name = "webhook"

    def __init__(self, url: SecretStr, key: str) -> None:
        self.where = _host(url.get_secret_value())
        if self.where is None:
            raise ConfigError(
                f"{key}: expected a URL, https://HOST/PATH without a user; what is there is not shown, since it is a secret."
            )
        self._url = url

    def __repr__(self) -> str:
        return f"Webhook({self.where})"

    def send(self, notification: Notification) -> None:
        """Posts it; anything but a 2xx answer within the timeout is a failure."""
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "sodaops-alerts",
            "X-Sodaops-Notification": notification.id,
        }
        body = json.dumps(slack(notification)).encode()
        ask(urllib.request.Request(self._url.get_secret_value(), body, headers, method="POST"), TIMEOUT_S, max_bytes=0)


def _host(url: str) -> str | None:
    """Scheme and host of a URL; None of anything else."""
    if not re.fullmatch(r"https?://[^\s/?#\\]+([/?#][!-~]*)?", url):
        return None
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.username is not None or not parts.hostname:
        return None
    return f"{parts.scheme}://{parts.hostname}" + (f":{port}" if port is not None else "")


def slack(notification: Notification) -> dict[str, Any]:
    """A notification as Slack's incoming webhooks take it."""
    colour = _COLOURS.get(notification.severity) if notification.kind == "firing" else "#2e7d32"
    names = {"Rule": notification.rule, "State": notification.kind, "Severity": notification.severity}
    numbers = {"Signal": notification.signal, "Value": f"{notification.value:.4g}", "Threshold": notification.limit}
    fields = [{"title": title, "value": value, "short": True} for title, value in (names | numbers).items()]
    attachment = {
        "color": colour or "#546e7a",
        "fallback": notification.subject,
        "text": html.escape(notification.body, quote=False),
        "fields": fields,
        "ts": int(notification.at),
    }
    return {"text": html.escape(notification.subject, quote=False), "attachments": [attachment]}


class Email:
    """Mail by SMTP.

    Raises:
        ConfigError: a user without a password, a password that would go in clear, or an address that is none.
    """

    name = "email"

    def __init__(self, config: EmailConfig, user: str | None, password: SecretStr | None) -> None:
        if (user is None) != (password is None):
            raise ConfigError(f"{USER} and {PASSWORD}: give both or neither.")
        if password is not None and not config.starttls:
            raise ConfigError(f"alerts.email.starttls=False: {PASSWORD} would be sent in clear; set it to true, or unset both.")
        for address in (config.sender, *config.recipients):
            if not re.fullmatch(r"[^\s@<>,;]+@[^\s@<>,;]+", address):
                raise ConfigError(f"alerts.email: {address!r} is no address; expected NAME@HOST.")
        self.where = f"{config.host}:{config.port}"
        self._config, self._user, self._password = config, user, password

    def __repr__(self) -> str:
        return f"Email({self.where})"

    def send(self, notification: Notification) -> None:
        """Hands it to the server, which then answers for it."""
        try:
            with smtplib.SMTP(self._config.host, self._config.port, timeout=TIMEOUT_S) as server:
                if self._config.starttls:
                    server.starttls(context=ssl.create_default_context())
                if self._user is not None and self._password is not None:
                    server.login(self._user, self._password.get_secret_value())
                refused = server.send_message(self._message(notification))
        except smtplib.SMTPResponseException as error:  # what the server says may quote what it was given
            raise DeliveryError(f"{type(error).__name__}, code {error.smtp_code}") from None
        except smtplib.SMTPException as error:
            raise DeliveryError(type(error).__name__) from None
        except TimeoutError:
            raise DeliveryError(f"no answer within {TIMEOUT_S:g} s") from None
        except OSError as error:
            raise DeliveryError(error.strerror or type(error).__name__) from None
        if refused:
            log.warning("the mail server refused %d of %d recipients", len(refused), len(self._config.recipients))

    def _message(self, notification: Notification) -> EmailMessage:
        message = EmailMessage()
        message["Subject"] = " ".join(notification.subject.split())
        message["From"], message["To"] = self._config.sender, ", ".join(self._config.recipients)
        message["Date"] = format_datetime(datetime.fromtimestamp(notification.at, UTC))
        message["Message-ID"] = f"<{notification.id}@{self._config.sender.partition('@')[2]}>"
        message.set_content(f"{notification.subject}\n\n{notification.body}\n")
        return message


def sinks_of(config: AlertsConfig, environ: Mapping[str, str]) -> list[Sink]:
    """The sinks that are configured; the environment goes first.

    Raises:
        ConfigError: an address that is none, or half of a login.
    """
    found: list[Sink] = []
    if environ.get(WEBHOOK):
        found.append(Webhook(SecretStr(environ[WEBHOOK]), WEBHOOK))
    elif config.webhook_url is not None:
        found.append(Webhook(config.webhook_url, "alerts.webhook_url"))
    if config.email is not None:
        password = environ.get(PASSWORD)
        found.append(Email(config.email, environ.get(USER) or None, SecretStr(password) if password else None))
    return found
