"""Load profiles for locust: `make load PROFILE=steady`, burst, soak, overload or smoke, against a server that it starts.

steady    16 clients for a minute
burst     4 clients, and 64 for five seconds out of fifteen, for a minute
soak      8 clients for ten minutes, with the memory before and after
overload  clients that send twice what the service can do, for ten minutes: it must refuse with 429 and not grow
smoke     4 clients for ten seconds, for CI: no request may fail
"""

import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from locust import FastHttpUser, LoadTestShape, task

REPO = Path(__file__).resolve().parents[1]
PORT = 8972
# seconds until -> clients
PROFILES = {
    "steady": [(60, 16)],
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
    """Asks one text after another; in overload, as many as make two of it more than the service can do."""

    host = f"http://127.0.0.1:{PORT}"
    n_texts = 16 if PROFILE == "overload" else 1

    @task
    def predict(self) -> None:
        """One request; 429 is what overload is there for."""
        body = {"texts": random.sample(texts(), self.n_texts)}
        with self.client.post("/predict/batch", json=body, catch_response=True) as response:
            if response.status_code == 429 and PROFILE == "overload":
                response.request_meta["name"] = "refused with 429"  # a row of its own
                response.success()
                time.sleep(0.05)


class Shape(LoadTestShape):
    """How many clients there are at a time."""

    def tick(self) -> tuple[int, float] | None:
        """Clients, and how many of them start in a second."""
        for until, n_clients in PROFILES[PROFILE]:
            if self.get_run_time() < until:
                return n_clients, 64
        return None


def main() -> int:
    """Starts the service, runs locust, and prints what came of it."""
    if PROFILE not in PROFILES:
        raise SystemExit(f"PROFILE={PROFILE}: expected one of {', '.join(PROFILES)}.")
    bundle = Path(os.environ.get("BUNDLE", REPO / "artifacts/train/bundle"))
    if not bundle.exists() or not (REPO / "data/processed/tweets/train.parquet").exists():
        raise SystemExit(f"{bundle}, or the tweets' splits: not there; make them with `make repro`.")
    env = {**os.environ, "SODAOPS_BUNDLE": str(bundle), "SODAOPS_PORT": str(PORT)}
    server = subprocess.Popen([sys.executable, "-m", "sodaops.serving"], env=env, stdout=subprocess.DEVNULL)
    try:
        time.sleep(3)
        if server.poll() is not None:
            return server.returncode
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
    asked = rows["/predict/batch"]
    refused = int(rows.get("refused with 429", {"Request Count": 0})["Request Count"])
    print(
        f"{PROFILE}: {float(asked['Requests/s']):.0f} requests/s, p50 {asked['50%']} ms, p95 {asked['95%']} ms, "
        f"p99 {asked['99%']} ms, {asked['Request Count']} requests, {refused} refused with 429, "
        f"{asked['Failure Count']} errors, memory {before:.0f} -> {after:.0f} MB"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
