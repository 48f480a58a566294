"""The page, in a real browser, at the width of a desk and of a phone."""

from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.conftest import configured
from tests.serving import Server

STATES = {5: TrialState.FAIL, 6: TrialState.PRUNED}
pytestmark = pytest.mark.slow


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


def test_a_late_answer_to_an_earlier_text_is_not_shown(trained, browser):
    with Server(trained / "run/bundle") as server, server.client() as client:
        labels = {text: client.post("/predict", json={"text": text}).json() for text in ("so good", "my bag is lost, again")}
        page = browser.new_page()
        page.goto(server.url)
        page.evaluate(
            """() => { const ask = fetch;
            window.fetch = async (path, what) => {
              if (path === "predict" && what.body.includes("so good")) await new Promise((go) => setTimeout(go, 1500));
              return ask(path, what);
            }; }"""
        )
        for text in labels:
            page.fill("#text", text)
            page.press("#text", "Control+Enter")
        page.wait_for_function("() => document.querySelector('#latency').textContent.includes('over 2 requests')")
        expected = labels["my bag is lost, again"]["probs"]
        shown = [bar.split("\n") for bar in page.locator(".bar").all_inner_texts()]
        assert shown == [[label, f"{100 * prob:.1f} %"] for label, prob in expected.items()]
        assert page.inner_text("#pieces") == "my bag is lost, again" and page.is_enabled("#ask")
        page.close()


def test_a_key_is_asked_for_and_used(trained, browser):
    with Server(trained / "run/bundle", api_keys="sesame") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#text", "so good")
        page.click("#ask")
        page.wait_for_selector("#key-row:not([hidden])")
        page.wait_for_selector("#problem:not([hidden])")
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
        assert page.locator(".opblock").count() == 11
        assert all(url.startswith((server.url, "data:")) for url in asked), asked
        page.close()


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    """The pages of a sweep, a gate and an evaluation."""
    import optuna

    from sodaops.config.schema import GateConfig
    from sodaops.registry import gate
    from sodaops.search import report, study as studies

    folder = tmp_path_factory.mktemp("pages")
    studies.silence_optuna_loggers()
    study = optuna.create_study(direction="maximize", study_name='a <b>"study"</b>')
    study.sampler = optuna.samplers.RandomSampler(seed=1)
    for n in range(8):
        trial = study.ask()
        lr = trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True)
        trial.suggest_categorical("model.pooling", ["mean", "cls", None])
        for step in (1, 2):
            trial.report(lr * step, step)
        trial.set_user_attr("seconds", 3.0)
        if n == 5:
            trial.set_user_attr("error", "it broke: <i>here</i>")
        study.tell(trial, *([lr * 2] if n not in (5, 6) else []), state=None if n not in (5, 6) else STATES[n])
    rules = configured().registry.gate.model_dump()
    bundle, splits = trained / "run/bundle", trained / "splits"
    judged = gate.judge("challenger", bundle, ("champion", bundle), splits, GateConfig(**{**rules, "max_latency": 9.0}))
    return {
        "sweep": report.write_sweep_page(folder, study, "val/macro_f1"),
        "gate": Path(gate.write(str(folder / "gate"), judged, "")),
        "evaluation": trained / "run/evaluation/report.html",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sweep", "gate", "evaluation"])
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_a_page_stands_alone(drawn, browser, name, width, scheme, tmp_path):
    asked, said = [], []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(drawn[name].as_uri())
    page.wait_for_timeout(500)
    page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
    assert not [line for line in said if "GPU stall" not in line]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
    if name == "sweep":
        assert page.locator(".js-plotly-plot").count() == 4 and page.locator("#trials tbody tr").count() == 8
        assert page.locator("h1 b").count() == 0 and page.locator("td i").count() == 0, "a text became markup"
        page.click("#trials th:nth-child(3)")
        values = page.locator("#trials tbody tr td:nth-child(3)").all_inner_texts()
        numbers = [float(value) for value in values if value != "–"]
        assert numbers == sorted(numbers) and values[-1] == "–"
    page.close()
