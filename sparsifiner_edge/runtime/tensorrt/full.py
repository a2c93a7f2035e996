"""Backend for TensorRT 10.3 (JetPack 6) to 11.x, which builds engines for the GPU of this machine."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from msgspec.structs import replace

from sparsifiner_edge.artifacts import MAX_FILE
from sparsifiner_edge.bundle.engines import BODIES, MIXED, PLUGIN, Details, Engine
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError, MissingExtraError
from sparsifiner_edge.files import read_bytes, write_bytes
from sparsifiner_edge.machine import jetson_release
from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.runtime.backend import import_package
from sparsifiner_edge.runtime.cuda import CudaDevice, Driver, probe
from sparsifiner_edge.runtime.tensorrt import plugin
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend, baselines
from sparsifiner_edge.runtime.tensorrt.baseline import dense_model

OLDEST = (10, 3)
"""Oldest supported version of TensorRT, that of JetPack 6."""
_OURS = (PLUGIN, MIXED)
"""Variants that use this project's CUDA kernels."""


class TensorRt(TensorRtBackend):
    """Backend that builds one engine, for the GPU of this machine."""

    name, product = "tensorrt", "TensorRT"

    def load(self) -> Any:
        """Import `tensorrt` and check its version; see `Backend.load`."""
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

    def targets(self, capabilities: Sequence[str]) -> Sequence[str]:
        """Return the compute capability of this machine's GPU; see `TensorRtBackend.targets`."""
        device = self.require_driver(probe())
        others = [c for c in capabilities if c != device.compute_capability]
        if others:
            raise ConfigError(
                f"TensorRT builds for the GPU that it runs on ({device.name}, {device.compute_capability}), "
                f"not for {', '.join(others)}.",
                "Build on a machine that has that GPU, or use --backend tensorrt-rtx, which builds ahead of time.",
            )
        return (device.compute_capability,)

    def variants(self, bundle: Bundle, engine: Engine) -> dict[str, str | None]:
        """Return the variants of an engine; see `TensorRtBackend.variants`.

        This project's CUDA kernels exist for sparse attention and token merging.
        """
        kernels, reason = self.execution.kernels, "the model has no sparse attention, and no tokens merge"
        operators = any(f"{DOMAIN}::{name}" in bundle.manifest.ops for name in TRITON)
        why = plugin.why_not(self.load(), bundle, probe(), engine.batch) if operators else reason
        if kernels == "native":
            if why:
                raise BackendError(
                    f"The CUDA kernels cannot be used: {why}.", "Leave --kernels out, or choose portable."
                )
            return {PLUGIN: None}
        if kernels == "portable" or not operators:
            return {BODIES: None}
        mixed = [MIXED] * (why is None and bool(plugin.dense_layers(bundle, probe())))
        return {BODIES: None, PLUGIN: why} | dict.fromkeys([*mixed, *baselines(bundle)])

    def compile(self, model: onnx.ModelProto, engine: Engine, bundle: Bundle) -> bytes:
        """Build an engine, with this project's plugins if its variant uses them; see `TensorRtBackend.compile`."""
        device = probe()
        if engine.details.kernels == MIXED:
            model = dense_model(model, plugin.dense_layers(bundle, device))
        if engine.details.kernels in _OURS:
            model = plugin.with_plugins(self.load(), model, bundle, device)
        return super().compile(model, engine, bundle)

    def build(self, engine: Engine, folder: Path, output: Path) -> Details:
        """Build a variant, and warn if its engine needs this package to run; see `TensorRtBackend.build`."""
        details = super().build(engine, folder, output)
        if details.kernels not in _OURS or not plugin.is_in_python(self.load()):
            return details
        needs = "it needs this package at run time: kernels are launched from Python"
        warning = "; ".join(filter(None, (details.chosen.warning, needs)))
        return replace(details, variants={details.kernels: replace(details.chosen, warning=warning)})

    def prepare(self, bundle: Bundle, engine: Engine) -> None:
        """Register the plugins that the engine needs; see `TensorRtBackend.prepare`."""
        if engine.details.kernels in _OURS:
            plugin.register(self.load(), bundle, probe())

    @contextlib.contextmanager
    def configure(self, trt: Any, config: Any, _engine: Engine) -> Iterator[str]:
        """Set the workspace and the timing cache of a build; see `TensorRtBackend.configure`.

        The workspace is three quarters of the free memory, or half of it on an integrated GPU, which shares the memory
        with the system. The timing cache holds kernel times of earlier builds and is updated at the end of the block.
        """
        driver = Driver()
        free, version = driver.free_bytes(), str(trt.__version__)
        workspace = free // 4 * (2 if driver.device.integrated else 3)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        path, content = _timing_cache(driver.device, version), b""
        with contextlib.suppress(ArtifactError):
            content = read_bytes(path, MAX_FILE)
        for attempt in dict.fromkeys((content, b"")):  # If the cache is damaged, begin an empty one.
            cache = config.create_timing_cache(attempt)
            if cache is not None and config.set_timing_cache(cache, False):
                break
        yield f"Its workspace was {workspace >> 20} MiB of {free >> 20} MiB of free memory."
        cache = config.get_timing_cache()
        if cache is not None:
            with contextlib.suppress(ArtifactError):  # Without the file, the next build only takes longer.
                write_bytes(path, bytes(cache.serialize()))


def _timing_cache(device: CudaDevice, version: str) -> Path:
    """Return the path of the timing cache for a device and a version of TensorRT, in the user's cache folder.

    It is not stored in the bundle, since native code parses it and it grows with every model that is built.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsifiner-edge"
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return folder / f"tensorrt-{version}-sm{device.compute_capability.replace('.', '')}-{name}.cache"
