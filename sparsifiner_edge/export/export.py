"""`export_bundle`: export a sparse or dense model to a bundle folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx
from torch import Tensor, nn

from sparsifiner_edge.artifacts import kind_of, new_folder, require_kind, require_replaceable
from sparsifiner_edge.bounds import MOST_BATCH, ImageSize, size_text, whole_number
from sparsifiner_edge.bundle.entries import Check, Float16, Quantisation
from sparsifiner_edge.bundle.manifest import BUNDLE_SCHEMA, MODEL_FILE, Manifest, Preprocessing, tensor_spec
from sparsifiner_edge.bundle.store import GOLDEN_FILE, LABELS_FILE, seal_bundle
from sparsifiner_edge.config import Budget, SparsityConfig, require, require_lists
from sparsifiner_edge.costs import ModelShape
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.execution import INT8_TARGETS, WEIGHT_PRECISIONS
from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.export.check import check_export, smooth_images, tolerances_of
from sparsifiner_edge.export.deployed_model import DeployedModel, deploy
from sparsifiner_edge.export.fp16 import to_fp16
from sparsifiner_edge.export.gpu_layout import fit_to_gpus
from sparsifiner_edge.export.graph import export_graph
from sparsifiner_edge.export.int8 import check_int8, held_out_images, quantise
from sparsifiner_edge.export.replan import replan
from sparsifiner_edge.export.sessions import file_runner
from sparsifiner_edge.export.stream import stream_of, write_stream
from sparsifiner_edge.export.user_call import UserFunction, compare_with_function
from sparsifiner_edge.fitting import Fit, Framing, require_fit
from sparsifiner_edge.images import Normalisation, Normalise, evenly, list_images, load_image
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.plugins import NAME_IT, import_object
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.profiles.roofline import Workload, faster_dense
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.hosts import backbone_of, hugging_face
from sparsifiner_edge.sparse.hosts.timm import TimmModel, class_labels
from sparsifiner_edge.sparse.in_memory import require_images
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.outputs import check_names
from sparsifiner_edge.sparse.source import load_source, normalisation_of
from sparsifiner_edge.sparse.student import MAX_CALIBRATION_IMAGES, Student, load_student, refuse_normalisation
from sparsifiner_edge.sparse.student_file import check_labels
from sparsifiner_edge.text import printable

_LABELS = "Give one name per class, in the order of the logits."
_TOOLS = ("sparsifiner-edge", "torch", "onnx", "onnxscript", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        precision: Weight precision: "fp32"; "fp16" with parts in float32 (see `fp16`); "int8" for the linear layers,
            with attention in float32, or in float16 for the target "tensorrt".
        batch: A fixed batch size, or "dynamic".
        tokens: Also output the tokens of a classifier, or of the vision transformer in a model with a decoder. A vision
            transformer without classifier always outputs them.
        calibrate: For int8 and boards: folder of images like those that the model will see; at most 32 are used.
        check: Your function, or its name, from an image uint8 [H,W,3] (RGB, the file's size) to the model's outputs by
            name, or to the only output. The file must agree with it; if the file is sparse, int8 or float16, the dense
            model must.
        data: For check: an image or a folder of images; at most 32 are used.
        int8_target: What will run an int8 file: "cpu" or "tensorrt".
        labels: Class names of the output "logits", in order; empty takes the model's own.
        boards: Names or files of boards (see `profiles.boards`), or loaded boards, for which float16 GPU kernels go
            into the bundle. The model gets the tile and background tokens that suit them if those pass the gate (see
            `gpu_layout`).
        fit: Default of how `run` and `evaluate` bring images to the size; see `fitting.Framing`.
        stream: Also write the files of a stream, which recomputes only the patches that changed (see `Session.stream`).

    Example:
        >>> ExportOptions(precision="int8", calibrate="images").batch
        1
    """

    precision: str = "fp32"
    batch: int | str = 1
    tokens: bool = False
    calibrate: str | Path | None = None
    check: str | UserFunction | None = None
    data: str | Path | None = None
    int8_target: str = "cpu"
    labels: Sequence[str] = ()
    boards: Sequence[str | Path | Board] = ()
    fit: Fit = "crop"
    stream: bool = False

    def __post_init__(self) -> None:
        require_fit(self.fit)
        require_lists(labels=self.labels, boards=self.boards)


def export_bundle(
    source: str | Path,
    output: str | Path,
    *,
    model: ModelOptions | None = None,
    budget: Budget | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Export a sparse model, or a pretrained model as the dense baseline, to a bundle folder.

    Args:
        source: Folder of a sparse model, or a model (see `load_source`).
        output: Folder to write; an earlier bundle there is replaced.
        model: How the source is loaded.
        budget: Settings that replace those of a sparse model.
        options: Options of the export.
        progress: Progress callback, for int8.

    Returns:
        The folder.

    Raises:
        GateError: The file disagrees with torch, or fp16 or int8 with float32; nothing is written.
        SparsifinerError: The input is unusable; nothing is written.

    Example:
        >>> folder = export_bundle("student", "sparse", options=ExportOptions(batch="dynamic"))
        >>> sorted(path.name for path in folder.iterdir())
        ['golden.npz', 'labels.txt', 'manifest.json', 'model.onnx']
    """
    target = Path(output)
    require_replaceable(target, "bundle")
    form = _form(options or ExportOptions())
    return _export(_load(source, model or ModelOptions(), budget or Budget()), target, form, progress)


def export_model(
    module: nn.Module,
    example: Tensor,
    output: str | Path,
    *,
    normalise: Normalise = None,
    outputs: Sequence[str] | None = None,
    name: str | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Export a module in memory that contains a vision transformer, with its decoder, to a bundle folder.

    Args:
        module: Called with images [B,3,H,W] only, on the CPU.
        example: Such images, floating-point; their size becomes the bundle's.
        output: Folder to write; an earlier bundle there is replaced.
        normalise: Normalisation that the module expects, for pixels from 0 to 1: (mean, std) with three numbers each;
            False: it normalises itself; None: what it declares as `image_mean` and `image_std`.
        outputs: Names of its outputs; for a dictionary some of its keys. None takes the module's own names, such as a
            declared `output_names`.
        name: Name of the model; None takes its class.
        options: Options of the export, without boards.
        progress: Progress callback, for int8.

    Returns:
        The folder.

    Raises:
        GateError: The file disagrees with torch, or fp16 or int8 with float32; nothing is written.
        SparsifinerError: The input is unusable; nothing is written.

    Example:
        >>> import torch
        >>> model, pixels = load_student("student").model, ((0.5,) * 3, (0.5,) * 3)
        >>> export_model(model, torch.rand(1, 3, 160, 160), "mine", normalise=pixels).name
        'mine'
    """
    target = Path(output)
    require_replaceable(target, "bundle")
    form = _form(options or ExportOptions())
    require(
        not form.boards,
        "A module in memory cannot be exported for a board.",
        "Write a sparse model with `sparsify` first.",
    )
    names = check_names(getattr(module, "output_names", None) if outputs is None else outputs)
    pixels = normalisation_of(module, f"This {type(module).__name__}", Normalisation.parse(normalise))
    backbone = backbone_of(module)
    require_images(example)
    height, width = (int(side) for side in example.shape[-2:])
    if (height, width) != backbone.image_size:
        raise ConfigError(
            f"The example has {size_text((height, width))} pixels, the model {size_text(backbone.image_size)}.",
            "Give an example of the size that the model is used at.",
        )
    student = Student(
        module, name or type(module).__name__, pixels, backbone.sparsity or SparsityConfig(keep=1), outputs=names
    )
    return _export(student, target, form, progress)


def export_student(
    student: Student,
    output: Path,
    options: ExportOptions,
    base: FloatFile | None = None,
    progress: Progress | None = None,
    int8: tuple[onnx.ModelProto, Quantisation] | None = None,
) -> Path:
    """Export a sparse model in memory (see `export_bundle`).

    Args:
        student: The model.
        output: See `export_bundle`.
        options: Options.
        base: Its `float_file`, if that exists.
        progress: Progress callback.
        int8: Its int8 file, if that exists, and the report of the calibration that its scales come from; see
            `int8.check_int8`.
    """
    return _export(student, output, _form(options), progress, base, int8)


class _Form(NamedTuple):
    """Parsed options.

    Attributes:
        options: The options.
        batch: Batch size; None for a dynamic one.
        images: Images that calibrate int8 and check the layout for boards.
        labels: Class names.
        boards: Loaded boards.
        call: The user's function.
        held: Images on which the file is compared with `call`.
    """

    options: ExportOptions
    batch: int | None
    images: list[Path]
    labels: tuple[str, ...]
    boards: list[Board]
    call: UserFunction | None
    held: list[Path]


def _form(options: ExportOptions) -> _Form:
    """Parse the options and refuse those that do not go together."""
    precision, int8_target, calibrate = options.precision, options.int8_target, options.calibrate
    choices = ("precision", precision, WEIGHT_PRECISIONS), ("int8 target", int8_target, INT8_TARGETS)
    for name, value, known in choices:
        require(value in known, f"{name} is {value!r}.", f"Choose one of: {', '.join(known)}.")
    if precision == "int8":
        fix = "Give a folder of them with --calibrate."
        require(calibrate is not None, "int8 requires images to calibrate with.", fix)
    else:
        fix = "Leave it out, or choose --precision int8."
        for_board = calibrate is None or bool(options.boards)
        require(for_board, "Images to calibrate with require int8, or a board.", fix)
        require(int8_target == INT8_TARGETS[0], f"int8 target {int8_target!r} requires int8.", fix)
    loaded = [board if isinstance(board, Board) else load_board(board) for board in options.boards]
    half, fix = precision == "fp16" or int8_target == "tensorrt", "Choose fp16, or int8 with --int8-target tensorrt."
    require(half or not loaded, f"A board's kernels are for float16, not for {precision}.", fix)
    check_ok, fix = (
        (options.check is None) == (options.data is None),
        "Give both: --check module:function --data IMAGES/.",
    )
    require(check_ok, "Checking a file requires both a function and images.", fix)
    call = import_object(options.check, NAME_IT) if isinstance(options.check, str) else options.check
    require(call is None or callable(call), f"{options.check} is a {type(call).__name__}.", "Name a function.")
    images, check_images = (
        [] if folder is None else evenly(list_images(Path(folder)), MAX_CALIBRATION_IMAGES)
        for folder in (calibrate, options.data)
    )
    stream_ok = not half and str(options.batch) == "1"
    fix = "Leave --stream out, or change --precision and --batch."
    require(stream_ok or not options.stream, "--stream requires fp32 or int8 for the CPU, and batch 1.", fix)
    batch, labels = options.batch, check_labels(list(options.labels), "The classes", _LABELS)
    size = None if batch == "dynamic" else whole_number(str(batch), 'batch (a number or "dynamic")', 1, MOST_BATCH)
    return _Form(options, size, images, labels, loaded, call, check_images)


def _export(
    student: Student,
    target: Path,
    form: _Form,
    progress: Progress | None,
    base: FloatFile | None = None,
    int8: tuple[onnx.ModelProto, Quantisation] | None = None,
) -> Path:
    """Check a model's file, then write the bundle."""
    options, fix = form.options, "Check the model that it was made from: export MODEL --check .."
    checkable = form.call is None or student.provenance.training is None
    require(checkable, "A trained sparse model cannot be checked: its answers differ from your model's.", fix)
    original = student
    student, retiled = fit_to_gpus(student, form.images) if form.boards else (student, None)
    stream = stream_of(deploy(student, options.tokens), student.img_size) if options.stream else None
    base = (base if student is original else None) or float_file(student, options.tokens, form.batch)
    file = _file(student.img_size, base, form, progress, int8)
    model, user_call = student.model, None
    if form.call is not None:
        exact = options.precision == "fp32" and student.sparsity.is_dense
        images = {path: load_image(path, Framing(student.img_size, options.fit)) for path in form.held}
        user_call = compare_with_function(form.call, images, student, file.model, options.tokens, exact)
    # One line per label, whatever a folder's name contains, so that `Bundle.labels` and the metadata agree.
    classes = {output.name: output.type.tensor_type.shape.dim[-1].dim_value for output in file.model.graph.output}
    count = classes.get("logits", 0)
    require(len(form.labels) in (0, count), f"{len(form.labels)} labels for {count} classes.", _LABELS)
    known = class_labels if isinstance(model, TimmModel) else hugging_face.configured_labels
    named = form.labels or student.labels or (known(model) if count else ())
    # The answer may not come from the classifier inside.
    labels = [printable(name) for name in named] if len(named) == count else []
    onnx.helper.set_model_props(file.model, _metadata(student, file.deployed, labels))
    float_models = (base.model, file.model) if options.precision == "int8" else ()
    with new_folder(target, "bundle") as folder:
        (folder / MODEL_FILE).write_bytes(file.model.SerializeToString())
        np.savez_compressed(folder / GOLDEN_FILE, **file.golden)
        if labels:
            (folder / LABELS_FILE).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        work = Workload(model_shape(student.model), student.sparsity, form.batch or 1, "kernels")
        kernels = tuple(
            board_files(file.model, student.name, board, folder, faster_dense(work, board)) for board in form.boards
        )
        manifest = msgspec.structs.replace(
            _manifest(student, file, options),
            user_call=user_call,
            retiled=retiled,
            boards=kernels,
            stream=stream and write_stream(stream, file.deployed.output_names, student.img_size, folder, float_models),
        )
        seal_bundle(folder, manifest)
    return target


class FloatFile(NamedTuple):
    """A model's file in float32, checked against torch, from which the files of all precisions are made.

    Attributes:
        deployed: The module.
        model: The file.
        check: Its check against torch.
        golden: Golden arrays.
        quantisation: Cost of int8, if it was converted.
        float16: Cost of float16, if it was converted.
    """

    deployed: DeployedModel
    model: onnx.ModelProto
    check: Check
    golden: dict[str, Any]
    quantisation: Quantisation | None = None
    float16: Float16 | None = None


def float_file(
    student: Student, tokens: bool, batch: int | None = 1, other: onnx.ModelProto | None = None, check: bool = True
) -> FloatFile:
    """Export a model to float32 and check it.

    Args:
        student: The sparse model.
        tokens: See `ExportOptions`.
        batch: Batch size; None for a dynamic one.
        other: Float32 file of another plan of this model, for batch 1, from which the file is derived (`replan`).
        check: Compare the file with torch. Leave it out only if nothing but files of other plans is made from it, which
            are checked themselves.

    Raises:
        GateError: The file disagrees with torch.
    """
    deployed, size = deploy(student, tokens), student.img_size
    if other is None:
        model = export_graph(deployed, size, batch, deployed.output_names)
    else:
        shape = model_shape(student.model)
        plan = plan_of(student.sparsity, shape.depth, shape.patches)
        model = replan(other, student.sparsity, plan, shape.patches, shape.prefix)
    batches = (1, 3) if batch is None else (batch,)
    if not check:
        return FloatFile(deployed, model, Check(batches_run=batches), {"input.image": smooth_images(size, batches[0])})
    return FloatFile(deployed, model, *check_export(model, deployed, size, batches))


def _file(
    size: ImageSize,
    base: FloatFile,
    form: _Form,
    progress: Progress | None,
    int8: tuple[onnx.ModelProto, Quantisation] | None,
) -> FloatFile:
    """Convert the file to fp16, or to int8 with the rest as its target needs it."""
    model, golden, batches, options = base.model, base.golden, base.check.batches_run, form.options
    quantisation = float16 = judged = None
    if options.precision == "int8":
        framing = Framing(size, options.fit)
        images = [np.repeat(load_image(path, framing)[None], batches[0], 0) for path in form.images]
        if int8 is None:
            model, quantisation = quantise(model, images, options.int8_target, progress)
        else:
            model, quantisation = int8[0], check_int8(model, int8[0], images, int8[1])
        judged = held_out_images(images)[:3]
    if options.precision == "fp16" or options.int8_target == "tensorrt":
        images = [smooth_images(size, batch, seed) for seed, batch in enumerate((*batches, batches[0]))]
        model, float16 = to_fp16(model, images, judged)
    if options.precision != "fp32":
        golden = golden | {f"output.{name}": x for name, x in file_runner(model)(golden["input.image"]).items()}
    return base._replace(model=model, golden=golden, quantisation=quantisation, float16=float16)


def _load(source: str | Path, options: ModelOptions, budget: Budget) -> Student:
    folder = Path(source)
    kind = kind_of(folder) if folder.is_dir() else None
    if kind is None:
        fix = "Make one with `sparsifiner-edge sparsify`."
        require(budget.is_unchanged, f"--keep and --merge require a sparse model, and {source} is not one.", fix)
        return load_source(str(source), options.file, options.img_size, options.normalisation)
    require_kind(folder, "student")
    fix = "A sparse model contains its weights; leave it out."
    require(options.file is None, "--weights cannot be combined with a sparse model.", fix)
    refuse_normalisation(options.normalise)
    return load_student(folder, options.img_size, budget, options.trust)


def model_shape(model: nn.Module) -> ModelShape:
    """Return the sizes that decide a model's costs."""
    backbone = backbone_of(model)
    linear = [x for x in backbone.layers[0].mlp.modules() if isinstance(x, nn.Linear)]
    return ModelShape(
        depth=len(backbone.layers),
        heads=backbone.geometry.heads,
        width=backbone.width,
        # A gated MLP has three matrices and counts as 1.5 times as wide.
        hidden=round(sum(x.weight.numel() for x in linear) / (2 * backbone.width)),
        prefix=backbone.prefix,
        patches=backbone.patches,
        patch=backbone.patch[0],
    )


def _metadata(student: Student, deployed: DeployedModel, labels: list[str]) -> dict[str, str]:
    licence = (getattr(student.model, "pretrained_cfg", None) or {}).get("license")
    entries = {
        "name": student.name,
        "version": version("sparsifiner-edge"),
        "licence": str(licence or "see the weights' source"),
        "classes": "\n".join(labels),
    }
    # GStreamer's onnxinference requires a tensor id under each output's name.
    return entries | {name: f"sparsifiner-edge-{name}" for name in deployed.output_names}


def _manifest(student: Student, file: FloatFile, options: ExportOptions) -> Manifest:
    size, shape, graph = student.img_size, model_shape(student.model), file.model.graph
    plan = plan_of(student.sparsity, shape.depth, shape.patches)
    selects = not plan.is_dense  # Selects keys, remaining tokens, or pairs to merge.
    return Manifest(
        schema_version=BUNDLE_SCHEMA,
        files={},
        name=student.name,
        precision=options.precision,
        shape=shape,
        ops=tuple(sorted(f"{DOMAIN}::{f.name}" for f in file.model.functions)),
        inputs=tuple(map(tensor_spec, graph.input)),
        outputs=tuple(map(tensor_spec, graph.output)),
        preprocessing=Preprocessing(size, options.fit, student.normalisation),
        sparsity=student.sparsity if selects else None,
        plan=plan,
        tolerances=tolerances_of(file.check, options.precision, options.int8_target, selects),
        check=file.check,
        quantisation=file.quantisation,
        float16=file.float16,
        provenance=write_record(student.provenance),
        tools={name: version(name) for name in (*_TOOLS, student.backbone.library)},
    )
