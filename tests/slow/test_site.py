"""The site is built, has no fault, loads nothing from elsewhere, and can be searched in a browser."""

import functools
import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A clone in which `make docs` was run, and what that printed."""
    from tests.slow.conftest import Clone

    folder = tmp_path_factory.mktemp("site") / "clone"
    folder.mkdir()
    clone = Clone(folder)
    return clone, clone("make -o .venv/.installed docs")


def test_every_page_is_there_and_loads_nothing_from_elsewhere(built):
    clone, _ = built
    site = clone.folder / "site"
    for page in (REPO / "docs").rglob("*.md"):
        name = page.relative_to(REPO / "docs").with_suffix("")
        html = (site / name.parent / "index.html" if name.name == "index" else site / name / "index.html").read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']?([^\"' >]+)", html)
        loaded += re.findall(r"<link[^>]+rel=[\"']?(?:stylesheet|preconnect|icon)[^>]+href=[\"']?([^\"' >]+)", html)
        assert loaded and not [address for address in loaded if re.match(r"(https?:)?//", address)], page
    api = (site / "api/evaluation/index.html").read_text()
    assert "expected_calibration_error" in api and "Guo et al. 2017" in api
    data = (site / "api/data/index.html").read_text()  # examples are code, and roles are not shown
    assert "<blockquote" not in data and ":func:" not in data and "&gt;&gt;&gt;" in data


def test_the_picture_is_that_of_its_text(tmp_path):
    d2 = Path(sys.prefix) / "bin/d2"
    subprocess.run([d2, REPO / "docs/flow.d2", tmp_path / "flow.svg"], check=True, capture_output=True)
    assert (tmp_path / "flow.svg").read_bytes() == (REPO / "docs/flow.svg").read_bytes(), "make picture"


def test_a_reader_finds_a_page(built, browser):
    clone, _ = built
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(clone.folder / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        page, asked, faults = browser.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(base, wait_until="networkidle")
        page.keyboard.press("Control+k")
        page.keyboard.type("log_lost")
        page.locator("a[href*='incidents/#log_lost']").first.click()
        page.get_by_role("heading", name="log_lost").wait_for()
        assert "/incidents/" in page.url and not faults
        assert [url for url in asked if not url.startswith((base, "blob:", "data:"))] == []
        server.shutdown()


def test_faults_end_it_and_are_all_told(built):
    clone, _ = built
    faults = {
        "docs/start.md": "\n[a page](nowhere.md)\n[a heading](serving.md#nowhere)\n",
        "sodaops/text/labels.py": '\n\ndef f(a: int) -> int:\n    """F.\n\n    Args:\n        b: other.\n    """\n',
    }
    for path, fault in faults.items():
        with (clone.folder / path).open("a", encoding="utf-8") as file:
            file.write(fault)
    output = clone("make -o .venv/.installed docs", allowed=(2,))
    assert all(said in output for said in ("nowhere.md", "serving.md#nowhere", "Parameter 'b' does not appear"))
    assert "Traceback" not in output
