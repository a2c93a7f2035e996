"""A process that hears nothing: it waits in native code and neither reads its pipe nor minds a signal."""

from __future__ import annotations

import ctypes
import signal
import sys

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.write("hangs\n")
    sys.stdout.flush()
    while True:
        ctypes.CDLL(None).pause()
