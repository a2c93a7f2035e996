"""`export_bundle`: student or dense model -> bundle folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import onnx
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from sparsifiner_edge.artifacts import kind_of, new_folder, require_replaceable
from sparsifiner_edge.bounds import MOST_BATCH, whole_number
from sparsifiner_edge.bundle.manifest import (
    BUNDLE_SCHEMA,
    InputSpec,
    Manifest,
    Preprocessing,
    TensorSpec,
    Tokens,
    manifest_content,
)
from sparsifiner_edge.bundle.store import LABELS_FILE, seal_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, summary
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.export.check import OTHERS, SAME, Check, check_export, golden_image
from sparsifiner_edge.export.choose import keep_dense_where_slower
from sparsifiner_edge.export.deployed import DeployedModel
from sparsifiner_edge.export.graph import DYNAMIC, Batch, export_graph, set_metadata
from sparsifiner_edge.export.half import HALF_TOLERANCE, HALF_TOLERANCE_FREE, LEAST_COSINE_INT8, halve
from sparsifiner_edge.export.quantise import RECIPES, quantise, run_file
from sparsifiner_edge.export.retile import with_tile
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.ops.schema import DOMAIN, VERSION
from sparsifiner_edge.pictures import evenly, list_pictures, load_picture
from sparsifiner_edge.profiles.boards.board import load_board
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.models import Backbone, preprocessing
from sparsifiner_edge.sparse.student import MAX_CALIBRATION_PICTURES, Student, load_dense, load_student
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
        precision: "fp32"; "fp16" with islands of float32 (see `half`); or "int8" for the linear layers, where
            attention stays in float32, or with the recipe "tensorrt" becomes float16.
        batch: a fixed batch size, or "dynamic".
        tokens: also give a classifier's tokens; a model without classifier always gives them.
        calibrate: for int8 and for another tile: a folder of pictures like those that the model will see; at most 32
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
    pictures = _calibration(precision, calibrate, recipe, retiles)
    student = _load(source, weights, img_size, keep, token_keep)
    entries: dict[str, Any] = {}
    if retiles:
        student, entries["retiled"] = with_tile(student, tile, probe, pictures)
    if measure and student.sparsity.sparse_layers(len(student.model.blocks)):
        student, entries["measured"] = _measured(student)
    deployed = DeployedModel(student.model, tokens)
    model = export_graph(deployed, student.img_size, size_of_batch, deployed.output_names)
    batches = (1, 3) if size_of_batch is None else (size_of_batch,)
    check, golden = check_export(model, deployed, student.img_size, batches)
    if precision != "fp32":
        model, found = _narrowed(model, student.img_size, batches, precision, recipe, pictures, progress)
        entries |= found
        golden |= {f"output.{name}": x for name, x in run_file(model, golden["input.image"]).items()}
    # One line each, whatever a folder's name holds; `read_labels` and the model's metadata then say the same.
    labels = [shown(label) for label in student.labels or class_labels(student.model)]
    set_metadata(model, _metadata(student, deployed, labels))
    with new_folder(target, "bundle") as folder:
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        np.savez_compressed(folder / "golden.npz", **cast(Any, golden))
        if labels:
            (folder / LABELS_FILE).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        for_boards = tuple(board_files(model, student.name, board, folder) for board in wanted)
        manifest = _manifest(student, deployed, model, check, precision, recipe)
        manifest = msgspec.structs.replace(manifest, boards=for_boards, **entries)
        seal_bundle(folder, manifest_content(manifest))
    return target


def _narrowed(
    model: onnx.ModelProto, size: int, batches: Sequence[int], precision: str, recipe: str, pictures: Sequence[Path],
    progress: Progress | None,
) -> tuple[onnx.ModelProto, dict[str, Any]]:  # fmt: skip
    """The file in fp16, or in int8 with the rest as its recipe wants it; and entries for the manifest."""
    entries: dict[str, Any] = {}
    if precision == "int8":
        images = [np.repeat(load_picture(path, size)[None], batches[0], 0) for path in pictures]
        quantised = quantise(model, images, recipe, progress)
        model, entries["quantisation"] = quantised.model, quantised.to_dict()
    if precision == "fp16" or recipe == "tensorrt":
        shown = [golden_image(size, batch, seed) for seed, batch in enumerate((*batches, batches[0]))]
        halved = halve(model, shown, LEAST_COSINE_INT8 if precision == "int8" else None)
        model, entries["float16"] = halved.model, halved.to_dict()
    return model, entries


def _calibration(precision: str, calibrate: str | Path | None, recipe: str, retiles: bool) -> list[Path]:
    """Pictures for int8 and for another tile; none for others."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}.", f"Choose one of: {', '.join(PRECISIONS)}.")
    if recipe not in RECIPES:
        raise ConfigError(f"recipe is {recipe!r}.", f"Choose one of: {', '.join(RECIPES)}.")
    if precision != "int8":
        if calibrate is not None and not retiles:
            raise ConfigError(
                "Pictures to calibrate with go with int8, or another tile.",
                "Leave them out, or choose --precision int8.",
            )
        if recipe != RECIPES[0]:
            raise ConfigError(f"recipe {recipe!r} goes with int8.", "Leave it out, or choose --precision int8.")
        return evenly(list_pictures(Path(calibrate)), MAX_CALIBRATION_PICTURES) if calibrate is not None else []
    if calibrate is None:
        raise ConfigError("int8 needs pictures to calibrate with.", "Give a folder of them with --calibrate.")
    return evenly(list_pictures(Path(calibrate)), MAX_CALIBRATION_PICTURES)


def _measured(student: Student) -> tuple[Student, dict[str, Any]]:
    """The student with layers kept dense where that is faster here, and what was measured."""
    measured = keep_dense_where_slower(student.model)
    kept = {number for choice in measured["choices"] if choice["kept_dense"] for number in choice["layers"]}
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
        raise ConfigError("--weights does not go with a student.", "A student has its own weights; leave it out.")
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
    config: dict[str, Any] = student.model.pretrained_cfg or {}
    entries = {
        "name": student.name,
        "version": version("sparsifiner-edge"),
        "licence": str(config.get("license") or "see the weights' source"),
        "classes": "\n".join(labels),
    }
    # GStreamer's onnxinference asks for a tensor id under each output's name.
    return entries | {name: f"sparsifiner-edge-{name}" for name in deployed.output_names}


def _manifest(
    student: Student, deployed: DeployedModel, model: onnx.ModelProto, check: Check, precision: str, recipe: str
) -> Manifest:
    pre = preprocessing(student.model)
    sparse = bool(student.sparsity.sparse_layers(len(student.model.blocks)))
    shape = model_shape(student.model)
    folded = {"mean": list(pre.mean), "std": list(pre.std), "scale": "1/255"}
    return Manifest(
        schema_version=BUNDLE_SCHEMA,
        files={},
        name=student.name,
        precision=precision,
        shape=shape,
        ops={f"{DOMAIN}::{f.name}": VERSION for f in model.functions},
        inputs=tuple(InputSpec(*_tensor(v), layout="NHWC", range=(0, 255), colour="RGB") for v in model.graph.input),
        outputs=tuple(TensorSpec(*_tensor(v)) for v in model.graph.output),
        preprocessing=Preprocessing(size=student.img_size, folded=folded),
        tokens=Tokens(shape.prefix, tuple(student.model.patch_embed.grid_size)),
        sparsity=student.sparsity if sparse or deployed.prunes else None,
        costs=summary(shape, student.sparsity),
        dense_costs=summary(shape, SparsityConfig(keep=1)),
        tolerances=dict.fromkeys(
            [name for name in deployed.output_names if name != POSITIONS],
            _tolerance(precision, sparse or deployed.prunes, recipe, check),
        ),
        check=check.to_dict(),
        provenance=write_record(student.provenance),
        tools={name: version(name) for name in ("sparsifiner-edge", "torch", "timm", "onnx", "onnxscript", "numpy")},
    )


def _tolerance(precision: str, selects: bool, recipe: str, check: Check) -> float:
    """Greatest difference of a session's outputs from the golden ones, relative to their range; in fp32 the wide one
    only where the check itself met as much."""
    if precision == "int8":
        return INT8_HALF_TOLERANCE if recipe == "tensorrt" else INT8_TOLERANCE
    if precision == "fp16":
        return HALF_TOLERANCE_FREE if selects else HALF_TOLERANCE
    if not selects:
        return SAME.error
    return FREE_TOLERANCE if max(x.error for x in check.agreements.values()) <= FREE_TOLERANCE else OTHERS.error


def _tensor(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    """Name, type and shape."""
    tensor = value.type.tensor_type
    shape: tuple[int | str, ...] = tuple(d.dim_value if d.HasField("dim_value") else DYNAMIC for d in tensor.shape.dim)
    return value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape
