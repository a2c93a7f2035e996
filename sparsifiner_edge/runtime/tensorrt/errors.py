"""Translation of TensorRT's log messages to errors for users. `trt` is the module `tensorrt` or `tensorrt_rtx`."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

from sparsifiner_edge.errors import BackendError, UnsupportedModelError

_MOST_MESSAGES = 50
"""Number of latest errors, and of latest warnings, that a logger keeps. Older ones are dropped to bound its memory."""
PLUGIN_FAILURES = deque[str](maxlen=5)
"""Latest errors of this project's plugins in this process.

TensorRT reports exceptions raised in a plugin only to a global logger of its own, so they are collected here.
"""
_MEMORY = re.compile(r"out[ _]?of[ _]?memory|cudaErrorMemoryAllocation|insufficient (?:gpu )?memory", re.IGNORECASE)
"""Pattern of messages about insufficient memory."""
_LOST = re.compile(
    r"illegal[ _](?:memory access|address|instruction)|unspecified launch failure|LAUNCH_FAILED|device lost|misaligned",
    re.IGNORECASE,
)
"""Pattern of messages after which the device cannot be used in this process any more."""


def make_logger(trt: Any) -> Any:
    """Create a logger for TensorRT that prints nothing and keeps the latest messages in `errors` and `warnings`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Logger that keeps errors and warnings."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors, self.warnings = deque[str](maxlen=_MOST_MESSAGES), deque[str](maxlen=_MOST_MESSAGES)

        def log(self, severity: Any, msg: str) -> None:
            """Keep a message; TensorRT calls this from any of its threads."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(msg)

    return Logger()


def _errors_of(logger: Any) -> list[str]:
    """Return the errors of a logger and of this project's plugins, and clear the latter."""
    errors = [*PLUGIN_FAILURES, *logger.errors]
    PLUGIN_FAILURES.clear()
    return errors


def _line(errors: list[str]) -> str:
    """Return errors as one line of at most 800 characters."""
    return " ".join(" ".join(errors).split())[:800] or "TensorRT gave no reason"


def parse_error(parser: Any, name: str) -> UnsupportedModelError:
    """Return the error for a model that TensorRT's parser rejects; it names the nodes.

    Args:
        parser: Parser after it failed.
        name: Name and version of TensorRT.
    """
    lines = []
    for error in map(parser.get_error, range(parser.num_errors)):
        node = f"node {error.node_name() or error.node()} ({error.node_operator()})"
        inside = f" in {' in '.join(error.local_function_stack())}" if error.local_function_stack_size() else ""
        lines.append(f"{node}{inside}: {' '.join(error.desc().split())}")
    return UnsupportedModelError(
        f"{name} cannot read the model: {'; '.join(lines)[:1500] or 'no reason given'}.",
        "Upgrade TensorRT (on a Jetson: JetPack), export the model again, or use --backend onnxruntime.",
    )


def build_error(name: str, logger: Any, how: str) -> BackendError:
    """Return the error for a build that failed.

    If the memory is too small, TensorRT warns that it skips tactics, and then reports that no implementation is left.
    Warnings about memory are therefore searched too.

    Args:
        name: Name and version of TensorRT.
        logger: Logger of the build.
        how: Sentence about the settings of the build.
    """
    errors = _errors_of(logger)
    if any(map(_MEMORY.search, (*errors, *logger.warnings))):
        return BackendError(
            f"{name} ran out of memory while building. {how}",
            "Close other programs that use the GPU, or build for a smaller batch. (A Jetson shares its memory with the "
            "CPU.)",
        )
    return BackendError(
        f"{name} built no engine: {_line(errors)}. {how}",
        "If no implementation was found, the memory is often too small for all of them: close other programs. "
        "Otherwise export in another precision, upgrade TensorRT, or use --backend onnxruntime.",
    )


def run_error(path: Path, action: str, logger: Any, fix: str) -> BackendError:
    """Return the error for an engine that failed to load or to run.

    Args:
        path: Path of the engine.
        action: Failed action, such as "to run".
        logger: Logger of the session.
        fix: Advice for failures that are neither due to memory nor due to a lost device.
    """
    errors = _errors_of(logger)
    if any(map(_LOST.search, errors)):
        fix = "This process lost the device. Restart the process, then build the engine again."
    elif any(map(_MEMORY.search, errors)):
        fix = "Close other programs that use the GPU, or build for a smaller batch."
    return BackendError(f"TensorRT fails {action} ({path}): {_line(errors)}.", fix)
