"""Milliseconds of small graphs on this machine, each measured once and kept: for `export --measure` and for search."""

from __future__ import annotations

import contextlib
import hashlib
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import onnx

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.artifacts import read_json, sha256
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.export.sessions import processor_run
from sparsifiner_edge.files import write_text
from sparsifiner_edge.machine import environment, machine, package_version
from sparsifiner_edge.ops import native
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.runtime.backend import cache_folder, native_library
from sparsifiner_edge.text import dump_json

TABLE_SCHEMA = 1
LEAST_RUNS, LEAST_S = 9, 0.08
"""Of each graph. One session is open at a time: threads of another would spin meanwhile."""
Key = TypeVar("Key")


class Piece(NamedTuple):
    """A graph and what it is run on; stored: precision of its linear layers, where it is not the backend's own."""

    model: onnx.ModelProto
    feed: dict[str, Array]
    stored: str | None = None


class _Table(msgspec.Struct, kw_only=True):
    """about: all that times depend on but the graph. kernels: that ran it. ms: by the graph's own hash."""

    schema_version: int = TABLE_SCHEMA
    about: Any
    kernels: str = ""
    ms: dict[str, float] = {}


class PieceTimes(NamedTuple):
    """Milliseconds by name; kernels: that ran them. about: machine, threads, versions."""

    ms: dict[Any, float]
    kernels: str
    about: Any


def piece_times(pieces: Mapping[Key, Piece], execution: Execution, progress: Progress | None = None) -> PieceTimes:
    """Of each graph, alone, in a backend of the processor; those measured before come from the cache.

    Raises:
        ConfigError: the backend is none of the processor's.
        MissingExtraError, BackendError: it cannot run here.
    """
    table, file = _table(execution)
    named = {key: _hash(piece) for key, piece in pieces.items()}
    lacking = {name: pieces[key] for key, name in named.items() if name not in table.ms}
    for number, (name, piece) in enumerate(lacking.items(), 1):
        table.ms[name], table.kernels = measured_piece(piece, execution)
        if progress:
            progress(f"timing parts of layers in {execution.backend}", number, len(lacking))
    if lacking:
        with contextlib.suppress(ArtifactError, OSError):  # A full or sealed disk costs the next search a minute.
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, dump_json(write_record(table)))
    return PieceTimes({key: table.ms[name] for key, name in named.items()}, table.kernels, table.about)


def _table(execution: Execution) -> tuple[_Table, Path]:
    """What is known of this machine in a backend, and its file."""
    here, library = write_record(machine()), native_library("auto")
    packages = {name: package_version(name) for name in ("sparsifiner-edge", "onnxruntime", "openvino")}
    about = {
        "backend": execution.backend, "precision": execution.precision, "threads": execution.cores,
        "machine": {name: here[name] for name in ("cpu_model", "logical_cores", "kernel", "board")},
        "packages": write_record(packages), "variables": environment().variables,
        "kernels": None if library is None else [native.target(), sha256(library)],
    }  # fmt: skip
    file = cache_folder() / "latency" / f"{_digest(dump_json(about).encode())}.json"
    with contextlib.suppress(ArtifactError):
        found = read_record(read_json(file, TABLE_SCHEMA, "Delete it."), _Table, file, "Delete it.")
        if found.about == about:
            return found, file
    return _Table(about=about), file


def _hash(piece: Piece) -> str:
    """Of all that its time depends on: the graph without the values of its weights, and the shapes it is run on."""
    bare = onnx.ModelProto()
    bare.CopyFrom(piece.model)
    for tensor in bare.graph.initializer:
        if len(tensor.dims) > 1:  # A shape, an axis or a scale is what the graph does.
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    shapes = sorted((name, str(value.dtype), value.shape) for name, value in piece.feed.items())
    return _digest(bare.SerializeToString(deterministic=True) + repr((shapes, piece.stored)).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def measured_piece(piece: Piece, execution: Execution) -> tuple[float, str]:
    """Milliseconds of a graph, as the faster quarter of runs has them, and the kernels that ran it: what else a machine
    does makes some slower.
    """
    with processor_run(piece.model, execution, piece.stored) as (run, kernels):
        taken = call_ms(lambda: run(piece.feed), LEAST_RUNS, least_s=LEAST_S, warm_up=1)
    return statistics.quantiles(taken)[0], kernels
