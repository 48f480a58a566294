"""Attacks on the service by slow and oversized requests: `python benchmarks/attacks.py BUNDLE [REPO]`.

Starts the service of a working copy (default: this one) with 1,024 open files allowed. During each attack another process asks
/healthz every 50 ms. Prints, for each attack, the checks that failed, the slowest one, and the memory before and after.
"""

import asyncio
import contextlib
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

PORT = 8973
N_CLIENTS = 2000
SECONDS = 15
HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
SLOW = {
    "slow heads": (HEAD + b"X: ", b"x"),
    "silent clients": (b"", b""),
    "slow bodies": (POST, b" "),
    "empty lines": (b"\r\n", b"\r\n"),
}
FLOODS = {"a header of 100 MB": [b"x" * 65_536] * 1526, "headers of 100 MB": [b"X: y\r\n" * 10_000] * 1667}


async def hold_connections(begin: bytes, drip: bytes) -> None:
    """Opens many connections, and sends a little on each of them every second."""

    async def connect() -> asyncio.StreamWriter | None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", PORT)
            writer.write(begin)
            return writer
        return None

    writers = [writer for writer in await asyncio.gather(*(connect() for _ in range(N_CLIENTS))) if writer]
    for _ in range(SECONDS):
        for writer in writers:
            if not writer.is_closing():
                writer.write(drip)
        await asyncio.sleep(1)
    for writer in writers:
        writer.close()


async def flood(chunks: list[bytes]) -> None:
    """Sends chunks of a head as fast as the service takes them."""
    _, writer = await asyncio.open_connection("127.0.0.1", PORT)
    writer.write(HEAD + b"X: ")
    with contextlib.suppress(OSError):
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()


async def pipeline() -> None:
    """Sends thousands of requests at once on each of twenty connections, and reads no answer."""
    writers = [(await asyncio.open_connection("127.0.0.1", PORT))[1] for _ in range(20)]
    for writer in writers:
        writer.write((HEAD + b"\r\n") * 20_000)
    await asyncio.sleep(5)


def check_health(stop: Connection) -> None:
    """Asks /healthz until a message arrives; sends the number of checks, those that failed, and the slowest in ms."""
    seconds, failed = [], 0
    while not stop.poll(0.05):
        began = time.perf_counter()
        try:
            with socket.create_connection(("127.0.0.1", PORT), timeout=5) as client:
                client.sendall(HEAD + b"Connection: close\r\n\r\n")
                failed += b" 200 " not in client.recv(4096)[:20]
        except OSError:
            failed += 1
        seconds.append(time.perf_counter() - began)
    stop.send((len(seconds), failed, 1000 * max(seconds, default=0.0)))


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def measure(name: str, attack: Callable[[], Awaitable[None]], pid: int) -> None:
    """Runs an attack and prints its line."""
    receiver, sender = multiprocessing.Pipe()
    checker = multiprocessing.Process(target=check_health, args=(sender,))
    before = memory_mb(pid)
    checker.start()
    asyncio.run(attack())
    after = memory_mb(pid)
    receiver.send(None)
    n_checks, n_failed, slowest_ms = receiver.recv()
    checker.join()
    print(
        f"{name:20} {n_failed:3} of {n_checks} failed, slowest {slowest_ms:5.0f} ms, memory {before:.0f} -> {after:.0f} MB",
        flush=True,
    )


def main(bundle: str, repo: str = str(Path(__file__).resolve().parents[1])) -> None:
    """Starts the service and runs all attacks."""
    env = {**os.environ, "SODAOPS_BUNDLE": str(Path(bundle).resolve()), "SODAOPS_PORT": str(PORT), "PYTHONPATH": repo}
    service = subprocess.Popen(
        [sys.executable, "-m", "sodaops.serving"], env=env, cwd=repo, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)),
    )  # fmt: skip
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    try:
        while socket.socket().connect_ex(("127.0.0.1", PORT)):
            assert service.poll() is None, "the service did not start"
            time.sleep(0.1)
        for name, (begin, drip) in SLOW.items():
            measure(name, lambda begin=begin, drip=drip: hold_connections(begin, drip), service.pid)
        for name, chunks in FLOODS.items():
            measure(name, lambda chunks=chunks: flood(chunks), service.pid)
        measure("pipelined requests", pipeline, service.pid)
    finally:
        service.kill()
        service.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
