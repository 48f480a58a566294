"""The HTML pages: templates that share one look, and load nothing from outside."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(name: str, **values: Any) -> str:
    """A page as HTML; every value is escaped.

    Args:
        name: of a template in this folder, without its ending.
        values: what it shows. The filters are ``score`` (three decimals), ``shown`` and ``base64`` (of a file).
    """
    page = Environment(loader=PackageLoader("sodaops.pages", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page.filters["score"] = lambda value: f"{value:.3f}"
    page.filters["shown"] = shown
    page.filters["base64"] = lambda path: base64.b64encode(Path(path).read_bytes()).decode()
    return page.get_template(f"{name}.html.j2").render(**values)


def shown(value: Any) -> str:
    """A value as a person reads it.

    >>> shown(0.00031234), shown(None), shown("cls")
    ('0.000312', 'null', 'cls')
    """
    if isinstance(value, float):
        return f"{value:.3g}"
    return "null" if value is None else str(value)
