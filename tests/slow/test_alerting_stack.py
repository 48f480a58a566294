"""The rendered files in real Prometheus and Alertmanager: an alert and its recovery reach a receiver."""

import contextlib
import json
import shutil
import subprocess
from types import SimpleNamespace

import httpx
import pytest
import yaml

from sodaops.alerting.alertmanager import ALERTMANAGER, alertmanager_config
from sodaops.alerting.dashboard import grafana_dashboards
from sodaops.alerting.render import PROMETHEUS, prometheus_rules
from tests.alerting import EMAIL, RULES, SECRET, Receiver, alerts_config
from tests.conftest import free_port, wait_until
from tests.serving import Server

BINARIES = ("prometheus", "promtool", "prometheus-alertmanager", "amtool")
MISSING = [name for name in BINARIES if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian: prometheus, prometheus-alertmanager)"
    ),
]


@contextlib.contextmanager
def process(folder, name, *arguments):
    log = folder / f"{name}.log"
    with log.open("w") as file:
        running = subprocess.Popen([name, *arguments], cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield SimpleNamespace(log=log.read_text)
    finally:
        running.terminate()
        running.wait(30)


def ready(url):
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/-/ready").status_code == 200


def panels_with_data(prometheus_url, config):
    """Asks Prometheus for what the dashboards show."""
    shown = set()
    for dashboard in map(json.loads, grafana_dashboards(config).values()):
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                query = {"query": target["expr"].replace("$__rate_interval", "1m")}
                answer = httpx.get(f"{prometheus_url}/api/v1/query", params=query).json()
                assert answer["status"] == "success", (panel["title"], answer)
                shown |= {panel["title"]} if answer["data"]["result"] else set()
    return shown


def test_rendered_files_are_valid(tmp_path):
    (tmp_path / "url").write_text("http://127.0.0.1:9/")
    config = alerts_config(webhook_url_file="url", email={**EMAIL, "username": "me", "password_file": "password"})
    (tmp_path / PROMETHEUS).write_text(prometheus_rules(config))
    (tmp_path / ALERTMANAGER).write_text(alertmanager_config(config))
    for command in (["promtool", "check", "rules", PROMETHEUS], ["amtool", "check-config", ALERTMANAGER]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_alert_and_its_recovery_reach_a_receiver(trained, tmp_path):
    """A service under load is slower than the rule allows; after the load the alert recovers."""
    rule = {"signal": "latency_p99_s", "above": 1e-6, "clear": 1e-6, "for_s": 1.0, "severity": "page", "summary": "Slow."}
    ports = [free_port(), free_port()]
    prometheus_url, alertmanager_url = (f"http://127.0.0.1:{port}" for port in ports)
    with Receiver() as receiver, Server(trained / "run/bundle", environ={"SODAOPS_API_KEYS": SECRET}) as server:
        config = alerts_config(
            rules={**dict.fromkeys(RULES), "slow": rule}, every_s=1.0, window_s=5.0, webhook_url_file="webhook-url"
        )
        (tmp_path / "webhook-url").write_text(f"http://{receiver.host}/{SECRET}")
        (tmp_path / "key").write_text(SECRET)
        (tmp_path / PROMETHEUS).write_text(prometheus_rules(config))
        (tmp_path / ALERTMANAGER).write_text(alertmanager_config(config))
        job = {
            "job_name": "sodaops-predictor", "static_configs": [{"targets": [server.url.removeprefix("http://")]}],
            "authorization": {"credentials_file": "key"},
        }  # fmt: skip
        settings = {
            "global": {"scrape_interval": "1s"}, "rule_files": [PROMETHEUS], "scrape_configs": [job],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager_url.removeprefix("http://")]}]}]},
        }  # fmt: skip
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(settings))
        alertmanager_options = (
            f"--config.file={ALERTMANAGER}", f"--web.listen-address=127.0.0.1:{ports[1]}", "--storage.path=alertmanager",
            "--cluster.listen-address=",
        )  # fmt: skip
        prometheus_options = (
            "--config.file=prometheus.yaml", f"--web.listen-address=127.0.0.1:{ports[0]}", "--storage.tsdb.path=data"
        )  # fmt: skip
        with (
            process(tmp_path, "prometheus-alertmanager", *alertmanager_options) as alertmanager,
            process(tmp_path, "prometheus", *prometheus_options) as prometheus,
        ):

            def logs():
                return prometheus.log() + alertmanager.log()

            wait_until(lambda: ready(prometheus_url) and ready(alertmanager_url), 90, logs)
            with server.client(headers={"x-api-key": SECRET}) as client:

                def load():
                    answers = [client.post("/predict", json={"text": f"late again {n}"}) for n in range(20)]
                    assert {answer.status_code for answer in answers} == {200}
                    return receiver.messages[:1]

                firing = wait_until(load, 90, logs)[0]["attachments"][0]
            resolved = wait_until(lambda: receiver.messages[1:], 90, logs)[0]["attachments"][0]
            (group,) = httpx.get(f"{prometheus_url}/api/v1/rules").json()["data"]["groups"]
            assert [(rule["name"], rule["health"]) for rule in group["rules"]] == [("sodaops_slow", "ok")]
            shown = panels_with_data(prometheus_url, config)
    assert {"Requests", "Latency", "Texts per batch", "Bundle", "Memory", "Predictions by label", "Confidence"} <= shown
    assert firing["title"].startswith("[firing] sodaops_slow") and "Slow." in firing["text"]
    assert resolved["title"].startswith("[resolved] sodaops_slow")
    assert SECRET not in logs()
