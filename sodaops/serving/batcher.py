"""Micro-batching within the process: what waits is computed together, and nothing waits for company."""

import asyncio
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from sodaops.inference.predictor import Predictor

INLINE_CHARS = 4000  # of a request; more is done in a thread
_NICE = 5


class QueueFull(Exception):  # noqa: N818 - a state of the service, no fault
    """No room for the texts of a request."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class EmptyText(Exception):  # noqa: N818
    """A text of which cleaning leaves nothing."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


class WorkerDied(Exception):  # noqa: N818
    """A thread that computes has ended."""


class Answer(NamedTuple):
    """What the model says of one text."""

    probs: np.ndarray  # float32 [n_labels]
    sketch: np.ndarray | None  # float32 [n_axes]; None where the bundle has no reference for drift


class Prepared(NamedTuple):
    """The texts of a request, ready to be computed."""

    cleaned: list[str]
    rows: list[np.ndarray]  # token ids of each, int64 [n_tokens]


class _Request:
    """What waits: the rows of one request, and where its answers go."""

    __slots__ = ("answer", "found", "n_left", "predictor", "rows")

    def __init__(self, predictor: Predictor, rows: list[np.ndarray], answer: asyncio.Future[list[Answer]]) -> None:
        self.predictor, self.rows, self.answer = predictor, rows, answer
        self.found: list[Any] = [None] * len(rows)  # each an Answer in the end
        self.n_left = len(rows)


_Item = tuple[_Request, int]  # one text, by its place in the request


class Batcher:
    """A bounded queue in front of a few threads.

    A thread that is free takes the oldest texts at once, its share of those waiting. A batch belongs to one predictor:
    texts that came before a reload are answered by the bundle that they were tokenised for.

    Args:
        n_workers: threads, each with one batch at a time.
        max_queue: texts that may wait or be tokenised.
        max_tokens: tokens of a batch; a longer text goes alone.
        observe: is told the size of each batch.
    """

    def __init__(self, n_workers: int, max_queue: int, max_tokens: int, observe: Callable[[int], None]) -> None:
        self._n_workers, self._max_queue, self._max_tokens, self._observe = n_workers, max_queue, max_tokens, observe
        self._work_or_end = threading.Condition()  # guards what follows
        self._waiting: list[_Item] = []
        self._ended = False
        self._n_reserved = 0
        self._seconds_a_text = 0.01
        self._threads = [threading.Thread(target=self._work, name=f"model-{i}", daemon=True) for i in range(n_workers)]
        for thread in self._threads:
            thread.start()

    @property
    def n_waiting(self) -> int:
        """Texts that no thread has taken yet."""
        return len(self._waiting) + self._n_reserved

    def check(self) -> None:
        """Whether it can answer at all.

        Raises:
            WorkerDied: it cannot.
        """
        if not all(thread.is_alive() for thread in self._threads):
            raise WorkerDied

    async def prepare(self, predictor: Predictor, texts: Sequence[str], cleaned: bool = False) -> Prepared:
        """Cleans and tokenises the texts of one request, in a thread where they are long.

        Args:
            predictor: by whose cleaning and tokenizer.
            texts: raw.
            cleaned: they are clean already; then they may be empty, which leaves the special tokens.

        Raises:
            QueueFull: at once, when the texts do not fit into the queue.
            EmptyText: one that has nothing left after cleaning.
        """
        if self.n_waiting + len(texts) > self._max_queue:
            with self._work_or_end:
                self._forget_given_up()
        if self.n_waiting + len(texts) > self._max_queue:
            raise QueueFull(max(1, math.ceil(self.n_waiting * self._seconds_a_text / self._n_workers)))
        if sum(map(len, texts)) <= INLINE_CHARS:
            return _prepare(predictor, texts, cleaned)
        self._n_reserved += len(texts)
        try:
            return await asyncio.get_running_loop().run_in_executor(None, _prepare, predictor, texts, cleaned)
        finally:
            self._n_reserved -= len(texts)

    def submit(self, predictor: Predictor, rows: list[np.ndarray]) -> asyncio.Future[list[Answer]]:
        """Puts the rows of a request into the queue.

        Returns:
            The answer to each; cancel it, and what still waits is not computed.
        """
        request = _Request(predictor, rows, asyncio.get_running_loop().create_future())
        with self._work_or_end:
            self._waiting += [(request, place) for place in range(len(rows))]
            self._work_or_end.notify(len(rows))
        return request.answer

    def close(self) -> None:
        """Ends the threads; what is being computed is finished."""
        with self._work_or_end:
            self._ended = True
            self._work_or_end.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        if sys.platform == "linux":  # a priority of each thread: requests are read and answered before more is computed
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, max(_NICE, os.getpriority(os.PRIO_PROCESS, own)))  # lower is always allowed
        while True:
            with self._work_or_end:
                batch = self._next_batch()
                while not batch:
                    if self._ended:
                        return
                    self._work_or_end.wait()
                    batch = self._next_batch()
            self._observe(len(batch))
            began = perf_counter()
            done = _compute(batch)
            self._seconds_a_text += 0.1 * ((perf_counter() - began) / len(batch) - self._seconds_a_text)
            loop = batch[0][0].answer.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, batch, done)

    def _forget_given_up(self) -> None:
        self._waiting = [item for item in self._waiting if not item[0].answer.done()]

    def _next_batch(self) -> list[_Item]:
        self._forget_given_up()
        batch: list[_Item] = []
        n_tokens = 0
        for request, place in self._waiting[: math.ceil(len(self._waiting) / self._n_workers)]:
            n_tokens += len(request.rows[place])
            if batch and (n_tokens > self._max_tokens or request.predictor is not batch[0][0].predictor):
                break
            batch.append((request, place))
        del self._waiting[: len(batch)]
        return batch


def _compute(batch: list[_Item]) -> Sequence[Answer | Exception]:
    """The answer to each text; where the batch fails, each text is tried alone, and has its own fault."""
    predictor = batch[0][0].predictor
    try:
        probs, embeddings = predictor.run([request.rows[place] for request, place in batch])
        sketches = predictor.sketch(embeddings)
        return list(map(Answer, probs, itertools.repeat(None) if sketches is None else sketches))
    except Exception as fault:  # whatever it was, it is some request's answer, and the thread goes on
        return [fault] if len(batch) == 1 else [_compute([item])[0] for item in batch]


def _deliver(batch: list[_Item], done: Sequence[Answer | Exception]) -> None:
    for (request, place), found in zip(batch, done, strict=True):
        if request.answer.done():
            continue
        if isinstance(found, Exception):
            request.answer.set_exception(found)
            continue
        request.found[place] = found
        request.n_left -= 1
        if not request.n_left:
            request.answer.set_result(request.found)


def _prepare(predictor: Predictor, texts: Sequence[str], cleaned: bool) -> Prepared:
    clean = list(texts) if cleaned else [predictor.clean(text) for text in texts]
    if not cleaned and not all(clean):
        raise EmptyText(clean.index(""))
    return Prepared(clean, [predictor.encode(text) for text in clean])
