"""Dynamic batching: texts that wait at the same time are computed together, but none waits for a batch to fill."""

import asyncio
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from time import perf_counter, time_ns
from typing import Any, NamedTuple

import numpy as np
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, Tracer, get_current_span, set_span_in_context

from sodaops.errors import BundleError
from sodaops.inference.predictor import Predictor

# Texts are tokenised one by one; the tokenizer's own threads would only cost time, and it warns when a process is started.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
INLINE_CHARS = 4000  # longer requests are tokenised in a thread, so that the event loop is not blocked
_NICE = 5  # of the worker threads
_NICE_TOKENIZER = 15  # of threads that tokenise one request, and may never end


class QueueFull(Exception):  # noqa: N818 - a state of the service rather than an error
    """The queue cannot take the texts of a request."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class EmptyText(Exception):  # noqa: N818
    """A text is empty after cleaning, or has no tokens; ``place`` is its position in the request."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


class WorkerDied(Exception):  # noqa: N818
    """A worker thread has died, so some requests may never be answered."""


class ModelOutput(NamedTuple):
    """Output of the model for one text."""

    probs: np.ndarray  # float32 [n_labels]
    sketch: np.ndarray | None  # float32 [n_axes]; None for a bundle without a drift reference


class Prepared(NamedTuple):
    """The texts of a request, cleaned and tokenised."""

    cleaned: list[str]
    rows: list[np.ndarray]  # token ids of each text, int64 [n_tokens]


class _Request:
    """A queued request: the token ids of its texts, the outputs so far, and the future for all outputs."""

    __slots__ = ("future", "n_left", "outputs", "predictor", "rows", "since", "span")
    span: Span  # the HTTP request's, and when it was queued, in nanoseconds; only with a tracer
    since: int

    def __init__(self, predictor: Predictor, rows: list[np.ndarray], future: asyncio.Future[list[ModelOutput]]) -> None:
        self.predictor, self.rows, self.future = predictor, rows, future
        self.outputs: list[Any] = [None] * len(rows)  # each is replaced by a ModelOutput
        self.n_left = len(rows)


_Item = tuple[_Request, int]  # a text: its request, and its position in the request


class Batcher:
    """A bounded queue and the worker threads that empty it.

    An idle thread immediately takes the oldest texts, at most its share of those waiting. All texts of a batch belong to one
    predictor: texts that were queued before a reload are answered by the bundle that tokenised them.

    Args:
        n_workers: number of threads; each computes one batch at a time.
        max_queue: number of texts that may wait or be tokenised at once.
        max_tokens: most tokens in a batch; a longer text is computed alone.
        observe: called with the size of each batch.
        tracer: makes spans for batches and waits; None: nothing is traced.
    """

    def __init__(
        self, n_workers: int, max_queue: int, max_tokens: int, observe: Callable[[int], None], tracer: Tracer | None = None
    ) -> None:
        self._n_workers, self._max_queue, self._max_tokens, self._observe = n_workers, max_queue, max_tokens, observe
        self._tracer = tracer
        self._condition = threading.Condition()  # guards _waiting and _closed
        self._waiting: list[_Item] = []
        self._closed = False
        self._n_reserved = 0  # texts being tokenised in a thread
        self._seconds_per_text = 0.01
        self._threads = [threading.Thread(target=self._run_worker, name=f"model-{i}", daemon=True) for i in range(n_workers)]
        for thread in self._threads:
            thread.start()

    @property
    def n_waiting(self) -> int:
        """Number of texts that no thread has taken yet."""
        return len(self._waiting) + self._n_reserved

    def check_workers(self) -> None:
        """Checks that all worker threads are alive.

        Raises:
            WorkerDied: a thread is not alive.
        """
        if not all(thread.is_alive() for thread in self._threads):
            raise WorkerDied

    async def prepare(
        self, predictor: Predictor, texts: Sequence[str], timeout_s: float, cleaned: bool = False
    ) -> Prepared:  # fmt: skip
        """Cleans and tokenises the texts of one request.

        Args:
            predictor: whose cleaning and tokenizer are used.
            texts: raw.
            timeout_s: most seconds to wait for a thread that does this.
            cleaned: whether the texts are cleaned already; they may then be empty, and only have the special tokens.

        Raises:
            QueueFull: the queue cannot take the texts.
            EmptyText: a text is empty after cleaning, or has no tokens.
            TimeoutError: it takes too long.
        """
        if self.n_waiting + len(texts) > self._max_queue:
            with self._condition:
                self._drop_abandoned()
        if self.n_waiting + len(texts) > self._max_queue:
            raise QueueFull(max(1, math.ceil(self.n_waiting * self._seconds_per_text / self._n_workers)))
        if sum(map(len, texts)) <= INLINE_CHARS and not predictor.has_patterns:
            return _prepare(predictor, texts, cleaned)
        async with asyncio.timeout(timeout_s):
            return await self._prepare_in_thread(predictor, texts, cleaned)

    def _prepare_in_thread(self, predictor: Predictor, texts: Sequence[str], cleaned: bool) -> asyncio.Future[Prepared]:
        """Starts a thread of its own for a request, since a bundle's regular expression may take very long for a text.

        If the request is given up, the thread goes on; its texts keep their place in the queue until it ends.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Prepared] = loop.create_future()
        self._n_reserved += len(texts)

        def deliver(prepared: Prepared | None, error: BaseException | None) -> None:
            self._n_reserved -= len(texts)
            if future.done():
                return
            if prepared is None:
                future.set_exception(error or RuntimeError())
            else:
                future.set_result(prepared)

        def run() -> None:
            _lower_priority(_NICE_TOKENIZER)
            prepared, error = None, None
            try:
                prepared = _prepare(predictor, texts, cleaned)
            except BaseException as raised:  # the request gets it
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, prepared, error)

        threading.Thread(target=run, name="tokenizer", daemon=True).start()
        return future

    def submit(self, predictor: Predictor, rows: list[np.ndarray]) -> asyncio.Future[list[ModelOutput]]:
        """Queues the token ids of a request.

        Returns:
            A future with the output for each text. Cancel it to drop the texts that still wait.
        """
        request = _Request(predictor, rows, asyncio.get_running_loop().create_future())
        if self._tracer:
            request.span, request.since = get_current_span(), time_ns()
        with self._condition:
            self._waiting += [(request, place) for place in range(len(rows))]
            self._condition.notify(len(rows))
        return request.future

    def close(self) -> None:
        """Ends the threads after their current batches."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _run_worker(self) -> None:
        """Loop of a worker thread."""
        _lower_priority(_NICE)
        while True:
            with self._condition:
                batch = self._next_batch()
                while not batch:
                    if self._closed:
                        return
                    self._condition.wait()
                    batch = self._next_batch()
            self._observe(len(batch))
            began = perf_counter()
            outputs = _traced(self._tracer, batch) if self._tracer else _compute(batch)
            # An exponential moving average, to estimate Retry-After.
            self._seconds_per_text += 0.1 * ((perf_counter() - began) / len(batch) - self._seconds_per_text)
            loop = batch[0][0].future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, batch, outputs)

    def _drop_abandoned(self) -> None:
        """Removes texts of requests that were cancelled or have failed; the caller holds the lock."""
        self._waiting = [item for item in self._waiting if not item[0].future.done()]

    def _next_batch(self) -> list[_Item]:
        """Takes this thread's share of the queue, cut at the token limit or where the predictor changes."""
        self._drop_abandoned()
        batch: list[_Item] = []
        n_tokens = 0
        for request, place in self._waiting[: math.ceil(len(self._waiting) / self._n_workers)]:
            n_tokens += len(request.rows[place])
            if batch and (n_tokens > self._max_tokens or request.predictor is not batch[0][0].predictor):
                break
            batch.append((request, place))
        del self._waiting[: len(batch)]
        return batch


def _lower_priority(nice: int) -> None:
    """Lowers this thread's priority, so that requests are read and answered first."""
    if sys.platform == "linux":
        thread_id = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread_id, max(nice, os.getpriority(os.PRIO_PROCESS, thread_id)))


def _traced(tracer: Tracer, batch: list[_Item]) -> Sequence[ModelOutput | BaseException]:
    """Computes a batch, and traces it.

    The batch has a trace of its own, with links to its requests. Each request gets a child span for its wait in the queue,
    with a link to the batch.
    """
    requests, began = dict.fromkeys(request for request, _ in batch), time_ns()
    links = [Link(request.span.get_span_context()) for request in requests]
    with tracer.start_as_current_span("batch", Context(), links=links, attributes={"texts": len(batch)}) as span:
        link = Link(span.get_span_context())
        for request in requests:
            within = set_span_in_context(request.span)
            tracer.start_span("queue", within, links=[link], start_time=request.since).end(began)
        return _compute(batch)


def _compute(batch: list[_Item]) -> Sequence[ModelOutput | BaseException]:
    """The output or error for each text. If the batch fails, each text is computed alone, so that only some fail."""
    predictor = batch[0][0].predictor
    try:
        probs, embeddings = predictor.run([request.rows[place] for request, place in batch])
        sketches = predictor.sketch(embeddings)
        return list(map(ModelOutput, probs, itertools.repeat(None) if sketches is None else sketches))
    except BaseException as error:  # the error goes to the request; the thread must not die
        return [error] if len(batch) == 1 else [_compute([item])[0] for item in batch]


def _deliver(batch: list[_Item], outputs: Sequence[ModelOutput | BaseException]) -> None:
    """Gives the outputs to their requests, in the event loop's thread; the last output completes a request's future."""
    for (request, place), output in zip(batch, outputs, strict=True):
        if request.future.done():
            continue
        if isinstance(output, BaseException):
            request.future.set_exception(output)
            continue
        request.outputs[place] = output
        request.n_left -= 1
        if not request.n_left:
            request.future.set_result(request.outputs)


def _prepare(predictor: Predictor, texts: Sequence[str], cleaned: bool) -> Prepared:
    try:
        clean = list(texts) if cleaned else [predictor.clean(text) for text in texts]
        rows = [predictor.encode(text) for text in clean]
    except BundleError as error:  # for the client an internal error, since any text should have an answer
        raise RuntimeError(str(error)) from error
    if not cleaned:
        for place, row in enumerate(rows):
            if predictor.is_empty(row):
                raise EmptyText(place)
    return Prepared(clean, rows)
