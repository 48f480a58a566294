"""The shadow: the challenger answers live texts in another process, unseen by clients, and is compared with the live answers.

No request waits for it. Its texts wait in a bounded queue, are computed while no live text waits, and are dropped first.
"""

import asyncio
import functools
import hashlib
import json
import logging
import math
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter, deque
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI, Response

from sodaops.errors import ConfigError
from sodaops.inference.predictor import Predictor
from sodaops.request_log.journal import shadow_of
from sodaops.serving import schemas
from sodaops.serving.batcher import Batcher, ModelOutput
from sodaops.serving.canary import Challenger, position
from sodaops.serving.metrics import Metrics, ShadowMetrics
from sodaops.serving.models import Models
from sodaops.serving.settings import ServeSettings, open_journal
from sodaops.tasks.estimate import MAX_LABELS, METRICS, estimate
from sodaops.web.policy import page_response

log = logging.getLogger(__name__)
_PAUSE_S = 0.01  # between looks at the live queue while texts wait there
_RETRY_S, _MAX_RETRY_S = 1.0, 60.0  # until another worker is started
_MAX_LINE = 2**24  # bytes of an answer
_RECENT = 1000  # texts that the page is about


class Offer(NamedTuple):
    """A text for the shadow, with the live answer."""

    live: Predictor
    text: str  # raw
    cleaned: str
    probs: np.ndarray  # float32 [n_labels]
    request_id: str
    place: int


class Shadow:
    """Compares the challenger with the bundle in use; its routes are in :func:`add_shadow`.

    Attributes:
        recent: role (live, shadow, canary) -> probs and seconds of its last texts.
        disagreements: both answers to each of the shadow's last texts; None where they agree.
        dropped: reason -> number of texts without an answer of the shadow.
    """

    def __init__(self, settings: ServeSettings, models: Models, batcher: Batcher, metrics: Metrics) -> None:
        self._settings, self._models, self._batcher = settings, models, batcher
        self.metrics = ShadowMetrics(metrics.registry)
        self.challenger = Challenger(settings, models, metrics)
        self.metrics.share.set_function(lambda: self.challenger.share)
        self._journal = open_journal(settings, self.metrics.journal, shadow_of)
        self._waiting: asyncio.Queue[Offer] = asyncio.Queue(settings.max_queue)
        self._roles: dict[str, Predictor] = {}
        self.recent: dict[str, deque[tuple[np.ndarray, float]]] = {}
        self.disagreements: deque[tuple[str, str] | None] = deque(maxlen=_RECENT)
        self.dropped: Counter[str] = Counter()

    def background(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside the requests until it is cancelled; afterwards :meth:`close`."""
        running = [self.run()] if self._settings.shadow_share else []
        if self._settings.reload_s is not None:
            running.append(self.challenger.watch(self._settings.reload_s))
        return [*running, self._journal.run()] if self._journal else running

    async def close(self) -> None:
        """Writes the rest of the log."""
        if self._journal:
            await self._journal.close()

    def observe(
        self, predictor: Predictor, texts: Sequence[str], cleaned: Sequence[str], predictions: Sequence[Any],
        outputs: Sequence[ModelOutput], request_id: str, seconds: float,
    ) -> None:  # fmt: skip
        """Counts the answers to a request, and offers its texts to the shadow unless they are the challenger's already."""
        if predictor not in (self._models.current, self.challenger.current):
            return  # replaced meanwhile
        role = "canary" if predictor is self.challenger.current else "live"
        for prediction, output in zip(predictions, outputs, strict=True):
            self._count(role, predictor, prediction, output.probs, seconds)
        is_chosen = position(f"shadow {request_id}") < self._settings.shadow_share
        if role == "canary" or not is_chosen or not self.challenger.stands_in(predictor):
            return
        for place, (text, clean, output) in enumerate(zip(texts, cleaned, outputs, strict=False)):
            if self._waiting.full():
                self._drop("queue full")
            elif self._batcher.n_waiting and not self._waiting.empty():
                self._drop("live texts wait")
            else:
                self._waiting.put_nowait(Offer(predictor, text, clean, output.probs, request_id, place))

    async def run(self) -> None:
        """Keeps a worker process running until cancelled. After one has ended, each wait is twice the one before."""
        wait_s = _RETRY_S
        while True:
            began, challenger = time.monotonic(), self.challenger.current
            try:
                reason = await self._use_worker(challenger)
            except Exception as error:  # whatever it is, the service goes on
                reason = repr(error)
            if challenger is not self.challenger.current:
                continue
            self.metrics.restarts.inc()
            wait_s = _RETRY_S if time.monotonic() - began > _MAX_RETRY_S else wait_s
            log.error("the shadow's process has ended; another one follows", extra={"reason": reason, "wait_s": wait_s})
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _MAX_RETRY_S)

    async def _use_worker(self, challenger: Predictor) -> str:
        """Has a worker answer one text after another until it ends or there is a new challenger; returns why it ended."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sodaops.serving.worker", self.challenger.source, challenger.info.bundle_id,
            challenger.variant, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=_MAX_LINE,
        )  # fmt: skip
        try:
            while challenger is self.challenger.current:
                offer = await self._waiting.get()
                while self._batcher.n_waiting:  # live texts come first
                    await asyncio.sleep(_PAUSE_S)
                process.stdin.write(json.dumps(offer.text).encode() + b"\n")
                line = await process.stdout.readline()
                self._record(offer, challenger, json.loads(line or b'{"error": "worker ended"}'))
                if not line:
                    printed = (await process.stderr.read()).decode(errors="replace")[-500:]
                    return f"exit code {await process.wait()} {printed}"
            return ""
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    def _record(self, offer: Offer, challenger: Predictor, answer: dict[str, Any]) -> None:
        """Compares an answer of the shadow with the live one."""
        probs, live = np.array(answer.get("probs", []), np.float32), offer.live
        same = live.info.labels == challenger.info.labels  # one may have been reloaded meanwhile
        if not same or probs.shape != offer.probs.shape or not challenger.task.is_valid(probs[None]):
            self._drop(answer.get("error", "not valid"))
            return
        prediction = challenger.prediction(probs)
        label, score = challenger.task.logged(prediction)
        live_label, live_score = live.task.logged(live.prediction(offer.probs))
        own = live.task.as_of_own(probs[None], challenger.task)
        disagreed = live.task.agreement(offer.probs[None], own) < 1
        self._count("shadow", challenger, prediction, probs, answer["seconds"])
        self.metrics.disagreements.inc(disagreed)
        self.disagreements.append((live_label, label) if disagreed else None)
        if self._journal:
            self._journal.append([{
                "time": time.time_ns() // 1000, "request_id": offer.request_id, "place": offer.place,
                "bundle_id": challenger.info.bundle_id, "variant": challenger.variant, "label": label, "score": score,
                "labels": challenger.info.labels, "probs": probs.tolist(), "latency_ms": round(1000 * answer["seconds"], 3),
                "text_sha256": hashlib.sha256(offer.cleaned.encode()).hexdigest(), "live_bundle_id": live.info.bundle_id,
                "live_label": live_label, "live_score": live_score, "live_probs": offer.probs.tolist(), "disagreed": disagreed,
            }])  # fmt: skip

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1
        self.metrics.dropped.labels(reason).inc()

    def _count(self, role: str, predictor: Predictor, prediction: Any, probs: np.ndarray, seconds: float) -> None:
        if self._roles.get(role) is not predictor:  # the numbers of the page are of one bundle
            self._roles[role], self.recent[role] = predictor, deque(maxlen=_RECENT)
            for name in METRICS:
                self.metrics.estimate.labels(role, name).set_function(functools.partial(self._estimate, role, name))
            if role != "canary":
                self.disagreements.clear()
        of = role, predictor.info.bundle_id
        labels, confidence = predictor.task.counted(prediction)
        for label in labels:
            self.metrics.predicted(*of, label).inc()
        if confidence is not None:
            self.metrics.confidence(*of).observe(confidence)
        self.metrics.seconds(*of).observe(seconds)
        self.recent[role].append((probs, seconds))

    def _estimate(self, role: str, metric: str) -> float:
        """A metric of the last texts, estimated without calibration, so that the accuracy is the mean confidence; NaN: none."""
        task, probs = self._roles[role].task, np.array([probs for probs, _ in self.recent[role]])
        if not task.estimates_quality or probs.shape[1] > MAX_LABELS or not np.isfinite(probs).all():
            return math.nan
        return estimate(probs, task.groups(probs), n_samples=1)[metric].value

    def _numbers(self, role: str) -> dict[str, Any]:
        """A row of the page."""
        p50, p95 = np.quantile([1000 * seconds for _, seconds in self.recent[role]], [0.5, 0.95])
        shown = {name: self._estimate(role, name) for name in METRICS} | {"p50_ms": p50, "p95_ms": p95}
        return {"role": role, "bundle_id": self._roles[role].info.bundle_id, "n": len(self.recent[role]), **shown}

    def page(self) -> str:
        """The comparison of the last texts, as HTML."""
        from sodaops.pages import render_page  # only for those who look

        pairs, rows = Counter(filter(None, self.disagreements)), [self._numbers(role) for role in self.recent]
        counts = {"n": len(self.disagreements), "n_disagreed": pairs.total(), "dropped": self.dropped}
        challenger = {"challenger": self.challenger.current.info.bundle_id, "share": self.challenger.share}
        return render_page("shadow", rows=rows, pairs=pairs.most_common(20), **counts, **challenger)


def open_shadow(settings: ServeSettings, models: Models, batcher: Batcher, metrics: Metrics) -> Shadow | None:
    """The shadow of a service; None without ``serve.shadow``, which ``serve.canary`` needs (ConfigError)."""
    if settings.shadow is None and settings.canary:
        raise ConfigError(f"SODAOPS_CANARY={settings.canary} (serve.canary) needs a challenger; set SODAOPS_SHADOW too.")
    return None if settings.shadow is None else Shadow(settings, models, batcher, metrics)


def add_shadow(app: FastAPI, shadow: Shadow) -> None:
    """Adds the routes about the challenger: its page, and the change of its share."""

    @app.get("/shadow", include_in_schema=False)
    async def page() -> Response:
        return page_response(shadow.page())

    @app.post("/admin/canary", tags=["admin"], summary="Change the share of requests that the challenger answers")
    async def canary(body: schemas.CanaryShare) -> schemas.CanaryShare:
        shadow.challenger.set_share(body.share)
        return body
