"""Triton Inference Server: a model repository for its onnxruntime backend and, where there are engines, TensorRT's.

    models/NAME/config.pbtxt, labels.txt, 1/model.onnx, warmup/image, libsparsifiner_ops.so
    models/NAME_tensorrt/config.pbtxt, labels.txt, 1/model_8_7.plan, warmup/image
    README.md

The image is the bundle's golden input: a server is ready when it has answered that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.bundle.engines import Engine, parse_capability
from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE, TensorSpec
from sparsifiner_edge.bundle.store import LABELS_FILE
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.ops import native
from sparsifiner_edge.package.common import ImageBundle, read_golden_image, template

BATCH = 8
"""Greatest batch of a bundle of dynamic batch, where none is given."""
QUEUE_US = 2000
"""How long a request may wait for others to share its batch."""
MOUNT = "/models"
_TYPES = {"uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64"}


def write(bundle: ImageBundle, folder: Path, batch: int | None, kernels: str) -> list[str]:
    """Fill `folder`; see `package_bundle`."""
    models, listed = folder / "models", bundle.manifest.engines
    # The native library computes in float32 alone.
    wanted = kernels == "auto" and bundle.manifest.ops and bundle.manifest.float16 is None
    library = native.library_path() if wanted else None
    _write_onnx(bundle, models / bundle.name, batch, library)
    engines = newest_engines([engine for engine in listed if _takes_one(engine, bundle)])
    if engines:
        _write_plans(bundle, models / f"{bundle.name}_tensorrt", engines)
    remarks = _remarks(bundle, library, engines, listed)
    (folder / "README.md").write_text(_readme(bundle, engines, remarks), encoding="utf-8")
    return remarks


def _takes_one(engine: Engine, bundle: ImageBundle) -> bool:
    """Whether the server can use an engine: it sends requests alone where it has no others to join them."""
    return bundle.manifest.batch is not None or engine.batch.least <= 1


def _write_onnx(bundle: ImageBundle, folder: Path, batch: int | None, library: Path | None) -> None:
    most = 0 if bundle.manifest.batch else batch or BATCH
    libraries = None if library is None else {"op_library_filename": [f"{MOUNT}/{folder.name}/{library.name}"]}
    _write_common(
        bundle, folder, most, "KIND_CPU",  # The native library is the CPU provider's.
        runs={"backend": "onnxruntime"}, own={"model_operations": libraries, "default_model_filename": MODEL_FILE},
    )  # fmt: skip
    if library is not None:
        shutil.copyfile(library, folder / library.name)
    (folder / "1" / MODEL_FILE).write_bytes(bundle.read(MODEL_FILE))


def _write_plans(bundle: ImageBundle, folder: Path, engines: Mapping[str, Engine]) -> None:
    """Triton takes the plan of the GPU that it finds."""
    most = 0 if bundle.manifest.batch else min(engine.batch.most for engine in engines.values())
    plans = {capability: f"model_{capability.replace('.', '_')}.plan" for capability in engines}
    own = {
        "default_model_filename": next(iter(plans.values())),
        "cc_model_filenames": [{"key": capability, "value": plan} for capability, plan in plans.items()],
    }
    _write_common(bundle, folder, most, "KIND_GPU", runs={"platform": "tensorrt_plan"}, own=own)
    for capability, plan in plans.items():
        (folder / "1" / plan).write_bytes(bundle.read(engines[capability].file))


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


def _config(
    bundle: ImageBundle, name: str, most: int, kind: str, *, runs: dict[str, str], own: dict[str, object]
) -> str:
    """The text of a configuration.

    Args:
        most: greatest batch, 0 where it is fixed. kind: of processor. runs: `platform` or `backend`. own: its last
            fields, in Triton's order.
    """
    manifest = bundle.manifest
    image = TensorSpec("image", "uint8", (manifest.batch, *height_width(bundle.image_size), 3))
    labelled = {"label_filename": LABELS_FILE} if bundle.class_names else {}
    warm = {"data_type": "TYPE_UINT8", "dims": _dims(image, most), "input_data_file": "image"}
    return pbtxt(
        name=name,
        **runs,
        max_batch_size=most,
        input=[_tensor(image, most)],
        output=[_tensor(output, most) | (labelled if output.name == "logits" else {}) for output in manifest.outputs],
        instance_group=[{"kind": kind, "count": 1}],
        dynamic_batching={"max_queue_delay_microseconds": QUEUE_US} if most > 1 else None,
        model_warmup=[{"name": "golden", "batch_size": 1, "inputs": [{"key": "image", "value": warm}]}],
        **own,
    )


def pbtxt(indent: str = "", /, **entries: object) -> str:
    """Protobuf's text format: entries by the names of fields, in their order; None is left out."""
    lines = []
    for key, value in entries.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                lines.append(f"{indent}{key} {{\n{pbtxt(indent + '  ', **one)}{indent}}}\n")
            elif one is not None:
                bare = isinstance(one, int) or key in ("data_type", "kind")
                lines.append(f"{indent}{key}: {one if bare else json.dumps(one)}\n")
    return "".join(lines)


def _tensor(tensor: TensorSpec, most: int) -> dict[str, Any]:
    if tensor.dtype not in _TYPES:
        raise ConfigError(f"{tensor.name} is {tensor.dtype}: Triton has no such type.", AGAIN)
    return {"name": tensor.name, "data_type": f"TYPE_{_TYPES[tensor.dtype]}", "dims": _dims(tensor, most)}


def _dims(tensor: TensorSpec, most: int) -> list[int]:
    """Without the batch axis where Triton makes batches; -1 for a dynamic axis."""
    shape = tensor.shape[1:] if most else tensor.shape
    return [size if isinstance(size, int) else -1 for size in shape]


def _write_common(bundle: ImageBundle, folder: Path, most: int, kind: str, **fields: Any) -> None:
    """What both backends need; see `_config`."""
    (folder / "1").mkdir(parents=True)
    (folder / "warmup").mkdir()
    (folder / "config.pbtxt").write_text(_config(bundle, folder.name, most, kind, **fields), encoding="utf-8")
    image = read_golden_image(bundle)
    (folder / "warmup" / "image").write_bytes((image[0] if most else image).tobytes())
    if bundle.class_names:
        (folder / LABELS_FILE).write_text("".join(f"{label}\n" for label in bundle.class_names), encoding="utf-8")


def _remarks(
    bundle: ImageBundle, library: Path | None, engines: Mapping[str, Engine], listed: Sequence[Engine]
) -> list[str]:
    found = []
    if library is not None:
        found.append(
            f"{library.name} was built on this machine and is native code: the server needs such a processor, and a C "
            "library and ONNX Runtime at least as new. --kernels portable leaves it out."
        )
    elif bundle.manifest.ops:
        found.append("Without the native library the operators run by their function bodies: slower on a CPU.")
    if any(engine.backend == "tensorrt-rtx" for engine in listed):
        found.append("Engines of TensorRT-RTX are left out: Triton's backend runs those of TensorRT.")
    if any(engine.backend == "tensorrt" and not _takes_one(engine, bundle) for engine in listed):
        found.append("Engines for batches above 1 alone are left out: the server sends single images too.")
    if engines:
        found.append("Plans are native code and run only on the TensorRT version that built them; see the README.")
    return found


def _readme(bundle: ImageBundle, engines: Mapping[str, Engine], remarks: Sequence[str]) -> str:
    built, (height, width) = "", height_width(bundle.image_size)
    if engines:
        version = next(iter(engines.values())).version
        built = template("triton/plans.md", name=bundle.name, version=version, cards=", ".join(engines))
    return template(
        "triton/guide.md",
        name=bundle.name,
        size=f"{height} px square" if height == width else f"{height} px high and {width} px wide",
        shape=f"{bundle.manifest.batch or 1},{height},{width},3",
        mount=MOUNT,
        built=built,
        notes="\n".join(f"- {remark}" for remark in remarks),
    )
