"""Rules over signals: what fires, what has recovered, and who is still to be told of it."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from prometheus_client import CollectorRegistry, Gauge
from pydantic import SecretStr

from sodaops.alerting.outbox import Outbox
from sodaops.alerting.scrape import fetch_all
from sodaops.alerting.signals import Scrape, Target, Windows, signals
from sodaops.alerting.sinks import Notification, sinks_of
from sodaops.config.alerts import AlertRule, AlertsConfig
from sodaops.errors import DeliveryError, StorageError
from sodaops.io import storage

API_KEY = "SODAOPS_ALERT_API_KEY"
STATE, HISTORY, LOCK = "state.json", "history.json", "watch.lock"
_FORMAT = 1
log = logging.getLogger("sodaops.alerts")


@dataclass
class RuleState:
    """Where a rule stands. Times are seconds since 1970.

    Attributes:
        since: when the value went past the threshold; None while ok.
        seen: when the signal last had a value.
        sent: when somebody was last told that the rule fires.
        told: whether somebody was told of this alarm, and so is to learn of its end.
    """

    state: Literal["ok", "pending", "firing"] = "ok"
    since: float | None = None
    seen: float | None = None
    sent: float | None = None
    told: bool = False


class Alerts:
    """Scrapes, evaluates and tells; see :meth:`watch`.

    Args:
        config: the rules, what they look at, and who is told.
        environ: for the secrets: SODAOPS_ALERT_WEBHOOK, SODAOPS_ALERT_API_KEY, SODAOPS_SMTP_USER, SODAOPS_SMTP_PASSWORD.
        registry: for sodaops_alert_firing, sodaops_alert_notifications_total and sodaops_alert_outbox.

    Attributes:
        values: the signals as of the last step; one that cannot be told is not in it.
        states: rule -> where it stands.

    Raises:
        ConfigError: a sink that cannot be.
    """

    def __init__(self, config: AlertsConfig, environ: Mapping[str, str], registry: CollectorRegistry) -> None:
        self._config = config
        self._rules: dict[str, AlertRule] = {name: rule for name, rule in config.rules.items() if rule is not None}
        self._windows = Windows(config.window_s, config.traffic_offset_s, config.traffic_min_requests)
        self._api_key = SecretStr(environ[API_KEY]) if environ.get(API_KEY) else None
        self._folder = Path(config.state_dir)
        self._outbox = Outbox(sinks_of(config, environ), config.max_outbox, config.max_retry_s, registry)
        self._firing = Gauge("sodaops_alert_firing", "1 while a rule fires.", ("rule",), registry=registry)
        self._targets: dict[str, Target] = {url: Target() for url in config.metrics_urls}
        self._said: dict[str, str] = {}  # of a URL that does not answer, once
        self._saving = asyncio.Lock()
        self.values: dict[str, float] = {}
        self.states: dict[str, RuleState] = {name: RuleState() for name in self._rules}
        self._show()

    def step(self, samples: Mapping[str, Scrape | None], now: float) -> list[Notification]:
        """Takes scrapes in and moves each rule on.

        Args:
            samples: metrics URL -> what it said; None where it did not answer.
            now: seconds since 1970.

        Returns:
            Who should learn what; nothing is sent or saved here.
        """
        for url, target in self._targets.items():
            target.forget(now - self._windows.kept_s, now)
            scrape = samples.get(url)
            if scrape is not None:
                target.add(scrape, now, self._windows.window_s)
        scrapes = [samples.get(url) for url in self._targets]
        self.values = signals(list(self._targets.values()), scrapes, now, self._windows)
        moved = [
            self._move(name, rule, self.values[rule.signal], now)
            for name, rule in self._rules.items()
            if rule.signal in self.values  # without a value a rule stays where it is
        ]
        self._show()
        return [notification for notification in moved if notification is not None]

    def _move(self, name: str, rule: AlertRule, value: float, now: float) -> Notification | None:
        state = self.states[name]
        since = now if state.since is None else min(state.since, now)  # the clock may have been set back
        if state.state == "pending" and state.seen is not None and now - state.seen > self._config.window_s:
            since = now  # nobody knows that it held in between
        sent = None if state.sent is None else min(state.sent, now)
        state.seen, state.sent = now, sent
        if state.state == "firing":
            if rule.clears(value):
                told = state.told
                state.state, state.since, state.told = "ok", None, False
                return self._notification(name, "recovered", value, since, now) if told else None
        elif rule.fires(value):
            state.state, state.since = "firing" if now - since >= rule.for_s else "pending", since
        else:
            state.state, state.since = "ok", None
        if state.state == "firing" and (sent is None or now - sent >= self._config.cooldown_s):
            state.sent, state.told = now, True
            return self._notification(name, "firing", value, since, now)
        return None

    def _notification(
        self, name: str, kind: Literal["firing", "recovered"], value: float, since: float, now: float
    ) -> Notification:
        rule = self._rules[name]
        said = rule.limit, rule.severity, rule.summary
        return Notification(name, kind, rule.signal, value, *said, since, now, self._config.runbook(name))

    def _show(self) -> None:
        for name, state in self.states.items():
            self._firing.labels(name).set(state.state == "firing")

    async def scrape(self) -> dict[str, Scrape | None]:
        """Asks every metrics URL once; one that does not answer is told in the log when that begins, and when it ends."""
        key = self._api_key.get_secret_value() if self._api_key else None
        found = await fetch_all(self._config.metrics_urls, key)
        for url, came in found.items():
            said = str(came) if isinstance(came, DeliveryError) else ""
            if said != self._said.get(url, ""):
                log.warning("%s: %s", url, said or "answers again")
            self._said[url] = said
        return {url: came if isinstance(came, Scrape) else None for url, came in found.items()}

    async def watch(self) -> None:
        """Scrapes, evaluates and delivers until cancelled; what goes wrong in a round is in the log, and the next one comes.

        Raises:
            StorageError: another process watches with this folder, or what is in it is damaged.
        """
        with self._alone():
            self.load()
            if not self._outbox.sinks:
                log.warning("no sink is configured: alarms are only in this log and in the metrics")
            async with asyncio.TaskGroup() as group:
                for sink in self._outbox.sinks:
                    group.create_task(self._outbox.deliver(sink, self.save))
                while True:
                    began = time.monotonic()
                    try:
                        await self._round()
                    except Exception:  # a full disk, and whatever else
                        log.exception("this round failed")
                    await asyncio.sleep(max(0.0, began + self._config.every_s - time.monotonic()))

    async def _round(self) -> None:
        notifications = self.step(await self.scrape(), time.time())
        for notification in notifications:
            log.warning("%s", notification.subject, extra={"rule": notification.rule, "kind": notification.kind})
        self._outbox.add(notifications)
        await self.save()
        targets = {url: asdict(target) for url, target in self._targets.items()}
        text = json.dumps({"format": _FORMAT, "targets": targets}, allow_nan=False, separators=(",", ":"))
        await asyncio.to_thread(storage.write_text, self._folder / HISTORY, text)

    async def save(self) -> None:
        """Writes where the rules stand and what is still to be delivered.

        Raises:
            StorageError: the folder cannot be written to.
        """
        async with self._saving:  # in the order in which things happened
            rules = {name: asdict(state) for name, state in self.states.items()}
            value = {"format": _FORMAT, "rules": rules, "outbox": self._outbox.dump()}
            await asyncio.to_thread(storage.write_json, self._folder / STATE, value)

    def load(self) -> None:
        """Goes on where an earlier process stopped. Rules and URLs that are configured no more are forgotten.

        Raises:
            StorageError: a file of the state is damaged.
        """
        with _reading(self._folder / STATE) as found:
            for name, fields in found.get("rules", {}).items():
                if name in self.states:
                    self.states[name] = RuleState(**fields)
            self._outbox.load(found.get("outbox", {}))
        with _reading(self._folder / HISTORY) as found:
            for url, fields in found.get("targets", {}).items():
                if url in self._targets:
                    points = [(float(when), dict(totals)) for when, totals in fields.pop("points")]
                    self._targets[url] = Target(**fields, points=points)
        self._show()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with storage.writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / LOCK, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise StorageError(
                    f"{self._folder}: another process watches with it; stop that one, or set alerts.state_dir."
                ) from None
        try:
            yield
        finally:
            lock.release()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """What a file of the state holds; nothing where there is none."""
    mend = "move it away to begin anew: rules then begin as ok, and nothing waits to be delivered."
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"format": _FORMAT}
        if found["format"] != _FORMAT:
            raise StorageError(f"{path}: format {found['format']} of another version; expected {_FORMAT}; {mend}")
        yield found
    except OSError as error:
        raise StorageError(f"{path}: not readable ({error.strerror}); give this user access to it.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: damaged ({type(error).__name__}); {mend}") from error
