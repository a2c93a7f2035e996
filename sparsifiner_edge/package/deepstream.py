"""NVIDIA DeepStream: a model that Gst-nvinfer's preprocessing fits, its configurations, and an application's.

    model.onnx                    float32 [B,3,S,S], 0 to 255; classifiers give `probabilities` alone
    labels.txt                    all classes in one line, with semicolons
    config_infer_primary.txt      Gst-nvinfer on whole frames
    config_infer_secondary.txt    Gst-nvinfer on objects that a detector found
    deepstream_app_primary.txt, deepstream_app_secondary.txt
    README.md

Paths in them are relative to the files themselves, so the folder can go anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from sparsifiner_edge.bundle.manifest import AGAIN
from sparsifiner_edge.bundle.store import LABELS_FILE
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.package.common import MODEL, Packaged
from sparsifiner_edge.package.float_model import PROBABILITIES, write_float_model
from sparsifiner_edge.package.nvinfer_keys import check_app, check_nvinfer

PRIMARY_ID, SECONDARY_ID = 1, 2
OBJECTS = 8
"""Objects of a frame that a secondary classifier takes at once, where the batch is dynamic."""
Group: TypeAlias = dict[str, int | float | str]
"""Keys of a group of a configuration, and their values."""
_MOST_CLASSES = 1 << 20
_SAMPLES = "/opt/nvidia/deepstream/deepstream/samples"
_MODES = {"fp32": 0, "fp16": 2}
_WORDS = {0: "fp32", 2: "fp16"}


def write(bundle: Packaged, folder: Path, batch: int | None, kernels: str) -> list[str]:
    """Fill `folder`; see `package_bundle`.

    Raises:
        ConfigError: an int8 bundle, or labels that are not one per class.
        GateError: the model disagrees with the golden pair, or a value would not fit a line of a configuration.
    """
    if kernels != "auto":
        raise ConfigError(f"kernels {kernels!r} goes with Triton.", "Leave it out: TensorRT compiles the bodies.")
    if bundle.precision not in _MODES:
        raise ConfigError(
            f"{bundle.folder} is {bundle.precision}: Gst-nvinfer builds int8 only with a calibration table of its own.",
            "Export it with --precision fp32 or fp16.",
        )
    fixed = bundle.manifest.batch
    if fixed not in (None, 1):
        raise ConfigError(
            f"{bundle.folder} takes batches of {fixed}; Gst-nvinfer fills them as frames or objects come.",
            "Export it with --batch dynamic, or 1.",
        )
    if bundle.classifier:
        (folder / LABELS_FILE).write_text(";".join(nvinfer_labels(bundle)) + "\n", encoding="utf-8")
    differences = write_float_model(bundle, folder)
    sizes = {"primary": fixed or batch or 1, "secondary": fixed or batch or OBJECTS}
    for role, size in sizes.items():
        config = {"property": nvinfer_config(bundle, role, size)}
        (folder / f"config_infer_{role}.txt").write_text(_checked(config, check_nvinfer), encoding="utf-8")
        app = _checked(app_config(role, sizes), check_app)
        (folder / f"deepstream_app_{role}.txt").write_text(app, encoding="utf-8")
    (folder / "README.md").write_text(_readme(bundle, differences), encoding="utf-8")
    return remarks(bundle)


def _checked(groups: Mapping[str, Group], check: Callable[[str], Mapping[str, Mapping[str, str]]]) -> str:
    """The text of a configuration that is read back as what it was made of: no other key has slipped in."""
    text = key_file(groups)
    if check(text) != {group: {k: str(v) for k, v in entries.items()} for group, entries in groups.items()}:
        raise GateError("A configuration does not round-trip.", "Report this with the bundle's manifest.")
    return text


def remarks(bundle: Packaged) -> list[str]:
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
    if bundle.precision == "fp16":
        found.append(
            "Gst-nvinfer builds networks whose types TensorRT may change: islands of float32 may become float16. "
            "Compare its answers with those of `sparsifiner-edge run`, or package an fp32 bundle."
        )
    if not _letterbox(bundle):
        found.append(
            "The bundle takes the centre square of a frame. Gst-nvinfer cannot crop: it gets the whole frame with "
            "black bars. Crop before it (nvvideoconvert src-crop=LEFT:TOP:SIDE:SIDE) for the same image."
        )
    return found


def nvinfer_labels(bundle: Packaged) -> list[str]:
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


def nvinfer_config(bundle: Packaged, role: str, batch: int) -> Group:
    """The group `property` for whole frames ("primary") or for a detector's objects ("secondary")."""
    mode = _MODES[bundle.precision]
    outputs = [PROBABILITIES] if bundle.classifier else [output.name for output in bundle.manifest.outputs]
    entries: Group = {
        "gpu-id": 0,
        "gie-unique-id": PRIMARY_ID if role == "primary" else SECONDARY_ID,
        "process-mode": 1 if role == "primary" else 2,
        "batch-size": batch,
        "onnx-file": MODEL,
        "model-engine-file": f"{MODEL}_b{batch}_gpu0_{_WORDS[mode]}.engine",
        "network-mode": mode,
        "infer-dims": f"3;{bundle.image_size};{bundle.image_size}",
        "network-input-order": 0,
        "model-color-format": 0,
        "net-scale-factor": 1.0,
        "maintain-aspect-ratio": 1,
        "symmetric-padding": 1,
        "scaling-filter": 1,
        "output-blob-names": ";".join(outputs),
    }
    if bundle.classifier:
        # The type tells this classifier's answers from another's.
        kind = re.sub(r"[^A-Za-z0-9_-]", "_", bundle.name)
        entries |= {"network-type": 1, "classifier-type": kind, "classifier-threshold": 0.2}
        entries |= {"labelfile-path": LABELS_FILE}
    else:
        entries |= {"network-type": 100, "output-tensor-meta": 1}
    if role == "primary":
        return entries | {"interval": 0}
    return entries | {
        "operate-on-gie-id": PRIMARY_ID,
        "input-object-min-width": 32,
        "input-object-min-height": 32,
        "secondary-reinfer-interval": 10,
    }


def app_config(role: str, sizes: Mapping[str, int]) -> dict[str, Group]:
    """Groups for deepstream-app: the samples' video through the model, drawn into a file."""
    detector = f"{_SAMPLES}/configs/deepstream-app/config_infer_primary.txt"
    groups: dict[str, Group] = {
        "application": {"enable-perf-measurement": 1, "perf-measurement-interval-sec": 5},
        "tiled-display": {"enable": 0},
        "source0": {"enable": 1, "type": 3, "uri": f"file://{_SAMPLES}/streams/sample_720p.mp4", "num-sources": 1,
                    "gpu-id": 0},
        "streammux": {"gpu-id": 0, "live-source": 0, "batch-size": 1, "batched-push-timeout": 40000, "width": 1280,
                      "height": 720},
        "primary-gie": {"enable": 1, "gpu-id": 0, "gie-unique-id": PRIMARY_ID, "batch-size": sizes["primary"],
                        "config-file": "config_infer_primary.txt"},
        "osd": {"enable": 1, "gpu-id": 0, "border-width": 2, "text-size": 15},
        "sink0": {"enable": 1, "type": 3, "container": 1, "codec": 1, "enc-type": 1, "sync": 0, "source-id": 0,
                  "output-file": f"{role}.mp4"},
        "tests": {"file-loop": 0},
    }  # fmt: skip
    if role == "secondary":
        groups["primary-gie"] |= {"config-file": detector, "batch-size": 1}
        groups["tracker"] = {
            "enable": 1, "tracker-width": 640, "tracker-height": 384,
            "ll-lib-file": "/opt/nvidia/deepstream/deepstream/lib/libnvds_nvmultiobjecttracker.so",
            "ll-config-file": f"{_SAMPLES}/configs/deepstream-app/config_tracker_NvDCF_perf.yml",
        }  # fmt: skip
        groups["secondary-gie0"] = {
            "enable": 1, "gpu-id": 0, "gie-unique-id": SECONDARY_ID, "operate-on-gie-id": PRIMARY_ID,
            "batch-size": sizes["secondary"], "config-file": "config_infer_secondary.txt",
        }  # fmt: skip
    return groups


def key_file(groups: Mapping[str, Group]) -> str:
    """GLib's key file format.

    Raises:
        GateError: a value holds what would end its line.
    """
    for group, entries in groups.items():
        for key, value in entries.items():
            if not str(value).isprintable():
                raise GateError(f"[{group}] {key} is {str(value)!r:.60}.", "A value is one line of printable text.")
    blocks = [
        f"[{group}]\n" + "".join(f"{key}={value}\n" for key, value in entries.items())
        for group, entries in groups.items()
    ]
    return "\n".join(blocks)


def _letterbox(bundle: Packaged) -> bool:
    preprocessing = bundle.manifest.preprocessing
    return preprocessing is not None and preprocessing.resize.startswith("letterbox")


def _readme(bundle: Packaged, differences: Mapping[str, float]) -> str:
    checked = ", ".join(f"{name} {error:.1e}" for name, error in differences.items())
    notes = "\n".join(f"- {remark}" for remark in remarks(bundle))
    size = bundle.image_size
    found = (
        "Each frame (or object) gets the likeliest class above `classifier-threshold`, as classifier metadata."
        if bundle.classifier
        else "Each frame (or object) gets the raw outputs as NvDsInferTensorMeta; nothing is drawn."
    )
    return f"""# {bundle.name} for DeepStream

    deepstream-app -c deepstream_app_primary.txt      # whole frames
    deepstream-app -c deepstream_app_secondary.txt    # objects of the samples' detector

Needs DeepStream 7.1 or later (TensorRT 10): older parsers do not know the file's functions. The first start builds the
engine, which takes minutes, and leaves it under `model-engine-file`; an engine fits one GPU and one TensorRT.

{found}

In a pipeline of your own:

    gst-launch-1.0 filesrc location=film.mp4 ! qtdemux ! h264parse ! nvv4l2decoder ! mux.sink_0 \\
        nvstreammux name=mux batch-size=1 width=1280 height=720 ! \\
        nvinfer config-file-path=config_infer_primary.txt ! nvvideoconvert ! nvdsosd ! fakesink

`model.onnx` takes float32 [B,3,{size},{size}], red first, 0 to 255. Mean and deviation are folded into
its first layer, so `net-scale-factor` is 1 and there are no offsets. Run in ONNX Runtime on the bundle's golden input
it differs from the golden output, relative to its range, by: {checked}.

{notes}
"""
