"""What a shadow costs the live answers, and whether a canary keeps its share.

    python benchmarks/trust_shadow.py TEACHER STUDENT [--rounds N] [--seconds S] [--requests N]

Both are bundles; the student is the challenger (`serve.shadow`) of the teacher. Needs wrk (Debian package).

- the same texts with the same request ids to the service with and without the shadow: answers that are equal byte for byte
- in turns, with and without: requests per second and p99 at full load (16 connections), p99 at half of the rate without the
  shadow, and the share of texts that the shadow dropped; the shadow gets all requests
- canary 0.1: requests answered by the challenger, and the 99 % interval of a binomial distribution; the same ids again
"""

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow.csv
from prometheus_client.parser import text_string_to_metric_families
from serving import bench

REPO = Path(__file__).resolve().parents[1]
URL = f"http://127.0.0.1:{bench.PORT}"
SHARE = 0.1


@contextlib.contextmanager
def service(bundle: Path, **settings: object) -> Iterator[httpx.Client]:
    """A running service, and a client of it."""
    variables = {"bundle": bundle, "port": bench.PORT, **settings}
    env = {**os.environ, **{f"SODAOPS_{key.upper()}": str(value) for key, value in variables.items()}}
    process = subprocess.Popen([sys.executable, "-m", "sodaops.serving"], env=env, cwd=REPO, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=URL, timeout=60) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    client.get("/readyz").raise_for_status()
                    break
                if process.poll() is not None:
                    raise SystemExit(f"the service ended with exit code {process.returncode}")
                time.sleep(0.05)
            time.sleep(3)  # the shadow's process loads its bundle
            yield client
    finally:
        process.terminate()
        process.wait(60)


def answers(client: httpx.Client, texts: list[str], ids: list[str]) -> list[bytes]:
    """The bodies of the responses to requests with these ids."""
    ask = lambda text, name: client.post("/predict", json={"text": text}, headers={"x-request-id": name})  # noqa: E731
    return [ask(text, name).raise_for_status().content for text, name in zip(texts, ids, strict=True)]


def counted(client: httpx.Client) -> tuple[float, float]:
    """Texts that the shadow answered, and that it dropped."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    answered = sum(s.value for s in samples if s.name == "sodaops_compared_seconds_count" and s.labels["role"] == "shadow")
    return answered, sum(s.value for s in samples if s.name == "sodaops_shadow_dropped_total")


def load(client: httpx.Client, scratch: Path, script: str, seconds: int) -> dict[str, float]:
    """A run of wrk at 16 connections: rps, p50_ms, p99_ms, and the share of texts that the shadow dropped."""
    server = bench.Server("SoDaOps", "", (), {}, script)
    before = counted(client)
    measured = bench.run_wrk(server, scratch, 16, seconds)
    answered, dropped = (now - then for now, then in zip(counted(client), before, strict=True))
    return {**measured, "dropped": dropped / max(1.0, answered + dropped)}


def write_half(scratch: Path, rate: float, p50_ms: float) -> None:
    """Writes a script for wrk that pauses so that 16 connections send half of a rate, at random times."""
    pause_ms = max(1.0, 16 / (rate / 2) * 1000 - p50_ms / 4)
    half = f"\nfunction delay() return math.random(0, {2 * pause_ms:.0f}) end\n"
    (scratch / "HALF.lua").write_text((scratch / "GET.lua").read_text() + half)


def compare(teacher: Path, student: Path, texts: list[str], rounds: int, seconds: int, scratch: Path) -> None:
    """Prints the answers that are equal, and the table of both sides."""
    sides = {"without": {}, "with a shadow": {"shadow": student}}
    bodies, results = {}, {side: [] for side in sides}
    for number in range(rounds):
        for side, settings in sides.items():
            with service(teacher, **settings) as client:
                if not number:
                    bodies[side] = answers(client, texts[:300], [f"r{i}" for i in range(300)])
                bench.run_wrk(bench.Server("", "", (), {}), scratch, 16, 2)  # warm-up
                full = load(client, scratch, "GET", seconds)
                if not (scratch / "HALF.lua").exists():
                    write_half(scratch, full["rps"], full["p50_ms"])
                time.sleep(2)
                results[side].append({"full": full, "half": load(client, scratch, "HALF", seconds)})
    equal = sum(one == two for one, two in zip(*bodies.values(), strict=True))
    print(f"answers equal byte for byte: {equal} of {len(texts[:300])}\n")
    print(
        f"| medians of {rounds} rounds | requests/s, full load | p99 ms | dropped | requests/s, half load | p99 ms | dropped |"
    )
    print("| --- " * 7 + "|")
    for side, runs in results.items():
        cells = [
            statistics.median(run[load][key] for run in runs)
            for load in ("full", "half")
            for key in ("rps", "p99_ms", "dropped")
        ]
        print(
            f"| {side} | " + " | ".join(f"{cell:.0%}" if i % 3 == 2 else f"{cell:.1f}" for i, cell in enumerate(cells)) + " |"
        )
    for kind, key in (("half", "p99_ms"), ("full", "rps")):
        ratios = [own[kind][key] / other[kind][key] for own, other in zip(*reversed(results.values()), strict=True)]
        print(
            f"\n{key} at {kind} load, with / without: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def binomial_interval(n: int, share: float, level: float = 0.99) -> tuple[int, int]:
    """The smallest counts at which the distribution function reaches both tails' quantiles."""
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    probs = [math.exp(log + k * math.log(share) + (n - k) * math.log1p(-share)) for k, log in enumerate(logs)]
    ends, total = [], 0.0
    for k, prob in enumerate(probs):
        total += prob
        if len(ends) < 2 and total >= ((1 - level) / 2, (1 + level) / 2)[len(ends)]:
            ends.append(k)
    return ends[0], ends[1]


def canary(teacher: Path, student: Path, texts: list[str], n: int) -> None:
    """Prints how many of n requests the challenger answered."""
    with service(teacher, shadow=student, shadow_share=0, canary=SHARE) as client:
        own = client.get("/info").json()["bundle_version"]
        asked, ids = [texts[i % len(texts)] for i in range(n)], [os.urandom(16).hex() for _ in range(n)]
        chosen = [[own.encode() not in body for body in answers(client, asked, ids)] for _ in range(2)]
    low, high = binomial_interval(n, SHARE)
    same = chosen[0] == chosen[1]
    print(f"\ncanary {SHARE}: {sum(chosen[0])} of {n} requests (99 % interval: {low} to {high}); the same again: {same}")


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path, metavar="TEACHER")
    parser.add_argument("student", type=Path, metavar="STUDENT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=3000, help="of the canary")
    args = parser.parse_args()
    texts = pyarrow.csv.read_csv(REPO / "data/raw/tweets.csv")["text"].to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        bench.write_scripts(Path(folder), texts)
        compare(args.teacher.resolve(), args.student.resolve(), texts, args.rounds, args.seconds, Path(folder))
    canary(args.teacher.resolve(), args.student.resolve(), texts, args.requests)


if __name__ == "__main__":
    main()
