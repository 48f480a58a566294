"""What the processes of one training tell each other before they begin: that each is ready, and for the same training.

Without it, one that failed before they joined would leave the others waiting for it, and machines whose tables differ would
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

JOIN_S = 600  # for the other machines to come
READY_S = 1800  # for the slowest to have made the splits; what torch gives them to form their group
_POLL_S = 0.1


class Peers:
    """The other processes of this training, by way of the store through which torch brings them together.

    Keep it until the training ends: where the agent has no store, the first process keeps it here.

    Args:
        environment: what the agent that started this process sets, RANK and WORLD_SIZE for example; in a training of one
            process nothing.

    Raises:
        TrainingError: the first process cannot be reached.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._rank, self._n_all, self._store = 0, 1, None
        if ranks.is_distributed(environment):
            self._rank, self._n_all = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self._ready, self._failed = ([f"{said}/{rank}" for rank in range(self._n_all)] for said in ("ready", "failed"))
        if self._n_all > 1:
            with _first_there():
                store, *_ = next(dist.rendezvous("env://", self._rank, self._n_all, timeout=timedelta(seconds=JOIN_S)))
                self._store = dist.PrefixStore("sodaops", store)
                for said in (self._ready, self._failed):  # torchrun may keep the store over a restart
                    self._store.delete_key(said[self._rank])

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Tells the others when the block fails, so that they end too."""
        ready = False
        try:
            yield
            ready = True
        finally:
            if self._store is not None and not ready:
                error = sys.exception()
                why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                with contextlib.suppress(dist.DistError):
                    if not self._store.check([self._ready[self._rank]]):  # else it fails with another
                        self._store.set(
                            self._failed[self._rank], f"process {self._rank} of {self._n_all} could not begin ({why})"
                        )

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Waits until all processes are ready, and compares what they train.

        Args:
            facts: what must be the same in all; JSON values.

        Raises:
            TrainingError: one of them failed, or did not come.
            ConfigError: one of them trains something else.
        """
        if self._store is None:
            return
        until = time.monotonic() + READY_S
        with _first_there():
            self._store.set(self._ready[self._rank], json.dumps(facts))
            while missing := [key for key in self._ready if not self._store.check([key])]:
                for key in self._failed:
                    if self._store.check([key]):
                        raise TrainingError(f"{self._store.get(key).decode()}; what it said stands there.")
                if time.monotonic() > until:
                    raise TrainingError(f"no word from process {missing[0].partition('/')[2]} within {READY_S} s.")
                time.sleep(_POLL_S)
            first, *others = (json.loads(self._store.get(key)) for key in self._ready)
        for rank, other in enumerate(others, 1):
            unlike = [
                f"{key}={other.get(key)}, and process 0 with {first[key]}" for key in first if other.get(key) != first[key]
            ]
            if unlike:
                raise ConfigError(
                    f"process {rank} of {self._n_all} would train with {some(unlike)}. Give all machines the same tables, "
                    "configuration and run_dir."
                )


@contextlib.contextmanager
def _first_there() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise TrainingError(
            f"the first process of this training is not there ({str(error).splitlines()[0][:200]}); what it said stands there."
        ) from error
