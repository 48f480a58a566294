"""Ours beside what a user would take instead: one machine, one run, the same model, real tweets.

Each side has an environment of its own, with what it needs and no more. The sides take turns in every round; the table
gives medians over the rounds. Needs wrk (Debian's package), and makes .venv-bench the first time.
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


class Side(NamedTuple):
    """One way to serve."""

    name: str
    env: str
    command: tuple[str, ...]
    settings: dict[str, str]
    method: str = "GET"  # POST sends {"text": TEXT}, LIST {"text": [TEXT]}


def sides(bundle: Path, scratch: Path) -> list[Side]:
    """What is compared."""
    ours = ("python", "-m", "sodaops.serving")
    basic = {"SODAOPS_BUNDLE": str(bundle), "SODAOPS_PORT": str(PORT)}
    n_cores = str(len(os.sched_getaffinity(0)))
    other = {"BUNDLE": str(bundle), "PORT": str(PORT), "N_CORES": n_cores, "ONNX": "model.int8.onnx"}

    def uvicorn(module: str) -> tuple[str, ...]:
        return "uvicorn", f"{module}:app", "--port", str(PORT), "--log-level", "warning"

    lit = ("python", "litserve_api.py")
    bento = ("bentoml", "serve", "bentoml_api:Classifier", "--port", str(PORT))
    return [
        Side("SoDaOps, int8", "serve", ours, basic),
        Side("SoDaOps, int8, request log", "serve", ours, {**basic, "SODAOPS_REQUEST_LOG": str(scratch / "log")}),
        Side("SoDaOps, float32", "serve", ours, {**basic, "SODAOPS_VARIANT": "float32"}),
        Side("FastAPI + transformers pipeline", "pipeline", uvicorn("pipeline_api"), {"HF_MODEL": str(scratch / "hf")}),
        Side("FastAPI + ONNX Runtime, barest, same int8 ONNX", "serve", uvicorn("barest_api"), other),
        Side("LitServe, same int8 ONNX", "litserve", lit, {**other, "N_WORKERS": "1", "MAX_BATCH": "1"}, "POST"),
        Side("LitServe, tuned", "litserve", lit, {**other, "N_WORKERS": n_cores, "MAX_BATCH": "4"}, "POST"),
        Side("BentoML, same int8 ONNX", "bentoml", bento, other, "LIST"),
    ]


def install(env: str) -> float:
    """Makes an environment unless it is there, and returns its size in megabytes."""
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
    """A side, started, and how long its first answer took."""

    def __init__(self, side: Side, text: str) -> None:
        bin_dir = ENVS / side.env / "bin"
        env = {**os.environ, **side.settings, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}", "BENTOML_DO_NOT_TRACK": "1"}
        env.pop("SODAOPS_TRACEBACK", None)
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [str(bin_dir / side.command[0]), *side.command[1:]], cwd=HERE, env=env, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not self._answers(side, text):
            if self.process.poll() is not None or time.perf_counter() - self.began > 120:
                self.stop()
                raise SystemExit(f"{side.name}: no answer within {time.perf_counter() - self.began:.0f} s")
            time.sleep(0.01)
        self.cold_s = time.perf_counter() - self.began

    def _answers(self, side: Side, text: str) -> bool:
        url = f"http://127.0.0.1:{PORT}/predict"
        if side.method == "GET":
            request = urllib.request.Request(f"{url}?{urllib.parse.urlencode({'text': text})}")
        else:
            body = {"text": [text] if side.method == "LIST" else text}
            request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        try:
            return b"label" in urllib.request.urlopen(request, timeout=30).read()
        except (urllib.error.URLError, OSError):
            return False

    def resident_mb(self) -> float:
        """Memory of the whole process tree; pages shared between its processes count once (PSS)."""
        total = 0
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
        return total / 1e6

    def stop(self) -> None:
        """Ends it and every process that it started."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        time.sleep(0.3)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # LitServe leaves workers behind
        except ProcessLookupError:
            return


def load(side: Side, scratch: Path, connections: int, seconds: int) -> dict[str, float]:
    """One run of wrk: requests a second, and p50 and p99 in milliseconds."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "--latency"]
    command += ["-s", str(scratch / f"{side.method}.lua"), f"http://127.0.0.1:{PORT}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise SystemExit(f"{side.name}, {connections} connections: {output}")
    unit = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    quantiles = {p: float(v) * unit[u] for p, v, u in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", output)}
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    return {"rps": float(rate[1]), "p50_ms": quantiles["50"], "p99_ms": quantiles["99"]}


def measure(side: Side, scratch: Path, text: str, seconds: int) -> dict[str, float]:
    """One side, started, loaded and ended."""
    with contextlib.closing(socket.socket()) as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", PORT))  # else another server's answers would be measured
    cold_s = []
    for _ in range(2):
        started = Running(side, text)
        started.stop()
        cold_s.append(started.cold_s)
    running = Running(side, text)
    try:
        measured = {"cold_s": statistics.median([*cold_s, running.cold_s])}
        load(side, scratch, 4, 2)  # warm
        for connections in CONNECTIONS:
            for key, value in load(side, scratch, connections, seconds).items():
                measured[f"{key}_{connections}"] = value
        return {**measured, "memory_mb": running.resident_mb()}
    finally:
        running.stop()


def write_scripts(scratch: Path, texts: list[str]) -> None:
    """wrk's scripts: every text in turn, by GET or as JSON."""
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
    """The bundle's encoder as a transformers checkpoint. Its head is BERT's own, with random weights: the pipeline's
    labels mean nothing here, its speed and size are those of the same encoder."""
    code = (
        "import sys; from sodaops.bundle.save import load_bundle; from transformers import *;"
        "b = load_bundle(sys.argv[1]); c = b.model.transformer.config; c.num_labels = len(b.info.labels);"
        "m = AutoModelForSequenceClassification.from_config(c);"
        "m.base_model.load_state_dict(b.model.transformer.state_dict(), strict=False); m.save_pretrained(sys.argv[2]);"
        "PreTrainedTokenizerFast(tokenizer_object=b.tokenizer, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]',"
        " sep_token='[SEP]', model_max_length=b.info.max_tokens).save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle), str(folder)], check=True, capture_output=True)


def ceiling(bundle: Path, texts: list[str]) -> float:
    """Texts a second through the ONNX Runtime call alone: every core, one text a call, all tokenised before."""
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
    """Measures, prints the table, and writes it where told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=REPO / "artifacts/train/bundle")
    parser.add_argument("--texts", type=Path, default=REPO / "data/processed/tweets/train.parquet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    asked = parser.parse_args()
    for need, mend in ((asked.bundle, "train it with `make repro`"), (asked.texts, "make them with `make repro`")):
        if not need.exists():
            raise SystemExit(f"{need}: not there; {mend}.")
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; `apt-get install wrk` on Debian.")
    scratch = ENVS / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    texts = pq.read_table(asked.texts)["text"].to_pylist()
    write_scripts(scratch, texts)
    write_checkpoint(asked.bundle, scratch / "hf")
    compared = sides(asked.bundle.resolve(), scratch)
    sizes = {env: install(env) for env in tqdm(PACKAGES, desc="environments")}
    found: dict[str, dict[str, list[float]]] = {side.name: {} for side in compared}
    limits = []
    with tqdm(total=asked.rounds * len(compared), desc="measuring", unit="side") as bar:
        for _ in range(asked.rounds):
            limits.append(ceiling(asked.bundle, texts[:800]))
            for side in compared:
                measured = measure(side, scratch, texts[0], asked.seconds)
                for key, value in measured.items():
                    found[side.name].setdefault(key, []).append(value)
                bar.update()
    table = render(compared, found, sizes, statistics.median(limits), asked.rounds)
    print(table)
    if asked.write:
        asked.write.write_text(table, encoding="utf-8")


def render(compared: list[Side], found: dict, sizes: dict[str, float], limit: float, rounds: int) -> str:
    """The table, and the ratios that it comes to."""
    medians = {name: {key: statistics.median(values) for key, values in keys.items()} for name, keys in found.items()}
    lines = [
        f"Requests a second and p50 / p99 in ms, by connections. Medians of {rounds} rounds in which the sides take turns, "
        f"{len(os.sched_getaffinity(0))} CPU cores shared with wrk. Cold: from start to first answer, median of three starts "
        "a round. Memory: of the process tree after the load (PSS). Install: the environment on disk.",
        "",
        "| | 1 | 16 | 64 | cold | memory | install |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for side in compared:
        m = medians[side.name]
        cells = [f"{m[f'rps_{c}']:.0f} ({m[f'p50_ms_{c}']:.0f} / {m[f'p99_ms_{c}']:.0f})" for c in CONNECTIONS]
        cells += [f"{m['cold_s']:.2f} s", f"{m['memory_mb']:.0f} MB", f"{sizes[side.env]:.0f} MB"]
        lines.append(f"| {side.name} | {' | '.join(cells)} |")
    ours, log, _, pipe, barest, lit, lits, bento = (medians[side.name] for side in compared)
    faster = {name: ours["rps_16"] / other["rps_16"] for name, other in (("pipe", pipe), ("lit", lit), ("lits", lits))}
    lines += [
        "",
        f"The ONNX Runtime call alone (int8, four texts of like length a call, every core, nothing else): {limit:.0f} texts a "
        f"second; ours reaches {ours['rps_16'] / limit:.0%} of that at 16 connections, HTTP, cleaning, tokens, wrk and all.",
        "",
        f"At 16 connections ours answers {faster['pipe']:.1f} times as many as the pipeline, {faster['lit']:.1f} as LitServe, "
        f"{faster['lits']:.1f} as LitServe tuned (the best that was found for it: a worker a core, batches of 4, 2 ms of "
        f"waiting; the ONNX Runtime call alone is {limit / lits['rps_16']:.1f} of that), "
        f"{ours['rps_16'] / bento['rps_16']:.1f} as BentoML; p99 is {ours['p99_ms_16'] / pipe['p99_ms_16']:.2f} of the "
        f"pipeline's; cold start {pipe['cold_s'] / ours['cold_s']:.1f} times as fast, the barest FastAPI with ONNX "
        f"Runtime {pipe['cold_s'] / barest['cold_s']:.1f} times; memory "
        f"{ours['memory_mb'] / pipe['memory_mb']:.2f}. The request log "
        f"costs {1 - log['rps_16'] / ours['rps_16']:.0%} of the requests.",
        "",
    ]
    return "\n".join(["# Serving, measured", "", *lines])


if __name__ == "__main__":
    main()
