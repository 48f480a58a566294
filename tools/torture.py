"""Kills trainings, commands and services at random moments, and counts what is lost and what is left behind.

Run by `make torture`; it prints a Markdown table, which docs/reliability.md shows. `--rounds N` sets the number of tries.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import httpx
import psutil
import pyarrow.csv
import pyarrow.parquet as pq

from sodaops.annotation.store import Store
from tests.annotation import LABELS, Server as AnnotationServer, store_of
from tests.conftest import REPO, TWEETS, run_overrides
from tests.serving import Load, Server, wait_until

Row = Counter[str]  # a line of the table: tried, lost, left (behind), and others for its note
PRECISIONS, PROCESSES = ("32-true", "bf16-mixed"), (1, 2)
_ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(REPO)}


def start(command: Sequence[str]) -> subprocess.Popen:
    """``python -m sodaops.cli COMMAND`` in the background, with its output in a temporary file."""
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
    command = [sys.executable, "-m", "sodaops.cli", *command]
    process = subprocess.Popen(command, cwd=REPO, env=_ENVIRON, stdout=log, stderr=log)
    process.log = log
    return process


def finish(process: subprocess.Popen, *codes: int) -> bool:
    """Waits for a process; whether it ended with one of these exit codes and without a traceback."""
    code = process.wait(900)
    process.log.seek(0)
    output = process.log.read()
    process.log.close()
    if code in codes and "Traceback" not in output:
        return True
    print(f"exit code {code}, expected {codes}:\n{output[-3000:]}", file=sys.stderr)
    return False


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to a process and to all processes that it started, and waits until they are gone."""
    try:
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=60)


def files_of(folder: Path) -> set[str]:
    """The files of a folder; metrics of interrupted runs, which are kept as metrics.N, are left out."""
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in paths if "/metrics." not in path}


def digest(path: Path) -> str:
    """The SHA-256 of a file, or of all files of a folder; empty where there is none."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    contents = [file.name.encode() + file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"".join(contents)).hexdigest() if contents else ""


class Job:
    """A command whose result does not depend on interruptions.

    Args:
        root: an empty folder; each run gets a folder of its own below it.
        command: from a folder to the command's arguments.
        result: of the folder: the file or folder whose bytes must be the same.
        resume: arguments that continue an interrupted run.
    """

    def __init__(self, root: Path, command: Callable[[Path], list[str]], result: str, resume: Sequence[str] = ()) -> None:
        self.root, self._command, self._result, self._resume, self._n = root, command, result, resume, 0
        began = time.monotonic()
        reference = self.folder()
        assert finish(self.start(reference), 0)
        self.seconds = time.monotonic() - began
        self.digest, self._files = digest(reference / result), files_of(reference)
        assert self.digest

    def folder(self) -> Path:
        self._n += 1
        folder = self.root / f"run{self._n}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start(self, folder: Path, resumed: bool = False) -> subprocess.Popen:
        return start([*self._command(folder), *(self._resume if resumed else ())])

    def check(self, row: Row, folder: Path, ended_well: bool) -> None:
        """Compares a folder with the reference; deletes it if it is the same."""
        same = ended_well and digest(folder / self._result) == self.digest
        left = files_of(folder) - self._files
        row.update({"tried": 1, "lost": int(not same), "left": len(left)})
        if not same or left:
            print(f"{folder}: {'other result; ' if not same else ''}left: {sorted(left)}", file=sys.stderr)
        else:
            shutil.rmtree(folder)


def killed(job: Job, row: Row) -> None:
    """Kills the job at a random moment, and runs it again. A job that ends before that moment does not count as a try."""
    while True:
        folder = job.folder()
        process = job.start(folder)
        time.sleep(random.uniform(0.3, 1) * job.seconds)  # before that, Python imports
        ended = process.poll() is not None
        kill_tree(process)
        process.log.close()
        if not ended:
            break
        job.seconds *= 0.9  # the first run was a slow one
        shutil.rmtree(folder)
    job.check(row, folder, finish(job.start(folder, resumed=True), 0))


def interrupted_twice(job: Job, row: Row) -> None:
    """Ctrl-C twice at a random moment, and resumes."""
    folder = job.folder()
    process = job.start(folder)
    time.sleep(random.uniform(0.3, 1) * job.seconds)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    stopped = finish(process, 0, 130, -signal.SIGINT)  # the last one: the second came while Python was shutting down
    job.check(row, folder, finish(job.start(folder, resumed=True), 0) and stopped)


def twice_in_one_folder(job: Job, row: Row) -> None:
    """Starts a second training in the folder of a running one; the second must be refused, and the first must not notice."""
    folder = job.folder()
    first = job.start(folder)
    wait_until(lambda: (folder / "run/.lock").exists() or first.poll() is not None)
    first.send_signal(signal.SIGSTOP)  # so that it does not end before the second has started
    refused = finish(job.start(folder), 2)
    first.send_signal(signal.SIGCONT)
    job.check(row, folder, finish(first, 0) and refused)


def disk_full(job: Job, row: Row) -> None:
    """Fills the disk at a random moment of a training, then frees it and resumes."""
    disk = job.folder()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", disk], check=True)
    try:
        folder = disk / "job"
        folder.mkdir()
        process = job.start(folder)
        time.sleep(random.uniform(0.2, 0.9) * job.seconds)
        ballast = disk / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file:
                while file.write(b"\0" * 2**16):
                    pass
        except OSError:
            pass
        refused = finish(process, 0, 2)
        ballast.unlink()
        job.check(row, folder, finish(job.start(folder, resumed=True), 0) and refused)
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


def service(root: Path, bundle: Path, row: Row, seconds: float) -> None:
    """Kills the service under load; every request that was answered must be in the request log once."""
    log = Path(tempfile.mkdtemp(dir=root)) / "log"
    server = Server(bundle, request_log=log, part_s=0.5, deadline_s=60)
    load = Load(server.url)
    time.sleep(random.uniform(0.5, 1) * seconds)
    server.signal(signal.SIGKILL)
    load.stop()
    with Server(bundle, request_log=log, part_s=0.5) as server:
        server.client().get("/readyz")
        server.signal(signal.SIGTERM)
    tables = [pq.read_table(path, partitioning=None, columns=["request_id"]) for path in log.glob("date=*/*.parquet")]
    logged = Counter(name for table in tables for name in table["request_id"].to_pylist())
    lost = load.acknowledged() - logged.keys()
    row.update({"tried": 1, "lost": len(lost) + sum(count > 1 for count in logged.values())})
    row.update({"left": len(list((log / "journal").iterdir())), "requests": len(load.acknowledged())})


def annotation(root: Path, row: Row, seconds: float) -> None:
    """Kills two annotation servers on one store under load; every acknowledged answer must be in the store."""
    folder = Path(tempfile.mkdtemp(dir=root)) / "store"
    names, acknowledged = [task.task for task in store_of(folder, 3000).state().tasks], []
    servers = [AnnotationServer(folder) for _ in range(2)]

    def answer(url: str, annotator: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            for n, name in enumerate(names):
                body = {"annotator": annotator, "session": f"{annotator[1:]:>08}", "task": name, "label": LABELS[n % 3]}
                try:
                    if client.post("/api/answer", json=body).status_code == 200:
                        acknowledged.append((name, annotator, LABELS[n % 3]))
                except httpx.HTTPError:
                    return

    threads = [threading.Thread(target=answer, args=(servers[n % 2].url, f"a{n}"), daemon=True) for n in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(random.uniform(0.5, 1) * seconds)
    for server in servers:
        server.signal(signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    answers = Store(folder).state().answers
    lost = [one for one in acknowledged if answers.get(one[0], {}).get(one[1]) != one[2]]
    row.update({"tried": 1, "lost": len(lost), "left": len(list(folder.glob(".*.tmp"))), "answers": len(acknowledged)})


def registry(bundle: Path, row: Row) -> None:
    """Kills processes that register, promote and delete versions; see tools/torture_registry.py."""
    command = [sys.executable, str(REPO / "tools/torture_registry.py"), str(bundle), "--seed", str(random.randrange(10**6))]
    result = json.loads(subprocess.run(command, env=_ENVIRON, stdout=subprocess.PIPE, text=True, check=False).stdout)
    row.update({"tried": 1, "lost": len(result["lost"]), "left": len(result["left"])})
    row.update({"kills": result["kills"], "changes": result["reported"]})


def training(tweets: Path, precision: str, processes: int, folder: Path) -> list[str]:
    """A short training; its baselines and reports are switched off."""
    more = ["trainer.max_epochs=20", "early_stopping.patience=null", f"trainer.precision={precision}"]
    more += ["evaluate.split=none", "export.variants=[]", "logger=csv"]
    if processes > 1:
        more += ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={processes}"]
    return ["train", *run_overrides(folder, tweets, *more)]


def rows(root: Path, rounds: int) -> Iterator[tuple[str, Row]]:
    """Runs everything; yields the lines of the table as they are done."""
    tweets = root / "tweets.csv"
    pyarrow.csv.write_csv(pyarrow.csv.read_csv(TWEETS).slice(0, 600), tweets)
    weights, resume = "run/bundle/model.safetensors", ["ckpt_path=last"]
    jobs = {
        (precision, n): Job(root / f"{precision}-{n}", partial(training, tweets, precision, n), weights, resume)
        for precision in PRECISIONS
        for n in PROCESSES
    }
    for (precision, n), job in jobs.items():
        yield f"training, {precision}, {n} process{'es' * (n > 1)}: kill -9", repeat(rounds, killed, job)
    plain = jobs[PRECISIONS[0], 1]
    yield "training: Ctrl-C twice", repeat(rounds, interrupted_twice, plain)
    yield "training: a second one in the same folder", repeat(rounds, twice_in_one_folder, plain)
    if os.geteuid() == 0:
        yield "training: disk full", repeat(rounds, disk_full, plain)
    splits = Job(root / "preprocess", lambda folder: ["preprocess", f"evaluate.splits_dir={folder / 'splits'}"], "splits")
    yield "preprocess: kill -9", repeat(rounds, killed, splits)
    bundle = root / "bundle"
    assert finish(start(["train", *run_overrides(root / "served", tweets, "trainer.max_epochs=1")]), 0)
    shutil.move(root / "served/run/bundle", bundle)
    table = ["predict", str(bundle), "--file", str(TWEETS), "--output"]
    predict = Job(root / "predict", lambda folder: [*table, str(folder / "out.parquet")], "out.parquet")
    yield "predict a table: kill -9", repeat(rounds, killed, predict)
    yield "service under load: kill -9", repeat(rounds, lambda row: service(root, bundle, row, 4))
    yield "registry, 8 processes for 25 s: kill -9", repeat(1, registry, bundle)
    yield "annotation, two servers under load: kill -9", repeat(rounds, lambda row: annotation(root, row, 4))


def repeat(rounds: int, attempt: Callable[..., None], *arguments: object) -> Row:
    """The counts of several tries."""
    row = Row()
    for _ in range(rounds):
        attempt(*arguments, row)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="tries of each line; there are four lines of killed trainings")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; the default is another one each time")
    options = parser.parse_args()
    random.seed(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="torture") as root:
        print("| what | tried | lost | left behind | note |\n| --- | --- | --- | --- | --- |", flush=True)
        for name, row in rows(Path(root), options.rounds):
            note = ", ".join(f"{count:,} {key}" for key, count in row.items() if key not in ("tried", "lost", "left") and count)
            print(f"| {name} | {row['tried']} | {row['lost']} | {row['left']} | {note} |", flush=True)
            failed += row["lost"] + row["left"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
