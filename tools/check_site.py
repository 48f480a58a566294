"""Checks the site that tools/build_site.py has built: its pages, its search, its drawing, and that faults are reported."""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from build_site import REPO, build

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# File -> text appended to it, patterns that the report must hold.
FAULTS = {
    "docs/start.md": ("\n[a page](nowhere.md)\n[a heading](serving.md#nowhere)\n", ("nowhere.md", "serving.md#nowhere")),
    "sodaops/text/labels.py": (
        '\n\ndef f(a: int) -> int:\n    """F.\n\n    Args:\n        b: other.\n    """\n',
        ("Parameter 'b' does not appear",),
    ),
}


def main() -> int:
    """Returns 1, and prints why, when something is wrong."""
    problems = [*check_pages(), *check_drawing(), *check_search(), *check_faults()]
    print(*problems or ["the site's pages, search and drawing are in order, and faults are reported"], sep="\n")
    return 1 if problems else 0


def check_pages() -> list[str]:
    """Every page is there and loads nothing from another server; the API pages show what they should."""
    problems = []
    for page in (REPO / "docs").rglob("*.md"):
        name = page.relative_to(REPO / "docs").with_suffix("")
        html = page_text(name.parent if name.name == "index" else name)
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']?([^\"' >]+)", html)
        loaded += re.findall(r"<link[^>]+rel=[\"']?(?:stylesheet|preconnect|icon)[^>]+href=[\"']?([^\"' >]+)", html)
        if not loaded:
            problems.append(f"{page}: not built")
        problems += [f"{page}: loads {address}" for address in loaded if re.match(r"(https?:)?//", address)]
    evaluation, data = page_text(Path("api/evaluation")), page_text(Path("api/data"))
    if "expected_calibration_error" not in evaluation or "Guo et al. 2017" not in evaluation:
        problems.append("api/evaluation: a docstring is missing")
    if "<blockquote" in data or ":func:" in data or "&gt;&gt;&gt;" not in data:
        problems.append("api/data: examples are not code, or roles are shown")
    return problems


def page_text(name: Path) -> str:
    """The HTML of a page; empty where it was not built."""
    file = REPO / "site" / name / "index.html"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def check_drawing() -> list[str]:
    """docs/flow.svg is the drawing of docs/flow.d2."""
    with tempfile.TemporaryDirectory() as folder:
        svg = Path(folder) / "flow.svg"
        subprocess.run([Path(sys.executable).parent / "d2", REPO / "docs/flow.d2", svg], check=True, capture_output=True)
        same = svg.read_bytes() == (REPO / "docs/flow.svg").read_bytes()
    return [] if same else ["docs/flow.svg is out of date: make picture"]


def check_search() -> list[str]:
    """A reader finds an incident by its name in a browser, which asks no other server."""
    if CHROMIUM is None:
        print("search: skipped, no chromium on PATH")
        return []
    from playwright.sync_api import sync_playwright

    handler = functools.partial(Quiet, directory=str(REPO / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, urls, errors = browser.new_page(), [], []
        page.on("request", lambda request: urls.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(base, wait_until="networkidle")
        page.keyboard.press("Control+k")
        page.keyboard.type("log_lost")
        page.locator("a[href*='incidents/#log_lost']").first.click()
        page.get_by_role("heading", name="log_lost").wait_for()
        browser.close()
        server.shutdown()
    return errors + [f"the site asks {url}" for url in urls if not url.startswith((base, "blob:", "data:"))]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def check_faults() -> list[str]:
    """A build of a copy with broken links and a wrong docstring fails and reports each."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("docs", "sodaops", "tools"):
            shutil.copytree(REPO / name, copy / name)
        for name in ("zensical.toml", "CHANGELOG.md", "CONTRIBUTING.md"):
            shutil.copy(REPO / name, copy / name)
        for name, (text, _) in FAULTS.items():
            with (copy / name).open("a", encoding="utf-8") as file:
                file.write(text)
        code, _, errors = build(copy)
    missing = [part for _, parts in FAULTS.values() for part in parts if part not in errors]
    return [f"the build reports no fault for {part}: {errors}" for part in missing] + ([] if code == 1 else ["no exit code 1"])


if __name__ == "__main__":
    sys.exit(main())
