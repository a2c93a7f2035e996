"""Tests of engine builds: an engine enters the bundle complete or not at all, despite crashes, hangs and full disks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sparsifiner_edge.artifacts import SIGNATURE_FILE, require_replaceable
from sparsifiner_edge.bundle.engines import BatchRange, Details, Engine, EngineDevice, fitting_engine, system
from sparsifiner_edge.bundle.manifest import Intended, Manifest, TensorSpec
from sparsifiner_edge.bundle.store import Bundle, bundle_scratch, open_bundle
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError
from sparsifiner_edge.records import write_record
from sparsifiner_edge.runtime import build as module
from sparsifiner_edge.runtime.build import batch_range, build_variant
from tests.commands import PROGRAM, assert_refused, call, ended, manifest_of, snapshot, wait_for
from tests.flat import open_session
from tests.mounts import in_mount, needs_mounts
from tests.seal import reseal
from tests.tensorrt.rtx import RTX, needs_rtx, rtx
from tests.tiny import make_bundle


@needs_rtx
def test_engines_are_added_and_those_of_one_name_replaced(tiny: Path) -> None:
    before = open_bundle(tiny).manifest
    first = rtx(tiny, "8.6", "8.9")
    again = rtx(tiny, "8.6", "8.6")
    wider = rtx(tiny, "8.6", batch=(1, 2, 4))
    manifest = manifest_of(tiny)
    assert manifest["engines"] == [first[1], *again, *wider]
    assert {f"engines/{p.name}" for p in (tiny / "engines").iterdir()} == {e["file"] for e in manifest["engines"]}
    after = open_bundle(tiny).manifest
    assert (after.intended, before.intended) == (Intended(RTX), None)
    assert replace(after, files={}, engines=(), intended=None) == replace(before, files={})
    assert before.files.items() <= after.files.items()
    require_replaceable(tiny, "bundle")
    with open_session(tiny) as session:  # The previous content is intact.
        assert session.backend == "onnxruntime"


@needs_rtx
def test_json_and_table_and_a_signature_that_no_longer_holds(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("build", tiny, "--backend", RTX, "--compute-capability", "8.6", "--batch", "1,1,4")
    outcome = call(capsys, *arguments, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert tuple(json.loads(outcome.out)["engines"][0]["batch"].values()) == (1, 1, 4)
    (tiny / SIGNATURE_FILE).write_text("of the manifest as it was")
    outcome = call(capsys, *arguments)
    assert "not run" in outcome.out
    assert str(tiny / "engines") in outcome.out.replace("\n", "")
    assert "its signature is no longer valid" in outcome.err
    assert f"bundle sign {tiny} --key" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backend", "opencv"], "Unknown backend 'opencv'"),
        (["--backend", "onnxruntime"], "onnxruntime builds no engine"),
        (["--backend", RTX, "--compute-capability", "8.7"], "does not support compute capability 8.7"),
        (["--backend", RTX, "--compute-capability", "8.6", "--batch", "4,4,2"], "batch sizes are 4"),
        (["--backend", RTX, "--compute-capability", "8.6", "--batch", "1,2"], "--batch is 1,2"),
        (["--backend", RTX, "--compute-capability", "8.6", "--kernels", "native"], "support custom CUDA kernels"),
    ],
)
@needs_rtx
def test_wrong_usage(tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    before = snapshot(tiny)
    assert_refused(call(capsys, "build", tiny, *arguments), text)
    assert snapshot(tiny) == before


def test_batch_sizes(tmp_path: Path) -> None:
    images = (TensorSpec("image", "uint8", (size, 4, 4, 3)) for size in (2, "batch"))
    fixed, dynamic = (Bundle(tmp_path, Manifest(schema_version=4, files={}, inputs=(image,))) for image in images)
    assert batch_range(dynamic, None) == BatchRange(1, 1, 8)
    with pytest.raises(ConfigError, match="fixed batch of 2"):
        batch_range(fixed, (1, 1, 2))
    with pytest.raises(ArtifactError, match="does not say the shape"):
        batch_range(Bundle(tmp_path, Manifest(schema_version=4, files={})), None)


# A worker that crashes, hangs or is killed: a fake TensorRT-RTX package does so when the worker imports it.


def misbehaving(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    package = folder / "site" / "tensorrt_rtx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, sys, time\n"
        "__version__ = '1.7.1'\n"
        f"if any('runtime.build' in word for word in sys.orig_argv):\n    {what}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("os.kill(os.getpid(), 9)", r"(?s)builder of tensorrt-rtx was ended by SIGKILL.*out of memory"),
        ("time.sleep(60)", r"(?s)gave no reply to 'build' within 4 s and was ended.*--timeout"),
    ],
)
def test_a_builder_that_dies_is_a_message_and_the_bundle_as_it_was(tiny, tmp_path, monkeypatch, what, said):
    misbehaving(tmp_path, monkeypatch, what)
    before = snapshot(tiny)
    start = time.monotonic()
    with pytest.raises(BackendError, match=said):
        build_variant(ENGINE, tiny, tmp_path / "x", timeout_s=4 if "sleep" in what else 100)
    assert time.monotonic() - start < 50
    assert snapshot(tiny) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended_midway(tiny, tmp_path, monkeypatch, number):
    worker = tmp_path / "worker"
    misbehaving(tmp_path, monkeypatch, f"open({str(worker)!r}, 'w').write(str(os.getpid())); time.sleep(99)")
    before = snapshot(tiny)
    arguments = [*PROGRAM, "build", str(tiny), "--backend", RTX, "--compute-capability", "8.6"]
    build = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    wait_for(lambda: worker.exists() and worker.read_text(), 100)
    assert list(tiny.glob(".build.*"))
    with pytest.raises(ArtifactError, match="An engine is being built in"):
        require_replaceable(tiny, "bundle")
    build.send_signal(number)
    error = build.communicate()[1].decode()
    assert build.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in error
    wait_for(lambda: ended(int(worker.read_text())), 20)
    manifest_of(tiny)
    require_replaceable(tiny, "bundle")
    with bundle_scratch(tiny) as scratch:  # The next build does this first.
        assert list(tiny.glob(".build.*")) == [scratch]
    assert snapshot(tiny) == before


def test_engines_that_nothing_lists_are_swept(tiny: Path) -> None:
    (tiny / "engines").mkdir()
    (tiny / "engines" / "left.engine").write_bytes(b"from a build that was killed")
    require_replaceable(tiny, "bundle")
    (tiny / "engines" / "mine.txt").write_text("precious")
    with pytest.raises(ArtifactError, match=r"also holds engines/mine.txt, which sparsifiner-edge did not write"):
        require_replaceable(tiny, "bundle")
    with bundle_scratch(tiny):
        pass
    assert [p.name for p in (tiny / "engines").iterdir()] == ["mine.txt"]


@needs_rtx
def test_two_builds_into_one_bundle(tiny: Path) -> None:
    builds = [
        subprocess.Popen([*PROGRAM, "build", str(tiny), "--backend", RTX, "--compute-capability", capability])
        for capability in ("8.6", "12.0")
    ]
    assert [build.wait() for build in builds] == [0, 0]
    assert {e["compute_capability"] for e in manifest_of(tiny)["engines"]} == {"8.6", "12.0"}
    assert not list(tiny.glob(".build.*"))


@needs_rtx
@pytest.mark.parametrize("change", ["exported anew", "gone"])
def test_a_bundle_that_changes_under_the_build(tiny: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    other = make_bundle(tiny.parent / "other", depth=3)
    real: Callable[..., Details] = module.build_variant

    def meanwhile(*arguments: Any) -> Details:
        done = real(*arguments)
        if change == "gone":
            shutil.rmtree(tiny)
        else:
            shutil.copytree(other, tiny, dirs_exist_ok=True)
        return done

    monkeypatch.setattr(module, "build_variant", meanwhile)
    if change == "gone":
        with pytest.raises(ArtifactError, match="does not exist"):
            rtx(tiny, "8.6")
        return
    with pytest.raises(ArtifactError, match="was exported again while the engines were built"):
        rtx(tiny, "8.6")
    assert snapshot(tiny) == snapshot(other)


@needs_rtx
@needs_mounts
def test_a_disk_that_is_full(tiny: Path, tmp_path: Path) -> None:
    arguments = ("build", tmp_path / "disk" / "b", "--backend", RTX, "--compute-capability", "8.6")
    outcome, names = in_mount(tmp_path, 100, f'cp -r "{tiny}" b', *arguments)
    assert_refused(outcome, "cannot be written: No space left on device")
    assert names == ["b", "b/golden.npz", "b/manifest.json", "b/model.onnx"]


ENGINE = Engine(RTX, "1.7.1", "8.6", *system(), "fp16", BatchRange(1, 1, 8))
DEVICE = EngineDevice("1.7.1", "8.6", "NVIDIA RTX A2000")


def forge(folder: Path, *engines: Engine, **changes: object) -> Path:
    """Write a bundle that lists engines with valid hashes, the first with other entries."""
    make_bundle(folder)
    (folder / "engines").mkdir()
    listed = [write_record(replace(one, file=f"engines/{number}.engine")) for number, one in enumerate(engines)]
    for engine in listed:
        (folder / engine["file"]).write_bytes(b"no engine at all")
    listed[0] = {name: value for name, value in (listed[0] | changes).items() if value is not None}
    return reseal(folder, engines=listed)


def test_what_is_written_is_read_back_and_what_is_not_known_passed_over(tmp_path: Path) -> None:
    other = replace(ENGINE, version="2", details=Details(bytes=7, kernels="bodies"))
    folder = forge(tmp_path / "b", ENGINE, other, details={"tactics": ["a"]}, later=1)
    assert [replace(engine, file="") for engine in open_bundle(folder).manifest.engines] == [ENGINE, other]


def test_the_last_that_fits_is_taken_or_the_command_that_builds_one_given(tmp_path: Path) -> None:
    last, other = replace(ENGINE, file="engines/b"), replace(ENGINE, compute_capability="8.9", file="engines/c")
    assert fitting_engine([replace(ENGINE, file="engines/a"), last, other], RTX, DEVICE, tmp_path) is last
    with pytest.raises(BackendError, match="holds no engine for tensorrt-rtx") as caught:
        fitting_engine([replace(ENGINE, backend="tensorrt")], RTX, DEVICE, tmp_path)
    assert f"sparsifiner-edge build {tmp_path} --backend tensorrt-rtx --compute-capability 8.6" in caught.value.fix
    engines = [replace(ENGINE, version="9", file="engines/a"), replace(other, os="windows", file="engines/b")]
    with pytest.raises(BackendError) as both:
        fitting_engine(engines, RTX, DEVICE, tmp_path)
    assert "engines/a: built by tensorrt-rtx 9, installed is 1.7.1; engines/b: built for windows" in both.value.what
    assert "capability 8.9" in both.value.what


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, "version is missing"),
        ({"file": "engines/other.engine"}, "without a hash"),
        ({"file": "model.onnx"}, "outside engines/"),
        ({"version": "1/2"}, r'version is "1/2", not str of the form'),
    ],
)
def test_a_manifest_that_is_not_ours(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = forge(tmp_path / "b", ENGINE, **change)
    with pytest.raises(ArtifactError, match=message):
        open_bundle(folder)
