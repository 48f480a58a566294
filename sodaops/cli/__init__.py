"""The command line, with one command for each stage.

Exit codes: 2 for an error that the user can fix, with a message and no traceback; 3 if the gate refuses a model; 4 if an
alert rule fires; 130 after Ctrl-C; 143 after SIGTERM.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from sodaops.cli.commands import COMPLETE, MODULE_OF
from sodaops.cli.parsing import parse
from sodaops.config.explain import explain
from sodaops.errors import Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if COMPLETE in os.environ:
        from sodaops.cli.completion import complete

        print("\n".join(complete(os.environ[COMPLETE])))
        return 0
    try:
        _run(words)
    except SystemExit as stop:  # the help was printed
        if not isinstance(stop.code, int):
            raise
        return stop.code
    except BrokenPipeError:  # `| head` has read enough; Python would complain again when it flushes standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        print(f"stopped; {stop}" if str(stop) else "stopped", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except Exception as error:
        explained = explain(error)
        if explained is None or os.environ.get("SODAOPS_TRACEBACK"):
            raise
        print(f"{type(explained).__name__}: {explained}", file=sys.stderr)
        return explained.exit_code
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command as the program; a second Ctrl-C while the process ends has no effect."""
    code = main(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _run(words: Sequence[str]) -> None:
    name, options = parse(words)
    from sodaops.cli.console import configure_logging

    configure_logging()
    module = importlib.import_module(f"sodaops.cli.{MODULE_OF[name.partition(' ')[0]]}")
    getattr(module, f"run_{name.replace(' ', '_')}")(options)
