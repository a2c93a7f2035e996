"""Parts of a layer as separate files, and their milliseconds on this machine, from which a plan's latency is summed.

Linear layers come from the exported first layer of the model, with a free number of tokens that is then fixed.
Attention is built from the operators, since nothing else of it depends on the model.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.export.graph import IR_VERSION, add_bodies, to_onnx
from sparsifiner_edge.export.int8 import quantise_fully
from sparsifiner_edge.ops.bodies import OPSET
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.backend import ProcessorBackend
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.sparse.attention import HeadGeometry
from sparsifiner_edge.sparse.layer import CarriedTokens, SparseLayer
from sparsifiner_edge.sparse.merge import Merging

LINEAR = ("projections", "mlp")
"""Names of the linear parts."""
INPUT = "image"
"""Input name of the linear parts, which the quantiser feeds."""
TOKENS = "tokens"
"""Name of the token axis of the linear parts."""
LEAST_RUNS = 7
"""Minimum number of runs per graph."""
LEAST_S = 0.05
"""Minimum seconds per graph."""
Key = TypeVar("Key")


class Piece(NamedTuple):
    """A graph and its inputs.

    Attributes:
        model: The graph.
        feed: Its inputs.
        stored: Weight precision of the graph: "int8", or None for float32.
    """

    model: onnx.ModelProto
    feed: dict[str, Array]
    stored: str | None = None


class _Linear(nn.Module):
    """Linear part of a layer: the MLP, or norm, QKV and output projection without attention."""

    def __init__(self, layer: SparseLayer, mlp: bool) -> None:
        super().__init__()
        self.layer, self.mlp = layer, mlp

    def forward(self, x: Tensor) -> Tensor:
        if self.mlp:
            return x + self.layer.after_mlp(x)
        attention = self.layer.packed_attention
        qkv = attention.pack(self.layer.entry_norm(x))
        return x + self.layer.after_attention(attention.join(x, qkv[..., : qkv.shape[-1] // 3]))


class _Merge(nn.Module):
    """Merging, as a layer adds it."""

    def __init__(self, merging: Merging, heads: int) -> None:
        super().__init__()
        self.merging, self.heads = merging, heads

    def forward(self, values: Tensor, qkv: Tensor, sizes: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        positions = torch.arange(values.shape[1] - self.merging.prefix)[None]
        tokens = self.merging(CarriedTokens(values, sizes, places, positions), qkv, self.heads)
        return cast(tuple[Tensor, ...], tokens[:3])


def linear_pieces(
    layer: SparseLayer, width: int, int8: bool, prefix: int, counts: Sequence[int]
) -> dict[tuple[str, int], Piece]:
    """Return the two linear parts of a layer in float32 or int8, by name and number of patches."""
    example, free = torch.randn(1, 64, width, generator=torch.Generator().manual_seed(0)), torch.export.Dim(TOKENS)
    pieces = {}
    for name in LINEAR:
        model = to_onnx(_Linear(layer, name == "mlp").eval(), {INPUT: example}, ["output"], {"x": {1: free}})
        del model.graph.value_info[:]  # stale: another number of tokens, and biases that the quantiser reshapes
        model = quantise_fully(model, [example.numpy()]) if int8 else model
        for patches in counts:
            (fixed := onnx.ModelProto()).CopyFrom(model)
            for value in (*fixed.graph.input, *fixed.graph.output):
                value.type.tensor_type.shape.dim[1].dim_value = prefix + patches
            feed = {INPUT: _random(1, prefix + patches, width)}
            pieces[name, patches] = Piece(fixed, feed, "int8" if int8 else None)
    return pieces


@functools.lru_cache(maxsize=32)
def merging_piece(geometry: HeadGeometry, prefix: int, window: int, patches: int, width: int, whole: int) -> Piece:
    """Return a graph that merges an eighth of the patches; `whole` is the number of patches of the image."""
    tokens, channels = prefix + patches, 3 * geometry.heads * geometry.dim
    feed: dict[str, Array] = {
        "values": _random(1, tokens, width),
        "qkv": _random(1, tokens, channels),
        "sizes": np.ones((1, tokens), np.float32),
        "places": np.arange(whole)[None] * patches // whole,
    }
    example = {name: torch.from_numpy(value) for name, value in feed.items()}
    module = _Merge(Merging(max(1, patches // 8), prefix, window), geometry.heads)
    return Piece(to_onnx(module.eval(), example, ["values_out", "sizes_out", "places_out"]), feed)


def attention_piece(geometry: HeadGeometry, prefix: int, patches: int, config: SparsityConfig, merged: bool) -> Piece:
    """Return selection and attention of a layer.

    Args:
        geometry: Sizes of the heads.
        prefix: Number of tokens that are not patches.
        patches: Number of patches.
        config: Settings with one share of keys; 1 is dense.
        merged: Sizes of the tokens are inputs; otherwise all are 1.
    """
    tokens, channels = prefix + patches, geometry.heads * geometry.dim
    feed: dict[str, Array] = {"qkv": _random(1, tokens, 3 * channels), "sizes": np.ones((1, tokens), np.float32)}
    weights = [] if merged else [numpy_helper.from_array(feed.pop("sizes"), "sizes")]
    heads = {"num_heads": geometry.heads, "scale": float(geometry.scale)}
    if config.keep == 1:
        nodes = [_node("DenseAttention", ["qkv", "sizes"], "output", heads)]
    else:
        layout = config.layout(patches, prefix)
        lists = {**heads, "num_prefix": prefix, "tile": config.tile, "key_pool": layout.key_pool}
        choice = {"query_pool": config.query_pool, "keys": layout.keys, "value_power": config.value_power}
        for name in ("proj_q", "proj_k"):
            projection = _random(geometry.heads, geometry.dim, config.channels)
            weights.append(numpy_helper.from_array(projection, name))
        nodes = [
            _node("KeySelect", ["qkv", "sizes", "proj_q", "proj_k"], "indices", lists | choice),
            _node("SparseAttention", ["qkv", "sizes", "indices"], "output", {**lists, "prefix_keys": 1}),
        ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in feed.items()]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, tokens, channels])
    graph = helper.make_graph(nodes, "attention", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    add_bodies(model)
    return Piece(model, feed)


def _node(operator: str, inputs: list[str], output: str, attributes: dict[str, Any]) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], name=operator, domain=DOMAIN, **attributes)


def _random(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


_times: dict[tuple[Execution, str], float] = {}
"""Cache of this process: deployments that differ only in their linear layers share attention."""
_nominal: dict[Execution, float] = {}
"""Milliseconds of the first reference in each execution; all times are relative to it."""
GROUP = 6
"""Number of graphs between two measurements of the reference."""


def piece_times(
    pieces: Mapping[Key, Piece], execution: Execution, progress: Progress | None = None
) -> dict[Key, float]:
    """Return the milliseconds of each graph alone in a CPU backend; equal graphs are measured once.

    A reference, the first graph, is measured again every few graphs, which cancels changes of the machine's speed.
    Besides its session, only one is open at a time.

    Raises:
        MissingExtraError: The backend is not installed.
        BackendError: The backend cannot run here.
    """
    named = {key: (execution, _hash(piece)) for key, piece in pieces.items()}
    lacking = [(name, pieces[key]) for key, name in named.items() if name not in _times]
    stage = f"timing parts of layers in {execution.backend}"
    with contextlib.ExitStack() as stack:
        reference = _opened(next(iter(pieces.values())), execution, stack) if lacking else None
        before = reference() if reference else 0.0
        for start in range(0, len(lacking), GROUP):
            group, taken = dict(lacking[start : start + GROUP]), dict[tuple[Execution, str], float]()
            for number, (name, piece) in enumerate(group.items(), start):
                with contextlib.ExitStack() as inner:
                    taken[name] = _opened(piece, execution, inner)()
                if progress:
                    progress(stage, number, len(lacking))
            assert reference is not None
            after = reference()
            nominal = _nominal.setdefault(execution, before)
            _times.update({name: ms * nominal / ((before + after) / 2) for name, ms in taken.items()})
            before = after
    return {key: _times[name] for key, name in named.items()}


def _hash(piece: Piece) -> str:
    """Return a hash of everything that the time depends on: the graph without weight values, and the input shapes."""
    bare = onnx.ModelProto()
    bare.CopyFrom(piece.model)
    for tensor in bare.graph.initializer:
        if len(tensor.dims) > 1:  # Shapes, axes and scales belong to the computation.
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    shapes = sorted((name, str(value.dtype), value.shape) for name, value in piece.feed.items())
    content = bare.SerializeToString(deterministic=True) + repr((shapes, piece.stored)).encode()
    return hashlib.sha256(content).hexdigest()


def _opened(piece: Piece, execution: Execution, stack: contextlib.ExitStack) -> Callable[[], float]:
    """Return a function that measures a graph's milliseconds as the lower quartile of its run times.

    Other work on the machine only makes runs slower.
    """
    backend = cast(ProcessorBackend, find_backend(execution))  # A request names only these.
    session = backend.session(Path("layer"), piece.model.SerializeToString(), piece.stored)
    opened = stack.enter_context(session)

    def measure() -> float:
        taken = call_ms(lambda: opened.infer(piece.feed), LEAST_RUNS, least_s=LEAST_S, warm_up=1)
        return statistics.quantiles(taken)[0]

    return measure
