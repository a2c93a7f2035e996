"""`export_bundle`: student or dense model -> bundle folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import onnx
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from sparsifiner_edge.artifacts import kind_of, new_folder, require_replaceable
from sparsifiner_edge.bounds import MOST_BATCH, whole_number
from sparsifiner_edge.bundle.entries import Check, Float16, Folded, Measured, Quantisation
from sparsifiner_edge.bundle.manifest import (
    BUNDLE_SCHEMA,
    MODEL_FILE,
    InputSpec,
    Manifest,
    Preprocessing,
    TensorSpec,
    Tokens,
)
from sparsifiner_edge.bundle.store import GOLDEN_FILE, LABELS_FILE, seal_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, summary
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.export.check import OTHERS, SAME, check_export, golden_image
from sparsifiner_edge.export.choose import keep_dense_where_slower
from sparsifiner_edge.export.deployed import DeployedModel
from sparsifiner_edge.export.fp16 import HALF_TOLERANCE, HALF_TOLERANCE_FREE, LEAST_COSINE_INT8, to_fp16
from sparsifiner_edge.export.graph import DYNAMIC, Batch, export_graph, set_metadata
from sparsifiner_edge.export.int8 import RECIPES, quantise, run_file
from sparsifiner_edge.export.retile import with_tile
from sparsifiner_edge.images import evenly, list_images, load_image
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.ops.schema import DOMAIN, VERSION
from sparsifiner_edge.profiles.boards.board import load_board
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.models import Backbone, preprocessing
from sparsifiner_edge.sparse.student import MAX_CALIBRATION_IMAGES, Student, load_dense, load_student
from sparsifiner_edge.text import shown

PRECISIONS = ("fp32", "fp16", "int8")
INT8_TOLERANCE = 5e-2
"""Greatest difference of a session's outputs from the golden ones, relative to their range: int8 products of different
processors round, and select, differently."""
INT8_HALF_TOLERANCE = 2e-1
"""The same where the rest is float16: two versions of ONNX Runtime differ by .11 on a sparse DINOv2."""
FREE_TOLERANCE = 2e-2
"""The same in fp32, where keys or tokens are chosen."""


def export_bundle(
    source: str | Path,
    output: str | Path,
    *,
    weights: str | Path | None = None,
    img_size: int | None = None,
    keep: float | None = None,
    token_keep: tuple[tuple[int, float], ...] | None = None,
    tile: int | None = None,
    probe: int | None = None,
    precision: str = "fp32",
    batch: int | str = 1,
    tokens: bool = False,
    calibrate: str | Path | None = None,
    recipe: str = "cpu",
    measure: bool = False,
    boards: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> Path:
    """Export a student folder, or a timm model as the dense baseline, to a bundle folder.

    Args:
        source: student folder, or timm's name of a model.
        output: folder to write; an earlier bundle there is replaced.
        weights: for a timm model: .safetensors or .pth file; None lets timm download them.
        img_size: pixels along a side; None takes the student's or model's own.
        keep, token_keep: for a student: other shares of keys and tokens than its own (see `SparsityConfig`).
        tile, probe: for a sparse student: other ones than its own, behind a gate (see `retile`); GPUs want tiles of 64.
        precision: "fp32"; "fp16" with islands of float32 (see `fp16`); or "int8" for the linear layers, where
            attention stays in float32, or with the recipe "tensorrt" becomes float16.
        batch: a fixed batch size, or "dynamic".
        tokens: also give a classifier's tokens; a model without classifier always gives them.
        calibrate: for int8 and for another tile: a folder of images like those that the model will see; at most 32
            are used.
        recipe: for int8: one of `quantise.RECIPES`.
        measure: keep dense the layers where sparse attention is slower on this machine; the manifest says which.
        boards: names or files of boards (see `profiles.board`) whose GPU kernels and model variant go into the bundle.
        progress: for int8; see `Progress`.

    Returns:
        The folder.

    Raises:
        GateError: the file disagrees with torch, or fp16 or int8 with float32; nothing is written.
        SparsifinerError: unusable input; nothing is written.
    """
    target = Path(output)
    require_replaceable(target, "bundle")
    size_of_batch = parse_batch(batch)
    wanted = [load_board(name) for name in boards]
    retiles = tile is not None or probe is not None
    numbers = _numbers(precision, recipe, calibrate, retiles)
    student = _load(source, weights, img_size, keep, token_keep)
    retiled = measured = None
    if retiles:
        student, retiled = with_tile(student, tile, probe, numbers.images)
    if measure and student.sparsity.sparse_layers(len(student.model.blocks)):
        student, measured = _measured(student)
    deployed = DeployedModel(student.model, tokens)
    model = export_graph(deployed, student.img_size, size_of_batch, deployed.output_names)
    batches = (1, 3) if size_of_batch is None else (size_of_batch,)
    check, golden = check_export(model, deployed, student.img_size, batches)
    narrow = _narrowed(model, student.img_size, batches, numbers, progress)
    if narrow.model is not model:
        golden |= {f"output.{name}": x for name, x in run_file(narrow.model, golden["input.image"]).items()}
    # One line each, whatever a folder's name holds; `Bundle.labels` and the model's metadata then say the same.
    labels = [shown(label) for label in student.labels or class_labels(student.model)]
    set_metadata(narrow.model, _metadata(student, deployed, labels))
    manifest = msgspec.structs.replace(
        _manifest(student, deployed, narrow.model, check, numbers),
        retiled=retiled, measured=measured, quantisation=narrow.quantisation, float16=narrow.float16,
    )  # fmt: skip
    with new_folder(target, "bundle") as folder:
        (folder / MODEL_FILE).write_bytes(narrow.model.SerializeToString())
        np.savez_compressed(folder / GOLDEN_FILE, **cast(Any, golden))
        if labels:
            (folder / LABELS_FILE).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        kernels = tuple(board_files(narrow.model, student.name, board, folder) for board in wanted)
        seal_bundle(folder, msgspec.structs.replace(manifest, boards=kernels))
    return target


class _Numbers(NamedTuple):
    """What the file computes in, checked: see `export_bundle`.

    Attributes:
        images: to calibrate int8 with, and to judge another tile by.
    """

    precision: str
    recipe: str
    images: list[Path]


class _Narrow(NamedTuple):
    """A file in fewer bits, or the float32 file itself, and what its making found."""

    model: onnx.ModelProto
    quantisation: Quantisation | None = None
    float16: Float16 | None = None


def _narrowed(
    model: onnx.ModelProto, size: int, batches: Sequence[int], numbers: _Numbers, progress: Progress | None
) -> _Narrow:
    """The file in fp16, or in int8 with the rest as its recipe wants it."""
    made, least = _Narrow(model), None
    if numbers.precision == "int8":
        images = [np.repeat(load_image(path, size)[None], batches[0], 0) for path in numbers.images]
        made, least = _Narrow(*quantise(model, images, numbers.recipe, progress)), LEAST_COSINE_INT8
    if numbers.precision == "fp16" or numbers.recipe == "tensorrt":
        images = [golden_image(size, batch, seed) for seed, batch in enumerate((*batches, batches[0]))]
        half, found = to_fp16(made.model, images, least)
        made = made._replace(model=half, float16=found)
    return made


def _numbers(precision: str, recipe: str, calibrate: str | Path | None, retiles: bool) -> _Numbers:
    """Refuse what does not go together; images are for int8 and for another tile alone."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}.", f"Choose one of: {', '.join(PRECISIONS)}.")
    if recipe not in RECIPES:
        raise ConfigError(f"recipe is {recipe!r}.", f"Choose one of: {', '.join(RECIPES)}.")
    if precision == "int8" and calibrate is None:
        raise ConfigError("int8 needs images to calibrate with.", "Give a folder of them with --calibrate.")
    if precision != "int8" and calibrate is not None and not retiles:
        raise ConfigError(
            "Images to calibrate with go with int8, or another tile.",
            "Leave them out, or choose --precision int8.",
        )
    if precision != "int8" and recipe != RECIPES[0]:
        raise ConfigError(f"recipe {recipe!r} requires int8.", "Leave it out, or choose --precision int8.")
    listed = [] if calibrate is None else evenly(list_images(Path(calibrate)), MAX_CALIBRATION_IMAGES)
    return _Numbers(precision, recipe, listed)


def _measured(student: Student) -> tuple[Student, Measured]:
    """The student with layers kept dense where that is faster here, and what was measured."""
    measured = keep_dense_where_slower(student.model)
    kept = {number for choice in measured.choices if choice.kept_dense for number in choice.layers}
    dense = tuple(sorted(kept | set(student.sparsity.dense_layers)))
    return dataclasses.replace(student, sparsity=dataclasses.replace(student.sparsity, dense_layers=dense)), measured


def parse_batch(batch: int | str) -> Batch:
    """1, "1" or "dynamic" -> 1, 1 or None.

    Raises:
        ConfigError: anything else.
    """
    if batch == "dynamic":
        return None
    try:
        return whole_number(str(batch), "batch", 1, MOST_BATCH)
    except ConfigError as error:
        fix = f'Give a whole number from 1 to {MOST_BATCH}, or "dynamic".'
        raise ConfigError(f"batch is {batch!r:.80}.", fix) from error


def _load(
    source: str | Path,
    weights: str | Path | None,
    img_size: int | None,
    keep: float | None,
    token_keep: tuple[tuple[int, float], ...] | None,
) -> Student:
    folder = Path(source)
    if not folder.is_dir():
        if keep is not None or token_keep is not None:
            raise ConfigError(
                "--keep and --token-keep go with a student.", "Make one with `sparsifiner-edge sparsify`."
            )
        return load_dense(str(source), Path(weights) if weights else None, img_size)
    if kind_of(folder) != "student":
        raise ArtifactError(f"{folder} is not a student.", "Make one with `sparsifiner-edge sparsify`.")
    if weights:
        raise ConfigError(
            "--weights cannot be combined with a student.", "A student has its own weights; leave it out."
        )
    return load_student(folder, img_size, keep, token_keep)


def class_labels(model: Backbone) -> list[str]:
    """One label per class: ImageNet's where timm knows the set, else class_0, class_1, ...; none without classifier."""
    subset = infer_imagenet_subset(model) if model.num_classes else None
    if subset:
        info = ImageNetInfo(subset)
        return [str(info.index_to_description(i)) for i in range(model.num_classes)]
    return [f"class_{i}" for i in range(model.num_classes)]


def model_shape(model: Backbone) -> ModelShape:
    """The sizes that decide a model's costs."""
    vit = cast(Any, model)
    linear = [x for x in vit.blocks[0].mlp.modules() if isinstance(x, nn.Linear)]
    return ModelShape(
        depth=len(vit.blocks),
        heads=vit.blocks[0].attn.num_heads,
        width=vit.embed_dim,
        # A gated MLP has three matrices: it counts as one and a half times as wide.
        hidden=round(sum(x.weight.numel() for x in linear) / (2 * vit.embed_dim)),
        prefix=vit.num_prefix_tokens,
        patches=vit.patch_embed.num_patches,
        patch=vit.patch_embed.patch_size[0],
    )


def _metadata(student: Student, deployed: DeployedModel, labels: list[str]) -> dict[str, str]:
    licence = (cast(Any, student.model).pretrained_cfg or {}).get("license")
    entries = {
        "name": student.name,
        "version": version("sparsifiner-edge"),
        "licence": str(licence or "see the weights' source"),
        "classes": "\n".join(labels),
    }
    # GStreamer's onnxinference asks for a tensor id under each output's name.
    return entries | {name: f"sparsifiner-edge-{name}" for name in deployed.output_names}


def _manifest(
    student: Student, deployed: DeployedModel, model: onnx.ModelProto, check: Check, numbers: _Numbers
) -> Manifest:
    pre = preprocessing(student.model)
    sparse = bool(student.sparsity.sparse_layers(len(student.model.blocks)))
    shape = model_shape(student.model)
    return Manifest(
        schema_version=BUNDLE_SCHEMA,
        files={},
        name=student.name,
        precision=numbers.precision,
        shape=shape,
        ops={f"{DOMAIN}::{f.name}": VERSION for f in model.functions},
        inputs=tuple(InputSpec(*_tensor(v), layout="NHWC", range=(0, 255), colour="RGB") for v in model.graph.input),
        outputs=tuple(TensorSpec(*_tensor(v)) for v in model.graph.output),
        preprocessing=Preprocessing(size=student.img_size, folded=Folded(pre.mean, pre.std, "1/255")),
        tokens=Tokens(shape.prefix, tuple(student.model.patch_embed.grid_size)),
        sparsity=student.sparsity if sparse or deployed.prunes else None,
        costs=summary(shape, student.sparsity),
        dense_costs=summary(shape, SparsityConfig(keep=1)),
        tolerances=dict.fromkeys(
            [name for name in deployed.output_names if name != POSITIONS],
            _tolerance(numbers, sparse or deployed.prunes, check),
        ),
        check=check,
        provenance=write_record(student.provenance),
        tools={name: version(name) for name in ("sparsifiner-edge", "torch", "timm", "onnx", "onnxscript", "numpy")},
    )


def _tolerance(numbers: _Numbers, selects: bool, check: Check) -> float:
    """Greatest difference of a session's outputs from the golden ones, relative to their range; in fp32 the wide one
    only where the check itself met as much."""
    if numbers.precision == "int8":
        return INT8_HALF_TOLERANCE if numbers.recipe == "tensorrt" else INT8_TOLERANCE
    if numbers.precision == "fp16":
        return HALF_TOLERANCE_FREE if selects else HALF_TOLERANCE
    if not selects:
        return SAME.error
    worst = max(output.error_relative_to_range or 0.0 for output in check.outputs.values())
    return FREE_TOLERANCE if worst <= FREE_TOLERANCE else OTHERS.error


def _tensor(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    """Name, type and shape."""
    tensor = value.type.tensor_type
    shape: tuple[int | str, ...] = tuple(d.dim_value if d.HasField("dim_value") else DYNAMIC for d in tensor.shape.dim)
    return value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape
