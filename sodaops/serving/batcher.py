"""Micro-batching within the process: what waits is computed together, and nothing waits for company."""

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from sodaops.bundle.predictor import Predictor

_INLINE_CHARS = 4000


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


@dataclass(frozen=True)
class Answered:
    """What became of the texts of a request, in their order."""

    cleaned: list[str]
    n_tokens: list[int]
    probs: np.ndarray  # float32 [n_texts, n_labels]


@dataclass(eq=False)
class _Item:
    predictor: Predictor
    row: np.ndarray
    future: asyncio.Future[np.ndarray]


class Batcher:
    """A bounded queue in front of a few threads.

    A thread that is free takes the oldest text at once, and with it its share of those waiting, the nearest in length
    first, so that little is padded. A batch belongs to one predictor: texts that came before a reload are answered by
    the bundle that they were tokenised for.

    Args:
        n_workers: threads, each with one batch at a time.
        max_queue: texts that may wait or be tokenised.
        max_tokens: tokens of a batch, padding included; a longer text goes alone.
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

    async def answer(self, predictor: Predictor, texts: Sequence[str]) -> Answered:
        """Answers the raw texts of one request.

        Raises:
            QueueFull: at once, when the texts do not fit into the queue.
            EmptyText: one that has nothing left after cleaning.
        """
        if self.n_waiting + len(texts) > self._max_queue:
            raise QueueFull(max(1, math.ceil(self.n_waiting * self._seconds_a_text / self._n_workers)))
        loop = asyncio.get_running_loop()
        if sum(map(len, texts)) <= _INLINE_CHARS:
            cleaned, rows = _prepare(predictor, texts)
        else:  # it would hold the loop up for milliseconds
            self._n_reserved += len(texts)
            try:
                cleaned, rows = await loop.run_in_executor(None, _prepare, predictor, texts)
            finally:
                self._n_reserved -= len(texts)
        items = [_Item(predictor, row, loop.create_future()) for row in rows]
        with self._work_or_end:
            self._waiting += items
            self._work_or_end.notify(len(items))
        try:
            probs = await asyncio.gather(*(item.future for item in items))
            return Answered(cleaned, [len(row) for row in rows], np.stack(probs))
        finally:
            for item in items:  # a request that was given up leaves nothing behind
                item.future.cancel()

    def close(self) -> None:
        """Ends the threads; what is being computed is finished."""
        with self._work_or_end:
            self._ended = True
            self._work_or_end.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._work_or_end:
                batch = self._next_batch()
                while not batch:
                    if self._ended:
                        return
                    self._work_or_end.wait()
                    batch = self._next_batch()
            self._observe(len(batch))
            began, answer, error = perf_counter(), None, None
            try:
                answer = batch[0].predictor.run([item.row for item in batch]).probs
            except Exception as fault:  # whatever it was, it is each request's answer, and the thread goes on
                error = fault
            self._seconds_a_text += 0.1 * ((perf_counter() - began) / len(batch) - self._seconds_a_text)
            loop = batch[0].future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, batch, answer, error)

    def _next_batch(self) -> list[_Item]:
        self._waiting = [item for item in self._waiting if not item.future.done()]
        if not self._waiting:
            return []
        oldest = self._waiting[0]
        length = len(oldest.row)
        near = [item for item in self._waiting if item.predictor is oldest.predictor]
        near.sort(key=lambda item: abs(len(item.row) - length))  # stable: the oldest stays first
        batch, longest = [], 0
        for item in near[: math.ceil(len(near) / self._n_workers)]:
            longest = max(longest, len(item.row))
            if batch and longest * (len(batch) + 1) > self._max_tokens:
                break
            batch.append(item)
        taken = set(map(id, batch))
        self._waiting = [item for item in self._waiting if id(item) not in taken]
        return batch


def _deliver(batch: list[_Item], probs: np.ndarray | None, error: Exception | None) -> None:
    for place, item in enumerate(batch):
        if item.future.done():
            continue
        if probs is None:
            item.future.set_exception(error)
        else:
            item.future.set_result(probs[place])


def _prepare(predictor: Predictor, texts: Sequence[str]) -> tuple[list[str], list[np.ndarray]]:
    cleaned = [predictor.clean(text) for text in texts]
    if not all(cleaned):
        raise EmptyText(cleaned.index(""))
    return cleaned, [predictor.encode(text) for text in cleaned]
