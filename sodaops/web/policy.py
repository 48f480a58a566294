"""HTML pages with a Content-Security-Policy that allows their own scripts and styles by hash, and no others."""

import base64
import hashlib
import re

from starlette.responses import HTMLResponse

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
_OWN = "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def page_response(html: str, sources: str = "") -> HTMLResponse:
    """The response with a page of our own.

    Args:
        html: the page. Its scripts and styles get hashes, so nothing in it may come from users.
        sources: whence it may load others: ``'self'``.
    """
    scripts, styles = (" ".join(inline_hashes(html, name)) for name in ("script", "style"))
    policy = f"default-src 'none'; script-src {scripts} {sources}; style-src {styles} {sources}; {_OWN}"
    return HTMLResponse(html, headers={"content-security-policy": policy})


def inline_hashes(html: str, name: str) -> list[str]:
    """The sources that allow the contents of all ``<script>`` or ``<style>`` elements without attributes."""
    return [hash_source(content) for found, content in _INLINE.findall(html) if found == name]


def hash_source(content: str) -> str:
    """The source in a policy that allows a script or style with this content."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
