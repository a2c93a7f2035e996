"""What a bundle holds for one board: its CUDA kernels, compiled, and the model whose nodes are launches of them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import math
import re
import subprocess
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
from sparsifiner_edge.errors import BackendError, ConfigError, MissingExtraError
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.ops.graph import gets_merged
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS
from sparsifiner_edge.ops.triton.compile import Compiled, compile_launch
from sparsifiner_edge.ops.triton.plan import (
    LEAST_BLOCK,
    LEAST_CAPABILITY,
    OPERATORS_PLANNED,
    Buffer,
    Launch,
    Plan,
    refusals,
)
from sparsifiner_edge.ops.triton.plan_forward import make_a_layer, plan_attend, plan_layer, plan_select
from sparsifiner_edge.ops.triton.plan_merge import plan_match, plan_merge
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.profiles.roofline import crossing, times_faster
from sparsifiner_edge.records import write_record
from sparsifiner_edge.text import dump_json

PTX_OF_CUDA = {"12.6": 85, "13.0": 90, "13.2": 92}
"""CUDA version of a board -> newest PTX version (times ten) that its driver takes (PTX ISA, release notes)."""
LEAST_PTX = {100: 86, 110: 90, 120: 87}
"""Compute capability -> first PTX version that knows it, where the oldest that we write, 8.5, does not."""
OLDEST_TENSORRT = (10, 3)
PLANS = {
    "KeySelect": plan_select,
    "SparseAttention": plan_attend,
    "MatchTokens": plan_match,
    "MergeTokens": plan_merge,
}
"""Of operators that are launched alone."""
Types = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor -> element type and shape, 1 where the batch is dynamic."""


def board_files(model: onnx.ModelProto, name: str, board: Board, folder: Path) -> BoardKernels:
    """Compile the kernels of a model for a board into a bundle's folder.

    Writes `kernels/sm<N>.json`, `kernels/sm<N>/*.ptx` and `*.cubin`, and `kernels/sm<N>.onnx`: the model with launches
    in the place of our operators, without bodies, for TensorRT with a plugin. Call it before the bundle is sealed.

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
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in OPERATORS_PLANNED]
    if board.sm < LEAST_CAPABILITY:
        raise ConfigError(
            f"{board.name} has no GPU that the kernels are for.", "Leave --board out: the bundle runs there without."
        )
    if not nodes:
        raise ConfigError(
            f"{name} has nothing to compile: no sparse attention, and no tokens merge.", "Leave --board out."
        )
    cuda, ptx_version = _toolkit(board)
    assembler = find_assembler(cuda, board.sm)
    table = KernelTable(
        compute_capability=f"{board.sm / 10:.1f}", launches={}, nodes={}, float32={},
        triton=_version("triton"), assembler=assembler.text, ptx_version=ptx_version / 10,
    )  # fmt: skip
    refused = _compile(model, nodes, _Target(board.sm, ptx_version, assembler, folder), table)
    (folder / table_file(board.sm)).write_text(dump_json(write_record(table)), encoding="utf-8")
    variant = f"{FOLDER}/sm{board.sm}.onnx"
    onnx.save(kernel_model(model, table), folder / variant)
    return BoardKernels(
        board=board.name, compute_capability=table.compute_capability, table=table_file(board.sm), model=variant,
        launches=len(table.launches), nodes=len(table.nodes), refused=refused, triton=table.triton,
        assembler=table.assembler, ptx_version=table.ptx_version, cuda=cuda or "any that takes this PTX version",
        warnings=(*assembler.warnings(cuda), *_slower_than_dense(nodes, _tensor_types(model), board)),
    )  # fmt: skip


def _slower_than_dense(nodes: Sequence[Any], types: Types, board: Board) -> tuple[str, ...]:
    """What a roofline says of attention that would be faster dense; see `profiles.roofline`."""
    slow: list[tuple[float, int, float, int]] = []
    chosen = [node for node in nodes if node.op_type == "KeySelect"]
    for node in chosen:
        (batch, tokens, _), a = types[node.input[0]][1], _attributes(node)
        keep, lanes = a["keys"] / (tokens - a["num_prefix"]), batch * a["num_heads"]
        faster = times_faster(board, tokens, keep, lanes)
        if faster is not None and faster < 1:
            slow.append((faster, tokens, keep, lanes))
    if not slow:
        return ()
    least, tokens, keep, lanes = min(slow)
    pays = crossing(board, keep, lanes)
    return (
        f"By a roofline, not measured, dense attention is faster on {board.name} in {len(slow)} of {len(chosen)} "
        f"layers: these kernels are {least:.2f} times as fast at {tokens} tokens, and faster "
        f"{f'from some {pays} on' if pays else 'at no size that was looked at'}. `build` there measures both.",
    )


def _toolkit(board: Board) -> tuple[str | None, int]:
    """CUDA version of the board's oldest supported JetPack, if it has one, and the PTX version to write."""
    least = LEAST_PTX.get(board.sm, 85)
    for release in board.jetpack:
        if tuple(map(int, release.tensorrt.split(".")[:2])) >= OLDEST_TENSORRT:
            return release.cuda, max(PTX_OF_CUDA.get(release.cuda, 85), least)
    return None, least


@dataclasses.dataclass(frozen=True)
class Assembler:
    """A `ptxas`.

    Attributes:
        path: the program. version: such as "12.6". origin: the package that it came with.
    """

    path: Path
    version: str
    origin: str

    @property
    def text(self) -> str:
        """For the record."""
        return f"ptxas {self.version} ({self.origin})"

    def warnings(self, cuda: str | None) -> tuple[str, ...]:
        """What may be wrong with its code on a board that runs a CUDA version."""
        if cuda is None or self.version.partition(".")[0] == cuda.partition(".")[0]:
            return ()
        return (
            f"The board runs CUDA {cuda}, and the cubins are by {self.text}: across major versions they are not "
            "promised to load. The PTX is not affected. "
            f'pip install "{nvcc_package(cuda)}=={cuda}.*" and export again.',
        )

    def assemble(self, ptx: str) -> bytes:
        """Machine code for the target that the PTX names.

        Raises:
            BackendError: it rejects the PTX.
        """
        target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
        with scratch_folder() as scratch:
            source, made = scratch / "kernel.ptx", scratch / "kernel.cubin"
            source.write_text(ptx, encoding="utf-8")
            arch = f"-arch={target[1] if target else f'sm_{LEAST_CAPABILITY}'}"
            command = [str(self.path), arch, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BackendError(
                    f"{self.text} rejects a kernel: {done.stderr.strip()[:400]}.", "Install a newer one."
                )
            return made.read_bytes()


def nvcc_package(cuda: str) -> str:
    """NVIDIA's package of the compiler on PyPI; from CUDA 13 on its name has no version."""
    return "nvidia-cuda-nvcc-cu12" if cuda.startswith("12.") else "nvidia-cuda-nvcc"


def find_assembler(cuda: str | None, sm: int) -> Assembler:
    """The `ptxas` of NVIDIA's package of a CUDA version where that is installed, else Triton's own for a GPU.

    Raises:
        MissingExtraError: neither is installed.
    """
    package = nvcc_package(cuda) if cuda else ""
    if cuda and _version(package).startswith(f"{cuda}."):
        for file in importlib.metadata.files(package) or ():
            if file.name == "ptxas":
                return _assembler(Path(str(file.locate())), package)
    try:
        nvidia = importlib.import_module("triton.backends.nvidia")
    except ImportError as error:
        raise MissingExtraError("triton", "triton") from error
    folder = Path(str(nvidia.__file__)).parent / "bin"
    newer = folder / "ptxas-blackwell"  # Triton has a second one for what came after Hopper.
    program = newer if sm >= 100 and newer.is_file() else folder / "ptxas"
    return _assembler(program, f"triton {_version('triton')}")


def _assembler(path: Path, origin: str) -> Assembler:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return Assembler(path, found[1] if found else "of unknown version", origin)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class _Target(NamedTuple):
    """What is compiled for, by what, and the bundle's folder. ptx_version: times ten."""

    sm: int
    ptx_version: int
    assembler: Assembler
    folder: Path


def _compile(model: onnx.ModelProto, nodes: Sequence[Any], target: _Target, table: KernelTable) -> dict[str, str]:
    """Fill the table, with its code written; why nodes are left out. Layers of equal sizes share their launches."""
    types = _tensor_types(model)
    refused: dict[str, str] = {}
    done: dict[str, list[tuple[str, Compiled]]] = {}
    (target.folder / FOLDER / f"sm{target.sm}").mkdir(parents=True, exist_ok=True)
    layers = _layers(nodes)
    while layers:
        together = layers.pop(0)
        plan = _plan(model, together, types, target.sm)
        if isinstance(plan, str) and len(together) > 1:
            layers = [(node,) for node in together] + layers
            continue
        if isinstance(plan, str):
            refused[together[0].name] = plan
            continue
        key = str(plan)
        if key not in done:
            compiled = [_compile_launch(plan, launch, target) for launch in plan.launches]
            done[key] = [(_write(made, plan, target, table), made) for made in compiled]
        _enter(together, types, done[key], table)
    if not table.nodes:
        raise ConfigError(f"No layer can be compiled: {next(iter(refused.values()))}.", "Leave --board out.")
    return refused


def _compile_launch(plan: Plan, launch: Launch, target: _Target) -> Compiled:
    """A launch, in smaller blocks where TensorRT's plugins would refuse the shared memory that it takes."""
    made = compile_launch(plan, launch, target.sm, target.ptx_version)
    block = int(launch.constants.get("block_n", 0))
    if made.shared <= MOST_SHARED_BYTES or block <= LEAST_BLOCK:
        return made
    smaller = dataclasses.replace(launch, constants={**launch.constants, "block_n": block // 2})
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
    first, *others = together
    unknown = [name for name in first.input if name not in types]
    if unknown:
        return f"the shape of {unknown[0]!r} is not known"
    shapes, dtype, attributes = [types[x][1] for x in first.input], types[first.input[0]][0], _attributes(first)
    reasons = refusals(first.op_type, attributes, shapes, dtype, sm)
    if reasons:
        return "; ".join(reasons)
    # Selection and attention read no sizes where all are 1; what merges reads them anyhow.
    sized = gets_merged(model, first) or first.op_type in ("MatchTokens", "MergeTokens")
    given = shapes if sized else [shapes[0], *shapes[2:]]
    if not others:
        return PLANS[first.op_type](given, attributes, dtype)
    plan = plan_layer(given, attributes, dtype)
    attended = [*shapes[:2], plan.buffers["indices"].shape]
    return "; ".join(refusals(others[0].op_type, _attributes(others[0]), attended, dtype, sm)) or plan


def _write(made: Compiled, plan: Plan, target: _Target, table: KernelTable) -> str:
    """Write the code of a launch, enter it into the table; returns its name."""
    inputs, outputs = _reads_and_writes(made, plan)
    order = [[b.name for b in made.arguments].index(name) for name in (*inputs, *outputs)]
    ptx = ordered_ptx(plain_ptx(made.ptx), made.symbol, order)
    launch = CompiledLaunch(
        kernel=made.kernel, symbol=made.symbol, grid=made.grid[:2], threads=made.threads, shared_bytes=made.shared,
        inputs=inputs, outputs=outputs, tensors={b.name: _tensor(b) for b in made.arguments},
        registers=made.registers, spilled_bytes=made.spilled,
    )  # fmt: skip
    plain = write_record(launch)
    digest = hashlib.sha256(f"{ptx}{sorted(plain['tensors'].items())}{plain['grid']}".encode()).hexdigest()[:12]
    name = f"{made.kernel}_{digest}"
    if name not in table.launches:
        table.launches[name] = launch
        (target.folder / code_file(target.sm, name, "ptx")).write_text(ptx, encoding="utf-8")
        (target.folder / code_file(target.sm, name, "cubin")).write_bytes(target.assembler.assemble(ptx))
    return name


def _reads_and_writes(made: Compiled, plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what a launch reads and writes: it writes what is no input of the plan and no launch before it has."""
    known = {name for name, buffer in plan.buffers.items() if buffer.role == "input"}
    for launch in plan.launches:
        if launch.kernel == made.kernel:
            break
        known.update(filter(None, launch.arguments.values()))
    names = [buffer.name for buffer in made.arguments]
    return tuple(name for name in names if name in known), tuple(name for name in names if name not in known)


def _tensor(buffer: Buffer) -> LaunchTensor:
    """Type and shape without batch. Bytes are given as int32: TensorRT would take int8 for quantised values."""
    shape = buffer.shape[1:] if buffer.name not in ("proj_q", "proj_k") else buffer.shape
    if buffer.dtype == "int8":
        return LaunchTensor("int32", (*shape[:-1], math.ceil(shape[-1] / 4)))
    return LaunchTensor(cast(DType, buffer.dtype), shape)


def _enter(together: Sequence[Any], types: Types, launches: Sequence[tuple[str, Compiled]], table: KernelTable) -> None:
    """The launches of nodes, with the model's names for inputs and outputs, and new names between them.

    Of a layer, what follows `select` stands in the attention's place.
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
    kernels = [compiled.kernel for _, compiled in launches]
    split = kernels.index("select") + 1 if len(together) > 1 else len(kernels)
    for node, own in zip(together, (launches[:split], launches[split:]), strict=False):
        chain = []
        for name, compiled in own:
            launch = table.launches[name]
            tensors = {b.name: names.get(b.name, f"{together[0].name}/{b.name}") for b in compiled.arguments}
            inputs, outputs = (tuple(tensors[n] for n in side) for side in (launch.inputs, launch.outputs))
            chain.append(NodeLaunch(f"{node.name}/{compiled.kernel}", name, inputs, outputs))
        table.nodes[node.name] = tuple(chain)
