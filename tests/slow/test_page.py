"""The page, in a real browser, at the width of a desk and of a phone."""

import shutil

import pytest
from playwright.sync_api import sync_playwright

from tests.serving import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; install Debian's, for example"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_a_text_is_answered_and_explained(trained, browser, width, scheme, tmp_path):
    asked, said = [], []
    with Server(trained / "run/bundle") as server, server.client() as client:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        for text in ("so good", '<b onclick="x">bold</b> & "quoted" text'):
            page.fill("#text", text)
            page.press("#text", "Control+Enter")
            page.wait_for_function("text => document.querySelector('#pieces').textContent === text", arg=text)
            expected = client.post("/predict", json={"text": text}).json()
            assert page.inner_text("#label") == expected["label"]
            shown = [bar.split("\n") for bar in page.locator(".bar").all_inner_texts()]
            assert shown == [[label, f"{100 * prob:.1f} %"] for label, prob in expected["probs"].items()]
        assert page.locator("#pieces b").count() == 0, "a text became markup"
        assert "over 2 requests" in page.inner_text("#latency")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
        page.fill("#text", "\u200b.")
        page.evaluate("document.querySelector('#text').value = '\\u200b\\u200b'")
        page.click("#ask")
        page.wait_for_selector("#problem:not([hidden])")
        assert "empty after cleaning" in page.inner_text("#problem") and page.is_hidden("#result")
        page.screenshot(path=tmp_path / f"page-{width}.png", full_page=True)
        assert all(url.startswith((server.url, "data:")) for url in asked)
        assert not [line for line in said if "422" not in line]
        page.close()


def test_a_key_is_asked_for_and_used(trained, browser):
    with Server(trained / "run/bundle", api_keys="sesame") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#text", "so good")
        page.click("#ask")
        page.wait_for_selector("#key-row:not([hidden])")
        assert "wrong or missing key" in page.inner_text("#problem")
        page.fill("#key", "sesame")
        page.click("#ask")
        page.wait_for_selector("#why:not([hidden])")
        assert "sesame" not in page.url and page.is_hidden("#problem")
        page.close()


def test_the_docs_draw_themselves(trained, browser):
    asked = []
    with Server(trained / "run/bundle") as server:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{server.url}/docs")
        page.wait_for_selector(".opblock")
        assert page.locator(".opblock").count() == 10
        assert all(url.startswith((server.url, "data:")) for url in asked), asked
        page.close()
