"""A bundle: its folder and manifest as one value, its files read as the bytes that were hashed, and added to."""

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
GOLDEN_FILE = "golden.npz"
_Entry = TypeVar("_Entry")
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle whose files all matched their hashes; `open_bundle` and `sign.require_signature` give it.

    Attributes:
        folder: as given; messages name it.
        manifest: made of the very bytes that were checked, the signature included where one is required.
        text: those bytes.
        signed: its signature was required, and is that of the key.
    """

    folder: Path
    manifest: Manifest
    text: bytes = dataclasses.field(default=b"", kw_only=True)
    signed: bool = dataclasses.field(default=False, kw_only=True, compare=False)

    def read(self, name: str, most: int = MAX_FILE) -> bytes:
        """The content of one of its files: these very bytes have the hash that the manifest says.

        Swapping the file after it was checked has no effect: use what this returns, never the path.

        Args:
            name: as in the manifest's `files`.
            most: bytes that it may have.

        Raises:
            ArtifactError: the manifest does not list it; it is missing, altered, larger, or outside the folder.
        """
        content = read_bytes(self.path(name), most)
        self.require_hash(name, hashlib.sha256(content).hexdigest())
        return content

    @contextlib.contextmanager
    def sealed_copy(self, name: str) -> Iterator[str]:
        """A path to a copy of one of its files, in memory: it has the manifest's hash, and nobody can change it.

        For libraries that read files: given bytes, they would keep them in memory beside what they load.

        Raises:
            ArtifactError: see `read`; or there is no memory for it.
        """
        handle = os.memfd_create("sparsifiner-edge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(handle, "wb") as copy:
            self.require_hash(name, sha256(self.path(name), copy))
            copy.flush()
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
            yield f"/proc/self/fd/{handle}"

    def path(self, name: str) -> Path:
        """Where one of its files is; read it by `read`.

        Raises:
            ArtifactError: the manifest does not list it; it is missing, or outside the folder.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.folder} has no {name}.", AGAIN)
        path = place_in(self.folder, name)
        if not path.is_file():
            raise ArtifactError(f"{path} is missing.", AGAIN)
        return path

    def copy(self, names: Iterable[str], folder: Path) -> None:
        """Write some of its files, under their own names, into another folder.

        Raises:
            ArtifactError: see `read`; or a name leads out of `folder`.
            OSError: the disk refuses.
        """
        for name in names:
            path = place_in(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                self.require_hash(name, sha256(self.path(name), file))

    def require_hash(self, name: str, digest: str) -> None:
        """Refuse content whose SHA-256 is not the manifest's.

        Raises:
            ArtifactError: it is not.
        """
        if digest != self.manifest.files[name]:
            raise ArtifactError(f"{self.folder / name} does not match its SHA-256 in the manifest.", AGAIN)

    def model(self) -> Any:
        """Its `onnx.ModelProto`.

        Raises:
            ArtifactError: its file is not an ONNX file, was altered, or needs another file.
        """
        return read_model(self.read(MODEL_FILE), self.folder / MODEL_FILE)

    def labels(self) -> list[str]:
        """Its labels, made harmless (`text.printable`); none where the manifest lists no such file.

        Raises:
            ArtifactError: the file was altered, or is too large to be labels.
        """
        if LABELS_FILE not in self.manifest.files:
            return []
        lines = self.read(LABELS_FILE, _MAX_LABELS).decode("utf-8", "replace").split("\n")
        return [printable(line.rstrip("\r")) for line in (lines[:-1] if lines[-1] == "" else lines)]

    def require(self, value: _Entry | None, name: str) -> _Entry:
        """An entry of the manifest that the caller requires.

        Raises:
            ArtifactError: it is missing.
        """
        if value is None:
            raise ArtifactError(f"{self.folder}: {name} is missing.", AGAIN)
        return value

    @property
    def image_size(self) -> ImageSize:
        """Pixels of the images that it takes: one number for a square.

        Raises:
            ArtifactError: the manifest does not say.
        """
        return size_of(*height_width(self.require(self.manifest.preprocessing, "preprocessing").size))

    @property
    def precision(self) -> str:
        """What linear layers are stored in; "fp32" where the manifest does not say. See `Manifest.float_precision`."""
        return self.manifest.precision or "fp32"

    def subject(self, role: str | None = None) -> Subject:
        """How a result names it: its path as given, its name, and the SHA-256 of its manifest."""
        name = self.manifest.name or self.folder.resolve().name
        sha256, cosine = bundle_hash(self.folder), self.manifest.to_float32
        return Subject(role=role, kind="bundle", path=str(self.folder), name=name, sha256=sha256, to_float32=cosine)


def place_in(folder: Path, name: str) -> Path:
    """Where a file of a bundle is, or is to be; every name passes through here before anything is read or written.

    Raises:
        ArtifactError: links in the folder lead elsewhere, or in a circle; the name is too long.
    """
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{folder} cannot be read: {error}.", "Do not use this bundle.") from error
    if not inside:
        raise ArtifactError(f"{folder} names the file {name!r} outside itself.", "Do not use this bundle.")
    return path


def open_bundle(folder: Path) -> Bundle:
    """A bundle whose files all match their hashes.

    Those files are read later by `Bundle.read`, which checks the very bytes against the hash again.

    Raises:
        ArtifactError: not a bundle, of another version, a file missing, altered, or outside the folder.
    """
    text = read_manifest(folder)
    bundle = Bundle(folder, parse_manifest(text, folder / BUNDLE_FILE), text=text)
    for name in bundle.manifest.files:
        bundle.require_hash(name, sha256(bundle.path(name)))
    return bundle


def read_manifest(folder: Path) -> bytes:
    """The bytes of a bundle's manifest.

    Raises:
        ArtifactError: see `require_kind`; or the manifest cannot be read.
    """
    if not os.path.lexists(folder / BUNDLE_FILE):
        require_kind(folder, "bundle")
    return read_bytes(place_in(folder, BUNDLE_FILE), MAX_JSON)


def bundle_hash(folder: Path) -> str:
    """SHA-256 of the manifest: names the bundle and, through it, every file in it."""
    return sha256(folder / BUNDLE_FILE)


def seal_bundle(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` with the SHA-256 of every other file in `folder`."""
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    content = manifest_content(msgspec.structs.replace(manifest, files=files))
    (folder / BUNDLE_FILE).write_text(dump_json(content), encoding="utf-8")


@contextlib.contextmanager
def bundle_scratch(folder: Path) -> Iterator[Path]:
    """A folder in a bundle for files that are being made; it is removed after the block, as is what killed builds left.

    Raises:
        ArtifactError: the disk refuses.
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
    """Move files into a bundle and replace its manifest: both or neither. Files that are no longer listed are removed.

    Args:
        files: place in the bundle -> where the file is now, on the same file system; places must be new.
        change: present manifest -> new manifest; its `files` name what is kept, their hashes are its own,
            those of the new files are added here.

    Raises:
        ArtifactError: the bundle is not one any more, or the disk refuses; the bundle is as it was.
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


def remember_execution(folder: Path, backend: str, precision: str = "auto") -> None:
    """Let a bundle say what it is intended for; a signature holds no longer, as after building an engine.

    Raises:
        ConfigError: these are no backend and precision as `Execution` has them. ArtifactError: see `extend_bundle`.
    """
    named = {"backend": backend, "precision": precision}
    intended = read_record(named, Intended, "Intended", "Correct it.", ConfigError)
    extend_bundle(folder, {}, lambda manifest: msgspec.structs.replace(manifest, intended=intended))


def _move_in(folder: Path, files: Mapping[str, Path], manifest: str) -> None:
    """The manifest's replacement, one rename, is what makes the files part of the bundle."""
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
        with contextlib.suppress(OSError):  # Only when empty.
            (folder / ENGINE_FOLDER).rmdir()
        raise
