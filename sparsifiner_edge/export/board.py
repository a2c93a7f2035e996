"""Kernels for one board in a bundle: compiled CUDA code, and a table of the nodes that it replaces."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
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
    table_file,
)
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.ops.carried import Carried, carried_along
from sparsifiner_edge.ops.graph import has_sizes
from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS
from sparsifiner_edge.ops.triton.compile import Compiled, compile_launch
from sparsifiner_edge.ops.triton.schedule import LEAST_CAPABILITY, Launch, Schedule, refusals, shorten
from sparsifiner_edge.ops.triton.schedule_layer import make_a_layer, schedule_layer
from sparsifiner_edge.ops.triton.schedule_merge import schedule_match, schedule_merge, schedule_merging
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.records import write_record
from sparsifiner_edge.text import dump_json

PTX_OF_CUDA = {"12.6": 85, "13.0": 90, "13.2": 92}
"""CUDA version of a board -> newest PTX version (times ten) that its driver accepts (PTX ISA, release notes)."""
LEAST_PTX = {100: 86, 110: 90, 120: 87}
"""Compute capability -> first PTX version that supports it, if that is newer than our default 8.5."""
OLDEST_TENSORRT = (10, 3)
"""Oldest TensorRT version that takes the kernels."""
_MERGING = {"MatchTokens": schedule_match, "MergeTokens": schedule_merge}
SCHEDULES = {"KeySelect": schedule_layer, **_MERGING}
"""Operator -> schedule of its launches; KeySelect stands for its whole layer."""
Types = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor -> element type and shape, with 1 for a dynamic batch."""


class Group(NamedTuple):
    """Nodes that are launched together.

    Attributes:
        nodes: The nodes.
        schedule: Their schedule, or why there is none.
        along: Sizes and places that are merged in the same launch.
    """

    nodes: tuple[Any, ...]
    schedule: Schedule | str
    along: Carried | None = None


def board_files(
    model: onnx.ModelProto, name: str, board: Board, folder: Path, dense: Sequence[int] = ()
) -> BoardKernels:
    """Compile the kernels of a model for a board into a bundle's folder.

    Writes `kernels/sm<N>.json` and `kernels/sm<N>/*.ptx`. Call it before the bundle is sealed.

    Args:
        model: The model in `model.onnx`.
        name: Name of the model, for messages.
        board: Board from `profiles.boards`.
        folder: Folder of the bundle.
        dense: Sparse layers, counted from 0, that are expected to be faster with dense attention.

    Returns:
        An entry for the manifest, under `boards`.

    Raises:
        ConfigError: The board has no GPU that the kernels support, or the model has nothing to compile.
        MissingExtraError: Triton is not installed.
        BackendError: A kernel does not compile.
    """
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in TRITON]
    if board.sm < LEAST_CAPABILITY:
        raise ConfigError(
            f"{board.name} has no GPU that supports the kernels.",
            "Leave --board out: the bundle runs there without them.",
        )
    if not nodes:
        raise ConfigError(
            f"{name} has nothing to compile: no sparse attention, and no tokens merge.", "Leave --board out."
        )
    ptx_version, types = _ptx_version(board), _tensor_types(model)
    table = KernelTable(
        launches={}, nodes={}, float32={}, triton=str(package_version("triton")), ptx_version=ptx_version / 10
    )
    refused: dict[str, str] = {}
    done: dict[str, list[str]] = {}
    (folder / FOLDER / f"sm{board.sm}").mkdir(parents=True, exist_ok=True)
    for group in launched_together(model, nodes, types, board.sm):
        if isinstance(group.schedule, str):
            refused |= {node.name: group.schedule for node in group.nodes}
            continue
        key = str(group.schedule)  # Layers of equal sizes share launches.
        if key not in done:
            done[key] = _compile(group.schedule, board.sm, ptx_version, folder, table)
        _enter(group, types, done[key], table)
    attentions = [node.name for node in nodes if node.op_type == "SparseAttention"]
    table = msgspec.structs.replace(table, dense=tuple(attentions[number] for number in dense))
    if not table.nodes:
        raise ConfigError(
            f"No layer can be compiled: {next(iter(refused.values()))}.",
            "Export with --precision fp16, with --calibrate IMAGES if there are too many background tokens, or without "
            "--board.",
        )
    (folder / table_file(board.sm)).write_text(dump_json(write_record(table)), encoding="utf-8")
    return BoardKernels(board.name, f"{board.sm / 10:.1f}", len(table.launches), len(table.nodes), refused)


def _ptx_version(board: Board) -> int:
    """Return the PTX version (times ten) to write: the newest that the board's oldest supported JetPack accepts."""
    least = LEAST_PTX.get(board.sm, 85)
    for release in board.jetpack:
        if tuple(map(int, release.tensorrt.split(".")[:2])) >= OLDEST_TENSORRT:
            return max(PTX_OF_CUDA.get(release.cuda, 85), least)
    return least


def _compile(schedule: Schedule, sm: int, ptx_version: int, folder: Path, table: KernelTable) -> list[str]:
    """Write the code of a schedule's launches, add them to the table and return their names.

    A launch writes buffers that are neither inputs of the schedule nor written by an earlier launch.
    """
    known, names = {name for name, buffer in schedule.buffers.items() if buffer.role == "input"}, []
    for step in schedule.launches:
        code = _compile_launch(schedule, step, sm, ptx_version)
        sides: tuple[dict[str, LaunchTensor], dict[str, LaunchTensor]] = ({}, {})
        for buffer in code.arguments:
            shape = (
                buffer.shape[1:] if buffer.name not in ("proj_q", "proj_k") else buffer.shape
            )  # Without the batch axis.
            tensor = LaunchTensor(cast(DType, buffer.dtype), shape)
            sides[buffer.name not in known][buffer.name] = tensor
        launch = CompiledLaunch(
            kernel=step.kernel,
            symbol=code.symbol,
            grid=code.launch.grid[:2],
            threads=32 * code.launch.warps,
            shared_bytes=code.shared,
            inputs=sides[0],
            outputs=sides[1],
        )
        ptx, plain = bare_ptx(code.ptx, code.symbol, len(code.arguments)), write_record(launch)
        if [*sides[0], *sides[1]] != [buffer.name for buffer in code.arguments]:  # TensorRT passes inputs first.
            raise BackendError(f"The kernel {step.kernel} takes an output before an input.", "Report this.")
        content = f"{ptx}{sorted((plain['inputs'] | plain['outputs']).items())}{plain['grid']}"
        name = f"{step.kernel}_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        if name not in table.launches:
            table.launches[name] = launch
            (folder / code_file(sm, name)).write_text(ptx, encoding="utf-8")
        names.append(name)
        known.update(*sides)
    return names


def bare_ptx(ptx: str, symbol: str, parameters: int) -> str:
    """Strip debugging information and a compiler's extra parameters from PTX.

    Debugging information names files of the machine that compiled it. No instruction reads the extra parameters, and
    TensorRT does not pass them.

    Raises:
        BackendError: There is no such kernel, or it reads a parameter that is removed.
    """
    ptx = re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{.*?\}\s*$", "", ptx, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in ptx.splitlines() if not re.match(r"\s*\.(loc|file)\s", line)]
    ptx = "\n".join(lines).rstrip() + "\n"
    match = re.search(rf"(\.entry\s+{re.escape(symbol)}\s*\()([^)]*)(\))", ptx)
    declared = [line.strip() for line in match[2].split(",")] if match else []
    if match is None or len(declared) < parameters:
        raise BackendError(f"The PTX has no kernel {symbol!r} of {parameters} parameters.", "Report this.")
    rest = ptx[match.end() :]
    for name in (line.split()[-1] for line in declared[parameters:]):
        if re.search(rf"{re.escape(name)}\b", rest):
            raise BackendError(f"The kernel {symbol!r} reads the compiler's parameter {name}.", "Report this.")
    passed = ",\n\t".join(declared[:parameters])
    return f"{ptx[: match.start()]}{match[1]}\n\t{passed}\n{match[3]}{rest}"


def _compile_launch(schedule: Schedule, launch: Launch, sm: int, ptx_version: int) -> Compiled:
    """Compile a launch, in smaller blocks if TensorRT's plugins would refuse its shared memory."""
    code = compile_launch(schedule, launch, sm, ptx_version)
    smaller = shorten(launch)
    if code.shared <= MOST_SHARED_BYTES or smaller is launch:
        return code
    return _compile_launch(schedule, smaller, sm, ptx_version)


def _layers(model: onnx.ModelProto, nodes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Group nodes that are launched together: a selection and the one attention that reads its key lists.

    All other nodes are alone.
    """

    def same(one: Any, other: Any) -> bool:
        """Return True for equal inputs; sizes that are all 1 may be separate constants."""
        sizes = one.input[1] == other.input[1] or not (has_sizes(model, one) or has_sizes(model, other))
        return bool(one.input[0] == other.input[0] and sizes and make_a_layer(_attributes(one), _attributes(other)))

    readers: dict[str, list[Any]] = {}
    for node in nodes:
        if node.op_type == "SparseAttention":
            readers.setdefault(node.input[-1], []).append(node)
    layers: list[tuple[Any, ...]] = []
    for node in nodes:
        reading = readers.get(node.output[0], []) if node.op_type == "KeySelect" else []
        if len(reading) == 1 and same(node, reading[0]):
            layers.append((node, reading[0]))
    paired = {part.name for layer in layers for part in layer}
    return layers + [(node,) for node in nodes if node.name not in paired]


def launched_together(model: onnx.ModelProto, nodes: Sequence[Any], types: Types, sm: int) -> list[Group]:
    """Group all of these nodes.

    Sizes and places are merged in the same launches in every layer or in none.
    """
    groups = [Group(nodes, _schedule(model, nodes, types, sm)) for nodes in _layers(model, nodes)]
    merging = [group for group in groups if group.nodes[0].op_type in _MERGING]
    if any(isinstance(group.schedule, str) for group in merging):
        return groups
    carried = []
    for along in carried_along(model):
        names = [*along.match.input, along.merge.input[0], *([along.before] if along.before else [])]
        if not types.keys() >= set(names):
            return groups
        shapes, attributes = [types[name][1] for name in names], _attributes(along.match)
        schedule = schedule_merging(shapes, attributes, types[names[0]][0])
        carried.append(Group((along.match, along.merge), schedule, along))
    return [group for group in groups if group.nodes[0].op_type not in _MERGING] + (carried or merging)


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _tensor_types(model: onnx.ModelProto) -> Types:
    """Return the types that the file states or that follow.

    Tensors with an unknown axis other than the first are left out.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {t.name: (_element(t.data_type), tuple(t.dims)) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = [d.dim_value for d in tensor.shape.dim]
        if tensor.HasField("shape") and all(dims[1:]):
            types[value.name] = (_element(tensor.elem_type), tuple(size or 1 for size in dims))
    return types


def _element(number: int) -> str:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number)).name if number else "unknown"


def _schedule(model: onnx.ModelProto, together: Sequence[Any], types: Types, sm: int) -> Schedule | str:
    """Return the schedule of nodes that are launched together, or why there is none."""
    first = together[0]
    unknown = [name for name in first.input if name not in types]
    if unknown:
        return f"the shape of {unknown[0]!r} is not known"
    shapes, dtype, attributes = [types[x][1] for x in first.input], types[first.input[0]][0], _attributes(first)
    reasons = refusals(first.op_type, attributes, shapes, dtype, sm)
    if first.op_type == "KeySelect" and len(together) == 1:
        reasons.append("its key lists are not read by exactly one attention of the same sizes")
    if reasons:
        return "; ".join(reasons)
    # A layer without merging reads no sizes; merging always reads them.
    sized = has_sizes(model, first) or first.op_type != "KeySelect"
    return SCHEDULES[first.op_type](shapes if sized else [shapes[0], *shapes[2:]], attributes, dtype)


def _enter(group: Group, types: Types, launches: Sequence[str], table: KernelTable) -> None:
    """Add the launches of nodes to the table, with the model's names for inputs and outputs and new names in between.

    In a layer, `attend` takes the attention's place, and `merge` that of MergeTokens.
    """
    together, along = group.nodes, group.along
    names: dict[str, str] = {}
    for node in reversed(together):
        op = OPERATORS[node.op_type]
        names |= {tensor.name: name for tensor, name in zip(op.inputs, node.input, strict=True)}
        names[op.output.name] = node.output[0]
    if along is not None:
        names |= {"sizes_out": along.sizes} if along.sizes else {}
        for name, places in (("places_out", along.places), ("places", along.before)):
            if places:
                names[name] = table.int64[places] = f"{places}.int32"
    for projection in ("proj_q", "proj_k"):
        if projection in names and types[names[projection]][0] != "float32":
            table.float32[f"{names[projection]}.float32"] = names[projection]
            names[projection] = f"{names[projection]}.float32"
    groups = [launches] if len(together) == 1 else [launches[:-1], launches[-1:]]
    for node, parts in zip(together, groups, strict=True):
        chain = []
        for name in parts:
            launch = table.launches[name]
            sides = (tuple(names.get(n, f"{together[0].name}/{n}") for n in x) for x in (launch.inputs, launch.outputs))
            chain.append(NodeLaunch(f"{node.name}/{launch.kernel}", name, *sides))
        table.nodes[node.name] = tuple(chain)
