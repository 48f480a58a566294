"""The service without HTTP: texts in, answers out, each counted and logged."""

import asyncio
import contextlib
import functools
import hashlib
import itertools
import logging
import os
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from starlette.exceptions import HTTPException

from sodaops.bundle.layout import BundleInfo
from sodaops.errors import ConfigError, StorageError
from sodaops.inference.predictor import Prediction, Predictor
from sodaops.request_log.journal import Journal
from sodaops.serving.batcher import INLINE_CHARS, Answer, Batcher, EmptyText, Prepared
from sodaops.serving.metrics import Metrics
from sodaops.serving.models import Models
from sodaops.serving.settings import ServeSettings
from sodaops.text.cleaning import clean
from sodaops.text.redaction import redact

if TYPE_CHECKING:
    from sodaops.annotation.store import Store

log = logging.getLogger("sodaops.serving")
_QUICK_S = 0.1
_SPANS = 32  # pieces that an explanation takes out, one at a time


class DeadlineExceeded(Exception):  # noqa: N818 - a state of the service, no fault
    """The deadline passed before there was an answer."""


class ClientDisconnected(Exception):  # noqa: N818
    """The client went away before there was an answer."""


class Result(NamedTuple):
    """The answers to a request."""

    predictions: list[Prediction]
    info: BundleInfo


class Explained(NamedTuple):
    """An answer, and what each piece of the text did for it."""

    prediction: Prediction
    pieces: list[tuple[str, float]]
    info: BundleInfo


class Service:
    """The bundle, the queue and the request log behind the routes.

    Raises:
        SodaOpsError: the bundle cannot be loaded, or the journal's folder cannot be used.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.models = Models(settings.bundle, settings.variant, self.metrics)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
        n_workers = settings.n_workers or cores or 1
        self.batcher = Batcher(n_workers, settings.max_queue, settings.max_batch_tokens, self.metrics.batch.observe)
        self.metrics.queue.set_function(lambda: self.batcher.n_waiting)
        self.latencies_ms: deque[float] = deque(maxlen=500)
        self.journal = _journal(settings, self.metrics)
        self._feedback = _feedback(settings, self.models.current.info.labels)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The tasks beside the requests; at the end, what is in the journal goes into parts."""
        tasks = [asyncio.create_task(self.journal.run())] if self.journal else []
        if self.settings.reload_s is not None:
            tasks.append(asyncio.create_task(self.models.watch(self.settings.reload_s)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.batcher.close()
            if self.journal:
                await self.journal.close()

    async def answer(self, texts: Sequence[str], request_id: str, gone: Callable[[], Awaitable[None]], began: float) -> Result:
        """Answers the raw texts of a request; when this returns, they are in the journal.

        Args:
            texts: raw.
            request_id: for the log.
            gone: returns when the client has gone away.
            began: ``time.perf_counter`` at the request's head.

        Raises:
            QueueFull, EmptyText, DeadlineExceeded, ClientDisconnected: no answer, for that reason.
        """
        predictor = self.models.current
        try:
            prepared = await self.batcher.prepare(predictor, texts)
        except EmptyText as empty:
            self._note(predictor, [self._empty_row(empty.place)], request_id, began)
            raise
        answers = await self._in_time(self.batcher.submit(predictor, prepared.rows), gone, began)
        predictions = [predictor.prediction(answer.probs) for answer in answers]
        await self._record(predictor, texts, prepared, predictions, answers, request_id, began)
        return Result(predictions, predictor.info)

    async def explain(self, text: str, request_id: str, gone: Callable[[], Awaitable[None]], began: float) -> Explained:
        """Answers a text, and says what each piece of it did: the label's probability with it less that without it
        (occlusion). A piece is a word, or several where there are more than 32 words. The answer is logged as any other.

        Raises:
            QueueFull, EmptyText, DeadlineExceeded, ClientDisconnected: no answer, for that reason.
        """
        predictor = self.models.current
        cleaned = predictor.clean(text)
        if not cleaned:
            raise EmptyText(0)
        words = re.findall(r"\S+\s*", cleaned)
        n_pieces = min(len(words), _SPANS, self.settings.max_queue - 1)
        ends = [len(words) * i // n_pieces for i in range(n_pieces + 1)] if n_pieces else [0]
        pieces = ["".join(words[first:end]) for first, end in itertools.pairwise(ends)]
        without = ["".join(words[:first] + words[end:]).strip() for first, end in itertools.pairwise(ends)]
        prepared = await self.batcher.prepare(predictor, [cleaned, *without], cleaned=True)
        answers = await self._in_time(self.batcher.submit(predictor, prepared.rows), gone, began)
        prediction = predictor.prediction(answers[0].probs)
        await self._record(predictor, [text], prepared, [prediction], answers[:1], request_id, began)
        column = np.stack([answer.probs for answer in answers])[:, predictor.info.labels.index(prediction.label)].astype(float)
        effects = (column[0] - column[1:]).tolist()
        return Explained(prediction, list(zip(pieces, effects, strict=True)), predictor.info)

    async def note_feedback(self, request_id: str, place: int, label: str) -> None:
        """Puts what an answer should have been into the annotation store; when this returns, it is on the disk.

        Raises:
            ConfigError: feedback has no store.
            DataError: the store lacks the label.
            StorageError: it could not be written.
        """
        if self._feedback is None:
            raise ConfigError("feedback has no store here; set SODAOPS_FEEDBACK_STORE to an annotation store's folder.")
        await asyncio.to_thread(self._feedback.append_feedback, request_id, place, label)
        self.metrics.feedback.labels(label).inc()

    async def _in_time(
        self, answer: asyncio.Future[list[Answer]], gone: Callable[[], Awaitable[None]], began: float
    ) -> list[Answer]:
        loop = asyncio.get_running_loop()
        left_s = max(0.0, self.settings.deadline_s - (time.perf_counter() - began))
        quick_s = min(_QUICK_S, left_s)
        watch: asyncio.Task[None] | None = None

        def begin_watch() -> None:
            nonlocal watch
            watch = loop.create_task(_give_up(answer, gone, left_s - quick_s))

        timer = loop.call_later(quick_s, begin_watch)  # most are answered before; only the rest need a look at their client
        try:
            return await answer
        finally:
            timer.cancel()
            answer.cancel()
            if watch:
                watch.cancel()

    async def _record(
        self,
        predictor: Predictor,
        texts: Sequence[str],
        prepared: Prepared,
        predictions: Sequence[Prediction],
        answers: Sequence[Answer],
        request_id: str,
        began: float,
    ) -> None:
        for prediction in predictions:
            self.metrics.predicted(prediction.label).inc()
            self.metrics.confidence.observe(prediction.score)
        latency_ms = 1000 * (time.perf_counter() - began)
        self.latencies_ms.append(latency_ms)
        if not self.journal:
            return
        build = functools.partial(self._rows, predictor, texts, prepared, predictions, answers)
        quick = sum(map(len, prepared.cleaned)) <= INLINE_CHARS
        self._note(predictor, build() if quick else await asyncio.to_thread(build), request_id, began)

    def _rows(
        self,
        predictor: Predictor,
        texts: Sequence[str],
        prepared: Prepared,
        predictions: Sequence[Prediction],
        answers: Sequence[Answer],
    ) -> list[dict[str, Any]]:
        return [
            {
                "place": place,
                "text": self._logged(texts[place]),
                **prediction_fields(predictor, prepared.cleaned[place], prepared.rows[place], prediction, answer.sketch),
            }
            for place, (prediction, answer) in enumerate(zip(predictions, answers, strict=True))
        ]

    def _note(self, predictor: Predictor, rows: Sequence[dict[str, Any]], request_id: str, began: float) -> None:
        """Puts the rows of a request into the journal, where there is one."""
        if not self.journal:
            return
        shared = {
            "time": time.time_ns() // 1000,
            "request_id": request_id,
            "bundle_id": predictor.info.bundle_id,
            "variant": predictor.variant,
            "labels": predictor.info.labels,
            "latency_ms": round(1000 * (time.perf_counter() - began), 3),
        }
        self.journal.append([{**shared, **row} for row in rows])

    @staticmethod
    def _empty_row(place: int) -> dict[str, Any]:
        """The row of a text that was refused, since cleaning left nothing of it: what it came from may be out of order."""
        return {"place": place, "n_chars": 0, "text_sha256": hashlib.sha256().hexdigest()}

    def _logged(self, text: str) -> str | None:
        """A text as the request log may hold it; entities and invisible characters go first, or they would hide things."""
        if not self.settings.log_texts:
            return None
        text = text.encode("utf-8", "replace").decode()
        return redact(clean(text), self.settings.redact) if self.settings.redact else text


def prediction_fields(
    predictor: Predictor, cleaned: str, row: np.ndarray, prediction: Prediction, sketch: np.ndarray | None
) -> dict[str, Any]:
    """What the request log holds of an answered text, the text itself aside; the names are the columns of a part.

    Args:
        predictor: that answered.
        cleaned: the text.
        row: its token ids, int64 [n_tokens].
        prediction: the answer.
        sketch: of its embedding, float32 [n_axes]; None without a reference for drift.
    """
    return {
        "label": prediction.label,
        "score": prediction.score,
        "probs": list(prediction.probs.values()),
        "n_tokens": len(row),
        "text_sha256": hashlib.sha256(cleaned.encode()).hexdigest(),
        "sketch": None if sketch is None else np.round(sketch, 3).tolist(),
        **predictor.descriptors(cleaned, row)._asdict(),
    }


async def _give_up(answer: asyncio.Future[list[Answer]], gone: Callable[[], Awaitable[None]], left_s: float) -> None:
    why: Exception = ClientDisconnected()
    try:
        async with asyncio.timeout(left_s):
            await gone()
    except TimeoutError:
        why = DeadlineExceeded()
    except HTTPException as error:  # a body that nobody asked for is too large, or does not end
        why = error
    if not answer.done():
        answer.set_exception(why)


def _feedback(settings: ServeSettings, labels: Sequence[str]) -> "Store | None":
    if settings.feedback_store is None:
        return None
    from sodaops.annotation.store import Store  # only where there is feedback

    return Store.create(settings.feedback_store, labels)


def _journal(settings: ServeSettings, metrics: Metrics) -> Journal | None:
    folder = settings.journal
    if folder is None:
        return None
    sizes = settings.part_s, settings.part_bytes, settings.max_journal_bytes
    try:
        return Journal(folder, str(settings.request_log), *sizes, metrics.journal, settings.keep_days)
    except OSError as error:
        raise StorageError(f"{folder}: cannot hold the request log's journal ({error.strerror}); give another.") from error
