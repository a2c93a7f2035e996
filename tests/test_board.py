"""Kernels in a bundle: compiled for a board, wired into the model, and handed to TensorRT's real plugin module."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsifiner_edge.artifacts import open_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.export import board as boards
from sparsifiner_edge.export.board import Assembler, board_files, find_assembler
from sparsifiner_edge.profiles.board import load_board
from sparsifiner_edge.runtime import check_golden, open_session
from sparsifiner_edge.runtime.kernels import NAMESPACE, code_file, kernel_model, ordered_ptx, plain_ptx, read_table
from tests.commands import assert_refused, call
from tests.fakes import record_tensorrt
from tests.sparse_graph import sparse_model

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
    return sparse_model()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("board") / "bundle"
    folder.mkdir()
    entry = board_files(model, {"name": "tiny"}, load_board("jetson-orin-nano-8gb"), folder)
    return folder, entry


def test_a_board_gets_code_table_and_model(bundle):
    folder, entry = bundle
    table = read_table(folder, 87)
    assert (entry["board"], entry["compute_capability"], entry["cuda"]) == ("jetson-orin-nano-8gb", "8.7", "12.6")
    assert (entry["nodes"], entry["launches"], entry["refused"]) == (2, 7, {})
    assert entry["ptx_version"] == 8.5
    for name, launch in table["launches"].items():
        ptx = (folder / code_file(87, name, "ptx")).read_text()
        assert re.search(r"^\.version 8\.5\n\.target sm_87$", ptx, re.MULTILINE)
        assert ptx.count(".param .u64") == len(launch["inputs"]) + len(launch["outputs"])
        assert (folder / code_file(87, name, "cubin")).read_bytes()[:4] == b"\x7fELF"
        assert launch["spilled"] == 0
    kinds = [node.op_type.rpartition("_")[0] for node in onnx.load(folder / entry["model"]).graph.node if node.domain]
    assert kinds == ["prepare", "peaks", "scores", "select", "membership", "rest", "attend"]


def test_no_file_names_the_machine_that_made_it(bundle):
    folder, _ = bundle
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(ROOT).encode() not in path.read_bytes(), path


def test_the_same_export_gives_the_same_bytes(model, bundle, tmp_path):
    folder, _ = bundle
    board_files(model, {}, load_board("jetson-orin-nano-8gb"), tmp_path)
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path


def test_the_variant_has_no_bodies_and_names_its_plugins(bundle):
    folder, entry = bundle
    variant = onnx.load(folder / entry["model"])
    assert list(variant.functions) == []
    for node in variant.graph.node:
        if node.domain:
            assert node.domain == NAMESPACE
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert values == {"plugin_namespace": NAMESPACE.encode(), "plugin_version": b"1"}
    produced = {name for node in variant.graph.node for name in node.output}
    known = produced | {t.name for t in variant.graph.initializer} | {v.name for v in variant.graph.input}
    assert {name for node in variant.graph.node for name in node.input if name} <= known


@pytest.mark.parametrize(
    ("name", "message"), [("jetson-xavier-nx", "no GPU that the kernels are for"), ("cpu-generic", "no GPU")]
)
def test_a_board_without_such_a_gpu_is_refused(model, tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        board_files(model, {}, load_board(name), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_has_nothing_to_compile(tmp_path):
    from tests.tiny import make_bundle

    dense = onnx.load(make_bundle(tmp_path / "b") / "model.onnx")
    with pytest.raises(ConfigError, match="no sparse attention to compile"):
        board_files(dense, {"name": "dense"}, load_board("jetson-orin-nano-8gb"), tmp_path)


def test_a_layer_that_cannot_be_compiled_keeps_its_body(model, tmp_path, monkeypatch):
    plan = boards._plan
    monkeypatch.setattr(
        boards, "_plan", lambda n, t, s: "too wide" if n.op_type == "SparseAttention" else plan(n, t, s)
    )
    entry = board_files(model, {}, load_board("jetson-orin-nano-8gb"), tmp_path)
    assert list(entry["refused"].values()) == ["too wide"]
    variant = onnx.load(tmp_path / entry["model"])
    assert [f.name for f in variant.functions] == ["SparseAttention"]
    assert [node.op_type for node in variant.graph.node if node.domain == "sparsifiner"] == ["SparseAttention"]


def test_the_board_decides_version_and_assembler(tmp_path, monkeypatch):
    assert boards._toolkit(load_board("jetson-orin-nano-8gb")) == ("12.6", 85)
    assert boards._toolkit(load_board("jetson-agx-thor")) == ("13.0", 90)
    assert boards._toolkit(load_board("rtx-4060")) == (None, 85)
    assert boards._toolkit(load_board("rtx-5090")) == (None, 87)
    found = find_assembler("12.6", 87)
    assert "triton" in found.text or "12.6" in found.text
    newer = find_assembler(None, 120)  # what Triton assembles Hopper's code with does not know Blackwell
    text = PTX.replace(".target sm_87", ".target sm_120a").replace(".version 8.5", ".version 8.7")
    assert newer.assemble(plain_ptx(text))[:4] == b"\x7fELF"
    foreign = Assembler(found.path, "13.1", "triton 9")
    assert "nvidia-cuda-nvcc-cu12==12.6.*" in foreign.warnings("12.6")[0]
    assert foreign.warnings(None) == foreign.warnings("13.0") == []


def test_parameters_move_and_unread_ones_go():
    changed = ordered_ptx(plain_ptx(PTX), "k", [1, 0])
    assert re.findall(r"\.param .* (k_param_\d)", changed) == ["k_param_1", "k_param_0"]
    assert "[k_param_1]" in changed
    assert "home" not in changed
    assert ".loc" not in changed
    assert "debug" not in changed
    assert find_assembler(None, 87).assemble(changed)[:4] == b"\x7fELF"
    with pytest.raises(ArtifactError, match="reads its parameter 0"):
        ordered_ptx(PTX, "k", [1])
    for order, symbol in (([3], "k"), ([0], "other")):
        with pytest.raises(ArtifactError, match="no kernel"):
            ordered_ptx(PTX, symbol, order)


def test_half_precision_and_weights_in_another_type(tmp_path):
    """Projections are read in float32: a copy is made where the model has them in float16."""
    entry = board_files(sparse_model(1, np.float16), {}, load_board("rtx-4060"), tmp_path)
    assert (entry["compute_capability"], entry["cuda"]) == ("8.9", "any that takes this PTX version")
    table = read_table(tmp_path, 89)
    assert table["float32"] == {"proj_q.float32": "proj_q", "proj_k.float32": "proj_k"}
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / entry["model"]).graph.initializer}
    np.testing.assert_array_equal(weights["proj_q.float32"], weights_of(sparse_model(1, np.float16))["proj_q"])
    assert weights["proj_q.float32"].dtype == np.float32
    assert "proj_q" not in weights  # nobody reads it any more
    attend = next(launch for launch in table["launches"].values() if launch["kernel"] == "attend")
    assert attend["tensors"]["qkv"]["dtype"] == "float16"


def weights_of(model):
    return {t.name: onnx.numpy_helper.to_array(t).astype(np.float32) for t in model.graph.initializer}


def test_another_model_is_refused(bundle, model):
    folder, _ = bundle
    table = read_table(folder, 87)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for node in other.graph.node:
        node.name = f"{node.name}_renamed"
    with pytest.raises(ArtifactError, match="kernels are for another model"):
        kernel_model(other, table)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t["launches"].update({"../evil": {}}), "names a launch '../evil'"),
        (lambda t: next(iter(t["launches"].values())).pop("grid"), "grid is null"),
        (lambda t: t["nodes"].update({"n": [{"launch": "none_1"}]}), "no launch 'none_1'"),
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
        read_table(tmp_path, 87)
    assert read_table(tmp_path, 89) is None


INTERPRET = """
import sys, numpy as np, onnx, torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from sparsifiner_edge.export import board
from sparsifiner_edge.ops.triton.kernels import kernel
from sparsifiner_edge.runtime.kernels import NAMESPACE, kernel_model, read_table
from pathlib import Path

folder = Path(sys.argv[1])
model, table = onnx.load(folder / "model.onnx"), read_table(folder, 87)
types, steps = board._tensor_types(model), {}
for node in model.graph.node:
    if node.name in table["nodes"]:
        plan = board._plan(node, types, 87)
        for entry, launch in zip(table["nodes"][node.name], plan.launches):
            steps[entry["launch"]] = (plan, launch, table["launches"][entry["launch"]])

def op(name):
    plan, launch, entry = steps[name]
    def _run(self, *inputs, **ignored):
        batch = inputs[0].shape[0]
        given = dict(zip(entry["inputs"], inputs))
        tensors = {}
        for n in (*entry["inputs"], *entry["outputs"]):
            declared, buffer = entry["tensors"][n], plan.buffers[n]
            raw = given.get(n)
            if raw is None:
                raw = np.zeros((batch, *declared["shape"]), declared["dtype"])
            # The bytes are the kernel's; only the type that TensorRT sees may differ.
            tensors[n] = torch.from_numpy(np.ascontiguousarray(raw).view(buffer.dtype).copy())
        names = {a: None if b is None else tensors[b] for a, b in launch.arguments.items()}
        kernel(launch.kernel)[(*entry["grid"], batch)](**names, **launch.constants, num_warps=launch.warps)
        return tuple(
            tensors[n].numpy().view(entry["tensors"][n]["dtype"]).reshape(batch, *entry["tensors"][n]["shape"])
            for n in entry["outputs"]
        )
    return type(name, (OpRun,), {"op_domain": NAMESPACE, "_run": _run})

variant = kernel_model(model, table)
side = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
image = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
name = model.graph.output[0].name
import onnxruntime
wanted = onnxruntime.InferenceSession(model.SerializeToString()).run([name], {"image": image})[0]
got = ReferenceEvaluator(variant, new_ops=[op(n) for n in steps]).run([name], {"image": image})[0]
print("difference", float(np.abs(got - wanted).max() / np.ptp(wanted)))
"""


def test_the_launches_compute_what_the_bodies_compute(bundle, model):
    """The model that TensorRT would get, its launches run by Triton's interpreter: every name and shape is right."""
    folder, _ = bundle
    onnx.save(model, folder / "model.onnx")
    try:
        done = subprocess.run(
            [sys.executable, "-c", INTERPRET, str(folder)], capture_output=True, text=True, check=False,
            env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT,
        )  # fmt: skip
    finally:
        (folder / "model.onnx").unlink()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-3


REGISTER = """
import os, sys, json
output = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
trt.__name__ = "tensorrt"
creators = []

class Registry:
    def register_creator(self, creator, namespace):
        creators.append((namespace, creator.name if hasattr(creator, "name") else None))
        self.last = creator
    def get_creator(self, name, version, namespace):
        return self.last

registry = Registry()
trt.get_plugin_registry = lambda: registry
sys.modules["tensorrt.plugin"] = __import__("tensorrt_bindings.plugin").plugin
from pathlib import Path
from sparsifiner_edge.runtime.tensorrt import plugin as tensorrt_plugin
from sparsifiner_edge.runtime.cuda import Device
from sparsifiner_edge.runtime.kernels import read_table

folder = Path(sys.argv[1])
reason = tensorrt_plugin.why_not(trt, folder, Device(0, "Orin", (8, 7), 8 << 30, True, "12.6"))
if reason is not None:
    json.dump({"reason": reason}, output)
    sys.exit()
table = read_table(folder, 87)
made = tensorrt_plugin.register(trt, table, folder, 87)
again = tensorrt_plugin.register(trt, table, folder, 87)
plugin = sys.modules["tensorrt.plugin"]
from tensorrt_bindings.plugin._lib import QDP_REGISTRY

found = {}
for identifier in made:
    definition, launch = QDP_REGISTRY[identifier], table["launches"][identifier.partition("::")[2]]
    inputs = [plugin.from_shape_expr((1, *launch["tensors"][n]["shape"]), trt.DataType.FLOAT) for n in launch["inputs"]]
    outputs = definition.register_func(*inputs)
    symbol, ptx, parameters, extra = definition.aot_impl_func(*inputs, outputs, 0)
    found[identifier] = {
        "inputs": definition.input_tensor_names, "outputs": definition.num_outputs,
        "types": [o.dtype.name for o in outputs], "ranks": [o.ndim for o in outputs], "symbol": symbol,
        "kind": type(parameters).__name__, "extra": len(extra), "in ptx": f".entry {symbol}(" in ptx,
    }
json.dump({"found": found, "again": made == again, "registered": len(creators)}, output)
"""


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("version", ["10.7", "10.9", "11.4"])
def test_the_real_plugin_module_takes_them(bundle, tmp_path, version):
    """TensorRT's own decorators check names, types and return values; 10.7 has none ahead of time."""
    folder, _ = bundle
    try:
        unpacked = record_tensorrt.download(record_tensorrt.VERSIONS[version], tmp_path)
    except OSError as error:
        pytest.skip(f"the wheel cannot be downloaded for this Python: {error}")
    stubs = record_tensorrt.stub_libraries(version.partition(".")[0], tmp_path / "stubs")
    done = subprocess.run(
        [sys.executable, "-c", REGISTER, str(folder)], capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": f"{unpacked}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if version == "10.7":
        assert result == {"reason": "TensorRT 10.7.0 has no ahead-of-time plugins (10.9 and later have)"}
        return
    table = read_table(folder, 87)
    assert result["again"]
    assert len(result["found"]) == result["registered"] == len(table["launches"]) == 7
    kinds = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32"}
    for identifier, found in result["found"].items():
        launch = table["launches"][identifier.partition("::")[2]]
        assert found["inputs"] == launch["inputs"]
        assert found["outputs"] == len(launch["outputs"])
        assert found["types"] == [kinds[launch["tensors"][name]["dtype"]] for name in launch["outputs"]]
        assert found["ranks"] == [1 + len(launch["tensors"][name]["shape"]) for name in launch["outputs"]]
        assert (found["symbol"], found["kind"], found["extra"]) == (launch["symbol"], "KernelLaunchParams", 0)
        assert found["in ptx"]


def test_numbers_of_the_table_are_those_of_the_model(bundle):
    table = read_table(bundle[0], 87)
    attend = next(launch for launch in table["launches"].values() if launch["kernel"] == "attend")
    assert attend["tensors"]["qkv"] == {"dtype": "float32", "shape": [64, 192]}
    assert attend["tensors"]["output"] == {"dtype": "float32", "shape": [64, 64]}
    assert attend["outputs"] == ["output", "sums"]
    member = next(launch for launch in table["launches"].values() if launch["kernel"] == "membership")
    # 63 patches in rows of 64 bytes, given as 16 words.
    assert member["tensors"]["member"] == {"dtype": "int32", "shape": [2, 4, 16]}
    assert np.prod(attend["grid"]) > 0


def test_export_for_a_board(tiny_student, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    out = call(capsys, "export", tiny_student, "--precision", "fp16", "--board", "jetson-orin-nano-8gb", "-o", bundle)
    assert out.code == 0, out.err
    assert "jetson-orin-nano-8gb: " in out.out
    [entry] = open_bundle(bundle)["boards"]
    assert {entry["table"], entry["model"]} <= open_bundle(bundle)["files"].keys()
    assert entry["nodes"] > 0
    with open_session(bundle) as session:
        check_golden(session, bundle)


def test_export_refuses_a_board_it_does_not_know(tiny_student, tmp_path, capsys):
    out = call(capsys, "export", tiny_student, "--board", "toaster", "-o", tmp_path / "bundle")
    assert_refused(out, "toaster", "jetson-orin-nano-8gb")
    assert list(tmp_path.iterdir()) == []
