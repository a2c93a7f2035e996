"""Tests of a board's layout for a sparse model: it is used if images confirm it, otherwise the reason is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.export import gpu_layout
from sparsifiner_edge.export.gpu_layout import fit_to_gpus
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student
from tests.models import TINY_CONFIG, student


def wide() -> Student:
    """Nearly dense model of tile 16 with more background tokens than kernels support."""
    return student(sparsity=dataclasses.replace(TINY_CONFIG, keep=0.9, background_tokens=40))


def layout(made: Student) -> tuple[int, int]:
    return made.sparsity.tile, made.sparsity.background_tokens


def test_tile_64_and_few_cells_are_taken_where_they_pass(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, images = wide(), sorted(pictures.iterdir())
    assert layout(own) == (16, 40)
    taken, found = fit_to_gpus(own, images)
    assert found is not None
    assert (layout(taken), found.tile, found.background_tokens, found.images, found.refused) == (
        (64, 31),
        16,
        40,
        3,
        None,
    )
    assert 0.97 <= (found.cosine or 0) < 1
    assert taken.model.blocks[0].attn.sparsity.tile == 64
    assert layout(own) == (own.model.blocks[0].attn.sparsity.tile, 40) == (16, 40)
    assert fit_to_gpus(taken, ()) == (taken, None)


@pytest.mark.parametrize(
    ("changes", "judged", "why"),
    [
        ({}, False, "give a folder with --calibrate DIR"),
        ({"token_keep": ((0, 0.5),)}, True, "prunes other tokens"),
        ({"keep": 0.1}, True, "at least 0.999999 is needed"),
    ],
)
def test_what_cannot_be_judged_or_fails_is_kept(changes, judged, why, pictures, monkeypatch):
    monkeypatch.setattr(gpu_layout, "LEAST_TOKENS_COSINE", 0.999999)
    own = wide()
    own = dataclasses.replace(own, sparsity=dataclasses.replace(own.sparsity, **changes))
    set_budget(own.model, own.sparsity)
    kept, found = fit_to_gpus(own, sorted(pictures.iterdir()) if judged else ())
    assert kept is own
    assert found is not None
    assert why in (found.refused or "")


def test_what_has_no_such_layout_is_left_alone() -> None:
    for sparsity in (SparsityConfig(keep=1), SparsityConfig.for_preset("paper", keep=0.25)):
        own = student(sparsity=sparsity)
        assert fit_to_gpus(own, ()) == (own, None)
