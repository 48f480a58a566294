"""Metrics of the services, fetched over HTTP."""

import http.client
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sodaops.alerting.signals import Scrape, parse_metrics
from sodaops.errors import DeliveryError

TIMEOUT_S = 5.0
_MAX_BYTES = 16 << 20
log = logging.getLogger(__name__)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are not followed: they would carry the API key to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Returns no request, so that the redirect itself is the answer."""


_opener = urllib.request.build_opener(_NoRedirect)


def scrape_all(urls: Sequence[str], api_key: str | None) -> list[Scrape | None]:
    """Fetches the metrics of several processes at once.

    Args:
        urls: of the metrics.
        api_key: sent as X-API-Key where given.

    Returns:
        One scrape for each URL; None for one that failed, with a warning in the log.
    """

    def scrape(url: str) -> Scrape | None:
        try:
            return fetch_metrics(url, api_key)
        except DeliveryError as error:
            log.warning("%s: %s", url, error)
            return None

    with ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(scrape, urls))


def fetch_metrics(url: str, api_key: str | None) -> Scrape:
    """Fetches the metrics of one process.

    Raises:
        DeliveryError: no connection, no answer in time, another status than 2xx, or no metrics of SoDaOps.
    """
    headers = {"Accept": "text/plain", "User-Agent": "sodaops-alerts", **({"X-API-Key": api_key} if api_key else {})}
    try:
        body = _read(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        error.close()
        raise DeliveryError(f"answered {error.code}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)  # URLError wraps the cause
        message = f"no answer within {TIMEOUT_S:g} s" if isinstance(reason, TimeoutError) else getattr(reason, "strerror", None)
        raise DeliveryError(message or type(reason).__name__) from None
    except (http.client.HTTPException, ValueError) as error:
        raise DeliveryError(f"not an HTTP response ({type(error).__name__})") from None
    return parse_metrics(body.decode("utf-8", "replace"))


def _read(request: urllib.request.Request) -> bytes:
    """The body; the timeout also holds for a server that sends it byte by byte."""
    deadline, body = time.monotonic() + TIMEOUT_S, b""
    with _opener.open(request, timeout=TIMEOUT_S) as response:
        while chunk := response.read1(65536):
            body += chunk
            if len(body) > _MAX_BYTES:
                raise DeliveryError(f"answered more than {_MAX_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
    return body
