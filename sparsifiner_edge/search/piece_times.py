"""Milliseconds of small graphs on this machine: what a search sums the latency of plans from."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import onnx

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.backend import ProcessorBackend
from sparsifiner_edge.runtime.open import find_backend

LEAST_RUNS, LEAST_S = 9, 0.08
"""Of each graph. One session is open at a time: threads of another would spin meanwhile."""
Key = TypeVar("Key")


class Piece(NamedTuple):
    """A graph and what it is run on; stored: precision of its linear layers, where it is not the backend's own."""

    model: onnx.ModelProto
    feed: dict[str, Array]
    stored: str | None = None


_times: dict[tuple[Execution, str], tuple[float, str]] = {}
"""Of this process: engines that differ in their linear layers alone have attention in common."""


def piece_times(
    pieces: Mapping[Key, Piece], execution: Execution, progress: Progress | None = None
) -> tuple[dict[Key, float], str]:
    """Milliseconds of each graph, alone, in a backend of the processor, and the kernels that ran them.

    Equal graphs are measured once.

    Raises:
        MissingExtraError, BackendError: it cannot run here.
    """
    named = {key: (execution, _hash(piece)) for key, piece in pieces.items()}
    lacking = {name: pieces[key] for key, name in named.items() if name not in _times}
    for number, (name, piece) in enumerate(lacking.items(), 1):
        _times[name] = _measured(piece, execution)
        if progress:
            progress(f"timing parts of layers in {execution.backend}", number, len(lacking))
    found = {key: _times[name] for key, name in named.items()}
    return {key: ms for key, (ms, _) in found.items()}, next((kernels for _, kernels in found.values()), "")


def _hash(piece: Piece) -> str:
    """Of all that its time depends on: the graph without the values of its weights, and the shapes it is run on."""
    bare = onnx.ModelProto()
    bare.CopyFrom(piece.model)
    for tensor in bare.graph.initializer:
        if len(tensor.dims) > 1:  # A shape, an axis or a scale is what the graph does.
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    shapes = sorted((name, str(value.dtype), value.shape) for name, value in piece.feed.items())
    content = bare.SerializeToString(deterministic=True) + repr((shapes, piece.stored)).encode()
    return hashlib.sha256(content).hexdigest()


def _measured(piece: Piece, execution: Execution) -> tuple[float, str]:
    """Milliseconds of a graph, as the faster quarter of runs has them, and the kernels that ran it: what else a machine
    does makes some slower.
    """
    backend = cast(ProcessorBackend, find_backend(execution))  # A request names no others.
    with backend.session(Path("layer"), piece.model.SerializeToString(), piece.stored) as opened:
        taken = call_ms(lambda: opened.infer(piece.feed), LEAST_RUNS, least_s=LEAST_S, warm_up=1)
        return statistics.quantiles(taken)[0], str(opened.description.kernels)
