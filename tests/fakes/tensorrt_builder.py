"""The half of the fake TensorRT that builds: what it is told is kept, and an engine is a header with the model."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import onnx

from tests.fakes.gpu import Gpu

if TYPE_CHECKING:
    from tests.fakes.tensorrt import Behaviour


def shape(value: Any) -> tuple[int, ...]:
    """Of a graph's input or output; -1 where dynamic."""
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


def builder_classes(trt: Any, gpu: Gpu, b: Behaviour) -> list[type]:
    """What a build uses."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def log(self, severity: int, msg: str) -> None:
            raise NotImplementedError

    class IHostMemory(bytes):
        @property
        def nbytes(self) -> int:
            return len(self)

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> IHostMemory:
            return IHostMemory(self.content)

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self.shapes[input] = [tuple(shape) for shape in (min, opt, max)]

    class IBuilderConfig:
        def __init__(self) -> None:
            self._cache: ITimingCache | None = None

        def clear_flag(self, flag: Any) -> None:
            b.seen.setdefault("cleared", set()).add(flag.name)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            b.seen[pool.name] = pool_size

        def add_optimization_profile(self, profile: Any) -> int:
            b.seen["profile"] = dict(profile.shapes)
            return 0

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            damaged = bool(serialized_timing_cache) and not serialized_timing_cache.startswith(b"times ")
            return None if damaged else ITimingCache(serialized_timing_cache or b"times of nothing")

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            fits = b"other device" not in cache.content
            self._cache = cache if fits else None
            b.seen["timing cache"] = cache.content
            return fits

        def get_timing_cache(self) -> Any:
            return self._cache and ITimingCache(b"times of a build")

    class ITensor:
        def __init__(self, value: Any) -> None:
            self.name, self.shape = value.name, shape(value)

    class INetworkDefinition:
        def __init__(self) -> None:
            self.model: onnx.ModelProto | None = None

        @property
        def num_inputs(self) -> int:
            return len(self.model.graph.input)

        @property
        def num_layers(self) -> int:
            return len(self.model.graph.node)

        def get_input(self, index: int) -> ITensor:
            return ITensor(self.model.graph.input[index])

    class ParserError:
        def __init__(self, number: int, node: Any) -> None:
            self._number, self._node = number, node

        def node(self) -> int:
            return self._number

        def node_name(self) -> str:
            return str(self._node.name)

        def node_operator(self) -> str:
            return str(self._node.op_type)

        def desc(self) -> str:
            return "no importer\n registered for op"

        def local_function_stack_size(self) -> int:
            return 1 if self._node.domain else 0

        def local_function_stack(self) -> list[str]:
            return ["SparseAttention"] if self._node.domain else []

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network, self._errors = network, []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def parse(self, model: bytes, path: str | None = None) -> bool:
            parsed = onnx.load_from_string(bytes(model))
            nodes = list(enumerate(parsed.graph.node))
            self._errors = [ParserError(number, node) for number, node in nodes if node.op_type in b.refuse]
            self._network.model = parsed
            return not self._errors

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            assert flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            for message in b.warnings:
                self._logger.log(ILogger.WARNING, message)
            for message in b.build or ():
                self._logger.log(ILogger.ERROR, message)
            if b.build is not None:
                return None
            header = {"version": trt.__version__, "sm": list(gpu.sm), "profile": b.seen.pop("profile", {})}
            text = json.dumps(header).encode()
            return IHostMemory(struct.pack("<I", len(text)) + text + network.model.SerializeToString())

    return [
        ILogger, IHostMemory, ITimingCache, IOptimizationProfile, IBuilderConfig, ITensor,
        INetworkDefinition, ParserError, OnnxParser, Builder,
    ]  # fmt: skip
