"""API keys and admin keys, and a limit on how often a client may be wrong."""

import functools
import hashlib
import hmac
import ipaddress
import math
import time
from collections.abc import Callable, Sequence

from pydantic import SecretStr

_MAX_CLIENTS = 10_000
_BURST = 10  # failures before a client has to wait


class Attempts:
    """Failed attempts of each client: ten at once, then one per second. Its memory is bounded.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}  # client -> when all of its failures are forgotten, one per second

    def wait_s(self, client: str) -> int:
        """Seconds until the client may try again; 0 if it may now."""
        return max(0, math.ceil(self._until.get(client, 0.0) - self._clock() - _BURST + 1))

    def fail(self, client: str) -> None:
        """Notes a failure. The client whose last failure is the oldest is forgotten when there are too many."""
        self._until[client] = max(self._until.pop(client, 0.0), self._clock()) + 1
        if len(self._until) > _MAX_CLIENTS:
            del self._until[next(iter(self._until))]


class Keys:
    """Checks the key of a request.

    A client that has sent ten wrong keys may try one per second; until then its keys are not looked at, except one that was
    right before. So neither can keys be guessed, nor can others at the same address be locked out, as behind a proxy.

    Args:
        api_keys: each of them gives access; without any, the service is open.
        admin_keys: each of them gives access to everything; without any, /admin/… is closed.
    """

    def __init__(self, api_keys: Sequence[SecretStr], admin_keys: Sequence[SecretStr]) -> None:
        self._api = [_digest(key.get_secret_value().encode()) for key in api_keys]
        self._admin = [_digest(key.get_secret_value().encode()) for key in admin_keys]
        self._attempts = Attempts()
        self._passed: dict[tuple[str, bytes], None] = {}  # clients and digests of right keys, the oldest first

    def refusal(self, headers: dict[bytes, bytes], client: str, for_admin: bool) -> tuple[int, str, dict[str, str]] | None:
        """Status, detail and headers of a request without the key that it needs."""
        if for_admin and not self._admin:
            return 403, "no admin key is set; set SODAOPS_ADMIN_KEYS to use this", {}
        if not for_admin and not self._api:
            return None
        kind = "admin key" if for_admin else "key"
        wrong = 401, f"wrong or missing {kind}; send it as X-API-Key or as a bearer token", {"www-authenticate": "Bearer"}
        key = _sent_key(headers)
        if not key:
            return wrong
        digest = _digest(key)
        if (wait_s := self._attempts.wait_s(client)) and (client, digest) not in self._passed:
            return 429, "too many wrong keys from this address; try again later", {"retry-after": str(wait_s)}
        if not _matches_any(digest, self._admin if for_admin else [*self._api, *self._admin]):
            self._attempts.fail(client)
            return wrong
        self._passed[client, digest] = None
        if len(self._passed) > _MAX_CLIENTS:
            del self._passed[next(iter(self._passed))]
        return None


@functools.lru_cache(_MAX_CLIENTS)
def client_of(host: str) -> str:
    """The client behind an address: the address, or for IPv6 its network of 64 bits, which one client may have whole.

    >>> client_of("192.0.2.1"), client_of("2001:db8::1:2:3")
    ('192.0.2.1', '2001:db8::/64')
    """
    if ":" not in host:
        return host[:100]
    try:
        return str(ipaddress.ip_network(f"{host}/64", strict=False))
    except ValueError:
        return host[:100]


def _sent_key(headers: dict[bytes, bytes]) -> bytes:
    key = headers.get(b"x-api-key", b"")
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if not key and scheme.lower() == b"bearer" else key


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _matches_any(digest: bytes, digests: Sequence[bytes]) -> bool:
    """Compares with every digest, in a time that depends neither on which one matches nor on how much of it does."""
    return sum(hmac.compare_digest(digest, each) for each in digests) > 0
