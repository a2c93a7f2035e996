"""Keys of the configuration files of Gst-nvinfer and of deepstream-app, and the check that ours hold no others.

From NVIDIA's public documentation (DeepStream 6.4 to 9: "Gst-nvinfer", "DeepStream Reference Application") and the
parsers that come with it. Both are GLib key files: groups in brackets, one key=value a line, lists with semicolons.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping

from sparsifiner_edge.errors import GateError

_INT, _COUNT, _SIZE, _TRUTH = r"-?\d+", r"\d+", r"[1-9]\d*", r"[01]"
_LEVEL = r"\d+(\.\d+)?([eE]-?\d+)?"
_FLOAT = rf"-?{_LEVEL}"
_INTS, _FLOATS = rf"{_INT}(;{_INT})*;?", rf"{_FLOAT}(;{_FLOAT})*;?"
_TEXT = r"[^\\\s](.*[^\\\s])?"

PROPERTY = {
    "gpu-id": _COUNT, "gie-unique-id": _SIZE, "process-mode": "[12]", "interval": _COUNT, "batch-size": _SIZE,
    "network-mode": "[0-2]", "network-type": r"[0-3]|100", "network-input-order": "[01]", "model-color-format": "[0-2]",
    "net-scale-factor": _FLOAT, "offsets": _FLOATS, "mean-file": _TEXT, "infer-dims": rf"{_COUNT};{_COUNT};{_COUNT}",
    "maintain-aspect-ratio": _TRUTH, "symmetric-padding": _TRUTH, "scaling-filter": "[0-6]",
    "scaling-compute-hw": "[0-2]",
    "onnx-file": _TEXT, "model-engine-file": _TEXT, "labelfile-path": _TEXT, "int8-calib-file": _TEXT,
    "workspace-size": _COUNT, "output-blob-names": _TEXT, "output-io-formats": _TEXT, "layer-device-precision": _TEXT,
    "input-tensor-from-meta": _TRUTH, "output-tensor-meta": _TRUTH, "tensor-meta-pool-size": _COUNT,
    "enable-dla": _TRUTH, "use-dla-core": _COUNT, "force-implicit-batch-dim": _TRUTH, "auto-inc-mem": _TRUTH,
    "max-gpu-mem-per": _COUNT, "disable-output-host-copy": _TRUTH, "dump-input-tensor": _TRUTH,
    "dump-output-tensor": _TRUTH, "custom-lib-path": _TEXT, "custom-network-config": _TEXT,
    "parse-bbox-func-name": _TEXT, "parse-bbox-instance-mask-func-name": _TEXT, "parse-classifier-func-name": _TEXT,
    "engine-create-func-name": _TEXT, "num-detected-classes": _COUNT, "cluster-mode": "[0-4]",
    "classifier-threshold": _LEVEL, "classifier-async-mode": _TRUTH, "classifier-type": "[A-Za-z0-9_-]+",
    "segmentation-threshold": _LEVEL, "segmentation-output-order": "[01]", "output-instance-mask": _TRUTH,
    "secondary-reinfer-interval": _COUNT, "operate-on-gie-id": _INT, "operate-on-class-ids": _INTS,
    "filter-out-class-ids": _INTS, "input-object-min-width": _COUNT, "input-object-min-height": _COUNT,
    "input-object-max-width": _COUNT, "input-object-max-height": _COUNT,
}  # fmt: skip
"""Keys of the group `property` of Gst-nvinfer, and the form of their values; those for Caffe, UFF and TLT left out."""
CLASS_ATTRS = {
    "pre-cluster-threshold": _LEVEL, "post-cluster-threshold": _LEVEL, "eps": _LEVEL, "group-threshold": _COUNT,
    "minBoxes": _COUNT, "dbscan-min-score": _LEVEL, "nms-iou-threshold": _LEVEL, "roi-top-offset": _COUNT,
    "roi-bottom-offset": _COUNT, "detected-min-w": _COUNT, "detected-min-h": _COUNT, "detected-max-w": _COUNT,
    "detected-max-h": _COUNT, "topk": _INT, "border-color": _FLOATS, "bg-color": _FLOATS,
}  # fmt: skip
"""Keys of the groups `class-attrs-all` and `class-attrs-NUMBER`, for detectors."""
NVINFER = {"property": PROPERTY, r"class-attrs-(all|\d+)": CLASS_ATTRS}
_ALWAYS = (
    "gpu-id", "gie-unique-id", "process-mode", "batch-size", "network-mode", "network-type", "net-scale-factor",
    "model-color-format", "network-input-order", "infer-dims", "scaling-filter", "onnx-file", "model-engine-file",
    "output-blob-names",
)  # fmt: skip
_FOR_TYPE = {"1": ("labelfile-path", "classifier-threshold"), "100": ("output-tensor-meta",)}
_FOR_MODE = {"1": ("interval",), "2": ("operate-on-gie-id",)}

APP = {
    "application": {"enable-perf-measurement": _TRUTH, "perf-measurement-interval-sec": _COUNT,
                    "gie-kitti-output-dir": _TEXT, "kitti-track-output-dir": _TEXT, "global-gpu-id": _COUNT},
    "tiled-display": {"enable": "[0-3]", "rows": _SIZE, "columns": _SIZE, "width": _SIZE, "height": _SIZE,
                      "gpu-id": _COUNT, "nvbuf-memory-type": "[0-4]"},
    r"source\d+": {"enable": _TRUTH, "type": "[1-6]", "uri": _TEXT, "num-sources": _SIZE, "gpu-id": _COUNT,
                   "latency": _COUNT, "cudadec-memtype": "[0-2]", "camera-width": _SIZE, "camera-height": _SIZE,
                   "camera-fps-n": _SIZE, "camera-fps-d": _SIZE, "camera-v4l2-dev-node": _COUNT,
                   "camera-csi-sensor-id": _COUNT, "drop-frame-interval": _COUNT, "select-rtp-protocol": "[047]",
                   "rtsp-reconnect-interval-sec": _COUNT, "rtsp-reconnect-attempts": _INT,
                   "intra-decode-enable": _TRUTH, "num-extra-surfaces": _COUNT, "udp-buffer-size": _SIZE},
    "streammux": {"gpu-id": _COUNT, "live-source": _TRUTH, "batch-size": _SIZE, "batched-push-timeout": _INT,
                  "width": _SIZE, "height": _SIZE, "enable-padding": _TRUTH, "nvbuf-memory-type": "[0-4]",
                  "buffer-pool-size": _SIZE, "attach-sys-ts-as-ntp": _TRUTH, "sync-inputs": _TRUTH,
                  "config-file": _TEXT, "max-latency": _COUNT, "frame-num-reset-on-eos": _TRUTH,
                  "frame-num-reset-on-stream-reset": _TRUTH},
    "primary-gie": {"enable": _TRUTH, "gpu-id": _COUNT, "gie-unique-id": _SIZE, "batch-size": _SIZE,
                    "interval": _COUNT, "config-file": _TEXT, "labelfile-path": _TEXT, "model-engine-file": _TEXT,
                    "nvbuf-memory-type": "[0-4]", "plugin-type": "[01]", "input-tensor-meta": _TRUTH,
                    "infer-raw-output-dir": _TEXT},
    "tracker": {"enable": _TRUTH, "tracker-width": _SIZE, "tracker-height": _SIZE, "ll-lib-file": _TEXT,
                "ll-config-file": _TEXT, "gpu-id": _COUNT, "display-tracking-id": _TRUTH},
    r"secondary-gie\d+": {"enable": _TRUTH, "gpu-id": _COUNT, "gie-unique-id": _SIZE, "operate-on-gie-id": _SIZE,
                          "operate-on-class-ids": _INTS, "batch-size": _SIZE, "config-file": _TEXT,
                          "labelfile-path": _TEXT, "model-engine-file": _TEXT, "nvbuf-memory-type": "[0-4]",
                          "plugin-type": "[01]", "infer-raw-output-dir": _TEXT},
    "osd": {"enable": _TRUTH, "gpu-id": _COUNT, "border-width": _COUNT, "text-size": _SIZE, "text-color": _FLOATS,
            "text-bg-color": _FLOATS, "font": _TEXT, "process-mode": "[0-2]", "display-text": _TRUTH,
            "display-bbox": _TRUTH, "display-mask": _TRUTH, "nvbuf-memory-type": "[0-4]"},
    r"sink\d+": {"enable": _TRUTH, "type": "[1-7]", "sync": _TRUTH, "source-id": _COUNT, "gpu-id": _COUNT,
                 "container": "[12]", "codec": "[12]", "enc-type": "[01]", "bitrate": _SIZE, "output-file": _TEXT,
                 "rtsp-port": _SIZE, "udp-port": _SIZE, "nvbuf-memory-type": "[0-4]", "iframeinterval": _COUNT,
                 "profile": _COUNT, "qos": _TRUTH, "width": _SIZE, "height": _SIZE},
    "tests": {"file-loop": _TRUTH, "pipeline-recreate-sec": _COUNT},
}  # fmt: skip
"""Groups of deepstream-app (a number follows some names), their keys, and the form of their values."""
_APP_NEEDS = {
    "application": (), "streammux": ("batch-size", "width", "height"), "primary-gie": ("enable", "config-file"),
    "source0": ("enable", "type", "uri"), "sink0": ("enable", "type"), "osd": ("enable",), "tiled-display": ("enable",),
}  # fmt: skip


def check_nvinfer(text: str) -> dict[str, dict[str, str]]:
    """The groups of a configuration of Gst-nvinfer.

    Raises:
        GateError: it is no key file, a key is unknown, missing, or of another form.
    """
    groups = _parsed(text, NVINFER)
    found = groups.get("property", {})
    kind, mode = found.get("network-type", ""), found.get("process-mode", "")
    _require("property", [*_ALWAYS, *_FOR_TYPE.get(kind, ()), *_FOR_MODE.get(mode, ())], found)
    if found["network-type"] == "100" and found["output-tensor-meta"] != "1":
        raise GateError("network-type=100 without output-tensor-meta=1 gives nothing.", "Set it.")
    return groups


def check_app(text: str) -> dict[str, dict[str, str]]:
    """The groups of a configuration of deepstream-app.

    Raises:
        GateError: as `check_nvinfer`.
    """
    groups = _parsed(text, APP)
    for group, needed in _APP_NEEDS.items():
        if group not in groups:
            raise GateError(f"The group [{group}] is missing.", "Add it.")
        _require(group, needed, groups[group])
    return groups


def _parsed(text: str, known: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(delimiters="=", comment_prefixes="#", empty_lines_in_values=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # Keys are told apart by case.
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise GateError(f"No key file: {' '.join(str(error).split())}.", "Repair that line.") from error
    groups = {name: dict(parser.items(name)) for name in parser.sections()}
    for group, entries in groups.items():
        forms = next((forms for pattern, forms in known.items() if re.fullmatch(pattern, group)), None)
        if forms is None:
            raise GateError(f"[{group}] is no documented group.", f"Known: {', '.join(known)}.")
        for key, value in entries.items():
            if key not in forms:
                raise GateError(f"[{group}] {key} is no documented key.", "Remove it, or correct its name.")
            if not re.fullmatch(forms[key], value):
                raise GateError(f"[{group}] {key}={value} is not of the documented form.", f"It is {forms[key]}.")
    return groups


def _require(group: str, needed: list[str] | tuple[str, ...], found: Mapping[str, str]) -> None:
    missing = [key for key in needed if key not in found]
    if missing:
        raise GateError(f"[{group}] lacks {', '.join(missing)}.", "Add it.")
