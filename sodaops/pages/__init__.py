"""HTML pages from templates with a common style; they load nothing from the network."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(name: str, **values: Any) -> str:
    """Renders a page as HTML; every value is escaped.

    Args:
        name: a template of this folder, without ``.html.j2``.
        values: the template's variables. Its filters are ``score`` (three decimals), ``shown`` and ``base64`` (of a file).
    """
    page = Environment(loader=PackageLoader("sodaops.pages", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page.filters["score"] = lambda value: f"{value:.3f}"
    page.filters["shown"] = shown
    page.filters["base64"] = lambda path: base64.b64encode(Path(path).read_bytes()).decode()
    return page.get_template(f"{name}.html.j2").render(**values)


def shown(value: Any) -> str:
    """A value formatted for people.

    >>> shown(0.00031234), shown(None), shown("cls")
    ('0.000312', 'null', 'cls')
    """
    if isinstance(value, float):
        return f"{value:.3g}"
    return "null" if value is None else str(value)
