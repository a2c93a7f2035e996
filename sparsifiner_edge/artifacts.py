"""Students, bundles and packages: folders that pass between steps, known by their files and checked when read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sparsifiner_edge.bounds import MOST_SIDE
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.files import (
    io_errors,
    is_locked,
    locked,
    open_regular,
    read_bytes,
    replaced,
    signals_held,
    write_text,
)
from sparsifiner_edge.text import dump_json, shown

STUDENT_SCHEMA = 1
BUNDLE_SCHEMA = 1
STUDENT_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
BUNDLE_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
LABELS_FILE = "labels.txt"
PACKAGE_FILE = "package.json"
ENGINE_FOLDER = "engines"
_SCRATCH = ".build."
_MAX_LABELS = 1 << 24
MAX_JSON = 1 << 26
"""Bytes of a manifest and the like."""
MAX_FILE = 1 << 34
"""Bytes of any other file: more than an engine has."""
MAX_MODEL = 1 << 31
"""Bytes of an ONNX file, by its format (protobuf)."""
MODEL_FILE = "model.onnx"
GOLDEN_FILE = "golden.npz"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_KIND_FILES = {"student": STUDENT_FILE, "bundle": BUNDLE_FILE, "package": PACKAGE_FILE}


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal.

    Raises:
        ArtifactError: see `files.open_regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for block in _blocks(file, path, MAX_FILE):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: BinaryIO, path: Path, most: int) -> Iterator[bytes]:
    """A file's content, piece by piece.

    Raises:
        ArtifactError: it has more bytes.
    """
    left = most
    while block := file.read(1 << 20):
        left -= len(block)
        if left < 0:
            raise ArtifactError(f"{path} has more than {most} bytes.", "Do not use it.")
        yield block


def read_json(path: Path, schema: int) -> dict[str, Any]:
    """Read a JSON object that carries `schema_version`.

    Raises:
        ArtifactError: missing, not a regular file, larger than 64 MiB, not JSON, or of a newer schema than `schema`.
    """
    return parse_json(read_bytes(path, MAX_JSON), path, schema)


def parse_json(text: bytes, path: Path, schema: int) -> dict[str, Any]:
    """`read_json` of bytes that were read from `path`."""
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # No UTF-8, no JSON, or a number of more digits than Python takes.
        raise ArtifactError(f"{path} cannot be read: {error}.", "Make it again, or restore it.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise ArtifactError(f"{path} has no schema_version.", "It was not written by sparsifiner-edge.")
    if version > schema:
        raise ArtifactError(
            f"{path} has schema {version}; this version reads up to {schema}.",
            "Upgrade: pip install -U sparsifiner-edge",
        )
    return dict(content)


def field(content: dict[str, Any], origin: Path, name: str, kind: type) -> Any:
    """The entry `name` (dotted where nested) of what was read from `origin`.

    Raises:
        ArtifactError: it is missing or of another type.
    """
    value: Any = content
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        said = json.dumps(value)[:60]
        raise ArtifactError(f"{origin}: {name} is {said}, not {kind.__name__}.", "Make it again, or restore it.")
    return value


def kind_of(folder: Path) -> str | None:
    """ "student", "bundle", "package", or None for a folder that is neither.

    Raises:
        ArtifactError: the file that would say so cannot be read.
    """
    for kind, name in _KIND_FILES.items():
        if (folder / name).is_file() and read_json(folder / name, schema=1 << 30).get("kind") == kind:
            return kind
    return None


def require_replaceable(folder: Path, kind: str) -> None:
    """Refuse an output folder that holds something we did not write.

    Raises:
        ArtifactError: it is a file, the current folder, or holds anything but one `kind` of ours.
    """
    if folder.name in ("", ".."):
        raise ArtifactError(f"{folder} names no folder of its own.", "Name a folder to write.")
    with io_errors(folder):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise ArtifactError(f"{folder} is not a folder.", "Choose another output.")
        if not folder.exists() or not any(folder.iterdir()):
            return
        present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
        busy = [path for path in _scratches(folder) if is_locked(path)]
    if busy:
        raise ArtifactError(f"An engine is being built in {folder}.", "Wait for it, or choose another output folder.")
    ours = _own_files(folder, kind)
    fix = "It is left untouched; choose another output folder."
    if not ours:
        raise ArtifactError(f"{folder} exists and is not a {kind} of ours.", fix)
    if present - ours:
        raise ArtifactError(f"{folder} also holds {min(present - ours)}, which is not ours.", fix)


def _own_files(folder: Path, kind: str) -> set[str]:
    """The files that we wrote into a folder of this kind; none if it is of another kind, or damaged."""
    with contextlib.suppress(ArtifactError):
        if kind_of(folder) == kind == "student":
            return {STUDENT_FILE, WEIGHTS_FILE}
        if kind_of(folder) == kind == "bundle":
            manifest = read_json(folder / BUNDLE_FILE, schema=1 << 30)
            left = {str(p.relative_to(folder)) for p in _leftovers(folder, manifest)}
            return {BUNDLE_FILE, SIGNATURE_FILE, *field(manifest, folder / BUNDLE_FILE, "files", dict), *left}
        if kind_of(folder) == kind == "package":
            content = read_json(folder / PACKAGE_FILE, schema=1 << 30)
            return {PACKAGE_FILE, *field(content, folder / PACKAGE_FILE, "files", dict)}
    return set()


@contextlib.contextmanager
def new_folder(target: Path, kind: str) -> Iterator[Path]:
    """Fill a temporary folder beside `target`; on success it takes the place of `target`, on any failure it vanishes.

    Raises:
        ArtifactError: `target` is not replaceable (see `require_replaceable`), or the disk refuses.
    """
    require_replaceable(target, kind)
    with replaced(target) as scratch:
        yield scratch


def seal_bundle(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` with the SHA-256 of every other file in `folder`."""
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    content = {"schema_version": BUNDLE_SCHEMA, "kind": "bundle", **manifest, "files": files}
    (folder / BUNDLE_FILE).write_text(dump_json(content), encoding="utf-8")


def _leftovers(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Files in a bundle that builds left which were killed: in scratch folders, and engines that nothing lists."""
    known, engines = manifest.get("files", {}), folder / ENGINE_FOLDER
    built = [] if engines.is_symlink() else list(engines.glob("*.engine"))
    unknown = [path for path in built if str(path.relative_to(folder)) not in known]
    return [path for scratch in _scratches(folder) for path in scratch.rglob("*") if path.is_file()] + unknown


def _scratches(folder: Path) -> list[Path]:
    """Folders of builds in a bundle; a link of such a name is not ours, and leads anywhere."""
    return [path for path in folder.glob(f"{_SCRATCH}*") if path.is_dir() and not path.is_symlink()]


@contextlib.contextmanager
def bundle_scratch(folder: Path) -> Iterator[Path]:
    """A folder in a bundle for files that are being made; it vanishes with the block, as does what killed builds left.

    Raises:
        ArtifactError: the disk refuses.
    """
    handle, scratch = -1, None
    try:
        with io_errors(folder), locked(folder), signals_held():
            for old in _scratches(folder):
                if not is_locked(old):
                    shutil.rmtree(old, ignore_errors=True)
            in_use = _scratches(folder)
            for path in _leftovers(folder, read_json(folder / BUNDLE_FILE, BUNDLE_SCHEMA)):
                if not any(path.is_relative_to(other) for other in in_use):
                    path.unlink(missing_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
            handle = os.open(scratch, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield scratch
    finally:
        with signals_held():
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            if handle >= 0:
                os.close(handle)


def extend_bundle(folder: Path, files: Mapping[str, Path], change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Move files into a bundle and replace its manifest: both or neither. Files that nothing lists any more vanish.

    Args:
        files: place in the bundle -> where the file is now, on the same file system; places must be new.
        change: manifest as it now stands -> as it shall be; its `files` name what is kept, their hashes are its own,
            those of the new files are added here.

    Raises:
        ArtifactError: the bundle is not one any more, or the disk refuses; the bundle is as it was.
    """
    if (folder / ENGINE_FOLDER).is_symlink():
        raise ArtifactError(f"{folder / ENGINE_FOLDER} is a link.", "Do not use this bundle.")
    with io_errors(folder), locked(folder):
        before = read_json(folder / BUNDLE_FILE, BUNDLE_SCHEMA)
        manifest = change(before)
        manifest["files"] = manifest["files"] | {name: sha256(path) for name, path in files.items()}
        for path in files.values():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        with signals_held():
            _move_in(folder, files, dump_json(manifest))
            for name in set(before["files"]) - set(manifest["files"]):
                (folder / name).unlink(missing_ok=True)


def _move_in(folder: Path, files: Mapping[str, Path], manifest: str) -> None:
    """The manifest's replacement, one rename, is what makes the files part of the bundle."""
    made: list[Path] = []
    try:
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            made.append(path.rename(folder / name))
        write_text(folder / BUNDLE_FILE, manifest)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Only when empty.
            (folder / ENGINE_FOLDER).rmdir()
        raise


def open_bundle(folder: Path) -> dict[str, Any]:
    """Manifest of a bundle whose files all match their hashes.

    What is used of those files later is read by `read_listed`, which holds the very bytes against the hash again.

    Raises:
        ArtifactError: not a bundle, newer schema, a file missing, altered, or outside the folder.
    """
    return check_bundle(folder, read_manifest(folder))


def read_manifest(folder: Path) -> bytes:
    """The bytes of a bundle's manifest.

    Raises:
        ArtifactError: `folder` is none, or the manifest cannot be read.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder.", "Give a bundle made by `sparsifiner-edge export`.")
    return read_bytes(folder / BUNDLE_FILE, MAX_JSON)


def check_bundle(folder: Path, text: bytes) -> dict[str, Any]:
    """See `open_bundle`; `text` is what was read of the manifest."""
    manifest = parse_json(text, folder / BUNDLE_FILE, BUNDLE_SCHEMA)
    files = manifest.get("files")
    if manifest.get("kind") != "bundle" or not isinstance(files, dict) or MODEL_FILE not in files:
        raise ArtifactError(f"{folder / BUNDLE_FILE} is not a bundle's manifest.", "Export the bundle again.")
    for name in files:
        if sha256(_place(folder, name)) != files[name]:
            raise _altered(folder / name)
    return manifest


def read_listed(folder: Path, manifest: Mapping[str, Any], name: str, most: int = MAX_FILE) -> bytes:
    """The content of one of a bundle's files: these very bytes have the hash that its manifest says.

    Whoever swaps the file after it was checked reaches nothing: use what this returns, never the path.

    Args:
        folder: the bundle.
        manifest: as `open_bundle` or `signing.require_signature` returned it.
        name: as in the manifest's `files`.
        most: bytes that it may have.

    Raises:
        ArtifactError: the manifest does not list it; it is missing, altered, larger, or outside the folder.
    """
    expected = _expected(folder, manifest, name)
    content = read_bytes(_place(folder, name), most)
    if hashlib.sha256(content).hexdigest() != expected:
        raise _altered(folder / name)
    return content


@contextlib.contextmanager
def sealed_copy(folder: Path, manifest: Mapping[str, Any], name: str) -> Iterator[str]:
    """A path to a copy of one of a bundle's files, in memory: it has the manifest's hash, and nobody can change it.

    For libraries that read a file: given bytes they would hold them beside what they make of them.

    Raises:
        ArtifactError: see `read_listed`; or there is no memory for it.
    """
    expected = _expected(folder, manifest, name)
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        with open_regular(_place(folder, name)) as file:
            handle = os.memfd_create("sparsifiner-edge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            copy = stack.enter_context(os.fdopen(handle, "wb"))
            for block in _blocks(file, folder / name, MAX_MODEL):
                digest.update(block)
                copy.write(block)
            copy.flush()
        if digest.hexdigest() != expected:
            raise _altered(folder / name)
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
        yield f"/proc/self/fd/{handle}"


def _expected(folder: Path, manifest: Mapping[str, Any], name: str) -> object:
    """The hash of a file by the manifest."""
    expected = manifest["files"].get(name)
    if expected is None:
        raise ArtifactError(f"{folder} has no {name}.", "Export the bundle again.")
    return expected


def _place(folder: Path, name: str) -> Path:
    """Where a file of a bundle is.

    Raises:
        ArtifactError: it is missing, or outside the folder.
    """
    path = folder / name
    try:
        inside = "\0" not in name and path.resolve().is_relative_to(folder.resolve())
        there = inside and path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # Names too long, links in a circle, what no system takes.
        raise ArtifactError(f"{folder} cannot be read: {error}.", "Do not use this bundle.") from error
    if not inside:
        raise ArtifactError(f"{folder} names the file {name!r} outside itself.", "Do not use this bundle.")
    if not there:
        raise ArtifactError(f"{path} is missing.", "Export the bundle again.")
    return path


def _altered(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} does not match its SHA-256 in the manifest.", "Export the bundle again.")


def picture_size(manifest: dict[str, Any], folder: Path) -> int:
    """Pixels along a side that the bundle in `folder` takes.

    Raises:
        ArtifactError: the manifest does not say.
    """
    size: int = field(manifest, folder, "preprocessing.size", int)
    if not 1 <= size <= MOST_SIDE:
        raise ArtifactError(f"{folder}: preprocessing.size is {size}; at most {MOST_SIDE}.", "Export the bundle again.")
    return size


def read_labels(manifest: dict[str, Any], folder: Path) -> list[str]:
    """Labels of a bundle that has them, made harmless (`text.shown`); a file that its manifest does not name is none.

    Raises:
        ArtifactError: the file is too large to be labels.
    """
    if LABELS_FILE not in manifest["files"]:
        return []
    lines = read_listed(folder, manifest, LABELS_FILE, _MAX_LABELS).decode("utf-8", "replace").split("\n")
    return [shown(line.rstrip("\r")) for line in (lines[:-1] if lines[-1] == "" else lines)]


def bundle_hash(folder: Path) -> str:
    """SHA-256 of the manifest: names the bundle and, through it, every file in it."""
    return sha256(folder / BUNDLE_FILE)
