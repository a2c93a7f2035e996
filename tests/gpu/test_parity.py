"""The Triton kernels on a real GPU, where there is one, against the reference and torch. Without Triton they fail."""

from __future__ import annotations

import pytest
import torch

from sparsifiner_edge.ops.torch_triton import triton_layer
from sparsifiner_edge.ops.triton import VARIABLE
from tests.ops.matrix import Case, cases
from tests.triton.inputs import ATTENTION, DTYPES, NAMES, PAPER, case_of, hold, run, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
BOTH = [case for name in NAMES for case in cases(name)]
LARGE = [
    (case_of("KeySelect", 4096, batch=2, num_heads=3, tile=64, probe=16, cell=164, keys=410), 64),
    (case_of("SparseAttention", 1024, batch=2, num_heads=3, tile=64, cell=41), 64),
    (case_of("KeySelect", 9216, num_heads=1, tile=64, probe=16, cell=369, keys=922), 64),
    (case_of("MatchTokens", 4097, batch=2, num_heads=3, window=16, merged=500), 64),
    (case_of("MatchTokens", 1369, num_heads=6, window=64, merged=684), 128),
    (case_of("MergeTokens", 5476, batch=2), 64),
]


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's kernels cannot run, or Triton that is not installed, is an error."""
    monkeypatch.setenv(VARIABLE, "triton")


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", [*BOTH, PAPER], ids=str)
def test_agrees_over_the_matrix(case: Case, dtype: str) -> None:
    given = tensors(case, dtype=dtype, device="cuda")
    hold(case, given, run(case, given), dtype)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("tile", [8, 16, 64])
def test_agrees_at_every_head_dimension(tile: int, width: int, dtype: str) -> None:
    for name in ATTENTION:
        case = case_of(name, 300, tile=tile, scale=width**-0.5)
        given = tensors(case, width=width, dtype=dtype, device="cuda")
        hold(case, given, run(case, given), dtype)


@pytest.mark.parametrize(("case", "width"), LARGE, ids=str)
def test_agrees_at_large_sizes(case: Case, width: int) -> None:
    given = tensors(case, width=width, dtype="float16", device="cuda")
    hold(case, given, run(case, given), "float16")


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_merging_agrees_at_every_head_dimension(width: int, dtype: str) -> None:
    for case in (case_of("MatchTokens", 301, num_heads=5, merged=40), case_of("MergeTokens", 301, batch=2)):
        given = tensors(case, width=width, dtype=dtype, device="cuda")
        hold(case, given, run(case, given), dtype)


def test_as_many_patches_as_there_may_be() -> None:
    """Every seeker the same: each is most like the lowest of its window, and the first merge."""
    case = case_of("MatchTokens", 16384, num_heads=1, num_prefix=0, merged=8192)
    qkv, sizes = torch.ones(1, 16384, 96, device="cuda"), torch.ones(1, 16384, device="cuda")
    hold(case, [qkv, sizes], run(case, [qkv, sizes]), "float32")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("patches", [300, 1369])
def test_a_layer_is_its_two_operators(patches: int, dtype: str, merged: bool) -> None:
    from sparsifiner_edge.ops.triton import run as kernels

    case = case_of("KeySelect", patches, sized=merged, num_heads=3, tile=64, probe=8, keys=patches // 10)
    qkv, *others = tensors(case, width=64, dtype=dtype, device="cuda")
    given = (qkv, *(x.float() for x in others))
    sizes, (proj_q, proj_k) = given[1] if merged else None, given[-2:]
    got = triton_layer(case.attributes, qkv, sizes, proj_q, proj_k)
    assert got is not None
    lists = kernels.key_select(qkv, sizes, proj_q, proj_k, **case.attributes)
    hold(case, list(given), lists, dtype)
    shared = {name: case.attributes[name] for name in ("num_heads", "num_prefix", "tile", "cell", "scale")}
    hold(case_of("SparseAttention", patches, sized=merged, **shared), [*given[:-2], lists], got, dtype)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_twice_the_same_bits(dtype: str) -> None:
    merging = case_of("MatchTokens", 1000, num_heads=3, merged=300), case_of("MergeTokens", 1000)
    for case in (case_of("KeySelect", 1000, num_heads=3), *merging, case_of("SparseAttention", 1000, num_heads=3)):
        given = tensors(case, width=64, dtype=dtype, device="cuda")
        assert torch.equal(run(case, given), run(case, given))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_small_and_odd_sizes_sanitised(dtype: str) -> None:
    """Every kernel once, for `compute-sanitizer` (make gpu), which takes a hundred times as long."""
    from sparsifiner_edge.ops.triton import run as kernels

    for name in NAMES:
        case = case_of(name, 77)
        run(case, tensors(case, width=64, dtype=dtype, device="cuda"))
    case = case_of("KeySelect", 77, tile=16, probe=8, keys=9)
    qkv, proj_q, proj_k = tensors(case, width=64, dtype=dtype, device="cuda")
    kernels.layer(qkv, None, proj_q.float(), proj_k.float(), **case.attributes)
    torch.cuda.synchronize()


def test_wild_indices_are_harmless() -> None:
    case = case_of("SparseAttention", 300, num_heads=3)
    qkv, lists = tensors(case, width=64, device="cuda")
    wild = torch.randint(-(2**31), 2**31 - 1, lists.shape, dtype=torch.int32, device="cuda")
    assert torch.isfinite(run(case, [qkv, wild])).all()
    torch.cuda.synchronize()


@pytest.mark.parametrize("case", [case_of(x, 300) for x in ("SparseAttention", "MatchTokens", "MergeTokens")], ids=str)
def test_captured_as_a_graph(case: Case) -> None:
    given = tensors(case, width=64, dtype="float16", device="cuda")
    expected = run(case, given)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = run(case, given)
    captured.replay()
    assert torch.equal(got, expected)
