"""Triton Inference Server: a model repository for its onnxruntime backend and, where there are engines, TensorRT's.

    models/NAME/config.pbtxt, labels.txt, 1/model.onnx, warmup/image, libsparsifiner_ops.so
    models/NAME_tensorrt/config.pbtxt, labels.txt, 1/model_8_7.plan, warmup/image
    README.md

The image is the bundle's golden input: a server is ready when it has answered that.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from sparsifiner_edge.bundle.engines import Engine, parse_capability
from sparsifiner_edge.bundle.manifest import AGAIN, TensorSpec
from sparsifiner_edge.bundle.store import LABELS_FILE
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.ops import native
from sparsifiner_edge.package.common import MODEL, Packaged, golden_image
from sparsifiner_edge.package.triton_config import print_config

BATCH = 8
"""Greatest batch of a bundle of dynamic batch, unless told."""
QUEUE_US = 2000
"""How long a request may wait for others to share its batch."""
MOUNT = "/models"
Tensor: TypeAlias = dict[str, str | list[int]]
"""A ModelInput or ModelOutput."""
_TYPES = {"uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64"}


def write(bundle: Packaged, folder: Path, batch: int | None, kernels: str) -> list[str]:
    """Fill `folder`; see `package_bundle`."""
    models = folder / "models"
    library = _library(bundle, kernels)
    _write_onnx(bundle, models / bundle.name, batch, library)
    listed = bundle.manifest.engines
    engines = newest_engines([engine for engine in listed if _takes_one(engine, bundle)])
    if engines:
        _write_plans(bundle, models / f"{bundle.name}_tensorrt", engines)
    remarks = _remarks(bundle, library, engines, listed)
    (folder / "README.md").write_text(_readme(bundle, engines, remarks), encoding="utf-8")
    return remarks


def _takes_one(engine: Engine, bundle: Packaged) -> bool:
    """Whether the server can use an engine: it sends requests alone where it has no others to join them."""
    return bundle.manifest.batch is not None or engine.batch.least <= 1


def _library(bundle: Packaged, kernels: str) -> Path | None:
    """The native library, for models that have operators it runs: it computes in float32 alone."""
    wanted = kernels == "auto" and bundle.manifest.ops and bundle.manifest.float16 is None
    return native.library_path() if wanted else None


def _write_onnx(bundle: Packaged, folder: Path, batch: int | None, library: Path | None) -> None:
    most = 0 if bundle.manifest.batch else batch or BATCH
    libraries = None if library is None else {"op_library_filename": [f"{MOUNT}/{folder.name}/{library.name}"]}
    _write_common(
        bundle, folder, most, "KIND_CPU",  # The native library is the CPU provider's.
        backend="onnxruntime", default_model_filename=MODEL, model_operations=libraries,
    )  # fmt: skip
    if library is not None:
        shutil.copyfile(library, folder / library.name)
    (folder / "1" / MODEL).write_bytes(bundle.read(MODEL))


def _write_plans(bundle: Packaged, folder: Path, engines: Mapping[str, Engine]) -> None:
    """Triton takes the plan of the GPU that it finds."""
    most = 0 if bundle.manifest.batch else min(engine.batch.most for engine in engines.values())
    plans = {capability: f"model_{capability.replace('.', '_')}.plan" for capability in engines}
    files = [{"key": capability, "value": plan} for capability, plan in plans.items()]
    first = next(iter(plans.values()))
    _write_common(
        bundle, folder, most, "KIND_GPU",
        platform="tensorrt_plan", default_model_filename=first, cc_model_filenames=files,
    )  # fmt: skip
    for capability, plan in plans.items():
        content = bundle.read(engines[capability].file)
        (folder / "1" / plan).write_bytes(content)


def newest_engines(engines: list[Engine]) -> dict[str, Engine]:
    """Of full TensorRT on Linux, per compute capability the one built last, if all are of one TensorRT and processor.

    Raises:
        ConfigError: they are not: one server runs one TensorRT; or a compute capability is none.
    """
    found = {parse_capability(e.compute_capability): e for e in engines if e.backend == "tensorrt" and e.os == "linux"}
    kinds = sorted({f"TensorRT {engine.version} on {engine.cpu}" for engine in found.values()})
    if len(kinds) > 1:
        raise ConfigError(f"The engines are for {' and '.join(kinds)}; one server runs one.", "Keep one kind of them.")
    return found


def _config(bundle: Packaged, name: str, most: int, kind: str, **own: object) -> str:
    """The text of a configuration.

    Args:
        most: greatest batch, 0 where it is fixed. kind: of processor. own: what is the backend's alone.
    """
    manifest, size = bundle.manifest, bundle.image_size
    image = TensorSpec("image", "uint8", (manifest.batch, size, size, 3))
    labelled: Tensor = {"label_filename": LABELS_FILE} if bundle.class_names else {}
    warm = {"data_type": "TYPE_UINT8", "dims": _dims(image, most), "input_data_file": "image"}
    return print_config(
        name=name,
        max_batch_size=most,
        input=[_tensor(image, most)],
        output=[_tensor(output, most) | (labelled if output.name == "logits" else {}) for output in manifest.outputs],
        instance_group=[{"count": 1, "kind": kind}],
        dynamic_batching={"max_queue_delay_microseconds": QUEUE_US} if most > 1 else None,
        model_warmup=[{"name": "golden", "batch_size": 1, "inputs": [{"key": "image", "value": warm}]}],
        **own,
    )


def _tensor(tensor: TensorSpec, most: int) -> Tensor:
    if tensor.dtype not in _TYPES:
        raise ConfigError(f"{tensor.name} is {tensor.dtype}: Triton has no such type.", AGAIN)
    return {"name": tensor.name, "data_type": f"TYPE_{_TYPES[tensor.dtype]}", "dims": _dims(tensor, most)}


def _dims(tensor: TensorSpec, most: int) -> list[int]:
    """Without the batch axis where Triton makes batches; -1 for a dynamic axis."""
    shape = tensor.shape[1:] if most else tensor.shape
    return [size if isinstance(size, int) else -1 for size in shape]


def _write_common(bundle: Packaged, folder: Path, most: int, kind: str, **own: object) -> None:
    """What both backends need; see `_config`."""
    (folder / "1").mkdir(parents=True)
    (folder / "warmup").mkdir()
    (folder / "config.pbtxt").write_text(_config(bundle, folder.name, most, kind, **own), encoding="utf-8")
    image = golden_image(bundle)
    (folder / "warmup" / "image").write_bytes((image[0] if most else image).tobytes())
    if bundle.class_names:
        (folder / LABELS_FILE).write_text("".join(f"{label}\n" for label in bundle.class_names), encoding="utf-8")


def _remarks(
    bundle: Packaged, library: Path | None, engines: Mapping[str, Engine], listed: Sequence[Engine]
) -> list[str]:
    found = []
    if library is not None:
        found.append(
            f"{library.name} was built on this machine and is native code: the server needs such a processor, and a C "
            "library and ONNX Runtime as new. --kernels portable leaves it out."
        )
    elif bundle.manifest.ops:
        found.append("Without the native library the operators run by their bodies: slower on a processor.")
    if any(engine.backend == "tensorrt-rtx" for engine in listed):
        found.append("Engines of TensorRT-RTX are left out: Triton's backend runs those of TensorRT.")
    if any(engine.backend == "tensorrt" and not _takes_one(engine, bundle) for engine in listed):
        found.append("Engines for batches above 1 alone are left out: the server sends single images too.")
    if engines:
        found.append("Plans are native code and run on the very TensorRT that built them; see the README.")
    return found


def _readme(bundle: Packaged, engines: Mapping[str, Engine], remarks: list[str]) -> str:
    built = ""
    if engines:
        version = next(iter(engines.values())).version
        cards = ", ".join(engines)
        built = f"""
`{bundle.name}_tensorrt` holds plans of TensorRT {version} for compute capability {cards}: take the container whose
release notes name that version, and give it the GPU (`docker run --gpus all`; Jetson: `--runtime nvidia`). The kernels
are inside the plans: no plugin has to be loaded.
"""
    notes = "\n".join(f"- {remark}" for remark in remarks)
    size = bundle.image_size
    shape = f"{bundle.manifest.batch or 1},{size},{size},3"
    return f"""# {bundle.name} for Triton Inference Server

    docker run --rm -p 8000-8002:8000-8002 -v "$PWD/models:{MOUNT}" -e ORT_DISABLE_TELEMETRY=1 \\
        nvcr.io/nvidia/tritonserver:YY.MM-py3 tritonserver --model-repository={MOUNT}
    curl -f localhost:8000/v2/models/{bundle.name}/ready

Put a release of the container in the place of YY.MM. The variable keeps ONNX Runtime from reporting its use. The
repository must be at `{MOUNT}` there: `config.pbtxt` names the operators' library by that path. One request, from
Python (`pip install "tritonclient[http]"`):

    import numpy as np, tritonclient.http as http
    image = http.InferInput("image", [{shape}], "UINT8")
    image.set_data_from_numpy(np.zeros(({shape}), np.uint8))
    print(http.InferenceServerClient("localhost:8000").infer("{bundle.name}", [image]).get_response())

The input is uint8 RGB as a camera gives it, {size} px square; preprocessing is in the model. The warm-up is the
bundle's golden input.
{built}
{notes}
"""
