"""Load test with locust: `make load PROFILE=steady`, burst, soak, overload or smoke; starts the server itself.

steady    16 clients for a minute
burst     4 clients, and 64 for five seconds out of fifteen, for a minute
soak      8 clients for ten minutes; prints the memory before and after
overload  64 clients that send more than the service can do, for ten minutes: it must answer 429 and not grow
smoke     4 clients for ten seconds, for CI: no request may fail
"""

import csv
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from locust import FastHttpUser, LoadTestShape, task

REPO = Path(__file__).resolve().parents[1]
PORT = 8972
PROFILES = {
    "steady": [(60, 16)],  # end in seconds, number of clients
    "burst": [(until, 64 if until % 15 == 0 else 4) for until in sorted([*range(10, 61, 15), *range(15, 61, 15)])],
    "soak": [(600, 8)],
    "overload": [(600, 64)],
    "smoke": [(10, 4)],
}
PROFILE = os.environ.get("PROFILE", "steady")
_TEXTS: list[str] = []


def texts() -> list[str]:
    """The training tweets."""
    if not _TEXTS:
        _TEXTS.extend(pq.read_table(REPO / "data/processed/tweets/train.parquet")["text"].to_pylist())
    return _TEXTS


class Client(FastHttpUser):
    """Sends one text after another; in overload, many texts at a time."""

    host = f"http://127.0.0.1:{PORT}"
    n_texts = 16 if PROFILE == "overload" else 1

    @task
    def predict(self) -> None:
        """One request; in overload, 429 is no failure."""
        body = {"texts": random.sample(texts(), self.n_texts)}
        with self.client.post("/predict/batch", json=body, catch_response=True) as response:
            if response.status_code == 429 and PROFILE == "overload":
                response.request_meta["name"] = "refused with 429"  # a row of its own in the statistics
                response.success()
                time.sleep(0.05)


class Shape(LoadTestShape):
    """Number of clients over time."""

    def tick(self) -> tuple[int, float] | None:
        """Number of clients, and how many of them start per second."""
        for until, n_clients in PROFILES[PROFILE]:
            if self.get_run_time() < until:
                return n_clients, 64
        return None


def is_ready() -> bool:
    """Whether the service accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) == 0


def main() -> int:
    """Starts the service, runs locust, and prints the result."""
    if PROFILE not in PROFILES:
        raise SystemExit(f"PROFILE={PROFILE}: expected one of {', '.join(PROFILES)}.")
    bundle = Path(os.environ.get("BUNDLE", REPO / "artifacts/train/bundle"))
    if not bundle.exists() or not (REPO / "data/processed/tweets/train.parquet").exists():
        raise SystemExit(f"{bundle} or data/processed/tweets is missing; make them with `make repro`.")
    env = {**os.environ, "SODAOPS_BUNDLE": str(bundle), "SODAOPS_PORT": str(PORT)}
    server = subprocess.Popen([sys.executable, "-m", "sodaops.serving"], env=env, stdout=subprocess.DEVNULL)
    try:
        while not is_ready():
            if server.poll() is not None:
                return server.returncode
            time.sleep(0.1)
        before = psutil.Process(server.pid).memory_info().rss / 1e6
        out = REPO / "outputs/load"
        out.mkdir(parents=True, exist_ok=True)
        command = ["locust", "-f", __file__, "--headless", "--only-summary", "--csv", str(out / PROFILE)]
        command[0] = str(Path(sys.executable).with_name("locust"))
        code = subprocess.run([*command, "--stop-timeout", "10"], env=os.environ).returncode
        after = psutil.Process(server.pid).memory_info().rss / 1e6
    finally:
        server.terminate()
        server.wait(30)
    with (out / f"{PROFILE}_stats.csv").open() as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    requests = rows["/predict/batch"]
    refused = int(rows.get("refused with 429", {"Request Count": 0})["Request Count"])
    print(
        f"{PROFILE}: {float(requests['Requests/s']):.0f} requests/s, p50 {requests['50%']} ms, p95 {requests['95%']} ms, "
        f"p99 {requests['99%']} ms, {requests['Request Count']} requests, {refused} refused with 429, "
        f"{requests['Failure Count']} errors, memory {before:.0f} -> {after:.0f} MB"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
