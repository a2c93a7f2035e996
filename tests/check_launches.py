"""Runs a bundle's model of launches by Triton's interpreter, beside the bodies. `test_board.py` starts this in a
process of its own, where TRITON_INTERPRET is set before Triton is imported.

    python -m tests.check_launches BUNDLE        # prints the greatest difference, relative to the output's range
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sparsifiner_edge.bundle.kernels import NAMESPACE, CompiledLaunch, kernel_model
from sparsifiner_edge.export import board
from sparsifiner_edge.ops.triton.compile import kernel
from tests.tables import table_of


def operator(name: str, plan: Any, launch: Any, entry: CompiledLaunch) -> type[OpRun]:
    """A launch of the table as an operator of the reference evaluator."""

    def _run(self: Any, *inputs: Any, **_attributes: Any) -> tuple[Any, ...]:
        batch = inputs[0].shape[0]
        given = dict(zip(entry.inputs, inputs, strict=True))
        tensors = {}
        for n, declared in (entry.inputs | entry.outputs).items():
            buffer = plan.buffers[n]
            raw = given.get(n)
            if raw is None:
                raw = np.zeros((batch, *declared.shape), declared.dtype)
            tensors[n] = torch.from_numpy(np.array(raw, buffer.dtype))
        names = {a: None if b is None else tensors[b] for a, b in launch.arguments.items()}
        kernel(launch.kernel)[(*entry.grid, batch)](**names, **launch.constants, num_warps=launch.warps)
        return tuple(tensors[n].numpy().reshape(batch, *declared.shape) for n, declared in entry.outputs.items())

    return type(name, (OpRun,), {"op_domain": NAMESPACE, "_run": _run})


class GatherElements(OpRun):
    """onnx's own takes 64 entries at most."""

    def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis),)


def main(folder: Path) -> None:
    model, table = onnx.load(folder / "model.onnx"), table_of(folder, 87)
    assert table is not None
    types, operators = board._tensor_types(model), {}
    for together in board._layers([node for node in model.graph.node if node.name in table.nodes]):
        plan: Any = board._plan(model, together, types, 87)
        entries = [entry for node in together for entry in table.nodes[node.name]]
        for entry, launch in zip(entries, plan.launches, strict=True):
            name = entry.launch
            operators[name] = operator(name, plan, launch, table.launches[name])
    side = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    image = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})[0]
    variant = ReferenceEvaluator(kernel_model(model, table), new_ops=[*operators.values(), GatherElements])
    got = variant.run(None, {"image": image})[0]
    print("difference", float(np.abs(got.astype(np.float32) - wanted).max() / np.ptp(wanted.astype(np.float32))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
