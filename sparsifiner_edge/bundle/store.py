"""A bundle on disk: open and verify it, read its files as the bytes that were hashed, and add files."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sparsifiner_edge.artifacts import (
    BUNDLE_FILE,
    ENGINE_FOLDER,
    MAX_FILE,
    MAX_JSON,
    SCRATCH,
    read_json,
    require_kind,
    scratches,
    sha256,
    unlisted_engines,
)
from sparsifiner_edge.bounds import ImageSize, height_width, size_of
from sparsifiner_edge.bundle.manifest import (
    AGAIN,
    BUNDLE_SCHEMA,
    MODEL_FILE,
    Intended,
    Manifest,
    manifest_content,
    parse_manifest,
)
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import (
    hold_lock,
    hold_signals,
    io_errors,
    is_locked,
    read_bytes,
    scratch_beside,
    sync,
    write_text,
)
from sparsifiner_edge.onnx_file import read_model
from sparsifiner_edge.records import read_record
from sparsifiner_edge.results import Subject
from sparsifiner_edge.text import dump_json, printable

LABELS_FILE = "labels.txt"
_MAX_LABELS = 1 << 24
"""Maximum size of the file of labels in bytes."""
GOLDEN_FILE = "golden.npz"
_Entry = TypeVar("_Entry")
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
"""Seals of a file in memory: its content, its size and the seals themselves cannot change."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Bundle whose files all matched their hashes; created by `open_bundle` and `sign.require_signature`.

    Attributes:
        folder: Path as given, used in messages.
        manifest: Manifest, parsed from the bytes that were checked (and, if required, whose signature was verified).
        text: Bytes of the manifest.
        signed: True if a signature was required and verified with the given key.
    """

    folder: Path
    manifest: Manifest
    text: bytes = dataclasses.field(default=b"", kw_only=True)
    signed: bool = dataclasses.field(default=False, kw_only=True, compare=False)

    def read(self, name: str, most: int = MAX_FILE) -> bytes:
        """Return the content of a file, verified against its hash in the manifest.

        The returned bytes are the bytes that were hashed, so replacing the file afterwards has no effect. Use them
        instead of reading the path again.

        Args:
            name: Name in the manifest's `files`.
            most: Maximum size in bytes.

        Raises:
            ArtifactError: The manifest does not list the file, or it is missing, altered, too large or outside the
                folder.
        """
        content = read_bytes(self.path(name), most)
        self.require_hash(name, hashlib.sha256(content).hexdigest())
        return content

    @contextlib.contextmanager
    def sealed_copy(self, name: str) -> Iterator[str]:
        """Yield the path of an immutable, verified copy of a file in memory.

        It is for libraries that read from a path. If they were given bytes, they would keep those in memory in addition
        to what they load.

        Raises:
            ArtifactError: See `read`; or there is not enough memory.
        """
        handle = os.memfd_create("sparsifiner-edge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(handle, "wb") as copy:
            self.require_hash(name, sha256(self.path(name), copy))
            copy.flush()
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
            yield f"/proc/self/fd/{handle}"

    def path(self, name: str) -> Path:
        """Return the path of a file; read its content through `read`.

        Raises:
            ArtifactError: The manifest does not list the file, or it is missing or outside the folder.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.folder} has no {name}.", AGAIN)
        path = place_in(self.folder, name)
        if not path.is_file():
            raise ArtifactError(f"{path} is missing.", AGAIN)
        return path

    def copy(self, names: Iterable[str], folder: Path) -> None:
        """Copy files under their own names into another folder.

        Args:
            names: Names in the manifest's `files`.
            folder: Destination folder.

        Raises:
            ArtifactError: See `read`; or a name leads out of `folder`.
            OSError: The disk refuses.
        """
        for name in names:
            path = place_in(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                self.require_hash(name, sha256(self.path(name), file))

    def require_hash(self, name: str, digest: str) -> None:
        """Check a SHA-256 against the manifest.

        Args:
            name: Name of the file.
            digest: SHA-256 of its content, in hexadecimal.

        Raises:
            ArtifactError: They differ.
        """
        if digest != self.manifest.files[name]:
            raise ArtifactError(f"{self.folder / name} does not match its SHA-256 in the manifest.", AGAIN)

    def model(self) -> Any:
        """Return the model as an `onnx.ModelProto`.

        Raises:
            ArtifactError: The file is not an ONNX file, was altered, or needs other files.
        """
        return read_model(self.read(MODEL_FILE), self.folder / MODEL_FILE)

    def labels(self) -> list[str]:
        """Return the labels, made printable (`text.printable`); empty if the manifest lists no file of labels.

        Raises:
            ArtifactError: The file was altered, or is too large for labels.
        """
        if LABELS_FILE not in self.manifest.files:
            return []
        lines = self.read(LABELS_FILE, _MAX_LABELS).decode("utf-8", "replace").split("\n")
        return [printable(line.rstrip("\r")) for line in (lines[:-1] if lines[-1] == "" else lines)]

    def require(self, value: _Entry | None, name: str) -> _Entry:
        """Return a manifest entry, which must be present.

        Args:
            value: Value of the entry.
            name: Name of the entry, for the message.

        Raises:
            ArtifactError: The value is None.
        """
        if value is None:
            raise ArtifactError(f"{self.folder}: {name} is missing.", AGAIN)
        return value

    @property
    def image_size(self) -> ImageSize:
        """Input image size in pixels: one number for a square, else height and width.

        Raises:
            ArtifactError: The manifest has no image size.
        """
        return size_of(*height_width(self.require(self.manifest.preprocessing, "preprocessing").size))

    @property
    def precision(self) -> str:
        """Weight precision of the linear layers; "fp32" if the manifest has none. See `Manifest.float_precision`."""
        return self.manifest.precision or "fp32"

    def subject(self, role: str | None = None) -> Subject:
        """Return the description of the bundle for results: path as given, name, and SHA-256 of the manifest."""
        name = self.manifest.name or self.folder.resolve().name
        sha256, cosine = bundle_hash(self.folder), self.manifest.to_float32
        return Subject(role=role, kind="bundle", path=str(self.folder), name=name, sha256=sha256, to_float32=cosine)


def place_in(folder: Path, name: str) -> Path:
    """Return the path of a file in a bundle; every name is checked here before anything is read or written.

    Raises:
        ArtifactError: A link leads out of the folder or in a circle, or the name is too long.
    """
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{folder} cannot be read: {error}.", "Do not use this bundle.") from error
    if not inside:
        raise ArtifactError(
            f"{folder} names the file {name!r}, which lies outside the bundle.", "Do not use this bundle."
        )
    return path


def open_bundle(folder: Path) -> Bundle:
    """Open a bundle and verify the hash of every file.

    The files are read later through `Bundle.read`, which verifies the bytes again.

    Raises:
        ArtifactError: The folder is not a bundle or has another schema version, or a file is missing, altered or
            outside the folder.
    """
    text = read_manifest(folder)
    bundle = Bundle(folder, parse_manifest(text, folder / BUNDLE_FILE), text=text)
    for name in bundle.manifest.files:
        bundle.require_hash(name, sha256(bundle.path(name)))
    return bundle


def read_manifest(folder: Path) -> bytes:
    """Read the bytes of a bundle's manifest.

    Raises:
        ArtifactError: See `require_kind`; or the manifest cannot be read.
    """
    if not os.path.lexists(folder / BUNDLE_FILE):
        require_kind(folder, "bundle")
    return read_bytes(place_in(folder, BUNDLE_FILE), MAX_JSON)


def bundle_hash(folder: Path) -> str:
    """Return the SHA-256 of the manifest, which identifies the bundle and, through its hashes, every file in it."""
    return sha256(folder / BUNDLE_FILE)


def seal_bundle(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` with the SHA-256 of every other file in the folder."""
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    content = manifest_content(msgspec.structs.replace(manifest, files=files))
    (folder / BUNDLE_FILE).write_text(dump_json(content), encoding="utf-8")


@contextlib.contextmanager
def bundle_scratch(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside a bundle, for files under construction; remove it afterwards.

    Leftovers of builds that were killed are removed first.

    Raises:
        ArtifactError: The disk refuses.
    """
    with contextlib.ExitStack() as stack:
        with io_errors(folder), hold_lock(folder):
            for old in scratches(folder):
                if not is_locked(old):
                    shutil.rmtree(old, ignore_errors=True)
            listed = read_json(folder / BUNDLE_FILE, BUNDLE_SCHEMA, AGAIN).get("files", ())
            for path in unlisted_engines(folder, listed):
                path.unlink(missing_ok=True)
            scratch = stack.enter_context(scratch_beside(folder / SCRATCH, folder=True))
        yield scratch


def extend_bundle(folder: Path, files: Mapping[str, Path], change: Callable[[Manifest], Manifest]) -> None:
    """Move files into a bundle and replace its manifest, both or neither; remove files that are no longer listed.

    Args:
        folder: Bundle folder.
        files: Present path of each new file by its name in the bundle. The names must be new, and the files must be on
            the same file system.
        change: Function that maps the present manifest to the new one. The new manifest's `files` list the files to
            keep with their present hashes; the hashes of new files are added here.

    Raises:
        ArtifactError: The folder is no longer a bundle, or the file cannot be written; the bundle is unchanged.
    """
    with io_errors(folder), hold_lock(folder):
        before = parse_manifest(read_manifest(folder), folder / BUNDLE_FILE)
        after = change(before)
        hashes = after.files | {name: sha256(path) for name, path in files.items()}
        content = manifest_content(msgspec.structs.replace(after, files=hashes))
        for path in files.values():
            sync(path)
        with hold_signals():
            _move_in(folder, files, dump_json(content))
            for name in set(before.files) - set(hashes):
                place_in(folder, name).unlink(missing_ok=True)


def remember_execution(folder: Path, backend: str, compute_precision: str = "auto") -> None:
    """Record in a bundle the backend and compute precision that it is intended for. This invalidates its signature.

    Raises:
        ConfigError: Backend or compute precision is not one that `Execution` accepts.
        ArtifactError: See `extend_bundle`.
    """
    named = {"backend": backend, "compute_precision": compute_precision}
    intended = read_record(named, Intended, "Intended", "Correct it.", ConfigError)
    extend_bundle(folder, {}, lambda manifest: msgspec.structs.replace(manifest, intended=intended))


def _move_in(folder: Path, files: Mapping[str, Path], manifest: str) -> None:
    """Move files into a bundle, then replace its manifest with one rename, which makes the files part of the bundle."""
    placed: list[Path] = []
    try:
        for name, path in files.items():
            place = place_in(folder, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            placed.append(path.rename(place))
        write_text(folder / BUNDLE_FILE, manifest)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Not empty: the bundle has other engines.
            (folder / ENGINE_FOLDER).rmdir()
        raise
