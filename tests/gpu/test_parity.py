"""Tests of the Triton kernels on a real GPU, if there is one, against the reference and torch.

Without Triton they fail.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sparsifiner_edge.ops.torch_triton import triton_layer
from sparsifiner_edge.ops.triton import why_not_triton
from tests.ops.matrix import Case, cases
from tests.triton.inputs import DTYPES, NAMES, case_of, hold, hold_layer, layer_of, run, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
MATRIX = [(case, 8) for name in NAMES for case in cases(name)]
LAYERS = [
    (case_of("KeySelect", 300, sized=merged, tile=tile, key_pool=17, scale=width**-0.5), width)
    for tile, width, merged in itertools.product((8, 16, 64), (32, 64), (False, True))
]
MERGING = [
    (case, width)
    for case in (case_of("MatchTokens", 301, num_heads=5, merged=40), case_of("MergeTokens", 301, batch=2))
    for width in (32, 72, 128)
]
LARGE = [
    (case_of("KeySelect", 4096, batch=2, num_heads=3, tile=64, query_pool=16, key_pool=164, keys=410), 64),
    (case_of("KeySelect", 9216, num_heads=1, tile=64, query_pool=16, key_pool=369, keys=922), 64),
    (case_of("MatchTokens", 4097, batch=2, num_heads=3, window=16, merged=500), 64),
    (case_of("MatchTokens", 1369, num_heads=6, window=64, merged=684), 128),
    (case_of("MergeTokens", 5476, batch=2), 64),
]


def agrees(case: Case, width: int, dtype: str) -> torch.Tensor:
    """Run an operator or a layer, compare it with the reference and return the result."""
    given = tensors(case, width, dtype, "cuda")
    shapes = [x.shape for x in case.inputs()]
    shapes[0] = next(iter(given.values())).shape
    assert not why_not_triton(case.op.name, case.attributes, shapes, next(iter(given.values())))
    if case.op.name != "KeySelect":
        got = run(case, given)
        hold(case, given, got, dtype)
        return got
    from sparsifiner_edge.ops.triton.run import launch

    schedule = layer_of(case, given)
    done = launch(schedule, given)
    hold_layer(case, given, done, schedule)
    return done["output"]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("case", "width"), MATRIX + LAYERS + MERGING, ids=str)
def test_agrees_over_the_matrix_and_at_every_head_dimension(case: Case, width: int, dtype: str) -> None:
    key_pool = case.attributes.get("key_pool", 99)
    if key_pool and -(-case.patches // key_pool) < 28:
        agrees(case, width, dtype)


@pytest.mark.parametrize(("case", "width"), LARGE, ids=str)
def test_agrees_at_large_sizes(case: Case, width: int) -> None:
    agrees(case, width, "float16")


def test_as_many_patches_as_there_may_be() -> None:
    """All sources are equal: each is most similar to the lowest of its window, and the first ones merge."""
    case = case_of("MatchTokens", 16384, num_heads=1, num_prefix=0, merged=8192)
    given = {"qkv": torch.ones(1, 16384, 96, device="cuda").half(), "sizes": torch.ones(1, 16384, device="cuda")}
    hold(case, given, run(case, given), "float32")


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_small_and_odd_sizes_sanitised_give_the_same_bits_twice(dtype: str) -> None:
    """All kernels, for `compute-sanitizer` (make gpu), which takes a hundred times as long."""
    for case in (
        *(case_of(name, 77) for name in NAMES[1:]),
        case_of("KeySelect", 77, tile=16, query_pool=8, key_pool=7, keys=9),
    ):
        assert torch.equal(agrees(case, 64, dtype), agrees(case, 64, dtype))
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", NAMES)
def test_captured_as_a_graph(name: str) -> None:
    case = case_of(name, 300, **({"key_pool": 17} if name == "KeySelect" else {}))
    given = tensors(case, 64, "float16", "cuda")

    def compute() -> Any:
        if name == "KeySelect":
            return triton_layer(case.attributes, given["qkv"], given.get("sizes"), given["proj_q"], given["proj_k"])
        return run(case, given)

    expected = compute()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = compute()
    captured.replay()
    assert torch.equal(got, expected)
