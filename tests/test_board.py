"""Tests of compiled kernels in a bundle for a board, and of the model that calls them.

Run as a program under Triton's interpreter, this file compares the launches of a bundle with the ONNX function bodies.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sparsifiner_edge.bundle.kernels import (
    MOST_SHARED_BYTES,
    NAMESPACE,
    CompiledLaunch,
    LaunchTensor,
    code_file,
    kernel_model,
)
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.export import board as boards
from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.export.fp16 import convert
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.ops.triton.compile import compile_launch, kernel
from sparsifiner_edge.ops.triton.schedule_layer import schedule_layer
from sparsifiner_edge.profiles.boards.board import load_board
from sparsifiner_edge.profiles.roofline import MERGE_LAUNCHES
from sparsifiner_edge.runtime.golden import check_golden
from tests.commands import assert_refused, call, manifest_of
from tests.flat import open_session
from tests.seal import table_of
from tests.sparse_graph import merging_model, sparse_model
from tests.tiny import make_bundle

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    return sparse_model(dtype=np.float16)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("board") / "bundle"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return folder, board_files(model, "tiny", load_board("jetson-orin-nano-8gb"), folder)


def variant_of(folder):
    """Return the model for TensorRT, with kernel launches as nodes."""
    return kernel_model(onnx.load(folder / "model.onnx"), table_of(folder, 87))


def test_a_board_gets_code_and_a_table(bundle):
    folder, entry = bundle
    table = table_of(folder, 87)
    assert (entry.board, entry.compute_capability) == ("jetson-orin-nano-8gb", "8.7")
    assert (entry.nodes, entry.launches, entry.refused) == (2, 3, {})
    assert table.ptx_version == 8.5
    for name, launch in table.launches.items():
        ptx = (folder / code_file(87, name)).read_text()
        assert re.search(r"^\.version 8\.5\n\.target sm_87$", ptx, re.MULTILINE)
        assert ptx.count(".param .u64") == len(launch.inputs) + len(launch.outputs)
        assert str(ROOT) not in ptx
    attend = next(launch for launch in table.launches.values() if launch.kernel == "attend")
    assert attend.inputs["qkv"] == LaunchTensor("float16", (64, 192))
    assert attend.outputs == {"output": LaunchTensor("float16", (64, 64))}
    assert np.prod(attend.grid) > 0


def test_the_variant_has_no_bodies_and_names_its_plugins(bundle):
    variant, table = variant_of(bundle[0]), table_of(bundle[0], 87)
    assert list(variant.functions) == []
    ours = [node for node in variant.graph.node if node.domain]
    assert [node.op_type.rpartition("_")[0] for node in ours] == ["summarise", "select", "attend"]
    for node in ours:
        assert node.domain == NAMESPACE
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert values == {"plugin_namespace": NAMESPACE.encode(), "plugin_version": b"1"}
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in variant.graph.initializer}
    known = {name for node in variant.graph.node for name in node.output} | weights.keys() | {"image"}
    assert {name for node in variant.graph.node for name in node.input if name} <= known
    # The kernels read projections in float32, so float16 projections get a copy.
    assert table.float32 == {"proj_q.float32": "proj_q", "proj_k.float32": "proj_k"}
    assert weights["proj_q.float32"].dtype == np.float32
    assert "proj_q" not in weights  # no node reads it any more


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("t4", np.float16, "no GPU that supports the kernels"),
        ("cpu-generic", np.float16, "no GPU"),
        ("jetson-orin-nano-8gb", None, "nothing to compile: no sparse attention, and no tokens merge"),
        ("jetson-orin-nano-8gb", np.float32, r"(?s)qkv must be float16 or bfloat16, got float32.*--precision fp16"),
    ],
)
def test_what_no_kernels_are_for_is_refused(tmp_path, name, dtype, message):
    file = onnx.load(make_bundle(tmp_path / "dense") / "model.onnx") if dtype is None else sparse_model(dtype=dtype)
    with pytest.raises(ConfigError, match=message):
        board_files(file, "dense", load_board(name), tmp_path)


@pytest.fixture(scope="module", params=[0.2, 1.0], ids=["sparse", "dense"])
def merging(request, tmp_path_factory):
    """A model of three layers, two of which merge: its folder and the board entry of its bundle."""
    folder = tmp_path_factory.mktemp("merging")
    onnx.save(convert(merging_model(request.param, (12, 8, 0), 3)).model, folder / "model.onnx")
    entry = board_files(onnx.load(folder / "model.onnx"), "tiny", load_board("jetson-orin-nano-8gb"), folder)
    return request.param, folder, entry


@pytest.mark.everything
def test_merging_is_launches_in_the_bundle_and_dense_attention_keeps_its_bodies(merging):
    keep, folder, entry = merging
    table = table_of(folder, 87)
    merging_nodes = [launches for node, launches in table.nodes.items() if "merging" in node]
    own = [launch.launch.rpartition("_")[0] for launches in merging_nodes for launch in launches]
    assert own == 2 * ["metric", "partners", "suitors", "pairs", "merge"]
    assert len(own) == 2 * MERGE_LAUNCHES["kernels"]
    assert (entry.nodes, entry.launches, entry.refused) == ((10, 19, {}) if keep < 1 else (4, 10, {}))
    assert len(table.int64) == 2, "places go on as launches write them"
    variant = variant_of(folder)
    bodies = [node.op_type for node in variant.graph.node if node.domain == DOMAIN]
    assert bodies == ([] if keep < 1 else ["DenseAttention"] * 3)
    carried = {node.op_type for node in variant.graph.node} & {"ScatterElements", "GatherElements", "Where"}
    assert not carried, "sizes and places are in the launches"
    assert {function.name for function in variant.functions} == set(bodies)
    assert max(launch.shared_bytes for launch in table.launches.values()) <= MOST_SHARED_BYTES
    assert interpreted(folder) < 2e-2


@pytest.mark.everything
def test_a_launch_takes_smaller_blocks_where_plugins_would_refuse_its_shared_memory():
    """A launch uses smaller blocks if plugins would reject its shared memory: four float16 blocks on a Thor."""
    select = {
        "num_heads": 1,
        "num_prefix": 1,
        "tile": 64,
        "key_pool": 93,
        "scale": 0.125,
        "query_pool": 16,
        "keys": 231,
    }
    shapes = [(1, 2305, 192), (1, 64, 24), (1, 64, 24)]
    layer = schedule_layer(shapes, {**select, "value_power": 2.0}, "float16")
    assert compile_launch(layer, layer.launches[-1], 110).shared > MOST_SHARED_BYTES
    made = boards._compile_launch(layer, layer.launches[-1], 110, 90)
    assert made.shared <= MOST_SHARED_BYTES
    assert made.launch.constants["block_n"] == 32
    assert boards._compile_launch(layer, layer.launches[0], 110, 90).launch.constants == layer.launches[0].constants


def test_another_model_is_refused(bundle, model):
    other = onnx.load_from_string(model.SerializeToString())
    for node in other.graph.node:
        node.name = f"{node.name}_renamed"
    with pytest.raises(ArtifactError, match="kernels are for another model"):
        kernel_model(other, table_of(bundle[0], 87))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, launch, _: t["launches"].update({"../evil": launch}), "not str of the form '^[a-z]"),
        (lambda t, launch, _: launch.pop("grid"), "launches[...].grid is missing"),
        (lambda t, launch, _: launch.update(grid=[1, 0]), "an entry of launches is not int >= 1"),
        (lambda t, *_: t["nodes"].update(empty=[]), "an entry of nodes is not"),
        (lambda t, _, node: node.update(launch="none_1"), "no launch 'none_1'"),
        (lambda t, _, node: node["outputs"].append("\ud800"), "has the name '\\ud800'"),
        (lambda t, *_: t["float32"].update(x="a\n"), "has the name 'a\\n'"),
        (lambda t, *_: t.update(schema_version=1), "schema 1"),
    ],
)
def test_a_malformed_table_is_a_message(bundle, tmp_path, spoil, message):
    folder, _ = bundle
    table = json.loads((folder / "kernels" / "sm87.json").read_text())
    spoil(table, next(iter(table["launches"].values())), next(iter(table["nodes"].values()))[0])
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "sm87.json").write_text(json.dumps(table))
    with pytest.raises(ArtifactError, match=re.escape(message)):
        table_of(tmp_path, 87)
    assert table_of(tmp_path, 89) is None


def interpreted(folder):
    """Return the difference that `interpret` prints for a bundle."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_board", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_sizes_of_single_tokens_may_be_a_constant_each(model, bundle, tmp_path):
    """torch's exporter writes one constant per node for models of more than 1024 tokens."""
    apart = copy.deepcopy(model)
    attention = next(node for node in apart.graph.node if node.op_type == "SparseAttention")
    made = next(node for node in apart.graph.node if node.output[0] == attention.input[1])
    again = copy.deepcopy(made)
    again.output[0] = attention.input[1] = "single again"
    apart.graph.node.insert(list(apart.graph.node).index(made), again)
    assert board_files(apart, "tiny", load_board("jetson-orin-nano-8gb"), tmp_path) == bundle[1]


def test_the_launches_compute_what_the_bodies_compute(bundle):
    """Triton's interpreter runs the launches of TensorRT's model, so every name and shape is checked."""
    assert interpreted(bundle[0]) < 2e-3


@pytest.mark.everything
def test_export_for_a_board(tiny_student, pictures, tmp_path, capsys):
    bundle, board = tmp_path / "bundle", ["--board", "jetson-orin-nano-8gb", "--keep", ".9", "--calibrate", pictures]
    out = call(capsys, "export", tiny_student, "--precision", "fp16", *board, "-o", bundle)
    assert out.code == 0, out.err
    assert re.search(r"^jetson-orin-nano-8gb: \d+ kernels for \d+ nodes", out.out, re.MULTILINE)
    assert re.search(r"^tile 16 -> 64: cosine to the original layout 0\.9[789]\d+, 3 images$", out.out, re.MULTILINE)
    assert manifest_of(bundle)["sparsity"]["tile"] == 64
    assert {"kernels/sm87.json", "model.onnx"} < manifest_of(bundle)["files"].keys()
    with open_session(bundle) as session:
        check_golden(session, open_bundle(bundle))


def test_export_refuses_a_board_it_does_not_know(tiny_student, tmp_path, capsys):
    out = call(capsys, "export", tiny_student, "--board", "toaster", "-o", tmp_path / "bundle")
    assert_refused(out, "toaster", "jetson-orin-nano-8gb")
    assert list(tmp_path.iterdir()) == []


def operator(name: str, schedule: Any, launch: Any, entry: CompiledLaunch) -> type[OpRun]:
    """Return an operator of the reference evaluator that runs a launch of the table."""

    def _run(self: Any, *inputs: Any, **_attributes: Any) -> tuple[Any, ...]:
        batch = inputs[0].shape[0]
        given = dict(zip(entry.inputs, inputs, strict=True))
        tensors = {}
        for n, declared in (entry.inputs | entry.outputs).items():
            buffer = schedule.buffers[n]
            raw = given.get(n)
            if raw is None:
                raw = np.zeros((batch, *declared.shape), declared.dtype)
            tensors[n] = torch.from_numpy(np.array(raw, buffer.dtype))
        names = {a: None if b is None else tensors[b] for a, b in launch.arguments.items()}
        kernel(launch.kernel)[(*entry.grid, batch)](**names, **launch.constants, num_warps=launch.warps)
        return tuple(tensors[n].numpy().reshape(batch, *declared.shape) for n, declared in entry.outputs.items())

    return type(name, (OpRun,), {"op_domain": NAMESPACE, "_run": _run})


class GatherElements(OpRun):
    """Replacement for onnx's operator, which takes at most 64 entries."""

    def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis),)


def interpret(folder: Path) -> None:
    """Print the largest difference between a bundle's launches, run by Triton's interpreter, and its model."""
    model, table = onnx.load(folder / "model.onnx"), table_of(folder, 87)
    assert table is not None
    types, operators = boards._tensor_types(model), {}
    nodes = [node for node in model.graph.node if node.name in table.nodes]
    for together, schedule, _ in boards.launched_together(model, nodes, types, 87):
        assert not isinstance(schedule, str)
        entries = [entry for node in together for entry in table.nodes[node.name]]
        for entry, launch in zip(entries, schedule.launches, strict=True):
            name = entry.launch
            operators[name] = operator(name, schedule, launch, table.launches[name])
    side = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    image = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})[0]
    variant = ReferenceEvaluator(kernel_model(model, table), new_ops=[*operators.values(), GatherElements])
    got = variant.run(None, {"image": image})[0]
    print("difference", float(np.abs(got.astype(np.float32) - wanted).max() / np.ptp(wanted.astype(np.float32))))


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
