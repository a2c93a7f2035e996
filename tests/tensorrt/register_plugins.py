"""Registers a bundle's launches with the real module `tensorrt.plugin`. `test_plugin.py` starts this in a process of
its own, where the real bindings find a stub library. Prints what came of it as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.kernels import CompiledLaunch
from sparsifiner_edge.runtime.cuda import CudaDevice
from sparsifiner_edge.runtime.tensorrt import plugin as kernel_plugin
from tests.tables import bundle_of, table_of

ORIN = CudaDevice("Orin", (8, 7), 8 << 30, True, "12.6")


class Registry:
    """In the place of TensorRT's own, which the stub library has not."""

    def __init__(self) -> None:
        self.creators: list[Any] = []

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators.append(creator)

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[-1]


def bindings(registry: Registry) -> Any:
    """The real module, under the names that a whole installation gives it."""
    trt = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"], trt.__name__ = trt, "tensorrt"
    trt.get_plugin_registry = lambda: registry
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    return trt


def called(trt: Any, identifier: str, launch: CompiledLaunch) -> dict[str, Any]:
    """What TensorRT's registry knows of a plugin, and what its functions give."""
    plugin = sys.modules["tensorrt.plugin"]
    definition = importlib.import_module("tensorrt_bindings.plugin._lib").QDP_REGISTRY[identifier]
    inputs = [plugin.from_shape_expr((1, *launch.tensors[n].shape), trt.DataType.FLOAT) for n in launch.inputs]
    outputs = definition.register_func(*inputs)
    symbol, ptx, parameters, extra = definition.aot_impl_func(*inputs, outputs, 0)
    return {
        "inputs": definition.input_tensor_names, "outputs": definition.num_outputs,
        "types": [o.dtype.name for o in outputs], "ranks": [o.ndim for o in outputs], "symbol": symbol,
        "kind": type(parameters).__name__, "extra": len(extra), "in ptx": f".entry {symbol}(" in ptx,
    }  # fmt: skip


def result(folder: Path) -> dict[str, Any]:
    registry = Registry()
    trt = bindings(registry)
    reason = kernel_plugin.why_not(trt, bundle_of(folder), ORIN)
    if reason is not None:
        return {"reason": reason}
    table = table_of(folder, 87)
    assert table is not None
    made = kernel_plugin.register(trt, table, bundle_of(folder), 87)
    again = kernel_plugin.register(trt, table, bundle_of(folder), 87)
    found = {name: called(trt, name, table.launches[name.partition("::")[2]]) for name in made}
    return {"found": found, "again": made == again, "registered": len(registry.creators)}


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # The bindings' logger prints to standard output.
    json.dump(result(Path(sys.argv[1])), output)
    output.close()
