"""A Ray cluster as an executor."""

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

_CONNECT_S = 5
_RETRIES = 3  # of a task whose worker died, before it is an error


class RayPool(Executor):
    """Runs tasks on a cluster; the tasks of a worker that died run again on another.

    Args:
        address: ``local`` starts a cluster on this machine's cores, for the duration of the block; ``auto`` or HOST:PORT is an
            existing cluster.

    Raises:
        ConfigError: ray is not installed, or no cluster answers at the address.
    """

    def __init__(self, address: str) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(f"data.ray={address}: ray is not installed; run `pip install 'sodaops[ray]'`.")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

        options = {"include_dashboard": False} if address == "local" else {}
        host, _, port = address.rpartition(":")
        self._own = not ray.is_initialized()
        self._on_sigterm = (
            signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
        )  # Ray replaces the handler and does not restore it
        try:
            if host:  # ray.init would wait for minutes
                socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"data.ray={address}: no Ray cluster answers ({str(error).splitlines()[0]}). Start one with `ray start "
                "--head` and set its HOST:PORT, or set data.ray=local."
            ) from error
        self.worker_died: tuple[type[Exception], ...] = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)
        self.n_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._ray = ray

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future[Any]:  # type: ignore[override]  # no keywords
        """Runs ``call(*arguments)`` on a worker."""
        return self._ray.remote(call).options(max_retries=_RETRIES).remote(*arguments).future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Disconnects from the cluster, unless the process was connected before, and stops a ``local`` one."""
        if not self._own:
            return
        self._ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
