"""Where sparse attention pays on this machine: measured, operator by operator, before a file is written."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsifiner_edge.bundle.entries import Choice, Measured
from sparsifiner_edge.export.graph import to_onnx
from sparsifiner_edge.export.sessions import file_session
from sparsifiner_edge.ops.kernels import NATIVE, described
from sparsifiner_edge.runtime.onnxruntime.session import native_library
from sparsifiner_edge.sparse.attention import SparseAttention, restore_dense
from sparsifiner_edge.sparse.calibrate import sparse_layers

ROUNDS, RUNS = 7, 5


def keep_dense_where_slower(model: Any) -> Measured:
    """Turn sparse layers of a model, in place, into dense ones where sparse attention is slower on this machine.

    Both run on the kernels that a session would use here, with the layer's own sizes, selection and cells included, one
    image at a time, in turn; medians decide. Layers of equal sizes are measured once.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, SparseAttention]]] = {}
    for number, block in enumerate(model.blocks):
        layer = block.attn
        if isinstance(layer, SparseAttention):
            key = (layer.num_heads, layer.head_dim, layer.num_prefix, layer.layout, layer.sparsity)
            groups.setdefault(key, []).append((number, layer))
    choices = []
    for members in groups.values():
        sparse, dense = _measure(members[0][1])
        slower = sparse > dense
        for _, layer in members if slower else ():
            restore_dense(layer)
        choices.append(Choice(tuple(number for number, _ in members), sparse, dense, slower))
    kernels = described(NATIVE.operators, native_library("auto") is not None)
    return Measured(kernels, tuple(choices), len(sparse_layers(model)))


class _Attend(nn.Module):
    """A layer's attention alone: qkv [1,N,3C] -> [1,N,C]."""

    def __init__(self, layer: SparseAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        return self.layer.attend(qkv)


def _measure(layer: SparseAttention) -> tuple[float, float]:
    """Median milliseconds of a layer's selection and sparse attention, and of dense attention."""
    tokens = layer.layout.patches + layer.num_prefix
    qkv = np.random.default_rng(0).normal(size=(1, tokens, 3 * layer.num_heads * layer.head_dim)).astype(np.float32)
    sessions = []
    for densely in (False, True):
        layer.densely = densely
        sessions.append(file_session(to_onnx(_Attend(layer).eval(), {"qkv": torch.from_numpy(qkv)}, ["output"])))
    layer.densely = False
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for session, taken in zip(sessions, times, strict=True):
            session.run(None, {"qkv": qkv})  # the other's threads may still spin
            for _ in range(RUNS):
                start = time.perf_counter_ns()
                session.run(None, {"qkv": qkv})
                taken.append((time.perf_counter_ns() - start) / 1e6)
    return statistics.median(times[0]), statistics.median(times[1])
