"""Pages with hostile texts, labels and names, and pages of other sites, in a real browser."""

import contextlib
import http.server
import json
import shutil
import threading

import pytest
from playwright.sync_api import expect

from sodaops.annotation.store import Store
from tests.annotation import Server as AnnotationServer, task
from tests.serving import Server, refresh_info
from tests.slow.conftest import opened

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
STYLED = "getComputedStyle(document.querySelector('main')).maxWidth !== 'none'"
# What a page of another site may try against a service that has no keys, as on the user's own machine.
ATTACKS = """async (url) => {
  const tries = {
    get: () => fetch(url + "/predict?text=a", { mode: "no-cors" }).then(() => "sent"),
    text: () => fetch(url + "/api/answer", { method: "POST", mode: "no-cors", body: "{}" }).then(() => "sent"),
    json: () => fetch(url + "/predict", { method: "POST", headers: { "content-type": "application/json" }, body: "{}" }),
    read: () => fetch(url + "/healthz").then((answer) => answer.text()),
    frame: () => new Promise((go) => {
      const frame = document.createElement("iframe");
      frame.onload = () => go(frame.contentDocument === null ? "blocked" : "shown");
      frame.src = url + "/";
      document.body.append(frame);
    }),
  };
  const results = {};
  for (const [name, attempt] of Object.entries(tries)) results[name] = await attempt().catch(() => "blocked");
  return results;
}"""


@contextlib.contextmanager
def served_page():
    """An empty page of another origin."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><link rel=icon href=data:,><body></body>")

        def log_message(self, *_):
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def hostile_bundle(trained, tmp_path_factory):
    """A bundle with a hostile label."""
    folder = shutil.copytree(trained / "run/bundle", tmp_path_factory.mktemp("hostile") / "bundle")
    info = json.loads((folder / "bundle.json").read_text())
    refresh_info(folder, labels=[HOSTILE, *info["labels"][1:]])
    return folder


def test_the_page_of_the_predictor(hostile_bundle, browser, tmp_path):
    with Server(hostile_bundle, deadline_s=60) as server:
        page, _, messages = opened(browser, server.url)
        page.fill("#text", HOSTILE)
        page.click("#ask")
        page.wait_for_selector("#why:not([hidden])")
        assert HOSTILE in page.inner_text("#bars") and HOSTILE in page.inner_text("#about")
        assert page.locator("main img, main script").count() == 0 and page.title() == "SoDaOps"
        assert page.evaluate(STYLED) and page.locator(".fill").first.bounding_box()["width"] > 0
        page.screenshot(path=tmp_path / "predictor.png", full_page=True)
        # Were a text ever rendered as markup, the policy would keep its scripts from running.
        page.evaluate("text => { document.querySelector('#label').innerHTML = text; }", HOSTILE)
        page.wait_for_timeout(200)
        assert page.title() == "SoDaOps" and any("Content Security Policy" in message for message in messages)
        docs, addresses, messages = opened(browser, f"{server.url}/docs")
        docs.wait_for_selector(".opblock")
        assert docs.locator(".opblock").first.evaluate("box => getComputedStyle(box).borderRadius") != "0px"
        docs.screenshot(path=tmp_path / "docs.png")
        assert docs.locator(".opblock").count() == 11 and not messages
        assert all(url.startswith((server.url, "data:")) for url in addresses), addresses
        with served_page() as other:
            attacker = opened(browser, other).page
            results = attacker.evaluate(ATTACKS, server.url)
        page.close(), docs.close(), attacker.close()
    assert results["json"] == results["read"] == results["frame"] == "blocked", results
    seen = [(record["method"], record["path"], record["status"]) for record in server.records() if "status" in record]
    assert ("GET", "/predict", 403) in seen and ("POST", "other", 403) in seen


def test_the_page_for_annotators(browser, tmp_path):
    store = Store.create(tmp_path / "store", [HOSTILE, "fine"])
    store.add_tasks("some", [task(HOSTILE), task("b")])
    with AnnotationServer(tmp_path / "store") as server:
        for name in (f"ann {HOSTILE}"[:60], "ben"):  # ben sees ann's name in the list of agreements
            page, _, messages = opened(browser, server.url)
            page.evaluate("localStorage.clear()")
            page.reload()
            page.fill("#name", name)
            page.press("#name", "Enter")
            expect(page.locator("#text")).to_have_text(HOSTILE)
            for _ in range(2):
                expect(page.locator("#skip")).to_be_enabled()
                page.keyboard.press("1")
            expect(page.locator("#skip")).to_be_disabled()
            expect(page.locator("#counts")).to_contain_text("2 labelled")
            assert page.locator("main img, main script").count() == 0 and page.title() == "SoDaOps annotation"
            assert page.evaluate(STYLED) and not messages
            page.screenshot(path=tmp_path / f"annotation-{name[:3]}.png", full_page=True)
            if name == "ben":
                assert "<img" in page.inner_text("#pairs")
            page.close()
        with served_page() as other:
            attacker = opened(browser, other).page
            results = attacker.evaluate(ATTACKS, server.url)
            attacker.close()
    assert results["read"] == results["frame"] == "blocked", results
    assert {record["status"] for record in server.records() if record.get("path") == "/api/answer"} == {200, 403}
