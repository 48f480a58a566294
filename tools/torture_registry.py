"""Kills processes that change a registry, and checks that nothing is lost and nothing is left.

``python tools/torture_registry.py BUNDLE [--seconds 25] [--processes 8]``. Each process registers variants of the bundle,
promotes them and runs gc, without pause; each is killed by SIGKILL after a random time and replaced. Every change that a
process reported as done must then be in the history, every version of the registry must be complete, and after a last gc
no other file may be there.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from sodaops.bundle import layout
from sodaops.errors import RegistryError
from sodaops.registry.registry import CHAMPION, Registry

N_VARIANTS = 6
GRACE_S = 10.0  # longer than a register lasts on a loaded machine


def main() -> int:
    """Runs the processes, and prints a line of JSON with what was tried, lost and left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "tmp").mkdir()
        make_variants(args.bundle, work)
        n_kills = kill_and_replace(args, work)
        result = {"kills": n_kills, **check(work)}
    print(json.dumps(result))
    return 1 if result["lost"] or result["left"] else 0


def make_variants(bundle: Path, work: Path) -> None:
    """Bundles with the same answers and ids of their own."""
    fields = {
        key: value for key, value in asdict(layout.read_info(bundle)).items() if key not in ("files", "bundle_id", "format")
    }
    for i in range(N_VARIANTS):
        variant = work / f"bundle{i}"
        shutil.copytree(bundle, variant, ignore=shutil.ignore_patterns(layout.CARD))
        with (variant / layout.CONFIG).open("a") as file:
            file.write(f"# variant {i}\n")
        layout.write_info(variant, **fields)


def kill_and_replace(args: argparse.Namespace, work: Path) -> int:
    """Keeps some processes running, each until it is killed; returns how many were."""
    rng, end, n_started = random.Random(args.seed), time.monotonic() + args.seconds, 0
    fork = multiprocessing.get_context("fork")  # a new interpreter would spend most of its life with imports
    running: list[tuple[float, multiprocessing.process.BaseProcess]] = []
    while time.monotonic() < end or running:
        while len(running) < args.processes and time.monotonic() < end:
            n_started += 1
            process = fork.Process(target=change_forever, args=(work, n_started))
            process.start()
            running.append((min(end, time.monotonic() + rng.uniform(0.05, 1)), process))
        time.sleep(0.005)
        for entry in [entry for entry in running if time.monotonic() >= entry[0]]:
            entry[1].kill()
            entry[1].join()
            running.remove(entry)
    return n_started


def change_forever(work: Path, seed: int) -> None:
    """Changes the registry until this process is killed, and notes each change once it is done."""
    registry, rng = Registry(str(work / "registry")), random.Random(seed)
    tempfile.tempdir = str(work / "tmp")
    with (work / f"done-{os.getpid()}").open("a", buffering=1) as done:
        for n in range(10**9):
            why = f"{os.getpid()}-{n}"
            try:
                version = registry.register(work / f"bundle{rng.randrange(N_VARIANTS)}", why)
                done.write(f"register {why}\n")
                if rng.random() < 0.5:
                    registry.move(CHAMPION, version, registry.state().aliases.get(CHAMPION), why)
                    done.write(f"promote {why}\n")
                if rng.random() < 0.3:
                    registry.gc(keep=1, grace_s=GRACE_S)
            except RegistryError:  # another process was faster
                continue


def check(work: Path) -> dict[str, int | list[str]]:
    """What was done, lost and left."""
    registry = Registry(str(work / "registry"))
    done = {line for file in work.glob("done-*") for line in file.read_text().splitlines() if line}
    events = registry.history()
    lost = sorted(done - {f"{entry['event']} {entry['why']}" for entry in events})
    if [entry["n"] for entry in events] != list(range(1, len(events) + 1)):
        lost.append("the history has gaps")
    n_collected = len(registry.gc(keep=1, grace_s=0))
    state = registry.state()
    for version, about in state.versions.items():
        folder = work / "registry/versions" / about["folder"]
        info = layout.read_info(folder)
        layout.verify(folder, info)
        if info.bundle_id != version:
            lost.append(f"{version} holds {info.bundle_id}")
    expected = {f"versions/{about['folder']}" for about in state.versions.values()}
    expected |= {f"history/{n:08d}.json" for n in range(1, state.n + 1)}
    found = {str(path.relative_to(work / "registry")) for path in (work / "registry").glob("*/*")}
    left = sorted(found ^ expected) + [str(path.relative_to(work)) for path in (work / "tmp").iterdir()]
    return {"events": len(events), "reported": len(done), "collected": n_collected, "lost": lost, "left": left}


if __name__ == "__main__":
    sys.exit(main())
