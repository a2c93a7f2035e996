"""Ahead-of-time compilation of a schedule's kernels to PTX and cubin, without the target GPU.

    for code in compile_schedule(schedule_layer(shapes, attributes, "float16"), 87):
        code.ptx, code.symbol, code.launch.grid, code.launch.warps, code.shared, code.arguments

A program in any language can launch the kernels with the CUDA driver API, in the order of the schedule on one stream:

1. `cuModuleLoadData(cubin)` and `cuModuleGetFunction(symbol)`.
2. `cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)` if `shared` is above 48 KiB.
3. `cuLaunchKernel(grid, (32 warps, 1, 1), shared, stream, pointers)`.

`pointers` are the addresses of `arguments` in order, each aligned to 16 bytes. They are followed by null pointers for
the remaining parameters in the PTX (Triton's own scratch memory, of size 0 here). Scratch buffers need no
initialization. Sizes are constants in the code. Another batch size changes only `grid[2]` and the first axis of the
buffers; any other change requires another compilation.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.ops.triton.schedule import LEAST_CAPABILITY, Buffer, Constant, Launch, Schedule, fit

CAPABILITIES = (80, 86, 87, 89, 90, 100, 110, 120)
"""Compute capabilities (times ten) covered by tests: A100, RTX 30, Orin, RTX 40, H100, B200, Thor, RTX 50."""
_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32"}
"""Triton pointer types by element type."""
OPTIONS = {"enable_fp_fusion": True}
"""Compiler options. They are explicit because Triton's default changes from 3.9 to 3.10."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled launch.

    Attributes:
        launch: The launch, adapted to the GPU by `fit`.
        symbol: Name of the function in the cubin and the PTX.
        capability: Compute capability times ten. From 90 on, the code runs only on this capability (sm_90a).
        cubin: Machine code.
        ptx: Assembly from which the machine code was made.
        shared: Dynamic shared memory in bytes.
        arguments: Buffers whose addresses the kernel takes, in order.
    """

    launch: Launch
    symbol: str
    capability: int
    cubin: bytes
    ptx: str
    shared: int
    arguments: tuple[Buffer, ...]


def compile_schedule(schedule: Schedule, capability: int, ptx_version: int | None = None) -> list[Compiled]:
    """Compile every launch of a schedule, in order.

    Each launch takes 0.3 to 3 s, unless it is in Triton's cache.

    Args:
        schedule: Schedule to compile.
        capability: Compute capability times ten.
        ptx_version: PTX version times ten, such as 85 for CUDA 12.6. The default is the newest version that Triton's
            assembler supports. The environment variable `TRITON_PTXAS_PATH` selects another assembler, such as that of
            an older toolkit for the older driver of a board.

    Raises:
        MissingExtraError: Triton is not installed.
        BackendError: The compute capability is too low, Triton's interpreter is active, or a kernel does not compile.
    """
    return [compile_launch(schedule, launch, capability, ptx_version) for launch in schedule.launches]


def compile_launch(schedule: Schedule, launch: Launch, capability: int, ptx_version: int | None = None) -> Compiled:
    """Compile one launch of a schedule; see `compile_schedule`."""
    launch = fit(launch, capability)
    function = _function(launch.kernel, capability)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    buffers = {name: schedule.buffers[buffer] for name, buffer in launch.arguments.items() if buffer is not None}
    absent: dict[str, Constant | None] = {name: None for name in launch.arguments if name not in buffers}
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={n: _TYPES[buffers[n].dtype] if n in buffers else "constexpr" for n in names},
        constexprs={**absent, **launch.constants},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in buffers},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "ptx_version": ptx_version, **OPTIONS}
    try:
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton has no base class of its own, and its assembler raises RuntimeError
        raise BackendError(
            f"The kernel {launch.kernel} does not compile for sm_{capability}: {error}.",
            "Try another tile; `ops/triton/schedule.py` lists the limits.",
        ) from error
    return Compiled(
        launch=launch,
        symbol=code.metadata.name,
        capability=capability,
        cubin=code.asm["cubin"],
        ptx=code.asm["ptx"],
        shared=code.metadata.shared,
        arguments=tuple(buffers[n] for n in names if n in buffers),
    )


def resources(code: Compiled, program: Path | None = None) -> tuple[int, int]:
    """Return the registers per thread and the spilled bytes that an assembler reports for a compiled kernel.

    Args:
        code: Compiled kernel.
        program: Path of the assembler; None selects Triton's.
    """
    import triton.backends.nvidia

    programs = Path(triton.backends.nvidia.__file__).parent / "bin"
    newer = programs / "ptxas-blackwell"  # Triton may include a second assembler for newer PTX.
    program = program or (newer if newer.is_file() else programs / "ptxas")
    target = re.search(r"^\.target\s+(\w+)", code.ptx, re.MULTILINE)
    command = [str(program), "-v", f"-arch={target[1] if target else ''}", "-o", os.devnull, "-"]
    done = subprocess.run(command, input=code.ptx, capture_output=True, text=True, check=True)
    output = done.stdout + done.stderr
    registers, spilled = (re.search(x, output) for x in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return int(registers[1]) if registers else 0, int(spilled[1]) if spilled else 0


def kernel(name: str) -> Any:
    """Return a kernel by the name in `schedule.Launch.kernel`. It does not require torch.

    Raises:
        ImportError: Triton is not installed.
    """
    from sparsifiner_edge.ops.triton import attend, merge, select, summarise

    return next(jitted for x in (attend, merge, select, summarise) if (jitted := getattr(x, f"{name}_kernel", None)))


def _function(name: str, capability: int) -> Any:
    """Return a kernel after checking that it can be compiled for a compute capability (times ten)."""
    if capability < LEAST_CAPABILITY:
        raise BackendError(
            f"Compute capability {capability / 10} is too low for the kernels.",
            f"The kernels require {LEAST_CAPABILITY / 10} or more.",
        )
    if os.environ.get("TRITON_INTERPRET") == "1":  # Check this first: an imported kernel stays interpreted.
        raise BackendError("TRITON_INTERPRET=1 interprets kernels and cannot compile them.", "Unset it.")
    try:
        return kernel(name)
    except ImportError as error:
        raise MissingExtraError("triton", "triton") from error
