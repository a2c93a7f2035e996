"""`sparsifiner-edge` and `python -m sparsifiner_edge`: what happens before the command line is there."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed has no stub of it
import sys

# Until the command line unwinds on signals, Ctrl-C ends the process at once: there is nothing to clean up, and Python's
# own way is a traceback from the middle of an import. (`signal` itself would be an import of milliseconds.)
try:
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
except ValueError:  # No main thread: somebody imports this.
    pass


def main() -> None:
    """Import the command line and run it; does not return."""
    from sparsifiner_edge.cli.main import main as run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
