"""Links within the repository lead somewhere: files, and headings of pages."""

import re

import pytest

from tests.commands import PAGES
from tests.conftest import REPO


def links(text):
    """Targets of Markdown links and images outside of code, without those to other sites."""
    text = re.sub(r"^([ \t]*)(```+).*?^\1\2", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", text)
    found += re.findall(r"^\[[^\]]+\]:\s+(\S+)", text, flags=re.MULTILINE)
    found += re.findall(r"<(?:img|a)[^>]+(?:src|href)=\"([^\"]+)\"", text)
    return [target for target in found if not re.match(r"[a-z][a-z+.-]*:", target)]


def anchors(text):
    """What GitHub and mkdocs call the headings: lower case, no punctuation, hyphens for spaces; -1 from the second on."""
    found: list[str] = []
    bare = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", bare, flags=re.MULTILINE):
        given = re.search(r"\{ *#([\w-]+)[^}]*\}$", title)
        plain = re.sub(r"\]\([^)]*\)|[`*\[]", "", title)
        slug = given[1] if given else re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        n_before = sum(slug == re.sub(r"[-_]\d+$", "", other) for other in found)
        found.append(slug if not n_before else f"{slug}-{n_before}")
    return {*found, *re.findall(r"<a +(?:id|name)=\"([^\"]+)\"", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_somewhere(page):
    dead = []
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = (REPO / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve() if path else page
        if not there.exists() or not there.is_relative_to(REPO):
            dead.append(target)
        elif anchor and there.suffix == ".md" and anchor not in anchors(there.read_text(encoding="utf-8")):
            dead.append(f"{target} (it has {', '.join(sorted(anchors(there.read_text(encoding='utf-8'))))})")
    assert not dead, "\n".join(dead)


def test_what_is_a_link_and_an_anchor():
    text = '# A `b` — c!\n[x](docs/a.md#b) `[y](no.md)` ![p](p.png "t") [z](https://x.org/)\n'
    text += "```bash\n[n](no.md)\n```\n## Two\n## Two\n"
    assert links(text) == ["docs/a.md#b", "p.png"]
    assert anchors(text) == {"a-b--c", "two", "two-1"}
    assert len(PAGES) > 10 and sum(len(links(page.read_text(encoding="utf-8"))) for page in PAGES) > 20
