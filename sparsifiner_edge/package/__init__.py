"""`package_bundle`: a bundle in the form that DeepStream, Triton Inference Server or GStreamer takes.

    deepstream: model.onnx with float planes as input, labels.txt, config_infer.txt for Gst-nvinfer, probes of its
    outputs triton:     models/NAME/config.pbtxt, labels.txt, 1/model.onnx, libsparsifiner_ops.so if it is built
    gstreamer:  unchanged bundle/ with its signature, plugins/python/sparsifiner.py, model.onnx.modelinfo

Each folder has a README.md with the commands to run. The texts are templates from `export/`. All paths in them are
relative to the folder, so that it can be moved; Triton's must be mounted at /models.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

from msgspec import Struct

from sparsifiner_edge.artifacts import BUNDLE_FILE
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE, TensorSpec
from sparsifiner_edge.bundle.sign import read_signature, write_signature
from sparsifiner_edge.bundle.store import LABELS_FILE, Bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import io_errors, replace_folder
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.ops import native
from sparsifiner_edge.package import deepstream
from sparsifiner_edge.text import file_name

BATCH = 8
"""Largest batch that Triton forms for a bundle with a dynamic batch size."""
_NAME = re.compile(r"[A-Za-z0-9_./:-]+")
"""Names of tensors that are safe in semicolon-separated lists and in lines of configuration files."""
_TYPES = {"uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64"}
"""Triton's name of each type."""


class Package(Struct, frozen=True):
    """A written package.

    Attributes:
        output: Folder that was written.
        files: Paths of its files, relative to the folder.
    """

    output: str
    files: list[str]


def package_bundle(bundle: str | Path, target: str, output: str | Path) -> Package:
    """Write a folder that another system's pipeline runs unchanged. Its README.md lists the commands.

    Args:
        bundle: Folder made by `sparsifiner-edge export`.
        target: "deepstream", "triton" or "gstreamer".
        output: Folder to write; must not exist or be empty.

    Returns:
        The folder and its files.

    Raises:
        ConfigError: The target is unknown, or the bundle does not fit it.
        SparsifinerError: The bundle or the output is unusable. Nothing is written.

    Example:
        >>> "README.md" in package_bundle("bundle", "triton", "packaged").files
        True
    """
    writers = {"deepstream": _write_deepstream, "triton": _write_triton, "gstreamer": _write_gstreamer}
    if target not in writers:
        raise ConfigError(f"target is {target!r}.", f"Choose one of: {', '.join(writers)}.")
    opened, place = _open(Path(bundle)), Path(output)
    if target != "triton" and (batch := opened.manifest.batch) not in (None, 1):
        raise ConfigError(f"{bundle} takes batches of {batch}; frames come one by one.", "Export it with --batch 1.")
    if target != "gstreamer" and opened.manifest.stream is not None:
        what = f"{bundle} was exported with --stream, and {target} does not support streaming inference."
        raise ConfigError(what, "Export it without --stream, or package it for gstreamer.")
    with io_errors(place):
        if place.is_symlink() or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
            raise ArtifactError(f"{output} exists; it is left untouched.", "Choose another output, or remove it.")
    if Path(os.path.realpath(place)).is_relative_to(os.path.realpath(bundle)):
        raise ArtifactError(f"{output} is in the bundle.", "Choose another output.")
    with replace_folder(place) as folder:
        writers[target](opened, folder)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return Package(str(output), files)


def _open(folder: Path) -> Bundle:
    """Open a bundle, and check that it takes one image and that its tensor names are safe."""
    bundle = open_bundle(folder)
    manifest, (height, width) = bundle.manifest, height_width(bundle.image_size)
    bundle.model()  # Refuses a model that needs other files.
    if [(t.name, t.dtype, t.shape[1:]) for t in manifest.inputs] != [("image", "uint8", (height, width, 3))]:
        raise ConfigError(f"{folder} does not take one image `image` uint8 [B,{height},{width},3].", "Export it again.")
    names = [output.name for output in manifest.outputs]
    if not names or len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
        raise ArtifactError(f"{folder}: outputs are named {names!r:.60}.", "Do not use this bundle.")
    return bundle


def _name(bundle: Bundle) -> str:
    """Return the name of the model as a safe file name."""
    return file_name(bundle.manifest.name or "")


def _framing(bundle: Bundle) -> Framing:
    """Return how frames become the input of the model."""
    return Framing(bundle.image_size, bundle.require(bundle.manifest.preprocessing, "preprocessing").fit)


def _resource(name: str) -> Any:
    """Return a file from `export/`, for example "triton/guide.md"."""
    target, _, file = name.partition("/")
    return importlib.resources.files(f"sparsifiner_edge.{target}").joinpath(file)


def template(name: str, /, **values: object) -> str:
    """Return a template from `export/` with its fields filled in."""
    return str(_resource(name).read_text(encoding="utf-8").format(**values))


def _write_deepstream(bundle: Bundle, folder: Path) -> None:
    """Write the model, its configuration and guide for DeepStream."""
    if bundle.precision not in deepstream.MODES:
        what = f"{bundle.folder} is {bundle.precision}: Gst-nvinfer builds int8 only with its own calibration table."
        raise ConfigError(what, "Export it with --precision fp32 or fp16.")
    model = deepstream.for_nvinfer(bundle.model())
    outputs = [output.name for output in model.graph.output]  # Checked below, before they go into a configuration.
    if not {deepstream.PROBABILITIES, *(output.name for output in bundle.manifest.outputs)}.issuperset(outputs):
        raise ArtifactError(f"{bundle.folder}: the model gives other outputs than its manifest says.", "Do not use it.")
    channels, framing, intended = deepstream.give_map(model, bundle), _framing(bundle), bundle.manifest.intended
    kind = "map" if channels else "classifier" if outputs == [deepstream.PROBABILITIES] else "tensors"
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    precision = "fp16" if intended is not None and intended.compute_precision == "fp16" else bundle.precision
    (height, width), labels = height_width(framing.size), bundle.labels()
    config = template(
        "deepstream/nvinfer.txt",
        batch=bundle.manifest.batch or 1,
        precision=precision,
        height=height,
        width=width,
        aspect=int(framing.fit != "stretch"),
        mode=deepstream.MODES[precision],
        outputs=";".join(output.name for output in model.graph.output),
    ) + template(f"deepstream/{kind}.txt", channels=channels, threshold=0.5 if channels == 1 else 0.0)
    (folder / "config_infer.txt").write_text(config, encoding="utf-8")
    if kind == "classifier":
        classes = bundle.manifest.outputs[0].shape[-1]
        if not isinstance(classes, int) or len(labels) not in (0, classes):
            raise ConfigError(f"{bundle.folder} has {len(labels)} labels for {classes!r:.40} classes.", AGAIN)
        labels = labels or [f"class_{number}" for number in range(classes)]
    for probe in () if kind == "classifier" else ("probe.py", "probe.c"):
        (folder / probe).write_bytes(_resource(f"deepstream/{probe}").read_bytes())
    if labels:  # Gst-nvinfer reads one line with semicolons as separators.
        line = ";".join(label.replace(";", ",").strip() or "-" for label in labels)
        (folder / LABELS_FILE).write_text(f"{line}\n", encoding="utf-8")
    guide = template("deepstream/guide.md", name=_name(bundle), height=height, width=width, framing=framing)
    (folder / "README.md").write_text(guide, encoding="utf-8")


def _write_triton(bundle: Bundle, folder: Path) -> None:
    """Write a model repository and guide for Triton."""
    name, most, labels = _name(bundle), 0 if bundle.manifest.batch else BATCH, bundle.labels()
    model = folder / "models" / name
    (model / "1").mkdir(parents=True)
    (model / "1" / MODEL_FILE).write_bytes(bundle.read(MODEL_FILE))
    if labels:
        (model / LABELS_FILE).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    # The native library supports float32 only.
    library = native.library_path() if bundle.manifest.ops and bundle.manifest.float16 is None else None
    if library is not None:
        shutil.copyfile(library, model / library.name)
    config = template(
        "triton/config.pbtxt",
        name=name,
        most=most,
        size=_dims(bundle.manifest.inputs[0], most),
        outputs="".join(_output(output, most, bool(labels)) for output in bundle.manifest.outputs),
        batching="dynamic_batching {\n  max_queue_delay_microseconds: 2000\n}\n" if most else "",
        library=f'model_operations {{\n  op_library_filename: "/models/{name}/{library.name}"\n}}\n' if library else "",
    )
    (model / "config.pbtxt").write_text(config, encoding="utf-8")
    shape = f"{bundle.manifest.batch or 1},{','.join(map(str, height_width(bundle.image_size)))},3"
    guide = template("triton/guide.md", name=name, shape=shape, framing=_framing(bundle))
    (folder / "README.md").write_text(guide, encoding="utf-8")


def _output(tensor: TensorSpec, most: int, labelled: bool) -> str:
    """Return an output of Triton's configuration."""
    if tensor.dtype not in _TYPES or not tensor.shape:
        raise ConfigError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}: Triton has no such output.", AGAIN)
    labels = f'  label_filename: "{LABELS_FILE}"\n' if labelled and tensor.name == "logits" else ""
    kind = f'  name: "{tensor.name}"\n  data_type: TYPE_{_TYPES[tensor.dtype]}\n'
    return f"output {{\n{kind}  dims: {_dims(tensor, most)}\n{labels}}}\n"


def _dims(tensor: TensorSpec, most: int) -> list[int]:
    """Return the shape of a tensor with -1 for dynamic axes, without the batch axis if Triton forms batches."""
    return [size if isinstance(size, int) else -1 for size in tensor.shape[1 if most else 0 :]]


def _write_gstreamer(bundle: Bundle, folder: Path) -> None:
    """Write the bundle, the element and the guide for GStreamer."""
    bundle.copy(bundle.manifest.files, folder / "bundle")
    (folder / "bundle" / BUNDLE_FILE).write_bytes(bundle.text)
    # The description must lie next to the model, and the bundle must contain no file that its manifest does not list.
    (folder / MODEL_FILE).symlink_to(Path("bundle") / MODEL_FILE)
    (folder / f"{MODEL_FILE}.modelinfo").write_text(_modelinfo(bundle), encoding="utf-8")
    if (signature := read_signature(bundle.folder)) is not None:
        write_signature(folder / "bundle", signature)
    # GStreamer's loader imports the element; this package only copies it.
    element, framing = folder / "plugins" / "python" / "sparsifiner.py", _framing(bundle)
    element.parent.mkdir(parents=True)
    element.write_bytes(_resource("gstreamer/python/sparsifiner.py").read_bytes())
    height, width = height_width(framing.size)
    ratio = "/".join(map(str, Fraction(width, height).as_integer_ratio()))
    crop = f"aspectratiocrop aspect-ratio={ratio} ! " if framing.fit == "crop" else ""
    scaled = f"{crop}videoscale add-borders={str(framing.fit == 'letterbox').lower()}"
    guide = template("gstreamer/guide.md", name=_name(bundle), scaled=scaled, height=height, width=width)
    (folder / "README.md").write_text(guide, encoding="utf-8")


def _modelinfo(bundle: Bundle) -> str:
    """Return the description of the tensors that recent versions of `onnxinference` read from a file."""
    lines = ["[modelinfo]", "version=1.0", f"group-id=sparsifiner-edge-{_name(bundle)}"]
    for direction, specs in (("input", bundle.manifest.inputs), ("output", bundle.manifest.outputs)):
        for spec in specs:
            dims = ",".join(map(str, _dims(spec, 0)))
            lines += ["", f"[{spec.name}]", f"id=sparsifiner-edge-{spec.name}", f"type={spec.dtype}", f"dims={dims}"]
            lines += [f"dir={direction}"]
            lines += ["ranges=0.0,255.0;0.0,255.0;0.0,255.0"] if direction == "input" else []
    return "\n".join(lines) + "\n"
