"""`package_bundle`: a bundle in the form that another system's pipeline takes: DeepStream, Triton server, GStreamer."""

from __future__ import annotations

import importlib
from pathlib import Path

from msgspec import Struct

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.package.common import new_package, read_bundle

TARGETS = {
    "deepstream": "sparsifiner_edge.package.deepstream",
    "triton": "sparsifiner_edge.package.triton",
    "gstreamer": "sparsifiner_edge.package.gst",
}
"""Target -> module with `write(bundle, folder, batch, kernels)`: fills an empty folder, returns remarks."""
KERNELS = ("auto", "portable")


class Package(Struct, frozen=True):
    """What was written. files: paths in the folder `output`. remarks: what the user should know about it there."""

    output: str
    target: str
    files: tuple[str, ...]
    remarks: tuple[str, ...]


def package_bundle(
    bundle: str | Path, target: str, output: str | Path, *, batch: int | None = None, kernels: str = "auto"
) -> Package:
    """Write a folder that another system's pipeline takes as it is, with the commands in its README.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        target: one of `TARGETS`.
        output: folder to write; an earlier package there is replaced.
        batch: greatest batch, for a bundle of dynamic batch; None lets the target choose.
        kernels: for Triton: "auto" brings the native library of this machine where there is one, "portable" does not.

    Raises:
        ConfigError: no such target, or the bundle does not fit it.
        GateError: a variant of the model disagrees with the golden pair; nothing is written.
        SparsifinerError: unusable input; nothing is written.
    """
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}.", f"Choose one of: {', '.join(TARGETS)}.")
    if kernels not in KERNELS:
        raise ConfigError(f"kernels is {kernels!r}.", f"Choose one of: {', '.join(KERNELS)}.")
    module = importlib.import_module(TARGETS[target])
    read = read_bundle(Path(bundle))
    if batch is not None and (batch < 1 or read.manifest.batch not in (None, batch)):
        fixed = f"{bundle} has a fixed batch of {read.manifest.batch}" if read.manifest.batch else f"batch is {batch}"
        raise ConfigError(f"{fixed}.", "Leave --batch out, or export the bundle with --batch dynamic.")
    with new_package(Path(output), read, target) as folder:
        remarks = module.write(read, folder, batch, kernels)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return Package(str(output), target, tuple(files), tuple(remarks))
