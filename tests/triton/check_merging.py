"""Checks of MatchTokens and MergeTokens in Triton's interpreter; run together with `check_interpreted.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sparsifiner_edge.ops.triton import run as kernels
from sparsifiner_edge.ops.triton.schedule import Schedule
from sparsifiner_edge.ops.triton.schedule_merge import schedule_match, schedule_merge, schedule_merging
from sparsifiner_edge.sparse.layer import CarriedTokens
from sparsifiner_edge.sparse.merge import Merging
from tests.ops.matrix import Case
from tests.triton.inputs import DTYPES, case_of, hold, run, tensors
from tests.triton.interpreting import launched, shuffled


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def same_pairs(case: Case, qkv: torch.Tensor, sizes: torch.Tensor) -> np.ndarray:
    """Return the pairs of MatchTokens after asserting that they equal the reference's."""
    given = {"qkv": qkv.half(), "sizes": sizes}
    got = run(case, given)
    hold(case, given, got, "float32")
    return got.numpy()


@pytest.mark.parametrize(
    ("patches", "changes"),
    [
        (2, {"merged": 1, "window": 2}),
        (3, {"merged": 1, "num_prefix": 0}),
        (37, {"merged": 18, "window": 200}),  # a window larger than everything
        (70, {"merged": 35, "batch": 2, "num_heads": 3, "num_prefix": 5}),
        (131, {"merged": 30, "window": 34, "num_prefix": 150}),
    ],
    ids=str,
)
def test_matches_what_the_reference_does_at_odd_sizes(patches: int, changes: dict[str, Any]) -> None:
    case = case_of("MatchTokens", patches, **changes)
    same_pairs(case, *tensors(case).values())


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("width", [24, 128])
def test_merging_at_every_element_type_and_head_dimension(width: int, dtype: str) -> None:
    for case in (case_of("MatchTokens", 40, num_heads=2), case_of("MergeTokens", 40, batch=2)):
        given = tensors(case, width, dtype)
        got = run(case, given)
        assert got.dtype == (torch.int32 if case.op.name == "MatchTokens" else DTYPES[dtype])
        hold(case, given, got, dtype)


def one_hot() -> torch.Tensor:
    """Return qkv [2,71,12] with keys of length 1 along an axis: similarities are exact, and many are tied."""
    keys = torch.eye(4)[torch.randint(0, 4, (2, 71))] * (1 - 2 * torch.randint(0, 2, (2, 71, 1)))
    return torch.cat([torch.zeros_like(keys), keys, torch.zeros_like(keys)], -1)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("choice", [[1.0], [1.0, 4.0], [0.0, 1.0]], ids=str)
@pytest.mark.parametrize("merged", [1, 35])
def test_matching_gives_ties_to_the_lower_index(merged: int, choice: list[float]) -> None:
    """Sizes of 0 give -0, which is not less than 0, and NaN."""
    case = case_of("MatchTokens", 70, batch=2, merged=merged)
    sizes = torch.tensor(choice)[torch.randint(0, len(choice), (2, 71))]
    same_pairs(case, one_hot(), sizes)
    alike = same_pairs(case, torch.ones(2, 71, 12), torch.ones(2, 71))
    assert (alike[:, :, 0] != alike[:, :, 1]).sum() == 2 * merged


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_matching_takes_what_is_no_number(value: float) -> None:
    """A key of zero length is similar to none: NaN counts as less than any number."""
    case = case_of("MatchTokens", 40, num_prefix=1, merged=18)
    qkv, sizes = tensors(case).values()
    width = qkv.shape[-1] // 3
    qkv[:, 5:20, width : 2 * width] = value
    same_pairs(case, qkv, sizes)
    qkv[:, :, width : 2 * width] = torch.nan
    pairs = same_pairs(case, qkv, sizes)[0]
    assert {int(b) for a, b in pairs if a != b} <= set(range(1, 41, 2))


@pytest.mark.parametrize("case", [case_of("MatchTokens", 45, batch=2, merged=22), case_of("MergeTokens", 45, batch=2)])
def test_merging_stays_within_its_tensors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory is NaN before it is written, programs run in random order, and invalid pairs are clamped."""
    given = tensors(case, 24)
    make = schedule_match if case.op.name == "MatchTokens" else schedule_merge
    schedule = make([x.shape for x in given.values()], case.attributes, "float16")
    expected = run(case, given)
    orders = shuffled(monkeypatch)
    assert torch.equal(launched(schedule, given)[case.op.output.name], expected)
    assert orders
    if "pairs" in given:
        wild = torch.randint(-(2**31), 2**31 - 1, given["pairs"].shape, dtype=torch.int32)
        wild[:, 0], wild[:, 1, 0], wild[:, 1, 1] = 2**31 - 1, -(2**31), 46
        got = launched(schedule, given | {"pairs": wild})["output"]
        assert torch.equal(got, run(case, given | {"pairs": wild.clamp(0, 45)}))
        assert torch.equal(got[:, 0], given["x"][:, 45])


def test_a_merge_launches_kernels_and_has_the_gradient_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    right = kernels.launch

    def watched(schedule: Schedule, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.extend(x.kernel for x in schedule.launches)
        return right(schedule, inputs)

    monkeypatch.setattr(kernels, "launch", watched)
    x, qkv = torch.randn(2, 41, 12).half(), torch.randn(2, 41, 24).half()
    places = torch.arange(40).expand(2, -1)

    def merge(x: torch.Tensor) -> Any:
        return Merging(7, 1, 16)(CarriedTokens(x, None, None, places), qkv, 2).values

    expected = merge(x)
    assert seen == ["metric", "partners", "suitors", "pairs", "merge"]
    compiled: Any = torch.compile(merge, backend="eager")
    assert torch.equal(compiled(x), expected)
    leaf = x.clone().requires_grad_()
    found = merge(leaf)
    assert seen.count("merge") == 2, "where a gradient may follow torch runs"
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    found.float().sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


def test_sizes_and_places_go_on_in_the_launches_that_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two consecutive layers with programs in random order; invalid places are clamped."""
    shuffled(monkeypatch)
    attributes = {"num_heads": 2, "num_prefix": 1, "window": 16, "merged": 7}
    merging, tokens = (
        Merging(7, 1, 16),
        CarriedTokens(torch.randn(2, 41, 300).half(), None, None, torch.arange(40)[None]),
    )
    tokens = tokens._replace(positions=tokens.positions.expand(2, -1))
    for _ in range(2):
        count = tokens.values.shape[1]
        given = {"qkv": torch.randn(2, count, 24).half(), "sizes": torch.ones(2, count), "x": tokens.values}
        given |= (
            {}
            if tokens.sizes is None or tokens.places is None
            else {"sizes": tokens.sizes, "places": tokens.places.int()}
        )
        schedule = schedule_merging([x.shape for x in given.values()], attributes, "float16")
        assert len(schedule.launches) == 5
        done, tokens = launched(schedule, given), merging(tokens, given["qkv"], 2)
        for name, wanted in (("output", tokens.values), ("sizes_out", tokens.sizes), ("places_out", tokens.places)):
            assert wanted is not None
            assert torch.equal(done[name], wanted.to(done[name].dtype)), name
    wild = launched(schedule, given | {"places": torch.full((2, 40), 2**31 - 1, dtype=torch.int32)})
    assert torch.equal(wild["places_out"], done["after"][:, -1:].expand(2, 40))
