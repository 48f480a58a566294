"""A Ray cluster as a pool of processes."""

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from sodaops.errors import ConfigError

_REACHED_S = 5
_ATTEMPTS = 3  # after a lost worker, before it is an error


class RayPool(Executor):
    """Calls functions on a cluster; what a lost worker had in hand is called again on another.

    Args:
        address: ``local`` starts a cluster of this machine's cores that ends with the block; ``auto`` or HOST:PORT is one that
            is there.

    Raises:
        ConfigError: ray is not installed, or no cluster answers there.
    """

    def __init__(self, address: str) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(f"data.ray={address}: ray is not installed; get it with `pip install 'sodaops[ray]'`.")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machines
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

        here = {"include_dashboard": False} if address == "local" else {}
        host, _, port = address.rpartition(":")
        self._own = not ray.is_initialized()
        self._on_sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL  # Ray puts its own there, and leaves it
        try:
            if host:  # Ray itself would wait for minutes
                socket.create_connection((host, int(port)), timeout=_REACHED_S).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **here)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"data.ray={address}: no Ray cluster answers there ({str(error).splitlines()[0]}). Start one with `ray start "
                "--head`, set its HOST:PORT, or set data.ray=local."
            ) from error
        self.worker_died: tuple[type[Exception], ...] = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)
        self.n_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._ray = ray

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future[Any]:  # type: ignore[override]  # no keywords
        """Calls ``call(*arguments)`` on some worker."""
        return self._ray.remote(call).options(max_retries=_ATTEMPTS).remote(*arguments).future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leaves the cluster, and ends one that is its own; where the process was in one before, it stays."""
        if not self._own:
            return
        self._ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
