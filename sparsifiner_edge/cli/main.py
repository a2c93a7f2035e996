"""Entry point: finds a command's file only when it is called, and turns errors into messages and exit codes."""

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
    "sparsify": "Make a pretrained vision transformer sparse: MODEL -> STUDENT/.",
    "distill": "Train a student towards its dense teacher on a folder of images.",
    "evaluate": "Compare a student or bundle with its dense teacher.",
    "explain": "Show what a student read and merged on images, and whether that explains it.",
    "optimize": "Find the fastest sparse model at a fidelity you name, on this machine.",
    "export": "Export a student, or a dense model, to a bundle (ONNX and manifest).",
    "build": "Build engines for a bundle: TensorRT, TensorRT-RTX; ahead of time for other GPUs.",
    "profile": "Measure latency, throughput and memory of a bundle.",
    "estimate": "Estimate latency and memory of a bundle on a board you do not have.",
    "report": "One page from result files: verdict, figures, method.",
    "run": "Run a bundle on images, a video or a camera; one JSON line per image or frame.",
    "package": "Write a bundle for DeepStream, Triton server or GStreamer, with the commands.",
    "bundle": "Verify a bundle; sign it, so that what nobody signed can be refused.",
    "doctor": "Say what is installed, what works, and what to do about the rest.",
}

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLOSED_PIPE = 141
"""Exit code when the reader of standard output went away, as a shell would report it."""


class _LazyGroup(click.Group):
    """A group whose commands live in `sparsifiner_edge.cli.<name>`, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command's file."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"sparsifiner_edge.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        command.name = cmd_name
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader such as `head` that went away ends it quietly."""
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
    """Sparse attention for vision transformers at the edge: sparsify, export, measure, run."""


class _Interrupted(BaseException):
    """A signal asks to leave. No KeyboardInterrupt: Python remembers one that passed `exec`, and kills itself later."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    0 done, 1 a gate failed, 2 wrong usage or unusable input, 128 + n ended by signal n (130: Ctrl-C).
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Libraries' warnings are for developers; `python -W default` shows them.
        warnings.simplefilter("default", SlowKernelsWarning)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(message, 1000)}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Names of files may hold what a terminal cannot show.
    received = _unwind_on_signals()
    try:
        try:
            code = cli.main(args=arguments, prog_name="sparsifiner-edge", standalone_mode=False)
        finally:
            for number in _SIGNALS:  # All is done or cleaned up; Python's own exit should not be torn.
                signal.signal(number, signal.SIG_IGN)
    except BaseException as error:
        # First, because libraries turn what a signal raises into errors of their own.
        code = _report_interrupt(received[0]) if received else _report_error(error)
    sys.exit(_flush(code if isinstance(code, int) else 0))


def _unwind_on_signals() -> list[int]:
    """Let Ctrl-C, termination and a closed terminal unwind the stack, so that temporary folders vanish.

    Returns:
        A list that takes the numbers of the signals received.
    """
    received: list[int] = []
    show = sys.unraisablehook

    def unwind(number: int, frame: types.FrameType | None) -> None:
        if _in_native_import(frame):
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            return
        received.append(number)
        raise _Interrupted

    def once_more(lost: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised in some callbacks, those of its imports among them: send it again, soon."""
        if received and isinstance(lost.exc_value, _Interrupted):
            threading.Timer(0.05, os.kill, (os.getpid(), received[-1])).start()
        else:
            show(lost)

    sys.unraisablehook = once_more
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # As nohup leaves it.
            signal.signal(number, unwind)
    return received


def _in_native_import(frame: types.FrameType | None) -> bool:
    """Whether a native module is being loaded: some end the process when what it calls in Python raises."""
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
    """Print one message for an error that a user can cause, and return the exit code; raise any other again."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, click.ClickException):
        said = io.StringIO()
        error.show(said)
        click.echo(
            "\n".join(map(printable, said.getvalue().rstrip("\n").split("\n"))), err=True
        )  # It quotes what was typed.
        return error.exit_code
    if isinstance(error, SparsifinerError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        place = printable(error.filename or "the output")
        _say(f"{place}: {printable(error.strerror or error)}.\n  Check the path and the space there.")
    elif _is_out_of_memory(error):
        _say("out of memory.\n  Choose a smaller image, batch or model, or close other programs.")
    else:
        raise error
    return 2


def _is_out_of_memory(error: BaseException) -> bool:
    """Of Python, or of torch on a CPU or a GPU, which is not imported here to tell."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def _flush(code: int) -> int:
    """Flush standard output now, where a failure can still be reported; later Python would print a traceback."""
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
