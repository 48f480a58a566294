"""The page, in a real browser, at the width of a desk and of a phone."""

from pathlib import Path

import pytest

from sodaops.tasks import SINGLE_LABEL
from tests.conftest import configured
from tests.serving import Server
from tests.slow.conftest import opened

pytestmark = pytest.mark.slow


VIEWS = pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])


@pytest.fixture(scope="module")
def server(trained):
    with Server(trained / "run/bundle", deadline_s=60) as server:
        yield server


def shown_probs(page):
    return [bar.split("\n") for bar in page.locator(".bar").all_inner_texts()]


def expected_probs(answer):
    return [[label, f"{100 * prob:.1f} %"] for label, prob in answer["probs"].items()]


@VIEWS
def test_a_text_is_answered_and_explained(server, browser, width, scheme, tmp_path):
    page, addresses, messages = opened(browser, width=width, scheme=scheme)
    with server.client() as client:
        page.goto(server.url)
        for text in ("so good", '<b onclick="x">bold</b> & "quoted" text'):
            page.fill("#text", text)
            page.press("#text", "Control+Enter")
            page.wait_for_function("text => document.querySelector('#pieces').textContent === text", arg=text)
            expected = client.post("/predict", json={"text": text}).json()
            assert page.inner_text("#label") == expected["label"] and shown_probs(page) == expected_probs(expected)
    assert page.locator("#pieces b").count() == 0, "a text became markup"
    assert "2 requests" in page.inner_text("#latency")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
    page.screenshot(path=tmp_path / f"page-{width}.png", full_page=True)
    page.fill("#text", "\u200b.")
    page.evaluate("document.querySelector('#text').value = '\\u200b\\u200b'")
    page.click("#ask")
    page.wait_for_selector("#problem:not([hidden])")
    assert "text 1 " in page.inner_text("#problem") and page.is_hidden("#result")
    assert all(url.startswith((server.url, "data:")) for url in addresses)
    assert not [message for message in messages if "422" not in message]
    page.close()


def test_a_late_answer_to_an_earlier_text_is_not_shown(server, browser):
    page, _, _ = opened(browser)
    page.goto(server.url)
    page.evaluate(
        """() => { const send = fetch;
        window.fetch = async (path, options) => {
          if (path === "predict" && options.body.includes("so good")) await new Promise((go) => { window.release = go; });
          return send(path, options);
        }; }"""
    )
    page.fill("#text", "so good")
    page.press("#text", "Control+Enter")
    page.wait_for_function("() => window.release !== undefined")
    page.fill("#text", "my bag is lost, again")
    page.press("#text", "Control+Enter")
    page.wait_for_function("() => document.querySelector('#pieces').textContent === 'my bag is lost, again'")
    page.evaluate("window.release()")
    page.wait_for_function("() => document.querySelector('#latency').textContent.includes('2 requests')")
    with server.client() as client:
        expected = client.post("/predict", json={"text": "my bag is lost, again"}).json()
    assert shown_probs(page) == expected_probs(expected)
    assert page.inner_text("#pieces") == "my bag is lost, again" and page.is_enabled("#ask")
    page.close()


def test_a_key_is_asked_for_and_used(trained, browser):
    with Server(trained / "run/bundle", api_keys="sesame", deadline_s=60) as server:
        page, _, _ = opened(browser)
        page.goto(server.url)
        page.fill("#text", "so good")
        page.click("#ask")
        page.wait_for_selector("#key-row:not([hidden])")
        page.wait_for_selector("#problem:not([hidden])")
        page.fill("#key", "sesame")
        page.click("#ask")
        page.wait_for_selector("#why:not([hidden])")
        assert "sesame" not in page.url and page.is_hidden("#problem")
        page.close()


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    """The pages of a sweep, a gate and an evaluation."""
    import optuna
    from optuna.trial import TrialState

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
        state = {5: TrialState.FAIL, 6: TrialState.PRUNED}.get(n)
        study.tell(trial, None if state else lr * 2, state=state)
    rules = configured().registry.gate.model_dump()
    bundle, splits = trained / "run/bundle", trained / "splits"
    judged = gate.run_gate("challenger", bundle, ("champion", bundle), splits, GateConfig(**{**rules, "max_latency": 9.0}))
    return {
        "sweep": report.write_sweep_page(folder, study, "val/macro_f1"),
        "gate": Path(gate.write_gate_report(str(folder / "gate"), judged, "", SINGLE_LABEL)),
        "evaluation": trained / "run/evaluation/report.html",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sweep", "gate", "evaluation"])
@VIEWS
def test_a_page_stands_alone(drawn, browser, name, width, scheme, tmp_path):
    page, addresses, messages = opened(browser, width=width, scheme=scheme)
    page.goto(drawn[name].as_uri(), wait_until="networkidle")
    page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
    assert all(url.startswith(("file:", "data:", "blob:")) for url in addresses), addresses
    assert not [message for message in messages if "GPU stall" not in message]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
    if name == "sweep":
        assert page.locator(".js-plotly-plot").count() == 4 and page.locator("#trials tbody tr").count() == 8
        assert page.locator("h1 b").count() == 0 and page.locator("td i").count() == 0, "a text became markup"
        page.click("#trials th:nth-child(3)")
        values = page.locator("#trials tbody tr td:nth-child(3)").all_inner_texts()
        numbers = [float(value) for value in values if value != "–"]
        assert numbers == sorted(numbers) and values[-1] == "–"
    page.close()
