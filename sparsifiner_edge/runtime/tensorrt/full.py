"""Full TensorRT, 10.3 (JetPack 6) to 11.x: engines for the GPU of this machine."""

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

OLDEST, _OURS = (10, 3), (PLUGIN, MIXED)


class TensorRt(TensorRtBackend):
    """Builds one engine, for the GPU of this machine."""

    name, product = "tensorrt", "TensorRT"

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

    def targets(self, capabilities: Sequence[str]) -> Sequence[str]:
        """See `TensorRtBackend`."""
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
        """See `TensorRtBackend`; there are CUDA kernels for sparse attention, and for tokens that merge."""
        kernels, reason = self.execution.kernels, "the model has no sparse attention, and no tokens merge"
        operators = any(f"{DOMAIN}::{name}" in bundle.manifest.ops for name in TRITON)
        why = plugin.why_not(self.load(), bundle, probe(), engine.batch) if operators else reason
        if kernels == "native":
            if why:
                raise BackendError(f"The CUDA kernels cannot be used: {why}.", "Leave --kernels out, or say portable.")
            return {PLUGIN: None}
        if kernels == "portable" or not operators:
            return {BODIES: None}
        mixed = [MIXED] * (why is None and bool(plugin.dense_layers(bundle, probe())))
        return {BODIES: None, PLUGIN: why} | dict.fromkeys([*mixed, *baselines(bundle)])

    def compile(self, model: onnx.ModelProto, engine: Engine, bundle: Bundle) -> bytes:
        """See `TensorRtBackend`; after CUDA has answered."""
        device = probe()
        if engine.details.kernels == MIXED:
            model = dense_model(model, plugin.dense_layers(bundle, device))
        if engine.details.kernels in _OURS:
            model = plugin.with_plugins(self.load(), model, bundle, device)
        return super().compile(model, engine, bundle)

    def build(self, engine: Engine, folder: Path, output: Path) -> Details:
        """See `TensorRtBackend`; says where an engine needs this package to run."""
        details = super().build(engine, folder, output)
        if details.kernels not in _OURS or not plugin.is_in_python(self.load()):
            return details
        needs = "it needs this package where it runs: kernels are launched from Python"
        warning = "; ".join(filter(None, (details.chosen.warning, needs)))
        return replace(details, variants={details.kernels: replace(details.chosen, warning=warning)})

    def prepare(self, bundle: Bundle, engine: Engine) -> None:
        """See `TensorRtBackend`."""
        if engine.details.kernels in _OURS:
            plugin.register(self.load(), bundle, probe())

    @contextlib.contextmanager
    def configure(self, trt: Any, config: Any, _engine: Engine) -> Iterator[str]:
        """See `TensorRtBackend`: scratch, of the free memory, of which an integrated GPU leaves half to the system; and
        times of kernels that earlier builds measured, in which those of this one are kept.
        """
        driver = Driver()
        free, version = driver.free_bytes(), str(trt.__version__)
        workspace = free // 4 * (2 if driver.device.integrated else 3)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        path, content = _timing_cache(driver.device, version), b""
        with contextlib.suppress(ArtifactError):
            content = read_bytes(path, MAX_FILE)
        for attempt in dict.fromkeys((content, b"")):  # A damaged file is as good as none.
            cache = config.create_timing_cache(attempt)
            if cache is not None and config.set_timing_cache(cache, False):
                break
        yield f"It was given {workspace >> 20} MiB of workspace, {free >> 20} MiB were free."
        cache = config.get_timing_cache()
        if cache is not None:
            with contextlib.suppress(ArtifactError):  # A disk that fails costs the next build some time, no more.
                write_bytes(path, bytes(cache.serialize()))


def _timing_cache(device: CudaDevice, version: str) -> Path:
    """Where the times of a device and a version are kept, in the user's own folder for such: not in the bundle, since
    native code reads them and they grow with every model built there.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsifiner-edge"
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return folder / f"tensorrt-{version}-sm{device.compute_capability.replace('.', '')}-{name}.cache"
