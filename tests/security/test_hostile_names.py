"""Tests of names in bundles and sparse models that lead elsewhere: every command rejects them and writes nothing.

A hostile bundle is complete: files that its manifest names exist and have the listed hash, links followed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from sparsifiner_edge.artifacts import BUNDLE_FILE, SIGNATURE_FILE, STUDENT_FILE
from sparsifiner_edge.bundle.sign import Signature, fingerprint, require_signature, sign_bundle, write_signature
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.package import package_bundle
from tests.commands import assert_refused, call, snapshot
from tests.tiny import make_bundle

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization", reason="the extra sign is missing")

Capsys = pytest.CaptureFixture[str]
SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"
NAMES = (
    "../bundle/.bashrc",
    "a/../../.bashrc",
    "a/..",
    "..",
    ".",
    "",
    "/etc/hostname",
    "a//b",
    "a/",
    "./a",
    "a/./b",
    "a\0b",
    "a\nb",
    "a\x1b[2J",
    "a\u202eb",
    "a\\..\\b",
    "\ud800",
    BUNDLE_FILE,
    SIGNATURE_FILE,
    f"{BUNDLE_FILE}/a",
)


def hostile(folder: Path, keys: Path, name: str, links: dict[str, str] | None = None) -> Path:
    """Write a signed bundle that lists a file of this name.

    When read, the first two of `NAMES` are files inside with that hash; when written, they lie outside.
    """
    bundle = make_bundle(folder / "bundle", preprocessing={"size": 4})
    (folder / "victim").mkdir()
    (folder / "victim" / ".bashrc").write_bytes(SECRET)
    Image.new("RGB", (4, 4)).save(folder / "image.png")
    (bundle / "b" / "c").mkdir(parents=True)
    (bundle / ".bashrc").write_bytes(SECRET)
    for place, target in ({"a": "b/c"} if links is None else links).items():
        (bundle / place).symlink_to(target)
    content = json.loads((bundle / BUNDLE_FILE).read_text())
    content["files"][name] = hashlib.sha256(SECRET).hexdigest()
    text = json.dumps(content).encode()
    (bundle / BUNDLE_FILE).write_bytes(text)
    key = serialization.load_pem_private_key((keys / "key.pem").read_bytes(), None)
    signature = base64.b64encode(key.sign(b"sparsifiner-edge bundle 1\n" + text)).decode()
    write_signature(bundle, Signature(algorithm="ed25519", key=fingerprint(key.public_key()), signature=signature))
    return bundle


COMMANDS = (
    "bundle verify {bundle}",
    "bundle verify {bundle} --public-key {keys}/key.pub",
    "build {bundle} --backend tensorrt-rtx --compute-capability 9.9",
    "bundle sign {bundle} --key {keys}/key.pem",
    "run {bundle} --source test --frames 1",
    "run {bundle} --source test --require-signature {keys}/key.pub",
    "profile {bundle} --seconds .1 -o {place}/out",
    "estimate {bundle} --board jetson-orin-nano-8gb -o {place}/out",
    "evaluate {bundle} --against {bundle} --data {place}/image.png -o {place}/out",
    *(f"package {{bundle}} --for {kind} -o {{place}}/out" for kind in ("deepstream", "triton", "gstreamer")),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_could_lead_elsewhere_is_no_bundles(name: str, tmp_path: Path, keys: Path) -> None:
    """Every command begins with this check; the tests below try one such name each."""
    bundle = hostile(tmp_path, keys, name)
    for act in (open_bundle, lambda b: require_signature(b, keys / "key.pub")):
        with pytest.raises(ArtifactError, match="names the file") as caught:
            act(bundle)
        assert repr(name) in caught.value.what


@pytest.mark.parametrize(
    ("listed", "links", "said"),
    [
        ("../bundle/.bashrc", None, "names the file '../bundle/.bashrc'"),
        ("stolen", {"stolen": "../victim/.bashrc"}, "names the file 'stolen', which lies outside the bundle"),
        ("engines/.bashrc", {"engines": "../victim"}, "'engines/.bashrc', which lies outside the bundle"),
        ("loop", {"loop": "loop"}, "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_it_or_follows_a_link_out(
    command: str, listed: str, links: dict[str, str] | None, said: str, tmp_path: Path, keys: Path, capsys: Capsys
) -> None:
    bundle = hostile(tmp_path, keys, listed, links)
    before = snapshot(tmp_path)
    line = command.format(bundle=bundle, keys=keys, place=tmp_path)
    assert_refused(call(capsys, *line.split()), said)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_manifest_is_no_link_out(command: str, tmp_path: Path, keys: Path, capsys: Capsys) -> None:
    """Through a link a build would write elsewhere, and a package would include the target."""
    bundle = make_bundle(tmp_path / "bundle", preprocessing={"size": 4})
    sign_bundle(bundle, keys / "key.pem")
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    (tmp_path / "victim").mkdir()
    (bundle / BUNDLE_FILE).rename(tmp_path / "victim" / BUNDLE_FILE)
    (bundle / BUNDLE_FILE).symlink_to(f"../victim/{BUNDLE_FILE}")
    before = snapshot(tmp_path)
    done = call(capsys, *command.format(bundle=bundle, keys=keys, place=tmp_path).split())
    assert done.code in (1, 2)
    assert BUNDLE_FILE in done.out + done.err
    assert snapshot(tmp_path) == before


def test_a_signature_is_all_that_is_copied_as_one(tmp_path: Path, keys: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", preprocessing={"size": 4})
    sign_bundle(bundle, keys / "key.pem")
    package_bundle(bundle, "gstreamer", tmp_path / "out")
    assert snapshot(tmp_path / "out" / "bundle") == snapshot(bundle)
    require_signature(tmp_path / "out" / "bundle", keys / "key.pub")
    (bundle / SIGNATURE_FILE).rename(tmp_path / "elsewhere")
    (bundle / SIGNATURE_FILE).symlink_to("../elsewhere")
    with pytest.raises(ArtifactError, match=r"names the file 'manifest\.sig', which lies outside the bundle"):
        package_bundle(bundle, "gstreamer", tmp_path / "other")
    (bundle / SIGNATURE_FILE).unlink()
    (bundle / SIGNATURE_FILE).write_bytes(SECRET)
    with pytest.raises(ArtifactError, match=r"manifest\.sig cannot be read"):
        package_bundle(bundle, "gstreamer", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "model", ["../../x", "/etc/passwd", "local-dir:/etc", "hf-hub:a/b", "hf_hub:a/b", "a\0b", "a\x1b[2J", ""]
)
def test_a_student_names_no_file(model: str, tmp_path: Path, tiny_student: Path, capsys: Capsys) -> None:
    """The model's name is one of timm or a transformers class: never a path, and nothing is fetched."""
    student = tmp_path / "student"
    student.mkdir()
    for path in tiny_student.iterdir():
        os.link(path, student / path.name)
    content = json.loads((student / STUDENT_FILE).read_text())
    for host in ("timm", "transformers", "factory"):
        (student / STUDENT_FILE).unlink()
        (student / STUDENT_FILE).write_text(json.dumps(content | {"model": model, "host": host}))
        before = snapshot(tmp_path)
        assert_refused(call(capsys, "export", student, "-o", tmp_path / "out"))
        assert snapshot(tmp_path) == before
