"""``python -m sodaops.serving.trial FOLDER [VARIANT]``: loads a bundle and predicts a few texts, in a process of its own.

A bundle may end the process that loads it, take all memory, or never end. A service that is to load a new bundle lets such a
process try it before, and goes on whatever happens.
"""

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from sodaops.bundle.files import FIX, parsing
from sodaops.errors import BundleError, SodaOpsError
from sodaops.inference.predictor import Predictor
from sodaops.text.columns import join

LIMIT_S = 120.0
_MAX_BYTES = 2**32  # of memory, and five times the size of the bundle
# Regular expressions that try every way to divide a run of equal characters do so for these.
_HARD_TEXTS = ("a" * 60 + "!", "1" * 60 + "a!", " " * 60 + "a!", "a " * 30 + "\t", "aA1-" * 15 + "é", "!" * 60 + "a")


def load(path: str | Path, variant: str | None) -> Predictor:
    """A predictor whose model has run on a short and a longer text, which allocates its memory, and whose output is checked.

    Raises:
        BundleError: it cannot be loaded, tokenizer or model fail, or the output is not a probability for each label.
    """
    with parsing(path):
        predictor = Predictor(path, variant, n_threads=1)
        as_text = lambda word: join([word] * len(predictor.info.text_columns))  # noqa: E731
        for text in _HARD_TEXTS:
            predictor.encode(as_text(text))
    shape = (2, len(predictor.info.labels))
    n_words = 20 if predictor.info.max_windows is None else predictor.info.max_tokens + 1  # of more than one window
    with parsing(f"{path}: {predictor.info.bundle_id} on a test text"):
        texts = [as_text("a word"), as_text("word " * n_words)]
        probs = predictor.run([predictor.encode(predictor.clean(text)) for text in texts]).probs
        if probs.shape != shape or not predictor.task.is_valid(probs):
            raise ValueError(f"the output is no answer of shape {shape} for the task; it has shape {probs.shape}")
    return predictor


async def try_bundle(path: str | Path, variant: str | None) -> None:
    """Loads a bundle in another process, which is ended if it takes longer than :data:`LIMIT_S`.

    Raises:
        BundleError: it cannot be loaded, or the process ends in another way or not in time.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sodaops.serving.trial", str(path), *([variant] if variant else []),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(LIMIT_S):
            _, output = await process.communicate()
    except TimeoutError:
        raise BundleError(f"{path}: a trial did not end within {LIMIT_S:g} s; {FIX}") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = output.decode("utf-8", "replace").splitlines()
        reason = f"{path}: a trial ended with exit code {process.returncode}; {FIX}"
        raise BundleError(lines[-1] if process.returncode == BundleError.exit_code and lines else reason)


def main() -> int:
    """Runs the trial."""
    with contextlib.suppress(OSError):  # if memory runs out, this process is ended rather than the service
        Path("/proc/self/oom_score_adj").write_text("1000")
    if os.name != "nt":
        import resource

        limit = _MAX_BYTES + 5 * sum(file.stat().st_size for file in Path(sys.argv[1]).iterdir())
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        load(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    except SodaOpsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
