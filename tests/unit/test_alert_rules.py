"""The files that `sodaops alerts render` writes, and that Prometheus computes what the rules say."""

import json
import re
import shutil
import subprocess

import promql_parser
import pytest
import yaml

from sodaops.alerting.alertmanager import alertmanager_config
from sodaops.alerting.dashboard import grafana_dashboards
from sodaops.alerting.render import google_policies, prometheus_rules, promql
from sodaops.serving.metrics import Metrics, ShadowMetrics
from tests.alerting import EMAIL, RULE, RULES, alerts_config
from tests.conftest import lazy

drift_app = lazy("sodaops.drift.app")
sdk_models = lazy("grafana_foundation_sdk.models.dashboard")
sdk_encoder = lazy("grafana_foundation_sdk.cog.encoder")
sdk_plugins = lazy("grafana_foundation_sdk.cog.plugins")

# Two predictors, scraped every 30 s, and what each of their counters grows by between two scrapes: earlier, and in the last
# ten minutes. One of them is restarted in the middle of the last window.
EARLIER, LATELY = "earlier", "lately"
GROWTH = {
    'sodaops_requests_total{method="POST",path="/predict",status="200"}': {EARLIER: 20, LATELY: 8},
    'sodaops_requests_total{method="POST",path="/v2/models/{name}/infer",status="500"}': {EARLIER: 0, LATELY: 2},
    'sodaops_requests_total{method="POST",path="/explain",status="500"}': {EARLIER: 5, LATELY: 5},
    'sodaops_request_seconds_bucket{path="/predict",le="0.1"}': {EARLIER: 20, LATELY: 9},
    'sodaops_request_seconds_bucket{path="/predict",le="0.5"}': {EARLIER: 20, LATELY: 9},
    'sodaops_request_seconds_bucket{path="/predict",le="1.0"}': {EARLIER: 20, LATELY: 10},
    'sodaops_request_seconds_bucket{path="/predict",le="+Inf"}': {EARLIER: 20, LATELY: 10},
    'sodaops_request_seconds_bucket{path="/explain",le="+Inf"}': {EARLIER: 9, LATELY: 9},
    "sodaops_confidence_sum": {EARLIER: 18, LATELY: 4},
    "sodaops_confidence_count": {EARLIER: 20, LATELY: 8},
    "sodaops_request_log_lost_total": {EARLIER: 0, LATELY: 1},
}
QUALITY = ("accuracy", "macro_f1")
EVERY_S, N_SCRAPES, N_LATELY = 30, 130, 20
RESTART = N_SCRAPES - 5
EXPECTED = {
    "drift": 1.0,
    "error_rate": 2 / 10,
    "latency_p99_s": 0.5 + 0.5 * (9.9 - 9) / (10 - 9),
    "mean_confidence": 0.5,
    "traffic": 10 / 20,
    "accuracy": 0.8,  # the lower one of two
    "macro_f1": 0.7,
    "log_lost": 2 * 9.0,  # ten scrapes in the window, so nine steps of two predictors
    "up": 1.0,
}


def counters(restarted):
    """Series -> its value at each scrape."""
    series_values = {}
    for series, growth in GROWTH.items():
        values, total = [], 100.0
        for scrape in range(N_SCRAPES):
            step = growth[LATELY if scrape >= N_SCRAPES - N_LATELY else EARLIER]
            total = step if restarted and scrape == RESTART else total + step
            values.append(total)
        series_values[series] = values
    return series_values


def rendered(**changes):
    (group,) = yaml.safe_load(prometheus_rules(alerts_config(**changes)))["groups"]
    return group


def test_every_rule_is_rendered_and_every_expression_parses():
    config = alerts_config()
    rules = {rule["alert"].removeprefix("sodaops_"): rule for rule in rendered()["rules"]}
    assert set(rules) == RULES
    for rule in rules.values():
        assert isinstance(promql_parser.parse(rule["expr"]), promql_parser.BinaryExpr)
    parsed = promql_parser.parse(rules["down"]["expr"])
    assert str(parsed.op) == "<" and parsed.rhs.val == config.rules["down"].threshold
    assert str(promql_parser.parse(rules["errors"]["expr"]).op) == "or"
    with pytest.raises(ValueError):
        promql_parser.parse("rate(sodaops_requests_total)")


def test_windows_thresholds_and_names_come_from_the_configuration():
    rule = {"signal": "traffic", "below": 0.25, "clear": 0.25, "for_s": 1.5, "severity": "page", "summary": "{{ 100 % }}"}
    group = rendered(rules={"mine": rule, "other": None}, window_s=90.0, traffic_offset_s=7200.0, traffic_min_requests=7)
    (found,) = group["rules"]
    assert group["interval"] == "30s"
    assert (found["alert"], found["for"], found["labels"]) == ("sodaops_mine", "1500ms", {"severity": "page"})
    assert found["expr"].count("[90s] offset 7200s") == 2 and found["expr"].endswith(">= 7)) < 0.25")
    assert found["annotations"]["summary"] == '{{"{{"}} 100 % }}'


def test_alerts_link_to_the_runbook():
    config = alerts_config(runbook_url="https://example.org/incidents/")
    assert "runbook_url: https://example.org/incidents/#errors" in prometheus_rules(config)
    policies = {policy["displayName"]: policy["documentation"]["content"] for policy in json.loads(google_policies(config))}
    assert "(https://example.org/incidents/#log_lost)" in policies["sodaops log_lost"]
    assert "runbook" not in prometheus_rules(alerts_config()) + google_policies(alerts_config())


def test_google_cloud_policies():
    (policy,) = json.loads(google_policies(alerts_config(rules={"mine": RULE, "other": None}, every_s=40.0)))
    query = policy["conditions"][0].pop("conditionPrometheusQueryLanguage")
    assert promql_parser.parse(query.pop("query"))
    assert query == {
        "duration": "120s",
        "evaluationInterval": "60s",  # a multiple of 30 s
        "labels": {"severity": "page"},
        "ruleGroup": "sodaops",
        "alertRule": "sodaops_mine",
        "disableMetricValidation": True,
    }
    assert policy == {
        "displayName": "sodaops mine",
        "documentation": {"content": "Bad.\n\nerror_rate was above 0.25 for 120 s.", "mimeType": "text/markdown"},
        "conditions": [{"displayName": "error_rate above 0.25"}],
        "combiner": "OR",
        "enabled": True,
        "severity": "CRITICAL",
        "notificationChannels": ["${NOTIFICATION_CHANNEL}"],
    }


def test_alertmanager_receivers_name_the_files_of_secrets():
    email = {**EMAIL, "username": "me", "password_file": "/run/password"}
    config = yaml.safe_load(alertmanager_config(alerts_config(webhook_url_file="/run/url", email=email, cooldown_s=60.0)))
    (receiver,) = config["receivers"]
    (slack,), (mail,) = receiver["slack_configs"], receiver["email_configs"]
    assert slack["api_url_file"] == "/run/url" and slack["send_resolved"]
    assert mail == {
        "to": "c@d, e@f", "from": "a@b", "smarthost": "h:25", "require_tls": True, "send_resolved": True,
        "auth_username": "me", "auth_password_file": "/run/password",
    }  # fmt: skip
    assert config["route"]["receiver"] == receiver["name"] and config["route"]["repeat_interval"] == "60s"
    without_login = yaml.safe_load(alertmanager_config(alerts_config(email=EMAIL)))["receivers"][0]["email_configs"][0]
    assert not any(key.startswith("auth") for key in without_login)
    assert yaml.safe_load(alertmanager_config(alerts_config()))["receivers"] == [{"name": "sodaops"}]


def test_the_dashboards_and_the_rules_use_metrics_that_the_services_have():
    registries = Metrics().registry, drift_app.DriftMetrics().registry
    ShadowMetrics(registries[0])
    families = [family for registry in registries for family in registry.collect()]
    exposed = {name for registry in registries for name in registry._names_to_collectors}
    exposed |= {sample.name for family in families for sample in family.samples}  # those of the process
    dashboards = [json.loads(text) for text in grafana_dashboards(alerts_config()).values()]
    assert len({dashboard["uid"] for dashboard in dashboards}) == 3
    panels = [panel for dashboard in dashboards for panel in dashboard["panels"]]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    used = set()
    for expression in expressions + [promql(rule.signal, alerts_config()) for rule in alerts_config().rules.values()]:
        assert promql_parser.parse(expression.replace("$__rate_interval", "5m"))
        used |= set(re.findall(r"\b(?:sodaops|process)_\w+", expression))
    assert used - exposed == set()
    names = {family.name for family in families if family.name.startswith("sodaops_")}
    unused = {name for name in names if not any(expression.startswith(name) for expression in used)}
    assert unused == set(), "metrics without a panel"
    for panels in (dashboard["panels"] for dashboard in dashboards):
        assert len({panel["id"] for panel in panels}) == len({str(panel["gridPos"]) for panel in panels}) == len(panels) > 3


def dropped(written, read):
    """The keys of a document that another one lacks, or has with another value."""
    if isinstance(written, dict):
        inner = [key for name in written.keys() & read for key in dropped(written[name], read[name])]
        return [key for key in written if key not in read] + inner
    if isinstance(written, list):
        return [key for pair in zip(written, read, strict=True) for key in dropped(*pair)]
    return [] if written == read else [written]


def test_grafana_knows_every_key_of_the_dashboards():
    """Read by the types that Grafana generates from its schema, which keep only the keys that the schema has."""
    sdk_plugins.register_default_plugins()
    for text in grafana_dashboards(alerts_config()).values():
        dashboard = json.loads(text)
        assert dropped(dashboard, json.loads(sdk_encoder.JSONEncoder().encode(sdk_models.Dashboard.from_json(dashboard)))) == []


def test_render_writes_its_files(run, tmp_path):
    code, out, _ = run("alerts", "render", "--output=rules", "alerts.rules.down=null", "alerts.webhook_url_file=/run/url")
    dashboards = {f"grafana-{name}.json" for name in ("service", "drift", "quality")}
    names = {"prometheus-rules.yaml", "alertmanager.yaml", "gcp-alert-policies.json"} | dashboards
    assert code == 0 and {path.name for path in (tmp_path / "rules").iterdir()} == names
    assert set(out.split()) == {f"rules/{name}" for name in names}
    assert "sodaops_down" not in (tmp_path / "rules/prometheus-rules.yaml").read_text()


needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


def promtool(folder, config, case):
    """Runs a unit test of the rendered rules."""
    (folder / "rules.yaml").write_text(prometheus_rules(config))
    (folder / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "30s", "tests": [case]})
    )
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_computes_the_signals(tmp_path):
    config = alerts_config(traffic_offset_s=3000.0)
    inputs = [{"series": 'up{job="sodaops-predictor"}', "values": f"1x{N_SCRAPES}"}]
    for n, series in enumerate([counters(False), counters(True)]):
        quality = {
            f'sodaops_quality{{metric="{name}",bound="high"}}': [EXPECTED[name] + n / 10] for name in ("accuracy", "macro_f1")
        }
        gauges = {"sodaops_drift_detected": [1.0], **quality}
        for name, values in {**series, **{name: value * N_SCRAPES for name, value in gauges.items()}}.items():
            bare, _, labels = name.rstrip("}").partition("{")
            label = f'{labels},instance="{n}"'.lstrip(",")
            inputs.append({"series": f"{bare}{{{label}}}", "values": " ".join(f"{value:g}" for value in values)})
    checks = []
    for signal, expected in EXPECTED.items():
        # increase() extrapolates to the borders of the window: from nine steps of 30 s to 300 s.
        expected = expected * 300 / 270 if signal == "log_lost" else expected
        same = f"abs(({promql(signal, config)}) - {expected}) < bool 0.000001"
        checks.append(
            {"expr": same, "eval_time": f"{EVERY_S * (N_SCRAPES - 1)}s", "exp_samples": [{"labels": "{}", "value": 1}]}
        )
    case = {"interval": f"{EVERY_S}s", "input_series": inputs, "promql_expr_test": checks}
    promtool(tmp_path, config, case)


@needs_promtool
def test_a_firing_alert_recovers_at_clear(tmp_path):
    rule = {"signal": "drift", "above": 0.5, "clear": 0.2, "for_s": 30.0, "severity": "page", "summary": "s"}
    values = [0.6, 0.3, 0.6, 0.6, 0.3, 0.2, 0.3, 0.6, 0.6]  # the first 0.6 does not last for for_s
    firing = [False, False, False, True, True, False, False, False, True]
    alert = {"exp_labels": {"severity": "page"}}
    checks = [
        {"eval_time": f"{30 * n}s", "alertname": "sodaops_mine", "exp_alerts": [{
            **alert, "exp_annotations": {"summary": "s", "description": f"drift is {value} (above 0.5)"},
        }] if fires else []}
        for n, (value, fires) in enumerate(zip(values, firing, strict=True))
    ]  # fmt: skip
    inputs = [{"series": "sodaops_drift_detected", "values": " ".join(map(str, values))}]
    config = alerts_config(rules={**dict.fromkeys(RULES), "mine": rule})
    promtool(tmp_path, config, {"interval": "30s", "input_series": inputs, "alert_rule_test": checks})
