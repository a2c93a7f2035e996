"""Entry point: finds a command's file only when it is called, and turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

import click

from sparsifiner_edge.errors import SparsifinerError

COMMANDS = {
    "sparsify": "Make a pretrained vision transformer sparse: MODEL -> STUDENT/.",
    "evaluate": "Compare a student or bundle with its dense teacher.",
    "export": "Export a student, or a dense model, to a bundle (ONNX and manifest).",
    "profile": "Measure latency, throughput and memory of a bundle.",
    "run": "Run a bundle on a picture or a folder; one JSON line per picture.",
    "demo": "The whole way on real weights and photographs, dense beside sparse.",
    "doctor": "Say what is installed, what works, and what to do about the rest.",
}


class LazyGroup(click.Group):
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
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sparsifiner-edge")
def cli() -> None:
    """Sparse attention for vision transformers at the edge: sparsify, export, measure, run."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a gate failed, 2 wrong usage or unusable input, 130 interrupted."""
    try:
        code = cli.main(args=arguments, prog_name="sparsifiner-edge", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        _fail("interrupted; nothing half-written was left.", 130)
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written was left.", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SparsifinerError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        _fail(f"{error.filename or 'the output'}: {error.strerror}.\n  Free space or choose another place.", 2)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
