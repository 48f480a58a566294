"""Grafana dashboards of the metrics of the predictor and the drift service."""

import json
from collections.abc import Iterable
from typing import Any

from sodaops.alerting.render import promql
from sodaops.config.alerts import AlertRule, AlertsConfig

_RATE = "[$__rate_interval]"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _HEIGHT, _GRID_WIDTH = 3, 7, 24


def _mean(histogram: str, by: str = "") -> str:
    return f"sum by ({by}) (rate({histogram}_sum{_RATE})) / sum by ({by}) (rate({histogram}_count{_RATE}))"


def _latency(percentile: int, histogram: str = "sodaops_request_seconds", by: str = "le") -> str:
    return f"histogram_quantile(0.{percentile}, sum by ({by}) (rate({histogram}_bucket{_RATE})))"


# Dashboard -> title, unit, and expression by legend. Panels of a signal are added from the rules.
_PANELS: dict[str, tuple[tuple[str, str, dict[str, str]], ...]] = {
    "service": (
        ("Requests", "reqps", {"{{path}} {{status}}": f"sum by (path, status) (rate(sodaops_requests_total{_RATE}))"}),
        ("Requests in flight", "short", {"{{job}}": "sum by (job) (sodaops_requests_in_flight)"}),
        ("Refused requests", "reqps", {"refused": f"sum(rate(sodaops_refused_total{_RATE}))"}),
        ("Latency", "s", {f"p{percentile}": _latency(percentile) for percentile in (50, 90, 99)}),
        ("Texts waiting", "short", {"waiting": "sum(sodaops_queue_texts)"}),
        ("Texts per batch", "short", {"mean": _mean("sodaops_batch_texts")}),
        ("Bundle", "short", {"{{bundle_id}} {{variant}}": "sum by (bundle_id, variant) (sodaops_bundle_info)"}),
        ("Bundle loads", "short", {"{{outcome}}": "sum by (outcome) (sodaops_bundle_loads_total)"}),
        ("Request log: rows", "rps", {"logged": f"sum(rate(sodaops_request_log_rows_total{_RATE}))"}),
        ("Request log: journal", "bytes", {"not in a part yet": "sum(sodaops_request_log_journal_bytes)"}),
        ("Request log: parts", "short", {"{{outcome}}": "sum by (outcome) (sodaops_request_log_parts_total)"}),
        ("CPU", "short", {"{{job}}": f'sum by (job) (rate(process_cpu_seconds_total{{job=~"sodaops.*"}}{_RATE}))'}),
        ("Memory", "bytes", {"{{job}}": 'sum by (job) (process_resident_memory_bytes{job=~"sodaops.*"})'}),
    ),
    "drift": (
        ("p-values", "short", {"{{feature}}": "min by (feature) (sodaops_drift_p_value)"}),
        ("Distances", "short", {"{{feature}}": "max by (feature) (sodaops_drift_effect)"}),
        ("Causes", "short", {"{{cause}}": "max by (cause) (sodaops_drift_cause)"}),
        ("Segments", "short", {"{{column}}={{value}}": "max by (column, value) (sodaops_drift_segment_detected)"}),
        ("Context: other values", "short", {"{{column}}": "sum by (column) (sodaops_context_others_total)"}),
        ("Requests in the window", "short", {"requests": "max(sodaops_drift_window_rows)"}),
        ("Age of the reference", "s", {"age": "max(sodaops_drift_reference_age_seconds)"}),
        ("Time since the last run", "s", {"since": "time() - max(sodaops_drift_last_run_timestamp_seconds)"}),
        ("Runs", "short", {"{{outcome}}": "sum by (outcome) (sodaops_drift_runs_total)"}),
    ),
    "quality": (
        ("Predictions by label", "reqps", {"{{label}}": f"sum by (label) (rate(sodaops_predictions_total{_RATE}))"}),
        ("Estimates", "percentunit", {"{{metric}}, {{bound}}": "min by (metric, bound) (sodaops_quality)"}),
        ("Estimates withheld", "short", {"{{reason}}": "max by (reason) (sodaops_quality_withheld)"}),
        ("Confidence", "percentunit", {"mean": _mean("sodaops_confidence")}),
        ("Abstentions", "reqps", {"abstained": f"sum(rate(sodaops_abstained_total{_RATE}))"}),
        ("Feedback by label", "reqps", {"{{label}}": f"sum by (label) (rate(sodaops_feedback_total{_RATE}))"}),
        ("Challenger: estimates", "percentunit", {"{{role}} {{metric}}": "min by (role, metric) (sodaops_compared_estimate)"}),
        ("Challenger: confidence", "percentunit", {"{{role}}": _mean("sodaops_compared_confidence", "role")}),
        (
            "Challenger: predictions by label",
            "reqps",
            {"{{role}} {{label}}": f"sum by (role, label) (rate(sodaops_compared_predictions_total{_RATE}))"},
        ),
        ("Challenger: latency", "s", {"{{role}} p99": _latency(99, "sodaops_compared_seconds", "role, le")}),
        ("Challenger: disagreements", "reqps", {"other answers": f"sum(rate(sodaops_shadow_disagreements_total{_RATE}))"}),
        ("Challenger: texts left out", "reqps", {"{{reason}}": f"sum by (reason) (rate(sodaops_shadow_dropped_total{_RATE}))"}),
        ("Challenger: share of requests", "percentunit", {"share": "max(sodaops_canary_share)"}),
        ("Challenger: restarts", "short", {"restarts": "sum(sodaops_shadow_restarts_total)"}),
        (
            "Challenger: log",
            "rps",
            {name: f"sum(rate(sodaops_shadow_log_{name}_total{_RATE}))" for name in ("rows", "lost", "parts")},
        ),
        ("Challenger: journal", "bytes", {"not in a part yet": "sum(sodaops_shadow_log_journal_bytes)"}),
    ),
}
_OF_SIGNAL = {"drift": "drift", **dict.fromkeys(("mean_confidence", "accuracy", "macro_f1"), "quality")}  # others: service


def grafana_dashboards(config: AlertsConfig) -> dict[str, str]:
    """Dashboards to import into Grafana, by file: a panel for each rule, with its threshold, then the services' metrics."""
    return {f"grafana-{name}.json": _dashboard(name, panels, config) for name, panels in _PANELS.items()}


def _dashboard(name: str, panels: Iterable[tuple[str, str, dict[str, str]]], config: AlertsConfig) -> str:
    rules = {key: rule for key, rule in config.enabled_rules().items() if _OF_SIGNAL.get(rule.signal, "service") == name}
    of_rules = [
        _panel(f"Rule {key}: {rule.signal} {rule.limit}", "short", {rule.signal: promql(rule.signal, config)}, rule)
        for key, rule in rules.items()
    ]
    placed = of_rules + [_panel(*panel) for panel in panels]
    width = _GRID_WIDTH // _COLUMNS
    for index, panel in enumerate(placed):
        row, column = divmod(index, _COLUMNS)
        panel |= {"id": index + 1, "gridPos": {"x": width * column, "y": _HEIGHT * row, "w": width, "h": _HEIGHT}}
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    document = {
        "uid": f"sodaops-{name}",
        "title": f"SoDaOps {name}",
        "tags": ["sodaops"],
        "links": [{"title": "SoDaOps", "type": "dashboards", "tags": ["sodaops"], "asDropdown": False, "includeVars": True}],
        "schemaVersion": 38,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [source]},
        "panels": placed,
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
