"""A fake TensorRT with real control flow and results.

An engine is a metadata line and a model, which ONNX Runtime evaluates in the fake GPU's memory.
`tests/tensorrt/test_bindings.py` compares its names with the real wheels.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sparsifiner_edge.arrays import bytes_at
from sparsifiner_edge.bundle.kernels import NAMESPACE
from sparsifiner_edge.runtime.tensorrt import plugin as tensorrt_plugin
from sparsifiner_edge.runtime.tensorrt import plugin_v3
from tests.fakes.gpu import CudaError, Gpu

VERSIONS = {"10.3": "10.3.0", "10.9": "10.9.0.34", "11.4": "11.4.0.106"}
"""The version of JetPack 6; the first with ahead-of-time plugins; the newest."""
_DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclasses.dataclass
class Behaviour:
    """Behaviour and records of the fake. `Gpu.fail` adds errors: "build", "context", "enqueue" and "enqueue to record".

    Attributes:
        warnings: Warnings of a build.
        original: Model that is built instead of one with kernel launches.
        milliseconds: Duration of a run by operator prefix; the first prefix found in the model counts.
        seen: Settings that were made, by name.
    """

    warnings: Sequence[str] = ()
    original: bytes = b""
    milliseconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)


def install_tensorrt(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, version: str = "10.3", behaviour: Behaviour | None = None
) -> SimpleNamespace:
    """Install the fake of a TensorRT version for one test, with module `plugin` if it has ahead-of-time plugins."""
    behaviour = behaviour or Behaviour()
    trt, seen = make_tensorrt(gpu, behaviour), behaviour.seen
    trt.__name__, trt.__version__ = "tensorrt", VERSIONS[version]
    plugin = SimpleNamespace(TensorDesc=int, KernelLaunchParams=int, SymIntExprs=int)
    for kind in ("register", "aot_impl"):
        seen[kind] = []
        setattr(plugin, kind, lambda name, kind=kind: lambda _: seen[kind].append(name))
    if version != "10.3":
        trt.QuickPluginCreationRequest = object
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    monkeypatch.setattr(tensorrt_plugin, "_registered", set())
    monkeypatch.setattr(plugin_v3, "_registered", {})
    monkeypatch.setattr(plugin_v3, "driver", SimpleNamespace)
    return trt


def _succeeds(gpu: Gpu, logger: Any, action: str) -> bool:
    """Return True if an action shall succeed; otherwise log its error."""
    try:
        gpu.check(action)
    except CudaError as error:
        lost = ", an illegal memory access was encountered" if gpu.lost else ""
        logger.log(1, f"{error}{lost}")
        return False
    return True


def _plugins(seen: dict[str, Any]) -> dict[str, Any]:
    """Return the base classes of Python plugins and the registry that takes them."""

    def register(creator: Any, namespace: str) -> bool:
        seen.setdefault("creators", []).append(f"{namespace}::{creator.name}")
        return bool(seen.get("takes plugins", True))

    names = ["IPluginCreatorV3One", *(f"IPluginV3{part}" for part in ("", "OneCore", "OneBuild", "OneRuntime"))]
    fields = type("Fields", (), {"__init__": lambda *_: None})
    return {
        **{name: type(name, (), {}) for name in names},
        "PluginFieldCollection": fields,
        "PluginFieldCollection_": fields,
        "get_plugin_registry": lambda: SimpleNamespace(register_creator=register),
    }


def _config(seen: dict[str, Any]) -> SimpleNamespace:
    """Return a builder's configuration."""

    def timing_cache(content: bytes) -> Any:
        damaged = bool(content) and not content.startswith(b"times ")
        return None if damaged else SimpleNamespace(serialize=lambda: content or b"times of nothing")

    return SimpleNamespace(
        clear_flag=lambda flag: seen.update(cleared=flag),
        set_memory_pool_limit=lambda pool, pool_size: seen.update({pool: pool_size}),
        add_optimization_profile=lambda profile: 0,
        create_timing_cache=timing_cache,
        set_timing_cache=lambda cache, ignore_mismatch: not seen.update({"timing cache": cache.serialize()}),
        get_timing_cache=lambda: timing_cache(b"times of a build"),
    )


def make_tensorrt(gpu: Gpu, b: Behaviour) -> SimpleNamespace:
    """Return a replacement of the module `tensorrt`, as far as this package uses it."""
    seen, config = b.seen, _config(b.seen)

    def parser(network: Any, logger: Any) -> SimpleNamespace:
        def parse(content: bytes) -> bool:
            network.model = onnx.load_from_string(content)
            image = network.model.graph.input[0]
            shape = [size.dim_value if size.HasField("dim_value") else -1 for size in image.type.tensor_type.shape.dim]
            network.get_input = lambda index: SimpleNamespace(name=image.name, shape=shape)
            return True

        return SimpleNamespace(parse=parse)

    def builder(logger: Any) -> SimpleNamespace:
        def build(network: Any, config: Any) -> bytes | None:
            for message in b.warnings:
                logger.log(2, message)
            if not _succeeds(gpu, logger, "build"):
                return None
            operators = [node.op_type for node in network.model.graph.node]
            took = [ms for name, ms in b.milliseconds.items() if any(kind.startswith(name) for kind in operators)]
            plugins = any(node.domain == NAMESPACE for node in network.model.graph.node)
            about = {"profile": seen.pop("profile", {}), "milliseconds": (*took, 2.0)[0], "plugins": plugins}
            model = b.original if plugins else network.model.SerializeToString()
            return json.dumps(about).encode() + b"\n" + model

        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(num_inputs=1),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: SimpleNamespace(
                set_shape=lambda name, *shapes: seen.update(profile={name: shapes})
            ),
            build_serialized_network=build,
        )

    def runtime(logger: Any) -> SimpleNamespace:
        # Like the real one, it is created without a driver; unlike it, it does not end the process on use.
        assert gpu.calls, "an object of TensorRT before CUDA has answered"
        return SimpleNamespace(deserialize_cuda_engine=lambda content: ICudaEngine(content, gpu, seen, logger))

    return SimpleNamespace(
        **_plugins(seen),
        ILogger=type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2}),
        Builder=builder,
        OnnxParser=parser,
        Runtime=runtime,
        nptype=lambda dtype: dtype,
        IBuilderConfig=config,
        ICudaEngine=ICudaEngine,
        IExecutionContext=IExecutionContext,
        BuilderFlag=SimpleNamespace(TF32="TF32"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0),
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
    )


class ICudaEngine:
    def __init__(self, content: bytes, gpu: Gpu, seen: dict[str, Any], logger: Any) -> None:
        about, _, model = content.partition(b"\n")
        self._about, self._gpu, self._seen, self._logger = json.loads(about), gpu, seen, logger
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._values = {value.name: value for value in (*self._inputs, *outputs)}
        gpu.hold(self, "ICudaEngine")

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    def get_tensor_name(self, index: int) -> str:
        return list(self._values)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._values[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return np.dtype(_DTYPES[self._values[name].type])

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == self._inputs[0].name else "OUTPUT"

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        return self._about["profile"].get(name, [self.get_tensor_shape(name)] * 3)

    def create_execution_context(self) -> Any:
        return IExecutionContext(self) if _succeeds(self._gpu, self._logger, "context") else None


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._batch, self._addresses = engine, 0, dict[str, int]()
        engine._gpu.hold(self, "IExecutionContext")

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._batch = shape[0]
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._batch if size == -1 else size for size in self._engine.get_tensor_shape(name))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, seen = self._engine._gpu, self._engine._seen
        seen["runs"] = seen.get("runs", 0) + 1
        kinds = ["enqueue", *["enqueue to record"] * (stream_handle in gpu.recording)]
        succeeds = all(_succeeds(gpu, self._engine._logger, kind) for kind in kinds)
        if succeeds:
            gpu.put(stream_handle, self._compute, self._engine._about["milliseconds"])
        return succeeds

    def _compute(self) -> None:
        inputs = {value.name: np.array(self._view(value.name)) for value in self._engine._inputs}
        for output in self._engine._session.get_outputs():
            np.copyto(self._view(output.name), self._engine._session.run([output.name], inputs)[0])

    def _view(self, name: str) -> Any:
        shape, dtype = self.get_tensor_shape(name), self._engine.get_tensor_dtype(name)
        return bytes_at(self._addresses[name], math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
