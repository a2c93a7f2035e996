"""Tests of the kernels from a C program: the built library, and separate builds.

The builds use address, undefined-behaviour and thread sanitizers, emulated AMX, and AArch64.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.native import interface
from sparsifiner_edge.ops.schema import OPERATORS
from tests.everything import first
from tests.native.test_kernels import BF16_SETS
from tests.native.test_kernels import SETS as FLOAT_SETS
from tests.once import Once
from tests.ops.matrix import PAPER, Case, cases, check, output_type

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "runtime" / "native"
OPS = ("DenseAttention", "CachedAttention", "SparseAttention", "KeySelect", "MatchTokens", "MergeTokens")
"""In the order of `Operator` in replay.c."""
SETS = (*FLOAT_SETS, "AMX", "AVX3_ZEN4") if os.uname().machine == "x86_64" else (*FLOAT_SETS, "NEON_BF16")
DISABLED = re.findall(r'"(HWY_DISABLED_TARGETS=[^"]*)"', (SOURCES / "CMakeLists.txt").read_text())[0]
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
NO_SUCH_SET = 2
AARCH64 = Path(sys.prefix) / "aarch64"
"""Highway for AArch64, unpacked by `make aarch64`."""


def compiled(compiler: str, *options: str | Path) -> None:
    """Run a compiler."""
    done = subprocess.run([compiler, f"-I{SOURCES}", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def built(folder: Path, prefix: str, options: list[str], *linked: str) -> Path:
    """Build replay.c with the library's sources except ONNX Runtime's adapter, with a compiler of that prefix."""
    compiled(f"{prefix}gcc", *STRICT, *options, "-c", HERE / "replay.c", "-o", folder / "replay.o")
    for path in SOURCES.glob("*.cc"):
        if path.name not in ("onnxruntime.cc", "openvino.cc"):
            flags = ["-std=c++17", f"-D{DISABLED}", *options]
            compiled(f"{prefix}g++", *flags, "-c", path, "-o", folder / f"{path.stem}.o")
    compiled(f"{prefix}g++", *options, *folder.glob("*.o"), *linked, "-o", folder / "replay")
    return folder / "replay"


def sanitised(once: Once, sanitizers: str) -> str:
    """The program with sanitizers, built once for all tests."""
    # Highway's own assertions are enabled, which call its library. Address checks as calls and -Og compile in a fifth
    # of the time.
    options = ["-Og", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-DSPARSIFINER_EMULATE_AMX=1"]
    options += ["--param", "asan-instrumentation-with-call-threshold=0"]
    name = f"replay-{sanitizers.partition(',')[0]}"
    return str(once(name, lambda folder: built(folder, "", options, "-lhwy", "-pthread")) / "replay")


def record(case: Case, inputs: list[np.ndarray]) -> bytes:
    """Return a call as replay.c reads it: the C structures are those of the bindings."""
    shapes = [x.shape for x in inputs]
    result = interface._Tensor(None, math.prod(case.op.output_shape(case.attributes, shapes)))
    inputs = [np.ascontiguousarray(x) for x in inputs]
    tensors = [interface._tensor(case.op.name, x, kind) for x, kind in zip(inputs, case.op.inputs, strict=True)]
    arguments = interface._arguments(case.op.name, case.attributes, inputs, [*tensors, result])
    held = [x if isinstance(x, ctypes.Structure) else x._obj for x in arguments]
    content = [*map(bytes, held), *(x.tobytes() for x in inputs)]
    return struct.pack("<q", OPS.index(case.op.name)) + b"".join(content)


def replay(command: list[str], made: list[tuple[Case, list[np.ndarray]]]) -> list[np.ndarray]:
    stream = b"".join(record(case, inputs) for case, inputs in made)
    done = subprocess.run(command, input=stream, capture_output=True, check=False)
    if done.returncode == NO_SUCH_SET:
        pytest.skip(f"this machine's instruction sets are others: {command}")
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    results, place = [], 0
    for case, inputs in made:
        shape = case.op.output_shape(case.attributes, [x.shape for x in inputs])
        count = math.prod(shape)
        results.append(np.frombuffer(done.stdout, output_type(case), count, place).reshape(shape))
        place += 4 * count
    assert place == len(done.stdout)
    return results


def matrix_cases(bf16: bool) -> list[tuple[Case, list[np.ndarray]]]:
    """Return cases of all operators, or of attention with the tolerance of bfloat16."""
    names = [name for name in OPS if name.endswith("Attention") or not bf16]
    chosen = [case for name in names for case in cases(name) + PAPER * (name == "SparseAttention")]
    made = (dataclasses.replace(case, width=width) for width in (8, 64, 20) for case in chosen)
    return [(case, case.inputs(seed)) for seed, case in enumerate(made)]


def agree(command: list[str], bf16: bool) -> None:
    made = matrix_cases(bf16)
    for (case, inputs), got in zip(made, replay(command, made), strict=True):
        check(dataclasses.replace(case, dtype="bfloat16") if bf16 else case, inputs, got)


@pytest.mark.parametrize("target", first(("", *SETS)))
def test_a_program_in_c_runs_the_library_that_was_built(tmp_path: Path, target: str) -> None:
    library = native.library_path()
    assert library is not None
    compiled("gcc", *STRICT, f"-I{library.parent}", HERE / "replay.c", library, "-pthread", "-o", tmp_path / "replay")
    agree([str(tmp_path / "replay"), target, "3"], (target or native.target()) in BF16_SETS)


@pytest.mark.everything
@pytest.mark.long
@pytest.mark.parametrize("target", SETS)
def test_the_matrix_under_sanitizers(once: Once, target: str) -> None:
    agree([sanitised(once, "address,undefined"), target], target in BF16_SETS)


@pytest.mark.everything
@pytest.mark.long
def test_two_callers_and_a_pool_under_the_sanitizer_of_threads(once: Once) -> None:
    agree([sanitised(once, "thread"), FLOAT_SETS[-1], "3"], False)


@pytest.mark.everything
@pytest.mark.parametrize("target", SETS)
def test_fuzzed_shapes_and_indices_under_sanitizers(once: Once, target: str) -> None:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(150):
        width, channels = int(rng.choice([1, 3, 8, 16, 17, 33, 64, 80])), int(rng.integers(1, 40))
        patches, prefix, heads = int(rng.integers(1, 90)), int(rng.integers(0, 4)), int(rng.integers(1, 4))
        query_pool = int(rng.choice([1, 2, 3, 8]))
        tile = query_pool * int(rng.integers(1, 25))
        shared = {"num_heads": heads, "num_prefix": prefix, "scale": float(rng.choice([0.0, 0.2, 1e3]))}
        shared |= {"tile": tile, "key_pool": int(rng.integers(0, 60))}
        keys = int(rng.integers(1, patches + 1))
        settings = {**shared, "query_pool": query_pool, "keys": keys, "value_power": 2.0}
        select = Case(OPERATORS["KeySelect"], settings, patches, width=width, channels=channels)
        spoiled = select.inputs(1)
        for x in spoiled:  # not even numbers
            x.flat[:: max(1, x.size // 7)] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-42])
        attend = Case(OPERATORS["SparseAttention"], {**shared, "prefix_keys": 1}, patches)
        lists = rng.integers(-(2**31), 2**31, (1, heads, math.ceil(patches / tile), keys)).astype(np.int32)
        lists[..., ::2] %= patches
        dense = Case(OPERATORS["DenseAttention"], {"num_heads": heads, "scale": 0.2}, patches + prefix)
        sizes = rng.choice([1, 7, 0, -1, np.nan, np.inf], (1, patches + prefix)).astype(np.float32)
        cached = Case(OPERATORS["CachedAttention"], dense.attributes, patches + prefix)
        kept = rng.normal(size=(1, keys, 2 * heads * width)).astype(rng.choice(["float32", "float16"]))
        kept.flat[:: max(1, kept.size // 7)] = rng.choice([np.nan, np.inf, -np.inf, 6e4, 1e-7])
        made.append((cached, [spoiled[0], kept, rng.choice([0, 1, 7, -1, np.nan], (1, keys)).astype(np.float32)]))
        for case, rest in ((select, spoiled[2:]), (attend, [lists]), (dense, [])):
            made.append((case, [spoiled[0], sizes, *rest]))
            made.append((dataclasses.replace(case, merged=False), [spoiled[0], np.ones_like(sizes), *rest]))
        if patches > 1:
            settings = {"num_heads": heads, "num_prefix": prefix, "window": 2 * int(rng.integers(1, 40))}
            settings |= {"merged": int(rng.integers(1, patches // 2 + 1))}
            made.append((Case(OPERATORS["MatchTokens"], settings, patches), [spoiled[0], sizes]))
        pairs = rng.integers(-(2**31), 2**31, (1, keys, 2)).astype(np.int32)
        made.append((Case(OPERATORS["MergeTokens"], {}, patches), [spoiled[0], sizes, pairs]))
    for (case, _), got in zip(made, replay([sanitised(once, "address,undefined"), target], made), strict=True):
        if case.op.name == "MatchTokens":
            stays, joins = got[0].T  # Every token once, whatever the keys are.
            assert sorted({*stays, *joins}) == list(range(case.patches + case.prefix))
        if case.op.name.endswith("KeySelect"):
            assert (np.diff(got, axis=-1) > 0).all()
            assert got.min() >= 0
            assert got.max() < case.patches


@pytest.mark.everything
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64") and AARCH64.is_dir()),
    reason="no AArch64 compiler, emulator or Highway: `make aarch64` installs them (root, Debian)",
)
def test_the_matrix_on_aarch64(tmp_path: Path) -> None:
    program = built(tmp_path, "aarch64-linux-gnu-", ["-O2", f"-I{AARCH64 / 'usr/include'}"], "-pthread")
    for target in ("NEON", "NEON_BF16"):
        agree(["qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu", str(program), target], "BF16" in target)
