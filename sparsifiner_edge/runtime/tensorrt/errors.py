"""What TensorRT says, and what a user is told about it. `trt` is the module `tensorrt` or `tensorrt_rtx`."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsifiner_edge.errors import BackendError, UnsupportedModelError

MAX_MESSAGES = 50
_MEMORY = re.compile(
    r"out ?of ?memory|OutOfMemory|cudaErrorMemoryAllocation|insufficient (?:gpu )?memory", re.IGNORECASE
)
_REQUESTED = re.compile(r"requested(?: size was)? (\d+)(?: bytes)?", re.IGNORECASE)
_NO_IMPLEMENTATION = re.compile(r"could not find any implementation for node (?P<node>\S+?)[.\s]*$", re.IGNORECASE)
_VERSION = re.compile(r"version|magic tag|serialization (?:error|assertion)", re.IGNORECASE)
_LOST = re.compile(
    r"illegal (?:memory access|address|instruction)|unspecified launch failure|device lost|misaligned", re.I
)
_BUILD_MEMORY = (
    "Close other programs that use the GPU, build with a smaller batch, or give less workspace: memory of a Jetson is"
    " shared with the processor."
)


class Messages:
    """The latest errors and warnings of TensorRT, for messages of ours."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=MAX_MESSAGES)
        self.warnings: deque[str] = deque(maxlen=MAX_MESSAGES)

    def text(self) -> str:
        """Errors of TensorRT in one line, or that there was none."""
        return " ".join(" ".join(self.errors).split())[:800] or "TensorRT gave no reason"

    def matching(self, pattern: re.Pattern[str], also_warnings: bool = False) -> re.Match[str] | None:
        """The first match in the errors, and on request in the warnings."""
        lines: Iterable[str] = [*self.errors, *(self.warnings if also_warnings else ())]
        return next((match for line in lines if (match := pattern.search(line))), None)


def make_logger(trt: Any, messages: Messages) -> Any:
    """A logger of TensorRT's that fills `messages` and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors and warnings."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            """Called by TensorRT, from any of its threads."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.errors.append(msg)
            elif severity == trt.ILogger.WARNING:
                messages.warnings.append(msg)

    return Logger()


def parser_errors(parser: Any) -> str:
    """The parser's errors with the nodes that they are about."""
    lines = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        node = f"node {error.node_name() or error.node()} ({error.node_operator()})"
        inside = " in ".join(error.local_function_stack()) if error.local_function_stack_size() else ""
        lines.append(f"{node}{f' in {inside}' if inside else ''}: {' '.join(error.desc().split())}")
    return "; ".join(lines)[:1500] or "no reason given"


def refused_model(parser: Any, name: str) -> UnsupportedModelError:
    """The error for a model that the parser of TensorRT, by its name and version, refuses."""
    return UnsupportedModelError(
        f"{name} cannot read the model: {parser_errors(parser)}.",
        "Upgrade TensorRT (on a Jetson: JetPack), export the model again, or use --backend onnxruntime.",
    )


def build_error(messages: Messages, workspace: int, free: int) -> BackendError:
    """The error for a build that gave no engine.

    TensorRT reports memory that was too small as tactics skipped, and then that no implementation is left.

    Args:
        messages: what it said.
        workspace: bytes that it was allowed for scratch.
        free: bytes of the device that were free before.
    """
    memory = messages.matching(_MEMORY, also_warnings=True)
    missing = messages.matching(_NO_IMPLEMENTATION)
    given = f"it was given {workspace >> 20} MiB of workspace, {free >> 20} MiB were free"
    if memory is not None:
        wanted = messages.matching(_REQUESTED, also_warnings=True)
        size = f" A tactic wanted {int(wanted[1]) >> 20} MiB." if wanted else ""
        return BackendError(f"TensorRT ran out of memory while building: {given}.{size}", _BUILD_MEMORY)
    if missing is not None:
        return BackendError(
            f"TensorRT has no implementation for node {missing['node']}: {given}.",
            "Often memory was too small for every one: close other programs or give more workspace. Otherwise export "
            "in another precision, or upgrade TensorRT.",
        )
    return BackendError(
        f"TensorRT built no engine: {messages.text()}.", "Export the model again, or use --backend onnxruntime."
    )


def unusable_engine(path: Path, messages: Messages) -> BackendError:
    """The error for an engine that cannot be deserialised."""
    if messages.matching(_MEMORY):
        return BackendError(f"{path} does not fit into the device's memory: {messages.text()}.", _RUN_MEMORY)
    why = "was built by another version or is damaged" if messages.matching(_VERSION) else "is refused"
    return BackendError(f"{path} {why}: {messages.text()}.", "Build it again on this machine.")


_RUN_MEMORY = "Close other programs that use the GPU, or build for a smaller batch."


def run_error(path: Path, action: str, messages: Messages, free: int | None = None) -> BackendError:
    """The error for an engine that fails `action`."""
    what = f"TensorRT fails {action} ({path}): {messages.text()}."
    if messages.matching(_LOST):
        return BackendError(what, "The device is lost to this process: start it again; then build the engine again.")
    if messages.matching(_MEMORY) or (free is not None and not messages.errors):
        left = f" {free >> 20} MiB are free." if free is not None else ""
        return BackendError(what + left, _RUN_MEMORY)
    return BackendError(what, "Build the engine again on this machine.")
