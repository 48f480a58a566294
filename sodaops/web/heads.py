"""What can be wrong with the head of a request, whatever the application."""

import re
from collections.abc import Collection
from urllib.parse import unquote_to_bytes, urlsplit

from starlette.types import Scope

Refusal = tuple[int, str, dict[str, str]]  # status, detail, headers of the response
PROBES = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")  # load balancers ask them by address
_NOT_ASCII = re.compile(rb"%(?![0-7][0-9A-Fa-f])|[\x80-\xff]")
_NOT_HEX = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_JSON = re.compile(rb"application/(?:[\w.+-]+\+)?json *(?:; *charset *= *\"?utf-?8\"? *)?", re.IGNORECASE)
_ONCE = (b"host", b"content-type", b"content-encoding", b"content-length", b"authorization", b"x-api-key")


def head_fault(
    scope: Scope, path: str, headers: dict[bytes, bytes], allowed_hosts: Collection[str], origins: Collection[str]
) -> Refusal | None:
    """What is wrong with a request, keys and body aside.

    Args:
        scope: of the request.
        path: without the prefix of a proxy.
        headers: the last one of each name.
        allowed_hosts: names by which the service may be addressed, ``*.example.org`` too; empty: any.
        origins: whose pages may call the service, besides its own.
    """
    if len(headers) < len(scope["headers"]):
        names = [name for name, _ in scope["headers"]]
        if repeated := next((name for name in _ONCE if names.count(name) > 1), None):
            return 400, f"the header {repeated.decode()} is repeated", {}
    if allowed_hosts and path not in PROBES and not _is_allowed(headers.get(b"host", b""), allowed_hosts):
        return 400, "the header host names a host that is not allowed (allowed_hosts)", {}
    for part, value in (("path", scope.get("raw_path") or b""), ("query", scope.get("query_string", b""))):
        if _NOT_ASCII.search(value):
            if _NOT_HEX.search(value):
                return 400, f"the {part} has a % without two hexadecimal digits", {}
            try:
                unquote_to_bytes(value).decode()
            except UnicodeDecodeError:
                return 400, f"the {part} is not percent-encoded UTF-8", {}
    if _is_from_other_site(scope["method"], headers, origins):
        return 403, "pages of other origins may not call this service; serve.cors_origins allows some", {}
    return None


def media_fault(headers: dict[bytes, bytes], path: str) -> Refusal | None:
    """What is wrong with the media type of a body that should be JSON; in KServe's protocol it may be binary or unnamed."""
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.lower() not in (b"", b"identity"):
        return (
            415,
            f"content-encoding {_shown(encoding)} is not supported; send the body as it is",
            {"accept-encoding": "identity"},
        )
    kind = headers.get(b"content-type", b"")
    if _JSON.fullmatch(kind.strip()) or (path.startswith("/v2/") and kind in (b"", b"application/octet-stream")):
        return None
    named = f"content-type {_shown(kind)} is not supported" if kind else "content-type is missing"
    return 415, f"{named}; send JSON in UTF-8, as application/json", {"accept": "application/json"}


def _is_allowed(host: bytes, allowed: Collection[str]) -> bool:
    """Whether a Host header names an allowed host, on any port; ``*.example.org`` allows the names that end in it."""
    name = host.decode("latin-1").lower()
    name = name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
    return any(name == each or (each.startswith("*.") and name.endswith(each[1:])) for each in map(str.lower, allowed))


def _is_from_other_site(method: str, headers: dict[bytes, bytes], origins: Collection[str]) -> bool:
    """Whether the page of another origin sends the request; those that only open a page here are allowed.

    Browsers name a page's origin in Sec-Fetch-Site, over https and on localhost, and in Origin, at least for unsafe methods.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site in (b"same-origin", b"none") or (site is None and origin is None):
        return False
    if origin is not None and ("*" in origins or origin.decode("latin-1") in origins):
        return False
    if site is None:
        try:
            own = urlsplit((origin or b"").decode("latin-1")).netloc.encode("latin-1")
        except ValueError:
            own = b""
        return method not in ("GET", "HEAD") and own not in (headers.get(b"host"), headers.get(b"x-forwarded-host"))
    return method not in ("GET", "HEAD") or headers.get(b"sec-fetch-mode") != b"navigate"


def _shown(value: bytes) -> str:
    return repr(value[:40].decode("latin-1"))
