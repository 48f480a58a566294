"""The page for annotators, in a real browser, at the width of a desk and of a phone."""

import re
import signal

import pytest
from playwright.sync_api import expect

from sodaops.annotation.store import Store
from tests.annotation import LABELS, Server, store_of, task
from tests.other_tasks import Stars, Tags

SIZES = pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
LONG = (
    '<b onclick="x">bold</b> & "quoted": I waited forty minutes at the gate, and nobody could say whether the flight would '
    "leave at all. https://example.org/" + 60 * "a-long-address-" + "\nStill, the crew was kind."
)
SLOWER = "{ const ask = fetch; window.fetch = (...all) => new Promise((go) => setTimeout(go, 500)).then(() => ask(...all)); }"
pytestmark = pytest.mark.slow
expect.set_options(timeout=60_000)  # ms; it looks again until then


class Annotator:
    """An annotator with an own browser; keeps the addresses it asked for and the messages of its console."""

    def __init__(self, browser, url, name, width=1100, scheme="light", key=None):
        self.context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.url, self.requests, self.messages = url, [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.goto(url)
        if key is None:
            self.start(name)

    def start(self, name):
        self.page.fill("#name", name)
        self.page.press("#name", "Enter")
        expect(self.page.locator("#who")).to_have_text(f"You are {name}.")
        expect(self.page.locator("#text")).not_to_be_empty()

    def sees(self, selector, text):
        expect(self.page.locator(selector)).to_have_text(text)

    def finished(self):
        expect(self.page.locator("#skip")).to_be_disabled()
        self.sees("#text", re.compile("every text"))

    def press(self, *keys):
        """Each key, when the answer before it is saved."""
        for key in keys:
            expect(self.page.locator("#skip")).to_be_enabled()
            self.page.keyboard.press(key)

    def fits(self):
        return self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    def close(self):
        assert all(url.startswith((self.url, "data:")) for url in self.requests), self.requests
        self.context.close()


@SIZES
def test_two_annotators_with_shortcuts_and_agreement(browser, width, scheme, tmp_path):
    store = Store.create(tmp_path / "store", LABELS)
    store.add_tasks("some", [task(LONG, label="positive", score=0.37, probs={"positive": 0.37}), *map(task, "abcd")])
    names = [one.task for one in store.state().tasks]
    with Server(tmp_path / "store") as server:
        ben = Annotator(browser, server.url, "ben")
        ben.press("1", "2", "s", "1", "1")
        ben.finished()
        ann = Annotator(browser, server.url, "ann <i>", width, scheme)
        page = ann.page
        assert page.inner_text("#text") == LONG and page.locator("#text b").count() == 0, "a text became markup"
        assert "0.37" not in page.content() and "37 %" not in page.inner_text("main")  # the prediction
        assert page.locator("#labels button").all_inner_texts() == [f"{n}{label}" for n, label in enumerate(LABELS, 1)]
        assert ann.fits(), "wider than the screen"
        page.screenshot(path=tmp_path / f"first-{width}-{scheme}.png", full_page=True)
        assert page.locator("#undo").is_disabled() and page.locator("#others").is_hidden()
        ann.press("1")
        ann.sees("#status", "Saved: negative")
        ann.press("2")
        ann.sees("#text", "b")
        ann.press("3")
        ann.sees("#text", "c")
        ann.press("3")
        ann.sees("#counts", re.compile("4 labelled, 0 skipped of 5.*5 of 5"))
        ann.sees("#pairs", "ben67 % of 3, kappa 0.50")
        assert page.locator("#who i").count() == 0 and ann.fits()
        page.screenshot(path=tmp_path / f"last-{width}-{scheme}.png", full_page=True)
        ann.press("u")
        ann.sees("#text", "c")
        ann.press("Backspace")
        ann.sees("#text", "b")
        ann.press("s")
        ann.sees("#text", "c")
        page.locator("#labels button", has_text="neutral").click()
        ann.sees("#text", "d")
        page.keyboard.press("9")  # no such label
        page.keyboard.press("Control+u")
        page.reload()
        ann.sees("#who", "You are ann <i>.")  # the browser keeps it
        ann.sees("#counts", re.compile("3 labelled, 1 skipped of 5.*4 of 5"))
        assert page.get_attribute("#track", "aria-valuenow") == "4"
        ann.close()
        ben.close()
        assert not ann.messages and not ben.messages
    answers = store.state().answers
    expected = dict(zip(names, ["negative", "neutral", None, "neutral"], strict=False))
    assert {name: by["ann <i>"] for name, by in answers.items() if "ann <i>" in by} == expected


def test_an_answer_is_kept_while_the_server_is_gone(browser, tmp_path):
    names = [one.task for one in store_of(tmp_path / "store", 3).state().tasks]
    server = Server(tmp_path / "store")
    ann = Annotator(browser, server.url, "ann", 390)
    page = ann.page
    ann.press("1")
    ann.sees("#text", "text 1")
    server.stop(signal.SIGKILL)
    page.keyboard.press("3")
    expect(page.locator("#message")).to_contain_text("positive")
    assert page.inner_text("#text") == "text 1" and page.inner_text("#status") == ""
    assert all(button.is_disabled() for button in page.locator("#work button").all())
    page.keyboard.press("2")  # nothing is taken while one answer waits
    page.screenshot(path=tmp_path / "gone.png", full_page=True)
    with Server(tmp_path / "store", server.port):
        ann.sees("#text", "text 2")
        ann.sees("#status", "Saved: positive")
        assert page.locator("#problem").is_hidden()
        ann.press("u")  # the server that took it is another
        ann.sees("#text", "text 1")
        ann.press("2", "s")
        ann.finished()
        ann.close()
    answers = {name: by["ann"] for name, by in Store(tmp_path / "store").state().answers.items()}
    assert answers == dict(zip(names, ["negative", "neutral", None], strict=True))


def test_a_reload_keeps_an_answer_that_is_not_saved(browser, tmp_path):
    store = store_of(tmp_path / "store", 2)
    with Server(tmp_path / "store") as server:
        ann = Annotator(browser, server.url, "ann")
        ann.page.on("dialog", lambda dialog: dialog.accept())
        ann.page.route("**/api/answer", lambda route: route.abort())
        ann.page.keyboard.press("3")
        expect(ann.page.locator("#message")).to_contain_text("positive")
        ann.page.unroute("**/api/answer")
        ann.page.reload()
        ann.sees("#status", "Saved: positive")
        ann.sees("#text", "text 1")
        ann.close()
    assert store.state().progress().labelled == {"ann": 1}


def test_a_key_is_asked_for(browser, tmp_path):
    store_of(tmp_path / "store", 1)
    with Server(tmp_path / "store", API_KEYS="secret") as server:
        ann = Annotator(browser, server.url, "ann", 390, "dark", key="secret")
        page = ann.page
        page.fill("#name", "ann")
        page.press("#name", "Enter")
        expect(page.locator("#key-form")).to_be_visible()
        page.screenshot(path=tmp_path / "key.png", full_page=True)
        expect(page.locator("#key")).to_be_focused()
        page.evaluate(SLOWER)
        for key in ("wrong", "secret"):  # the second while the first is still asked about: the field is shut until then
            page.fill("#key", key)
            page.press("#key", "Enter")
        ann.sees("#text", "text 0")
        assert page.locator("#key-form").is_hidden() and page.locator("#problem").is_hidden()
        assert page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])").find("secret") < 0
        ann.close()


def test_a_deleted_task_is_reported_and_passed_over(browser, tmp_path):
    store = store_of(tmp_path / "store", 2)
    deleted, _ = store.state().tasks
    with Server(tmp_path / "store") as server:
        ann = Annotator(browser, server.url, "ann")
        store.forget([], [deleted.text_sha256])
        ann.page.keyboard.press("3")
        expect(ann.page.locator("#message")).to_contain_text(deleted.task)
        ann.page.click("#retry")
        ann.sees("#text", "text 1")
        ann.close()


@SIZES
@pytest.mark.parametrize(
    ("kind", "labels", "keys", "answers"),
    [
        (Tags, ["a", "b", "c"], [["1", "3", "Enter"], ["2", "2", "1", "Enter"], ["0"], ["s"]], ["a|c", "a", "", None]),
        (Stars, ["stars"], [["3", ".", "5", "Enter"], ["0", "Enter"], ["9", "Enter", "Backspace", "5", "Enter"], ["s"]],
         ["3.5", "0", "5", None]),
    ],
    ids=["several labels", "a number"],
)  # fmt: skip
def test_other_questions_by_keyboard(browser, monkeypatch, width, scheme, kind, labels, keys, answers, tmp_path):
    monkeypatch.setenv("SODAOPS_TASKS", "tests.other_tasks.Tags,tests.other_tasks.Stars")
    store = Store.create(tmp_path / "store", labels, kind())
    store.add_tasks("some", map(task, "abcd"))
    with Server(tmp_path / "store") as server:
        ann = Annotator(browser, server.url, "ann", width, scheme)
        for n, typed in enumerate(keys, 1):
            expect(ann.page.locator("#skip")).to_be_enabled()
            for key in typed:
                ann.page.keyboard.press(key)
            expect(ann.page.locator("#track")).to_have_attribute("aria-valuenow", str(n))
        assert ann.fits()
        ann.page.screenshot(path=tmp_path / f"{kind.__name__}-{width}.png", full_page=True)
        ann.finished()
        ann.close()
        assert not ann.messages
    assert [given["ann"] for given in store.state().answers.values()] == answers
