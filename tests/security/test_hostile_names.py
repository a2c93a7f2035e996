"""Names in bundles and students that lead elsewhere: every command refuses them, and writes nothing outside its output.

A hostile bundle is whole: what its manifest names lies there and has the hash that it says, links followed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
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

serialization = pytest.importorskip(
    "cryptography.hazmat.primitives.serialization", reason="the extra sign is not installed"
)

SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"
NAMES = (
    "../bundle/.bashrc", "a/../../.bashrc", "a/..", "..", ".", "", "/etc/hostname", "a//b", "a/", "./a", "a/./b",
    "a\0b", "a\nb", "a\x1b[2J", "a\u202eb", "a\\..\\b", "\ud800", BUNDLE_FILE, SIGNATURE_FILE, f"{BUNDLE_FILE}/a",
)  # fmt: skip


def hostile(folder: Path, keys: Path, name: str, links: dict[str, str] | None = None) -> Path:
    """A bundle that lists a file of this name, signed. Read through what lies in it, the first two of `NAMES` are files
    inside with that hash; written elsewhere they lie outside.
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


COMMANDS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "verify": lambda b, _o, _k: ["bundle", "verify", b],
    "verify a signature": lambda b, _o, k: ["bundle", "verify", b, "--public-key", k / "key.pub"],
    "sign": lambda b, _o, k: ["bundle", "sign", b, "--key", k / "key.pem"],
    "build": lambda b, _o, _k: ["build", b],
    "run": lambda b, _o, _k: ["run", b, "--source", "test", "--frames", "1"],
    "run what was signed": lambda b, _o, k: ["run", b, "--source", "test", "--require-signature", k / "key.pub"],
    "profile": lambda b, o, _k: ["profile", b, "--seconds", ".1", "-o", o],
    "estimate": lambda b, o, _k: ["estimate", b, "--board", "orin-nano-8gb", "-o", o],
    "evaluate": lambda b, o, _k: ["evaluate", b, "--against", b, "--data", b.parent / "image.png", "-o", o],
} | {
    f"package for {target}": lambda b, o, _k, target=target: ["package", b, "--for", target, "-o", o]
    for target in ("deepstream", "triton", "gstreamer")
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_could_lead_elsewhere_is_no_bundles(name: str, tmp_path: Path, keys: Path) -> None:
    """What every command begins with, of which those below try one such name each."""
    bundle = hostile(tmp_path, keys, name)
    for act in (open_bundle, lambda b: require_signature(b, keys / "key.pub")):
        with pytest.raises(ArtifactError, match="names the file") as caught:
            act(bundle)
        assert repr(name) in caught.value.what


@pytest.mark.parametrize(
    ("listed", "links", "said"),
    [
        ("../bundle/.bashrc", None, "names the file '../bundle/.bashrc'"),
        ("stolen", {"stolen": "../victim/.bashrc"}, "names the file 'stolen' outside itself"),
        ("engines/.bashrc", {"engines": "../victim"}, "names the file 'engines/.bashrc' outside itself"),
        ("loop", {"loop": "loop"}, "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_it_or_follows_a_link_out(
    command: str, listed: str, links: dict[str, str] | None, said: str, tmp_path: Path, keys: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle = hostile(tmp_path, keys, listed, links)
    before = snapshot(tmp_path)
    assert_refused(call(capsys, *COMMANDS[command](bundle, tmp_path / "out", keys)), said)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [BUNDLE_FILE, SIGNATURE_FILE])
def test_manifest_and_signature_are_no_links_out(
    name: str, command: str, tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through one a build would write elsewhere, and a package take along what it leads to."""
    bundle = make_bundle(tmp_path / "bundle", preprocessing={"size": 4})
    sign_bundle(bundle, keys / "key.pem")
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    (tmp_path / "victim").mkdir()
    (bundle / name).rename(tmp_path / "victim" / name)
    (bundle / name).symlink_to(f"../victim/{name}")
    before = snapshot(tmp_path)
    done = call(capsys, *COMMANDS[command](bundle, tmp_path / "out", keys))
    if name == BUNDLE_FILE or "sign" in command or command == "verify":
        assert done.code in (1, 2)
        assert name in done.out + done.err
    if "gstreamer" in command:
        assert_refused(done, f"names the file {name!r} outside itself")
    left = {path: content for path, content in snapshot(tmp_path).items() if path.partition("/")[0] != "out"}
    assert left == before


def test_a_signature_is_all_that_is_copied_as_one(tmp_path: Path, keys: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", preprocessing={"size": 4})
    sign_bundle(bundle, keys / "key.pem")
    package_bundle(bundle, "gstreamer", tmp_path / "out")
    assert snapshot(tmp_path / "out" / "bundle") == snapshot(bundle)
    require_signature(tmp_path / "out" / "bundle", keys / "key.pub")
    (bundle / SIGNATURE_FILE).write_bytes(SECRET)
    with pytest.raises(ArtifactError, match=r"manifest\.sig cannot be read"):
        package_bundle(bundle, "gstreamer", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "model", ["../../x", "/etc/passwd", "local-dir:/etc", "hf-hub:a/b", "hf_hub:a/b", "a\0b", "a\x1b[2J", ""]
)
def test_a_student_names_no_file(
    model: str, tmp_path: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name of its model is one that timm has, or of transformers' classes: never a path, and nothing is fetched."""
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
