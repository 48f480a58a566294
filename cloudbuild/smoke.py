"""Smoke tests of a revision by HTTP, with an identity token where it asks for one."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from cloud import StepError, ask, gcloud, tell

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_LATER = {408, 425, 429, 500, 502, 503, 504}  # a revision that is starting


class Smoke:
    """Asks one URL.

    Cloud Run keeps paths that end in z for itself, so /healthz and /readyz cannot be asked from outside.

    Args:
        url: of a revision, or of its service.
        audience: the service's URL, also where a revision is asked.
        bound_s: until when it must have answered well, from now on.
        key: the service's own, if it has one.
    """

    def __init__(self, url: str, audience: str, bound_s: float, key: str = "") -> None:
        self._url, self._audience, self._bound_s = url.rstrip("/"), audience, bound_s
        self._until = time.monotonic() + bound_s
        self._headers = {"Content-Type": "application/json", **({"X-API-Key": key} if key else {})}
        self._asked_token = False

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """What it answers with status 200.

        Raises:
            StepError: another status, or none within the bound.
        """
        while True:
            said = self._once(path, body)
            if isinstance(said, str):
                return said
            status, detail = said
            if status in (401, 403) and not self._asked_token:
                self._asked_token = True
                self._headers["Authorization"] = f"Bearer {_token(self._audience)}"
                continue
            if status in (401, 403):
                raise StepError(
                    f"{self._url}{path}: status {status} in spite of an identity token: {detail}\nThe account that builds "
                    "needs roles/run.invoker on the service, and the service's own key, where it has one, _KEYS_SECRET."
                )
            if status and status not in _LATER:
                raise StepError(f"{self._url}{path}: status {status}: {detail}")
            if not self.waits():
                raise StepError(
                    f"{self._url}{path}: no good answer within {self._bound_s:g} s; the last: {status or ''} {detail}"
                )

    def waits(self) -> bool:
        """Waits a moment; False: the time is over."""
        if time.monotonic() > self._until:
            return False
        time.sleep(min(2.0, self._bound_s / 10))
        return True

    def fields(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The same, where a JSON object is expected.

        Raises:
            StepError: it is none.
        """
        said = self.ask(path, body)
        try:
            found = json.loads(said)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise StepError(f"{self._url}{path}: expected a JSON object, not {said[:200]!r}")
        return found

    def _once(self, path: str, body: dict[str, Any] | None) -> str | tuple[int, str]:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{self._url}{path}", data, self._headers)
        try:
            with _DIRECT.open(request, timeout=30) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read(500).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)


def predictor_answers(smoke: Smoke, version: str) -> None:
    """Holds a predictor to answering with the version that was to be deployed.

    Raises:
        StepError: it does not, until the time is over.
    """
    _repeated(smoke, lambda: _predictor(smoke, version))
    tell(f"smoke test: {version} answers")


def drift_answers(smoke: Smoke) -> None:
    """Holds the drift service to telling its metrics; whether it can look shows when it is called.

    Raises:
        StepError: it does not, until the time is over.
    """
    _repeated(smoke, lambda: _drift(smoke))
    tell("smoke test: the drift service answers")


def _repeated(smoke: Smoke, test: Callable[[], None]) -> None:
    """The whole of a test again and again: for a while after traffic has moved, the revision before may still answer."""
    while True:
        try:
            test()
            return
        except StepError:
            if not smoke.waits():
                raise


def _predictor(smoke: Smoke, version: str) -> None:
    found = smoke.fields("/info").get("bundle_version")
    if found != version:
        raise StepError(f"/info: it serves {found}, and {version} was to be deployed")
    answer = smoke.fields("/predict", {"text": "the train is late again"})
    if answer.get("label") not in answer.get("probs", {}) or answer.get("bundle_version") != version:
        raise StepError(f"/predict: expected a label of {version}, not {json.dumps(answer)[:300]}")


def _drift(smoke: Smoke) -> None:
    if "sodaops_drift_" not in smoke.ask("/metrics"):
        raise StepError("/metrics has no metric of the drift service")


def _token(audience: str) -> str:
    command = ["auth", "print-identity-token"]
    answer = ask([*command, f"--audiences={audience}"])
    if "Invalid account type" in answer.said:  # a person's token has no audience
        return gcloud(command)
    return answer.out if not answer.code else gcloud([*command, f"--audiences={audience}"])
