"""Kernels in a bundle: compiled for a board, and wired into the model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.kernels import (
    MOST_SHARED_BYTES,
    NAMESPACE,
    LaunchTensor,
    code_file,
    kernel_model,
    ordered_ptx,
    plain_ptx,
)
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.export import board as boards
from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.export.fp16 import convert
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.ops.triton.compile import compile_launch
from sparsifiner_edge.ops.triton.plan_layer import plan_layer
from sparsifiner_edge.profiles.boards.board import load_board
from sparsifiner_edge.profiles.roofline import MERGE_LAUNCHES
from sparsifiner_edge.runtime import open_session
from tests.commands import assert_refused, call, manifest_of
from tests.sparse_graph import LEFT_OF_MERGING, merging_model, sparse_model
from tests.tables import table_of

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parent.parent
PTX = """//
.version 8.5
.target sm_87
.address_size 64
\t.file\t1 "/home/someone/kernels.py"
.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0,
\t.param .u64 .ptr .global .align 1 k_param_1,
\t.param .u64 .ptr .global .align 1 k_param_2
)
{
\t.reg .b64 \t%rd<4>;
\t.loc\t1 74 0
\tld.param.b64 \t%rd1, [k_param_1];
\tld.param.b64 \t%rd2, [k_param_0];
\tst.global.b64 \t[%rd2], %rd1;
\tret;
}
\t.section\t.debug_info
\t{
.b32 64
\t}
"""


@pytest.fixture(scope="module")
def model():
    return sparse_model(dtype=np.float16)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("board") / "bundle"
    folder.mkdir()
    entry = board_files(model, {"name": "tiny"}, load_board("jetson-orin-nano-8gb"), folder)
    return folder, entry


def test_a_board_gets_code_table_and_model(bundle):
    folder, entry = bundle
    table = table_of(folder, 87)
    assert (entry.board, entry.compute_capability, entry.cuda) == ("jetson-orin-nano-8gb", "8.7", "12.6")
    assert (entry.nodes, entry.launches, entry.refused) == (2, 3, {})
    assert entry.ptx_version == 8.5
    for name, launch in table.launches.items():
        ptx = (folder / code_file(87, name)).read_text()
        assert re.search(r"^\.version 8\.5\n\.target sm_87$", ptx, re.MULTILINE)
        assert ptx.count(".param .u64") == len(launch.inputs) + len(launch.outputs)
    kinds = [node.op_type.rpartition("_")[0] for node in onnx.load(folder / entry.model).graph.node if node.domain]
    assert kinds == ["summarise", "select", "attend"], "a layer is three launches"
    # Projections are read in float32: a copy is made where the model has them in float16.
    assert table.float32 == {"proj_q.float32": "proj_q", "proj_k.float32": "proj_k"}
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / entry.model).graph.initializer}
    assert weights["proj_q.float32"].dtype == np.float32
    assert "proj_q" not in weights  # nobody reads it any more


def test_no_file_names_the_machine_that_made_it(bundle):
    folder, _ = bundle
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(ROOT).encode() not in path.read_bytes(), path


@pytest.mark.everything
def test_the_same_export_gives_the_same_bytes(model, bundle, tmp_path):
    folder, _ = bundle
    board_files(model, {}, load_board("jetson-orin-nano-8gb"), tmp_path)
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path


def test_the_variant_has_no_bodies_and_names_its_plugins(bundle):
    folder, entry = bundle
    variant = onnx.load(folder / entry.model)
    assert list(variant.functions) == []
    for node in variant.graph.node:
        if node.domain:
            assert node.domain == NAMESPACE
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert values == {"plugin_namespace": NAMESPACE.encode(), "plugin_version": b"1"}
    produced = {name for node in variant.graph.node for name in node.output}
    known = produced | {t.name for t in variant.graph.initializer} | {v.name for v in variant.graph.input}
    assert {name for node in variant.graph.node for name in node.input if name} <= known


@pytest.mark.parametrize(("name", "message"), [("t4", "no GPU that the kernels are for"), ("cpu-generic", "no GPU")])
def test_a_board_without_such_a_gpu_is_refused(model, tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        board_files(model, {}, load_board(name), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_has_nothing_to_compile(tmp_path):
    from tests.tiny import make_bundle

    dense = onnx.load(make_bundle(tmp_path / "b") / "model.onnx")
    with pytest.raises(ConfigError, match="nothing to compile: no sparse attention, and no tokens merge"):
        board_files(dense, {"name": "dense"}, load_board("jetson-orin-nano-8gb"), tmp_path)


def test_what_no_kernel_is_for_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)qkv must be float16 or bfloat16, got float32.*--precision fp16"):
        board_files(sparse_model(), {}, load_board("jetson-orin-nano-8gb"), tmp_path)


@pytest.fixture(scope="module", params=[0.2, 1.0], ids=["sparse", "dense"])
def merging(request, tmp_path_factory):
    """A model of two layers, the first of which merges; its file, and what a board's bundle says."""
    folder = tmp_path_factory.mktemp("merging")
    onnx.save(convert(merging_model(request.param)).model, folder / "model.onnx")
    entry = board_files(onnx.load(folder / "model.onnx"), "tiny", load_board("jetson-orin-nano-8gb"), folder)
    return request.param, folder, entry


@pytest.mark.everything
def test_merging_is_launches_in_the_bundle_and_dense_attention_keeps_its_bodies(merging):
    keep, folder, entry = merging
    table = table_of(folder, 87)
    own = [
        launch.launch.rpartition("_")[0]
        for node, launches in table.nodes.items()
        if "merging" in node
        for launch in launches
    ]
    assert own == ["metric", "partners", "suitors", "pairs", "merge"]
    assert len(own) + LEFT_OF_MERGING == MERGE_LAUNCHES["kernels"]
    assert (entry.nodes, entry.launches, entry.refused) == ((6, 11, {}) if keep < 1 else (2, 5, {}))
    variant = onnx.load(folder / entry.model)
    bodies = [node.op_type for node in variant.graph.node if node.domain == DOMAIN]
    assert bodies == ([] if keep < 1 else ["DenseAttention"] * 2)
    assert {function.name for function in variant.functions} == set(bodies)
    for launch in table.launches.values():
        assert launch.shared_bytes <= MOST_SHARED_BYTES


@pytest.mark.everything
def test_the_launches_of_merging_compute_what_the_bodies_compute(merging):
    assert interpreted(merging[1]) < 2e-2


def test_the_board_decides_the_version():
    for name, wanted in (
        ("jetson-orin-nano-8gb", ("12.6", 85)), ("jetson-agx-thor", ("13.0", 90)), ("rtx-4060", (None, 85)),
        ("rtx-5090", (None, 87)),
    ):  # fmt: skip
        assert boards._toolkit(load_board(name)) == wanted


def test_parameters_move_and_unread_ones_go():
    changed = ordered_ptx(plain_ptx(PTX), "k", [1, 0])
    assert re.findall(r"\.param .* (k_param_\d)", changed) == ["k_param_1", "k_param_0"]
    assert "[k_param_1]" in changed
    assert "home" not in changed
    assert ".loc" not in changed
    assert "debug" not in changed
    with pytest.raises(ArtifactError, match="reads its parameter 0"):
        ordered_ptx(PTX, "k", [1])
    for order, symbol in (([3], "k"), ([0], "other")):
        with pytest.raises(ArtifactError, match="no kernel"):
            ordered_ptx(PTX, symbol, order)


@pytest.mark.everything
def test_a_launch_takes_smaller_blocks_where_plugins_would_refuse_its_shared_memory(tmp_path):
    """As attention of float16 on a Thor with a list of four blocks."""
    select = {"num_heads": 1, "num_prefix": 1, "tile": 64, "cell": 93, "scale": 0.125, "probe": 16, "keys": 231}
    shapes = [(1, 2305, 192), (1, 64, 24), (1, 64, 24)]
    plan = plan_layer(shapes, {**select, "value_power": 2.0}, "float16")
    target = boards._Target(110, 90, tmp_path)
    assert compile_launch(plan, plan.launches[-1], 110).shared > MOST_SHARED_BYTES
    made = boards._compile_launch(plan, plan.launches[-1], target)
    assert made.shared <= MOST_SHARED_BYTES
    assert made.launch.constants["block_n"] == 32
    assert boards._compile_launch(plan, plan.launches[0], target).launch.constants == plan.launches[0].constants


def test_another_model_is_refused(bundle, model):
    folder, _ = bundle
    table = table_of(folder, 87)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for node in other.graph.node:
        node.name = f"{node.name}_renamed"
    with pytest.raises(ArtifactError, match="kernels are for another model"):
        kernel_model(other, table)


def a_launch(table):
    return next(iter(table["launches"].values()))


def a_node(table):
    return next(iter(table["nodes"].values()))[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t["launches"].update({"../evil": a_launch(t)}), "names a launch '../evil'"),
        (lambda t: t["launches"].update({"other": {}}), "launches[...].symbol is missing"),
        (lambda t: a_launch(t).pop("grid"), "launches[...].grid is missing"),
        (lambda t: a_launch(t).update(grid=[1, 0]), "an entry of launches is not int >= 1"),
        (lambda t: a_launch(t).update(grid=[1, 1, 1]), "an entry of launches is not list of length 2"),
        (lambda t: a_launch(t).update(threads=True), "an entry of launches is not int"),
        (lambda t: a_launch(t).update(shared=-1), "an entry of launches is not int >= 0"),
        (lambda t: a_launch(t)["tensors"]["qkv"].update(dtype="int8"), "invalid enum value 'int8'"),
        (
            lambda t: a_launch(t)["tensors"]["qkv"].update(shape=[1 << 31]),
            "an entry of launches is not int <= 2147483647",
        ),
        (lambda t: a_launch(t)["tensors"].pop("qkv"), "does not describe its tensor 'qkv'"),
        (lambda t: t["nodes"].update({"n": [a_node(t) | {"launch": "none_1"}]}), "no launch 'none_1'"),
        (lambda t: t["nodes"].update({"n": a_node(t)}), "an entry of nodes is not list"),
        (lambda t: a_launch(t)["inputs"].append("no parameter"), "an entry of launches is not str of the form"),
        (lambda t: a_node(t)["outputs"].append("\ud800"), "has the name '\\ud800'"),
        (lambda t: t["float32"].update(x=1), "an entry of float32 is not str"),
        (lambda t: t["float32"].update(x="a\n"), "has the name 'a\\n'"),
        (lambda t: t.update(schema_version=2), "schema 2"),
    ],
)
def test_a_malformed_table_is_a_message(bundle, tmp_path, spoil, message):
    folder, _ = bundle
    table = json.loads((folder / "kernels" / "sm87.json").read_text())
    spoil(table)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "sm87.json").write_text(json.dumps(table))
    with pytest.raises(ArtifactError, match=re.escape(message)):
        table_of(tmp_path, 87)
    assert table_of(tmp_path, 89) is None


def interpreted(folder):
    """Greatest difference of a bundle's launches, run by Triton's interpreter, to its model."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.check_launches", str(folder)], capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_the_launches_compute_what_the_bodies_compute(bundle, model):
    """The model that TensorRT would get, its launches run by Triton's interpreter: every name and shape is right."""
    folder, _ = bundle
    onnx.save(model, folder / "model.onnx")
    try:
        assert interpreted(folder) < 2e-3
    finally:
        (folder / "model.onnx").unlink()


def test_numbers_of_the_table_are_those_of_the_model(bundle):
    table = table_of(bundle[0], 87)
    attend = next(launch for launch in table.launches.values() if launch.kernel == "attend")
    assert attend.tensors["qkv"] == LaunchTensor("float16", (64, 192))
    assert attend.tensors["output"] == LaunchTensor("float16", (64, 64))
    assert attend.outputs == ("output",)
    assert np.prod(attend.grid) > 0


@pytest.mark.everything
def test_export_for_a_board(tiny_student, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    out = call(capsys, "export", tiny_student, "--precision", "fp16", "--board", "jetson-orin-nano-8gb", "-o", bundle)
    assert out.code == 0, out.err
    assert "jetson-orin-nano-8gb: " in out.out
    assert re.search(r"^tile 16 is kept, although GPUs want 64: .*--calibrate DIR", out.out, re.MULTILINE)
    [entry] = manifest_of(bundle)["boards"]
    assert {entry["table"], entry["model"]} <= manifest_of(bundle)["files"].keys()
    assert entry["nodes"] > 0
    with open_session(bundle) as session:
        check_golden(session, open_bundle(bundle))


@pytest.mark.everything
def test_a_board_has_its_gpu_s_tile(tiny_student, pictures, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    out = call(
        capsys, "export", tiny_student, "--keep", ".9", "--calibrate", pictures, "--precision", "fp16",
        "--board", "jetson-orin-nano-8gb", "-o", bundle,
    )  # fmt: skip
    assert out.code == 0, out.err
    assert re.search(r"^tile 16 -> 64: cosine to before 0\.9[789]\d+, 3 images$", out.out, re.MULTILINE)
    assert manifest_of(bundle)["sparsity"]["tile"] == 64


def test_export_refuses_a_board_it_does_not_know(tiny_student, tmp_path, capsys):
    out = call(capsys, "export", tiny_student, "--board", "toaster", "-o", tmp_path / "bundle")
    assert_refused(out, "toaster", "jetson-orin-nano-8gb")
    assert list(tmp_path.iterdir()) == []
