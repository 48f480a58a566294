"""What is still to be delivered: a queue for each sink, so that a broken one does not hold up the other."""

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from sodaops.alerting.scrape import in_thread
from sodaops.alerting.sinks import Notification, Sink
from sodaops.errors import DeliveryError

FIRST_WAIT_S = 1.0
DEADLINE_S = 20.0
log = logging.getLogger("sodaops.alerts")


class Outbox:
    """Delivers at least once, and in order for each sink.

    Args:
        sinks: who is told.
        limit: notifications kept for each; past it the oldest is dropped and counted.
        max_wait_s: longest wait between two tries.
        registry: for sodaops_alert_notifications_total and sodaops_alert_outbox.
    """

    def __init__(self, sinks: Sequence[Sink], limit: int, max_wait_s: float, registry: CollectorRegistry) -> None:
        self.sinks, self._limit, self._max_wait_s = sinks, limit, max_wait_s
        self._queues: dict[str, deque[Notification]] = {sink.name: deque() for sink in sinks}
        self._filled = {sink.name: asyncio.Event() for sink in sinks}
        self._counter = Counter(
            "sodaops_alert_notifications",
            "Notifications, by how handing them over ended.",
            ("sink", "outcome"),
            registry=registry,
        )
        gauge = Gauge("sodaops_alert_outbox", "Notifications that wait to be delivered.", registry=registry)
        gauge.set_function(lambda: sum(map(len, self._queues.values())))
        for sink in sinks:
            for outcome in ("sent", "failed", "dropped"):
                self._counter.labels(sink.name, outcome)

    def add(self, notifications: Sequence[Notification]) -> None:
        """Queues notifications for every sink."""
        for sink in self.sinks:
            self._extend(sink.name, notifications)

    def _extend(self, name: str, notifications: Sequence[Notification]) -> None:
        queue = self._queues.setdefault(name, deque())
        queue.extend(notifications)
        while len(queue) > self._limit:
            lost = queue.popleft()
            self._counter.labels(name, "dropped").inc()
            log.error("outbox of %s is full; dropped: %s", name, lost.subject)
        if queue and name in self._filled:
            self._filled[name].set()

    def dump(self) -> dict[str, Any]:
        """What waits, for a JSON file."""
        return {name: [one.as_dict() for one in queue] for name, queue in self._queues.items()}

    def load(self, found: Mapping[str, Any]) -> None:
        """Takes in what :meth:`dump` gave; what waits for a sink that is not configured now stays, and is told.

        Raises:
            TypeError: something else.
        """
        for name, waiting in found.items():
            self._extend(name, [Notification.of(fields) for fields in waiting])
            if waiting and name not in self._filled:
                log.warning("%d notifications wait for %s, which is not configured", len(waiting), name)

    async def deliver(self, sink: Sink, save: Callable[[], Awaitable[None]]) -> None:
        """Hands over to one sink whatever is queued for it, until cancelled; ever longer waits follow failures.

        Args:
            sink: one of ``sinks``.
            save: called after each delivery, before the next.
        """
        queue, filled, wait_s = self._queues[sink.name], self._filled[sink.name], FIRST_WAIT_S
        while True:
            await filled.wait()
            if not queue:
                filled.clear()
                continue
            head = queue[0]
            try:
                await in_thread(functools.partial(sink.send, head), DEADLINE_S)
            except Exception as error:  # whatever a sink brings about, it is tried again
                self._counter.labels(sink.name, "failed").inc()
                said = str(error) if isinstance(error, DeliveryError) else type(error).__name__  # others may quote a secret
                log.warning("%r did not take a notification (%s); next try in %g s", sink, said, wait_s)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, self._max_wait_s)
                continue
            self._counter.labels(sink.name, "sent").inc()
            wait_s = FIRST_WAIT_S
            if queue and queue[0] is head:  # else it was dropped meanwhile
                queue.popleft()
            try:
                await save()
            except Exception as error:  # a full disk delays no alarm; after a restart this one may come twice
                log.error("the outbox could not be saved: %s", error)
