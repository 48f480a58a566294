"""Removes personal data from texts before they are stored."""

import re
from collections.abc import Sequence

KINDS = {
    "email": (re.compile(r"(?<![\w.+-])[\w.+-]++@[\w-]++(?:\.[\w-]++)+"), "<email>"),
    "phone": (re.compile(r"(?<![\d.])\+?(?:\(?\d[\s().\-–/]{0,2}){6,18}\d(?!\w)"), "<phone>"),
    "handle": (re.compile(r"(?<![\w.])@\w+"), "<handle>"),
}


def redact(text: str, kinds: Sequence[str]) -> str:
    """Replaces e-mail addresses, phone numbers (seven digits and more) or handles by placeholders.

    Args:
        text: any text.
        kinds: names in :data:`KINDS`; they are applied in its order.

    >>> redact("mail ann.b+c@mail.example.org or call +45 (12) 34-56-78, says @ann in 2024", ["handle", "phone", "email"])
    'mail <email> or call <phone>, says <handle> in 2024'
    """
    for kind, (pattern, placeholder) in KINDS.items():
        if kind in kinds:
            text = pattern.sub(placeholder, text)
    return text
