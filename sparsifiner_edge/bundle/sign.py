"""Signed bundles: a detached Ed25519 signature (RFC 8032) of `manifest.json`, which holds the hash of every other file.

Engines and kernels are native code, so whoever can write a bundle can run code on the machine that opens it. A valid
signature proves that the holder of the key signed exactly the files that are about to run.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from sparsifiner_edge.artifacts import BUNDLE_FILE, SIGNATURE_FILE, files_in, read_json
from sparsifiner_edge.bundle.store import Bundle, open_bundle, place_in
from sparsifiner_edge.errors import ArtifactError, MissingExtraError
from sparsifiner_edge.files import io_errors, read_bytes, write_text
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.text import dump_json

SIGNATURE_SCHEMA = 1
_CONTEXT = b"sparsifiner-edge bundle 1\n"
"""Prefix of the signed bytes, so that a signature made for another purpose never fits a bundle."""
_MAX_KEY = 1 << 16
"""Maximum size of a key file in bytes."""


class Signature(Struct, frozen=True, kw_only=True):
    """Content of `manifest.sig`.

    Attributes:
        schema_version: Version of the format.
        kind: Always "signature".
        algorithm: Signature algorithm.
        key: Fingerprint of the public key, as claimed by the file.
        signature: Signature of 64 bytes, in base64.
    """

    schema_version: int = SIGNATURE_SCHEMA
    kind: str = "signature"
    algorithm: Literal["ed25519"]
    key: str
    signature: str


def generate_key(path: str | Path) -> tuple[Path, str]:
    """Write a new private key, readable only by its owner, and its public key (`.pub`) next to it.

    Args:
        path: File of the private key, which must not end in `.pub`.

    Returns:
        The file of the public key, and its fingerprint.

    Raises:
        ArtifactError: One of the files exists, `path` is not a valid name for a private key, or the file cannot be
            written. No file is left behind.
        MissingExtraError: `cryptography` is not installed.

    Example:
        >>> public, fingerprint = generate_key("key.pem")
        >>> signature = sign_bundle("bundle", "key.pem")
        >>> signature.key == fingerprint
        True
    """
    path = Path(path)
    if not path.name or path.suffix == ".pub":
        raise ArtifactError(
            f"{path} is not a file name for a private key.", "Choose a name that does not end in .pub, such as KEY.pem."
        )
    ed25519, s = _cryptography()
    key, public = ed25519.Ed25519PrivateKey.generate(), path.with_suffix(".pub")
    _write_new(path, key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()), 0o600)
    try:
        text = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        _write_new(public, text, 0o644)
    except ArtifactError:
        path.unlink()
        raise
    return public, fingerprint(key.public_key())


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a key to a new file, never over an existing one.

    A partial file is removed, so that it does not block the next attempt.
    """
    with io_errors(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
            file = stack.enter_context(opened)
        except FileExistsError as error:
            raise ArtifactError(f"{path} exists.", "A key is never overwritten: choose another name.") from error
        cleanup = stack.enter_context(contextlib.ExitStack())
        cleanup.callback(path.unlink)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        cleanup.pop_all()


def fingerprint(key: Any) -> str:
    """Return the SHA-256 of a public key's 32 bytes, in hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def fingerprint_of(public_key: Path) -> str:
    """Return the fingerprint of the public key in a file.

    Raises:
        ArtifactError: The file is not an Ed25519 public key.
        MissingExtraError: `cryptography` is not installed.
    """
    return fingerprint(_read_key(public_key, private=False))


def sign_bundle(bundle: str | Path, key: str | Path) -> Signature:
    """Sign a bundle: write `manifest.sig`, replacing an earlier signature.

    Args:
        bundle: Bundle folder. Its hashes must match, and it must not contain unlisted files.
        key: File of an Ed25519 private key, PEM (PKCS 8) without password.

    Returns:
        The signature that was written.

    Raises:
        ArtifactError: The bundle or the key is not valid, or the model needs other files.
        MissingExtraError: `cryptography` is not installed.

    Example:
        >>> _ = generate_key("other.pem")
        >>> sign_bundle("bundle", "other.pem").algorithm
        'ed25519'
    """
    folder, private = Path(bundle), _read_key(Path(key), private=True)
    checked = _open_whole(folder)
    checked.model()  # Rejects a model with external data, which the signature would not cover.
    encoded = base64.b64encode(private.sign(_CONTEXT + checked.text)).decode()
    signed = Signature(algorithm="ed25519", key=fingerprint(private.public_key()), signature=encoded)
    write_signature(folder, signed)
    return signed


def write_signature(folder: Path, signature: Signature) -> None:
    """Write `manifest.sig`, replacing an earlier signature.

    Raises:
        ArtifactError: The file is a link out of the bundle, or the file cannot be written.
    """
    write_text(place_in(folder, SIGNATURE_FILE), dump_json(write_record(signature)))


def read_signature(folder: Path) -> Signature | None:
    """Read a bundle's signature without verifying it; None for an unsigned bundle.

    Raises:
        ArtifactError: The file is malformed, has another schema version, or is a link out of the bundle.
    """
    path = place_in(folder, SIGNATURE_FILE)
    if not path.exists():
        return None
    again = "Sign the bundle again: sparsifiner-edge bundle sign BUNDLE/ --key KEY.pem"
    return read_record(read_json(path, SIGNATURE_SCHEMA, again), Signature, path, again)


def require_signature(folder: Path, public_key: Path) -> Bundle:
    """Open a bundle and verify that the holder of a key signed every file in it.

    The manifest is parsed from the bytes that were signed. Read files through `Bundle.read`, so that files changed in
    the meantime are rejected.

    Args:
        folder: Bundle folder.
        public_key: File of an Ed25519 public key, PEM.

    Raises:
        ArtifactError: The bundle is unsigned, altered, signed by another key or contains unlisted files, or the key is
            not usable.
        MissingExtraError: `cryptography` is not installed.
    """
    public = _read_key(public_key, private=False)
    signature = read_signature(folder)
    if signature is None:
        raise ArtifactError(
            f"{folder} is not signed.",
            f"Do not use it, or sign it: sparsifiner-edge bundle sign {folder} --key KEY.pem",
        )
    from cryptography.exceptions import InvalidSignature

    bundle = _open_whole(folder)
    try:
        public.verify(base64.b64decode(signature.signature, validate=True), _CONTEXT + bundle.text)
    except (InvalidSignature, ValueError) as error:
        why = "was changed after it was signed; building an engine changes it too"
        if signature.key != fingerprint(public):
            why = f"is signed by another key ({signature.key[:16]}, wanted {fingerprint(public)[:16]})"
        raise ArtifactError(f"{folder} {why}.", "Do not use this bundle, or sign it again.") from error
    return dataclasses.replace(bundle, signed=True)


def _open_whole(folder: Path) -> Bundle:
    """Open a bundle that contains only listed files.

    Raises:
        ArtifactError: The folder is not a bundle, was altered, or contains unlisted files, which could be code.
    """
    bundle = open_bundle(folder)
    extra = unlisted_files(bundle)
    if extra:
        raise ArtifactError(f"{folder} also holds {extra[0]}, which its manifest does not list.", "Remove that file.")
    return bundle


def unlisted_files(bundle: Bundle) -> list[str]:
    """Return the files in a bundle's folder that its manifest does not list, without manifest and signature.

    A manifest or signature that is a symbolic link counts as unlisted.
    """
    unhashed = {name for name in (BUNDLE_FILE, SIGNATURE_FILE) if not (bundle.folder / name).is_symlink()}
    return sorted(files_in(bundle.folder) - unhashed - set(bundle.manifest.files))


def _read_key(path: Path, private: bool) -> Any:
    """Read an Ed25519 key from a PEM file."""
    ed25519, serialization = _cryptography()
    content = read_bytes(path, _MAX_KEY)
    word, fix = "public key", "Give the .pub file of the signing key."
    if private:
        word, fix = "private key without password", "Make one: sparsifiner-edge bundle keygen -o KEY.pem"
    try:
        if private:
            key, kind = serialization.load_pem_private_key(content, None), ed25519.Ed25519PrivateKey
        else:
            key, kind = serialization.load_pem_public_key(content), ed25519.Ed25519PublicKey
    except Exception as error:  # Damaged, password-protected, or of an algorithm that cryptography does not support.
        raise ArtifactError(f"{path} is not a {word}.", fix) from error
    if not isinstance(key, kind):
        raise ArtifactError(f"{path} is not an Ed25519 key.", fix)
    return key


def _cryptography() -> Any:
    """Return the modules of `cryptography` for Ed25519 and for key files."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError("cryptography", "sign") from error
    return ed25519, serialization
