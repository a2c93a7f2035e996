"""The table of sparse over dense attention on GPUs, and what goes by it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import board_names, load_board
from sparsifiner_edge.profiles.roofline import GPU_FIT, SPARSE_KINDS, Workload, crossing, times_faster

FOUND = json.loads((Path(__file__).parents[1] / "profiles/boards/gpu_attention.json").read_text(encoding="utf-8"))
ORIN = load_board("jetson-orin-nano-8gb-super")


def test_every_board_that_kernels_are_for_has_a_row() -> None:
    wanted = {name for name in board_names() if load_board(name).sm >= 80}
    assert set(FOUND["whole"]) == wanted
    grid = FOUND["grid"]
    assert set(FOUND["busy"]) == wanted
    for rows in (*FOUND["whole"].values(), *FOUND["busy"].values()):
        assert [len(rows), len(rows[0]), len(rows[0][0])] == [len(grid[x]) for x in ("batch", "keep", "tokens")]
        assert all(x > 0 for rates in rows for row in rates for x in row)


def test_between_its_sizes_it_is_interpolated() -> None:
    grid, row = FOUND["grid"], FOUND["whole"][ORIN.name][0][1]
    assert grid["keep"][1] == 0.1
    for tokens, value in zip(grid["tokens"], row, strict=True):
        assert times_faster(ORIN, tokens, 0.1, 6) == pytest.approx(value)
    low, high = row[3], row[4]
    assert min(low, high) <= (times_faster(ORIN, 1800, 0.1, 6) or 0) <= max(low, high)
    assert times_faster(ORIN, 100_000, 0.1, 6) == pytest.approx(row[-1])
    assert times_faster(load_board("cpu-generic"), 1370, 0.1, 6) is None


def test_fewer_keys_are_not_slower_and_larger_models_gain() -> None:
    for rows in FOUND["busy"].values():
        for rates in rows:
            assert all(a >= b for few, many in itertools.pairwise(rates) for a, b in zip(few, many, strict=True))
            assert rates[0][-1] > rates[0][0]


def test_the_crossing_is_where_it_begins_to_pay() -> None:
    for name in FOUND["whole"]:
        board = load_board(name)
        tokens = crossing(board, 0.1, 6)
        if tokens is not None:
            assert (times_faster(board, tokens, 0.1, 6) or 0) >= 1
        else:
            assert (times_faster(board, FOUND["grid"]["tokens"][-1], 0.1, 6) or 0) < 1
    assert crossing(load_board("cpu-generic"), 0.1, 6) is None


@pytest.mark.parametrize("patches", [256, 1369, 5476])
def test_an_estimate_goes_by_it(patches: int) -> None:
    shape = ModelShape(2, 6, 384, 1536, 1, patches, 14)

    def attention(sparsity: SparsityConfig) -> float:
        found = roofline.costs(Workload(shape, sparsity), ORIN, "fp16", GPU_FIT)
        chosen = [c for c in found if c.operator.layer == 1 and c.operator.kind in SPARSE_KINDS]
        return sum(c.seconds - c.operator.launches * GPU_FIT.launch_us * 1e-6 for c in chosen)

    dense, sparse = attention(SparsityConfig(keep=1)), attention(SparsityConfig(keep=0.1, cells=25))
    assert dense / sparse == pytest.approx(times_faster(ORIN, patches + 1, 0.1, 6, launches=False))
