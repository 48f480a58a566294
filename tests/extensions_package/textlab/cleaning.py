"""A cleaning of texts."""

import re


def without_links(text: str) -> str:
    return re.sub(r"https?://\S+", "", text)
