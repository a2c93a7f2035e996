"""Engines, built for real by TensorRT-RTX without a GPU, and all that can go wrong on their way into the bundle."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sparsifiner_edge.artifacts import (
    BUNDLE_FILE,
    bundle_scratch,
    open_bundle,
    require_replaceable,
    seal_bundle,
    sha256,
)
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError, GateError
from sparsifiner_edge.export.check import golden_image
from sparsifiner_edge.export.deployed import DeployedModel
from sparsifiner_edge.export.graph import export_graph
from sparsifiner_edge.export.half import convert
from sparsifiner_edge.export.quantise import quantise, run_file
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.build import batch_range, build_engine
from sparsifiner_edge.runtime.build_worker import run_job
from sparsifiner_edge.runtime.engines import BatchRange
from tests.commands import PROGRAM, assert_refused, call, snapshot
from tests.fakes.gpu import Gpu
from tests.fakes.install import install_cuda
from tests.models import TINY_CONFIG, student
from tests.test_bad_input import in_mount, needs_mounts
from tests.tiny import make_bundle

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx exists for x86-64 alone"
)
RTX = "tensorrt-rtx"
DYNAMIC = None


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny")


def rtx(bundle: Path, *capabilities: str, **options: Any) -> list[dict[str, Any]]:
    engines: list[dict[str, Any]] = build_engine(bundle, RTX, compute_capabilities=capabilities, **options)["engines"]
    return engines


def vit_bundle(folder: Path, sparsity: SparsityConfig, precision: str, batch: int | None) -> Path:
    """A bundle of two layers, made as `export_bundle` makes it, without its checks."""
    deployed = DeployedModel(student(sparsity=sparsity, depth=2).model)
    model = export_graph(deployed, 160, batch, deployed.output_names)
    if precision == "fp16":
        model = convert(model).model
    if precision == "int8":
        model = quantise(model, [golden_image(160, batch or 1, seed) for seed in range(2)], "tensorrt").model
        model = convert(model).model
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    image = golden_image(160, batch or 1)
    outputs = {f"output.{name}": value for name, value in run_file(model, image).items()}
    np.savez(folder / "golden.npz", **{"input.image": image}, **outputs)
    shape = [batch or "batch", 160, 160, 3]
    inputs = [{"name": "image", "dtype": "uint8", "shape": shape}]
    tolerances = dict.fromkeys(deployed.output_names, 5e-2)
    seal_bundle(folder, {"precision": precision, "inputs": inputs, "outputs": [], "tolerances": tolerances})
    return folder


@needs_rtx
@pytest.mark.parametrize(
    ("kind", "precision", "batch", "capability"),
    [
        ("edge", "fp32", 1, "8.0"),
        ("edge", "fp32", DYNAMIC, "8.6"),
        ("edge", "fp16", 1, "7.5"),
        ("edge", "fp16", DYNAMIC, "12.0"),
        ("edge", "int8", 2, "8.9"),
        ("edge", "int8", 1, "7.5"),
        ("dense", "fp32", DYNAMIC, "12.0"),
        ("dense", "fp16", 1, "7.5"),
        ("dense", "int8", 1, "8.6"),
        ("paper", "fp16", 1, "8.9"),
        ("pruned", "fp16", DYNAMIC, "8.6"),
    ],
)
def test_every_kind_of_file_builds(
    tmp_path: Path, kind: str, precision: str, batch: int | None, capability: str
) -> None:
    sparsity = {
        "edge": TINY_CONFIG,
        "dense": SparsityConfig(keep=1),
        "paper": SparsityConfig.for_preset("paper", keep=0.25),
        "pruned": SparsityConfig(keep=0.2, cells=4, channels=8, token_keep=((0, 0.7),)),
    }[kind]
    bundle = vit_bundle(tmp_path / "b", sparsity, precision, batch)
    stages: list[str] = []
    (engine,) = rtx(bundle, capability, progress=lambda stage, *_: stages.append(stage))
    sizes = (1, 1, 8) if batch is DYNAMIC else (batch,) * 3
    assert (engine["precision"], engine["compute_capability"]) == (precision, capability)
    assert tuple(engine["batch"].values()) == sizes
    assert engine["details"]["bytes"] == (bundle / engine["file"]).stat().st_size > 100_000
    assert "no CUDA" in engine["details"]["golden"]["unavailable"] or "No NVIDIA" in str(engine["details"]["golden"])
    assert any("parsing the model" in stage for stage in stages)
    assert any("Building engine" in stage for stage in stages)
    manifest = open_bundle(bundle)
    assert manifest["engines"] == [engine]
    for part in ("sm" + capability.replace(".", ""), precision, engine["version"], "linux", "x86_64"):
        assert part in Path(engine["file"]).name


@needs_rtx
def test_engines_are_added_and_those_of_one_name_replaced(tiny: Path) -> None:
    before = open_bundle(tiny)
    first = rtx(tiny, "8.6", "8.9")
    again = rtx(tiny, "8.6", "8.6")
    wider = rtx(tiny, "8.6", batch=(1, 2, 4))
    manifest = open_bundle(tiny)
    assert manifest["engines"] == [first[1], *again, *wider]
    assert sorted(p.name for p in (tiny / "engines").iterdir()) == sorted(
        Path(e["file"]).name for e in manifest["engines"]
    )
    assert {k: v for k, v in manifest.items() if k not in ("files", "engines")} == {
        k: v for k, v in before.items() if k != "files"
    }
    assert before["files"].items() <= manifest["files"].items()
    require_replaceable(tiny, "bundle")
    with open_session(tiny) as session:  # What it was before it still is.
        assert session.backend == "onnxruntime"


@needs_rtx
def test_an_engine_is_refused_before_anything_deserialises_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx

    (engine,) = rtx(tiny, "8.6")
    monkeypatch.setattr(tensorrt_rtx, "Runtime", lambda *_: pytest.fail("an object of TensorRT was made"))
    if not Path("/dev/nvidiactl").exists():
        with pytest.raises(BackendError, match=r"No NVIDIA driver|no CUDA"):
            open_session(tiny, RTX)
    install_cuda(monkeypatch, Gpu("NVIDIA L4", (8, 9), 24 << 30, False, 13000), "cuda-python")
    with pytest.raises(BackendError, match=r"built for compute capability 8\.6, NVIDIA L4 has 8\.9") as caught:
        open_session(tiny, RTX)
    assert f"sparsifiner-edge build {tiny} --backend tensorrt-rtx --compute-capability 8.9" in caught.value.fix
    for field, value, said in (("version", "1.0", "built by tensorrt-rtx 1.0"), ("os", "windows", "built for windows")):
        forge(tiny, engine | {field: value})
        with pytest.raises(BackendError, match=said):
            open_session(tiny, RTX)
    forge(tiny, engine)
    with pytest.raises(BackendError, match="native kernels are the processor's"):
        open_session(tiny, RTX, kernels="native")


@needs_rtx
def test_a_truncated_engine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = rtx(tiny, "8.6")
    path = tiny / engine["file"]
    path.write_bytes(path.read_bytes()[: 2 << 10])
    with pytest.raises(ArtifactError, match="does not match its SHA-256"):
        open_session(tiny, RTX)
    forge(tiny, engine)  # Now its hash is right; the GPU is made up, what refuses the file is TensorRT-RTX.
    install_cuda(monkeypatch, Gpu("NVIDIA RTX A2000", (8, 6), 12 << 30, False, 13000), "cuda-python")
    with pytest.raises(BackendError, match=r"sm86.*engine (is refused|was built by another version or is damaged)"):
        open_session(tiny, RTX)


def forge(folder: Path, engine: dict[str, Any]) -> None:
    """Let the manifest say this of the engine, hashes and all."""
    manifest = json.loads((folder / BUNDLE_FILE).read_text())
    manifest["engines"] = [engine]
    manifest["files"][engine["file"]] = sha256(folder / engine["file"])
    (folder / BUNDLE_FILE).write_text(json.dumps(manifest))


def test_onnxruntime_needs_no_file(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(tiny)
    found = build_engine(tiny)
    assert found["engines"] == []
    assert found["golden"]["features"]["range_relative_error"] <= found["golden"]["features"]["tolerance"]
    outcome = call(capsys, "build", tiny)
    assert outcome.code == 0
    assert "no engine is needed, none was written" in outcome.out
    assert "kernels: none (standard operators)" in outcome.out
    assert snapshot(tiny) == before


def test_onnxruntime_runs_the_golden_pair(tiny: Path) -> None:
    with np.load(tiny / "golden.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(tiny / "golden.npz", **arrays | {"output.features": arrays["output.features"] + 1})
    manifest = json.loads((tiny / BUNDLE_FILE).read_text())
    manifest["files"]["golden.npz"] = sha256(tiny / "golden.npz")
    (tiny / BUNDLE_FILE).write_text(json.dumps(manifest))
    with pytest.raises(GateError, match="differs from golden"):
        build_engine(tiny)


@needs_rtx
def test_json_and_table(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("build", tiny, "--backend", RTX, "--compute-capability", "8.6", "--max-batch", 4)
    outcome = call(capsys, *arguments, "--json")
    result = json.loads(outcome.out)
    assert outcome.code == 0
    assert tuple(result["engines"][0]["batch"].values()) == (1, 1, 4)
    outcome = call(capsys, *arguments)
    assert "not run" in outcome.out
    assert str(tiny / "engines") in outcome.out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backend", "openvino"], "Unknown backend 'openvino'"),
        (["--compute-capability", "8.6"], "onnxruntime builds no engine"),
        (["--backend", RTX, "--compute-capability", "86"], "compute capability is '86'"),
        (["--backend", RTX, "--compute-capability", ""], "compute capability is ''"),
        (["--backend", RTX, "--compute-capability", "8.6,"], "compute capability is ''"),
        (["--backend", RTX, "--compute-capability", "8.7"], "that is a Jetson Orin"),
        (["--backend", RTX, "--compute-capability", "9.0"], "that is a data centre's GPU"),
        (["--backend", RTX, "--compute-capability", "6.1"], "it knows no such architecture"),
        (["--backend", RTX, "--compute-capability", "7.5"], "Turing"),
        (
            ["--backend", RTX, "--compute-capability", "8.6", "--min-batch", "4", "--max-batch", "2"],
            "batch sizes are 4",
        ),
        (["--backend", RTX, "--compute-capability", "8.6", "--option", "level"], "'level' is not NAME=VALUE"),
        (["--backend", RTX, "--compute-capability", "8.6", "--option", "level=5"], "no option 'level'"),
        (["--backend", RTX, "--timeout", "0"], "--timeout"),
    ],
)
@needs_rtx
def test_wrong_usage(tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    before = snapshot(tiny)
    assert_refused(call(capsys, "build", tiny, *arguments), text)
    assert snapshot(tiny) == before


def test_batch_sizes(tmp_path: Path) -> None:
    fixed, dynamic = ({"inputs": [{"shape": [size, 4, 4, 3]}]} for size in (2, "batch"))
    assert batch_range(fixed, None, tmp_path) == batch_range(fixed, (2, 2, 2), tmp_path) == BatchRange(2, 2, 2)
    assert batch_range(dynamic, None, tmp_path) == BatchRange(1, 1, 8)
    assert batch_range(dynamic, (2, 4, 4), tmp_path) == BatchRange(2, 4, 4)
    with pytest.raises(ConfigError, match="fixed batch of 2"):
        batch_range(fixed, (1, 1, 2), tmp_path)
    for sizes in ((0, 1, 1), (2, 1, 4), (1, 8, 4)):
        with pytest.raises(ConfigError, match="batch sizes are"):
            batch_range(dynamic, sizes, tmp_path)
    with pytest.raises(ArtifactError, match="does not say the shape"):
        batch_range({"inputs": []}, None, tmp_path)


def a_model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20, "mine": 1]>\n{text}')


SCATTER = 'y = ScatterElements <axis = 0, reduction = "add"> (x, i, x)'
REFUSED = {
    "NonZero": ("g (float[4,4] x) => (int64[2,n] y) { [count] y = NonZero (x) }", "NonZero (count): its number of"),
    "scatter": (f"g (float[4,4] x, int64[4,4] i) => (float[4,4] y) {{ [add_up] {SCATTER} }}", "reduction 'add'"),
    "bitwise": ("g (int32[4] x) => (int32[4] y) { [both] y = BitwiseAnd (x, x) }", "(both): it has no bitwise"),
    "no body": ("g (float[4] x) => (float[4] y) { [odd] y = mine.Op (x) }", "Op (odd): an operator of the"),
    "branch": (
        "g (bool c, float[4,4] x) => (y) { [pick] y = If (c) <then_branch = a () => (int64[2,n] p)"
        " { [inner] p = NonZero (x) }, else_branch = b () => (int64[2,n] q) { q = NonZero (x) }> }",
        "NonZero (inner in pick)",
    ),
}  # fmt: skip


@needs_rtx
@pytest.mark.parametrize("name", REFUSED)
def test_operators_that_it_cannot_take_are_named_before_its_parser_sees_them(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, said = REFUSED[name]
    onnx.save(a_model(text), tiny / "model.onnx")
    reseal(tiny)
    monkeypatch.setattr("sparsifiner_edge.runtime.build.run_job", lambda *_: pytest.fail("a worker was started"))
    before = snapshot(tiny)
    with pytest.raises(BackendError) as caught:
        rtx(tiny, "8.6")
    assert said in caught.value.what
    assert snapshot(tiny) == before


def reseal(folder: Path) -> None:
    manifest = json.loads((folder / BUNDLE_FILE).read_text())
    (folder / BUNDLE_FILE).unlink()
    seal_bundle(folder, {name: value for name, value in manifest.items() if name != "files"})


@needs_rtx
def test_what_the_parser_refuses_comes_back_with_its_node(tiny: Path) -> None:
    onnx.save(
        a_model("g (float[4,4] x, float[3] z) => (float[4,4] y) { [add_up] y = Add (x, z) }"), tiny / "model.onnx"
    )
    reseal(tiny)
    before = snapshot(tiny)
    with pytest.raises(Exception, match=r"(?s)cannot read the model: node add_up \(Add\)") as caught:
        rtx(tiny, "8.6")
    assert "Traceback" not in str(caught.value)
    assert snapshot(tiny) == before


# A worker that dies, hangs or is killed: a package of TensorRT-RTX's name that does so where the worker imports it.


def misbehaving(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    package = folder / "site" / "tensorrt_rtx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, sys, time\n"
        "__version__ = '1.7.1'\n"
        f"if any('build_worker' in word for word in sys.orig_argv):\n    {what}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "sys.stderr.write('corrupted list'); sys.stderr.flush(); os.abort()",
            r"ended by SIGABRT. It wrote:.*corrupted",
        ),
        ("os.kill(os.getpid(), 9)", r"(?s)ended by SIGKILL.*out of memory"),
        ("os.kill(os.getpid(), 11)", r"ended by SIGSEGV"),
        ("os._exit(3)", r"left with exit status 3. It wrote: nothing"),
        ("1 / 0", r"tensorrt_rtx cannot be imported: division by zero"),
        ("time.sleep(60)", r"(?s)took more than 4 s and was ended.*--timeout"),
    ],
)
def test_a_builder_that_dies_is_a_message_and_the_bundle_as_it_was(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    misbehaving(tmp_path, monkeypatch, what)
    before = snapshot(tiny)
    start = time.monotonic()
    job = {
        "backend": RTX,
        "model": str(tiny / "model.onnx"),
        "output": str(tmp_path / "x"),
        "engine": {},
        "settings": {},
    }
    with pytest.raises(BackendError, match=said):
        run_job(job, timeout_s=4 if "sleep" in what else 100)
    assert time.monotonic() - start < 50
    assert snapshot(tiny) == before


def started_build(tiny: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A build whose worker hangs, once it does; its process id is in `worker`."""
    arguments = [*PROGRAM, "build", str(tiny), "--backend", RTX, "--compute-capability", "8.6"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    limit = time.monotonic() + 100
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended_midway(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    misbehaving(
        tmp_path, monkeypatch, f"open({str(tmp_path / 'worker')!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    )
    before = snapshot(tiny)
    build = started_build(tiny, tmp_path)
    assert list(tiny.glob(".build.*"))
    with pytest.raises(ArtifactError, match="An engine is being built in"):
        require_replaceable(tiny, "bundle")
    build.send_signal(number)
    error = build.communicate()[1].decode()
    assert build.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in error
    assert_gone(int((tmp_path / "worker").read_text()))
    open_bundle(tiny)
    require_replaceable(tiny, "bundle")
    with bundle_scratch(tiny) as scratch:  # As the next build does first.
        assert list(tiny.glob(".build.*")) == [scratch]
    assert snapshot(tiny) == before


def assert_gone(pid: int) -> None:
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def test_engines_that_nothing_lists_are_swept(tiny: Path) -> None:
    (tiny / "engines").mkdir()
    (tiny / "engines" / "left.engine").write_bytes(b"from a build that was killed")
    require_replaceable(tiny, "bundle")
    (tiny / "engines" / "mine.txt").write_text("precious")
    with pytest.raises(ArtifactError, match=r"also holds engines/mine.txt, which is not ours"):
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
    assert {e["compute_capability"] for e in open_bundle(tiny)["engines"]} == {"8.6", "12.0"}
    assert not list(tiny.glob(".build.*"))


@needs_rtx
@pytest.mark.parametrize("change", ["exported anew", "gone"])
def test_a_bundle_that_changes_under_the_build(tiny: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    other = make_bundle(tiny.parent / "other", depth=3)
    from sparsifiner_edge.runtime import build as module

    real: Callable[..., dict[str, Any]] = module.run_job

    def meanwhile(*arguments: Any) -> dict[str, Any]:
        done = real(*arguments)
        if change == "gone":
            shutil.rmtree(tiny)
        else:
            shutil.copytree(other, tiny, dirs_exist_ok=True)
        return done

    monkeypatch.setattr(module, "run_job", meanwhile)
    if change == "gone":
        with pytest.raises((ArtifactError, FileNotFoundError)):
            rtx(tiny, "8.6")
        return
    with pytest.raises(ArtifactError, match="was exported anew while the engines were built"):
        rtx(tiny, "8.6")
    assert snapshot(tiny) == snapshot(other)


@needs_rtx
@needs_mounts
def test_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    arguments = ("build", tmp_path / "disk" / "b", "--backend", RTX, "--compute-capability", "8.6")
    outcome, names = in_mount(tmp_path, 100, f'cp -r "{tiny}" b', *arguments)
    assert_refused(outcome, "cannot be written: No space left on device")
    assert names == ["b", "b/golden.npz", "b/manifest.json", "b/model.onnx"]


@needs_rtx
@needs_mounts
def test_a_read_only_disk(tiny: Path, tmp_path: Path) -> None:
    arguments = ("build", tmp_path / "disk" / "b", "--backend", RTX, "--compute-capability", "8.6")
    prepare = f'cp -r "{tiny}" b; mount -o remount,ro "{tmp_path / "disk"}"'
    outcome, names = in_mount(tmp_path, 1000, prepare, *arguments)
    assert_refused(outcome, "cannot be written: Read-only file system")
    assert names == ["b", "b/golden.npz", "b/manifest.json", "b/model.onnx"]


def test_a_missing_package_gives_the_pip_command(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(Exception, match=r'(?s)tensorrt-rtx is not installed.*"sparsifiner-edge\[tensorrt-rtx\]"'):
        build_engine(tiny, RTX, compute_capabilities=["8.6"])


def test_without_a_gpu_the_capability_must_be_said(tiny: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"No NVIDIA driver|no CUDA|CUDA finds"):
        build_engine(tiny, RTX)


@needs_rtx
@pytest.mark.skipif(importlib.util.find_spec("polygraphy") is None, reason="polygraphy is in the extra dev")
@pytest.mark.parametrize("kind", ["edge", "dense"])
def test_polygraphy_finds_every_node_supported(tmp_path: Path, kind: str) -> None:
    sparsity = TINY_CONFIG if kind == "edge" else SparsityConfig(keep=1)
    bundle = vit_bundle(tmp_path / "b", sparsity, "fp16", 1)
    done = subprocess.run(
        [Path(sys.executable).with_name("polygraphy"), "inspect", "capability", str(bundle / "model.onnx")],
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Graph is fully supported by TensorRT" in done.stdout + done.stderr


@needs_rtx
def test_the_commands_of_the_documentation(tiny_student: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "engines.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    shutil.copytree(tiny_student, tmp_path / "student")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    engines = open_bundle(tmp_path / "bundle")["engines"]
    assert [(e["compute_capability"], e["precision"], e["batch"]["most"]) for e in engines] == [
        ("8.6", "fp16", 1), ("12.0", "fp16", 1)
    ]  # fmt: skip
    assert '"golden"' in done.stdout
