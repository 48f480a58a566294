"""Compares SoDaOps with other ways to serve the same model, on one machine, in one run, with real tweets.

Each server has an environment of its own in .venv-bench, made at the first run. The servers take turns in every round; the
table shows medians over the rounds. Needs wrk (Debian package).
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow.parquet as pq
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
ENVS = REPO / ".venv-bench"
PORT = 8970
CONNECTIONS = (1, 16, 64)
PACKAGES = {
    "serve": ["-e", f"{REPO}[serve]"],
    "pipeline": ["torch", "transformers", "fastapi", "uvicorn", "uvloop", "httptools"],
    "litserve": ["litserve==0.2.19", "onnxruntime", "tokenizers"],
    "bentoml": ["bentoml==1.4.39", "onnxruntime", "tokenizers"],
}


class Server(NamedTuple):
    """One way to serve the model."""

    name: str
    env: str
    command: tuple[str, ...]
    settings: dict[str, str]
    method: str = "GET"  # POST sends {"text": TEXT}, LIST {"text": [TEXT]}


def list_servers(bundle: Path, scratch: Path) -> list[Server]:
    """The servers to compare."""
    ours = ("python", "-m", "sodaops.serving")
    basic = {"SODAOPS_BUNDLE": str(bundle), "SODAOPS_PORT": str(PORT)}
    n_cores = str(len(os.sched_getaffinity(0)))
    other = {"BUNDLE": str(bundle), "PORT": str(PORT), "N_CORES": n_cores, "ONNX": "model.int8.onnx"}

    def uvicorn(module: str) -> tuple[str, ...]:
        return "uvicorn", f"{module}:app", "--port", str(PORT), "--log-level", "warning"

    lit = ("python", "litserve_api.py")
    bento = ("bentoml", "serve", "bentoml_api:Classifier", "--port", str(PORT))
    return [
        Server("SoDaOps, int8", "serve", ours, basic),
        Server("SoDaOps, int8, request log", "serve", ours, {**basic, "SODAOPS_REQUEST_LOG": str(scratch / "log")}),
        Server("SoDaOps, float32", "serve", ours, {**basic, "SODAOPS_VARIANT": "float32"}),
        Server("FastAPI + transformers pipeline", "pipeline", uvicorn("pipeline_api"), {"HF_MODEL": str(scratch / "hf")}),
        Server("FastAPI + ONNX Runtime, barest, same int8 ONNX", "serve", uvicorn("barest_api"), other),
        Server("LitServe, same int8 ONNX", "litserve", lit, {**other, "N_WORKERS": "1", "MAX_BATCH": "1"}, "POST"),
        Server("LitServe, tuned", "litserve", lit, {**other, "N_WORKERS": n_cores, "MAX_BATCH": "4"}, "POST"),
        Server("BentoML, same int8 ONNX", "bentoml", bento, other, "LIST"),
    ]


def install(env: str) -> float:
    """Makes an environment if it does not exist, and returns its size in megabytes."""
    folder = ENVS / env
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if not (folder / ".done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints = ["-c", str(REPO / "constraints.txt")] if env != "bentoml" else []
        for package in PACKAGES[env][:1] if env == "pipeline" else []:  # torch first and alone
            subprocess.run([*pip, *constraints, package], check=True)
        subprocess.run([*pip, *constraints, *PACKAGES[env]], check=True)
        (folder / ".done").touch()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


class Running:
    """A running server, and the time to its first answer."""

    def __init__(self, server: Server, text: str) -> None:
        bin_dir = ENVS / server.env / "bin"
        env = {
            **os.environ,
            **server.settings,
            "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
            "BENTOML_DO_NOT_TRACK": "1",
        }
        env.pop("SODAOPS_TRACEBACK", None)
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [str(bin_dir / server.command[0]), *server.command[1:]], cwd=HERE, env=env, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not self._answers(server, text):
            if self.process.poll() is not None or time.perf_counter() - self.began > 120:
                self.stop()
                raise SystemExit(f"{server.name}: no answer within {time.perf_counter() - self.began:.0f} s")
            time.sleep(0.01)
        self.cold_s = time.perf_counter() - self.began

    def _answers(self, server: Server, text: str) -> bool:
        url = f"http://127.0.0.1:{PORT}/predict"
        if server.method == "GET":
            request = urllib.request.Request(f"{url}?{urllib.parse.urlencode({'text': text})}")
        else:
            body = {"text": [text] if server.method == "LIST" else text}
            request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        try:
            return b"label" in urllib.request.urlopen(request, timeout=30).read()
        except (urllib.error.URLError, OSError):
            return False

    def resident_mb(self) -> float:
        """Memory of the process tree; pages shared by its processes count once (PSS)."""
        total = 0
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
        return total / 1e6

    def stop(self) -> None:
        """Ends the server and all processes that it started."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        time.sleep(0.3)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # LitServe does not end its workers
        except ProcessLookupError:
            return


def run_wrk(server: Server, scratch: Path, connections: int, seconds: int) -> dict[str, float]:
    """One run of wrk: requests per second, and p50 and p99 in milliseconds."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "--latency"]
    command += ["-s", str(scratch / f"{server.method}.lua"), f"http://127.0.0.1:{PORT}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise SystemExit(f"{server.name}, {connections} connections: {output}")
    unit = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    quantiles = {p: float(v) * unit[u] for p, v, u in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", output)}
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    return {"rps": float(rate[1]), "p50_ms": quantiles["50"], "p99_ms": quantiles["99"]}


def measure(server: Server, scratch: Path, text: str, seconds: int) -> dict[str, float]:
    """Starts a server, measures it under load, and ends it."""
    with contextlib.closing(socket.socket()) as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", PORT))  # fails if another server listens there, which would be measured instead
    cold_s = []
    for _ in range(2):
        started = Running(server, text)
        started.stop()
        cold_s.append(started.cold_s)
    running = Running(server, text)
    try:
        measured = {"cold_s": statistics.median([*cold_s, running.cold_s])}
        run_wrk(server, scratch, 4, 2)  # warm-up
        for connections in CONNECTIONS:
            for key, value in run_wrk(server, scratch, connections, seconds).items():
                measured[f"{key}_{connections}"] = value
        return {**measured, "memory_mb": running.resident_mb()}
    finally:
        running.stop()


def write_scripts(scratch: Path, texts: list[str]) -> None:
    """Writes wrk's scripts, which send each text in turn, by GET or as JSON."""
    (scratch / "GET.txt").write_text("\n".join("/predict?" + urllib.parse.urlencode({"text": text}) for text in texts))
    (scratch / "POST.txt").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (scratch / "LIST.txt").write_text("\n".join(json.dumps({"text": [text]}) for text in texts))
    post = 'wrk.format("POST", "/predict", {["content-type"]="application/json"}, lines[i])'
    for method, ask in (("GET", 'wrk.format("GET", lines[i])'), ("POST", post), ("LIST", post)):
        (scratch / f"{method}.lua").write_text(
            f'local lines = {{}}\nfor line in io.lines("{scratch / method}.txt") do lines[#lines + 1] = line end\n'
            f"local i = 0\nrequest = function() i = i % #lines + 1; return {ask} end\n"
        )


def write_checkpoint(bundle: Path, folder: Path) -> None:
    """Saves the bundle's encoder as a transformers checkpoint. Its head has random weights, so the pipeline's labels are
    wrong, but its speed and size are those of the same encoder."""
    code = (
        "import sys; from sodaops.bundle.save import load_bundle; from transformers import *;"
        "b = load_bundle(sys.argv[1]); c = b.model.transformer.config; c.num_labels = len(b.info.labels);"
        "m = AutoModelForSequenceClassification.from_config(c);"
        "m.base_model.load_state_dict(b.model.transformer.state_dict(), strict=False); m.save_pretrained(sys.argv[2]);"
        "PreTrainedTokenizerFast(tokenizer_object=b.tokenizer, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]',"
        " sep_token='[SEP]', model_max_length=b.info.max_tokens).save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle), str(folder)], check=True, capture_output=True)


def upper_bound(bundle: Path, texts: list[str]) -> float:
    """Texts per second of ONNX Runtime alone, on all cores, with four tokenised texts of similar length per call."""
    from concurrent.futures import ThreadPoolExecutor

    from sodaops.inference.predictor import Predictor

    predictor = Predictor(bundle, n_threads=1)
    rows = [predictor.encode(predictor.clean(text)) for text in texts]
    rows.sort(key=len)
    batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(predictor.run, batches[:20]))
        began = time.perf_counter()
        list(pool.map(predictor.run, batches))
        return len(rows) / (time.perf_counter() - began)


def main() -> None:
    """Measures, prints the table, and writes it to a file if args."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=REPO / "artifacts/train/bundle")
    parser.add_argument("--texts", type=Path, default=REPO / "data/processed/tweets/train.parquet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    for path, fix in ((args.bundle, "train it with `make repro`"), (args.texts, "make them with `make repro`")):
        if not path.exists():
            raise SystemExit(f"{path} does not exist; {fix}.")
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; run `apt-get install wrk` on Debian.")
    scratch = ENVS / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    texts = pq.read_table(args.texts)["text"].to_pylist()
    write_scripts(scratch, texts)
    write_checkpoint(args.bundle, scratch / "hf")
    servers = list_servers(args.bundle.resolve(), scratch)
    sizes = {env: install(env) for env in tqdm(PACKAGES, desc="environments")}
    results: dict[str, dict[str, list[float]]] = {server.name: {} for server in servers}
    limits = []
    with tqdm(total=args.rounds * len(servers), desc="measuring", unit="server") as bar:
        for _ in range(args.rounds):
            limits.append(upper_bound(args.bundle, texts[:800]))
            for server in servers:
                measured = measure(server, scratch, texts[0], args.seconds)
                for key, value in measured.items():
                    results[server.name].setdefault(key, []).append(value)
                bar.update()
    table = format_table(servers, results, sizes, statistics.median(limits), args.rounds)
    print(table)
    if args.write:
        args.write.write_text(table, encoding="utf-8")


def format_table(servers: list[Server], results: dict, sizes: dict[str, float], limit: float, rounds: int) -> str:
    """The table as Markdown, and the ratios that follow from it."""
    medians = {name: {key: statistics.median(values) for key, values in keys.items()} for name, keys in results.items()}
    lines = [
        f"Requests/s (p50 / p99 in ms) by connections: medians of {rounds} interleaved rounds, "
        f"{len(os.sched_getaffinity(0))} CPU cores shared with wrk. Cold: from start to first answer, median of three starts. "
        "Memory: of the process tree after the load (PSS). Install: size of the environment.",
        "",
        "| | 1 | 16 | 64 | cold | memory | install |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for server in servers:
        m = medians[server.name]
        cells = [f"{m[f'rps_{c}']:.0f} ({m[f'p50_ms_{c}']:.0f} / {m[f'p99_ms_{c}']:.0f})" for c in CONNECTIONS]
        cells += [f"{m['cold_s']:.2f} s", f"{m['memory_mb']:.0f} MB", f"{sizes[server.env]:.0f} MB"]
        lines.append(f"| {server.name} | {' | '.join(cells)} |")
    ours, log, _, pipe, _, lit, lits, bento = (medians[server.name] for server in servers)
    faster = {name: ours["rps_16"] / other["rps_16"] for name, other in (("pipe", pipe), ("lit", lit), ("lits", lits))}
    lines += [
        "",
        f"ONNX Runtime alone (int8, batches of four, all cores): {limit:.0f} texts/s; the service reaches "
        f"{ours['rps_16'] / limit:.0%} of that at 16 connections.",
        "",
        f"At 16 connections the service answers {faster['pipe']:.1f} times as many requests as the pipeline, "
        f"{faster['lit']:.1f} times LitServe, {faster['lits']:.1f} times LitServe tuned (a worker per core, batches of 4, 2 ms "
        f"of waiting; ONNX Runtime alone reaches {limit / lits['rps_16']:.1f} times), "
        f"{ours['rps_16'] / bento['rps_16']:.1f} times BentoML. It starts {pipe['cold_s'] / ours['cold_s']:.1f} times as fast "
        f"as the pipeline. The request log costs {1 - log['rps_16'] / ours['rps_16']:.0%} of the requests.",
        "",
    ]
    return "\n".join(["# Serving, measured", "", *lines])


if __name__ == "__main__":
    main()
