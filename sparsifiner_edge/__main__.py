"""`sparsifiner-edge` and `python -m sparsifiner_edge`: what happens before the command line is there."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import NoReturn

# Until the command line unwinds on signals, Ctrl-C ends the process at once: there is nothing to clean up, and Python's
# own way is a traceback from the middle of an import.
with contextlib.suppress(ValueError):  # No main thread: somebody imports this.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> NoReturn:
    """Import the command line and run it."""
    from sparsifiner_edge.cli.main import main as run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
