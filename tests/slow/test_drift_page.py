"""The pages of the drift service in a real browser, with texts that contain markup."""

import os
from types import SimpleNamespace

import pytest

from sodaops.inference.predictor import Predictor
from tests.requests import log_rows, write_log_part
from tests.serving import DRIFT, Server
from tests.slow.conftest import opened
from tests.watching import RECENTLY, fill, replaced

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
MARKUP = f"</td></table>{HOSTILE}<script>document.title='owned'</script>"
BUNDLE_ID = f"<b>{'b' * 120}</b>"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def watched(drift_bundle, logged_rows, tmp_path_factory):
    """A drift service that has seen hostile texts, a bundle with a hostile id, and a part with a long name."""
    folder = tmp_path_factory.mktemp("watched")
    texts = [f"{MARKUP} {n} {'ü' * 300} {'https://example.test/' + 'a' * 200}" for n in range(60)]
    hostile = log_rows(Predictor(drift_bundle), [*texts, *[HOSTILE] * 60], RECENTLY)
    fill(folder / "log", hostile, logged_rows.fresh.slice(0, 60), replaced(logged_rows.others, "bundle_id", BUNDLE_ID))
    bad = write_log_part(folder / "log", logged_rows.fresh, "x" * 200)
    bad.write_bytes(b"")
    settings = {"request_log": folder / "log", "output_dir": folder / "out", "every_s": 9999}
    with Server(drift_bundle, prefix=DRIFT, **settings) as server, server.client() as client:
        result = client.post("/look").json()
        assert result["drifted"], result
        yield SimpleNamespace(url=server.url, numbers=client.get("/drift.json").json())


def save_screenshot(page, name):
    """Saves a picture where SODAOPS_SCREENSHOTS names a folder."""
    if folder := os.environ.get("SODAOPS_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_hostile_texts_stay_texts(watched, browser, width, scheme):
    page, requested, messages = opened(browser, f"{watched.url}/report", width, scheme)
    page.wait_for_load_state("networkidle")
    save_screenshot(page, f"drift-{width}")
    assert page.title().startswith("drift: Drift: ") and "owned" not in page.title()
    assert page.locator("main script, main img, main td b").count() == 0, "a text was rendered as markup"
    assert requested == [f"{watched.url}/report"] and not messages
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
    shown = page.inner_text("main")
    assert "sample" not in shown, "all of the window was compared"
    assert f"bundle {BUNDLE_ID}" in shown and "x" * 200 in shown
    assert all(cause["said"] in shown for cause in watched.numbers["causes"]) and HOSTILE in shown
    texts = [example["text"][:400] for example in watched.numbers["examples"]]
    assert page.locator("td.text").all_inner_texts() == [" ".join(text.split()) for text in texts]
    assert any(MARKUP in text for text in texts)
    drawn = {feature["name"] for feature in watched.numbers["features"] if feature["bins"]}
    figures = page.locator("figure")
    assert 4 <= figures.count() <= len(drawn)
    heights = page.locator("figure .bars i").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().height)")
    assert max(heights) == pytest.approx(90, abs=1) and min(heights) >= 1
    page.close()


def test_a_part_of_the_table_can_be_reached_on_a_phone(watched, browser):
    page, _, _ = opened(browser, f"{watched.url}/report", 390, "dark")
    boxes = page.locator(".scroll").evaluate_all("boxes => boxes.map(box => box.getBoundingClientRect().right)")
    assert len(boxes) == 2 and max(boxes) <= 390
    for table in page.locator(".scroll").all():
        box = table.locator("th:nth-child(2)").bounding_box()
        assert box["x"] + box["width"] <= 390, "the verdict, or the answer, is off the screen"
    page.close()


@pytest.mark.parametrize("width", [1100, 390])
def test_evidentlys_own_page_draws_itself(watched, browser, width):
    page, requested, messages = opened(browser, f"{watched.url}/report/evidently", width)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot path').length > 14", timeout=120_000)
    save_screenshot(page, f"evidently-{width}")
    assert page.get_by_text("Drift in column").count() == 7
    assert page.locator(".js-plotly-plot").count() >= 7
    assert all(url.startswith((watched.url, "data:", "blob:")) for url in requested), requested
    assert not messages
    page.close()
