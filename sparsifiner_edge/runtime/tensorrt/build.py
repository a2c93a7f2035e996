"""Building an engine with full TensorRT, 10.3 to 11.x, for the GPU of this machine; what TensorRT-RTX shares of it.

The network is strongly typed: every type comes from the ONNX file, int8 through its QDQ nodes. Nothing here runs
before CUDA has answered.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.artifacts import MAX_FILE
from sparsifiner_edge.bundle.engines import BatchRange, Details
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import read_bytes, write_bytes
from sparsifiner_edge.runtime.backend import cache_folder
from sparsifiner_edge.runtime.cuda import CudaDevice
from sparsifiner_edge.runtime.tensorrt.errors import Messages, build_error, make_logger, rejected_model


class Prepared(NamedTuple):
    """TensorRT's objects for one build: a model, parsed, and how to compile it."""

    builder: Any
    network: Any
    config: Any
    messages: Messages


def build_engine_file(
    trt: Any, model: bytes, device: CudaDevice, free: int, batch: BatchRange
) -> tuple[bytes, Details]:
    """Build an engine; returns its content and what is known about it.

    Args:
        trt: the module `tensorrt`. model: ONNX.
        device: as CUDA tells. free: bytes of its memory that are free.
        batch: sizes that it takes.

    Raises:
        UnsupportedModelError: the parser rejects the model; its nodes are named.
        ConfigError: an axis other than the batch is dynamic.
        BackendError: TensorRT builds no engine.
    """
    builder, network, config, messages = prepare_build(trt, model, batch, f"TensorRT {trt.__version__}")
    # Of the free memory an integrated GPU leaves half to the system.
    workspace = free // 4 * (2 if device.integrated else 3)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    times = timing_cache_path(device, str(trt.__version__))
    load_timing_cache(config, times)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise build_error(messages, workspace, free)
    save_timing_cache(config, times)
    warnings = tuple(messages.warnings)[:10]
    return bytes(serialised), Details(layers=int(network.num_layers), device=device.name, warnings=warnings)


def prepare_build(trt: Any, model: bytes, batch: BatchRange, name: str) -> Prepared:
    """A strongly typed network of an ONNX file, and a configuration that keeps its precision and takes its batches.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`. name: its name and version, for messages.

    Raises:
        UnsupportedModelError: the parser rejects the model; its nodes are named.
        ConfigError: an axis other than the batch is dynamic.
    """
    messages = Messages()
    logger = make_logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise rejected_model(parser, name)
    config = builder.create_builder_config()
    # TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more.
    config.clear_flag(trt.BuilderFlag.TF32)
    _add_profile(builder, network, config, batch)
    return Prepared(builder, network, config, messages)


def _add_profile(builder: Any, network: Any, config: Any, batch: BatchRange) -> None:
    """Sizes of the first axis where it is dynamic; a model whose axes are all fixed needs no profile."""
    profile = builder.create_optimization_profile()
    dynamic = False
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise ConfigError(
                f"Input {tensor.name!r} has shape {list(shape)}: only the batch may be dynamic.", "Export it again."
            )
        if shape[:1] == (-1,):
            dynamic = True
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in (batch.least, batch.best, batch.most)))
    if dynamic:
        config.add_optimization_profile(profile)


def load_timing_cache(config: Any, path: Path) -> None:
    """Give TensorRT the times of kernels that earlier builds measured, or an empty cache."""
    content = b""
    with contextlib.suppress(ArtifactError):
        content = read_bytes(path, MAX_FILE)
    for attempt in dict.fromkeys((content, b"")):  # A damaged file is as good as none.
        cache = config.create_timing_cache(attempt)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def save_timing_cache(config: Any, path: Path) -> None:
    """Keep what TensorRT has measured; a disk that fails costs the next build some time, no more."""
    cache = config.get_timing_cache()
    if cache is not None:
        with contextlib.suppress(ArtifactError):
            write_bytes(path, bytes(cache.serialize()))


def timing_cache_path(device: CudaDevice, version: str) -> Path:
    """Where the times of a device and a version are kept: not in the bundle, since native code reads them and they grow
    with every model built there.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return cache_folder() / f"tensorrt-{version}-sm{device.sm[0]}{device.sm[1]}-{name}.cache"
