"""Entry point: import a command when it is called, and turn errors into messages and exit codes."""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from sparsifiner_edge.errors import SlowKernelsWarning, SparsifinerError
from sparsifiner_edge.text import printable

COMMANDS = {
    "sparsify": "Make a pretrained vision transformer sparse, without training.",
    "distill": "Train a sparse model towards its dense teacher.",
    "evaluate": "Compare a sparse model or a bundle with the dense model.",
    "explain": "Show which tokens a sparse model read and merged.",
    "optimize": "Find the fastest sparse model that keeps a given fidelity.",
    "export": "Export a sparse or dense model to a bundle (ONNX and manifest).",
    "build": "Build TensorRT or TensorRT-RTX engines for a bundle.",
    "profile": "Measure latency, throughput, memory and energy of a bundle.",
    "estimate": "Estimate latency and memory on a board that you do not have.",
    "report": "Write one HTML page from result files.",
    "run": "Run a bundle on images, a video or a camera.",
    "package": "Package a bundle for DeepStream, Triton Inference Server or GStreamer.",
    "bundle": "Verify or sign a bundle, or create a key pair.",
    "doctor": "Check what is installed and what works here.",
}

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end the process after temporary folders are removed."""
CLOSED_PIPE = 141
"""Exit code if the reader of standard output went away, as shells report it."""


class _LazyGroup(click.Group):
    """Command group that imports `sparsifiner_edge.cli.<name>` when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the command names in the order of the workflow."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the module of a command."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"sparsifiner_edge.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        command.name = cmd_name
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. End quietly if the reader of standard output (such as `head`) went away."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise click.exceptions.Exit(CLOSED_PIPE) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sparsifiner-edge")
def cli() -> None:
    """Make vision transformers faster at the edge: sparsify, export, measure, run."""


class _Interrupted(BaseException):
    """Raised when a signal asks the process to end.

    It is not a KeyboardInterrupt: Python remembers one that passed through `exec` and kills the process later.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 done, 1 a check of accuracy or numbers failed, 2 wrong usage or unusable input, 128 + n ended by
    signal n (130: Ctrl-C).
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Warnings of libraries are for developers; `python -W default` shows them.
        warnings.simplefilter("default", SlowKernelsWarning)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(message, 1000)}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # File names may contain characters that a terminal cannot show.
    received = _unwind_on_signals()
    try:
        try:
            code = cli.main(args=arguments, prog_name="sparsifiner-edge", standalone_mode=False)
        finally:
            for number in _SIGNALS:  # Everything is done or cleaned up: do not interrupt Python's exit.
                signal.signal(number, signal.SIG_IGN)
    except BaseException as error:
        # First, because libraries convert the exception of a signal into their own errors.
        code = _report_interrupt(received[0]) if received else _report_error(error)
    sys.exit(_flush(code if isinstance(code, int) else 0))


def _unwind_on_signals() -> list[int]:
    """Make Ctrl-C, termination and a closed terminal unwind the stack, so that temporary folders are removed.

    Returns:
        A list that receives the numbers of the signals.
    """
    received: list[int] = []
    show = sys.unraisablehook

    def unwind(number: int, frame: types.FrameType | None) -> None:
        if _in_native_import(frame):
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            return
        received.append(number)
        raise _Interrupted

    def once_more(dropped: sys.UnraisableHookArgs) -> None:
        """Send the signal again if Python dropped the exception in a callback, as it does during imports."""
        if received and isinstance(dropped.exc_value, _Interrupted):
            threading.Timer(0.05, os.kill, (os.getpid(), received[-1])).start()
        else:
            show(dropped)

    sys.unraisablehook = once_more
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # As nohup sets it.
            signal.signal(number, unwind)
    return received


def _in_native_import(frame: types.FrameType | None) -> bool:
    """Return True while a native module is loaded: some abort if Python code that they call raises an exception."""
    while frame is not None:
        if frame.f_code.co_name == "exec_module" and "ExtensionFileLoader" in type(frame.f_locals.get("self")).__name__:
            return True
        frame = frame.f_back
    return False


def _report_interrupt(number: int) -> int:
    if sys.stderr.isatty():
        click.echo(err=True)  # Ends the line in which the terminal shows ^C.
    _say("interrupted; no partial files were left.")
    return 128 + number


def _report_error(error: BaseException) -> int:
    """Print one message for an error that a user can cause and return the exit code; raise any other error again."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, click.ClickException):
        shown = io.StringIO()
        error.show(shown)
        click.echo(
            "\n".join(map(printable, shown.getvalue().rstrip("\n").split("\n"))), err=True
        )  # It quotes user input.
        return error.exit_code
    if isinstance(error, SparsifinerError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        place = printable(error.filename or "the output")
        _say(f"{place}: {printable(error.strerror or error)}.\n  Check the path and the free space.")
    elif _is_out_of_memory(error):
        _say("out of memory.\n  Choose a smaller image, batch or model, or close other programs.")
    else:
        raise error
    return 2


def _is_out_of_memory(error: BaseException) -> bool:
    """Return True for an out-of-memory error of Python or torch, without importing torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def _flush(code: int) -> int:
    """Flush standard output now, while a failure can still be reported."""
    if sys.stdout is None:
        return code
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return CLOSED_PIPE
        if code == 0:
            return _report_error(error)
    return code


def _say(message: str) -> None:
    click.echo(f"error: {message}", err=True)
