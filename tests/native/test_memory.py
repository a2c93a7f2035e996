"""Tests of the native kernels without memory and with absurd sizes: the only result is an ONNX Runtime error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsifiner_edge.ops import native
from tests.native import allocation, hostile
from tests.native.test_replay import SOURCES
from tests.ops.matrix import feed, one_node

pytestmark = pytest.mark.everything

LIBRARY = native.library_path()


def run(script: str, **environment: str) -> str:
    """Return the output of a separate process."""
    command = [sys.executable, "-c", script, str(LIBRARY)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not allocation.SUPPORTED:
        pytest.skip("only with GNU's C library 2.35 or newer")
    return allocation.build_shim(tmp_path_factory.mktemp("shim"))


def test_every_failed_allocation_is_an_error_and_leaves_the_session_well(shim: Path) -> None:
    result = allocation.measured(shim, 360, seed=0)
    assert result["failures"] == 0, "\n".join(result["first"])
    assert result["trials"] == 360
    assert result["raised"] > 300  # otherwise nothing failed


def test_the_library_asks_for_memory_only_where_it_looks_at_the_answer() -> None:
    """Allocation must be checked: `new`, strings and the like throw.

    Thread-local variables are excluded too: they are allocated when a thread first uses them, and the C library ends
    the process if that fails.
    """
    command = ["nm", "-D", "--undefined-only", str(LIBRARY)]
    used = {line.split()[-1].split("@")[0] for line in subprocess.check_output(command, text=True).splitlines()}
    assert {"malloc", "aligned_alloc"} <= used
    names = ("__tls_get_addr", "__cxa_thread_atexit")
    assert not [name for name in used if name in names or name.startswith(("_Zn", "_ZSt", "_ZNSs", "_ZNSt7__cxx11"))]


def test_memory_is_given_back_with_the_last_session() -> None:
    """Some 100 MB of answers and logits are kept between calls, and freed with the last session."""
    script = (
        "import sys\n"
        "from tests.native.allocation import Bench\n"
        "from tests.ops.matrix import Case, cases\n"
        "def resident():\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]) // 1024\n"
        "small = cases('KeySelect')[0]\n"
        "changes = {'num_heads': 1, 'tile': 2**21, 'query_pool': 2**21, 'key_pool': 0, 'value_power': 0.0}\n"
        "large = Case(small.op, small.attributes | changes, 2**21, width=1, merged=False)\n"
        "bench = Bench(sys.argv[1], {'small': small, 'large': large}, shim=False)\n"
        "other, session, feed = bench.session('small'), bench.session('large'), bench.models['large'][1]\n"
        "before = resident()\n"
        "for _ in range(3): session.run(None, feed)\n"
        "during = resident()\n"
        "del session\n"
        "kept = resident()\n"
        "del other\n"
        "print(before, during, kept, resident())\n"
    )
    before, during, kept, after = map(int, run(script).split())
    assert during > before + 30
    assert kept > before + 30
    assert after < before + 10


def test_absurd_sizes_end_with_an_error_or_an_empty_answer(tmp_path: Path) -> None:
    """Each result is as declared, in a process with little memory, and without undefined behaviour."""
    # Only for the lowest instruction set: the others differ in the kernels, not in the sizes, and take long to build.
    flags = "-O1 -g -fsanitize=undefined -fno-sanitize-recover=all -DHWY_COMPILE_ONLY_STATIC"
    made = ["-S", str(SOURCES), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}"]
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    for command in ([cmake, *made], [cmake, "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    library = tmp_path / "libsparsifiner_ops.so"
    assert b"__ubsan_handle" in library.read_bytes()
    command = [sys.executable, "-m", "tests.native.hostile", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} {done.stderr[-2000:]}"
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(hostile.CASES)
    for case, size, expected, got in told:
        assert size < 800
        assert expected in got, f"{case}: {got}"


def test_keys_beyond_two_to_the_24_are_found_exactly() -> None:
    """Floats cannot distinguish neighbouring integers from there on."""
    patches, third = 2**24 + 5, 12345
    qkv = np.zeros((1, patches, 3), np.float32)
    qkv[..., 0] = 1
    qkv[0, [third, -2, -1], 1] = 3, 4, 5
    one = np.ones((1, 1, 1), np.float32)
    settings = {
        "num_heads": 1,
        "num_prefix": 0,
        "tile": 2**31 - 1,
        "query_pool": 2**31 - 1,
        "key_pool": 0,
        "keys": 3,
        "scale": 0.2,
        "value_power": 0.0,
    }
    inputs = [qkv, np.ones((1, patches), np.float32), one, one]
    session = allocation.Bench(str(LIBRARY), {}, shim=False).open(one_node("KeySelect", settings, inputs))
    got = session.run(None, feed("KeySelect", inputs))[0]
    np.testing.assert_array_equal(got, [[[[third, patches - 2, patches - 1]]]])
