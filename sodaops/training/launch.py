"""Trains in several processes: torch's elastic agent starts one for each device, and stops all of them if one fails.

Each process runs ``sodaops train`` on the composed configuration. Only the first one (rank 0) writes files.
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
from sodaops.training.peers import JOIN_S
from sodaops.training.resume import LAST, resume_hint
from sodaops.training.trainer import make_trainer, silence_loggers, trainer_arguments

log = logging.getLogger(__name__)
_END_S = 60  # within which a process that is stopped must write its checkpoint, before it is killed
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
CONFIG = "ranks.yaml"  # the configuration that the processes read


class KilledError(TrainingError):
    """A process of the training was killed by a signal."""


class Node(NamedTuple):
    """A machine among those that train together."""

    rank: int
    address: str  # of the machine with rank 0
    port: int  # on that machine


def processes(config: Config) -> tuple[int, int]:
    """The number of processes on this machine, and the number of machines, by conf/trainer.

    Raises:
        ConfigError: this machine does not have the devices, or torchrun started a different number of processes.
    """
    arguments = trainer_arguments(config.trainer)
    if (arguments["devices"], arguments["num_nodes"]) == (1, 1) and not ranks.is_distributed(os.environ):
        return 1, 1
    silence_loggers()
    for name in ("precision", "max_epochs"):  # auto is chosen later, in each process; Peers compares the choices
        arguments[name] = None if arguments[name] == "auto" else arguments[name]
    trainer = make_trainer(arguments | {"profiler": None}, [], [], Path(config.run_dir or "."))
    n_devices, n_nodes = trainer.num_devices, trainer.num_nodes
    if ranks.is_distributed(os.environ):
        n_local, n_all = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        if (n_devices, n_nodes) != (n_local, n_all // n_local):
            raise ConfigError(
                f"trainer.devices={n_devices} and trainer.num_nodes={n_nodes}, but torchrun started {n_all} processes, "
                f"{n_local} on this machine. Set trainer=ddp trainer.devices={n_local} trainer.num_nodes={n_all // n_local}."
            )
    return n_devices, n_nodes


def node_of(environment: Mapping[str, str], n_nodes: int) -> Node:
    """This machine's rank, from the environment variables of Vertex AI or another scheduler.

    Args:
        environment: with CLUSTER_SPEC (Vertex AI); or with MASTER_ADDR, MASTER_PORT and NODE_RANK (or RANK).
        n_nodes: the number of machines in the configuration.

    Raises:
        ConfigError: the variables are missing or invalid, or belong to a different number of machines.

    >>> node_of({"MASTER_ADDR": "a", "MASTER_PORT": "2222", "RANK": "1"}, 2)
    Node(rank=1, address='a', port=2222)
    """
    try:
        if "CLUSTER_SPEC" in environment:
            spec = json.loads(environment["CLUSTER_SPEC"])  # workerpool0 has the first machine, workerpool1 the others
            pools = [spec["cluster"][name] for name in ("workerpool0", "workerpool1") if name in spec["cluster"]]
            address, _, port = pools[0][0].rpartition(":")
            rank = int(spec["task"]["index"]) + (len(pools[0]) if spec["task"]["type"] == "workerpool1" else 0)
            node, n_given = Node(rank, address, int(environment.get("MASTER_PORT", port))), sum(map(len, pools))
        else:
            rank = int(environment.get("NODE_RANK") or environment["RANK"])
            node, n_given = Node(rank, environment["MASTER_ADDR"], int(environment["MASTER_PORT"])), n_nodes
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(
            f"trainer.num_nodes={n_nodes}: the rank of this machine is unknown ({type(error).__name__}: {error}). Set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK, use torchrun, or start it as replicas of Vertex AI (CLUSTER_SPEC)."
        ) from None
    if n_given != n_nodes or not 0 <= node.rank < n_nodes:
        raise ConfigError(f"trainer.num_nodes={n_nodes}, but this is machine {node.rank} of {n_given}; set it to {n_given}.")
    return node


def launch(config: Config, n_processes: int, n_nodes: int) -> float | None:
    """Trains in several processes, and returns when all have ended.

    On a single machine, if a process is killed, all start again from the last checkpoint, at most ``checkpoint.restarts``
    times.

    Args:
        config: with a ``run_dir`` that all machines see.
        n_processes: on this machine.
        n_nodes: machines.

    Returns:
        The monitored metric of the best epoch on val; None if no epoch was kept, and on all machines but the first.

    Raises:
        PrunedError: a sweep stopped the trial.
        TrainingError: a process failed; its own output has the details.
        KeyboardInterrupt: Ctrl-C; Terminated: SIGTERM.
    """
    node = node_of(os.environ, n_nodes) if n_nodes > 1 else None
    run_dir, n_restarts = Path(config.run_dir), config.checkpoint.restarts if node is None else 0
    last = run_dir / LAST
    modified_ns = _modified_ns(last)  # an earlier run may have left a checkpoint in this folder
    for restart in range(1, n_restarts + 2):
        try:
            _run(config, n_processes, n_nodes, node)
            break
        except KilledError as error:
            if restart > n_restarts or _modified_ns(last) == modified_ns:
                raise
            log.warning("%s; starting again from %s, restart %d of %d", str(error).partition(";")[0], last, restart, n_restarts)
            config = config.model_copy(update={"ckpt_path": str(last)})
    if node is not None and node.rank:
        return None
    return runs.read_run(run_dir).metrics.get(config.checkpoint.monitor)


def _modified_ns(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def _run(config: Config, n_processes: int, n_nodes: int, node: Node | None) -> None:
    run_dir = Path(config.run_dir)
    tree = run_dir / (CONFIG if node is None else f"{node.rank}.{CONFIG}")
    storage.write_text(tree, yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    with tempfile.TemporaryDirectory() as logs, _divided_cores(n_processes), _restored_signal_handlers():
        settings = LaunchConfig(
            min_nodes=n_nodes, max_nodes=n_nodes, nproc_per_node=n_processes, run_id="sodaops" if node else uuid.uuid4().hex,
            max_restarts=0, logs_specs=DefaultLogsSpecs(log_dir=logs), shutdown_timeout=_END_S,
            rdzv_backend="static" if node else "c10d",
            rdzv_configs={"timeout": JOIN_S, **({"rank": node.rank} if node else {})},
            rdzv_endpoint=f"{node.address}:{node.port}" if node else "127.0.0.1:0", local_addr=None if node else "127.0.0.1",
        )  # fmt: skip
        try:
            elastic_launch(settings, sys.executable)("-m", "sodaops.cli", "train", "--params", str(tree))
        except ChildFailedError as error:
            _raise_first_failure(error, run_dir, n_processes * n_nodes)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt(resume_hint(run_dir)) from None
            raise Terminated(resume_hint(run_dir)) from None
        except (RendezvousError, DistError) as error:
            raise TrainingError(
                f"not all {n_nodes} machines reached {settings.rdzv_endpoint} within {JOIN_S} s "
                f"({str(error).splitlines()[0][:200]}). Check that all run, and that the port is open between them."
            ) from error


def _raise_first_failure(error: ChildFailedError, run_dir: Path, n_all: int) -> None:
    """Raises the error of the process that caused the others to fail."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, float]:
        # First those killed from outside, then those with an error, then those that aborted, as gloo may when its peer is
        # gone; last those that the agent terminated.
        code = item[1].exitcode
        return {-signal.SIGTERM: 3, -signal.SIGABRT: 2}.get(code, int(code > 0)), item[1].timestamp

    rank, failure = min(error.failures.items(), key=order)
    if (run_dir / runs.RECORD).is_file():
        fields = runs.read_run(run_dir).fields
        if fields.get("status") == "pruned":
            raise PrunedError(fields["error"]) from None
    hint, process = resume_hint(run_dir), f"process {rank} of {n_all}"
    if failure.exitcode in (130, 143):
        raise (KeyboardInterrupt if failure.exitcode == 130 else Terminated)(hint) from None
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        raise KilledError(f"{process} was killed by {name}, and the others were ended; {hint}.") from None
    raise TrainingError(
        f"{process} ended with exit code {failure.exitcode}, and the others were ended; its error is above; {hint}."
    ) from None


@contextlib.contextmanager
def _divided_cores(n_processes: int) -> Iterator[None]:
    """Divides the cores among the processes, to each of which the agent would give one thread; silences the agent's log."""
    cores = max(1, n_cores() // n_processes)
    previous = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = previous or str(cores)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # launch raises the error
    try:
        yield
    finally:
        if previous is None:
            del os.environ["OMP_NUM_THREADS"]


@contextlib.contextmanager
def _restored_signal_handlers() -> Iterator[None]:
    """Restores the signal handlers afterwards, which the agent replaces."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
