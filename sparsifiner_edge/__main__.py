"""Entry point of `sparsifiner-edge` and `python -m sparsifiner_edge`."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed has no stub for it
import sys

# Until the command line handles signals, Ctrl-C ends the process at once: there is nothing to clean up, and Python's
# default is a traceback from the middle of an import. (Importing `signal` would take milliseconds.)
try:
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
except ValueError:  # Not the main thread: someone imports this module.
    pass


def main() -> None:
    """Import the command line and run it; does not return."""
    from sparsifiner_edge.cli.main import main as run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
