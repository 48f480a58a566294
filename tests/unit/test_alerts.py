"""Alert rules: what the configuration allows, the signals, and `sodaops alerts check`."""

import math
import re

import pytest

from sodaops.alerting import scrape
from sodaops.alerting.scrape import fetch_metrics
from sodaops.alerting.signals import Scrape, histogram_quantile, parse_metrics, signal_values
from sodaops.errors import ConfigError, DeliveryError
from sodaops.serving.metrics import Metrics
from tests.alerting import EMAIL, RULE, RULES, SECRET, Receiver, alerts_config
from tests.conftest import configured


@pytest.mark.parametrize(("changes", "key"), [
    ({"abov": 1}, "abov"),
    ({"signal": "eror_rate"}, "signal"),
    ({"below": 0.1}, "below"),
    ({"above": None}, "below"),
    ({"clear": 0.3}, "clear"),
    ({"above": None, "below": 0.1, "clear": 0.05}, "clear"),
    ({"above": 2}, "above"),
    ({"above": -0.1, "clear": -1}, "above"),
    ({"above": None, "below": 0, "clear": 1}, "below"),
    ({"signal": "traffic", "above": None, "below": 0, "clear": 1}, "below"),
    ({"above": float("nan")}, "above"),
    ({"above": "0.1"}, "above"),
    ({"for_s": -1}, "for_s"),
    ({"severity": "pag"}, "severity"),
    ({"summary": None}, "summary"),
])  # fmt: skip
def test_refused_rules(changes, key):
    with pytest.raises(ConfigError, match=rf"alerts\.rules\.mine(\.{key}=|=.*{key})"):
        alerts_config(rules={"mine": {**RULE, **changes}})


LOGIN = {"username": "me", "password_file": "/run/password"}


@pytest.mark.parametrize(("changes", "key"), [
    ({"rules": {"Bad Name": None}}, "rules.Bad Name"),
    ({"rules": {"mine": 3}}, "rules.mine"),
    ({"metrics_urls": []}, "metrics_urls"),
    ({"metrics_urls": ["localhost:8000"]}, "metrics_urls.0"),
    ({"metrics_urls": ["http://me:secret@h/metrics"]}, "metrics_urls.0"),
    ({"every_s": 0}, "every_s"),
    ({"window_s": 30}, "window_s"),
    ({"traffic_offset_s": 30}, "traffic_offset_s"),
    ({"traffic_min_requests": 0}, "traffic_min_requests"),
    ({"cooldown_s": 0}, "cooldown_s"),
    ({"webhook_url": "https://hooks.test"}, "webhook_url"),  # removed: it would be a secret in the configuration
    ({"state_dir": "outputs"}, "state_dir"),
    ({"email": {**EMAIL, "recipients": []}}, "email.recipients"),
    ({"email": {**EMAIL, "recipients": ["nobody"]}}, "email.recipients.0"),
    ({"email": {**EMAIL, "sender": "nobody"}}, "email.sender"),
    ({"email": {**EMAIL, "port": 0}}, "email.port"),
    ({"email": {**EMAIL, "password": "x"}}, "email.password"),
    ({"email": {**EMAIL, "username": "me"}}, "email.password_file"),
    ({"email": {**EMAIL, "password_file": "p"}}, "email.password_file"),
    ({"email": {**EMAIL, **LOGIN, "starttls": False}}, "email.password_file"),
])  # fmt: skip
def test_refused_sections(changes, key):
    with pytest.raises(ConfigError, match=rf"alerts\.{re.escape(key)}\b"):
        alerts_config(**changes)


def test_the_default_rules():
    assert set(configured().alerts.rules) == RULES
    assert set(alerts_config(rules={"mine": RULE, "other": None}).enabled_rules()) == {"mine"}


class Process:
    """The metrics of a predictor, scraped in memory."""

    def __init__(self):
        self.metrics = Metrics()

    def answers(self, n, status="200", path="/predict", seconds=0.003, confidence=0.9):
        for _ in range(n):
            self.metrics.answered("POST", path, status).inc()
            self.metrics.seconds_of(path).observe(seconds)
            if status == "200":
                self.metrics.confidence.observe(confidence)

    def scrape(self):
        return parse_metrics(self.metrics.render().decode())


def test_signals_add_up_processes_and_survive_a_restart():
    restarted, steady = Process(), Process()
    restarted.answers(60)
    steady.answers(30, path="/v2/models/{name}/infer")
    first = [restarted.scrape(), steady.scrape()]
    restarted = Process()  # its counters start at 0 again
    restarted.answers(15)
    restarted.answers(15, status="503", seconds=0.7)
    restarted.answers(500, status="500", path="/explain")  # not a prediction
    restarted.metrics.journal.lost.inc(3)
    steady.answers(30, path="/v2/models/{name}/infer", confidence=0.6)
    values = signal_values(first, [restarted.scrape(), steady.scrape()])
    assert values == pytest.approx(
        {
            "up": 1.0,
            "error_rate": 15 / 60,
            "mean_confidence": (15 * 0.9 + 30 * 0.6) / 45,
            "latency_p99_s": 0.5 + 0.5 * (0.99 * 60 - 45) / 15,  # 15 of 60 requests are between 0.5 and 1 s
            "log_lost": 3.0,
        }
    )


def test_signals_without_two_scrapes():
    scraped = Process().scrape()
    assert signal_values(None, [scraped, Scrape({}, {"drift": 1.0})]) == {"up": 1.0, "drift": 1.0}
    assert signal_values([None], [scraped]) == {"up": 1.0}
    assert signal_values([scraped], [None]) == {"up": 0.0}
    assert signal_values([scraped], [scraped]) == {"up": 1.0, "log_lost": 0.0}  # no requests in between


@pytest.mark.parametrize(("q", "buckets", "expected"), [
    (0.5, {1.0: 10, 2.0: 20, math.inf: 20}, 1.0),
    (0.75, {1.0: 10, 2.0: 20, math.inf: 20}, 1.5),
    (0.99, {1.0: 10, 2.0: 10, math.inf: 100}, 2.0),  # above the last finite bound
    (0.25, {4.0: 10, math.inf: 10}, 1.0),  # the first bucket begins at 0
    (0.9, {1.0: 5, 2.0: 5, 4.0: 10, math.inf: 10}, 3.6),  # an empty bucket in between
    (0.5, {1.0: 0, math.inf: 0}, None),
    (0.5, {math.inf: 3}, None),
    (0.5, {1.0: 3, 2.0: 3}, None),
    (0.5, {}, None),
])  # fmt: skip
def test_histogram_quantile(q, buckets, expected):
    assert histogram_quantile(q, buckets) == (pytest.approx(expected) if expected is not None else None)


@pytest.mark.parametrize(
    "text", ["<html><body>Not here</body></html>", "", "node_load1 0.3\n", "sodaops_requests_total{", "\x00", "sodaops_x one"]
)
def test_other_answers_are_not_metrics(text):
    with pytest.raises(DeliveryError):
        parse_metrics(text)


def test_nan_is_no_value():
    assert parse_metrics("sodaops_drift_detected NaN\n") == Scrape({})
    assert parse_metrics('sodaops_drift_detected{a="1"} 0\nsodaops_drift_detected{a="2"} 1\n').gauges == {"drift": 1}


def test_the_worst_upper_bound_of_an_estimated_quality_is_a_signal():
    text = "".join(f'sodaops_quality{{{{metric="{{}}",bound="{bound}"}}}} {{}}\n' for bound in ("low", "high"))
    first, second = text.format("accuracy", 0.7, "accuracy", 0.8), text.format("macro_f1", 0.5, "macro_f1", 0.6)
    scrapes = [parse_metrics(first), parse_metrics(second + first.replace("0.8", "0.9")), parse_metrics("sodaops_x 1\n")]
    assert signal_values(None, scrapes) == {"up": 1.0, "accuracy": 0.8, "macro_f1": 0.6}
    rule = {**RULE, "signal": "accuracy", "above": None, "below": 0.85, "clear": 0.9}
    assert alerts_config(rules={"mine": rule}).enabled_rules()["mine"].fires(0.8)
    with pytest.raises(ConfigError, match="below"):
        alerts_config(rules={"mine": {**rule, "below": 1.2, "clear": 2}})


def test_a_redirect_does_not_carry_the_key_elsewhere(monkeypatch):
    with Receiver("sodaops_x 1\n") as other, Receiver(other.url) as receiver:
        with pytest.raises(DeliveryError, match="302"):
            fetch_metrics(receiver.url, SECRET)
        assert other.keys == [] and receiver.keys == [SECRET]
        monkeypatch.setattr(scrape, "_MAX_BYTES", 3)
        with pytest.raises(DeliveryError, match="3 bytes"):
            fetch_metrics(other.url, None)
        monkeypatch.setattr(scrape, "TIMEOUT_S", 0.0)
        with pytest.raises(DeliveryError):
            fetch_metrics(other.url, None)


@pytest.fixture
def check(run, monkeypatch):
    """Runs `sodaops alerts check` on the metrics of a receiver, with the rules errors, drift and down."""
    for name in ("SODAOPS_ALERT_URL", "SODAOPS_ALERT_URL_FILE", "SODAOPS_ALERT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    disabled = [f"alerts.rules.{name}=null" for name in RULES - {"errors", "drift", "down"}]

    def go(receiver, *options):
        return run("alerts", "check", *options, f"alerts.metrics_urls=[{receiver.url}]", *disabled)

    return go


def states(out):
    return {line.split()[0]: line.split(maxsplit=5)[5] for line in out.splitlines()[1:4]}


def test_check_exits_with_4_when_a_rule_fires(check, monkeypatch, caplog):
    monkeypatch.setenv("SODAOPS_ALERT_API_KEY", SECRET)
    good, bad = Process(), Process()
    bad.answers(5, status="500")
    texts = [process.metrics.render().decode() for process in (good, bad)]
    with Receiver(None) as receiver:
        code, out, err = check(receiver)
        assert code == 4 and states(out) == {"errors": "no value", "drift": "no value", "down": "firing"}
        assert receiver.url in err + caplog.text
        receiver.metrics = [texts[0]]
        code, out, _ = check(receiver)
        assert code == 0 and states(out) == {"errors": "no value", "drift": "no value", "down": "ok"}
        receiver.metrics = list(texts)
        code, out, err = check(receiver, "--wait=0.01")
        assert code == 4 and states(out)["errors"] == "firing" and err.startswith("AlarmError: errors")
        receiver.metrics = ["sodaops_drift_detected 0\n"]
        code, out, _ = check(receiver)
        assert code == 0 and states(out)["drift"] == "ok"
        assert set(receiver.keys) == {SECRET}


@pytest.mark.slow
def test_check_notifies_through_apprise(check, monkeypatch, tmp_path, caplog):
    with Receiver("sodaops_drift_detected 0\n") as receiver:
        url = f"json://{receiver.host}/{SECRET}"
        code, _, err = check(receiver, "--notify")
        assert code == 2 and err.startswith("ConfigError") and "SODAOPS_ALERT_URL_FILE" in err
        monkeypatch.setenv("SODAOPS_ALERT_URL", url)
        assert check(receiver, "--notify")[0] == 0 and receiver.messages == []
        receiver.metrics = ["sodaops_drift_detected 1\n"]
        assert check(receiver)[0] == 4 and receiver.messages == []  # without --notify nothing is sent
        outputs = [check(receiver, "--notify", "alerts.runbook_url=https://example.org/incidents/")]
        monkeypatch.delenv("SODAOPS_ALERT_URL")
        (tmp_path / "urls").write_text(f"{url}\n")
        monkeypatch.setenv("SODAOPS_ALERT_URL_FILE", str(tmp_path / "urls"))
        outputs.append(check(receiver, "--notify"))
        assert [code for code, _, _ in outputs] == [4, 4]
        assert [message["title"] for message in receiver.messages] == ["SoDaOps: drift"] * 2
        assert "drift is 1 (above 0.5) https://example.org/incidents/#drift" in receiver.messages[0]["message"]
        receiver.status = 500
        outputs.append(check(receiver, "--notify"))
        assert outputs[-1][0] == 2 and outputs[-1][2].startswith("DeliveryError")
    assert SECRET not in f"{outputs}{caplog.text}"


@pytest.mark.parametrize(("name", "value", "error"), [
    ("SODAOPS_ALERT_URL", f"nothing//{SECRET}", "ConfigError"),
    ("SODAOPS_ALERT_URL", f"json://[{SECRET}/", "ConfigError"),
    ("SODAOPS_ALERT_URL_FILE", "missing", "StorageError"),
])  # fmt: skip
def test_refused_notification_urls(check, monkeypatch, caplog, name, value, error):
    monkeypatch.setenv(name, value)
    with Receiver("sodaops_drift_detected 1\n") as receiver:
        code, out, err = check(receiver, "--notify")
    assert code == 2 and err.startswith(error) and name in err and SECRET not in f"{out}{err}{caplog.text}"


@pytest.mark.parametrize("arguments", [("check", "--quick"), ("watch",), ("test",), ()])
def test_unknown_options_and_actions(run, arguments):
    assert run("alerts", *arguments)[0] == 2
