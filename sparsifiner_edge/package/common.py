"""What every target needs: the bundle as read, and the folder that is written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.artifacts import PACKAGE_FILE, new_folder, sha256
from sparsifiner_edge.bundle.golden import read_golden
from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE
from sparsifiner_edge.bundle.store import GOLDEN_FILE, Bundle, bundle_hash, open_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.text import dump_json

PACKAGE_SCHEMA = 1
MODEL = MODEL_FILE
_NAME = re.compile(r"[A-Za-z0-9_./:-]+")
"""A tensor's name: it goes into lists with semicolons and into lines of configurations."""


@dataclasses.dataclass(frozen=True)
class Packaged(Bundle):
    """A bundle that takes images.

    Attributes:
        name: the model's, made fit for files and folders.
        class_names: its labels, one per class; none without classifier.
    """

    name: str
    class_names: tuple[str, ...]

    @property
    def classifier(self) -> bool:
        """Whether it gives logits."""
        return any(output.name == "logits" for output in self.manifest.outputs)


def read_bundle(folder: Path) -> Packaged:
    """Read a bundle that takes images.

    Raises:
        ArtifactError: not a bundle, altered, with names of files or tensors that are no plain ones, or its manifest
            does not say what it takes and gives.
        ConfigError: it takes something else than one uint8 image `image` [B,S,S,3].
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(f"{folder} names the file {name!r}.", "Do not use this bundle.")
    bundle.model()  # What needs other files is not handed on.
    size = bundle.image_size
    _check_names(bundle)
    if [(t.name, t.dtype, t.shape[1:]) for t in manifest.inputs] != [("image", "uint8", (size, size, 3))]:
        raise ConfigError(f"{folder} does not take one image `image` uint8 [B,{size},{size},3].", "Export it again.")
    return Packaged(folder, manifest, safe_name(manifest.name or ""), tuple(bundle.labels()))


def safe_name(text: str) -> str:
    """Letters, digits, points, underscores and hyphens alone, beginning with a letter or digit: a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._-")[:100] or "model"


def _check_names(bundle: Bundle) -> None:
    for key, specs in (("inputs", bundle.manifest.inputs), ("outputs", bundle.manifest.outputs)):
        names = [spec.name for spec in specs]
        for name in names:
            if not _NAME.fullmatch(name) or names.count(name) > 1:
                wrong = f"{bundle.folder}: {key} holds the name {name!r:.60}, or twice."
                raise ArtifactError(wrong, "Do not use this bundle.")


def golden_image(bundle: Packaged) -> npt.NDArray[np.uint8]:
    """The golden input, uint8 [B,S,S,3].

    Raises:
        ArtifactError: there is none of that shape.
    """
    image = read_golden(bundle)[0].get("image", np.zeros(0))
    size = bundle.image_size
    if image.dtype != np.uint8 or image.shape[1:] != (size, size, 3):
        path = bundle.folder / GOLDEN_FILE
        raise ArtifactError(f"{path} holds {image.dtype} {list(image.shape)}.", AGAIN)
    return image


@contextlib.contextmanager
def new_package(output: Path, bundle: Packaged, target: str) -> Iterator[Path]:
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
