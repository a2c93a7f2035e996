"""Students and bundles: folders that pass between steps, known by their files; and JSON and TOML in files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparsifiner_edge.bounds import flaw
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import io_errors, is_locked, open_regular, read_bytes, replace_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STUDENT_SCHEMA = 2
STUDENT_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ARCHITECTURE_FILE = "architecture/config.json"
"""transformers' configuration, in a student of one of its models."""
BUNDLE_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
ENGINE_FOLDER = "engines"
SCRATCH = "build"
MAX_JSON = 1 << 26
"""Bytes of a manifest and the like."""
MAX_FILE = 1 << 34
"""Bytes of any other file: more than an engine has."""
MAX_TOML = 1 << 15
"""Bytes; our largest file has 4,000. Parsing time grows with the square of the parts of a dotted name."""
_KIND_FILES = {"student": STUDENT_FILE, "bundle": BUNDLE_FILE}


def sha256(path: Path, copy: BinaryIO | None = None) -> str:
    """SHA-256 of a regular file, in hexadecimal; its content is written to `copy`, too.

    Raises:
        ArtifactError: see `files.open_regular`; or it has more than `MAX_FILE` bytes.
    """
    digest, remaining = hashlib.sha256(), MAX_FILE
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            remaining -= len(block)
            if remaining < 0:
                raise ArtifactError(f"{path} has more than {MAX_FILE} bytes.", "Do not use it.")
            digest.update(block)
            if copy is not None:
                copy.write(block)
    return digest.hexdigest()


def read_json(path: Path, schema: int | None, again: str) -> dict[str, Any]:
    """Read a JSON object that carries `schema_version`: a dict of whatever it holds; see `records.read_record`.

    Args:
        schema: the version that it must be of; None: any. again: what makes it anew, for messages.

    Raises:
        ArtifactError: missing, not a regular file, larger than 64 MiB, not JSON, nested deeply, with NaN or infinity,
            or of another version.
    """
    return parse_json(read_bytes(path, MAX_JSON), path, schema, again)


def parse_json(text: bytes, path: Path, schema: int | None, again: str) -> dict[str, Any]:
    """`read_json` of bytes that were read from `path`."""
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # Not UTF-8, not JSON, or a number of more digits than Python takes.
        raise ArtifactError(f"{path} cannot be read: {error}.", again) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise ArtifactError(f"{path} has no schema_version.", "It was not written by sparsifiner-edge.")
    if schema not in (None, version):
        raise ArtifactError(f"{path} has schema {version}; this version reads {schema} alone.", again)
    defect = flaw(content)
    if defect is not None:
        raise ArtifactError(f"{path}: {defect}.", again)
    return dict(content)


def read_toml(path: Path, fix: str) -> Any:
    """The content of a TOML file: a dict of whatever it holds; see `records.read_record`.

    Args:
        path: the file, or a link to it.
        fix: what to do if it cannot be read, for the message.

    Raises:
        ConfigError: missing, not a regular file, too large, not UTF-8, or see `parse_toml`.
    """
    try:
        text = read_bytes(path, MAX_TOML).decode("utf-8")
    except ArtifactError as error:
        why = error.what.removeprefix(f"{path} ").removeprefix("cannot be read: ")
        raise ConfigError(f"{path} cannot be read: {why}", fix) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}.", fix) from error
    return parse_toml(text, str(path), fix)


def parse_toml(text: str, origin: str, fix: str) -> Any:
    """The content of TOML text; `origin` and `fix` stand in messages.

    Raises:
        ConfigError: not TOML, a number of thousands of digits, or deep nesting. NaN and infinity are TOML: whoever
            reads a value checks it.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # Each kind of damage has a ValueError of its own.
        raise ConfigError(f"{origin} is not TOML: {error}.", fix) from error
    defect = flaw(content, finite=False)
    if defect is not None:
        raise ConfigError(f"{origin}: {defect}.", fix)
    return content


def files_in(folder: Path) -> set[str]:
    """All files below a folder, and links of any kind."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}


def kind_of(folder: Path) -> str | None:
    """ "student", "bundle", or None for a folder that is neither.

    Raises:
        ArtifactError: the file that would say so cannot be read.
    """
    for kind, name in _KIND_FILES.items():
        if not (folder / name).is_file():
            continue
        text = read_bytes(folder / name, MAX_JSON)
        # transformers' file of this name has neither.
        theirs = name == STUDENT_FILE and b'"schema_version"' not in text and b'"model_type"' in text
        if not theirs and parse_json(text, folder / name, None, "Make it again.").get("kind") == kind:
            return kind
    return None


def require_kind(folder: Path, *kinds: str) -> str:
    """Which of `kinds` ("student", "bundle") a folder is.

    Raises:
        ArtifactError: it is missing, a file, of another kind or of none; says what to give instead.
    """
    kind, fix = kind_of(folder), "Check the path: sparsify writes students, export bundles."
    if kind in kinds:
        return str(kind)
    what = f"is not a {' or '.join(kinds)}" if folder.is_dir() else "is not a folder"
    if kind is not None:
        fix = "Give its student." if kind == "bundle" else f"Export it: {export_line(folder)}"
        what = f"is a {kind}, not a {kinds[0]}"
    elif folder.is_file() and kind_of(folder.parent) in kinds:
        fix = f"Give the folder that it lies in: {folder.parent}"
    raise ArtifactError(f"{folder} {what if folder.exists() else 'does not exist'}.", fix)


def trust_text(student: Path) -> str:
    """What a printed command on a student of a user's own function needs: " --trust MODULE"; of others nothing."""
    content = read_json(student / STUDENT_FILE, None, "Make it again.")
    module = str(content.get("model")).partition(":")[0]
    return f" --trust {shlex.quote(module)}" if content.get("host") == "factory" else ""


def export_line(student: Path) -> str:
    """What exports a student, to be pasted into a shell."""
    return f"sparsifiner-edge export {shlex.quote(str(student))}{trust_text(student)} -o BUNDLE/"


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
        present = files_in(folder)
        busy = [path for path in scratches(folder) if is_locked(path)]
    if busy:
        raise ArtifactError(f"An engine is being built in {folder}.", "Wait for it, or choose another output folder.")
    ours = _written_files(folder, kind)
    fix = "It is left untouched; choose another output folder."
    if not ours:
        raise ArtifactError(f"{folder} exists and is not a {kind} of ours.", fix)
    if present - ours:
        raise ArtifactError(f"{folder} also holds {min(present - ours)}, which is not ours.", fix)


def _written_files(folder: Path, kind: str) -> set[str]:
    """The files that we wrote into a folder of this kind; none if it is of another kind, or damaged."""
    path = folder / _KIND_FILES[kind]
    with contextlib.suppress(ArtifactError):
        if kind_of(folder) != kind:
            return set()
        if kind == "student":
            return {STUDENT_FILE, WEIGHTS_FILE, ARCHITECTURE_FILE}
        files = read_json(path, None, "Make it again.").get("files")
        written = {path.name, SIGNATURE_FILE, *(files if isinstance(files, dict) else ())}
        in_scratch = [file for scratch in scratches(folder) for file in scratch.rglob("*") if file.is_file()]
        return written | {str(file.relative_to(folder)) for file in (*in_scratch, *unlisted_engines(folder, written))}
    return set()


@contextlib.contextmanager
def new_folder(target: Path, kind: str) -> Iterator[Path]:
    """Fill a temporary folder beside `target`; on success it takes the place of `target`, on any failure it is removed.

    Raises:
        ArtifactError: `target` is not replaceable (see `require_replaceable`), or the disk refuses.
    """
    require_replaceable(target, kind)
    with replace_folder(target) as scratch:
        yield scratch


def unlisted_engines(folder: Path, known: Container[str]) -> list[Path]:
    """Engines in a bundle that nothing lists: a build was killed."""
    engines = folder / ENGINE_FOLDER
    built = [] if engines.is_symlink() else engines.glob("*.engine")
    return [path for path in built if str(path.relative_to(folder)) not in known]


def scratches(folder: Path) -> list[Path]:
    """Folders of builds in a bundle; a link of such a name is not ours, and may lead anywhere."""
    return [path for path in folder.glob(f".{SCRATCH}.*") if path.is_dir() and not path.is_symlink()]
