"""A deployment's smoke test against the predictor itself; tests/integration/test_drift_service.py has the other."""

import importlib
import sys

import pytest

from tests.conftest import REPO
from tests.serving import Server


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "cloudbuild"))
    yield importlib.import_module("smoke")
    for name in ("smoke", "cloud"):
        sys.modules.pop(name, None)


def test_the_predictor_passes_with_its_own_version_alone(smoke, trained):
    from sodaops.bundle.layout import read_info

    bundle = trained / "run/bundle"
    with Server(bundle, environ={"SODAOPS_API_KEYS": "k-1,k-2"}) as server, server.client() as client:
        url = str(client.base_url)
        smoke.check_predictor(smoke.Smoke(url, url, 5, "k-1"), read_info(bundle).bundle_id)
        with pytest.raises(smoke.StepError, match="another"):
            smoke.check_predictor(smoke.Smoke(url, url, 0.2, "k-1"), "another")
