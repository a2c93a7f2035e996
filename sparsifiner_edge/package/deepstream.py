"""NVIDIA DeepStream: a model that Gst-nvinfer's preprocessing fits, its configurations, and an application's.

    model.onnx                    float32 [B,3,H,W], 0 to 255; classifiers give `probabilities` alone
    labels.txt                    all classes in one line, with semicolons
    config_infer_primary.txt      Gst-nvinfer on whole frames
    config_infer_secondary.txt    Gst-nvinfer on objects that a detector found
    deepstream_app_primary.txt, deepstream_app_secondary.txt
    README.md

Paths in them are relative to the files themselves, so the folder can go anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE
from sparsifiner_edge.bundle.store import LABELS_FILE
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.images import centre_text
from sparsifiner_edge.novelty import NOVELTY
from sparsifiner_edge.package.common import ImageBundle, template
from sparsifiner_edge.package.float_model import PROBABILITIES, write_float_model

ROLES = ("primary", "secondary")
OBJECTS = 8
"""Objects of a frame that a secondary classifier takes at once, where the batch is dynamic."""
_MOST_CLASSES = 1 << 20
_SAMPLES = "/opt/nvidia/deepstream/deepstream/samples"
_MODES = {"fp32": 0, "fp16": 2}
_TENSORS = "network-type=100\noutput-tensor-meta=1\n"
_FRAMES = "interval=0\n"
_OBJECTS = "operate-on-gie-id=1\ninput-object-min-width=32\ninput-object-min-height=32\nsecondary-reinfer-interval=10\n"


def write(bundle: ImageBundle, folder: Path, batch: int | None, _kernels: str) -> list[str]:
    """Fill `folder`; see `package_bundle`.

    Raises:
        ConfigError: an int8 bundle, or labels that are not one per class.
        GateError: the model disagrees with the golden pair.
    """
    if bundle.precision not in _MODES:
        raise ConfigError(
            f"{bundle.folder} is {bundle.precision}: Gst-nvinfer builds int8 only with a calibration table of its own.",
            "Export it with --precision fp32 or fp16.",
        )
    if bundle.classifier:
        (folder / LABELS_FILE).write_text(";".join(_labels(bundle)) + "\n", encoding="utf-8")
    differences = write_float_model(bundle, folder)
    for role in ROLES:
        size = bundle.manifest.batch or batch or (1 if role == "primary" else OBJECTS)
        (folder / f"config_infer_{role}.txt").write_text(nvinfer_config(bundle, role, size), encoding="utf-8")
        (folder / f"deepstream_app_{role}.txt").write_text(app_config(role, size), encoding="utf-8")
    (folder / "README.md").write_text(_readme(bundle, differences), encoding="utf-8")
    return _remarks(bundle)


def _remarks(bundle: ImageBundle) -> list[str]:
    """What is different there from the bundle."""
    found = [
        "Gst-nvinfer scales frames bilinearly (scaling-filter=1; left out, it would take the nearest pixel), "
        "`sparsifiner-edge run` by cubic interpolation: answers differ a little."
    ]
    if not bundle.classifier:
        found.append(
            "This bundle has no logits: Gst-nvinfer's classifiers need them. The configurations attach the raw outputs "
            "instead (network-type=100, output-tensor-meta=1); your application reads them."
        )
    elif any(output.name == NOVELTY for output in bundle.manifest.outputs):
        found.append(
            "The score novelty is left out: Gst-nvinfer reads every output of a classifier as the answer of one. A "
            "bundle without logits gives it as a tensor, and so do Triton and GStreamer."
        )
    if bundle.precision == "fp16":
        found.append(
            "Gst-nvinfer builds networks whose types TensorRT may change: islands of float32 may become float16. "
            "Compare its answers with those of `sparsifiner-edge run`, or package an fp32 bundle."
        )
    found.append(
        f"The bundle takes the {centre_text(bundle.image_size)} of a frame. Gst-nvinfer cannot crop: it gets the whole "
        "frame with black bars. Crop before it (nvvideoconvert src-crop=LEFT:TOP:WIDTH:HEIGHT) for the same image."
    )
    return found


def _labels(bundle: ImageBundle) -> list[str]:
    """One label per class, without semicolons, which separate them.

    Raises:
        ConfigError: there are more or fewer labels than classes, or no number of classes.
    """
    classes = next(output.shape[-1] for output in bundle.manifest.outputs if output.name == "logits")
    if not isinstance(classes, int) or not 0 < classes <= _MOST_CLASSES:
        raise ConfigError(f"{bundle.folder} has {classes!r:.60} classes.", AGAIN)
    labels = bundle.class_names or [f"class_{i}" for i in range(classes)]
    if len(labels) != classes:
        raise ConfigError(f"{len(labels)} labels for {classes} classes.", AGAIN)
    return [label.replace(";", ",").strip() or "-" for label in labels]


def nvinfer_config(bundle: ImageBundle, role: str, batch: int) -> str:
    """Gst-nvinfer's key file for whole frames ("primary") or for a detector's objects ("secondary").

    No value can add a key: `read_bundle` takes no name of an output that holds more than a word.
    """
    height, width = height_width(bundle.image_size)
    outputs = [PROBABILITIES] if bundle.classifier else [output.name for output in bundle.manifest.outputs]
    text = template(
        "deepstream/nvinfer.txt",
        number=1 + ROLES.index(role),
        batch=batch,
        model=MODEL_FILE,
        precision=bundle.precision,
        mode=_MODES[bundle.precision],
        height=height,
        width=width,
        outputs=";".join(outputs),
    )
    # The type tells this classifier's answers from another's.
    kind = re.sub(r"[^A-Za-z0-9_-]", "_", bundle.name)
    classes = template("deepstream/nvinfer_classifier.txt", kind=kind, labels=LABELS_FILE)
    text += classes if bundle.classifier else _TENSORS
    return text + (_FRAMES if role == "primary" else _OBJECTS)


def app_config(role: str, batch: int) -> str:
    """deepstream-app's key file: the samples' video through the model, drawn into a file."""
    detector = f"{_SAMPLES}/configs/deepstream-app/config_infer_primary.txt"
    first = ("config_infer_primary.txt", batch) if role == "primary" else (detector, 1)
    text = template("deepstream/app.txt", samples=_SAMPLES, role=role, config=first[0], batch=first[1])
    if role == "primary":
        return text
    return text + template("deepstream/app_secondary.txt", samples=_SAMPLES, batch=batch)


def _readme(bundle: ImageBundle, differences: Mapping[str, float]) -> str:
    found = (
        "the likeliest class above `classifier-threshold`, as classifier metadata."
        if bundle.classifier
        else "the raw outputs as NvDsInferTensorMeta; nothing is drawn."
    )
    height, width = height_width(bundle.image_size)
    return template(
        "deepstream/guide.md",
        name=bundle.name,
        height=height,
        width=width,
        found=f"Each frame (or object) gets {found}",
        checked=", ".join(f"{name} {error:.1e}" for name, error in differences.items()),
        notes="\n".join(f"- {remark}" for remark in _remarks(bundle)),
    )
