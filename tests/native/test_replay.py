"""The kernels built apart: with sanitizers of addresses and undefined behaviour, AMX emulated, and for AArch64."""

from __future__ import annotations

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

from sparsifiner_edge.ops.schema import OPERATORS
from tests.native.test_kernels import PAPER
from tests.native.test_kernels import SETS as FLOAT_SETS
from tests.once import Once
from tests.ops import matrix
from tests.ops.matrix import Case, cases, check, output_type

pytestmark = pytest.mark.everything

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "runtime" / "native"
OPS = {
    "DenseAttention": 0, "SparseAttention": 1, "KeySelect": 2, "MatchTokens": 4, "MergeTokens": 5,
}  # fmt: skip
BF16_SETS = ("AMX", "AVX3_ZEN4", "NEON_BF16")
SETS = (*FLOAT_SETS, "AMX", "AVX3_ZEN4") if os.uname().machine == "x86_64" else (*FLOAT_SETS, "NEON_BF16")
DISABLED = re.findall(r'"(HWY_DISABLED_TARGETS=[^"]*)"', (SOURCES / "CMakeLists.txt").read_text())[0]
NO_SUCH_SET = 2
AARCH64 = Path(sys.prefix) / "aarch64"
"""Highway for AArch64, unpacked by `make aarch64`."""


def compiled(compiler: str, source: Path, output: Path, *options: str) -> Path:
    """An object file, or a program where `options` name what to link."""
    command = [compiler, "-std=c++17", f"-I{SOURCES}", f"-D{DISABLED}", str(source), *options, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def objects(compiler: str, folder: Path, *options: str) -> list[str]:
    """The library without ONNX Runtime's adapter, compiled."""
    sources = [path for path in sorted(SOURCES.glob("*.cc")) if path.name != "onnxruntime.cc"]
    return [str(compiled(compiler, path, folder / f"{path.stem}.o", "-c", *options)) for path in sources]


def sanitised_objects(once: Once, sanitizers: str) -> tuple[list[str], list[str]]:
    """The same under sanitizers, made once for all tests, and the options that what links them needs."""
    # Highway's own assertions are in, which call its library. Checks of addresses as calls, and -Og: that compiles in a
    # fifth of the time.
    options = ["-Og", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-DSPARSIFINER_EMULATE_AMX=1"]
    options += ["--param", "asan-instrumentation-with-call-threshold=0"]
    folder = once(f"objects-{sanitizers.partition(',')[0]}", lambda made: objects("g++", made, *options))
    return [str(path) for path in sorted(folder.glob("*.o"))], [*options, "-lhwy", "-pthread"]


def record(case: Case, inputs: list[np.ndarray]) -> bytes:
    a, (batch, tokens, packed) = case.attributes, inputs[0].shape
    sizes = case.op.sizes(a, [x.shape for x in inputs])
    header = struct.pack(
        "<15q2f", OPS[case.op.name], case.merged, batch, tokens, a.get("num_heads", 1), sizes.get("d", packed),
        a.get("num_prefix", 0), a.get("num_prefix", 0) * a.get("prefix_keys", 0), a.get("tile", 0), a.get("probe", 0),
        a.get("cell", 0), sizes.get("K", sizes.get("M", 0)), sizes.get("c", 0), a.get("window", 0), a.get("merged", 0),
        a.get("scale", 1.0), a.get("value_power", 0.0),
    )  # fmt: skip
    return header + b"".join(np.ascontiguousarray(x).tobytes() for x in inputs)


def replay(command: list[str], made: list[tuple[Case, list[np.ndarray]]]) -> list[np.ndarray]:
    stream = b"".join(record(case, inputs) for case, inputs in made)
    done = subprocess.run(command, input=stream, capture_output=True, check=False)
    if done.returncode == NO_SUCH_SET:
        pytest.skip(f"this machine has no {command[-1]}")
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
    """Of all operators, or of attention, held to what bfloat16 allows."""
    made = []
    for matrix.HEAD_DIM in (8, 64, 20):
        for name in OPS:
            if bf16 and not name.endswith("Attention"):
                continue
            chosen = cases(name) + (PAPER if name == "SparseAttention" else [])
            made += [(case, case.inputs(seed)) for seed, case in enumerate(chosen)]
    matrix.HEAD_DIM = 8
    return made


def agree(command: list[str]) -> None:
    bf16 = command[-1] in BF16_SETS
    made = matrix_cases(bf16)
    for (case, inputs), got in zip(made, replay(command, made), strict=True):
        check(dataclasses.replace(case, dtype="bfloat16") if bf16 else case, inputs, got)


@pytest.fixture(scope="module")
def sanitised(once: Once) -> Path:
    made, options = sanitised_objects(once, "address,undefined")
    program = HERE / "replay.cc"
    return once("sanitised", lambda folder: compiled("g++", program, folder / "replay", *made, *options)) / "replay"


@pytest.mark.long
@pytest.mark.parametrize("target", SETS)
def test_the_matrix_under_sanitizers(sanitised: Path, target: str) -> None:
    agree([str(sanitised), target])


@pytest.mark.parametrize("target", SETS)
def test_fuzzed_shapes_and_indices_under_sanitizers(sanitised: Path, target: str) -> None:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(150):
        matrix.HEAD_DIM = int(rng.choice([1, 3, 8, 16, 17, 33, 64, 80]))
        patches, prefix, heads = int(rng.integers(1, 90)), int(rng.integers(0, 4)), int(rng.integers(1, 4))
        probe = int(rng.choice([1, 2, 3, 8]))
        tile = probe * int(rng.integers(1, 25))
        shared = {"num_heads": heads, "num_prefix": prefix, "scale": float(rng.choice([0.0, 0.2, 1e3]))}
        shared |= {"tile": tile, "cell": int(rng.integers(0, 60))}
        matrix.CHANNELS = int(rng.integers(1, 40))
        keys = int(rng.integers(1, patches + 1))
        select = Case(
            OPERATORS["KeySelect"], {**shared, "probe": probe, "keys": keys, "value_power": 2.0}, patches, 1
        )  # fmt: skip
        spoiled = select.inputs(1)
        for x in spoiled:  # not even numbers
            x.flat[:: max(1, x.size // 7)] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-42])
        attend = Case(OPERATORS["SparseAttention"], {**shared, "prefix_keys": 1}, patches, 1)
        lists = rng.integers(-(2**31), 2**31, (1, heads, math.ceil(patches / tile), keys)).astype(np.int32)
        lists[..., ::2] %= patches
        dense = Case(OPERATORS["DenseAttention"], {"num_heads": heads, "scale": 0.2}, patches + prefix, 1)
        sizes = rng.choice([1, 7, 0, -1, np.nan, np.inf], (1, patches + prefix)).astype(np.float32)
        for case, rest in ((select, spoiled[2:]), (attend, [lists]), (dense, [])):
            made.append((case, [spoiled[0], sizes, *rest]))
            made.append((dataclasses.replace(case, merged=False), [spoiled[0], np.ones_like(sizes), *rest]))
        if patches > 1:
            settings = {"num_heads": heads, "num_prefix": prefix, "window": 2 * int(rng.integers(1, 40))}
            settings |= {"merged": int(rng.integers(1, patches // 2 + 1))}
            made.append((Case(OPERATORS["MatchTokens"], settings, patches, 1), [spoiled[0], sizes]))
        pairs = rng.integers(-(2**31), 2**31, (1, keys, 2)).astype(np.int32)
        made.append((Case(OPERATORS["MergeTokens"], {}, patches, 1), [spoiled[0], sizes, pairs]))
    matrix.HEAD_DIM, matrix.CHANNELS = 8, 4
    for (case, _), got in zip(made, replay([str(sanitised), target], made), strict=True):
        if case.op.name == "MatchTokens":
            stays, joins = got[0].T  # Every token once, whatever the keys are.
            assert sorted({*stays, *joins}) == list(range(case.patches + case.prefix))
        if case.op.name.endswith("KeySelect"):
            assert (np.diff(got, axis=-1) > 0).all()
            assert got.min() >= 0
            assert got.max() < case.patches


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64") and AARCH64.is_dir()),
    reason="no AArch64 compiler, emulator or Highway: `make aarch64` installs them (root, Debian)",
)
def test_the_matrix_on_aarch64(tmp_path: Path) -> None:
    compiler, options = "aarch64-linux-gnu-g++", ("-O2", f"-I{AARCH64 / 'usr/include'}")
    made = objects(compiler, tmp_path, *options)
    binary = compiled(compiler, HERE / "replay.cc", tmp_path / "replay", *made, *options)
    for target in ("NEON", "NEON_BF16"):
        agree(["qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu", str(binary), target])
