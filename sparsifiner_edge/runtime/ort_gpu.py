"""ONNX Runtime on an NVIDIA GPU: what both of its providers need before a session may be made."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from sparsifiner_edge.bundle.manifest import MODEL_FILE, Manifest
from sparsifiner_edge.bundle.store import sealed_copy
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.ort import Execution, OrtSession, load_backend


def require_provider(provider: str) -> Any:
    """The module `onnxruntime`, whose build has a provider.

    Raises:
        MissingExtraError: no onnxruntime is installed.
        BackendError: the one that is installed was built without it.
    """
    ort = load_backend()
    offered = ort.get_available_providers()
    if provider not in offered:
        gpu = package_version("onnxruntime-gpu")
        installed = f"onnxruntime-gpu {gpu}" if isinstance(gpu, str) else f"onnxruntime {ort.__version__}"
        raise BackendError(
            f"{installed} has no {provider}; it offers {', '.join(offered)}.",
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "sparsifiner-edge[gpu]" '
            "(the two packages overwrite one another; on a Jetson take NVIDIA's own wheel).",
        )
    return ort


def open_gpu(
    backend: str, provider: str, options: Mapping[str, Any], folder: Path, manifest: Manifest, threads: int
) -> OrtSession:
    """A session on a provider of a GPU, after CUDA has answered.

    Raises:
        BackendError: no such provider, no device, or the provider does not start.
    """
    ort = require_provider(provider)
    device = probe()
    execution = Execution(
        backend,
        [(provider, dict(options)), "CPUExecutionProvider"],
        f"{device.name} (compute capability {device.compute_capability})",
    )
    # ONNX Runtime prints what it misses and why it falls back, and standard output is for results.
    with contextlib.redirect_stdout(sys.stderr):
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from pip's packages are found by this alone.
        with sealed_copy(folder, manifest, MODEL_FILE) as copy:
            return OrtSession(folder / MODEL_FILE, copy, threads, "portable", manifest.precision, execution)


def refuse_build(backend: str) -> NoReturn:
    """These backends build nothing ahead of time."""
    raise ConfigError(
        f"{backend} builds no engine file.", "Open the bundle with it; engines are kept in the user's cache."
    )
