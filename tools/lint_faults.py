"""Shows that `make lint` reports faults: puts one for each of its parts into a copy of the repository and runs it there."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TOOLS = {"lint-docker": "hadolint", "lint-shell": "shellcheck", "lint-workflows": "actionlint"}  # not built for every platform
# Part of `make lint` -> file, text appended to it, pattern that the report must hold.
FAULTS = {
    "lint-python": ("train.py", "import os, sys\n", "E401"),
    "lint-types": ("sodaops/text/labels.py", "def broken() -> int:\n    return 'a'\n", "Incompatible return value type"),
    "lint-imports": ("sodaops/io/storage.py", "import sodaops.serving.app\n", "Imports go down the levels BROKEN"),
    "lint-yaml": ("conf/optim/wrong.yaml", "a: 1\na: 2\n", "duplication of key"),
    "lint-workflows": (
        ".github/workflows/wrong.yml",
        "on: push\njobs:\n  a:\n    runs-on: ubuntu-latest\n    steps:\n"
        "      - run: echo ${{ github.event.head_commit.message }}\n",
        "template-injection|untrusted",
    ),
    "lint-cloudbuild": ("cloudbuild/wrong.yaml", "steps: 1\n", "is not of type 'array'"),
    "lint-docker": ("docker/wrong.Dockerfile", "FROM debian\nRUN cd /x && apt-get install y\n", "DL3"),
    "lint-shell": ("wrong.sh", "#!/bin/sh\nrm -r $1/x\n", "SC2"),
    "lint-links": ("docs/wrong.md", "# A\n\n[there](nowhere.md)\n", r"nowhere\.md"),
}


def main() -> int:
    """Returns 1, and prints why, when a part of `make lint` misses its fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        copy_repository(copy)
        problems = [*check_parts(copy), *check_hooks(copy)]
    print(*problems or [f"each of the {len(FAULTS)} parts of `make lint` reports its fault"], sep="\n")
    return 1 if problems else 0


def copy_repository(copy: Path) -> None:
    """Copies the files that git knows or would add, with mypy's cache, and commits them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (REPO / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, copy / name)
    if (REPO / ".mypy_cache").is_dir():
        shutil.copytree(REPO / ".mypy_cache", copy / ".mypy_cache")
    (copy / ".venv").symlink_to(BIN.parent)
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(copy / name, (0, 0))  # so that make does not install anew
    run("git init -q -b main && git add -A && git -c user.name=t -c user.email=t@t commit -qm copy", copy)


def run(command: str, folder: Path) -> tuple[int, str]:
    """Runs a shell command as a user of the copy would; returns its exit code and what it printed."""
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS")}
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(folder), "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def check_parts(copy: Path) -> list[str]:
    """Parts of `make lint` that let their fault pass."""
    targets = re.findall(r"^(lint-[a-z]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    parts = sorted({*targets} - {"lint-faults"})
    problems = [f"{part}: add a fault for it to {Path(__file__).name}" for part in parts if part not in FAULTS]
    for name, text, _ in FAULTS.values():
        with (copy / name).open("a", encoding="utf-8") as file:
            file.write(text)
    code, output = run(f"make -k {' '.join(parts)}", copy)
    if code != 2:
        problems.append(f"make: exit code {code} in place of 2")
    for part, (_, _, pattern) in FAULTS.items():
        if part in TOOLS and not (BIN / TOOLS[part]).exists() and shutil.which(TOOLS[part]) is None:
            print(f"{part}: skipped, no {TOOLS[part]} for this platform")
        elif f"{part}] Error" not in output or not re.search(pattern, output):
            problems.append(f"{part}: no report of its fault ({pattern})")
    return [*problems, output] if problems else []


def check_hooks(copy: Path) -> list[str]:
    """Whether the hooks of `make hooks` refuse a commit with a fault and accept one without."""
    run("git checkout -q HEAD -- . && git clean -fdq", copy)
    code, output = run("make hooks", copy)
    if code:
        return ["make hooks", output]
    commit = "git -c user.name=t -c user.email=t@t commit -qam message"
    code, output = run(f"echo 'import os, sys' > train.py && {commit}", copy)
    if code != 1 or "E401" not in output:
        return ["the hooks accept a commit with a fault", output]
    code, output = run(f"git checkout -q HEAD -- train.py && echo >> README.md && {commit}", copy)
    return ["the hooks refuse a commit without a fault", output] if code else []


if __name__ == "__main__":
    sys.exit(main())
