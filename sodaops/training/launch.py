"""Training over several processes: torch's elastic agent starts one a device, and ends all when one dies.

Each process runs ``sodaops train`` on the composed configuration, whether this module, ``torchrun`` or Vertex AI's replicas
started it. The first one (rank 0) alone writes.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sodaops.config.schema import Config
from sodaops.data.workers import n_cores
from sodaops.errors import ConfigError, PrunedError, Terminated, TrainingError
from sodaops.io import ranks, runs, storage
from sodaops.training.fit import LAST, make_trainer, resume_hint, silence_loggers, trainer_arguments
from sodaops.training.peers import JOIN_S

_END_S = 60  # for a process to end by itself when another one died, or to write its checkpoint
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
CONFIG = "ranks.yaml"


class KilledError(TrainingError):
    """A process of a training that something outside of it ended."""


class Node(NamedTuple):
    """This machine among those that train together, and where the first one listens."""

    rank: int
    address: str
    port: int


def processes(config: Config) -> tuple[int, int]:
    """Processes on this machine, and machines, that ``conf/trainer`` asks for.

    Raises:
        ConfigError: what this machine does not have, or a number that an agent did not start.
    """
    arguments = trainer_arguments(config.trainer)
    if (arguments["devices"], arguments["num_nodes"]) == (1, 1) and not ranks.is_distributed(os.environ):
        return 1, 1
    silence_loggers()
    if arguments["precision"] == "auto":  # each process finds out for itself, and they compare
        arguments["precision"] = None
    trainer = make_trainer(arguments | {"profiler": None}, [], [], Path(config.run_dir or "."))
    asked = trainer.num_devices, trainer.num_nodes
    if ranks.is_distributed(os.environ):
        n_local, n_all = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        if asked != (n_local, n_all // n_local):
            raise ConfigError(
                f"torchrun started {n_all} processes, {n_local} on this machine; trainer.devices={asked[0]} and "
                f"trainer.num_nodes={asked[1]} ask for others. Set trainer=ddp trainer.devices={n_local} "
                f"trainer.num_nodes={n_all // n_local}."
            )
    return asked


def node_of(environment: Mapping[str, str], n_nodes: int) -> Node:
    """This machine's place among several, from what Vertex AI (``CLUSTER_SPEC``) or another scheduler says.

    Args:
        environment: ``CLUSTER_SPEC``; or MASTER_ADDR, MASTER_PORT and NODE_RANK (or RANK).
        n_nodes: machines that the configuration asks for.

    Raises:
        ConfigError: nothing of that, or another number of machines.

    >>> node_of({"MASTER_ADDR": "a", "MASTER_PORT": "2222", "RANK": "1"}, 2)
    Node(rank=1, address='a', port=2222)
    """
    try:
        if "CLUSTER_SPEC" in environment:
            spec = json.loads(environment["CLUSTER_SPEC"])
            pools = [spec["cluster"][name] for name in ("workerpool0", "workerpool1") if name in spec["cluster"]]
            address, _, port = pools[0][0].rpartition(":")
            rank = int(spec["task"]["index"]) + (len(pools[0]) if spec["task"]["type"] == "workerpool1" else 0)
            found, n_found = Node(rank, address, int(environment.get("MASTER_PORT", port))), sum(map(len, pools))
        else:
            rank = int(environment.get("NODE_RANK") or environment["RANK"])
            found, n_found = Node(rank, environment["MASTER_ADDR"], int(environment["MASTER_PORT"])), n_nodes
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(
            f"trainer.num_nodes={n_nodes}: this machine must be told its place ({type(error).__name__}: {error}). Set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK, start it by torchrun, or as Vertex AI's replicas (CLUSTER_SPEC)."
        ) from None
    if n_found != n_nodes or not 0 <= found.rank < n_nodes:
        raise ConfigError(f"trainer.num_nodes={n_nodes}, but this is machine {found.rank} of {n_found}; set it to {n_found}.")
    return found


def launch(config: Config, n_processes: int, n_nodes: int) -> float | None:
    """Trains over several processes, and returns when all have ended.

    Where one of them was killed, all processes of a single machine start again from the last checkpoint, at most
    ``checkpoint.restarts`` times.

    Args:
        config: with a run_dir, which all machines should see.
        n_processes: on this machine.
        n_nodes: machines.

    Returns:
        The monitored metric of the kept epoch on val; None after a run that kept nothing, and on all machines but the first.

    Raises:
        PrunedError: a sweep stopped it.
        TrainingError: a process ended early; what it said stands above.
        KeyboardInterrupt: so did the user; Terminated: SIGTERM did.
    """
    node = node_of(os.environ, n_nodes) if n_nodes > 1 else None
    run_dir, n_restarts = Path(config.run_dir), config.checkpoint.restarts if node is None else 0
    last = run_dir / LAST
    before = _changed_ns(last)  # of an earlier run in this folder, perhaps
    for restart in range(1, n_restarts + 2):
        try:
            _run(config, n_processes, n_nodes, node)
            break
        except KilledError as error:
            if restart > n_restarts or _changed_ns(last) == before:
                raise
            said = str(error).partition(";")[0]
            print(f"{said}; starting again from {last}, {restart} of at most {n_restarts} times", file=sys.stderr, flush=True)
            config = config.model_copy(update={"ckpt_path": str(last)})
    if node is not None and node.rank:
        return None
    return runs.read_run(run_dir).metrics.get(config.checkpoint.monitor)


def _changed_ns(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def _run(config: Config, n_processes: int, n_nodes: int, node: Node | None) -> None:
    run_dir = Path(config.run_dir)
    tree = run_dir / (CONFIG if node is None else f"{node.rank}.{CONFIG}")
    storage.write_text(tree, yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    command = ["-m", "sodaops.cli", "train", "--params", str(tree)]
    with tempfile.TemporaryDirectory() as logs, _own_threads(n_processes), _own_signals():
        settings = LaunchConfig(
            min_nodes=n_nodes, max_nodes=n_nodes, nproc_per_node=n_processes, run_id="sodaops" if node else uuid.uuid4().hex,
            max_restarts=0, logs_specs=DefaultLogsSpecs(log_dir=logs), shutdown_timeout=_END_S,
            rdzv_backend="static" if node else "c10d",
            rdzv_configs={"timeout": JOIN_S, **({"rank": node.rank} if node else {})},
            rdzv_endpoint=f"{node.address}:{node.port}" if node else "127.0.0.1:0", local_addr=None if node else "127.0.0.1",
        )  # fmt: skip
        try:
            elastic_launch(settings, sys.executable)(*command)
        except ChildFailedError as error:
            _tell(error, run_dir, n_processes * n_nodes)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt(resume_hint(run_dir)) from None
            raise Terminated(resume_hint(run_dir)) from None
        except (RendezvousError, DistError) as error:
            raise TrainingError(
                f"the {n_nodes} machines did not come together at {settings.rdzv_endpoint} within {JOIN_S} s "
                f"({str(error).splitlines()[0][:200]}). Check that all run, and that the port is open between them."
            ) from error


def _tell(error: ChildFailedError, run_dir: Path, n_all: int) -> None:
    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float]:  # those that the agent ended come last
        code = item[1].exitcode
        return code == -signal.SIGTERM, code > 0, item[1].timestamp

    rank, failure = min(error.failures.items(), key=order)
    if (run_dir / runs.RECORD).is_file():
        fields = runs.read_run(run_dir).fields
        if fields.get("status") == "pruned":
            raise PrunedError(fields["error"]) from None
    if failure.exitcode in (130, 143):
        raise (KeyboardInterrupt if failure.exitcode == 130 else Terminated)(resume_hint(run_dir)) from None
    kind = KilledError if failure.exitcode < 0 else TrainingError
    raise kind(f"process {rank} of {n_all} ended {_how(failure)}; {resume_hint(run_dir)}.") from None


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"by {signal.Signals(-failure.exitcode).name}, and the others with it"
    return f"with exit code {failure.exitcode}, and the others with it; what it said stands above"


@contextlib.contextmanager
def _own_threads(n_processes: int) -> Iterator[None]:
    """Shares the cores among the processes; the agent would give each of them one."""
    cores = max(1, n_cores() // n_processes)
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = given or str(cores)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said once, in launch
    try:
        yield
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Gives the handlers back that the agent takes."""
    kept = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
