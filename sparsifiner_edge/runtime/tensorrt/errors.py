"""What TensorRT says, and what the user sees of it. `trt` is the module `tensorrt` or `tensorrt_rtx`."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

from sparsifiner_edge.errors import BackendError, UnsupportedModelError

_MOST_MESSAGES = 50
PLUGIN_FAILURES = deque[str](maxlen=5)
"""Why plugins of ours failed in this process: of what is raised in them TensorRT tells a logger of its own alone."""
_MEMORY = re.compile(r"out[ _]?of[ _]?memory|cudaErrorMemoryAllocation|insufficient (?:gpu )?memory", re.IGNORECASE)
_LOST = re.compile(
    r"illegal[ _](?:memory access|address|instruction)|unspecified launch failure|LAUNCH_FAILED|device lost|misaligned",
    re.IGNORECASE,
)


def make_logger(trt: Any) -> Any:
    """A logger of TensorRT's that keeps the latest `errors` and `warnings`, and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors, self.warnings = deque[str](maxlen=_MOST_MESSAGES), deque[str](maxlen=_MOST_MESSAGES)

        def log(self, severity: Any, msg: str) -> None:
            """Called by TensorRT, from any of its threads."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(msg)

    return Logger()


def _errors_of(logger: Any) -> list[str]:
    """Also of plugins of ours."""
    errors = [*PLUGIN_FAILURES, *logger.errors]
    PLUGIN_FAILURES.clear()
    return errors


def _line(errors: list[str]) -> str:
    """In one line, or that there was none."""
    return " ".join(" ".join(errors).split())[:800] or "TensorRT gave no reason"


def parse_error(parser: Any, name: str) -> UnsupportedModelError:
    """The error for a model that the parser of TensorRT, by its name and version, rejects: names the nodes."""
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
    """The error for a build that gave no engine; `how` it was done.

    TensorRT reports memory that was too small as tactics skipped, and then that no implementation is left.
    """
    errors = _errors_of(logger)
    if any(map(_MEMORY.search, (*errors, *logger.warnings))):
        return BackendError(
            f"{name} ran out of memory while building. {how}",
            "Close other programs that use the GPU, or build for a smaller batch: a Jetson shares its memory with the "
            "processor.",
        )
    return BackendError(
        f"{name} built no engine: {_line(errors)}. {how}",
        "If it lacks an implementation, often memory was too small for every one: close other programs. Otherwise "
        "export in another precision, upgrade TensorRT, or use --backend onnxruntime.",
    )


def run_error(path: Path, action: str, logger: Any, fix: str) -> BackendError:
    """The error for an engine that fails `action`; `fix` where neither its memory nor the device is the reason."""
    errors = _errors_of(logger)
    if any(map(_LOST.search, errors)):
        fix = "The device is lost to this process: start it again; then build the engine again."
    elif any(map(_MEMORY.search, errors)):
        fix = "Close other programs that use the GPU, or build for a smaller batch."
    return BackendError(f"TensorRT fails {action} ({path}): {_line(errors)}.", fix)
