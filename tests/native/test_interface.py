"""The C interface from a program in C, under sanitizers too, and from PyTorch; `test_kernels` runs all else by it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.torch_native import native_kernels
from tests.native.test_replay import SOURCES, sanitised_objects
from tests.once import Once
from tests.ops.matrix import cases, check

HERE = Path(__file__).parent


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
