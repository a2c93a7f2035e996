"""GStreamer: the bundle, our element, and pipelines for it and for GStreamer's own `onnxinference`.

    bundle/                       as it was, its signature included; bundle/model.onnx is the plain file
    plugins/python/sparsifiner.py the element
    README.md

The element's Python file is data (`export/gstreamer`): GStreamer's loader imports it, nothing here does.
"""

from __future__ import annotations

import importlib.resources
import math
import shutil
from pathlib import Path

from sparsifiner_edge.artifacts import BUNDLE_FILE
from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.sign import read_signature, write_signature
from sparsifiner_edge.package.common import ImageBundle, template

ELEMENT = "sparsifiner.py"


def element_file() -> Path:
    """The element's file in this package: the folder above its folder goes into GST_PLUGIN_PATH."""
    return Path(str(importlib.resources.files("sparsifiner_edge.gstreamer").joinpath("python"))) / ELEMENT


def write(bundle: ImageBundle, folder: Path, _batch: int | None, _kernels: str) -> list[str]:
    """Fill `folder`; see `package_bundle`."""
    copy, signature = folder / "bundle", read_signature(bundle.folder)
    bundle.copy(bundle.manifest.files, copy)
    (copy / BUNDLE_FILE).write_bytes(bundle.text)
    if signature is not None:
        write_signature(copy, signature)
    plugins = folder / "plugins" / "python"
    plugins.mkdir(parents=True)
    shutil.copyfile(element_file(), plugins / ELEMENT)
    (folder / "README.md").write_text(_readme(bundle), encoding="utf-8")
    remark = "onnxinference runs the operators by their bodies; `sparsifiner` runs the native kernels where built."
    return [remark] if bundle.manifest.ops else []


def fitting(size: ImageSize) -> str:
    """Elements that make frames what the model takes: RGB, the centre in the shape of `size`."""
    height, width = height_width(size)
    both = math.gcd(height, width)
    return (
        f"videoconvert ! aspectratiocrop aspect-ratio={width // both}/{height // both} ! videoscale ! "
        f"video/x-raw,format=RGB,width={width},height={height},pixel-aspect-ratio=1/1"
    )


def _readme(bundle: ImageBundle) -> str:
    return template("gstreamer/guide.md", name=bundle.name, fitting=fitting(bundle.image_size), model=MODEL_FILE)
