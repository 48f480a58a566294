"""A Grafana dashboard of the metrics of the predictor and the drift service."""

import json
from typing import Any

from sodaops.alerting.render import promql
from sodaops.config.alerts import AlertRule, AlertsConfig

DASHBOARD = "grafana-dashboard.json"
_RATE = "[$__rate_interval]"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _HEIGHT, _GRID_WIDTH = 3, 7, 24

# Title, unit, and expression by legend. Panels of a signal are added from the rules.
_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Requests", "reqps", {"{{path}} {{status}}": f"sum by (path, status) (rate(sodaops_requests_total{_RATE}))"}),
    ("Requests in flight", "short", {"{{job}}": "sum by (job) (sodaops_requests_in_flight)"}),
    ("Refused requests", "reqps", {"refused": f"sum(rate(sodaops_refused_total{_RATE}))"}),
    (
        "Latency",
        "s",
        {
            f"p{percentile}": f"histogram_quantile(0.{percentile}, sum by (le) (rate(sodaops_request_seconds_bucket{_RATE})))"
            for percentile in (50, 90, 99)
        },
    ),
    ("Texts waiting", "short", {"waiting": "sum(sodaops_queue_texts)"}),
    (
        "Texts per batch",
        "short",
        {"mean": f"sum(rate(sodaops_batch_texts_sum{_RATE})) / sum(rate(sodaops_batch_texts_count{_RATE}))"},
    ),
    ("Predictions by label", "reqps", {"{{label}}": f"sum by (label) (rate(sodaops_predictions_total{_RATE}))"}),
    ("Feedback by label", "reqps", {"{{label}}": f"sum by (label) (rate(sodaops_feedback_total{_RATE}))"}),
    ("Bundle", "short", {"{{bundle_id}} {{variant}}": "sum by (bundle_id, variant) (sodaops_bundle_info)"}),
    ("Bundle loads", "short", {"{{outcome}}": "sum by (outcome) (sodaops_bundle_loads_total)"}),
    ("Request log: rows", "rps", {"logged": f"sum(rate(sodaops_request_log_rows_total{_RATE}))"}),
    ("Request log: journal", "bytes", {"not in a part yet": "sum(sodaops_request_log_journal_bytes)"}),
    ("Request log: parts", "short", {"{{outcome}}": "sum by (outcome) (sodaops_request_log_parts_total)"}),
    ("Drift: p-values", "short", {"{{feature}}": "min by (feature) (sodaops_drift_p_value)"}),
    ("Drift: distances", "short", {"{{feature}}": "max by (feature) (sodaops_drift_effect)"}),
    ("Drift: causes", "short", {"{{cause}}": "max by (cause) (sodaops_drift_cause)"}),
    ("Drift: requests in the window", "short", {"requests": "max(sodaops_drift_window_rows)"}),
    ("Drift: age of the reference", "s", {"age": "max(sodaops_drift_reference_age_seconds)"}),
    ("Drift: time since the last run", "s", {"since": "time() - max(sodaops_drift_last_run_timestamp_seconds)"}),
    ("Drift: runs", "short", {"{{outcome}}": "sum by (outcome) (sodaops_drift_runs_total)"}),
    ("CPU", "short", {"{{job}}": f'sum by (job) (rate(process_cpu_seconds_total{{job=~"sodaops.*"}}{_RATE}))'}),
    ("Memory", "bytes", {"{{job}}": 'sum by (job) (process_resident_memory_bytes{job=~"sodaops.*"})'}),
)


def grafana_dashboard(config: AlertsConfig) -> str:
    """Returns a dashboard to import into Grafana: one panel for each rule, with its threshold, then the services' metrics."""
    rule_panels = [
        _panel(f"Rule {name}: {rule.signal} {rule.limit}", "short", {rule.signal: promql(rule.signal, config)}, rule)
        for name, rule in config.enabled_rules().items()
    ]
    panels = rule_panels + [_panel(*panel) for panel in _PANELS]
    width = _GRID_WIDTH // _COLUMNS
    for index, panel in enumerate(panels):
        row, column = divmod(index, _COLUMNS)
        panel |= {"id": index + 1, "gridPos": {"x": width * column, "y": _HEIGHT * row, "w": width, "h": _HEIGHT}}
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    document = {
        "uid": "sodaops",
        "title": "SoDaOps",
        "schemaVersion": 38,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [source]},
        "panels": panels,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _panel(title: str, unit: str, expressions: dict[str, str], rule: AlertRule | None = None) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": unit}
    if rule is not None:
        colors = ("green", "red") if rule.above is not None else ("red", "green")  # below and above the threshold
        steps = [{"color": color, "value": value} for color, value in zip(colors, (None, rule.threshold), strict=True)]
        defaults |= {"thresholds": {"mode": "absolute", "steps": steps}, "custom": {"thresholdsStyle": {"mode": "line"}}}
    targets = [
        {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend, "datasource": _DATASOURCE}
        for index, (legend, expression) in enumerate(expressions.items())
    ]
    return {
        "title": title,
        "type": "timeseries",
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }
