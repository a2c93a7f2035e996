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
        ConfigError: no such target, or the bundle or an option does not fit it.
        GateError: a variant of the model disagrees with the golden pair; nothing is written.
        SparsifinerError: unusable input; nothing is written.
    """
    for name, value, choices in (("target", target, TARGETS), ("kernels", kernels, ("auto", "portable"))):
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}.", f"Choose one of: {', '.join(choices)}.")
    if (kernels != "auto" and target != "triton") or (batch is not None and target == "gstreamer"):
        option = "batch" if kernels == "auto" else "kernels"
        raise ConfigError(f"--{option} cannot be combined with --for {target}.", "Leave it out.")
    read = read_bundle(Path(bundle))
    fixed = read.manifest.batch
    if target != "triton" and fixed not in (None, 1):
        raise ConfigError(
            f"{bundle} takes batches of {fixed}; frames come one by one.", "Export it with --batch 1 or dynamic."
        )
    if batch is not None and (batch < 1 or fixed not in (None, batch)):
        said = f"{bundle} has a fixed batch of {fixed}" if fixed else f"batch is {batch}"
        raise ConfigError(f"{said}.", "Leave --batch out, or export the bundle with --batch dynamic.")
    with new_package(Path(output), read, target) as folder:
        remarks = importlib.import_module(TARGETS[target]).write(read, folder, batch, kernels)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return Package(str(output), target, tuple(files), tuple(remarks))
