"""``python -m sodaops.serving.worker SOURCE BUNDLE_ID VARIANT``: the shadow's process.

It reads a raw text, as a JSON string, from each line of standard input, and writes ``probs`` and ``seconds``, or an ``error``.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from sodaops.errors import BundleError
from sodaops.registry.bundles import bundle_at, predictor_files
from sodaops.serving import trial

_TEXT_S = 30.0  # of CPU time for a text, after which the process is ended


def main() -> None:
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which ends this process
    os.nice(19)
    with contextlib.suppress(AttributeError, OSError):  # on Linux it runs only when nothing else does
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    source, bundle_id, variant = sys.argv[1:]
    with bundle_at(source, predictor_files(variant)) as folder:
        predictor = trial.load(folder, variant)
    if predictor.info.bundle_id != bundle_id:  # the service will load it too, and start another worker
        raise BundleError(f"{source}: holds {predictor.info.bundle_id} by now, not {bundle_id}.")
    for line in sys.stdin:
        began = time.perf_counter()
        signal.setitimer(signal.ITIMER_PROF, _TEXT_S)
        try:
            row = predictor.encode(predictor.clean(json.loads(line)))
            answer = {"probs": predictor.run([row]).probs[0].tolist(), "seconds": time.perf_counter() - began}
        except Exception as error:  # the next text may have an answer
            answer = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
