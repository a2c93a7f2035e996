"""What a bundle holds for one board: its CUDA kernels, compiled, and the model whose nodes are launches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import onnx

from sparsifiner_edge.bundle.entries import BoardKernels
from sparsifiner_edge.bundle.kernels import (
    FOLDER,
    MOST_SHARED_BYTES,
    CompiledLaunch,
    DType,
    KernelTable,
    LaunchTensor,
    NodeLaunch,
    code_file,
    kernel_model,
    ordered_ptx,
    plain_ptx,
    table_file,
)
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.ops.graph import gets_merged
from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS
from sparsifiner_edge.ops.triton.compile import Compiled, compile_launch
from sparsifiner_edge.ops.triton.plan import LEAST_CAPABILITY, Buffer, Launch, Plan, refusals, shortened
from sparsifiner_edge.ops.triton.plan_layer import make_a_layer, plan_layer
from sparsifiner_edge.ops.triton.plan_merge import plan_match, plan_merge
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.records import write_record
from sparsifiner_edge.text import dump_json

PTX_OF_CUDA = {"12.6": 85, "13.0": 90, "13.2": 92}
"""CUDA version of a board -> newest PTX version (times ten) that its driver takes (PTX ISA, release notes)."""
LEAST_PTX = {100: 86, 110: 90, 120: 87}
"""Compute capability -> first PTX version that knows it, where the oldest that we write, 8.5, does not."""
OLDEST_TENSORRT = (10, 3)
PLANS = {"KeySelect": plan_layer, "MatchTokens": plan_match, "MergeTokens": plan_merge}
"""By operator; KeySelect stands for its layer."""
Types = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor -> element type and shape, 1 where the batch is dynamic."""


def board_files(model: onnx.ModelProto, name: str, board: Board, folder: Path) -> BoardKernels:
    """Compile the kernels of a model for a board into a bundle's folder.

    Writes `kernels/sm<N>.json`, `kernels/sm<N>/*.ptx` and `kernels/sm<N>.onnx`: the model with launches in the place of
    our operators, without bodies, for TensorRT with a plugin. Call it before the bundle is sealed.

    Args:
        model: as in `model.onnx`.
        name: of the model, for messages.
        board: from `profiles.boards`.
        folder: of the bundle.

    Returns:
        An entry for the manifest, under `boards`.

    Raises:
        ConfigError: the board has no GPU that the kernels are for, or the model nothing to compile.
        MissingExtraError: Triton is not installed.
        BackendError: a kernel does not compile.
    """
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in TRITON]
    if board.sm < LEAST_CAPABILITY:
        raise ConfigError(
            f"{board.name} has no GPU that the kernels are for.", "Leave --board out: the bundle runs there without."
        )
    if not nodes:
        raise ConfigError(
            f"{name} has nothing to compile: no sparse attention, and no tokens merge.", "Leave --board out."
        )
    cuda, ptx_version = _toolkit(board)
    table = KernelTable(
        compute_capability=f"{board.sm / 10:.1f}", launches={}, nodes={}, float32={},
        triton=str(package_version("triton")), ptx_version=ptx_version / 10,
    )  # fmt: skip
    refused = _compile(model, nodes, _Target(board.sm, ptx_version, folder), table)
    (folder / table_file(board.sm)).write_text(dump_json(write_record(table)), encoding="utf-8")
    variant = f"{FOLDER}/sm{board.sm}.onnx"
    onnx.save(kernel_model(model, table), folder / variant)
    return BoardKernels(
        board=board.name, compute_capability=table.compute_capability, table=table_file(board.sm), model=variant,
        launches=len(table.launches), nodes=len(table.nodes), refused=refused, triton=table.triton,
        ptx_version=table.ptx_version, cuda=cuda or "any that takes this PTX version",
    )  # fmt: skip


def _toolkit(board: Board) -> tuple[str | None, int]:
    """CUDA version of the board's oldest supported JetPack, if it has one, and the PTX version to write."""
    least = LEAST_PTX.get(board.sm, 85)
    for release in board.jetpack:
        if tuple(map(int, release.tensorrt.split(".")[:2])) >= OLDEST_TENSORRT:
            return release.cuda, max(PTX_OF_CUDA.get(release.cuda, 85), least)
    return None, least


class _Target(NamedTuple):
    """What is compiled for, and the bundle's folder. ptx_version: times ten."""

    sm: int
    ptx_version: int
    folder: Path


def _compile(model: onnx.ModelProto, nodes: Sequence[Any], target: _Target, table: KernelTable) -> dict[str, str]:
    """Fill the table, with its code written; why nodes are left out. Layers of equal sizes share their launches."""
    types = _tensor_types(model)
    refused: dict[str, str] = {}
    done: dict[str, list[tuple[str, Compiled]]] = {}
    (target.folder / FOLDER / f"sm{target.sm}").mkdir(parents=True, exist_ok=True)
    for together in _layers(nodes):
        plan = _plan(model, together, types, target.sm)
        if isinstance(plan, str):
            refused |= {node.name: plan for node in together}
            continue
        key = str(plan)
        if key not in done:
            compiled = [_compile_launch(plan, launch, target) for launch in plan.launches]
            done[key] = [(_write(made, plan, target, table), made) for made in compiled]
        _enter(together, types, done[key], table)
    if not table.nodes:
        raise ConfigError(
            f"No layer can be compiled: {next(iter(refused.values()))}.",
            "Export with --precision fp16, and with --calibrate IMAGES where cells are too many; or leave --board out.",
        )
    return refused


def _compile_launch(plan: Plan, launch: Launch, target: _Target) -> Compiled:
    """A launch, in smaller blocks where TensorRT's plugins would refuse the shared memory that it takes."""
    made = compile_launch(plan, launch, target.sm, target.ptx_version)
    smaller = shortened(launch)
    if made.shared <= MOST_SHARED_BYTES or smaller is launch:
        return made
    return _compile_launch(plan, smaller, target)


def _layers(nodes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Nodes that are launched together: a selection and the one attention that reads its lists; others alone."""
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        if node.op_type == "SparseAttention":
            readers.setdefault(node.input[-1], []).append(node)
    layers: list[tuple[Any, ...]] = []
    for node in nodes:
        reading = readers.get(node.output[0], []) if node.op_type == "KeySelect" else []
        same = reading and list(node.input[:-2]) == list(reading[0].input[:-1])
        if same and len(reading) == 1 and make_a_layer(_attributes(node), _attributes(reading[0])):
            layers.append((node, reading[0]))
    paired = {part.name for layer in layers for part in layer}
    return layers + [(node,) for node in nodes if node.name not in paired]


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _tensor_types(model: onnx.ModelProto) -> Types:
    """What the file states, and what follows; tensors with an axis other than the first unknown are left out."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {t.name: (_element(t.data_type), tuple(t.dims)) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = [d.dim_value for d in tensor.shape.dim]
        if tensor.HasField("shape") and all(dims[1:]):
            found[value.name] = (_element(tensor.elem_type), tuple(size or 1 for size in dims))
    return found


def _element(number: int) -> str:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number)).name if number else "unknown"


def _plan(model: onnx.ModelProto, together: Sequence[Any], types: Types, sm: int) -> Plan | str:
    """How nodes of a model are launched together, or why not."""
    first = together[0]
    unknown = [name for name in first.input if name not in types]
    if unknown:
        return f"the shape of {unknown[0]!r} is not known"
    shapes, dtype, attributes = [types[x][1] for x in first.input], types[first.input[0]][0], _attributes(first)
    reasons = refusals(first.op_type, attributes, shapes, dtype, sm)
    if first.op_type == "KeySelect" and len(together) == 1:
        reasons.append("no single attention of the same sizes reads its lists")
    if reasons:
        return "; ".join(reasons)
    # A layer reads no sizes where all are 1; what merges reads them anyhow.
    sized = gets_merged(model, first) or first.op_type != "KeySelect"
    return PLANS[first.op_type](shapes if sized else [shapes[0], *shapes[2:]], attributes, dtype)


def _write(made: Compiled, plan: Plan, target: _Target, table: KernelTable) -> str:
    """Write the code of a launch, enter it into the table; returns its name."""
    inputs, outputs = _reads_and_writes(made, plan)
    order = [[b.name for b in made.arguments].index(name) for name in (*inputs, *outputs)]
    ptx = ordered_ptx(plain_ptx(made.ptx), made.symbol, order)
    step = made.launch
    launch = CompiledLaunch(
        kernel=step.kernel, symbol=made.symbol, grid=step.grid[:2], threads=32 * step.warps, shared_bytes=made.shared,
        inputs=inputs, outputs=outputs, tensors={b.name: _tensor(b) for b in made.arguments},
    )  # fmt: skip
    plain = write_record(launch)
    digest = hashlib.sha256(f"{ptx}{sorted(plain['tensors'].items())}{plain['grid']}".encode()).hexdigest()[:12]
    name = f"{step.kernel}_{digest}"
    if name not in table.launches:
        table.launches[name] = launch
        (target.folder / code_file(target.sm, name)).write_text(ptx, encoding="utf-8")
    return name


def _reads_and_writes(made: Compiled, plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what a launch reads and writes: it writes what is no input of the plan and no launch before it has."""
    known = {name for name, buffer in plan.buffers.items() if buffer.role == "input"}
    for launch in plan.launches:
        if launch.kernel == made.launch.kernel:
            break
        known.update(filter(None, launch.arguments.values()))
    names = [buffer.name for buffer in made.arguments]
    return tuple(name for name in names if name in known), tuple(name for name in names if name not in known)


def _tensor(buffer: Buffer) -> LaunchTensor:
    """Type and shape without batch."""
    shape = buffer.shape[1:] if buffer.name not in ("proj_q", "proj_k") else buffer.shape
    return LaunchTensor(cast(DType, buffer.dtype), shape)


def _enter(together: Sequence[Any], types: Types, launches: Sequence[tuple[str, Compiled]], table: KernelTable) -> None:
    """The launches of nodes, with the model's names for inputs and outputs, and new names between them.

    Of a layer, `attend` stands in the attention's place.
    """
    names: dict[str, str] = {}
    for node in reversed(together):
        op = OPERATORS[node.op_type]
        names |= {tensor.name: name for tensor, name in zip(op.inputs, node.input, strict=True)}
        names[op.output.name] = node.output[0]
    for made in ("proj_q", "proj_k"):
        if made in names and types[names[made]][0] != "float32":
            table.float32[f"{names[made]}.float32"] = names[made]
            names[made] = f"{names[made]}.float32"
    own = [launches] if len(together) == 1 else [launches[:-1], launches[-1:]]
    for node, parts in zip(together, own, strict=True):
        chain = []
        for name, compiled in parts:
            launch = table.launches[name]
            tensors = {b.name: names.get(b.name, f"{together[0].name}/{b.name}") for b in compiled.arguments}
            inputs, outputs = (tuple(tensors[n] for n in side) for side in (launch.inputs, launch.outputs))
            chain.append(NodeLaunch(f"{node.name}/{compiled.launch.kernel}", name, inputs, outputs))
        table.nodes[node.name] = tuple(chain)
