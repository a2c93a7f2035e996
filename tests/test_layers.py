import time

import pytest

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.ops import native
from sparsifiner_edge.profiles.measure.layers import LAYER_KINDS, measure_layers, ms_by_kind, node_place, read_trace
from tests.plain import profile_bundle
from tests.tiny import make_bundle

DEPTH = 6
"""Of the tiny model."""


@pytest.fixture(scope="module")
def exported(once, tiny_weights):
    """The same model sparse, with tokens pruned after layer 3, and dense."""
    from sparsifiner_edge.export.export import export_bundle
    from sparsifiner_edge.sparse.student import sparsify
    from tests.models import TINY

    def make(folder):
        student = sparsify(TINY, folder / "student", weights=tiny_weights, cells=4, token_keep=((3, 0.7),))
        export_bundle(student, folder / "sparse")
        export_bundle(TINY, folder / "dense", weights=tiny_weights)

    folder = once("layers", make)
    return {name: folder / name for name in ("sparse", "dense")}


def measured(bundle, kernels):
    return measure_layers(bundle, Execution(kernels=kernels, threads=1), query_ms=50.0)


def rows_of(rows, kind):
    return [row for row in rows if row.kind == kind]


@pytest.mark.parametrize("kernels", ["native", "portable"])
def test_selection_stands_apart_from_attention_in_every_layer(exported, kernels):
    if kernels == "native" and native.library_path() is None:
        pytest.skip("no native library")
    rows = measured(exported["sparse"], kernels)
    selections = [row for row in rows_of(rows, "selection") if row.op == "KeySelect"]
    attentions = [row for row in rows_of(rows, "attention") if row.op == "SparseAttention"]
    assert [row.layer for row in selections] == [row.layer for row in attentions] == list(range(DEPTH))
    # One kernel, or the many nodes of a function's body.
    assert all((row.nodes == 1) == (kernels == "native") for row in selections + attentions)
    assert {"Softmax", "TopK", "Gather"} <= {row.op for row in rows_of(rows, "selection") if row.layer == 3}


def test_a_dense_file_has_no_selection_and_the_same_parts(exported):
    start = time.perf_counter()
    rows = measured(exported["dense"], "portable")
    wall_ms = 1000 * (time.perf_counter() - start)
    assert rows_of(rows, "selection") == []
    assert [row.layer for row in rows_of(rows, "attention") if row.op == "Softmax"] == list(range(DEPTH))
    for kind in ("projections", "mlp"):
        found = [row.layer for row in rows_of(rows, kind) if row.op in ("Gemm", "MatMul")]
        assert found == sorted([*range(DEPTH)] * 2)
    assert [row.kind for row in rows if row.op == "Gelu"] == ["mlp"] * DEPTH
    outside = [row for row in rows if row.op in ("Conv", "Cast") or row.name.startswith(("norm.", "head.", "Gather"))]
    assert len(outside) >= 3
    assert all(row.layer is None for row in outside)
    total = sum(row.ms for row in rows)
    assert sum(ms_by_kind(rows).values()) == pytest.approx(total)
    assert 0 < 20 * total < wall_ms  # So many queries ran at least.
    assert min(row.ms for row in rows) >= 0


def test_a_costly_part_is_found_costly(tmp_path):
    """A file without attention has no layers; its products are most of its time."""
    rows = measured(make_bundle(tmp_path / "b", depth=8, width=256, size=16, function=True), "portable")
    assert sum(row.ms for row in rows if "MatMul" in row.op) > 0.7 * sum(row.ms for row in rows)
    assert all(row.layer is None and row.kind == "other" for row in rows)


def test_a_profile_has_layers_and_a_profiler_that_fails_costs_these_alone(exported, monkeypatch):
    asked = {"seconds": 0.05, "min_queries": 1, "threads": 1, "power": False}
    figures = profile_bundle(exported["dense"], **asked)["statistics"]["subject"]
    assert {row["kind"] for row in figures["layers"]} <= set(LAYER_KINDS)
    monkeypatch.setattr("sparsifiner_edge.profiles.profile.LOAD_TIMEOUT_S", 1e-3)
    figures = profile_bundle(exported["dense"], **asked)["statistics"]["subject"]
    assert figures["queries"] > 0
    assert "gave no reply to 'layers'" in figures["layers"]["unavailable"]


def event(name, ms):
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": ms * 1000}


def run(ms):
    return {"cat": "Session", "name": "model_run", "dur": ms * 1000}


def test_a_trace_gives_medians_of_the_last_runs():
    trace = [{"cat": "Session", "name": "session_initialization", "dur": 5}]
    for first, second in ((90, 50), (1, 4), (3, 4), (2, 40)):
        trace += [event("a", first), event("twins", second), event("twins", 1), run(first + second + 2)]
    assert read_trace(trace, 3) == {"a": 2, "twins": 5}


@pytest.mark.parametrize("trace", [[], [run(1)], [event("a", 1)]])
def test_a_trace_that_tells_nothing_is_refused(trace):
    with pytest.raises(BackendError, match="trace"):
        read_trace(trace, 1)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.0.norm1.LayerNormalization", (0, "norms", "LayerNormalization")),
        ("blocks.0.attn.qkv.MatMul/MatMulAddFusion", (0, "projections", "MatMul")),
        ("model.blocks.11.attn.out_proj.MatMul_1", (11, "projections", "MatMul")),
        ("blocks.0.attn.Softmax", (0, "attention", "Softmax")),
        ("blocks.0.DenseAttention", (0, "attention", "DenseAttention")),
        ("blocks.3.attn.KeySelect", (3, "selection", "KeySelect")),
        ("blocks.3.merging.MatchTokens", (3, "selection", "MatchTokens")),
        ("blocks.3.pruning.TopK", (3, "selection", "TopK")),
        ("blocks.0.mlp.fc1.MatMul", (0, "mlp", "MatMul")),
        ("blocks.0.Add_1", (0, "other", "Add")),
        ("norm.LayerNormalization", (None, "other", "LayerNormalization")),
        ("decoder.neck.Conv", (None, "decoder", "Conv")),
        ("_inlfunc_KeySelect_token_3_KeySelect/top", (None, "selection", "KeySelect")),
    ],
)
def test_a_name_says_where_a_node_belongs(name, place):
    assert node_place(name) == place
