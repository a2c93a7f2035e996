"""Holds the fake and a bundle's plugins against TensorRT's real Python bindings. `test_bindings.py` starts this in a
process of its own, where they find stub libraries: nothing of those is called. Prints what came of it as JSON.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.kernels import NAMESPACE, CompiledLaunch
from sparsifiner_edge.runtime.cuda import CudaDevice
from sparsifiner_edge.runtime.tensorrt import plugin as kernel_plugin
from tests.fakes.gpu import Gpu
from tests.fakes.tensorrt import Behaviour, make_tensorrt
from tests.tables import bundle_of, table_of

ORIN = CudaDevice("Orin", "8.7", 8 << 30, True, "12.6")


class Registry:
    """In the place of TensorRT's own, which the stub library has not."""

    def __init__(self) -> None:
        self.creators: list[Any] = []

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators.append(creator)

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[-1]


def lacking(trt: Any) -> list[str]:
    """Names of the fake that the real module has not, or takes other arguments for."""
    found = []
    for name, fake in vars(make_tensorrt(Gpu(), Behaviour())).items():
        real = getattr(trt, name, None)
        if isinstance(fake, type) and issubclass(fake, enum.Enum):
            found += [f"{name}.{member}" for member in fake.__members__ if member not in real.__members__]
        elif isinstance(fake, type):
            members = {key: body for key, body in vars(fake).items() if not key.startswith("_")}
            found += [f"{name}.{key}" for key, body in members.items() if not fits(getattr(real, key, None), body)]
        elif not name.startswith("_") and real is None:
            found.append(name)
    return found


def fits(real: Any, fake: Any) -> bool:
    """Whether one of the signatures in a docstring of pybind11 takes as many arguments as the fake."""
    if real is None or not inspect.isfunction(fake):
        return real is not None
    for inside in re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", real.__doc__, re.MULTILINE):
        parameters = re.findall(r"(?:^|, )\w+: (.*?)(?=, \w+: |$)", inside)
        least = sum(" = " not in parameter for parameter in parameters)
        if least <= len(inspect.signature(fake).parameters) <= len(parameters):
            return True
    return False


def called(trt: Any, identifier: str, launch: CompiledLaunch) -> dict[str, Any]:
    """What TensorRT's registry knows of a plugin, and what its functions give."""
    plugin = sys.modules["tensorrt.plugin"]
    definition = importlib.import_module("tensorrt_bindings.plugin._lib").QDP_REGISTRY[identifier]
    inputs = [plugin.from_shape_expr((1, *x.shape), trt.DataType.FLOAT) for x in launch.inputs.values()]
    outputs = definition.register_func(*inputs)
    symbol, ptx, parameters, extra = definition.aot_impl_func(*inputs, outputs, 0)
    return {
        "inputs": definition.input_tensor_names, "types": [o.dtype.name for o in outputs],
        "ranks": [o.ndim for o in outputs], "symbol": symbol, "kind": type(parameters).__name__, "extra": len(extra),
        "in ptx": f".entry {symbol}(" in ptx,
    }  # fmt: skip


def result(folder: Path) -> dict[str, Any]:
    trt, registry = importlib.import_module("tensorrt_bindings"), Registry()
    # Under the names that a whole installation gives it.
    sys.modules["tensorrt"], trt.__name__ = trt, "tensorrt"
    trt.get_plugin_registry = lambda: registry
    reason = kernel_plugin.why_not(trt, bundle_of(folder), ORIN)
    if reason is not None:
        return {"lacking": lacking(trt), "reason": reason}
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    table, model = table_of(folder, 87), (folder / "model.onnx").read_bytes()
    assert table is not None
    for _ in range(2):  # A name is registered once.
        kernel_plugin.with_plugins(trt, model, bundle_of(folder), ORIN)
    found = {name: called(trt, f"{NAMESPACE}::{name}", launch) for name, launch in table.launches.items()}
    return {"lacking": lacking(trt), "found": found, "registered": len(registry.creators)}


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # The bindings' logger prints to standard output.
    json.dump(result(Path(sys.argv[1])), output)
    output.close()
