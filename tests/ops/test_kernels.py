"""The table of kernels: it names operators that there are, and tells what runs a model."""

from __future__ import annotations

import pytest

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.kernels import NATIVE, TRITON, TRITON_TYPES, described
from sparsifiner_edge.ops.schema import OPERATORS


def test_kernels_have_operators_and_types_of_the_schema() -> None:
    for name, kinds in (*((x, ("float32",)) for x in NATIVE), *((x, TRITON_TYPES) for x in TRITON)):
        assert set(kinds) <= set(OPERATORS[name].inputs[0].dtypes)


def test_what_runs_a_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "target", lambda: "AVX2")
    both = {"KeySelect", "SparseAttention"}
    assert described((), native_library=True) == "none (standard operators)"
    assert described(both, native_library=True) == "native, AVX2"
    assert described({*both, "B", "A"}, native_library=True) == "native, AVX2; function bodies: A, B"
    assert described({"A"}, native_library=True) == "function bodies"
    assert described(both, native_library=False) == "function bodies"
    assert described(both, False, "is not built") == "function bodies (the native library is not built)"
