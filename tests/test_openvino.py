"""Tests of OpenVINO with every kind of sparse model, float and int8, in fp32 and bf16; operators in C++ and Python."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import pytest

from sparsifiner_edge import doctor
from sparsifiner_edge.errors import BackendError, MissingExtraError, SlowKernelsWarning
from sparsifiner_edge.machine import has_int8_products
from sparsifiner_edge.ops import native, reference
from sparsifiner_edge.ops.schema import DOMAIN, VERSION
from sparsifiner_edge.runtime import openvino as session_module
from sparsifiner_edge.runtime import session as runtime_session
from sparsifiner_edge.runtime.openvino import import_openvino
from sparsifiner_edge.sparse.student import save_student
from tests import flat
from tests.commands import assert_refused, call
from tests.everything import first
from tests.models import KINDS, TINY_CONFIG, student
from tests.native.test_kernels import BF16_SETS
from tests.once import Once

KNOWN = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
STUDENTS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("edge", "some dense", "pruned", "paper", "dense")},
    "batch 3": {"batch": 3},
    "any batch": {"batch": "dynamic"},
    "rectangle": {"img_size": (96, 160)},
    "int8": {"precision": "int8"},
    "fp16": {"precision": "fp16"},
}
"""A name in `KINDS`, or the differences from "edge"."""
Bundles = Callable[[str], Path]
"""Maps a name in `STUDENTS` to its bundle."""


@pytest.fixture(scope="module")
def bundles(once: Once, pictures: Path) -> Bundles:
    """Bundles of `STUDENTS`, exported on first use next to their sparse models."""

    def exported(name: str) -> Path:
        options = STUDENTS[name] | ({"calibrate": pictures} if name == "int8" else {})
        size = {"img_size": options.pop("img_size", 160)}

        def make(folder: Path) -> None:
            saved = save_student(student(sparsity=KINDS.get(name, TINY_CONFIG), **size), folder / "student")
            flat.export_bundle(saved, folder / name, tokens=True, **options)

        return once(f"openvino {name}", make) / name

    return exported


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(float), b.ravel().astype(float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("kernels", ["native", "portable"])
@pytest.mark.parametrize("name", first(STUDENTS, 2))
def test_gives_what_onnx_runtime_gives(bundles: Bundles, name: str, kernels: str) -> None:
    if name == "fp16" and kernels == "native":
        with pytest.raises(BackendError, match="The native kernels do not support float16"):
            flat.open_session(bundles(name), "openvino", kernels=kernels)
        return
    how = {"threads": 2, "kernels": kernels}
    with flat.open_session(bundles(name)) as ours, flat.open_session(bundles(name), "openvino", **how) as theirs:
        batch = 2 if name == "any batch" else ours.inputs[0].shape[0]
        shape = (batch, *ours.inputs[0].shape[1:])
        image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        wanted, got = ours.infer({"image": image}), theirs.infer({"image": image})
        assert [spec.name for spec in theirs.inputs + theirs.outputs] == [s.name for s in ours.inputs + ours.outputs]
        assert theirs.outputs[0].dtype == ours.outputs[0].dtype
        described = theirs.description
    # The paper's key lists contain ties.
    least = {"int8": 0.98, "fp16": 0.98, "paper": 0.999}.get(name, 0.99999)
    for output, value in wanted.items():
        assert got[output].shape == value.shape
        assert cosine(got[output], value) > least, output
    assert (described.backend, described.threads) == ("openvino", 2)
    if name == "dense":
        assert described.kernels == "none (standard operators)"
    elif kernels == "portable":
        assert described.kernels == "function bodies"
    elif name == "paper":
        assert described.kernels == f"native, {native.target()}; function bodies: LandmarkKeySelect"
    else:
        assert described.kernels == f"native, {native.target()}"
    int8 = "int8, rest fp32" if has_int8_products() else "int8, run in fp32: int8 products saturate on this CPU"
    assert described.precision == {"int8": int8, "fp16": "fp16, run in fp32"}.get(name, "fp32")


def answers_of_attention(session: Any) -> set[str]:
    """Return the outputs of attention nodes as OpenVINO computes them."""
    nodes = [node.get_rt_info() for node in session._compiled.get_runtime_model().get_ops()]
    named = {str(info["originalLayersNames"].astype(str)): info for info in nodes if "originalLayersNames" in info}
    return {info["outputPrecisions"].astype(str) for name, info in named.items() if "Attention" in name}


@pytest.mark.skipif("BF16" not in KNOWN, reason="the processor has no bf16 arithmetic")
@pytest.mark.parametrize("name", first(["edge", "some dense", "dense", "int8"]))
def test_bf16_is_what_really_runs(bundles: Bundles, name: str) -> None:
    bf16 = flat.open_session(bundles(name), "openvino", compute_precision="bf16")
    with flat.open_session(bundles(name), "openvino") as exact, bf16 as session:
        image = np.random.default_rng(0).integers(0, 256, exact.inputs[0].shape, dtype=np.uint8)
        wanted, got = exact.infer({"image": image}), session.infer({"image": image})
        assert session.description.precision == ("int8, rest bf16" if name == "int8" else "fp32, run in bf16")
        if name != "dense":
            attention = f", attention in {'bfloat16' if native.target() in BF16_SETS else 'float32'}"
            assert session.description.kernels == f"native, {native.target()}{attention}"
            assert answers_of_attention(session) == {"bf16" if native.target() in BF16_SETS else "f32"}
    # Random weights have near ties among keys and pairs.
    assert all(cosine(got[output], value) > 0.9 for output, value in wanted.items())
    assert any((got[output] != value).any() for output, value in wanted.items())


def test_an_inlined_file_runs_without_us(bundles: Bundles) -> None:
    """Inlined as described in docs/cpu.md."""
    image = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    core, file = import_openvino().Core(), bundles("some dense") / "model.onnx"
    with pytest.raises(RuntimeError, match="sparsifiner"):
        core.compile_model(file, "CPU")
    inlined = onnx.inliner.inline_local_functions(onnx.load(file)).SerializeToString()
    plain = core.compile_model(core.read_model(inlined, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with flat.open_session(bundles("some dense")) as session:
        wanted = session.infer({"image": image})
    assert all(cosine(plain({"image": image})[name], value) > 0.9999 for name, value in wanted.items())


def test_a_precision_that_the_processor_or_an_operator_lacks_is_refused(bundles: Bundles) -> None:
    why = r"cannot run \w+ in fp16" if "FP16" in KNOWN else r"no fp16 arithmetic \(OpenVINO: .*FP32"
    with pytest.raises(BackendError, match=rf"(?s){why}.*Leave --compute-precision out"):
        flat.open_session(bundles("edge"), "openvino", compute_precision="fp16")


@pytest.mark.parametrize(
    "precision", ["auto", pytest.param("bf16", marks=pytest.mark.skipif("BF16" not in KNOWN, reason="no bf16"))]
)
def test_signals_are_handled_where_they_were_before(precision: str, bundles: Bundles) -> None:
    """Runs in its own process: OpenVINO can crash it at the next signal by freeing data of a thread's handlers."""
    code = (
        "import gc, os, signal, sys\n"
        "from sparsifiner_edge import Execution, open_session\n"
        "heard = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))\n"
        "open_session(sys.argv[1], Execution(backend='openvino', compute_precision=sys.argv[2])).close()\n"
        "gc.collect()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print(len(heard))\n"
    )
    line = [sys.executable, "-c", code, str(bundles("edge")), precision]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_runs_of_several_threads_take_turns(bundles: Bundles) -> None:
    with flat.open_session(bundles("some dense"), "openvino", threads=2) as session:
        shape = session.inputs[0].shape
        images = [np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8) for i in range(3)]
        wanted = [session.infer({"image": image})["tokens"] for image in images]
        wrong: list[int] = []

        def run(number: int) -> None:
            for _ in range(10):
                if (session.infer({"image": images[number]})["tokens"] != wanted[number]).any():
                    wrong.append(number)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(run, range(3)))
        assert not wrong
    with pytest.raises(BackendError, match="is closed"):
        session.infer({"image": images[0]})
    session.close()


@pytest.mark.parametrize("name", first(["edge", "int8", "any batch"]))
def test_without_an_extension_for_this_openvino_python_calls_the_operators(
    bundles: Bundles, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    with flat.open_session(bundles(name), "openvino", threads=2) as session:
        wanted = session.infer({"image": image})
        assert session.description.kernels == f"native, {native.target()}"
    monkeypatch.setattr(session_module, "extension", lambda: None)
    monkeypatch.setattr(doctor, "extension", lambda: None)
    runtime_session._warn_slow.cache_clear()
    with (
        flat.open_session(bundles(name), "openvino", threads=2) as session,
        pytest.warns(SlowKernelsWarning, match=r"from Python, which is slower\. .*pip install --force-reinstall"),
    ):
        got = session.infer({"image": image})
    assert session.description.kernels == f"native, {native.target()}, called from Python"
    assert all((got[output] == value).all() for output, value in wanted.items())
    assert "called from Python" in doctor.examine().backends["openvino"].reason


def test_an_extension_is_of_one_openvino_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, library = native.openvino_extension(), native.library_path()
    assert library is not None
    assert found is not None, "built with this package, where OpenVINO was there before"
    (tmp_path / found.name).write_bytes(found.read_bytes()[:-1000])
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    assert native.openvino_extension() is None, "cut short"
    (tmp_path / found.name).write_bytes(found.read_bytes())
    assert native.openvino_extension() == tmp_path / found.name
    session_module.extension.cache_clear()
    assert session_module.extension() == tmp_path / found.name
    (tmp_path / found.name).write_bytes(library.read_bytes())
    session_module.extension.cache_clear()
    assert session_module.extension() is None, "whole, and no extension"
    session_module.extension.cache_clear()
    (tmp_path / found.name).rename(tmp_path / "libsparsifiner_openvino.1.so")
    assert native.openvino_extension() is None, "of another version"


def test_nodes_that_differ_in_an_attribute_are_two_and_a_file_cannot_say_its_precision() -> None:
    """OpenVINO merges nodes that it takes for equal."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20, "{DOMAIN}": {VERSION}]>
        two (float[1, 9, 24] qkv, float[1, 9] sizes) => (float[1, 9, 8] soft, float[1, 9, 8] sharp) {{
            soft = {DOMAIN}.DenseAttention <num_heads = 1, scale = 0.1, precision = 7> (qkv, sizes)
            sharp = {DOMAIN}.DenseAttention <num_heads = 1, scale = 2.0, precision = 7> (qkv, sizes)
        }}""")
    qkv, sizes = np.random.default_rng(0).normal(size=(1, 9, 24)).astype(np.float32), np.ones((1, 9), np.float32)
    session_module.bind(model, ["DenseAttention"], "float32")
    core = import_openvino().Core()
    core.add_extension(str(native.openvino_extension()))
    read, exact = core.read_model(model.SerializeToString(), b""), {"INFERENCE_PRECISION_HINT": "f32"}
    results = list(core.compile_model(read, "CPU", exact)([qkv, sizes]).values())
    wanted = [reference.dense_attention(qkv, sizes, num_heads=1, scale=scale) for scale in (0.1, 2.0)]
    for got, value in zip(results, wanted, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5)


def test_nothing_compiled_is_kept(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO would run a cached model unchecked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kernels in ("native", "portable"):
        flat.open_session(bundles("edge"), "openvino", kernels=kernels).close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FILE", "no-such.so")
    with flat.open_session(bundles("edge"), "openvino") as session:
        assert "function bodies (the native library is not built" in str(session.description.kernels)
    with pytest.raises(BackendError, match="The native library is not built"):
        flat.open_session(bundles("edge"), "openvino", kernels="native")

    def missing(*_: Any) -> None:
        raise MissingExtraError("openvino", "openvino")

    monkeypatch.setattr(session_module, "import_package", missing)
    with pytest.raises(MissingExtraError, match=r"\[openvino\]"):
        flat.open_session(bundles("edge"), "openvino")


def test_the_command_checks_it(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    checked = call(capsys, "bundle", "verify", bundles("some dense"), "--backend", "openvino")
    assert checked.code == 0, checked.err
    assert "(openvino)" in checked.out
    assert_refused(call(capsys, "build", bundles("edge"), "--backend", "openvino"), "openvino builds no engine")
