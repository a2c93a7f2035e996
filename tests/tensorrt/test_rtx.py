"""Tests of the real TensorRT-RTX: every kind of file builds without a GPU, and what it does not support is reported."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ArtifactError, BackendError, SparsifinerError
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.fp16 import convert
from sparsifiner_edge.export.graph import export_graph
from sparsifiner_edge.export.int8 import quantise
from sparsifiner_edge.export.sessions import file_runner
from sparsifiner_edge.profiles.roofline import MERGE_LAUNCHES
from sparsifiner_edge.runtime.build import build_engine
from sparsifiner_edge.runtime.tensorrt.baseline import dense_model
from sparsifiner_edge.sparse.patch import set_budget
from tests.commands import manifest_of, snapshot
from tests.everything import first
from tests.fakes.gpu import Gpu, install_cuda
from tests.flat import open_session
from tests.models import TINY_CONFIG, student
from tests.seal import reseal, seal_bundle
from tests.tensorrt.rtx import RTX, needs_rtx, rtx

pytestmark = [needs_rtx]
DYNAMIC = None


SPARSITY = {
    "edge": TINY_CONFIG,
    "dense": SparsityConfig(keep=1),
    "paper": SparsityConfig.for_preset("paper", keep=0.25),
    "pruned": SparsityConfig(keep=0.2, background_tokens=4, channels=8, token_keep=((0, 0.7),)),
    "merged": SparsityConfig(keep=0.2, background_tokens=4, channels=8, merge=(12, 2)),
    "merged alone": SparsityConfig(keep=1, merge=(12, 2)),
}


@pytest.fixture
def vit_bundle(once, tmp_path):
    """Maps (kind, precision, batch) to a bundle of two layers, exported once."""

    def copied(kind, precision, batch):
        made = once(f"rtx-{kind}-{precision}-{batch}", lambda folder: make_vit_bundle(folder, kind, precision, batch))
        return shutil.copytree(made, tmp_path / kind)

    return copied


def make_vit_bundle(folder: Path, kind: str, precision: str, batch: int | None) -> None:
    """Export like `export_bundle`, without its checks."""
    deployed = deploy(student(sparsity=SPARSITY[kind], depth=2))
    model = export_graph(deployed, 160, batch, deployed.output_names)
    if precision == "fp16":
        model = convert(model).model
    if precision == "int8":
        model = quantise(model, [smooth_images(160, batch or 1, seed) for seed in range(2)], "tensorrt")[0]
        model = convert(model).model
    onnx.save(model, folder / "model.onnx")
    image = smooth_images(160, batch or 1)
    outputs = {f"output.{name}": value for name, value in file_runner(model)(image).items()}
    np.savez(folder / "golden.npz", **{"input.image": image}, **outputs)
    entries = {
        "precision": precision,
        "ops": [f"sparsifiner::{function.name}" for function in model.functions],
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [batch or "batch", 160, 160, 3]}],
        "outputs": [],
        "tolerances": dict.fromkeys(deployed.output_names, 5e-2),
    }
    seal_bundle(folder, entries | ({} if precision == "fp32" else {"float16": {}}))


@pytest.mark.parametrize(
    ("kind", "precision", "batch", "capability"),
    first(
        [
            ("edge", "fp16", DYNAMIC, "12.0"),
            ("merged", "fp32", 1, "8.9"),
            ("edge", "int8", 2, "8.9"),
            ("dense", "fp32", DYNAMIC, "8.0"),
            ("dense", "int8", 1, "8.6"),
            ("paper", "fp16", 1, "8.9"),
            ("pruned", "fp16", DYNAMIC, "8.6"),
            ("merged", "int8", 1, "12.0"),
            ("merged alone", "fp32", DYNAMIC, "8.6"),
            ("merged alone", "int8", 2, "8.9"),
        ]
    ),
)
def test_every_kind_of_file_builds(vit_bundle, kind, precision, batch, capability):
    bundle = vit_bundle(kind, precision, batch)
    stages = []
    (engine,) = rtx(bundle, capability, progress=lambda stage, *_: stages.append(stage))
    sizes = (1, 1, 8) if batch is DYNAMIC else (batch,) * 3
    assert (engine["precision"], engine["compute_capability"]) == (precision, capability)
    assert tuple(engine["batch"].values()) == sizes
    assert engine["details"]["bytes"] == (bundle / engine["file"]).stat().st_size > 100_000
    assert re.search("no CUDA|No NVIDIA", engine["details"]["variants"]["bodies"]["failed"])
    assert stages == [f"1 of 1, compute capability {capability}: building bodies"]
    assert engine["details"]["kernels"] == "bodies"
    variants = engine["details"]["variants"]
    sparse, merges = kind in ("edge", "paper", "pruned", "merged"), kind.startswith("merged")
    assert list(variants) == ["bodies", *["dense"] * sparse, *["unmerged"] * merges]
    assert all("nothing can be timed here" in variants[name]["failed"] for name in list(variants)[1:])
    manifest = manifest_of(bundle)
    assert manifest["engines"] == [engine]
    for part in ("sm" + capability.replace(".", ""), precision, engine["version"], "linux", "x86_64"):
        assert part in Path(engine["file"]).name


def compiled_kernels(engine: bytes) -> dict[str, int]:
    """Return the kernel names in an engine file of TensorRT-RTX 1.7, and those of fused attention."""
    fused = engine.count(b"struct _gemm_mha_v2_callback {")
    return {"kernels": len(re.findall(rb"__myl_[A-Za-z]+(?![A-Za-z_])", engine)) + fused, "fused_attention": fused}


@pytest.mark.everything
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_merged_attention_is_fused_and_merging_takes_the_kernels_that_the_estimate_counts(vit_bundle, precision):
    """Token sizes are a bias of the scores and must not prevent fused attention."""
    kernels = {}
    for name in ("dense", "merged alone"):
        bundle = vit_bundle(name, precision, 1)
        (engine,) = rtx(bundle, "8.6")
        found = compiled_kernels((bundle / engine["file"]).read_bytes())
        assert found["fused_attention"] == 2, name
        kernels[name] = found["kernels"]
    by_layer = (kernels["merged alone"] - kernels["dense"]) / 2
    assert by_layer == pytest.approx(MERGE_LAUNCHES["bodies"], abs=3)


def test_the_dense_file_of_merged_tokens_is_what_dense_layers_compute() -> None:
    sparsity = SPARSITY["merged"]
    made = student(sparsity=sparsity, depth=2)
    image, files = smooth_images(160), []
    for keep in (0.2, 1.0):
        set_budget(made.model, dataclasses.replace(sparsity, keep=keep))
        deployed = deploy(made)
        files.append(export_graph(deployed, 160, 1, deployed.output_names))
    dense = dense_model(copy.deepcopy(files[0]))
    assert {f.name for f in files[0].functions} > {"KeySelect", "SparseAttention"}
    assert {f.name for f in dense.functions} == {"DenseAttention", "MatchTokens", "MergeTokens"}
    got, wanted = file_runner(dense)(image), file_runner(files[1])(image)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_an_engine_is_refused_before_anything_deserialises_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx

    rtx(tiny, "8.6")
    monkeypatch.setattr(tensorrt_rtx, "Runtime", lambda *_: pytest.fail("an object of TensorRT was made"))
    if not Path("/dev/nvidiactl").exists():
        with pytest.raises(BackendError, match=r"No NVIDIA driver|no CUDA"):
            open_session(tiny, RTX)
        with pytest.raises(BackendError, match=r"No NVIDIA driver|no CUDA"):
            build_engine(tiny, RTX)  # the capability must be given
    install_cuda(monkeypatch, Gpu("NVIDIA L4", (8, 9), 24 << 30, False, 13000))
    with pytest.raises(BackendError, match=r"built for compute capability 8\.6, NVIDIA L4 has 8\.9") as caught:
        open_session(tiny, RTX)
    assert f"sparsifiner-edge build {tiny} --backend tensorrt-rtx --compute-capability 8.9" in caught.value.fix
    with pytest.raises(BackendError, match=r"kernels is native, but an engine.s kernels are chosen when it is built"):
        open_session(tiny, RTX, kernels="native")


def test_a_model_that_names_another_file_never_meets_the_parser(tiny: Path) -> None:
    model = onnx.load(tiny / "model.onnx")
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    (tiny / "model.onnx").write_bytes(model.SerializeToString())
    reseal(tiny)
    with pytest.raises(ArtifactError, match="in another file, '/etc/passwd'"):
        rtx(tiny, "8.6")


@pytest.mark.everything
def test_a_truncated_engine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = rtx(tiny, "8.6")
    path = tiny / engine["file"]
    path.write_bytes(path.read_bytes()[: 2 << 10])
    reseal(tiny, engines=[engine])  # The GPU is fake; TensorRT-RTX itself rejects the file.
    install_cuda(monkeypatch, Gpu("NVIDIA RTX A2000", (8, 6), 12 << 30, False, 13000))
    with pytest.raises(
        BackendError, match=r"(?s)fails to load an engine \(.*sm86.*built by another version or is damaged"
    ):
        open_session(tiny, RTX)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(float[4,4] x) => (int64[2,n] y) { [count] y = NonZero (x) }", "NonZero"),
        (
            "(float[4,4] x, float[3] z) => (float[4,4] y) { [outer] y = mine.Both (x, z) }\n"
            '<domain: "mine", opset_import: ["": 20]> Both (x, z) => (y) { [sum] y = Add (x, z) }',
            r"cannot read the model: node sum \(Add\) in outer \(Both\): ",
        ),
        ("(float[b,h] x) => (float[b,h] y) { y = Neg (x) }", r"shape \[-1, -1\]: only the batch may be dynamic"),
        ("", r"(?s)has uint8.*--int8-target tensorrt"),  # int8 for the CPU
    ],
)
def test_files_that_it_cannot_take_are_named(tiny: Path, text: str, said: str) -> None:
    if text:
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20, "mine": 1]>\ng {text}')
        onnx.save(model, tiny / "model.onnx")
    before = snapshot(reseal(tiny, precision="fp32" if text else "int8"))
    with pytest.raises(SparsifinerError, match=said):
        rtx(tiny, "8.6")
    assert snapshot(tiny) == before


@pytest.mark.everything
def test_the_commands_of_the_documentation(tiny_student: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "nvidia.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    shutil.copytree(tiny_student, tmp_path / "student")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    engines = manifest_of(tmp_path / "bundle")["engines"]
    assert [(e["compute_capability"], e["precision"], e["batch"]["most"]) for e in engines] == [
        ("8.6", "fp16", 1),
        ("12.0", "fp16", 1),
    ]
    assert re.search("golden pair.*onnxruntime", done.stdout)
    assert done.stdout.count("dense: not built: nothing can be timed here (") == 2
    assert done.stdout.count("kept: bodies, nothing was measured") == 2
