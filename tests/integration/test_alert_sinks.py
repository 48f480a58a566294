"""Alarms on their way: a webhook that fails in every manner, mail, a process that is killed, and the verbs."""

import asyncio
import contextlib
import http.server
import json
import logging
import os
import signal
import ssl
import subprocess
import sys
import threading
import time

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from prometheus_client import CollectorRegistry

from sodaops.alerting import outbox, scrape, sinks
from sodaops.alerting.alerts import Alerts
from sodaops.alerting.outbox import Outbox
from sodaops.alerting.sinks import Notification, sinks_of
from sodaops.cli import main
from sodaops.errors import DeliveryError
from tests.conftest import REPO, free_port
from tests.unit.test_alerts import RULES, built

SECRET = "T0KEN-hunter2"
DEAD = "http://127.0.0.1:9/metrics"


class Receiver:
    """An HTTP server that answers POST as a script says, the last line of it for ever, and GET with metrics.

    Attributes:
        script: a status, "hang", or "drop" to end the connection without an answer.
        asked: what was answered, in order, with the POST's JSON.
        metrics: the text for GET; None: 500.
    """

    def __init__(self, *script):
        self.script, self.asked, self.metrics, self.keys = list(script), [], None, []
        self._stop = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.base = f"http://127.0.0.1:{self._server.server_port}"
        self.url = f"{self.base}/services/{SECRET}"

    def _handler(outer):  # noqa: N805
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                what = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                outer.asked.append((what, self.headers["x-sodaops-notification"], body))
                if what == "hang":
                    outer._stop.wait(30)
                if isinstance(what, int):
                    self._answer(what, b"", {"Location": f"{outer.base}/elsewhere"} if what == 302 else {})

            def do_GET(self):
                outer.keys.append(self.headers["x-api-key"])
                self._answer(500 if outer.metrics is None else 200, (outer.metrics or "").encode(), {})

            def _answer(self, status, body, headers):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        return Handler

    def taken(self):
        """Kinds of what was answered with 200."""
        return [notification_id.split("-")[1] for what, notification_id, _ in self.asked if what == 200]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(sinks, "TIMEOUT_S", 0.4)
    monkeypatch.setattr(scrape, "TIMEOUT_S", 0.4)
    monkeypatch.setattr(outbox, "FIRST_WAIT_S", 0.05)


def note(n=0, rule="errors"):
    return Notification(rule, "firing", "error_rate", 0.5, "above 0.02", "page", "a < b & c.", 1.79e9, 1.79e9 + n)


def settings(folder, **changes):
    down = {"signal": "up", "below": 1.0, "clear": 1.0, "for_s": 0.0, "severity": "page", "summary": "Dead."}
    rules = {**dict.fromkeys(RULES), "down": down}
    return built(
        **{"state_dir": str(folder), "metrics_urls": [DEAD], "rules": rules, "every_s": 1.0, "max_retry_s": 1.0, **changes}
    )


async def until(condition, seconds=20):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def watching(config, environ, condition, registry=None):
    task = asyncio.create_task(Alerts(config, environ, registry or CollectorRegistry()).watch())
    try:
        await until(lambda: task.done() or condition())
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def nothing_leaks(folder, *texts):
    for text in (*texts, *(path.read_text() for path in folder.iterdir())):
        assert SECRET not in text and "services" not in text


def test_an_alarm_gets_through_hang_500_and_a_restart_exactly_once(tmp_path, hasty, caplog):
    caplog.set_level(logging.INFO)
    registry = CollectorRegistry()
    with Receiver("hang", 500, "drop", 302, 200) as receiver:
        environ = {"SODAOPS_ALERT_WEBHOOK": receiver.url}
        asyncio.run(watching(settings(tmp_path), environ, lambda: len(receiver.asked) >= 2, registry))
        assert registry.get_sample_value("sodaops_alert_outbox") == 1
        assert registry.get_sample_value("sodaops_alert_notifications_total", {"sink": "webhook", "outcome": "failed"}) >= 1
        assert receiver.taken() == []
        again = CollectorRegistry()
        sent = lambda: again.get_sample_value("sodaops_alert_notifications_total", {"sink": "webhook", "outcome": "sent"})  # noqa: E731
        asyncio.run(watching(settings(tmp_path), environ, lambda: sent() and time.sleep(0.05) is None, again))
        later = time.time() + 1.5
        asyncio.run(watching(settings(tmp_path), environ, lambda: time.time() > later))
    assert receiver.taken() == ["firing"]
    assert len({notification_id for _, notification_id, _ in receiver.asked}) == 1
    assert json.loads((tmp_path / "state.json").read_text())["outbox"] == {"webhook": []}
    assert f"Webhook({receiver.base})" in caplog.text
    nothing_leaks(tmp_path, caplog.text)


def test_an_alarm_survives_kill_9_and_its_end_is_told(tmp_path):
    with Receiver("hang") as receiver:
        rules = [f"alerts.rules.{name}=null" for name in RULES - {"down"}]
        command = [
            sys.executable, "-m", "sodaops.cli", "alerts", "watch", "alerts.every_s=1", f"alerts.state_dir={tmp_path}",
            "alerts.rules.down.for_s=0", f"alerts.metrics_urls=[{receiver.base}/metrics]", *rules,
        ]  # fmt: skip
        environ = {**os.environ, "SODAOPS_ALERT_WEBHOOK": receiver.url, "SODAOPS_ALERT_API_KEY": SECRET}
        said = []
        for ending in (signal.SIGKILL, signal.SIGTERM):
            process = subprocess.Popen(
                command, cwd=REPO, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            wanted = ["firing", "recovered"] if ending == signal.SIGTERM else []
            with contextlib.suppress(TimeoutError):
                asyncio.run(until(lambda wanted=wanted: receiver.taken() == wanted and receiver.asked, 30))
            if ending == signal.SIGKILL:
                receiver.script[:] = [500, 200]
                receiver.metrics = "sodaops_drift_detected 0\n"
            process.send_signal(ending)
            said.append(process.communicate(timeout=30)[0])
            assert process.returncode == (-9 if ending == signal.SIGKILL else 0), said
    assert receiver.taken() == ["firing", "recovered"], said
    assert [what for what, _, _ in receiver.asked] == ["hang", 500, 200, 200]
    assert set(receiver.keys) == {SECRET}
    nothing_leaks(tmp_path, *said)


def test_a_hanging_sink_holds_up_neither_the_other_nor_the_rules(tmp_path, hasty):
    taken = []
    registry = CollectorRegistry()

    class Quick:
        name = "quick"

        def send(self, notification):
            taken.append(notification.at)

    class Stuck:
        name = "stuck"

        def send(self, notification):
            time.sleep(5)

    async def scenario():
        box = Outbox([Stuck(), Quick()], 3, 1.0, registry)
        tasks = [asyncio.create_task(box.deliver(sink, lambda: asyncio.sleep(0))) for sink in box.sinks]
        for n in range(5):
            box.add([note(n)])
            await until(lambda n=n: len(taken) == n + 1, 1)
        for task in tasks:
            task.cancel()

    began = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - began < 3
    assert taken == [1.79e9 + n for n in range(5)]  # in order
    counted = lambda sink, outcome: registry.get_sample_value(  # noqa: E731
        "sodaops_alert_notifications_total", {"sink": sink, "outcome": outcome}
    )
    assert (counted("stuck", "dropped"), counted("quick", "dropped"), counted("quick", "sent")) == (2, 0, 5)
    assert registry.get_sample_value("sodaops_alert_outbox") == 3


def test_waits_grow_and_are_bounded(monkeypatch):
    waits, asleep = [], asyncio.sleep

    class Broken:
        name = "broken"

        def send(self, notification):
            raise ZeroDivisionError

    async def sleep(seconds):
        waits.append(seconds)
        await asleep(0)

    async def scenario():
        box = Outbox([Broken()], 3, 10.0, CollectorRegistry())
        box.add([note()])
        monkeypatch.setattr(outbox.asyncio, "sleep", sleep)
        task = asyncio.create_task(box.deliver(box.sinks[0], lambda: asleep(0)))
        while len(waits) < 6:
            await asleep(0.01)
        task.cancel()

    asyncio.run(scenario())
    assert waits[:6] == [1, 2, 4, 8, 10, 10]


def test_what_a_webhook_gets(hasty):
    with Receiver(200) as receiver:
        sinks.Webhook(sinks.SecretStr(receiver.url), "alerts.webhook_url").send(note())
    ((_, notification_id, body),) = receiver.asked
    assert notification_id == note().id
    assert body["text"] == "[page] errors fires: error_rate is 0.5 (above 0.02)"
    (attachment,) = body["attachments"]
    assert "a &lt; b &amp; c." in attachment["text"] and attachment["color"] == "#c62828"
    assert {field["title"]: field["value"] for field in attachment["fields"]}["Value"] == "0.5"


class Mailbox:
    """Keeps what comes; takes one login."""

    def __init__(self):
        self.messages = []

    async def handle_DATA(self, server, session, envelope):  # noqa: N802
        self.messages.append((session.authenticated, envelope.rcpt_tos, envelope.content.decode()))
        return "250 OK"

    def authenticate(self, server, session, envelope, mechanism, data):
        return AuthResult(success=(data.login, data.password) == (b"me", SECRET.encode()), handled=False)


@pytest.fixture
def mailbox(tmp_path_factory, monkeypatch):
    """A mail server with STARTTLS, whose certificate this process trusts."""
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key", "-out", folder / "certificate",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "certificate"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "certificate", folder / "key")
    box = Mailbox()
    box.port = free_port()
    controller = Controller(
        box, hostname="localhost", port=box.port, tls_context=context, authenticator=box.authenticate, auth_require_tls=True
    )
    controller.start()
    yield box
    controller.stop()


def email(mailbox, **changes):
    return {
        "host": "localhost",
        "port": mailbox.port,
        "sender": "a@b.example",
        "recipients": ["c@d", "e@f"],
        "starttls": True,
        **changes,
    }


LOGIN = {"SODAOPS_SMTP_USER": "me", "SODAOPS_SMTP_PASSWORD": SECRET}


def test_mail_with_a_login_over_tls_and_without(tmp_path, mailbox):
    for environ, changes in ((LOGIN, {}), ({}, {"starttls": False})):
        (sink,) = sinks_of(settings(tmp_path, email=email(mailbox, **changes)), environ)
        sink.send(note())
        assert repr(sink) == f"Email(localhost:{mailbox.port})"
    (with_login, recipients, text), (without, _, _) = mailbox.messages
    assert with_login and not without and recipients == ["c@d", "e@f"]
    assert "Subject: [page] errors fires: error_rate is 0.5 (above 0.02)" in text
    assert f"Message-ID: <{note().id}@b.example>" in text and "a < b & c." in text


def test_mail_that_is_refused_says_why_and_no_secret(tmp_path, mailbox, monkeypatch):
    for environ, changes, message in (
        ({**LOGIN, "SODAOPS_SMTP_USER": "you"}, {}, "SMTPAuthenticationError, code 535"),
        (LOGIN, {"port": 9}, "refused"),
        (LOGIN, {"host": "127.0.0.1"}, "certificate|CERTIFICATE|SSLCertVerificationError"),
    ):
        (sink,) = sinks_of(settings(tmp_path, email=email(mailbox, **changes)), environ)
        with pytest.raises(DeliveryError, match=message) as caught:
            sink.send(note())
        assert SECRET not in str(caught.value)
    assert mailbox.messages == []


def test_mail_goes_out_while_the_webhook_is_dead(tmp_path, hasty, mailbox, caplog):
    caplog.set_level(logging.INFO)
    with Receiver("hang") as receiver:
        environ = {"SODAOPS_ALERT_WEBHOOK": receiver.url, **LOGIN}
        asyncio.run(watching(settings(tmp_path, email=email(mailbox)), environ, lambda: mailbox.messages))
    assert len(mailbox.messages) == 1
    waiting = json.loads((tmp_path / "state.json").read_text())["outbox"]
    assert len(waiting["webhook"]) == 1
    nothing_leaks(tmp_path, caplog.text)


def test_the_watch_goes_on_when_its_folder_is_full(tmp_path, hasty, caplog, monkeypatch):
    monkeypatch.setattr(sinks, "TIMEOUT_S", 5.0)
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "state.json").mkdir()  # nothing can be written in its place
    with Receiver(200) as receiver:
        config = settings(folder, metrics_urls=[f"{receiver.base}/metrics"])
        alerts = Alerts(config, {"SODAOPS_ALERT_WEBHOOK": receiver.url}, CollectorRegistry())
        monkeypatch.setattr(alerts, "load", lambda: None)

        async def scenario():
            task = asyncio.create_task(alerts.watch())
            await until(lambda: receiver.taken() == ["firing"])
            receiver.metrics = "sodaops_drift_detected 0\n"
            await until(lambda: receiver.taken() == ["firing", "recovered"])
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        asyncio.run(scenario())
    assert "state.json: could not be written" in caplog.text


def run(*arguments):
    return main(["alerts", *arguments])


def test_verbs(tmp_path, hasty, monkeypatch, capsys):
    state, rules = f"alerts.state_dir={tmp_path / 'state'}", [f"alerts.rules.{name}=null" for name in RULES - {"down", "drift"}]
    for name in ("SODAOPS_ALERT_WEBHOOK", "SODAOPS_SMTP_USER", "SODAOPS_SMTP_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    assert run("test") == 2 and "no sink is configured" in capsys.readouterr().err
    with Receiver(200, 500) as receiver:
        urls = f"alerts.metrics_urls=[{receiver.base}/metrics]"
        assert run("check", state, urls, *rules) == 0
        assert "pending" in capsys.readouterr().out
        assert run("check", "--wait=0.1", state, urls, "alerts.rules.down.for_s=0.1", *rules) == 4
        said = capsys.readouterr()
        assert "AlarmError: down: fires." in said.err and "firing" in said.out
        receiver.metrics = "sodaops_drift_detected 1\n"
        assert run("check", state, urls, *rules) == 4
        assert "AlarmError: drift: fires." in capsys.readouterr().err
        receiver.metrics = "sodaops_drift_detected 0\n"
        assert run("check", state, urls, *rules) == 0
        assert not (tmp_path / "state").exists()  # looking changes nothing
        monkeypatch.setenv("SODAOPS_ALERT_WEBHOOK", receiver.url)
        capsys.readouterr()
        assert run("test") == 0 and capsys.readouterr().out == f"Webhook({receiver.base}): taken\n"
        assert run("test") == 2
        assert capsys.readouterr().err.startswith(f"DeliveryError: Webhook({receiver.base}): answered 500. Check")
    assert run("render", f"--output={tmp_path / 'rules'}") == 0
    assert sorted(path.name for path in (tmp_path / "rules").iterdir()) == ["gcp-alert-policies.json", "prometheus-rules.yaml"]
    with pytest.raises(SystemExit):
        run("check", "--quick")
