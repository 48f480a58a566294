"""Rules over signals: what fires and what recovers, by a clock that is passed in."""

import asyncio
import copy
import functools
import json

import pytest
from prometheus_client import CollectorRegistry

from sodaops.alerting.alerts import Alerts
from sodaops.alerting.signals import Scrape, parse
from sodaops.config.validation import build
from sodaops.errors import ConfigError, DeliveryError, StorageError
from sodaops.serving.metrics import Metrics
from tests.conftest import configured

A, B = "http://a/metrics", "http://b/metrics"
RULES = {"drift", "errors", "latency", "confidence", "traffic", "log_lost", "down"}


@functools.cache
def composed():
    return configured().model_dump()


def built(**changes):
    """The alerts of a tree in which some keys have other values: ``rules__drift__for_s=60.0``."""
    found = copy.deepcopy(composed())
    for key, value in changes.items():
        *section, name = key.split("__")
        functools.reduce(dict.__getitem__, section, found["alerts"])[name] = value
    return build(found).alerts


def config(folder, keep=(), **changes):
    changes |= {f"rules__{name}": None for name in RULES - set(keep)}
    return built(state_dir=str(folder), metrics_urls=[A, B], **changes)


def alerts(folder, registry=None, **changes):
    return Alerts(config(folder, **changes), {}, registry or CollectorRegistry())


def drift(value):
    return {A: Scrape({}, drift=value), B: Scrape({})}


def kinds(notifications):
    return [(one.rule, one.kind) for one in notifications]


class Process:
    """A predictor's own counters, read as the watch reads them."""

    def __init__(self):
        self.metrics = Metrics()

    def answers(self, n, status="200", path="/predict", seconds=0.003, confidence=0.9):
        for _ in range(n):
            self.metrics.answered("POST", path, status).inc()
            self.metrics.seconds_of(path).observe(seconds)
            if status == "200":
                self.metrics.confidence.observe(confidence)

    def scrape(self):
        return parse(self.metrics.render().decode())


def test_a_message_says_where_to_read_what_to_do(tmp_path):
    (fired,) = alerts(tmp_path, keep=["drift"], runbook_url="https://example.org/incidents/").step(drift(1.0), 0)
    assert fired.body.endswith("\nWhat to do: https://example.org/incidents/#drift")


def test_fires_at_once_without_for_s_and_recovers_once(tmp_path):
    registry = CollectorRegistry()
    watched = alerts(tmp_path, keep=["drift"], registry=registry)
    assert watched.step(drift(0.0), 0) == []
    (fired,) = watched.step(drift(1.0), 30)
    assert (fired.rule, fired.kind, fired.value, fired.limit, fired.severity) == ("drift", "firing", 1.0, "above 0.5", "ticket")
    assert registry.get_sample_value("sodaops_alert_firing", {"rule": "drift"}) == 1
    assert "What to do" not in fired.body
    assert watched.step(drift(1.0), 60) == []
    assert kinds(watched.step(drift(0.0), 90)) == [("drift", "recovered")]
    assert watched.step(drift(0.0), 120) == []
    assert registry.get_sample_value("sodaops_alert_firing", {"rule": "drift"}) == 0


def test_pending_for_for_s_and_back_when_it_ends_before(tmp_path):
    watched = alerts(tmp_path, rules__drift__for_s=60, keep=["drift"])
    assert watched.step(drift(1.0), 0) == [] and watched.states["drift"].state == "pending"
    assert watched.step(drift(0.0), 30) == [] and watched.states["drift"].state == "ok"
    assert watched.step(drift(1.0), 60) == []
    assert watched.step(drift(1.0), 119) == []
    (fired,) = watched.step(drift(1.0), 120)
    assert (fired.since, fired.at) == (60, 120)


def test_hysteresis(tmp_path):
    watched = alerts(tmp_path, rules__drift__clear=0.2, keep=["drift"])
    found = [kinds(watched.step(drift(value), 30 * n)) for n, value in enumerate([0.5, 0.51, 0.3, 0.5, 0.21, 0.2, 0.3, 0.5])]
    assert found == [[], [("drift", "firing")], [], [], [], [("drift", "recovered")], [], []]


def test_hysteresis_of_a_rule_with_below(tmp_path):
    watched = alerts(tmp_path, rules__confidence__for_s=0, keep=["confidence"])
    process = Process()
    found = []
    for n, confidence in enumerate([0.9, 0.9, 0.5, 0.6, 0.64, 0.66]):
        process.answers(10, confidence=confidence)
        found.append(kinds(watched.step({A: process.scrape(), B: Scrape({})}, 400 * n + 0)))
        process.answers(10, confidence=confidence)
        found[-1] += kinds(watched.step({A: process.scrape(), B: Scrape({})}, 400 * n + 30))
    assert found == [[], [], [("confidence", "firing")], [], [], [("confidence", "recovered")]]


def test_cooldown(tmp_path):
    watched = alerts(tmp_path, cooldown_s=100.0, keep=["drift"])
    seen = {now: kinds(watched.step(drift(value), now)) for now, value in [(0, 1), (50, 1), (99, 1), (100, 1), (150, 1)]}
    assert seen == {0: [("drift", "firing")], 50: [], 99: [], 100: [("drift", "firing")], 150: []}
    # It recovers, and comes again before the cooldown is over: neither that nor its end is told, until the cooldown is over.
    assert kinds(watched.step(drift(0), 160)) == [("drift", "recovered")]
    assert watched.step(drift(1), 170) == [] and watched.states["drift"].state == "firing"
    assert watched.step(drift(0), 180) == []
    assert watched.step(drift(1), 190) == []
    assert kinds(watched.step(drift(1), 200)) == [("drift", "firing")]
    assert kinds(watched.step(drift(0), 210)) == [("drift", "recovered")]


def test_a_missing_signal_changes_nothing_and_a_dead_target_is_down(tmp_path):
    watched = alerts(tmp_path, rules__drift__for_s=60, keep=["drift", "down"])
    watched.step(drift(1.0), 0)
    dead = {A: None, B: Scrape({})}
    assert watched.step(dead, 30) == []
    assert {name: state.state for name, state in watched.states.items()} == {"drift": "pending", "down": "pending"}
    assert kinds(watched.step(drift(1.0), 60)) == [("drift", "firing")]
    assert watched.step({}, 90) == [] and watched.states["drift"].state == "firing"
    assert kinds(watched.step({}, 150)) == [("down", "firing")]
    assert kinds(watched.step(drift(1.0), 180)) == [("down", "recovered")]


def test_what_nobody_saw_for_a_window_did_not_hold(tmp_path):
    watched = alerts(tmp_path, rules__drift__for_s=60, keep=["drift"])
    watched.step(drift(1.0), 0)
    assert watched.step(drift(1.0), 301) == [] and watched.states["drift"].since == 301
    assert kinds(watched.step(drift(1.0), 361)) == [("drift", "firing")]


def test_a_clock_that_is_set_back(tmp_path):
    watched = alerts(tmp_path, rules__drift__for_s=60, cooldown_s=100.0, keep=["drift", "errors"])
    process = Process()
    for now in (10_000, 10_030, 5_000, 5_030):
        process.answers(10)
        assert watched.step({A: process.scrape(), B: Scrape({}, drift=1.0)}, now) == []
    assert watched.values["error_rate"] == 0
    assert kinds(watched.step(drift(1.0), 5_060)) == [("drift", "firing")]
    assert watched.step(drift(1.0), 4_000) == []
    assert kinds(watched.step(drift(1.0), 4_100)) == [("drift", "firing")]


def test_a_restart_neither_fires_again_nor_forgets(tmp_path):
    async def saved(watched, values):
        for now, value in values:
            watched._outbox.add(watched.step(drift(value), now))
        await watched.save()

    first = alerts(tmp_path, rules__drift__for_s=60, keep=["drift"])
    asyncio.run(saved(first, [(0, 1.0)]))
    second = alerts(tmp_path, rules__drift__for_s=60, keep=["drift"])
    second.load()
    assert kinds(second.step(drift(1.0), 60)) == [("drift", "firing")]
    asyncio.run(saved(second, []))
    third = alerts(tmp_path, rules__drift__for_s=60, keep=["drift"])
    third.load()
    assert third.step(drift(1.0), 90) == []
    assert kinds(third.step(drift(0.0), 120)) == [("drift", "recovered")]


def test_rules_that_are_gone_are_forgotten(tmp_path):
    first = alerts(tmp_path, keep=["drift"])
    first.step(drift(1.0), 0)
    asyncio.run(first.save())
    second = alerts(tmp_path, keep=["down"])
    second.load()
    assert set(second.states) == {"down"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged .JSONDecodeError.; move it away"),
        ("[]", "damaged"),
        ('{"format": 9}', "format 9 of another version; expected 1"),
        ('{"format": 1, "rules": {"drift": {"stat": 1}}}', "damaged .TypeError."),
        ('{"format": 1, "outbox": {"webhook": [{}]}}', "damaged .TypeError."),
    ],
)
def test_a_damaged_state_is_an_error(tmp_path, text, message):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(StorageError, match=message):
        alerts(tmp_path, keep=["drift"]).load()


def test_two_watches_do_not_share_a_folder(tmp_path):
    with (
        alerts(tmp_path)._alone(),
        pytest.raises(StorageError, match="another process watches with it"),
        alerts(tmp_path)._alone(),
    ):
        pass
    with alerts(tmp_path)._alone():
        pass


def test_counters_that_begin_anew_and_several_processes(tmp_path):
    watched = alerts(tmp_path)
    one, two = Process(), Process()
    for now in (0, 30):
        one.answers(60)
        two.answers(30, path="/predict/batch")
        watched.step({A: one.scrape(), B: two.scrape()}, now)
    assert watched.values["error_rate"] == 0
    one = Process()  # the process was restarted, and has answered 30 since, 15 of them badly
    one.answers(15)
    one.answers(15, status="503")
    one.answers(500, status="500", path="/explain")  # not of /predict
    watched.step({A: one.scrape(), B: two.scrape()}, 60)
    # In a minute: 60 + 30 of the one, of which 15 bad; 30 of the other.
    assert watched.values["error_rate"] == pytest.approx(15 / 120)
    assert watched.values["up"] == 1


def test_a_restart_while_nobody_looks_makes_no_jump(tmp_path):
    watched = alerts(tmp_path)
    process = Process()
    process.answers(1000, status="500")
    watched.step({A: process.scrape()}, 0)
    watched.step({A: None}, 30)
    process.answers(1000, status="500")
    watched.step({A: process.scrape()}, 400)  # longer than the window
    process.answers(10)
    watched.step({A: process.scrape()}, 430)
    assert watched.values["error_rate"] == 0


def test_traffic_needs_history_and_enough_of_it(tmp_path):
    watched = alerts(tmp_path, traffic_offset_s=600.0)
    process = Process()
    for n in range(31):
        process.answers(10 if n <= 20 else 4)
        watched.step({A: process.scrape()}, 30 * n)
        assert ("traffic" in watched.values) == (30 * n - 600 >= 30 * 5)  # 50 requests then: five intervals of 10
    assert watched.values["traffic"] == pytest.approx(0.4)
    few = alerts(tmp_path, traffic_offset_s=600.0, traffic_min_requests=1000)
    for n in range(31):
        process.answers(10)
        few.step({A: process.scrape()}, 30 * n)
    assert "traffic" not in few.values


def test_history_outlives_a_restart_and_does_not_grow(tmp_path, monkeypatch):
    process = Process()
    first = alerts(tmp_path, traffic_offset_s=600.0)
    clock = iter(range(0, 10**6, 30))

    async def scrape():
        process.answers(10)
        return {A: process.scrape(), B: None}

    def rounds(watched, n):
        monkeypatch.setattr(watched, "scrape", scrape)
        monkeypatch.setattr("sodaops.alerting.alerts.time.time", lambda: next(clock))
        for _ in range(n):
            asyncio.run(watched._round())

    rounds(first, 30)
    second = alerts(tmp_path, traffic_offset_s=600.0)
    second.load()
    rounds(second, 1)
    assert second.values["traffic"] == pytest.approx(1.0)
    rounds(second, 60)
    points = json.loads((tmp_path / "history.json").read_text())["targets"][A]["points"]
    assert len(points) <= 1 + 900 // 30 + 1


def test_log_lost_counts_the_first_loss(tmp_path):
    watched = alerts(tmp_path, keep=["log_lost"])
    process = Process()
    assert watched.step({A: process.scrape()}, 0) == [] and "log_lost" not in watched.values
    process.metrics.journal.lost.inc(3)
    assert kinds(watched.step({A: process.scrape()}, 30)) == [("log_lost", "firing")]
    assert watched.values["log_lost"] == 3


@pytest.mark.parametrize(
    "text", ["<html><body>Not here</body></html>", "", "node_load1 0.3\n", "sodaops_requests_total{", "\x00", "sodaops_x one"]
)
def test_what_is_no_metrics_of_ours_is_no_answer(text):
    with pytest.raises(DeliveryError, match="text format|no metric of sodaops"):
        parse(text)


def test_not_a_number_is_no_value():
    assert parse("sodaops_drift_detected NaN\n") == Scrape({}, None)
    assert parse('sodaops_drift_detected{a="1"} 0\nsodaops_drift_detected{a="2"} 1\n').drift == 1


GOOD = {"signal": "error_rate", "above": 0.1, "clear": 0.1, "for_s": 0.0, "severity": "page", "summary": "s"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"abov": 1}, r"alerts.rules.mine=.*abov is not a key \(did you mean above\?\); a rule has: signal, above, below"),
        ({"signal": "eror_rate"}, r"alerts.rules.mine.signal='eror_rate': expected 'drift'.*did you mean error_rate\?"),
        ({"below": 0.1}, "alerts.rules.mine.below=0.1: expected one of above and below, and not both"),
        ({"above": None}, "alerts.rules.mine.below=None: expected one of above and below"),
        ({"clear": 0.2}, "alerts.rules.mine.clear=0.2: expected at most above=0.1, where the rule fires"),
        ({"above": None, "below": 0.1, "clear": 0.05}, "alerts.rules.mine.clear=0.05: expected at least below=0.1"),
        ({"above": 2}, "alerts.rules.mine.above=2: expected 0 or more and less than 1, since error_rate is never elsewhere"),
        ({"above": -0.1, "clear": -1}, "alerts.rules.mine.above=-0.1: expected 0 or more"),
        ({"above": None, "below": 0, "clear": 1}, "alerts.rules.mine.below=0: expected more than 0 and at most 1"),
        (
            {"signal": "traffic", "above": None, "below": 0, "clear": 1},
            "alerts.rules.mine.below=0: expected more than 0, since",
        ),
        ({"above": float("nan")}, "alerts.rules.mine.above=nan: expected a finite number"),
        ({"above": "0.1"}, "alerts.rules.mine.above='0.1': expected a valid number"),
        ({"for_s": -1}, "alerts.rules.mine.for_s=-1: expected greater than or equal to 0"),
        ({"severity": "pag"}, r"alerts.rules.mine.severity='pag': expected 'page' or 'ticket' \(did you mean page\?\)"),
        ({"summary": None}, "alerts.rules.mine.summary=None"),
    ],
)
def test_faults_of_a_rule(changes, message):
    with pytest.raises(ConfigError, match=message):
        built(rules={"mine": {**GOOD, **changes}})


EMAIL = {"host": "h", "port": 25, "sender": "a@b", "recipients": ["c@d"], "starttls": True}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rules", {"Bad Name": None}, "alerts.rules.Bad Name"),
        ("rules", {"mine": 3}, "alerts.rules.mine=3"),
        ("metrics_urls", [], "alerts.metrics_urls=.*at least 1 item"),
        ("metrics_urls", ["localhost:8000"], "alerts.metrics_urls.0='localhost:8000': string should match"),
        ("metrics_urls", ["http://me:secret@h/metrics"], "alerts.metrics_urls.0="),
        ("every_s", 0, "alerts.every_s=0: expected greater than or equal to 1"),
        ("window_s", 30, "alerts.window_s=30: expected at least twice every_s=30"),
        ("traffic_offset_s", 30, "alerts.traffic_offset_s=30: expected at least window_s=300"),
        ("traffic_min_requests", 0, "alerts.traffic_min_requests=0"),
        ("cooldown_s", 0, "alerts.cooldown_s=0"),
        ("max_outbox", 0, "alerts.max_outbox=0"),
        ("max_retry_s", 0, "alerts.max_retry_s=0"),
        ("webhook", "x", r"alerts.webhook is not a key \(did you mean webhook_url\?\)"),
        ("email", {**EMAIL, "recipients": []}, "alerts.email.recipients=.*at least 1 item"),
        ("email", {**EMAIL, "port": 0}, "alerts.email.port=0"),
        ("email", {**EMAIL, "password": "x"}, "alerts.email.password is not a key"),
    ],
)
def test_faults_of_the_section(key, value, message):
    with pytest.raises(ConfigError, match=message):
        built(**{key: value})


def test_a_null_rule_is_out_of_force_and_a_good_one_in_it(tmp_path):
    found = built(rules={"mine": GOOD, "other": None}, state_dir=str(tmp_path), email=EMAIL)
    assert set(Alerts(found, {}, CollectorRegistry()).states) == {"mine"}


def test_the_default_rules_are_those_of_this_test():
    assert set(configured().alerts.rules) == RULES


SECRET = "T0KEN-hunter2"
MAIL = {**EMAIL, "starttls": False}


@pytest.mark.parametrize(
    ("changes", "environ", "message"),
    [
        ({}, {"SODAOPS_ALERT_WEBHOOK": f"hooks.example/{SECRET}"}, "SODAOPS_ALERT_WEBHOOK: expected a URL"),
        ({}, {"SODAOPS_ALERT_WEBHOOK": f"https://h/a b{SECRET}"}, "SODAOPS_ALERT_WEBHOOK: expected a URL"),
        ({}, {"SODAOPS_ALERT_WEBHOOK": f"https://me:{SECRET}@h/"}, "SODAOPS_ALERT_WEBHOOK: .*without a user"),
        ({}, {"SODAOPS_ALERT_WEBHOOK": f"https://h:{SECRET}/"}, "SODAOPS_ALERT_WEBHOOK: expected a URL"),
        ({}, {"SODAOPS_ALERT_WEBHOOK": f"https://[{SECRET}/"}, "SODAOPS_ALERT_WEBHOOK: expected a URL"),
        ({"webhook_url": f"ftp://h/{SECRET}"}, {}, "alerts.webhook_url: expected a URL"),
        ({"email": MAIL}, {"SODAOPS_SMTP_PASSWORD": SECRET}, "SODAOPS_SMTP_USER and SODAOPS_SMTP_PASSWORD: give both"),
        ({"email": MAIL}, {"SODAOPS_SMTP_USER": "me", "SODAOPS_SMTP_PASSWORD": SECRET}, "starttls=False: .* in clear"),
        ({"email": {**MAIL, "sender": "nobody"}}, {}, "'nobody' is no address"),
    ],
)
def test_faults_of_sinks_do_not_show_the_secret(tmp_path, changes, environ, message):
    found = config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        Alerts(found, environ, CollectorRegistry())
    assert SECRET not in str(caught.value) and SECRET not in repr(found) and SECRET not in found.model_dump_json()
