"""Folders that pass between steps (sparse models and bundles), and JSON and TOML files."""

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

STUDENT_SCHEMA = 3
"""Version of the format of a sparse model's folder."""
STUDENT_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ARCHITECTURE_FILE = "architecture/config.json"
"""Configuration of a Hugging Face model inside a sparse model's folder."""
BUNDLE_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
ENGINE_FOLDER = "engines"
SCRATCH = "build"
"""Temporary folders of a running build in a bundle are named `.build.*`."""
MAX_JSON = 1 << 26
"""Maximum size of a manifest or other JSON file in bytes."""
MAX_FILE = 1 << 34
"""Maximum size of any other file in bytes, larger than any engine."""
MAX_TOML = 1 << 15
"""Maximum size of a TOML file in bytes.

The largest in this package has 4,000. Parsing time grows with the square of the number of parts of a dotted name.
"""
_KIND_FILES = {"student": STUDENT_FILE, "bundle": BUNDLE_FILE}


def sha256(path: Path, copy: BinaryIO | None = None) -> str:
    """Return the SHA-256 of a regular file in hexadecimal, and copy its content to `copy`.

    Raises:
        ArtifactError: The file cannot be opened (see `files.open_regular`) or has more than `MAX_FILE` bytes.
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
    """Read a JSON object that carries `schema_version`; `records.read_record` checks its fields.

    Args:
        path: The file.
        schema: Required schema version; None accepts any.
        again: Command that makes the file again, for error messages.

    Raises:
        ArtifactError: The file is missing, not a regular file, larger than 64 MiB, not JSON, deeply nested, has NaN or
            infinity, or has another schema version.
    """
    return parse_json(read_bytes(path, MAX_JSON), path, schema, again)


def parse_json(text: bytes, path: Path, schema: int | None, again: str) -> dict[str, Any]:
    """Parse JSON text as `read_json` does; `path` is where it was read from."""
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # Not UTF-8, not JSON, or a number with too many digits.
        raise ArtifactError(f"{path} cannot be read: {error}.", again) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise ArtifactError(f"{path} has no schema_version.", "It was not written by sparsifiner-edge.")
    if schema not in (None, version):
        raise ArtifactError(f"{path} has schema {version}; this version reads only {schema}.", again)
    defect = flaw(content)
    if defect is not None:
        raise ArtifactError(f"{path}: {defect}.", again)
    return dict(content)


def read_toml(path: Path, fix: str) -> Any:
    """Read a TOML file; `records.read_record` checks its fields.

    Args:
        path: The file, or a link to it.
        fix: What to do if it cannot be read, for the error message.

    Raises:
        ConfigError: The file is missing, not a regular file, too large or not UTF-8, or `parse_toml` refuses it.
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
    """Parse TOML text; `origin` and `fix` go into error messages.

    Raises:
        ConfigError: The text is not TOML, has a number with thousands of digits, or is deeply nested. NaN and infinity
            are valid TOML and must be checked where a value is used.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # Every kind of damage raises a ValueError.
        raise ConfigError(f"{origin} is not TOML: {error}.", fix) from error
    defect = flaw(content, finite=False)
    if defect is not None:
        raise ConfigError(f"{origin}: {defect}.", fix)
    return content


def files_in(folder: Path) -> set[str]:
    """Return all files below a folder, including links of any kind."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}


def kind_of(folder: Path) -> str | None:
    """Return "student", "bundle", or None for any other folder.

    Raises:
        ArtifactError: The file that identifies the folder cannot be read.
    """
    for kind, name in _KIND_FILES.items():
        if not (folder / name).is_file():
            continue
        text = read_bytes(folder / name, MAX_JSON)
        # A Hugging Face config.json has a model_type and no schema_version.
        theirs = name == STUDENT_FILE and b'"schema_version"' not in text and b'"model_type"' in text
        if not theirs and parse_json(text, folder / name, None, "Make it again.").get("kind") == kind:
            return kind
    return None


def require_kind(folder: Path, *kinds: str) -> str:
    """Return which of `kinds` ("student", "bundle") a folder is.

    Raises:
        ArtifactError: The path is missing, is a file, or is another folder. The message says what to give instead.
    """
    kind, fix = kind_of(folder), "Check the path: sparsify writes student folders, export writes bundles."
    if kind in kinds:
        return str(kind)
    what = f"is not a {' or '.join(kinds)}" if folder.is_dir() else "is not a folder"
    if kind is not None:
        fix = (
            "Give the student folder that it was exported from."
            if kind == "bundle"
            else f"Export it: {export_line(folder)}"
        )
        what = f"is a {kind}, not a {kinds[0]}"
    elif folder.is_file() and kind_of(folder.parent) in kinds:
        fix = f"Give its folder: {folder.parent}"
    raise ArtifactError(f"{folder} {what if folder.exists() else 'does not exist'}.", fix)


def trust_text(student: Path) -> str:
    """Return " --trust MODULE" for a sparse model that was made from a user's factory, else an empty string."""
    content = read_json(student / STUDENT_FILE, None, "Make it again.")
    module = str(content.get("model")).partition(":")[0]
    return f" --trust {shlex.quote(module)}" if content.get("host") == "factory" else ""


def export_line(student: Path) -> str:
    """Return the shell command that exports a sparse model."""
    return f"sparsifiner-edge export {shlex.quote(str(student))}{trust_text(student)} -o BUNDLE/"


def require_replaceable(folder: Path, kind: str) -> None:
    """Refuse an output folder that holds anything that this package did not write.

    Raises:
        ArtifactError: It is a file, the current folder, or holds anything but one artifact of this kind.
    """
    if folder.name in ("", ".."):
        raise ArtifactError(f"{folder} is not the name of a folder.", "Name a folder to write.")
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
        raise ArtifactError(f"{folder} exists and is not a {kind} that sparsifiner-edge wrote.", fix)
    if present - ours:
        raise ArtifactError(f"{folder} also holds {min(present - ours)}, which sparsifiner-edge did not write.", fix)


def _written_files(folder: Path, kind: str) -> set[str]:
    """Return the files that this package wrote into a folder of this kind.

    Empty if the folder is of another kind or damaged.
    """
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
    """Fill a temporary folder that replaces `target` on success and is removed on failure.

    Raises:
        ArtifactError: `target` must not be replaced (see `require_replaceable`), or writing fails.
    """
    require_replaceable(target, kind)
    with replace_folder(target) as scratch:
        yield scratch


def unlisted_engines(folder: Path, known: Container[str]) -> list[Path]:
    """Return engine files that no manifest lists, left by a build that was killed."""
    engines = folder / ENGINE_FOLDER
    built = [] if engines.is_symlink() else engines.glob("*.engine")
    return [path for path in built if str(path.relative_to(folder)) not in known]


def scratches(folder: Path) -> list[Path]:
    """Return temporary build folders in a bundle, without links: those may lead anywhere."""
    return [path for path in folder.glob(f".{SCRATCH}.*") if path.is_dir() and not path.is_symlink()]
