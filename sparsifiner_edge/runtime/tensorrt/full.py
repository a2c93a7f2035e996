"""Full TensorRT, 10.3 (JetPack 6) to 11.x: engines for the GPU of this machine."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsifiner_edge.artifacts import MAX_FILE
from sparsifiner_edge.bundle.engines import BODIES, DENSE, PLUGIN, BatchRange, Engine
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError, MissingExtraError
from sparsifiner_edge.files import read_bytes, write_bytes
from sparsifiner_edge.machine import jetson_release
from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.runtime.backend import import_package, require_stored
from sparsifiner_edge.runtime.cuda import CudaDevice, Driver, probe
from sparsifiner_edge.runtime.tensorrt import plugin
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend, has_sparse_attention, prepare_build
from sparsifiner_edge.runtime.tensorrt.errors import build_error

OLDEST = (10, 3)


class TensorRt(TensorRtBackend):
    """Builds one engine, for the GPU of this machine."""

    name = "tensorrt"

    def load(self) -> Any:
        """The module `tensorrt`, 10.3 or later; see `Backend.load`."""
        try:
            trt = import_package("tensorrt", "tensorrt", "tensorrt", "Reinstall it; on a Jetson it comes with JetPack.")
        except MissingExtraError as error:
            if jetson_release() is None:
                raise
            raise BackendError(
                "JetPack's TensorRT is not visible to this Python.",
                "apt install python3-libnvinfer, and make the environment with: python3 -m venv --system-site-packages "
                "(docs/jetson.md). pip would bring a TensorRT that JetPack's CUDA does not run.",
            ) from error
        version = str(getattr(trt, "__version__", "0"))
        if tuple(map(int, re.findall(r"\d+", version))) < OLDEST:
            raise BackendError(
                f"TensorRT {version} is older than {'.'.join(map(str, OLDEST))}.",
                "Install a newer one; on a Jetson upgrade to JetPack 6 or later.",
            )
        return trt

    def plan(self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange) -> list[Engine]:
        """See `TensorRtBackend.plan`."""
        require_stored(self.execution.precision, bundle.manifest.float_precision, self.name)
        trt, device = self.load(), self.require_driver(probe())
        others = [c for c in capabilities if c != device.compute_capability]
        if others:
            raise ConfigError(
                f"TensorRT builds for the GPU that it runs on ({device.name}, {device.compute_capability}), "
                f"not for {', '.join(others)}.",
                "Build on a machine that has that GPU, or use --backend tensorrt-rtx, which builds ahead of time.",
            )
        candidates = _candidates(trt, bundle, device, batch, self.execution.kernels)
        return [self.engine(bundle, device.compute_capability, batch, *candidates)]

    def compile(self, model: bytes, engine: Engine, bundle: Bundle) -> bytes:
        """See `TensorRtBackend.compile`."""
        trt, driver = self.load(), Driver()
        device, free, version = driver.device, driver.free_bytes(), str(trt.__version__)
        if engine.details.kernels == PLUGIN:
            model = plugin.with_plugins(trt, model, bundle, device)
        builder, network, config, messages = prepare_build(trt, model, engine.batch, f"TensorRT {version}")
        # Of the free memory an integrated GPU leaves half to the system.
        workspace = free // 4 * (2 if device.integrated else 3)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        times = _timing_cache(device, version)
        _load_times(config, times)
        serialised = builder.build_serialized_network(network, config)
        if serialised is None:
            raise build_error(messages, workspace, free)
        _save_times(config, times)
        return bytes(serialised)


def _candidates(
    trt: Any, bundle: Bundle, device: CudaDevice, batch: BatchRange, kernels: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """What is built of the choice `kernels`, and why other candidates are not."""
    # There are CUDA kernels for sparse attention, and for tokens that merge.
    operators = any(f"{DOMAIN}::{name}" in bundle.manifest.ops for name in TRITON)
    reason: str | None = "the model has no sparse attention, and no tokens merge"
    if operators:
        reason = plugin.why_not(trt, bundle, device, batch)
    if kernels == "native":
        if reason:
            raise BackendError(f"The CUDA kernels cannot be used: {reason}.", "Leave --kernels out, or say portable.")
        return (PLUGIN,), {}
    if kernels == "portable" or not operators:
        return (BODIES,), {}
    dense = (DENSE,) if has_sparse_attention(bundle) else ()
    return ((BODIES, *dense), {PLUGIN: reason}) if reason else ((BODIES, PLUGIN, *dense), {})


def _load_times(config: Any, path: Path) -> None:
    """Give TensorRT the times of kernels that earlier builds measured, or an empty cache."""
    content = b""
    with contextlib.suppress(ArtifactError):
        content = read_bytes(path, MAX_FILE)
    for attempt in dict.fromkeys((content, b"")):  # A damaged file is as good as none.
        cache = config.create_timing_cache(attempt)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _save_times(config: Any, path: Path) -> None:
    """Keep what TensorRT has measured; a disk that fails costs the next build some time, no more."""
    cache = config.get_timing_cache()
    if cache is not None:
        with contextlib.suppress(ArtifactError):
            write_bytes(path, bytes(cache.serialize()))


def _timing_cache(device: CudaDevice, version: str) -> Path:
    """Where the times of a device and a version are kept, in the user's own folder for such: not in the bundle, since
    native code reads them and they grow with every model built there.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsifiner-edge"
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return folder / f"tensorrt-{version}-sm{device.compute_capability.replace('.', '')}-{name}.cache"
