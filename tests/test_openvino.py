"""OpenVINO as a backend: the operators of every kind of student in its graph, plain and int8, in fp32 and bf16."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.machine import has_int8_products
from sparsifiner_edge.ops import native
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime import openvino as session_module
from sparsifiner_edge.runtime.openvino import import_openvino
from sparsifiner_edge.runtime.verify import verify_bundle
from sparsifiner_edge.sparse.student import save_student
from tests.commands import call
from tests.everything import first
from tests.models import TINY, student
from tests.native.test_replay import BF16_SETS
from tests.once import Once

KNOWN = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
STUDENTS: dict[str, tuple[SparsityConfig, dict[str, Any]]] = {
    "edge": (SparsityConfig(keep=0.2, cells=4, channels=8), {}),
    "merged": (SparsityConfig(keep=(0.2, 0.5, 1.0), cells=4, channels=8, merge=(9, 0)), {}),
    "pruned": (SparsityConfig(keep=0.2, cells=4, channels=8, token_keep=((2, 0.5),)), {}),
    "paper": (SparsityConfig.for_preset("paper", keep=0.2, channels=8), {}),
    "dense": (SparsityConfig(keep=1.0), {}),
    "batch 3": (SparsityConfig(keep=0.2, cells=4, channels=8), {"batch": 3}),
    "any batch": (SparsityConfig(keep=0.2, cells=4, channels=8), {"batch": "dynamic"}),
    "rectangle": (SparsityConfig(keep=0.2, cells=4, channels=8), {"img_size": (96, 160)}),
    "int8": (SparsityConfig(keep=0.2, cells=4, channels=8), {"precision": "int8"}),
    "fp16": (SparsityConfig(keep=0.2, cells=4, channels=8), {"precision": "fp16"}),
}
Bundles = Callable[[str], Path]
"""One of `STUDENTS` -> its bundle."""


@pytest.fixture(scope="module")
def bundles(once: Once, pictures: Path) -> Bundles:
    """Of each of `STUDENTS`, exported when it is first asked for; its student lies beside it."""

    def exported(name: str) -> Path:
        sparsity, given = STUDENTS[name]
        size = {key: value for key, value in given.items() if key == "img_size"}
        options = {key: value for key, value in given.items() if key not in size}
        if options.get("precision") == "int8":
            options["calibrate"] = pictures

        def make(folder: Path) -> None:
            saved = save_student(student(TINY, sparsity, **size), folder / "student")
            export_bundle(saved, folder / name, tokens=True, **options)

        return once(f"openvino {name}", make) / name

    return exported


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(float), b.ravel().astype(float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("kernels", ["native", "portable"])
@pytest.mark.parametrize("name", first(STUDENTS, 2))
def test_gives_what_onnx_runtime_gives(bundles: Bundles, name: str, kernels: str) -> None:
    if name == "fp16" and kernels == "native":
        with pytest.raises(BackendError, match="The native kernels take no float16"):
            open_session(bundles(name), "openvino", kernels=kernels)
        return
    with open_session(bundles(name)) as ours, open_session(bundles(name), "openvino", 2, kernels) as theirs:
        batch = 2 if name == "any batch" else ours.inputs[0].shape[0]
        shape = (batch, *ours.inputs[0].shape[1:])
        image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        wanted, got = ours.infer({"image": image}), theirs.infer({"image": image})
        assert [spec.name for spec in theirs.inputs + theirs.outputs] == [s.name for s in ours.inputs + ours.outputs]
        assert theirs.outputs[0].dtype == ours.outputs[0].dtype
        described = theirs.description
    # The paper's lists have ties.
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
    int8 = "int8, rest fp32" if has_int8_products() else "int8, run in fp32: this processor's products of int8 saturate"
    assert described.precision == {"int8": int8, "fp16": "fp16, run in fp32"}.get(name, "fp32")


@pytest.mark.skipif("BF16" not in KNOWN, reason="the processor has no bf16 arithmetic")
@pytest.mark.parametrize("name", first(["edge", "merged", "dense", "int8"]))
def test_bf16_is_what_really_runs(bundles: Bundles, name: str) -> None:
    bf16 = open_session(bundles(name), "openvino", precision="bf16")
    with open_session(bundles(name), "openvino") as exact, bf16 as session:
        image = np.random.default_rng(0).integers(0, 256, exact.inputs[0].shape, dtype=np.uint8)
        wanted, got = exact.infer({"image": image}), session.infer({"image": image})
        assert session.description.precision == ("int8, rest bf16" if name == "int8" else "fp32, run in bf16")
        if name != "dense":
            attention = f", attention in {'bfloat16' if native.target() in BF16_SETS else 'float32'}"
            assert session.description.kernels == f"native, {native.target()}{attention}"
    # Random weights have close calls among keys and pairs.
    assert all(cosine(got[output], value) > 0.9 for output, value in wanted.items())
    assert any((got[output] != value).any() for output, value in wanted.items())


@pytest.mark.skipif("FP16" in KNOWN, reason="the processor has fp16 arithmetic")
def test_an_inlined_file_runs_without_us(bundles: Bundles) -> None:
    """As docs/cpu.md makes it."""
    image = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    core, file = import_openvino().Core(), bundles("merged") / "model.onnx"
    with pytest.raises(RuntimeError, match="sparsifiner"):
        core.compile_model(file, "CPU")
    inlined = onnx.inliner.inline_local_functions(onnx.load(file)).SerializeToString()
    plain = core.compile_model(inlined, b"", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with open_session(bundles("merged")) as session:
        wanted = session.infer({"image": image})
    assert all(cosine(plain({"image": image})[name], value) > 0.9999 for name, value in wanted.items())


@pytest.mark.skipif("FP16" in KNOWN, reason="the processor has fp16 arithmetic")
def test_a_precision_that_the_processor_lacks_is_refused(bundles: Bundles) -> None:
    with pytest.raises(BackendError, match=r"(?s)no fp16 arithmetic \(OpenVINO: .*FP32.*Leave --precision out"):
        open_session(bundles("edge"), "openvino", precision="fp16")


@pytest.mark.parametrize(
    "precision", ["auto", pytest.param("bf16", marks=pytest.mark.skipif("BF16" not in KNOWN, reason="no bf16"))]
)
def test_signals_are_handled_where_they_were_before(precision: str, bundles: Bundles) -> None:
    """In a process of its own: OpenVINO frees what it gives a thread's handlers, and the next signal would end it."""
    code = (
        "import gc, os, signal, sys\n"
        "from sparsifiner_edge.runtime import open_session\n"
        "heard = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))\n"
        "open_session(sys.argv[1], 'openvino', precision=sys.argv[2]).close()\n"
        "gc.collect()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print(len(heard))\n"
    )
    line = [sys.executable, "-c", code, str(bundles("edge")), precision]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_runs_of_several_threads_take_turns(bundles: Bundles) -> None:
    with open_session(bundles("merged"), "openvino", 2) as session:
        shape = session.inputs[0].shape
        images = [np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8) for i in range(3)]
        wanted = [session.infer({"image": image})["tokens"] for image in images]
        wrong: list[int] = []

        def run(number: int) -> None:
            for _ in range(10):
                if (session.infer({"image": images[number]})["tokens"] != wanted[number]).any():
                    wrong.append(number)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
    with pytest.raises(BackendError, match="is closed"):
        session.infer({"image": images[0]})
    session.close()


def test_nothing_compiled_is_kept(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO would run it unchecked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kernels in ("native", "portable"):
        open_session(bundles("edge"), "openvino", kernels=kernels).close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FILE", "no-such.so")
    with open_session(bundles("edge"), "openvino") as session:
        assert "function bodies (the native library is not built" in str(session.description.kernels)
    with pytest.raises(BackendError, match="The native library is not built"):
        open_session(bundles("edge"), "openvino", kernels="native")

    def missing(*_: Any) -> None:
        raise MissingExtraError("openvino", "openvino")

    monkeypatch.setattr(session_module, "import_package", missing)
    with pytest.raises(MissingExtraError, match=r"sparsifiner-edge\[openvino\]"):
        open_session(bundles("edge"), "openvino")


@pytest.mark.everything
def test_every_command_takes_it(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    verify_bundle(bundles("merged"), backend="openvino", kernels="portable")
    for name in ("edge", "dense", "int8") if "BF16" in KNOWN else ():
        checked = call(capsys, "bundle", "verify", bundles(name), "--backend", "openvino", "--precision", "bf16")
        assert checked.code == 0, checked.err
        assert "(openvino)" in checked.out
    refused = call(capsys, "build", bundles("edge"), "--backend", "openvino")
    assert (refused.code, "openvino builds no engine" in refused.err) == (2, True)
