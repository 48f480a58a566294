"""Checks, before a training in several processes starts, that all of them are ready and have the same settings.

Without this check, the others would wait for a process that failed while preparing, and machines with different tables would
train one model on both.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sodaops.errors import ConfigError, TrainingError, some
from sodaops.io import ranks

JOIN_S = 600  # within which all machines must reach the store
READY_S = 1800  # within which all processes must have prepared their splits; torch's limit for joining is the same
_POLL_S = 0.1


class Peers:
    """The other processes of this training, reached through torch's key-value store.

    Keep the object until the training ends: the first process may host the store.

    Args:
        environment: with RANK and WORLD_SIZE, as the elastic agent sets them; without them for a single process.
        store: None uses the one that torch's rendezvous gives.

    Raises:
        TrainingError: the first process cannot be reached.
    """

    def __init__(self, environment: Mapping[str, str], store: dist.Store | None = None) -> None:
        self._rank, self._world_size = 0, ranks.world_size(environment)
        self._store: dist.Store | None = None
        self._ready_keys = [f"ready/{rank}" for rank in range(self._world_size)]
        self._failed_keys = [f"failed/{rank}" for rank in range(self._world_size)]
        if self._world_size == 1:
            return
        self._rank = int(environment["RANK"])
        with _store_errors():
            if store is None:
                timeout = timedelta(seconds=JOIN_S)
                store, *_ = next(dist.rendezvous("env://", self._rank, self._world_size, timeout=timeout))
            self._store = dist.PrefixStore("sodaops", store)
            for keys in (self._ready_keys, self._failed_keys):  # torchrun may keep the store when it restarts
                self._store.delete_key(keys[self._rank])

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Reports an error within the block to the other processes, which then end too."""
        try:
            yield
        except BaseException:
            if self._store is not None:
                self._report_failure()
            raise

    def _report_failure(self) -> None:
        error = sys.exception()
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        with contextlib.suppress(dist.DistError):
            # A process that was ready fails only because another one did, which has reported it.
            if not self._store.check([self._ready_keys[self._rank]]):
                message = f"process {self._rank} of {self._world_size} could not start ({reason})"
                self._store.set(self._failed_keys[self._rank], message)

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Waits until all processes are ready, and compares their settings.

        Args:
            settings: what must be equal in all processes; JSON values.

        Raises:
            TrainingError: a process failed, or was not ready in time.
            ConfigError: a process has other settings.
        """
        if self._store is None:
            return
        with _store_errors():
            self._store.set(self._ready_keys[self._rank], json.dumps(settings))
            self._wait_until_ready()
            first, *others = (json.loads(self._store.get(key)) for key in self._ready_keys)
        for rank, other in enumerate(others, 1):
            keys = [key for key in first if other.get(key) != first[key]]
            if keys:
                differences = some([f"{key}={other.get(key)}, process 0 with {first[key]}" for key in keys])
                raise ConfigError(
                    f"process {rank} of {self._world_size} would train with {differences}. Give all machines the same tables, "
                    "configuration and run_dir."
                )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while missing := [key for key in self._ready_keys if not self._store.check([key])]:
            for key in self._failed_keys:
                if self._store.check([key]):
                    raise TrainingError(f"{self._store.get(key).decode()}; its own output has the details.")
            if time.monotonic() > deadline:
                raise TrainingError(f"process {missing[0].partition('/')[2]} was not ready within {READY_S} s.")
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise TrainingError(
            f"the first process of this training cannot be reached ({str(error).splitlines()[0][:200]}); its own output has "
            "the details."
        ) from error
