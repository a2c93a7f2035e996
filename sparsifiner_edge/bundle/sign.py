"""Signed bundles: a detached Ed25519 signature (RFC 8032) of `manifest.json`, which holds the hash of every other file.

Engines and kernels are native code: whoever can write a bundle can run code where it is opened. A signature says that
what is about to run is what the holder of the key has signed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from sparsifiner_edge.artifacts import BUNDLE_FILE, SIGNATURE_FILE, read_json
from sparsifiner_edge.bundle.store import Bundle, check_bundle, read_manifest
from sparsifiner_edge.errors import ArtifactError, MissingExtraError
from sparsifiner_edge.files import io_errors, read_bytes, write_text
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.text import dump_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_SCHEMA = 1
_CONTEXT = b"sparsifiner-edge bundle 1\n"
"""Signed before the manifest's bytes, so that a signature made for something else never fits a bundle."""
_MAX_KEY = 1 << 16


class Signature(Struct, frozen=True, kw_only=True):
    """What `manifest.sig` says. key: the fingerprint that it claims. signature: 64 bytes, in base64."""

    schema_version: int = SIGNATURE_SCHEMA
    kind: str = "signature"
    algorithm: str = "ed25519"
    key: str
    signature: str


def generate_key(path: Path) -> tuple[Path, str]:
    """Write a new private key, readable by its owner alone, and beside it the public one (`.pub`).

    Returns:
        The public key's file, and its fingerprint.

    Raises:
        ArtifactError: a file of either name exists, `path` names none, or the disk refuses; no file is left.
        MissingExtraError: `cryptography` is not installed.
    """
    if not path.name:
        raise ArtifactError(f"{path} names no file.", "Give the private key's name: KEY.pem.")
    with _needs_cryptography():
        from cryptography.hazmat.primitives import serialization as s
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    key, public = Ed25519PrivateKey.generate(), path.with_suffix(".pub")
    private_text = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    public_text = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    if public == path:
        raise ArtifactError(f"{path} is the name of the public key.", "Give the private key another ending: .pem.")
    _write_new(path, private_text, 0o600)
    try:
        _write_new(public, public_text, 0o644)
    except ArtifactError:
        path.unlink()
        raise
    return public, fingerprint(key.public_key())


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """A key is never written over another."""
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError as error:
            raise ArtifactError(f"{path} exists.", "A key is never overwritten: choose another name.") from error
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # Half a key would stand in the way of the next try.
            path.unlink()
            raise


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key's 32 bytes, in hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def fingerprint_of(public_key: Path) -> str:
    """The fingerprint of a public key's file.

    Raises:
        ArtifactError: it is no Ed25519 public key.
        MissingExtraError: `cryptography` is not installed.
    """
    return fingerprint(_read_public(public_key))


def sign_bundle(folder: Path, key: Path) -> Signature:
    """Sign a bundle: writes `manifest.sig`, in the place of an earlier one.

    Args:
        folder: a bundle whose hashes match and that holds nothing else.
        key: an Ed25519 private key, PEM (PKCS 8) without password.

    Returns:
        What was written.

    Raises:
        ArtifactError: not such a bundle or key, or its model needs other files.
        MissingExtraError: `cryptography` is not installed.
    """
    private = _read_private(key)
    bundle, text = _read_whole(folder)
    bundle.model()  # One that names other files would run with whatever lies there.
    encoded = base64.b64encode(private.sign(_CONTEXT + text)).decode()
    made = Signature(key=fingerprint(private.public_key()), signature=encoded)
    write_text(folder / SIGNATURE_FILE, dump_json(write_record(made)))
    return made


def read_signature(folder: Path) -> Signature | None:
    """What a bundle's signature says, unchecked; None for an unsigned bundle.

    Raises:
        ArtifactError: it is malformed, or of a newer schema.
    """
    path = folder / SIGNATURE_FILE
    if not path.exists():
        return None
    content = read_json(path, SIGNATURE_SCHEMA)
    if content.get("algorithm") != "ed25519":
        raise ArtifactError(f"{path} is of another algorithm than ed25519.", _SIGN_AGAIN)
    return read_record(content, Signature, path, _SIGN_AGAIN)


def require_signature(folder: Path, public_key: Path) -> Bundle:
    """A bundle that the holder of a key signed, as it is: every file, and no other.

    Its manifest was parsed from the bytes that were signed: read its files by `Bundle.read`, and nothing that anyone
    writes into the folder meanwhile is used.

    Args:
        folder: the bundle.
        public_key: an Ed25519 public key, PEM.

    Raises:
        ArtifactError: unsigned, altered, signed by another key; or the bundle or the key is unusable.
        MissingExtraError: `cryptography` is not installed.
    """
    public = _read_public(public_key)
    signature = read_signature(folder)
    if signature is None:
        raise ArtifactError(
            f"{folder} is not signed.",
            f"Do not use it, or sign it: sparsifiner-edge bundle sign {folder} --key KEY.pem",
        )
    bundle, text = _read_whole(folder)
    if not _fits(public, signature.signature, text):
        raise ArtifactError(f"{folder} {_why_not(public, signature)}.", "Do not use this bundle, or sign it again.")
    return bundle


def _fits(public: Ed25519PublicKey, encoded: str, text: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    with contextlib.suppress(InvalidSignature, binascii.Error, ValueError):
        public.verify(base64.b64decode(encoded, validate=True), _CONTEXT + text)
        return True
    return False


def _why_not(public: Ed25519PublicKey, signature: Signature) -> str:
    if signature.key != fingerprint(public):
        return f"is signed by another key ({signature.key[:16]}, wanted {fingerprint(public)[:16]})"
    return "was changed after it was signed; building an engine changes it too"


def _read_whole(folder: Path) -> tuple[Bundle, bytes]:
    """A checked bundle and its manifest's bytes.

    Raises:
        ArtifactError: not a bundle, altered, or with files that the manifest does not list: some are code.
    """
    text = read_manifest(folder)
    bundle = check_bundle(folder, text)
    extra = unlisted_files(bundle)
    if extra:
        raise ArtifactError(f"{folder} also holds {extra[0]}, which its manifest does not list.", "Remove that file.")
    return bundle, text


def unlisted_files(bundle: Bundle) -> list[str]:
    """Files of a bundle's folder that its manifest does not list; the signature is one only as a link."""
    folder = bundle.folder
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    own = {name for name in (BUNDLE_FILE, SIGNATURE_FILE) if not (folder / name).is_symlink()}
    return sorted(present - own - set(bundle.manifest.files))


def _read_private(path: Path) -> Ed25519PrivateKey:
    with _needs_cryptography():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    try:
        key = load_pem_private_key(read_bytes(path, _MAX_KEY), None)
    except (ValueError, TypeError) as error:  # TypeError: it has a password.
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(f"{path} is no private key without password: {reason}", _MAKE_KEY) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactError(f"{path} is no Ed25519 key.", _MAKE_KEY)
    return key


def _read_public(path: Path) -> Ed25519PublicKey:
    with _needs_cryptography():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    try:
        key = load_pem_public_key(read_bytes(path, _MAX_KEY))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ArtifactError(f"{path} is no public key.", "Give the .pub file of the key that signs.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ArtifactError(f"{path} is no Ed25519 key.", "Give the .pub file of the key that signs.")
    return key


_SIGN_AGAIN = "Sign the bundle again."
_MAKE_KEY = "Make one: sparsifiner-edge bundle keygen -o KEY.pem"


@contextlib.contextmanager
def _needs_cryptography() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError("cryptography", "sign") from error
