"""The C interface: every operator against the NumPy reference, refusals, threads of its own; sanitizers in C."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.ops.kernels import NATIVE
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.torch_native import native_kernels
from tests.native.test_replay import SOURCES, sanitised_objects
from tests.once import Once
from tests.ops.matrix import Case, cases, check, run_reference

HERE = Path(__file__).parent


def run(operators: Operators, case: Case, inputs: list[np.ndarray]) -> np.ndarray:
    like = run_reference(case, inputs)
    output = np.full(like.shape, -1, np.int32 if like.dtype.kind == "i" else np.float32)
    operators.run(case.op.name, case.attributes, inputs, output)
    return output


@pytest.mark.parametrize("name", NATIVE.operators)
def test_agrees_with_the_reference_on_any_number_of_threads(name: str) -> None:
    found = []
    for threads in (1, 2, 5):
        operators = Operators(threads)
        made = [(case, case.inputs(seed)) for seed, case in enumerate(cases(name))]
        results = [run(operators, case, inputs) for case, inputs in made]
        for (case, inputs), got in zip(made, results, strict=True):
            check(case, inputs, got)
        found.append([got.tobytes() for got in results])
        operators.close()
        operators.close()
    assert found[0] == found[1] == found[2]


def test_callers_at_a_time_share_one_pool() -> None:
    operators = Operators(3)
    made = [(case, case.inputs(seed)) for seed, case in enumerate(cases("SparseAttention"))]
    expected = [run(operators, case, inputs).tobytes() for case, inputs in made]
    wrong: list[int] = []

    def call() -> None:
        for _ in range(20):
            for number, (case, inputs) in enumerate(made):
                if run(operators, case, inputs).tobytes() != expected[number]:
                    wrong.append(number)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    operators.close()


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("DenseAttention", {"num_heads": -1}, "num_heads must be finite and at least 1, got -1"),
        ("DenseAttention", {"scale": float("nan")}, "scale must be finite and at least 0, got nan"),
        ("KeySelect", {"keys": 5000}, "keys 5000 exceed the 130 patches"),
        ("KeySelect", {"probe": 3}, "tile 16 is not a multiple of probe 3"),
        ("SparseAttention", {"num_prefix": 500}, "131 tokens leave no patch after 500"),
        ("SparseAttention", {"prefix_keys": 0}, "prefix_keys 0 goes with tile 1"),
        ("SparseAttention", {"cell": 2**31}, "cell is 2147483648"),
        ("MatchTokens", {"window": 3}, "window 3 is odd"),
        ("MatchTokens", {"merged": 2**31}, "merged 2147483648 exceeds half of the 130 patches"),
    ],
)
def test_what_the_schema_refuses_is_refused(op: str, change: dict[str, float], message: str) -> None:
    case = cases(op)[0]
    inputs = case.inputs()
    output = np.zeros(
        run_reference(case, inputs).shape, np.int32 if case.op.output.dtypes == ("int32",) else np.float32
    )
    operators = Operators(1)
    with pytest.raises(BackendError, match=f"sparsifiner::{op}: {message}"):
        operators.run(op, {**case.attributes, **change}, inputs, output)
    with pytest.raises(BackendError, match="float64"):
        operators.run(
            "DenseAttention", cases("DenseAttention")[0].attributes, [np.zeros((1, 3, 24)), np.ones((1, 3))], output
        )
    operators.close()


def test_a_program_in_c_links_the_library_that_was_built(tmp_path: Path) -> None:
    library = native.library_path()
    assert library is not None
    command = ["gcc", "-std=c99", f"-I{library.parent}", str(HERE / "interface.c"), str(library), "-pthread"]
    done = subprocess.run([*command, "-o", str(tmp_path / "program")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stdout + done.stderr


@pytest.mark.everything
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_a_program_in_c_calls_every_operator_under_sanitizers(once: Once, sanitizers: str) -> None:
    made, options = sanitised_objects(once, sanitizers)

    def build(folder: Path) -> None:
        strict, main = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"], str(folder / "main.o")
        for command in (
            ["gcc", *strict, f"-I{SOURCES}", *options, "-c", str(HERE / "interface.c"), "-o", main],
            ["g++", main, *made, *options, "-o", str(folder / "program")],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

    program = once(f"interface-{sanitizers.partition(',')[0]}", build) / "program"
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout == "well\n"


@pytest.mark.parametrize("name", ["KeySelect", "SparseAttention"])
def test_torch_runs_them_where_it_is_told_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    plain = Operators.run

    def counted(self: Operators, op: str, *rest: object) -> None:
        ran.append(op)
        plain(self, op, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Operators, "run", counted)
    for seed, case in enumerate(cases(name)):
        inputs = case.inputs(seed)
        first, given, *rest = (torch.from_numpy(x) for x in inputs)
        sizes = given if case.merged else None
        call = ops.key_select if name == "KeySelect" else ops.sparse_attention
        with native_kernels(2):
            got = call(first, *rest, sizes=sizes, **case.attributes)
            assert ran == [name]
            if name.endswith("Attention"):
                again = call(first.clone().requires_grad_(), *rest, sizes=sizes, **case.attributes)
                assert again.requires_grad
                torch.testing.assert_close(again.detach(), got, rtol=1e-4, atol=1e-5)
        ran.clear()
        check(case, inputs, got.numpy())
        call(first, *rest, sizes=sizes, **case.attributes)
        assert not ran
