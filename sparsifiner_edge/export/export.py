"""`export_bundle`: student or dense model -> bundle folder."""

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
from sparsifiner_edge.execution import INT8_TARGETS, STORED_PRECISIONS
from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.export.check import check_export, smooth_images, tolerances_of
from sparsifiner_edge.export.deployed_model import DeployedModel, deploy
from sparsifiner_edge.export.fp16 import to_fp16
from sparsifiner_edge.export.gpu_layout import fit_to_gpus
from sparsifiner_edge.export.graph import export_graph
from sparsifiner_edge.export.int8 import held_out_images, quantise
from sparsifiner_edge.export.sessions import file_runner
from sparsifiner_edge.export.stream import stream_of, write_stream
from sparsifiner_edge.export.user_call import UserFunction, hold_against
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

_LABELS = "Give one name for each class, in their order."
_TOOLS = ("sparsifiner-edge", "torch", "onnx", "onnxscript", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a bundle's file is to be.

    Attributes:
        precision: "fp32"; "fp16" with islands of float32 (see `fp16`); or "int8" for the linear layers, where
            attention stays in float32, or for the target "tensorrt" becomes float16.
        batch: a fixed batch size, or "dynamic".
        tokens: also output the tokens of a classifier, or of what is in a model with a decoder; a vision transformer
            without classifier always does.
        calibrate: for int8 and boards: a folder of images like those that the model will see; at most 32 are used.
        check: a function of yours, or its name, from an image uint8 [H,W,3], RGB of the file's size, to the model's
            outputs by name (or the only one): the file must answer as it does; where that is sparse, int8 or float16,
            the dense model must. data: for check: an image, or a folder of them; at most 32 are used.
        int8_target: for int8, what will run it: "cpu" or "tensorrt".
        labels: of the classes of the output "logits", in their order; none takes those that the model has.
        boards: names or files of boards (see `profiles.boards`), or loaded ones, whose GPU kernels go into the bundle,
            of float16; the student gets the tile and cells that suit them if those pass the gate (see `gpu_layout`).
        fit: how `run` and `evaluate` bring images to the size unless told otherwise; see `fitting.Framing`.
        stream: also write what computes of a camera's frames only what changed (see `Session.stream`).

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
    """Export a student folder, or a pretrained model as the dense baseline, to a bundle folder.

    Args:
        source: student folder, or a model (see `load_source`).
        output: folder to write; an earlier bundle there is replaced.
        model: how the source is loaded. budget: of a student.
        options: what the file is to be.
        progress: for int8; see `Progress`.

    Returns:
        The folder.

    Raises:
        GateError: the file disagrees with torch, or fp16 or int8 with float32; nothing is written.
        SparsifinerError: unusable input; nothing is written.

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
    """Export a module in memory that contains a vision transformer, sparse or not, decoder and all, to a bundle folder.

    Args:
        module: called with images [B,3,H,W] alone, on the CPU.
        example: such images, floating-point; their size is the bundle's.
        output: folder to write; an earlier bundle there is replaced.
        normalise: what the module expects of pixels / 255: (mean, std), three numbers each; False: nothing, it
            normalises inside; None: what it declares as `image_mean` and `image_std`.
        outputs: names of what it gives: of a dictionary some of its keys; None takes the module's own, and
            what it may declare as `output_names`.
        name: of the model, for people; None takes its class.
        options: what the file is to be, for no boards. progress: for int8; see `Progress`.

    Returns:
        The folder.

    Raises:
        GateError: the file disagrees with torch, or fp16 or int8 with float32; nothing is written.
        SparsifinerError: unusable input; nothing is written.

    Example:
        >>> import torch
        >>> model, pixels = load_student("student").model, ((0.5,) * 3, (0.5,) * 3)
        >>> export_model(model, torch.rand(1, 3, 160, 160), "mine", normalise=pixels).name
        'mine'
    """
    target = Path(output)
    require_replaceable(target, "bundle")
    form = _form(options or ExportOptions())
    require(not form.boards, "A module in memory is exported for no board.", "Write a student: `sparsify`.")
    names = check_names(getattr(module, "output_names", None) if outputs is None else outputs)
    pixels = normalisation_of(module, f"This {type(module).__name__}", Normalisation.parse(normalise))
    backbone = backbone_of(module)
    require_images(example)
    height, width = (int(side) for side in example.shape[-2:])
    if (height, width) != backbone.image_size:
        raise ConfigError(
            f"The example is of {size_text((height, width))} pixels, the model of {size_text(backbone.image_size)}.",
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
) -> Path:
    """Export a student in memory; see `export_bundle`. base: its `float_file`, where that is there."""
    return _export(student, output, _form(options), progress, base)


class _Form(NamedTuple):
    """Options, read; batch: None: dynamic; images calibrate int8 and judge the layout for boards, and `call` on `held`
    the file.
    """

    options: ExportOptions
    batch: int | None
    images: list[Path]
    labels: tuple[str, ...]
    boards: list[Board]
    call: UserFunction | None
    held: list[Path]


def _form(options: ExportOptions) -> _Form:
    """Refuse what cannot be combined."""
    precision, int8_target, calibrate = options.precision, options.int8_target, options.calibrate
    choices = ("precision", precision, STORED_PRECISIONS), ("int8 target", int8_target, INT8_TARGETS)
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
    both, fix = (options.check is None) == (options.data is None), "Give both: --check module:function --data IMAGES/."
    require(both, "A file is checked against a function of yours on images.", fix)
    call = import_object(options.check, NAME_IT) if isinstance(options.check, str) else options.check
    require(call is None or callable(call), f"{options.check} is a {type(call).__name__}.", "Name a function.")
    images, held = (
        [] if folder is None else evenly(list_images(Path(folder)), MAX_CALIBRATION_IMAGES)
        for folder in (calibrate, options.data)
    )
    single = not half and str(options.batch) == "1"
    fix = "Leave --stream out, or those."
    require(single or not options.stream, "A stream's files are of fp32 or int8 and batch 1.", fix)
    batch, labels = options.batch, check_labels(list(options.labels), "The classes", _LABELS)
    size = None if batch == "dynamic" else whole_number(str(batch), 'batch (a number or "dynamic")', 1, MOST_BATCH)
    return _Form(options, size, images, labels, loaded, call, held)


def _export(
    student: Student, target: Path, form: _Form, progress: Progress | None, base: FloatFile | None = None
) -> Path:
    """Check a student's file, then write the bundle."""
    options, fix = form.options, "Check the model that it was made of: export MODEL --check .."
    same = form.call is None or student.provenance.training is None
    require(same, "A trained student is no longer the model that you would call.", fix)
    original = student
    student, retiled = fit_to_gpus(student, form.images) if form.boards else (student, None)
    stream = stream_of(deploy(student, options.tokens), student.img_size) if options.stream else None
    base = (base if student is original else None) or float_file(student, options.tokens, form.batch)
    file = _file(student.img_size, base, form, progress)
    model, user_call = student.model, None
    if form.call is not None:
        exact = options.precision == "fp32" and student.sparsity.is_dense
        images = {path: load_image(path, Framing(student.img_size, options.fit)) for path in form.held}
        user_call = hold_against(form.call, images, student, file.model, options.tokens, exact)
    # One line each, whatever a folder's name holds; `Bundle.labels` and the model's metadata then say the same.
    classes = {output.name: output.type.tensor_type.shape.dim[-1].dim_value for output in file.model.graph.output}
    count = classes.get("logits", 0)
    require(len(form.labels) in (0, count), f"{len(form.labels)} labels for {count} classes.", _LABELS)
    known = class_labels if isinstance(model, TimmModel) else hugging_face.configured_labels
    named = form.labels or student.labels or (known(model) if count else ())
    # A classifier inside may not be what answers.
    labels = [printable(name) for name in named] if len(named) == count else []
    onnx.helper.set_model_props(file.model, _metadata(student, file.deployed, labels))
    like = (base.model, file.model) if options.precision == "int8" else ()
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
            stream=stream and write_stream(stream, file.deployed.output_names, student.img_size, folder, like),
        )
        seal_bundle(folder, manifest)
    return target


class FloatFile(NamedTuple):
    """A student's file in float32, checked against torch, and its golden arrays: files of all precisions are made of
    it, with what that cost.
    """

    deployed: DeployedModel
    model: onnx.ModelProto
    check: Check
    golden: dict[str, Any]
    quantisation: Quantisation | None = None
    float16: Float16 | None = None


def float_file(student: Student, tokens: bool, batch: int | None = 1) -> FloatFile:
    """Export a student and check that. tokens: see `ExportOptions`. batch: None: dynamic.

    Raises:
        GateError: the file disagrees with torch.
    """
    deployed, size = deploy(student, tokens), student.img_size
    model = export_graph(deployed, size, batch, deployed.output_names)
    return FloatFile(deployed, model, *check_export(model, deployed, size, (1, 3) if batch is None else (batch,)))


def _file(size: ImageSize, base: FloatFile, form: _Form, progress: Progress | None) -> FloatFile:
    """The same in fp16, or in int8 with the rest as its target wants it."""
    model, golden, batches, options = base.model, base.golden, base.check.batches_run, form.options
    quantisation = float16 = judged = None
    if options.precision == "int8":
        framing = Framing(size, options.fit)
        images = [np.repeat(load_image(path, framing)[None], batches[0], 0) for path in form.images]
        model, quantisation = quantise(model, images, options.int8_target, progress)
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
        require(budget.is_unchanged, f"--keep and --merge require a student, and {source} is none.", fix)
        return load_source(str(source), options.file, options.img_size, options.normalisation)
    require_kind(folder, "student")
    fix = "A student has its own weights; leave it out."
    require(options.file is None, "--weights cannot be combined with a student.", fix)
    refuse_normalisation(options.normalise)
    return load_student(folder, options.img_size, budget, options.trust)


def model_shape(model: nn.Module) -> ModelShape:
    """The sizes that decide a model's costs."""
    backbone = backbone_of(model)
    linear = [x for x in backbone.layers[0].mlp.modules() if isinstance(x, nn.Linear)]
    return ModelShape(
        depth=len(backbone.layers),
        heads=backbone.geometry.heads,
        width=backbone.width,
        # A gated MLP has three matrices: it counts as one and a half times as wide.
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
    # GStreamer's onnxinference asks for a tensor id under each output's name.
    return entries | {name: f"sparsifiner-edge-{name}" for name in deployed.output_names}


def _manifest(student: Student, file: FloatFile, options: ExportOptions) -> Manifest:
    size, shape, graph = student.img_size, model_shape(student.model), file.model.graph
    plan = plan_of(student.sparsity, shape.depth, shape.patches)
    selects = not plan.is_dense  # Keys, tokens that stay, or pairs that merge.
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
