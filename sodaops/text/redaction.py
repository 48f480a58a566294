"""Taking out of a text what points to a person, before the text is written anywhere."""

import re
from collections.abc import Sequence

KINDS = {
    "email": (re.compile(r"(?<![\w.+-])[\w.+-]++@[\w-]++(?:\.[\w-]++)+"), "<email>"),
    "phone": (re.compile(r"(?<![\d.])\+?(?:\(?\d[\s().\-–/]{0,2}){6,18}\d(?!\w)"), "<phone>"),
    "handle": (re.compile(r"(?<![\w.])@\w+"), "<handle>"),
}


def redact(text: str, kinds: Sequence[str]) -> str:
    """Puts a sign in the place of e-mail addresses, phone numbers (seven digits and more) or handles.

    Args:
        text: any.
        kinds: of :data:`KINDS`, applied in their order there.

    >>> redact("mail ann.b+c@mail.example.org or call +45 (12) 34-56-78, says @ann in 2024", ["handle", "phone", "email"])
    'mail <email> or call <phone>, says <handle> in 2024'
    """
    for kind, (pattern, sign) in KINDS.items():
        if kind in kinds:
            text = pattern.sub(sign, text)
    return text
