"""Smoke tests of a revision over HTTP, with an identity token if it requires one."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from cloud import StepError, ask, gcloud, log

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_RETRIED = {408, 425, 429, 500, 502, 503, 504}  # a revision that is still starting


class Smoke:
    """Requests to one URL, repeated until they succeed or the time is over.

    Cloud Run reserves paths that end in z, so /healthz and /readyz cannot be requested from outside.

    Args:
        url: of a revision or of its service.
        audience: the service's URL, for the identity token.
        bound_s: seconds from now within which every request must succeed.
        key: the service's own API key, if it has one.
    """

    def __init__(self, url: str, audience: str, bound_s: float, key: str = "") -> None:
        self._url, self._audience, self._bound_s = url.rstrip("/"), audience, bound_s
        self._until = time.monotonic() + bound_s
        self._headers = {"Content-Type": "application/json", **({"X-API-Key": key} if key else {})}
        self._has_token = False

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The body of an answer with status 200.

        Raises:
            StepError: another status, or no success within the time.
        """
        while True:
            status, text = self._request(path, body)
            if status == 200:
                return text
            if status in (401, 403) and not self._has_token:
                self._has_token = True
                self._headers["Authorization"] = f"Bearer {_token(self._audience)}"
                continue
            if status in (401, 403):
                raise StepError(
                    f"{self._url}{path}: status {status} despite an identity token: {text}\nThe build account "
                    "needs roles/run.invoker on the service, and _KEYS_SECRET if the service has its own keys."
                )
            if status and status not in _RETRIED:
                raise StepError(f"{self._url}{path}: status {status}: {text}")
            if not self.wait():
                raise StepError(f"{self._url}{path}: no success within {self._bound_s:g} s; last answer: {status or ''} {text}")

    def wait(self) -> bool:
        """Waits a moment; returns False when the time is over."""
        if time.monotonic() > self._until:
            return False
        time.sleep(min(2.0, self._bound_s / 10))
        return True

    def fields(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object of an answer with status 200.

        Raises:
            StepError: as ``ask``, or the answer is no JSON object.
        """
        text = self.ask(path, body)
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise StepError(f"{self._url}{path}: expected a JSON object, not {text[:200]!r}")
        return parsed

    def _request(self, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        """One request: status (0 without an answer) and body, or what went wrong."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{self._url}{path}", data, self._headers)
        try:
            with _DIRECT.open(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read(500).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)


def check_predictor(smoke: Smoke, version: str) -> None:
    """Checks that a predictor answers with the deployed version.

    Raises:
        StepError: it does not within the time.
    """
    _retry(smoke, lambda: _predictor(smoke, version))
    log(f"smoke test: {version} answers")


def check_drift(smoke: Smoke) -> None:
    """Checks that the drift service shows its metrics; the scheduler's first call shows whether it can check for drift.

    Raises:
        StepError: it does not within the time.
    """
    _retry(smoke, lambda: _drift(smoke))
    log("smoke test: the drift service answers")


def _retry(smoke: Smoke, test: Callable[[], None]) -> None:
    """Repeats the whole test: for a while after a move of traffic the previous revision may still answer."""
    while True:
        try:
            test()
            return
        except StepError:
            if not smoke.wait():
                raise


def _predictor(smoke: Smoke, version: str) -> None:
    served = smoke.fields("/info").get("bundle_version")
    if served != version:
        raise StepError(f"/info: serves {served} instead of {version}")
    answer = smoke.fields("/predict", {"text": "the train is late again"})
    if answer.get("label") not in answer.get("probs", {}) or answer.get("bundle_version") != version:
        raise StepError(f"/predict: expected a label of {version}, not {json.dumps(answer)[:300]}")


def _drift(smoke: Smoke) -> None:
    if "sodaops_drift_" not in smoke.ask("/metrics"):
        raise StepError("/metrics: no metric of the drift service")


def _token(audience: str) -> str:
    command = ["auth", "print-identity-token"]
    result = ask([*command, f"--audiences={audience}"])
    if "Invalid account type" in result.stderr:  # a user account's token has no audience
        return gcloud(command)
    return result.stdout if not result.code else gcloud([*command, f"--audiences={audience}"])
