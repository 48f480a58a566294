"""The pages of the predictor: one for trying it, and the documentation of its API."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles

from sodaops.web.policy import page_response

_PAGE = Path(__file__).parent / "page.html"
_FIELD = re.compile('<label for="text".*</textarea>', re.DOTALL)


def add_pages(app: FastAPI, columns: Sequence[str]) -> None:
    """Adds the page, for texts of these columns, and the API's documentation."""
    page = page_response(_page(columns))
    swagger = get_swagger_ui_html(  # relative links, since the Host header is not to be trusted
        openapi_url="openapi.json", title=f"{app.title} API", swagger_js_url="swagger/swagger-ui-bundle.js",
        swagger_css_url="swagger/swagger-ui.css", swagger_favicon_url="swagger/favicon-32x32.png",
        swagger_ui_parameters={"tryItOutEnabled": True, "filter": True, "displayRequestDuration": True},
    )  # fmt: skip
    docs = page_response(bytes(swagger.body).decode(), "'self'")
    app.mount("/swagger", StaticFiles(packages=[("fastapi_swagger", "resources")]))

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page

    @app.get("/docs", include_in_schema=False)
    async def api_docs() -> Response:
        return docs


def _page(columns: Sequence[str]) -> str:
    """The page for trying the service, with a field for each part of a text."""
    content = _PAGE.read_text(encoding="utf-8")
    if len(columns) == 1:
        return content
    fields = [
        f'<label for="text-{i}" class="hint">{name}</label>\n    <textarea id="text-{i}" name="{name}"></textarea>'
        for i, name in enumerate(map(html.escape, columns))
    ]
    return _FIELD.sub(lambda _: "\n    ".join(fields), content, count=1)
