"""The predictor's application in this process."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def serve(bundle: Path) -> Iterator[Callable[..., Any]]:
    """Starts the application with other settings, and gives its client."""
    from fastapi.testclient import TestClient

    from sodaops.serving.app import create_app
    from sodaops.serving.settings import ServeSettings

    with contextlib.ExitStack() as stack:

        def start(source: Path | str = bundle, root_path: str = "", **settings: Any) -> TestClient:
            app = create_app(ServeSettings(bundle=str(source), **{"reload_s": None, **settings}))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False, root_path=root_path))

        yield start


@pytest.fixture(scope="module")
def client(trained: Path) -> Iterator[Any]:
    """The client of an application that all tests of a module share."""
    from fastapi.testclient import TestClient

    from sodaops.serving.app import create_app
    from sodaops.serving.settings import ServeSettings

    limits: dict[str, Any] = {"max_chars": 1000, "max_texts": 8, "max_body_bytes": 100_000, "admin_keys": ["root"]}
    app = create_app(ServeSettings(bundle=str(trained / "run/bundle"), reload_s=None, **limits))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
