"""Compile a plan's kernels for a GPU that need not be there: cubin, PTX and what a launch needs to know.

    plan = plan_attend(shapes, attributes, "float16")
    for made in compile_plan(plan, 87):
        made.cubin, made.symbol, made.grid, made.threads, made.shared, made.arguments

A program in any language can launch them with the driver API, in the plan's order on one stream:
`cuModuleLoadData(cubin)`, `cuModuleGetFunction(symbol)`, above 48 KiB of shared memory
`cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)`, then
`cuLaunchKernel(grid, (threads, 1, 1), shared, stream, pointers)`. `pointers` are the addresses of `arguments` in order,
each aligned to 16 bytes, followed by `hidden` null pointers (Triton's own scratch, of size 0 here). Scratch buffers
need no initial values. Sizes are constants of the code: a changed batch changes `grid[2]` and the buffers' first axis,
anything else needs another compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.ops.triton.plan import LEAST_CAPABILITY, Buffer, Constant, Launch, Plan, fitted
from sparsifiner_edge.records import write_record

CAPABILITIES = (80, 86, 87, 89, 90, 100, 110, 120)
"""What is compiled for in tests: A100, RTX 30, Orin, RTX 40, H100, B200, Thor, RTX 50."""
_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32", "int8": "*i8"}
OPTIONS = {"enable_fp_fusion": True}
"""Asked for by name, since Triton's default changes from 3.9 to 3.10."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled launch.

    Attributes:
        kernel, symbol: the kernel's name in its plan, and the function's name in cubin and PTX.
        capability: compute capability times ten. From 90 on the code is for that one alone (sm_90a).
        cubin, ptx: machine code, and the assembly that it was made from.
        grid: blocks in x, y, z; z is the batch. threads: of a block. shared: dynamic shared memory in bytes.
        arguments: buffers whose addresses the kernel takes, in order. hidden: null pointers to pass after them.
        registers: of a thread. spilled: bytes of a thread's registers that had to go to memory.
        constants, warps, stages: as in the plan.
    """

    kernel: str
    symbol: str
    capability: int
    cubin: bytes
    ptx: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Buffer, ...]
    hidden: int
    registers: int
    spilled: int
    constants: dict[str, Constant]
    warps: int
    stages: int

    def metadata(self) -> Any:
        """All but the code, JSON-ready."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("cubin", "ptx")]
        return {name: write_record(getattr(self, name)) for name in names}


def compile_plan(plan: Plan, capability: int, ptx_version: int | None = None) -> list[Compiled]:
    """Compile every launch of a plan, in order. Takes .3 to 3 s each, unless in Triton's cache.

    Args:
        capability: compute capability times ten.
        ptx_version: PTX version times ten, such as 85 for CUDA 12.6; by default the newest that Triton's assembler
            knows. `TRITON_PTXAS_PATH` names another assembler, such as an older toolkit's for a board's older driver.

    Raises:
        MissingExtraError: Triton is not installed.
        BackendError: the capability is too low, Triton interprets, or it does not compile.
    """
    return [compile_launch(plan, launch, capability, ptx_version) for launch in plan.launches]


def compile_launch(plan: Plan, launch: Launch, capability: int, ptx_version: int | None = None) -> Compiled:
    """Compile one launch of a plan; see `compile_plan`."""
    launch = fitted(launch, capability)
    function = _function(launch.kernel, capability)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {name: plan.buffers[buffer] for name, buffer in launch.arguments.items() if buffer is not None}
    absent: dict[str, Constant | None] = {name: None for name in launch.arguments if name not in given}
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={n: _TYPES[given[n].dtype] if n in given else "constexpr" for n in names},
        constexprs={**absent, **launch.constants},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in given},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "ptx_version": ptx_version, **OPTIONS}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton has no base class of its own, and its assembler raises RuntimeError
        raise BackendError(
            f"The kernel {launch.kernel} does not compile for sm_{capability}: {error}.",
            "Try another tile, or float16; `ops/triton/plan.py` lists the limits.",
        ) from error
    registers, spilled = _resources(made.asm["cubin"])
    return Compiled(
        kernel=launch.kernel, symbol=made.metadata.name, capability=capability, cubin=made.asm["cubin"],
        ptx=made.asm["ptx"], grid=launch.grid, threads=32 * launch.warps, shared=made.metadata.shared,
        arguments=tuple(given[n] for n in names if n in given), registers=registers, spilled=spilled,
        hidden=hidden_parameters(made.asm["ptx"], made.metadata.name, len(given)),
        constants=dict(launch.constants), warps=launch.warps, stages=launch.stages,
    )  # fmt: skip


def hidden_parameters(ptx: str, symbol: str, arguments: int) -> int:
    """Parameters that a kernel takes after its `arguments`: pointers to Triton's own scratch, whose number is another
    from version to version (one in 3.4, two in 3.9).

    Raises:
        BackendError: the PTX has no such kernel, or one of fewer parameters.
    """
    head = re.search(rf"\.entry\s+{re.escape(symbol)}\s*\(([^)]*)\)", ptx)
    found = head[1].count(".param") if head else 0
    if found < arguments:
        raise BackendError(
            f"The kernel {symbol!r} takes {found} parameters in its PTX, not the {arguments} that it was given.",
            "Install another version of Triton.",
        )
    return found - arguments


def _function(name: str, capability: int) -> Any:
    if capability < LEAST_CAPABILITY:
        raise BackendError(
            f"Compute capability {capability / 10} is too low for the kernels.",
            f"They need {LEAST_CAPABILITY / 10} or more.",
        )
    try:
        from sparsifiner_edge.ops.triton.kernels import kernel
    except ImportError as error:
        raise MissingExtraError("triton", "triton") from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BackendError("TRITON_INTERPRET=1 interprets kernels and cannot compile them.", "Unset it.")
    return kernel(name)


@functools.cache
def tool(name: str) -> Path:
    """A program of CUDA's that Triton brings, such as "cuobjdump"."""
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin" / name


def _dump(option: str, path: str) -> str:
    done = subprocess.run([str(tool("cuobjdump")), option, path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills; these kernels have no other use for local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:  # cuobjdump takes a file, not a stream
        file.write(cubin)
        file.flush()
        usage, sass = (_dump(option, file.name) for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise BackendError(f"cuobjdump does not say what a kernel uses: {usage.strip()}.", "Reinstall Triton.")
    # A stack frame alone is no spill: only instructions that use it are.
    return int(found[1]), int(found[2]) if re.search(r"\b(LDL|STL)\b", sass) else 0
