"""Links between the repository's pages lead to files and headings that exist (`make lint-links`)."""

import functools
import re

from tests.commands import PAGES
from tests.conftest import REPO


def links(text):
    """Targets of Markdown links and images outside of code, without those to other sites."""
    text = re.sub(r"^([ \t]*)(```+).*?^\1\2", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", text)
    targets += re.findall(r"^\[[^\]]+\]:\s+(\S+)", text, flags=re.MULTILINE)
    targets += re.findall(r"<(?:img|a)[^>]+(?:src|href)=\"([^\"]+)\"", text)
    return [target for target in targets if not re.match(r"[a-z][a-z+.-]*:", target)]


def anchors(text):
    """The headings' anchors as GitHub and mkdocs name them: lower case, no punctuation, hyphens; repeats get -1, -2."""
    slugs: list[str] = []
    bare = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", bare, flags=re.MULTILINE):
        given = re.search(r"\{ *#([\w-]+)[^}]*\}$", title)
        plain = re.sub(r"\]\([^)]*\)|[`*\[]", "", title)
        slug = given[1] if given else re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        n_before = sum(slug == re.sub(r"[-_]\d+$", "", other) for other in slugs)
        slugs.append(slug if not n_before else f"{slug}-{n_before}")
    return {*slugs, *re.findall(r"<a +(?:id|name)=\"([^\"]+)\"", text)}


@functools.cache
def anchors_of(page):
    return anchors(page.read_text(encoding="utf-8"))


def test_links_lead_somewhere():
    dead = []
    for page in PAGES:
        for target in links(page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            file = (REPO / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve() if path else page
            if not file.exists() or not file.is_relative_to(REPO):
                dead.append(f"{page.relative_to(REPO)}: {target}")
            elif anchor and file.suffix == ".md" and anchor not in anchors_of(file):
                dead.append(f"{page.relative_to(REPO)}: {target} (it has {', '.join(sorted(anchors_of(file)))})")
    assert dead == []


def test_what_is_a_link_and_an_anchor():
    text = '# A `b` — c!\n[x](docs/a.md#b) `[y](no.md)` ![p](p.png "t") [z](https://x.org/)\n'
    text += "```bash\n[n](no.md)\n```\n## Two\n## Two\n"
    assert links(text) == ["docs/a.md#b", "p.png"]
    assert anchors(text) == {"a-b--c", "two", "two-1"}
    assert len(PAGES) > 10 and sum(len(links(page.read_text(encoding="utf-8"))) for page in PAGES) > 20
