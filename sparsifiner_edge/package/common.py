"""What every target needs: the bundle as read, and the folder that is written whole or not at all."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.artifacts import PACKAGE_FILE, new_folder, sha256
from sparsifiner_edge.bundle.golden import read_golden
from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE, Manifest, TensorSpec
from sparsifiner_edge.bundle.store import GOLDEN_FILE, bundle_hash, load_model, open_bundle, picture_size, read_labels
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.text import dump_json

PACKAGE_SCHEMA = 1
MODEL = MODEL_FILE
_NAME = re.compile(r"[A-Za-z0-9_./:-]+")
"""A tensor's name: it goes into lists with semicolons and into lines of configurations."""


class Bundle(NamedTuple):
    """A bundle whose hashes match.

    Attributes:
        folder, manifest: as given and read.
        name: the model's, made fit for files and folders.
        size: pixels along a side.
        batch: None where it is dynamic.
        outputs: in the model's order.
        labels: one per class; none without classifier.
    """

    folder: Path
    manifest: Manifest
    name: str
    size: int
    batch: int | None
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]

    @property
    def classifier(self) -> bool:
        """Whether it gives logits."""
        return any(output.name == "logits" for output in self.outputs)

    @property
    def precision(self) -> str:
        """The bundle's own word for it, such as "fp16"."""
        return self.manifest.precision or "fp32"


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle that takes pictures.

    Raises:
        ArtifactError: not a bundle, altered, with names of files or tensors that are no plain ones, or its manifest
            does not say what it takes and gives.
        ConfigError: it takes something else than one uint8 picture `image` [B,S,S,3].
    """
    manifest = open_bundle(folder)
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(f"{folder} names the file {name!r}.", "Do not use this bundle.")
    load_model(folder, manifest)  # What needs other files is not handed on.
    size = picture_size(manifest, folder)
    for key, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        _check_names(specs, key, folder)
    if [(t.name, t.dtype, t.shape[1:]) for t in manifest.inputs] != [("image", "uint8", (size, size, 3))]:
        raise ConfigError(f"{folder} does not take one picture `image` uint8 [B,{size},{size},3].", "Export it again.")
    return Bundle(
        folder=folder,
        manifest=manifest,
        name=safe_name(manifest.name or ""),
        size=size,
        batch=manifest.batch,
        outputs=manifest.outputs,
        labels=tuple(read_labels(manifest, folder)),
    )


def safe_name(text: str) -> str:
    """Letters, digits, points, underscores and hyphens alone, beginning with a letter or digit: a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._-")[:100] or "model"


def _check_names(specs: Sequence[TensorSpec], key: str, folder: Path) -> None:
    names = [spec.name for spec in specs]
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise ArtifactError(f"{folder}: {key} holds the name {name!r:.60}, or twice.", "Do not use this bundle.")


def golden_image(bundle: Bundle) -> npt.NDArray[np.uint8]:
    """The golden input, uint8 [B,S,S,3].

    Raises:
        ArtifactError: there is none of that shape.
    """
    image = read_golden(bundle.folder, bundle.manifest)[0].get("image", np.zeros(0))
    if image.dtype != np.uint8 or image.shape[1:] != (bundle.size, bundle.size, 3):
        path = bundle.folder / GOLDEN_FILE
        raise ArtifactError(f"{path} holds {image.dtype} {list(image.shape)}.", AGAIN)
    return image


@contextlib.contextmanager
def new_package(output: Path, bundle: Bundle, target: str) -> Iterator[Path]:
    """Fill a temporary folder; with `package.json`, the hashes of all else, it takes the place of `output`.

    Raises:
        ArtifactError: `output` is in the bundle or around it, or holds anything but a package of ours; or the disk
            refuses.
    """
    try:
        source, place = bundle.folder.resolve(), output.resolve()
    except (OSError, RuntimeError) as error:  # Links in a circle.
        raise ArtifactError(f"{output} cannot be written: {error}.", "Choose another output.") from error
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise ArtifactError(f"{output} is in the bundle, or the bundle in it.", "Choose another output.")
    with new_folder(output, "package") as folder:
        yield folder
        files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        content = {
            "schema_version": PACKAGE_SCHEMA,
            "kind": "package",
            "target": target,
            "name": bundle.name,
            "bundle": bundle_hash(bundle.folder),
            "files": files,
        }
        (folder / PACKAGE_FILE).write_text(dump_json(content), encoding="utf-8")
