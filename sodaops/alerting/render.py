"""The rules of conf/alerts as Prometheus' alerting rules and as Google Cloud's alert policies."""

import json
import math
from typing import Any

import yaml

from sodaops.config.alerts import AlertRule, AlertsConfig

PROMETHEUS, GOOGLE = "prometheus-rules.yaml", "gcp-alert-policies.json"
CHANNEL = "${NOTIFICATION_CHANNEL}"
GROUP = "sodaops"
_PREDICT = 'path=~"/predict.*"'
_HEAD = """\
# Made by `sodaops alerts render` from conf/alerts; change the rules there.
# The jobs that scrape the predictor and the drift service have names that begin with sodaops.
# Hysteresis cannot be said in a rule: `clear` is not in here. Where a rule has one, keep_firing_for holds the alarm for a
# window after the value was last past the threshold, so that a value around it does not fire again and again.
"""


def promql(signal: str, config: AlertsConfig) -> str:
    """The expression whose value is a signal.

    Args:
        signal: of AlertRule.
        config: for the windows.
    """
    window, offset = f"[{_duration(config.window_s)}]", f"offset {_duration(config.traffic_offset_s)}"
    requests = f"sodaops_requests_total{{{_PREDICT}}}{window}"
    errors = f'sodaops_requests_total{{{_PREDICT},status=~"5.."}}{window}'
    confidence = [f"sum(rate(sodaops_confidence_{part}{window}))" for part in ("sum", "count")]
    buckets = f"sum by (le) (rate(sodaops_request_seconds_bucket{{{_PREDICT}}}{window}))"
    enough = f"sum(increase({requests} {offset})) >= {config.traffic_min_requests}"
    return {
        "drift": "max(sodaops_drift_detected)",
        "error_rate": f"(sum(rate({errors})) or vector(0)) / sum(rate({requests}))",
        "latency_p99_s": f"histogram_quantile(0.99, {buckets})",
        "mean_confidence": " / ".join(confidence),
        "traffic": f"sum(rate({requests})) / (sum(rate({requests} {offset})) and {enough})",
        "log_lost": f"sum(increase(sodaops_request_log_lost_total{window}))",
        "up": 'min(up{job=~"sodaops.*"}) or vector(0)',
    }[signal]


def condition(rule: AlertRule, config: AlertsConfig) -> str:
    """The expression that has a value while a rule is past its threshold."""
    return f"({promql(rule.signal, config)}) {'>' if rule.above is not None else '<'} {rule.threshold}"


def prometheus(config: AlertsConfig) -> str:
    """A rule file for Prometheus 2.42 or later."""
    rules = []
    for name, rule in _in_force(config):
        fields: dict[str, Any] = {"alert": _name(name), "expr": condition(rule, config), "for": _duration(rule.for_s)}
        if rule.clear != rule.threshold:
            fields["keep_firing_for"] = _duration(config.window_s)
        fields["labels"] = {"severity": rule.severity}
        summary = rule.summary.replace("{{", '{{"{{"}}')  # else taken for a template
        fields["annotations"] = {"summary": summary, "description": f"{rule.signal} is {{{{ $value }}}} ({rule.limit})"}
        if config.runbook_url:
            fields["annotations"]["runbook_url"] = config.runbook(name)
        rules.append(fields)
    groups = [{"name": GROUP, "interval": _duration(config.every_s), "rules": rules}]
    return _HEAD + yaml.safe_dump({"groups": groups}, sort_keys=False, allow_unicode=True, width=10_000)


def google(config: AlertsConfig) -> str:
    """A JSON list of AlertPolicy objects of Cloud Monitoring's API; their channel is a variable to fill in."""
    every = f"{30 * math.ceil(config.every_s / 30)}s"  # a multiple of 30 s is all that is taken
    policies = []
    for name, rule in _in_force(config):
        query = {
            "query": condition(rule, config),
            "duration": _seconds(rule.for_s),
            "evaluationInterval": every,
            "labels": {"severity": rule.severity},
            "ruleGroup": GROUP,
            "alertRule": _name(name),
            "disableMetricValidation": True,  # the first metrics come after the first request
        }
        said = f"{rule.summary}\n\n{rule.signal} was {rule.limit} for {rule.for_s:g} s."
        if config.runbook_url:
            said += f"\n\n[What to do]({config.runbook(name)})"
        policy = {
            "displayName": f"sodaops {name}",
            "documentation": {"content": said, "mimeType": "text/markdown"},
            "conditions": [{"displayName": f"{rule.signal} {rule.limit}", "conditionPrometheusQueryLanguage": query}],
            "combiner": "OR",
            "enabled": True,
            "severity": {"page": "CRITICAL", "ticket": "WARNING"}[rule.severity],
            "notificationChannels": [CHANNEL],
        }
        policies.append(policy)
    return json.dumps(policies, indent=2, ensure_ascii=False) + "\n"


def _in_force(config: AlertsConfig) -> list[tuple[str, AlertRule]]:
    return [(name, rule) for name, rule in config.rules.items() if rule is not None]


def _name(rule: str) -> str:
    return f"sodaops_{rule}"


def _duration(seconds: float) -> str:
    """As Prometheus writes it: whole numbers of a unit.

    >>> _duration(300.0), _duration(0.5)
    ('300s', '500ms')
    """
    return f"{int(seconds)}s" if seconds == int(seconds) else f"{round(1000 * seconds)}ms"


def _seconds(seconds: float) -> str:
    """As protocol buffers write a duration in JSON."""
    return f"{int(seconds)}s" if seconds == int(seconds) else f"{seconds:.3f}s"
