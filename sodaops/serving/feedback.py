"""Feedback on answered texts, which becomes annotations."""

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

from starlette.exceptions import HTTPException

from sodaops.annotation.store import Store
from sodaops.request_log.journal import find_in_journal
from sodaops.web.keys import Attempts

_REMEMBERED = 10_000  # requests


class Feedback:
    """Accepts labels for texts that were answered, and stores them in an annotation store.

    The last requests are remembered; earlier ones, and those of other processes, are looked up in the request log. A client
    that names ten requests that never were may name one per second.

    Args:
        store: the annotation store.
        journal: folder of the request log's journal; None without a request log.
        request_log: folder or gs:// of its parts.
        search_s: seconds in which the parts are searched.
    """

    def __init__(self, store: Store, journal: Path | None, request_log: str | None, search_s: float) -> None:
        self._store = store
        self._journal, self._request_log, self._search_s = journal, request_log, search_s
        self._n_texts: dict[str, int] = {}  # of the last requests, the oldest first
        self._unknown, self._one_search = Attempts(), asyncio.Lock()

    def remember(self, request_id: str, n_texts: int) -> None:
        """Notes an answered request."""
        self._n_texts[request_id] = n_texts
        if len(self._n_texts) > _REMEMBERED:
            del self._n_texts[next(iter(self._n_texts))]

    async def add(self, request_id: str, place: int, label: str, client: str) -> None:
        """Stores the right label of a text. It is on disk when this returns.

        Raises:
            HTTPException: the text was never answered (404), or was not looked up (429, 503, 504).
            DataError: the store does not have this label.
            StorageError: the store cannot be written.
        """
        if place >= self._n_texts.get(request_id, 0):
            if wait_s := self._unknown.wait_s(client):
                raise HTTPException(429, "too many requests that never were; try again later", {"retry-after": str(wait_s)})
            if not await self._is_logged(request_id, place):
                self._unknown.fail(client)
                raise HTTPException(404, f"request_id, place: no text with this id and place {place} was answered")
        await asyncio.to_thread(self._store.append_feedback, request_id, place, label)

    async def _is_logged(self, request_id: str, place: int) -> bool:
        if self._journal is None or self._request_log is None:
            return False
        if await asyncio.to_thread(find_in_journal, self._journal, request_id, place):
            return True
        try:
            async with asyncio.timeout(self._search_s), self._one_search:
                return await _find_in_parts(self._request_log, request_id, place)
        except TimeoutError:
            raise HTTPException(504, f"the request log was not searched within {self._search_s:g} s") from None


async def _find_in_parts(request_log: str, request_id: str, place: int) -> bool:
    """Searches the parts in a process of its own, so that pyarrow stays out of the service's.

    Raises:
        HTTPException: they could not be searched (503).
    """
    command = [sys.executable, "-m", "sodaops.request_log", "--find", request_log, request_id, str(place)]
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    try:
        output = (await process.communicate())[0].strip()
    finally:
        if process.returncode is None:
            process.kill()
    if output not in (b"True", b"False"):
        raise HTTPException(503, "the request log could not be searched; try again later")
    return output == b"True"
