"""Predictions for the routes, with metrics and the request log; independent of HTTP."""

import asyncio
import contextlib
import functools
import hashlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from opentelemetry import trace
from starlette.exceptions import HTTPException

from sodaops.bundle.layout import BundleInfo
from sodaops.errors import ConfigError, DataError
from sodaops.inference.predictor import Predictor
from sodaops.serving.abstention import PLAIN, Asked, resolve, with_fields
from sodaops.serving.batcher import INLINE_CHARS, Batcher, EmptyText, ModelOutput, Prepared
from sodaops.serving.context import Contexts
from sodaops.serving.log_rows import loggable, prediction_fields
from sodaops.serving.metrics import Metrics
from sodaops.serving.models import Models
from sodaops.serving.pieces import pieces_of
from sodaops.serving.settings import ServeSettings, open_journal
from sodaops.serving.shadow import open_shadow

if TYPE_CHECKING:
    from sodaops.serving.feedback import Feedback

_WATCH_AFTER_S = 0.1  # see Service._outputs_in_time
_EMPTY_SHA256 = hashlib.sha256().hexdigest()


class DeadlineExceeded(Exception):  # noqa: N818 - a state of the service rather than an error
    """The deadline passed before the request was answered."""


class ClientDisconnected(Exception):  # noqa: N818
    """The client disconnected before the request was answered."""


class Service:
    """Holds the bundle, the queue and the request log that the routes use, and traces requests with a tracer if it gets one.

    Raises:
        SodaOpsError: the bundle cannot be loaded, or the journal's folder cannot be used.
    """

    def __init__(self, settings: ServeSettings, tracer: trace.Tracer | None = None) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.models = Models(settings.bundle, settings.variant, self.metrics, settings.abstain)
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
        n_workers = settings.n_workers or n_cores or 1
        self.batcher = Batcher(n_workers, settings.max_queue, settings.max_batch_tokens, self.metrics.batch.observe, tracer)
        self.metrics.queue.set_function(lambda: self.batcher.n_waiting)
        self.contexts = Contexts(self.metrics.others)
        self.latencies_ms: deque[float] = deque(maxlen=500)
        self.journal = open_journal(settings, self.metrics.journal)
        self.shadow = open_shadow(settings, self.models, self.batcher, self.metrics)
        self._feedback = _open_feedback(settings, self.models.current)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the background tasks during the block; afterwards writes the rest of the journal as Parquet parts."""
        tasks = [asyncio.create_task(self.journal.run())] if self.journal else []
        if self.settings.reload_s is not None:
            tasks.append(asyncio.create_task(self.models.watch(self.settings.reload_s)))
        if self.shadow:
            tasks += map(asyncio.create_task, self.shadow.background())
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.batcher.close()
            if self.shadow:
                await self.shadow.close()
            if self.journal:
                await self.journal.close()

    async def predict(
        self, texts: Sequence[str], request_id: str, disconnected: Callable[[], Awaitable[None]], began: float,
        canary_key: str | None = None, asked: Asked = PLAIN,
    ) -> tuple[list[dict[str, Any]], BundleInfo]:  # fmt: skip
        """Predicts a request's texts. The predictions are in the journal when this returns.

        Args:
            texts: raw.
            request_id: for the request log.
            disconnected: returns when the client has disconnected.
            began: ``time.perf_counter()`` at the start of the request.
            canary_key: requests with the same one are answered by the same bundle; None: without a canary.
            asked: whether the fields say more than the prediction.

        Returns:
            The fields of a prediction for each text, and the bundle that made them.

        Raises:
            HTTPException, QueueFull, EmptyText, DeadlineExceeded, ClientDisconnected: the request cannot be answered.
        """
        predictor = self._choose(canary_key, asked)
        asked = resolve(asked, self.settings.abstain, predictor)
        try:
            prepared = await self._prepare(predictor, texts, began)
        except EmptyText as error:  # logged too, since many empty texts may mean that their source is broken
            empty = {"place": error.place, "n_chars": 0, "text_sha256": _EMPTY_SHA256}
            self._append_to_journal(predictor, [empty], request_id, began)
            raise
        outputs = await self._outputs_in_time(self.batcher.submit(predictor, prepared.rows), disconnected, began)
        predictions = [predictor.prediction(output.probs) for output in outputs]
        await self._record(predictor, texts, prepared, predictions, outputs, request_id, began)
        return with_fields(predictor, predictions, asked), predictor.info

    async def explain(
        self, text: str, label: str | None, request_id: str, disconnected: Callable[[], Awaitable[None]], began: float,
        canary_key: str | None = None,
    ) -> tuple[dict[str, Any], list[dict[str, Any]], BundleInfo]:  # fmt: skip
        """Predicts a text and explains the prediction by occlusion.

        The effect of a piece is the label's probability, or the value, with the piece minus that without it.

        Args:
            text: raw.
            label: whose probability is explained; None: that of the prediction.
            request_id: as for :meth:`predict`, like ``disconnected``, ``began`` and ``canary_key``.

        Returns:
            The fields of the prediction, those of each piece (text, effect, and of several columns the column), and the bundle.

        Raises:
            HTTPException: the bundle has no such label.
            QueueFull, EmptyText, DeadlineExceeded, ClientDisconnected: the request cannot be answered.
        """
        predictor = self._choose(canary_key)
        check_label(label, predictor.info.labels)
        cleaned = (await self._prepare(predictor, [text], began)).cleaned[0]
        columns = predictor.info.text_columns
        pieces = pieces_of(cleaned, columns, self.settings.max_queue - len(columns))  # as many as the queue can hold
        occluded = [piece.rest for piece in pieces]
        prepared = await self._prepare(predictor, [cleaned, *occluded], began, cleaned=True)
        outputs = await self._outputs_in_time(self.batcher.submit(predictor, prepared.rows), disconnected, began)
        prediction = predictor.prediction(outputs[0].probs)
        await self._record(predictor, [text], prepared, [prediction], outputs[:1], request_id, began)
        labels = predictor.info.labels
        explained = predictor.task.explained(prediction, labels) if label is None else labels.index(label)
        probs = np.array([output.probs[explained] for output in outputs], dtype=float)
        effects = (probs[0] - probs[1:]).tolist()
        return vars(prediction), [piece.fields(effect) for piece, effect in zip(pieces, effects, strict=True)], predictor.info

    async def store_feedback(self, request_id: str, place: int, answer: object, client: str) -> None:
        """Stores the correct answer for an answered text; :meth:`Feedback.add` lists what else it raises.

        Raises:
            HTTPException: it is no answer of the task.
            ConfigError: no annotation store is configured.
        """
        predictor = self.models.current
        try:
            label = predictor.task.check_answer(answer, predictor.info.labels)
        except DataError as error:
            raise HTTPException(422, str(error)) from None
        if self._feedback is None:
            raise ConfigError("feedback is off; set SODAOPS_FEEDBACK_STORE to the folder of an annotation store.")
        await self._feedback.add(request_id, place, label, client)
        self.metrics.feedback.labels(label if label in predictor.info.labels else "").inc()

    def _choose(self, canary_key: str | None, asked: Asked = PLAIN) -> Predictor:
        return self.shadow.challenger.choose(canary_key, asked) if self.shadow and canary_key else self.models.current

    async def _prepare(self, predictor: Predictor, texts: Sequence[str], began: float, cleaned: bool = False) -> Prepared:
        try:
            return await self.batcher.prepare(predictor, texts, self._remaining_s(began), cleaned)
        except TimeoutError:
            raise DeadlineExceeded from None

    def _remaining_s(self, began: float) -> float:
        return max(0.0, self.settings.deadline_s - (time.perf_counter() - began))

    async def _outputs_in_time(
        self, outputs: asyncio.Future[list[ModelOutput]], disconnected: Callable[[], Awaitable[None]], began: float
    ) -> list[ModelOutput]:
        """Waits for the outputs until the deadline, or until the client disconnects.

        Most requests are answered within ``_WATCH_AFTER_S``, so the task that watches the client starts only then.
        """
        loop = asyncio.get_running_loop()
        remaining_s = self._remaining_s(began)
        delay_s = min(_WATCH_AFTER_S, remaining_s)
        watch: asyncio.Task[None] | None = None

        def start_watch() -> None:
            nonlocal watch
            watch = loop.create_task(_fail_if_abandoned(outputs, disconnected, remaining_s - delay_s))

        timer = loop.call_later(delay_s, start_watch)
        try:
            return await outputs
        finally:
            timer.cancel()
            outputs.cancel()
            if watch:
                watch.cancel()

    async def _record(
        self, predictor: Predictor, texts: Sequence[str], prepared: Prepared, predictions: Sequence[Any],
        outputs: Sequence[ModelOutput], request_id: str, began: float,
    ) -> None:  # fmt: skip
        """Updates the metrics, and writes one row for each text to the journal."""
        for labels, confidence in map(predictor.task.counted, predictions):
            for label in labels:
                self.metrics.predicted(label).inc()
            if confidence is not None:
                self.metrics.confidence.observe(confidence)
        if predictor.abstainer:
            self.metrics.abstained.inc(sum(predictor.reason(prediction) is not None for prediction in predictions))
        seconds = time.perf_counter() - began
        self.latencies_ms.append(1000 * seconds)
        if self.shadow:
            self.shadow.observe(predictor, texts, prepared.cleaned, predictions, outputs, request_id, seconds)
        if self._feedback:
            self._feedback.remember(request_id, len(texts))
        if not self.journal:
            return
        build = functools.partial(self._build_rows, predictor, texts, prepared, predictions, outputs)
        is_short = sum(map(len, prepared.cleaned)) <= INLINE_CHARS and not predictor.has_patterns
        self._append_to_journal(predictor, build() if is_short else await asyncio.to_thread(build), request_id, began)

    def _build_rows(
        self, predictor: Predictor, texts: Sequence[str], prepared: Prepared, predictions: Sequence[Any],
        outputs: Sequence[ModelOutput],
    ) -> list[dict[str, Any]]:  # fmt: skip
        return [
            {
                "place": place,
                "text": loggable(texts[place], predictor, self.settings),
                **prediction_fields(predictor, prepared.cleaned[place], prepared.rows[place], prediction, output),
            }
            for place, (prediction, output) in enumerate(zip(predictions, outputs, strict=True))
        ]

    def _append_to_journal(self, predictor: Predictor, rows: Sequence[dict[str, Any]], request_id: str, began: float) -> None:
        if not self.journal:
            return
        columns = predictor.info.text_columns
        shared = {
            "time": time.time_ns() // 1000,
            "request_id": request_id,
            "bundle_id": predictor.info.bundle_id,
            "variant": predictor.variant,
            "labels": predictor.info.labels,
            **({"text_columns": columns} if len(columns) > 1 else {}),
            **self.contexts.logged(),
            "latency_ms": round(1000 * (time.perf_counter() - began), 3),
        }
        self.journal.append([{**shared, **row} for row in rows])


async def _fail_if_abandoned(
    outputs: asyncio.Future[list[ModelOutput]], disconnected: Callable[[], Awaitable[None]], remaining_s: float
) -> None:
    """Fails the outputs when the client disconnects or the deadline passes."""
    error: Exception = ClientDisconnected()
    try:
        async with asyncio.timeout(remaining_s):
            await disconnected()
    except TimeoutError:
        error = DeadlineExceeded()
    except HTTPException as http_error:  # a request body, which this route does not read, is too large or does not end
        error = http_error
    if not outputs.done():
        outputs.set_exception(error)


def check_label(label: str | None, labels: Sequence[str]) -> None:
    """Refuses a request for a label that the bundle does not have (422)."""
    if label is not None and label not in labels:
        raise HTTPException(422, f"label: not a label of the bundle; it has {', '.join(labels)}")


def _open_feedback(settings: ServeSettings, predictor: Predictor) -> "Feedback | None":
    if settings.feedback_store is None:
        return None
    from sodaops.annotation.store import Store  # imported only if feedback is on
    from sodaops.serving.feedback import Feedback

    info = predictor.info
    store = Store.create(settings.feedback_store, info.labels, predictor.task, info.text_columns)
    return Feedback(store, settings.journal, settings.request_log, settings.deadline_s)
