"""What every target needs: the bundle as read, and the folder that is written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.artifacts import PACKAGE_FILE, new_folder, sha256
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.bundle.golden import read_golden
from sparsifiner_edge.bundle.manifest import AGAIN, TensorSpec
from sparsifiner_edge.bundle.store import GOLDEN_FILE, Bundle, bundle_hash, open_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.text import dump_json, file_name

PACKAGE_SCHEMA = 1
_NAME = re.compile(r"[A-Za-z0-9_./:-]+")
"""A tensor's name: it goes into lists with semicolons and into lines of configurations."""
_MOST_AXIS = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class ImageBundle(Bundle):
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


def read_bundle(folder: Path) -> ImageBundle:
    """Read a bundle that takes images.

    Raises:
        ArtifactError: not a bundle, altered, names of tensors that could lead elsewhere, or its manifest does
            not say what it takes and gives.
        ConfigError: it takes something else than one uint8 image `image` [B,H,W,3].
    """
    bundle = open_bundle(folder)
    manifest, (height, width) = bundle.manifest, height_width(bundle.image_size)
    bundle.model()  # A model that needs other files is not passed on.
    _check_tensors(folder, "inputs", manifest.inputs)
    _check_tensors(folder, "outputs", manifest.outputs)
    if [(t.name, t.dtype, t.shape[1:]) for t in manifest.inputs] != [("image", "uint8", (height, width, 3))]:
        raise ConfigError(f"{folder} does not take one image `image` uint8 [B,{height},{width},3].", "Export it again.")
    return ImageBundle(folder, manifest, file_name(manifest.name or ""), tuple(bundle.labels()), text=bundle.text)


def _check_tensors(folder: Path, key: str, specs: tuple[TensorSpec, ...]) -> None:
    names = [spec.name for spec in specs]
    if key == "outputs" and not names:
        raise ArtifactError(f"{folder}: outputs is empty.", AGAIN)
    for name, shape in ((spec.name, spec.shape) for spec in specs):
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise ArtifactError(f"{folder}: {key} holds the name {name!r:.60}, or twice.", "Do not use this bundle.")
        if key == "outputs" and (not shape or any(isinstance(n, int) and not 0 <= n <= _MOST_AXIS for n in shape)):
            raise ArtifactError(f"{folder}: output {name!r} has shape {list(shape)!r:.60}.", AGAIN)


def read_golden_image(bundle: ImageBundle) -> npt.NDArray[np.uint8]:
    """The golden input, uint8 [B,H,W,3].

    Raises:
        ArtifactError: the golden pair has no such input.
    """
    image = read_golden(bundle)[0].get("image", np.zeros(0))
    if image.dtype != np.uint8 or image.shape[1:] != (*height_width(bundle.image_size), 3):
        raise ArtifactError(f"{bundle.folder / GOLDEN_FILE} holds {image.dtype} {list(image.shape)}.", AGAIN)
    return image


@contextlib.contextmanager
def new_package(output: Path, bundle: ImageBundle, target: str) -> Iterator[Path]:
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
        content = {
            "schema_version": PACKAGE_SCHEMA,
            "kind": "package",
            "target": target,
            "name": bundle.name,
            "bundle": bundle_hash(bundle.folder),
            "files": {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()},
        }
        (folder / PACKAGE_FILE).write_text(dump_json(content), encoding="utf-8")


def template(file_name: str, /, **values: object) -> str:
    """A file of `export/` with its fields filled in, such as "triton/guide.md"."""
    target, _, name = file_name.partition("/")
    file = importlib.resources.files(f"sparsifiner_edge.{target}").joinpath(name)
    return file.read_text(encoding="utf-8").format(**values)
