"""Metrics fetched over HTTP, in threads that nothing waits for longer than it wants to."""

import asyncio
import contextlib
import http.client
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sodaops.alerting.signals import Scrape, parse
from sodaops.errors import DeliveryError

TIMEOUT_S = 5.0
_MAX_BYTES = 16 << 20
_Result = TypeVar("_Result")
log = logging.getLogger("sodaops.alerts")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, and a redirected GET carry its key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        """Nothing: the redirect is what came back."""


_opener = urllib.request.build_opener(_NoRedirect)


async def in_thread(call: Callable[[], _Result], timeout_s: float) -> _Result:
    """Runs a call in a thread of its own, and leaves it there past the timeout; it does not hold up the process's end.

    Raises:
        TimeoutError: it has not ended by then.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def tell(result: _Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        result, fault = None, None
        try:
            result = call()
        except BaseException as error:
            fault = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(tell, result, fault)

    threading.Thread(target=run, daemon=True).start()
    async with asyncio.timeout(timeout_s):
        return await future


def ask(request: urllib.request.Request, timeout_s: float, max_bytes: int = _MAX_BYTES) -> bytes:
    """Sends a request and returns the body of a 2xx answer; what goes wrong is told without the address.

    Args:
        request: to send.
        timeout_s: for connecting, for each wait, and for the body as a whole.
        max_bytes: of the body; 0 does not read it.

    Raises:
        DeliveryError: no connection, no answer in time, or another status.
    """
    until, chunks, n_bytes = time.monotonic() + timeout_s, [], 0
    try:
        with _opener.open(request, timeout=timeout_s) as response:
            while max_bytes and (chunk := response.read1(65536)):
                chunks.append(chunk)
                n_bytes += len(chunk)
                if n_bytes > max_bytes:
                    raise DeliveryError(f"answered more than {max_bytes:,} bytes")
                if time.monotonic() > until:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        error.close()
        raise DeliveryError(f"answered {error.code}") from None
    except TimeoutError:
        raise DeliveryError(f"no answer within {timeout_s:g} s") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        said = "no answer in time" if isinstance(reason, TimeoutError) else getattr(reason, "strerror", None)
        raise DeliveryError(said or type(reason).__name__) from None
    except (http.client.HTTPException, ValueError) as error:  # these quote the address
        raise DeliveryError(f"no HTTP: {type(error).__name__}") from None
    return b"".join(chunks)


def fetch(url: str, api_key: str | None) -> Scrape:
    """The metrics of one process.

    Raises:
        DeliveryError: they did not come, or are none.
    """
    headers = {"Accept": "text/plain", "User-Agent": "sodaops-alerts", **({"X-API-Key": api_key} if api_key else {})}
    return parse(ask(urllib.request.Request(url, headers=headers), TIMEOUT_S).decode("utf-8", "replace"))


async def fetch_all(urls: Sequence[str], api_key: str | None) -> Mapping[str, Scrape | DeliveryError]:
    """The metrics of several processes, all at once; for one that does not answer, why."""

    async def one(url: str) -> Scrape | DeliveryError:
        try:
            return await in_thread(lambda: fetch(url, api_key), 2 * TIMEOUT_S)
        except DeliveryError as error:
            return error
        except TimeoutError:
            return DeliveryError(f"no answer within {2 * TIMEOUT_S:g} s")

    return dict(zip(urls, await asyncio.gather(*map(one, urls)), strict=True))
