"""GStreamer: the bundle, our element, and pipelines for it and for GStreamer's own `onnxinference`.

    bundle/                       as it was, its signature included; bundle/model.onnx is the plain file
    plugins/python/sparsifiner.py the element
    README.md

The element's Python file is data of this package: GStreamer's loader imports it, nothing here does.
"""

from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path

from sparsifiner_edge.artifacts import BUNDLE_FILE, SIGNATURE_FILE
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.package.common import MODEL, Packaged

ELEMENT = "sparsifiner.py"


def element_file() -> Path:
    """The element's file in this package: the folder above its folder goes into GST_PLUGIN_PATH."""
    return Path(str(importlib.resources.files("sparsifiner_edge.package") / "gstreamer" / "python" / ELEMENT))


def write(bundle: Packaged, folder: Path, batch: int | None, kernels: str) -> list[str]:
    """Fill `folder`; see `package_bundle`.

    Raises:
        ConfigError: the bundle takes a fixed batch above 1.
    """
    if batch is not None or kernels != "auto":
        raise ConfigError(
            "batch and kernels cannot be combined with GStreamer.", "Leave them out; the element has `kernels`."
        )
    fixed = bundle.manifest.batch
    if fixed not in (None, 1):
        raise ConfigError(f"{bundle.folder} takes batches of {fixed}.", "Export it with --batch 1 or dynamic.")
    for name in (BUNDLE_FILE, SIGNATURE_FILE, *bundle.manifest.files):
        if name != SIGNATURE_FILE or (bundle.folder / name).is_file():
            (folder / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / name, folder / "bundle" / name)
    plugins = folder / "plugins" / "python"
    plugins.mkdir(parents=True)
    shutil.copyfile(element_file(), plugins / ELEMENT)
    (folder / "README.md").write_text(_readme(bundle), encoding="utf-8")
    return [] if not bundle.manifest.ops else [
        "onnxinference runs the operators by their bodies; the element `sparsifiner` by the native kernels where built."
    ]  # fmt: skip


def square(size: int) -> str:
    """Elements that make frames what the model takes: RGB, the centre square."""
    return (
        f"videoconvert ! aspectratiocrop aspect-ratio=1/1 ! videoscale ! "
        f"video/x-raw,format=RGB,width={size},height={size},pixel-aspect-ratio=1/1"
    )


def _readme(bundle: Packaged) -> str:
    return f"""# {bundle.name} for GStreamer

## The element `sparsifiner`

It runs in the Python of the system, which GStreamer's loader brings (Debian, Ubuntu: apt-get install
gstreamer1.0-tools gstreamer1.0-python3-plugin-loader libpython3-dev python3-gst-1.0 gir1.2-gst-plugins-bad-1.0
gir1.2-gst-plugins-base-1.0 python3-venv), with packages from an environment that is first on PATH:

    /usr/bin/python3 -m venv --system-site-packages venv
    venv/bin/pip install "sparsifiner-edge[cpu]"
    export PATH="$PWD/venv/bin:$PATH" GST_PLUGIN_PATH="$PWD/plugins" ORT_DISABLE_TELEMETRY=1
    gst-launch-1.0 -m videotestsrc num-buffers=25 ! videoconvert ! sparsifiner bundle=bundle ! fakesink
    gst-launch-1.0 -m v4l2src ! videoconvert ! sparsifiner bundle=bundle ! videoconvert ! autovideosink

Frames pass unchanged, at any size: the element resizes a copy as the bundle says. Each gets a GstAnalytics
classification (GStreamer 1.24 or later) and posts a message `sparsifiner` on the bus. `gst-inspect-1.0 sparsifiner`
lists the properties; where it finds nothing, remove ~/.cache/gstreamer-1.0 once: GStreamer remembers plugins that did
not load.

## GStreamer's own `onnxinference`

    gst-launch-1.0 videotestsrc num-buffers=25 ! \\
        {square(bundle.image_size)} ! \\
        onnxinference model-file=bundle/{MODEL} input-image-format=hwc ! fakesink

It attaches the outputs as a GstTensorMeta (1.24 or later, built with ONNX Runtime), each under the id
`sparsifiner-edge-NAME`. ORT_DISABLE_TELEMETRY, set above, keeps ONNX Runtime from reporting its use.
"""
