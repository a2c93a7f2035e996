"""Tests that an engine's kernels are chosen by measurement: a fake TensorRT builds, times and checks variants."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest

from sparsifiner_edge.bundle.kernels import NAMESPACE
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.export.export import ExportOptions, export_student
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.profiles.boards.board import load_board
from sparsifiner_edge.runtime import golden
from sparsifiner_edge.runtime.build import build_engine, verdict
from sparsifiner_edge.runtime.golden import beyond_text, check_golden
from sparsifiner_edge.runtime.tensorrt import plugin_v3
from tests.fakes.tensorrt import Behaviour
from tests.flat import open_session
from tests.models import student
from tests.seal import reseal, seal_bundle
from tests.sparse_graph import merging_graph, sparse_model

pytest.importorskip("triton", reason="triton is not installed")

OPERATORS = {sparse_model: ("KeySelect", "SparseAttention"), merging_graph: ("MatchTokens", "MergeTokens")}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Maps (folder, graph, kernels, shared) to a bundle with kernels as export compiles them for a board."""
    compiled = {}

    def make(folder, graph=sparse_model, kernels=True, shared=None):
        folder.mkdir()
        model = graph(dtype=np.float16)
        onnx.save(model, folder / "model.onnx")
        image = np.random.default_rng(1).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
        golden = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})[0]
        np.savez(folder / "golden.npz", **{"input.image": image, "output.features": golden})
        if kernels and graph not in compiled:
            compiled[graph] = tmp_path_factory.mktemp("compiled")
            board_files(model, "tiny", load_board("jetson-orin-nano-8gb"), compiled[graph])
        if kernels:
            shutil.copytree(compiled[graph] / "kernels", folder / "kernels")
        if shared is not None:
            table = folder / "kernels" / "sm87.json"
            table.write_text(re.sub(r'"shared": \d+', f'"shared": {shared}', table.read_text()))
        seal_bundle(
            folder,
            {
                "precision": "fp16",
                "ops": [f"{DOMAIN}::{name}" for name in OPERATORS[graph]],
                "inputs": [{"name": "image", "dtype": "uint8", "shape": ["batch", 8, 8, 3]}],
                "outputs": [{"name": "features", "dtype": "float16", "shape": ["batch", 64]}],
                "tolerances": {"features": 1e-4},
            },
        )
        return folder

    return make


@pytest.fixture
def machine(machine):
    """A machine whose run times are determined by the operators in the model."""

    def make(version, graph=sparse_model, device=(), **values):
        behaviour = Behaviour(original=graph(dtype=np.float16).SerializeToString(), milliseconds=values)
        return machine(version, behaviour, **dict(device))

    return make


ONE = (1, 1, 1)


def details(folder, batch=ONE, **options):
    """Return the details of the engine that is built."""
    return build_engine(folder, "tensorrt", batch=batch, **options).engines[0].details


def test_the_fastest_that_gives_the_golden_output_wins(tmp_path, bundle, machine):
    gpu, behaviour = machine("10.9", attend=1.0, DenseAttention=1.5, SparseAttention=3.0)
    folder = bundle(tmp_path / "b")
    found = details(folder)
    assert found.kernels == "plugin"
    times = {name: entry.compute_ms for name, entry in found.variants.items()}
    assert times == {"bodies": 3.0, "plugin": 1.0, "dense": 1.5}
    assert verdict(found) == [
        "bodies: 3.000 ms",
        "plugin: 1.000 ms",
        "dense: 1.500 ms",
        "kept: plugin, the fastest of those",
    ]
    assert behaviour.seen["aot_impl"] == behaviour.seen["register"]
    assert any(name.startswith(f"{NAMESPACE}::attend_") for name in behaviour.seen["register"])
    with open_session(folder, "tensorrt") as session:
        assert session.description.kernels == "CUDA kernels, as a plugin"
        assert check_golden(session, open_bundle(folder))
    assert len(list((folder / "engines").iterdir())) == 1
    assert gpu.live() == {}


def test_before_10_9_plugins_are_in_python_for_any_batch_and_shared_memory(tmp_path, bundle, machine, monkeypatch):
    gpu, behaviour = machine("10.3", attend=1.0, DenseAttention=1.5, SparseAttention=3.0)
    folder = bundle(tmp_path / "b", shared=96 << 10)
    found = details(folder, batch=None)
    assert found.kernels == "plugin"
    creators = behaviour.seen.pop("creators")
    assert len(creators) == len(set(creators)) == 3
    assert any(name.startswith(f"{NAMESPACE}::attend_") for name in creators)
    assert behaviour.seen["aot_impl"] == []
    monkeypatch.setattr(plugin_v3, "_registered", {})  # Another process opens it.
    with open_session(folder, "tensorrt") as session:
        assert check_golden(session, open_bundle(folder))
    assert behaviour.seen["creators"] == creators
    monkeypatch.setattr(plugin_v3, "_registered", {})
    behaviour.seen["takes plugins"] = False
    with pytest.raises(BackendError, match=r"TensorRT 10\.3\.0 rejects the plugin \w+_[0-9a-f]+\.\n.*portable"):
        open_session(folder, "tensorrt")
    assert gpu.live() == {}


def test_dense_is_kept_where_sparse_is_slower(tmp_path, bundle, machine):
    machine("10.3", DenseAttention=1.0, SparseAttention=3.0)
    folder = bundle(tmp_path / "b", kernels=False)
    found = details(folder)
    assert found.kernels == "dense"
    assert verdict(found)[-1] == "kept: dense, the fastest of those"
    cosine = found.chosen.golden["features"]["mean_cosine"]
    assert 0.97 <= cosine < 0.99  # its answer differs by more than the bundle's tolerance
    assert found.chosen.golden["features"]["range_relative_error"] > found.chosen.golden["features"]["tolerance"]
    assert beyond_text(found.chosen.golden["features"]) == f" (dense attention: cosine {cosine:.4f})"
    with open_session(folder, "tensorrt") as session:
        assert session.description.kernels == "dense attention"
        assert check_golden(session, open_bundle(folder))


def test_dense_that_answers_too_differently_is_not_kept(tmp_path, bundle, machine, monkeypatch):
    machine("11.4", DenseAttention=1.0, SparseAttention=3.0)
    monkeypatch.setattr(golden, "LEAST_DENSE_COSINE", 0.99)
    found = details(bundle(tmp_path / "b", kernels=False))
    assert found.kernels == "bodies"
    assert "of dense attention has mean cosine 0.98" in found.variants["dense"].golden
    assert "; not kept: Output 'features' of dense attention" in verdict(found)[2]


def test_the_choice_can_be_made_by_hand(tmp_path, bundle, machine):
    machine("10.9", DenseAttention=1.0)
    folder = bundle(tmp_path / "b")
    for kernels, kept in (("portable", "bodies"), ("native", "plugin")):
        found = details(folder, kernels=kernels)
        assert (found.kernels, set(found.variants), verdict(found)) == (kept, {kept}, [])
        assert len(list((folder / "engines").iterdir())) == 1  # replaces the previous one


CARD = {"name": "NVIDIA A2", "sm": (8, 7), "integrated": False}


@pytest.mark.parametrize(
    ("version", "kernels", "batch", "message"),
    [
        ("10.3", {"kernels": False}, ONE, "the bundle has no kernels for NVIDIA A2; export it with --board"),
        ("10.9", {"kernels": False}, ONE, "the bundle has no kernels for NVIDIA A2; export it with --board"),
        ("10.9", {"shared": (48 << 10) + 16}, ONE, "a kernel takes 48 KiB of shared memory, and more than 48"),
        (
            "10.9",
            {},
            None,
            r"an engine with these kernels takes one batch size, not 1 to 8, .*issues/4849\); give --batch SIZE",
        ),
    ],
)
def test_a_plugin_that_is_not_possible_says_why(tmp_path, bundle, machine, version, kernels, batch, message):
    machine(version, device=CARD)
    folder = bundle(tmp_path / "b", **kernels)
    with pytest.raises(BackendError, match=f"The CUDA kernels cannot be used: {message}"):
        build_engine(folder, "tensorrt", batch=batch, kernels="native")
    found = details(folder, batch)
    assert re.match(f"not built: {message}", found.variants["plugin"].failed)
    assert found.variants["bodies"].compute_ms == found.variants["dense"].compute_ms == 2.0


def test_a_dense_model_that_merges_takes_the_plugin_too(tmp_path, bundle, machine):
    """There is no dense attention to compare with: the model already has it."""
    machine("10.9", merging_graph, merge=1.0, MergeTokens=3.0)
    found = details(bundle(tmp_path / "plain", merging_graph, kernels=False))
    assert verdict(found)[1] == "plugin: not built: the bundle has no kernels for Orin; export it with --board"
    folder = bundle(tmp_path / "b", merging_graph)
    found = details(folder)
    times = {name: entry.compute_ms for name, entry in found.variants.items()}
    assert times == {"bodies": 3.0, "plugin": 1.0, "unmerged": None}
    assert found.variants["unmerged"].failed == "The file's merge layers are not in the form that this package exports."
    with pytest.raises(BackendError, match="no sparse attention, and no tokens merge"):
        build_engine(reseal(folder, ops=["sparsifiner::DenseAttention"]), "tensorrt", kernels="native")


@pytest.mark.parametrize(("whole", "kept"), [(0.5, "unmerged"), (3.0, "plugin")])
def test_a_student_is_held_against_the_dense_model_and_dense_layers(tmp_path, machine, whole, kept):
    """Variants: plugins, plugins with dense attention by the table, dense attention only, no merging."""
    sparsity, folder = (
        SparsityConfig(keep=0.9, tile=64, background_tokens=4, channels=8, merge=(8, 6, 0)),
        tmp_path / "b",
    )
    options = ExportOptions(precision="fp16", boards=["jetson-orin-nano-8gb"])
    export_student(student(sparsity=sparsity, depth=3), folder, options)
    table = json.loads((folder / "kernels" / "sm87.json").read_text())
    assert len(table["dense"]) == 3, "so few tokens are faster dense"
    table["dense"] = table["dense"][1:]
    (folder / "kernels" / "sm87.json").write_text(json.dumps(table))
    reseal(folder)
    values = {"SparseAttention": 5.0, "attend": 1.0, "MatchTokens": 4.0, "DenseAttention": whole}
    _, behaviour = machine("10.9", lambda dtype: onnx.load(folder / "model.onnx"), **values)
    found = details(folder, batch=None)
    times = {name: entry.compute_ms for name, entry in found.variants.items()}
    assert times == {"bodies": 5.0, "plugin": 1.0, "mixed": 1.0, "dense": 4.0, "unmerged": whole}
    assert [entry.failed for entry in found.variants.values()] == [None] * 5
    assert found.kernels == kept
    launches = {name.rpartition("::")[2].rpartition("_")[0] for name in behaviour.seen["register"]}
    assert {"select", "attend", "pairs", "merge"} < launches
    with open_session(folder, "tensorrt") as session:
        assert session.description.kernels.startswith({"unmerged": "dense attention, without", "plugin": "CUDA"}[kept])
        assert check_golden(session, open_bundle(folder))
