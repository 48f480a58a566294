"""The rules as Prometheus and Google Cloud have them, and that both mean what the watch computes."""

import json
import math
import shutil
import subprocess

import promql_parser
import pytest
import yaml

from sodaops.alerting import render as rules_as
from sodaops.alerting.signals import Target, Windows, parse, quantile, signals
from tests.unit.test_alerts import RULES, built

# Two predictors, looked at every 30 s, and what each of their counters grows by between two looks: before, and in the last
# ten minutes. One of them is restarted in the middle of the last window.
BEFORE, NOW = "before", "now"
GROWTH = {
    'sodaops_requests_total{method="POST",path="/predict",status="200"}': {BEFORE: 20, NOW: 8},
    'sodaops_requests_total{method="POST",path="/predict/batch",status="500"}': {BEFORE: 0, NOW: 2},
    'sodaops_requests_total{method="POST",path="/explain",status="500"}': {BEFORE: 5, NOW: 5},
    'sodaops_request_seconds_bucket{path="/predict",le="0.1"}': {BEFORE: 20, NOW: 9},
    'sodaops_request_seconds_bucket{path="/predict",le="0.5"}': {BEFORE: 20, NOW: 9},
    'sodaops_request_seconds_bucket{path="/predict",le="1.0"}': {BEFORE: 20, NOW: 10},
    'sodaops_request_seconds_bucket{path="/predict",le="+Inf"}': {BEFORE: 20, NOW: 10},
    'sodaops_request_seconds_bucket{path="/explain",le="+Inf"}': {BEFORE: 9, NOW: 9},
    "sodaops_confidence_sum": {BEFORE: 18, NOW: 4},
    "sodaops_confidence_count": {BEFORE: 20, NOW: 8},
    "sodaops_request_log_lost_total": {BEFORE: 0, NOW: 1},
}
EVERY_S, N_LOOKS, N_NOW = 30, 130, 20
RESTART = N_LOOKS - 5
EXPECTED = {
    "drift": 1.0,
    "error_rate": 2 / 10,
    "latency_p99_s": 0.5 + 0.5 * (9.9 - 9) / (10 - 9),
    "mean_confidence": 0.5,
    "traffic": 10 / 20,
    "log_lost": 2 * 9.0,  # ten looks in the window, so nine steps of two predictors
    "up": 1.0,
}
WINDOWS = Windows(300.0, 3000.0, 50)


def counters(restarted):
    """Series -> its value at each look."""
    found = {}
    for series, growth in GROWTH.items():
        values, total = [], 100.0
        for look in range(N_LOOKS):
            step = growth[NOW if look >= N_LOOKS - N_NOW else BEFORE]
            total = step if restarted and look == RESTART else total + step
            values.append(total)
        found[series] = values
    return found


def exposition(series, look):
    return "\n".join(f"{name} {values[look]:g}" for name, values in series.items()) + "\nsodaops_drift_detected 1\n"


def test_the_numbers_are_those_of_the_definition():
    processes, targets = [counters(False), counters(True)], [Target(), Target()]
    for look in range(N_LOOKS):
        scrapes = [parse(exposition(series, look)) for series in processes]
        for target, scrape in zip(targets, scrapes, strict=True):
            target.add(scrape, EVERY_S * look, WINDOWS.window_s)
    assert signals(targets, scrapes, EVERY_S * look, WINDOWS) == pytest.approx(EXPECTED, rel=1e-12)


@pytest.mark.parametrize(
    ("q", "buckets", "expected"),
    [
        (0.5, {1.0: 10, 2.0: 20, math.inf: 20}, 1.0),
        (0.75, {1.0: 10, 2.0: 20, math.inf: 20}, 1.5),
        (0.99, {1.0: 10, 2.0: 10, math.inf: 100}, 2.0),  # past the last finite bound: that bound
        (0.25, {4.0: 10, math.inf: 10}, 1.0),  # the first bucket begins at 0
        (0.9, {1.0: 5, 2.0: 5, 4.0: 10, math.inf: 10}, 3.6),  # an empty bucket in between
        (0.5, {1.0: 0, math.inf: 0}, None),
        (0.5, {math.inf: 3}, None),
        (0.5, {1.0: 3, 2.0: 3}, None),
        (0.5, {}, None),
    ],
)
def test_quantile(q, buckets, expected):
    assert quantile(q, buckets) == (pytest.approx(expected) if expected is not None else None)


def rendered(**changes):
    return yaml.safe_load(rules_as.prometheus(built(**changes)))["groups"][0]


def test_every_expression_parses_and_every_rule_is_there():
    config = built()
    found = rendered()
    assert {rule["alert"] for rule in found["rules"]} == {f"sodaops_{name}" for name in RULES}
    for rule in found["rules"]:
        assert isinstance(promql_parser.parse(rule["expr"]), promql_parser.BinaryExpr)
    for name in ("errors", "down"):
        (rule,) = (rule for rule in found["rules"] if rule["alert"] == f"sodaops_{name}")
        parsed = promql_parser.parse(rule["expr"])
        assert str(parsed.op) == ("<" if name == "down" else ">") and parsed.rhs.val == config.rules[name].threshold
    with pytest.raises(ValueError):
        promql_parser.parse("rate(sodaops_requests_total)")


def test_windows_thresholds_and_names_come_from_the_configuration():
    rule = {"signal": "traffic", "below": 0.25, "clear": 0.25, "for_s": 1.5, "severity": "page", "summary": "{{ 100 % }}"}
    group = rendered(rules={"mine": rule, "other": None}, window_s=90.0, traffic_offset_s=7200.0, traffic_min_requests=7)
    (found,) = group["rules"]
    assert group["interval"] == "30s"
    assert (found["alert"], found["for"], found["labels"]) == ("sodaops_mine", "1500ms", {"severity": "page"})
    assert "keep_firing_for" not in found  # no hysteresis to stand for
    assert found["expr"].count("[90s] offset 7200s") == 2 and found["expr"].endswith(">= 7)) < 0.25")
    assert found["annotations"]["summary"] == '{{"{{"}} 100 % }}'
    (kept,) = rendered(rules={"mine": {**rule, "clear": 0.5}}, window_s=90.0)["rules"]
    assert kept["keep_firing_for"] == "90s"


def test_every_message_links_to_what_to_do_once_that_is_published():
    config = built(runbook_url="https://example.org/incidents/")
    (errors,) = (
        rule for rule in yaml.safe_load(rules_as.prometheus(config))["groups"][0]["rules"] if "errors" in rule["alert"]
    )
    assert errors["annotations"]["runbook_url"] == "https://example.org/incidents/#errors"
    policies = {policy["displayName"]: policy["documentation"]["content"] for policy in json.loads(rules_as.google(config))}
    assert "(https://example.org/incidents/#log_lost)" in policies["sodaops log_lost"]
    assert "runbook" not in rules_as.prometheus(built())


def test_google_clouds_policies():
    rule = {"signal": "error_rate", "above": 0.25, "clear": 0.25, "for_s": 120.0, "severity": "page", "summary": "Bad."}
    (found,) = json.loads(rules_as.google(built(rules={"mine": rule, "other": None}, every_s=40.0)))
    query = found["conditions"][0].pop("conditionPrometheusQueryLanguage")
    assert promql_parser.parse(query.pop("query"))
    assert query == {
        "duration": "120s",
        "evaluationInterval": "60s",  # a multiple of 30 s
        "labels": {"severity": "page"},
        "ruleGroup": "sodaops",
        "alertRule": "sodaops_mine",
        "disableMetricValidation": True,
    }
    assert found == {
        "displayName": "sodaops mine",
        "documentation": {"content": "Bad.\n\nerror_rate was above 0.25 for 120 s.", "mimeType": "text/markdown"},
        "conditions": [{"displayName": "error_rate above 0.25"}],
        "combiner": "OR",
        "enabled": True,
        "severity": "CRITICAL",
        "notificationChannels": ["${NOTIFICATION_CHANNEL}"],
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_itself_takes_the_rules_and_computes_the_same(tmp_path):
    config = built(traffic_offset_s=3000.0)
    (tmp_path / "rules.yaml").write_text(rules_as.prometheus(config))
    subprocess.run(["promtool", "check", "rules", "rules.yaml"], cwd=tmp_path, check=True)
    inputs = [{"series": 'up{job="sodaops-predictor"}', "values": f"1x{N_LOOKS}"}]
    for n, series in enumerate([counters(False), counters(True)]):
        for name, values in {**series, "sodaops_drift_detected": [1.0] * N_LOOKS}.items():
            bare, _, labels = name.rstrip("}").partition("{")
            label = f'{labels},instance="{n}"'.lstrip(",")
            inputs.append({"series": f"{bare}{{{label}}}", "values": " ".join(f"{value:g}" for value in values)})
    checks = []
    for signal, expected in EXPECTED.items():
        # increase() is drawn out to the window's borders: of ten points, nine steps of 30 s, it makes 300 s.
        expected = expected * 300 / 270 if signal == "log_lost" else expected
        same = f"abs(({rules_as.promql(signal, config)}) - {expected}) < bool 0.000001"
        checks.append({"expr": same, "eval_time": f"{EVERY_S * (N_LOOKS - 1)}s", "exp_samples": [{"labels": "{}", "value": 1}]})
    case = {"interval": f"{EVERY_S}s", "input_series": inputs, "promql_expr_test": checks}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [case]}))
    done = subprocess.run(["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
