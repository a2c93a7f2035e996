import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.ops import native
from sparsifiner_edge.profiles.measure import layers
from sparsifiner_edge.profiles.measure.attribution import find_places
from sparsifiner_edge.profiles.measure.layers import LAYER_KINDS, Row, measure_layers, ms_by_kind, read_trace
from sparsifiner_edge.profiles.measure.worker import fixed_inputs
from sparsifiner_edge.records import write_record
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


def measured(bundle, kernels, provider="cpu"):
    execution = Execution(provider=provider, kernels=kernels, threads=1)
    return write_record(measure_layers(str(bundle), execution, fixed_inputs, query_ms=50.0))


def rows_of(report, kind):
    return [row for row in report["layers"] if row["kind"] == kind]


@pytest.mark.parametrize("kernels", ["native", "portable"])
def test_selection_stands_apart_from_attention_in_every_layer(exported, kernels):
    if kernels == "native" and native.library_path() is None:
        pytest.skip("no native library")
    report = measured(exported["sparse"], kernels)
    selections = [row for row in rows_of(report, "selection") if row["op"] == "KeySelect"]
    attentions = [row for row in rows_of(report, "attention") if row["op"] == "SparseAttention"]
    assert [row["layer"] for row in selections] == [row["layer"] for row in attentions] == list(range(DEPTH))
    graph = onnx.load(str(exported["sparse"] / "model.onnx"), load_external_data=False).graph
    calls = {node.name for node in graph.node if node.op_type == "KeySelect"}
    assert {row["name"] for row in selections} == calls
    # One kernel, or the many nodes of a function's body.
    assert all((row["nodes"] == 1) == (kernels == "native") for row in selections + attentions)
    assert {"Softmax", "TopK", "Gather"} <= {row["op"] for row in rows_of(report, "selection") if row["layer"] == 3}


def test_a_dense_file_has_no_selection_and_the_same_parts(exported):
    report = measured(exported["dense"], "portable")
    assert rows_of(report, "selection") == []
    assert [row["layer"] for row in rows_of(report, "attention") if row["op"] == "Softmax"] == list(range(DEPTH))
    for kind, products in (("projections", 2), ("mlp", 2)):
        found = [row["layer"] for row in rows_of(report, kind) if row["op"] in ("Gemm", "MatMul")]
        assert found == sorted([*range(DEPTH)] * products)
    gelus = [row["kind"] for row in report["layers"] if row["op"] == "Gelu"]
    assert gelus == ["mlp"] * DEPTH
    head = [row for row in report["layers"] if row["op"] in ("Conv", "Cast")]
    assert head
    assert all("layer" not in row and row["kind"] == "other" for row in head)


def test_times_add_up_and_lie_within_the_time_of_twenty_queries(exported):
    start = time.perf_counter()
    report = measured(exported["dense"], "portable")
    wall_ms = 1000 * (time.perf_counter() - start)
    assert sum(row["ms"] for row in report["layers"]) == pytest.approx(report["layers_total_ms"])
    assert sum(row["share"] for row in report["layers"]) == pytest.approx(1)
    assert sum(ms_by_kind([Row(**row) for row in report["layers"]]).values()) == pytest.approx(
        report["layers_total_ms"]
    )
    assert 0 < 20 * report["layers_total_ms"] < wall_ms
    assert min(row["ms"] for row in report["layers"]) >= 0


def test_a_costly_part_is_found_costly(tmp_path):
    """A file without attention has no layers; its products are most of its time."""
    report = measured(make_bundle(tmp_path / "b", depth=8, width=256, size=16, function=True), "portable")
    products = sum(row["ms"] for row in report["layers"] if "MatMul" in row["op"])
    assert products > 0.7 * report["layers_total_ms"]
    assert all("layer" not in row and row["kind"] == "other" for row in report["layers"])


def test_a_profile_has_layers_and_how_they_compare(exported):
    result = profile_bundle(exported["dense"], seconds=0.1, min_queries=8, threads=1, power=False)
    figures = result["statistics"]["subject"]
    assert {row["kind"] for row in figures["layers"]} <= set(LAYER_KINDS)
    compared = figures["layers_compared"]
    assert compared["latency_p50_ms"] == figures["latency_ms"]["p50"]["value"]
    assert compared["total_over_latency"] == figures["layers_total_ms"] / compared["latency_p50_ms"]


def test_a_profiler_that_fails_costs_the_layers_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsifiner_edge.profiles.profile.LOAD_TIMEOUT_S", 1e-3)
    monkeypatch.setattr("sparsifiner_edge.runtime.child.Child.ask", _ask_with_time(30))
    bundle = make_bundle(tmp_path / "b")
    figures = profile_bundle(bundle, seconds=0.05, min_queries=1, threads=1, power=False)["statistics"]["subject"]
    assert figures["queries"] > 0
    for name in ("layers", "layers_total_ms", "layers_compared"):
        assert "gave no reply to 'layers'" in figures[name]["unavailable"]


def _ask_with_time(seconds):
    from sparsifiner_edge.runtime.child import Child

    ask = Child.ask
    return lambda self, op, wait_s, form, **more: ask(self, op, wait_s if op == "layers" else seconds, form, **more)


def event(name, ms, op="MatMul"):
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": ms * 1000, "args": {"op_name": op}}


def run(ms):
    return {"cat": "Session", "name": "model_run", "dur": ms * 1000}


def test_a_trace_gives_medians_of_the_last_runs():
    trace = [{"cat": "Session", "name": "session_initialization", "dur": 5}]
    for first, second in ((90, 50), (1, 4), (3, 4), (2, 40)):
        trace += [event("a", first), event("twins", second), event("twins", 1, "Add"), run(first + second + 2)]
    times, operators = read_trace(trace, 3)
    assert times == {"a": 2, "twins": 5}
    assert operators == {"a": "MatMul", "twins": "Add"}


@pytest.mark.parametrize(
    "trace", [[], [run(1)], [{"cat": "Node"}], [event("a", 1)], ["text"], [{"cat": "Node", "name": "a_kernel_time"}]]
)
def test_a_trace_that_tells_nothing_is_refused(trace):
    with pytest.raises(BackendError, match="trace"):
        read_trace(trace, 1)


def test_a_session_with_a_profiler_of_its_own_is_asked(exported, monkeypatch):
    """As TensorRT names what it fused."""
    graph = onnx.load(str(exported["dense"] / "model.onnx"), load_external_data=False)
    places = find_places(graph)
    product = next(n.name for n in graph.graph.node if places.nodes[n.name].kind == "mlp" and n.op_type == "MatMul")
    norm = next(n.name for n in graph.graph.node if places.nodes[n.name].kind == "norms")

    class Session:
        inputs, warmed = (), 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def infer(self, inputs):
            self.warmed += 1

        def layer_times(self, inputs, queries):
            assert queries == 20
            assert self.warmed > 0  # a mean of few queries would hold what the first one sets up
            return [{"name": f"{norm} + {product}", "ms": 3.0}, {"name": "Reformatting CopyNode", "ms": 1.0}]

    monkeypatch.setattr(layers, "open_checked", lambda *_: Session())
    report = measured(exported["dense"], "portable")
    assert [(row.get("layer"), row["op"], row["kind"], row["share"]) for row in report["layers"]] == [
        (0, "MatMul", "mlp", 0.75),
        (None, "fused", "other", 0.25),
    ]


def quantised(places, *names):
    return [(places.nodes[name].layer, places.nodes[name].kind) for name in names]


def test_quantisers_belong_to_the_product_that_they_feed():
    """norm1, QDQ, qkv, dense attention, projection, add; norm2, QDQ, mlp, add; norm."""
    one, eight = np.ones(8, np.float32), np.ones((8, 8), np.float32)
    weights = {"g": one, "w": eight, "s": np.float32(1), "wide": np.ones((8, 24), np.float32)}
    make = helper.make_node
    nodes = [
        make("LayerNormalization", ["x", "g"], ["n1"], name="blocks.0.norm1.LayerNormalization"),
        make("QuantizeLinear", ["n1", "s"], ["q1"], name="quant1"),
        make("DequantizeLinear", ["q1", "s"], ["d1"], name="dequant1"),
        make("MatMul", ["d1", "wide"], ["qkv"], name="blocks.0.attn.qkv.MatMul"),
        make(
            "DenseAttention",
            ["qkv"],
            ["a"],
            name="blocks.0.DenseAttention",
            domain="sparsifiner",
            num_heads=1,
            scale=1.0,
        ),
        make("MatMul", ["a", "w"], ["p"], name="blocks.0.attn.proj.MatMul"),
        make("Add", ["x", "p"], ["r1"], name="blocks.0.Add"),
        make("LayerNormalization", ["r1", "g"], ["n2"], name="blocks.0.norm2.LayerNormalization"),
        make("QuantizeLinear", ["n2", "s"], ["q2"], name="quant2"),
        make("DequantizeLinear", ["q2", "s"], ["d2"], name="dequant2"),
        make("MatMul", ["d2", "w"], ["m"], name="blocks.0.mlp.fc1.MatMul"),
        make("Add", ["r1", "m"], ["r2"], name="blocks.0.Add_1"),
        make("LayerNormalization", ["r2", "g"], ["y"], name="norm.LayerNormalization"),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8]) for name in ("x", "y")]
    initialisers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    places = find_places(helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], initialisers)))
    assert quantised(
        places,
        "blocks.0.norm1.LayerNormalization",
        "quant1",
        "dequant1",
        "blocks.0.attn.qkv.MatMul",
        "blocks.0.DenseAttention",
        "blocks.0.attn.proj.MatMul",
        "blocks.0.Add",
    ) == [
        (0, kind)
        for kind in ("norms", "projections", "projections", "projections", "attention", "projections", "other")
    ]
    attention = ["norm1.LayerNormalization", "attn.qkv.MatMul", "DenseAttention", "attn.proj.MatMul", "Add"]
    mlp = ["norm2.LayerNormalization", "mlp.fc1.MatMul", "Add_1"]
    assert quantised(places, *(f"blocks.0.{name}" for name in attention)) == [
        (0, kind) for kind in ("norms", "projections", "attention", "projections", "other")
    ]
    assert quantised(places, *(f"blocks.0.{name}" for name in mlp)) == [(0, "norms"), (0, "mlp"), (0, "other")]
    assert quantised(places, "quant1", "dequant1", "quant2", "dequant2") == [(0, "projections")] * 2 + [(0, "mlp")] * 2
    assert quantised(places, "norm.LayerNormalization") == [(None, "other")]
