"""Tests of exported files: structure, agreement with torch, batches, metadata and the oldest supported runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.export.check import check_export, smooth_images
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.graph import check_structure, export_graph
from sparsifiner_edge.export.sessions import file_runner, with_outputs
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.bodies import INPUT_PREFIX
from sparsifiner_edge.ops.schema import VERSION
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.sparse.hosts.timm import preprocessing
from sparsifiner_edge.sparse.student import Student, save_student
from sparsifiner_edge.sparse.weights import normalise
from tests import flat
from tests.commands import manifest_of
from tests.everything import first
from tests.flat import load_student
from tests.models import student

OLD_RUNTIME = Path(sys.prefix) / "onnxruntime-1.21"
"""Made by `make test` (target .dev)."""


@pytest.fixture
def bundle(exported: Path) -> Path:
    return exported / "bundle"


@pytest.fixture
def dense(exported: Path) -> Path:
    return exported / "dense"


def export_shallow(made: Student, output: Path, depth: int = 2, **options: Any) -> Path:
    """Export only the first layers of a sparse model: each layer contains what is specific to an architecture."""
    made.model.blocks = made.model.blocks[:depth]
    example, pixels = torch.zeros(1, 3, *made.model.patch_embed.img_size), made.normalisation
    return flat.export_model(made.model, example, output, normalise=(pixels.mean, pixels.std), **options)


def model_of(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "model.onnx")


def tensor_shapes(model: onnx.ModelProto, image: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that a run of the inlined model produces."""
    inlined = onnx.inliner.inline_local_functions(model)
    names = {name for node in inlined.graph.node for name in node.output if name}
    run = file_runner(with_outputs(inlined, names - {output.name for output in inlined.graph.output}))
    return {name: np.shape(value) for name, value in run(image).items()}


def two_token_axes(shapes: dict[str, tuple[int, ...]], patches: int, widths: set[int]) -> list[str]:
    """Return the tensors with two axes of at least `patches` that are not channel widths."""
    return [n for n, s in shapes.items() if sum(size >= patches and size not in widths for size in s) >= 2]


def test_no_tensor_of_a_sparse_layer_has_two_token_axes(bundle: Path, dense: Path) -> None:
    # 100 patches, 101 tokens. The channel widths 64, 192 and 256 differ from both; the image has pixel axes.
    widths = {160, 192, 256}
    image = smooth_images(160)
    assert two_token_axes(tensor_shapes(model_of(bundle), image), 100, widths) == []
    assert len(two_token_axes(tensor_shapes(model_of(dense), image), 100, widths)) >= 6


def test_nodes_bodies_and_versions(bundle: Path, dense: Path) -> None:
    model = model_of(bundle)
    kinds = [n.op_type for n in model.graph.node if n.domain == "sparsifiner"]
    assert kinds.count("KeySelect") == kinds.count("SparseAttention") == 6
    assert {f.name for f in model.functions} == {"KeySelect", "SparseAttention"}
    assert all(name.startswith(INPUT_PREFIX) for function in model.functions for name in function.input)
    assert model.graph.node[0].op_type == "Cast"
    assert model.ir_version <= 10
    assert {(e.domain, e.version) for e in model.opset_import} == {("", 20), ("sparsifiner", VERSION)}
    onnx.checker.check_model(model, full_check=True)
    assert not [n for n in model_of(dense).graph.node if n.domain]
    assert not model_of(dense).functions


def test_manifest_and_metadata(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    assert set(manifest["files"]) == {"model.onnx", "golden.npz", "labels.txt"}
    assert manifest["inputs"] == [{"name": "image", "dtype": "uint8", "shape": [1, 160, 160, 3]}]
    assert [(o["name"], o["shape"]) for o in manifest["outputs"]] == [
        ("logits", [1, 1000]),
        ("features", [1, 64]),
        ("tokens", [1, 101, 64]),
    ]
    assert manifest["sparsity"]["keep"] == 0.2
    assert manifest["check"]["kernels_run"] == ["portable", "native"]
    metadata = {e.key: e.value for e in model_of(bundle).metadata_props}
    assert {"name", "version", "licence", "classes", "logits", "features", "tokens"} <= set(metadata)
    assert len((bundle / "labels.txt").read_text().splitlines()) == 1000
    json.dumps(manifest, allow_nan=False)


def test_a_bundle_runs_from_pixels_as_torch_does(bundle: Path) -> None:
    made = student().model
    image = smooth_images(160, seed=5)
    with torch.no_grad():
        expected = made(normalise(torch.from_numpy(image), preprocessing(made))).numpy()
    for kernels, said in (("portable", "function bodies"), ("native", f"native, {native.target()}")):
        with flat.open_session(bundle, kernels=kernels) as session:
            assert session.description.kernels == said
            got = session.infer({"image": image})["logits"]
            check_golden(session, open_bundle(bundle))
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.ptp(expected))


@pytest.mark.parametrize(
    ("name", "options", "keep"),
    first(
        [
            ("test_vit2", {}, 0.3),
            ("deit_tiny_distilled_patch16_224", {"img_size": 96}, (1, 1, 0.3)),
            ("vit_small_patch14_reg4_dinov2", {"img_size": 98}, 0.3),
            ("deit3_small_patch16_224", {"img_size": 96}, 0.3),
            ("vit_small_patch16_dinov3", {"img_size": 96}, (0.3, 1, 0.3)),
            ("eva02_tiny_patch14_224", {"img_size": 98}, 0.3),
            ("vit_small_patch16_rope_mixed_224", {"img_size": 96}, 0.3),
        ]
    ),
)
def test_architectures(name: str, options: dict[str, Any], keep: Any, tmp_path: Path) -> None:
    """Random layer scale is folded; every batch gives the result of each image, as torch does."""
    made = student(name, SparsityConfig(keep=keep, background_tokens=5, channels=8), **options)
    with torch.no_grad():
        for key, value in made.model.named_parameters():
            if "gamma" in key:
                value.copy_(torch.rand_like(value) + 0.5)
    made = load_student(save_student(made, tmp_path / "s"))
    bundle = export_shallow(made, tmp_path / "b", depth=3, batch="dynamic")
    manifest = manifest_of(bundle)
    expected = {"sparsifiner::KeySelect", "sparsifiner::SparseAttention"}
    assert set(manifest["ops"]) == expected | ({"sparsifiner::DenseAttention"} if keep != 0.3 else set())
    assert manifest["inputs"][0]["shape"][0] == "batch"
    assert manifest["check"]["batches_run"] == [1, 3]
    assert min(manifest["check"]["least_row_cosines"].values()) >= 0.9999
    assert not [tensor.name for tensor in model_of(bundle).graph.initializer if "gamma" in tensor.name]
    x = smooth_images(made.img_size, 2)
    with torch.no_grad():
        wanted = made.model(normalise(torch.from_numpy(x), preprocessing(made.model))).numpy()
    with flat.open_session(bundle) as session:
        together, *alone = (session.infer({"image": part})[session.outputs[0].name] for part in (x, x[:1], x[1:]))
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-3 * np.ptp(wanted))
    assert np.abs(together - wanted).max() < 0.02 * np.ptp(wanted)


def wrong_positions(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith("pos_embed"))
    wrong = np.cos(np.arange(tensor.dims[1] * tensor.dims[2])).reshape(tensor.dims)
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong.astype(np.float32), tensor.name))


def wrong_body(operator: str, output: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        body = next(f for f in model.functions if f.name == operator)
        next(n for n in body.node if n.output[0] == output).op_type = "Neg"

    return change


@pytest.mark.parametrize(
    "change", [wrong_positions, wrong_body("SparseAttention", "log_rest"), wrong_body("KeySelect", "log_distance")]
)
def test_a_wrong_file_fails_and_says_where(change: Callable[[onnx.ModelProto], None]) -> None:
    deployed = deploy(student())
    model = export_graph(deployed, 160, 1, deployed.output_names)
    change(model)
    said = r"Output 'logits' at batch 1 differs from torch: at \[0, \d+\] .* instead of .*% of the"
    with pytest.raises(GateError, match=said):
        check_export(model, deployed, 160, (1,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.opset_import.add(domain="com.microsoft", version=1), "com.microsoft"),
        (lambda m: m.functions[0].node.add(op_type="ScatterND", output=["x"]), "ScatterND"),
    ],
)
def test_structure_that_runtimes_refuse(bundle: Path, change: Any, message: str) -> None:
    model = model_of(bundle)
    check_structure(model)
    change(model)
    with pytest.raises(GateError, match=message):
        check_structure(model)


@pytest.mark.skipif(not OLD_RUNTIME.is_dir(), reason=f"{OLD_RUNTIME} is made by `make test`")
def test_onnx_runtime_1_21_runs_every_structure(bundle: Path, dense: Path, tmp_path: Path) -> None:
    made = {"sparse": bundle, "dense": dense}
    for name, sparsity, options in (
        ("vit_medium_patch16_gap_240", SparsityConfig(keep=0.3, background_tokens=0), {"img_size": 96}),
        ("test_vit", SparsityConfig(keep=(0.3, 1), background_tokens=5, channels=8), {}),
        ("eva02_tiny_patch14_224", SparsityConfig(keep=0.3, background_tokens=4, merge=(6, 0)), {"img_size": 112}),
    ):
        made[name] = export_shallow(student(name, sparsity, **options), tmp_path / name, batch="dynamic")
    script = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "assert ort.__version__.startswith('1.21'), ort.__version__\n"
        "for folder in sys.argv[1:]:\n"
        "    golden = np.load(folder + '/golden.npz')\n"
        "    session = ort.InferenceSession(folder + '/model.onnx', providers=['CPUExecutionProvider'])\n"
        "    names = [o.name for o in session.get_outputs()]\n"
        "    for name, got in zip(names, session.run(names, {'image': golden['input.image']})):\n"
        "        wanted = golden['output.' + name]\n"
        "        scale = np.ptp(wanted) or np.abs(wanted).max()\n"
        "        assert np.abs(got - wanted).max() <= 1e-3 * scale, (folder, name)\n"
    )
    command = [sys.executable, "-c", script, *map(str, made.values())]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(OLD_RUNTIME)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
