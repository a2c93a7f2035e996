"""Tests of signed bundles: valid and rejected signatures, and agreement with OpenSSL."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.artifacts import SIGNATURE_FILE
from sparsifiner_edge.bundle.sign import generate_key, read_signature, require_signature, sign_bundle
from sparsifiner_edge.bundle.store import bundle_scratch, extend_bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError
from tests.commands import assert_refused, call, snapshot
from tests.seal import flip, reseal
from tests.tiny import make_bundle

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization", reason="the extra sign is missing")


@pytest.fixture
def signed(tmp_path: Path, keys: Path) -> Path:
    folder = make_bundle(tmp_path / "signed")
    sign_bundle(folder, keys / "key.pem")
    return folder


def test_a_signed_bundle_is_what_it_was(signed: Path, keys: Path) -> None:
    required = require_signature(signed, keys / "key.pub")
    assert required == open_bundle(signed)
    assert (required.signed, open_bundle(signed).signed) == (True, False)
    assert SIGNATURE_FILE not in open_bundle(signed).manifest.files
    content = json.loads((signed / SIGNATURE_FILE).read_text())
    assert content["schema_version"] == 1
    assert len(base64.b64decode(content["signature"])) == 64


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_agrees(signed: Path, keys: Path, tmp_path: Path) -> None:
    """RFC 8032 over the context and the manifest's bytes, as described in docs/pipelines.md."""
    message, signature = tmp_path / "message", tmp_path / "signature"
    message.write_bytes(b"sparsifiner-edge bundle 1\n" + (signed / "manifest.json").read_bytes())
    signature.write_bytes(base64.b64decode(json.loads((signed / SIGNATURE_FILE).read_text())["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", "-inkey", keys / "key.pub"]
    verify = [*command, "-sigfile", signature, "-in", message]
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
    message.write_bytes(message.read_bytes() + b" ")
    assert subprocess.run(verify, capture_output=True, check=False).returncode != 0


def other_model(folder: Path) -> None:
    flip(folder / "model.onnx")
    reseal(folder)


def signature(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / SIGNATURE_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def extra_kernels(folder: Path) -> None:
    (folder / "kernels").mkdir()
    (folder / "kernels" / "sm87.json").write_text("{}")


def link_signature(folder: Path) -> None:
    (folder / SIGNATURE_FILE).rename(folder.parent / "elsewhere")
    (folder / SIGNATURE_FILE).symlink_to(folder.parent / "elsewhere")


def an_engine(folder: Path) -> None:
    with bundle_scratch(folder) as scratch:
        (scratch / "x.engine").write_bytes(b"code")
        extend_bundle(folder, {"engines/x.engine": scratch / "x.engine"}, lambda manifest: manifest)


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda folder: (folder / SIGNATURE_FILE).unlink(), "is not signed"),
        (other_model, "was changed after it was signed"),
        (an_engine, "building an engine changes it"),
        (extra_kernels, "also holds kernels/sm87.json"),
        (lambda folder: (folder / "link").symlink_to("model.onnx"), "also holds link"),
        (link_signature, "outside the bundle"),
        (signature(algorithm="none"), 'algorithm is "none"'),
        (lambda folder: (folder / SIGNATURE_FILE).write_bytes(b"\xff{"), "cannot be read"),
        (lambda f: ((f / SIGNATURE_FILE).unlink(), os.mkfifo(f / SIGNATURE_FILE)), "is not a regular file"),
    ],
)
def test_what_is_refused(alter: Callable[[Path], None], said: str, signed: Path, keys: Path) -> None:
    alter(signed)
    with pytest.raises(ArtifactError) as caught:
        require_signature(signed, keys / "key.pub")
    assert said in caught.value.what
    assert caught.value.fix


def test_another_key_and_one_that_is_only_claimed(signed: Path, keys: Path) -> None:
    mine = read_signature(signed)
    assert mine is not None
    with pytest.raises(ArtifactError, match="signed by another key"):
        require_signature(signed, keys / "other.pub")
    sign_bundle(signed, keys / "other.pem")
    require_signature(signed, keys / "other.pub")
    signature(key=mine.key)(signed)
    with pytest.raises(ArtifactError, match="was changed after it was signed"):
        require_signature(signed, keys / "key.pub")


def test_only_whole_bundles_are_signed(tmp_path: Path, keys: Path) -> None:
    folder = make_bundle(tmp_path / "b")
    extra_kernels(folder)
    with pytest.raises(ArtifactError, match=r"also holds kernels/sm87\.json"):
        sign_bundle(folder, keys / "key.pem")
    flip(folder / "model.onnx")
    with pytest.raises(ArtifactError, match="SHA-256"):
        sign_bundle(folder, keys / "key.pem")
    assert read_signature(folder) is None


def test_keys_that_are_none(signed: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    pem, curve = serialization.Encoding.PEM, ec.generate_private_key(ec.SECP256R1())
    private = curve.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = curve.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    secret = serialization.BestAvailableEncryption(b"word")
    (tmp_path / "locked").write_bytes(curve.private_bytes(pem, serialization.PrivateFormat.PKCS8, secret))
    with pytest.raises(ArtifactError, match="is not a private key without password"):
        sign_bundle(signed, tmp_path / "locked")
    for use, key in ((sign_bundle, private), (require_signature, public)):
        for content, said in (
            (key, "is not an Ed25519 key"),
            (bytes(range(256)), "is not a p[a-z]+ key"),
            (b"-" * 100_000, "has more than"),
            (None, "does not exist"),
        ):
            path = tmp_path / said
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(ArtifactError, match=said):
                use(signed, path)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    public, fingerprint = generate_key(tmp_path / "new" / "key.pem")
    assert (tmp_path / "new" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (public.name, len(fingerprint)) == ("key.pub", 64)
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError, match=r"key\.pem exists"):
        generate_key(tmp_path / "new" / "key.pem")
    (tmp_path / "new" / "key.pem").rename(tmp_path / "new" / "old.pem")
    with pytest.raises(ArtifactError, match=r"key\.pub exists"):
        generate_key(tmp_path / "new" / "key.pem")
    for name in (tmp_path / "new" / "fresh.pub", Path(), Path("/")):
        with pytest.raises(ArtifactError, match="is not a file name for a private key"):
            generate_key(name)
    (tmp_path / "new" / "old.pem").rename(tmp_path / "new" / "key.pem")
    assert snapshot(tmp_path) == before


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, key = make_bundle(tmp_path / "b"), tmp_path / "key.pem"
    made = json.loads(call(capsys, "bundle", "keygen", "-o", key, "--json").out)
    assert made["public"] == str(tmp_path / "key.pub")
    outcome = call(capsys, "bundle", "sign", folder, "--key", key)
    assert (outcome.code, outcome.err) == (0, "")
    assert made["key"][:16] in outcome.out
    assert json.loads(call(capsys, "bundle", "sign", folder, "--key", key, "--json").out)["key"] == made["key"]
    assert_refused(call(capsys, "bundle", "sign", tmp_path / "none", "--key", key), "does not exist")
    assert_refused(call(capsys, "bundle", "sign", folder, "--key", tmp_path / "key.pub"), "is not a private key")
    assert_refused(call(capsys, "bundle", "keygen", "-o", key), "exists")
