"""What export changes in a student: another tile, behind a gate, and dense layers where sparse attention is slower."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
import torch

from sparsifiner_edge.bundle.entries import Measured, Tiling
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.export import piece_times, student_changes
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.export.piece_times import Piece, PieceTimes
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import load_student, save_student
from tests.commands import manifest_of
from tests.models import student, vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(student(), tmp_path_factory.mktemp("student") / "student")


def test_dense_layers_are_kept_where_sparse_ones_are_slower(folder: Path, tmp_path: Path) -> None:
    manifest = manifest_of(export_bundle(folder, tmp_path / "b", measure=Execution()))
    (choice,) = manifest["measured"]["choices"]
    assert choice["layers"] == [0, 1, 2, 3, 4, 5]
    assert choice["kept_dense"] == (choice["sparse_ms"] > choice["dense_ms"])
    wanted = {"sparsifiner::DenseAttention"}
    if not choice["kept_dense"]:
        wanted = {"sparsifiner::KeySelect", "sparsifiner::SparseAttention"}
    assert set(manifest["ops"]) == wanted
    assert (manifest["sparsity"] is None) == choice["kept_dense"]


def slower_when_sparse(pieces: dict[tuple[int, bool], Piece], backend: str) -> PieceTimes:
    """In the place of times: sparse attention takes twice as long."""
    return PieceTimes({key: 1.0 if key[1] else 2.0 for key in pieces}, backend, {})


def test_layers_that_turn_dense_compute_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in (("test_vit", {}), ("vit_small_patch16_dinov3", {"img_size": 96})):
        made = student(name, SparsityConfig(keep=0.2, cells=4, channels=8), **options).model
        monkeypatch.setattr(student_changes, "piece_times", slower_when_sparse)
        found = student_changes.keep_dense_where_slower(made)
        assert found.sparse_layers_left == 0
        assert all(choice.kept_dense for choice in found.choices)
        plain = vit(name, **options)
        x = torch.randn(1, 3, *plain.patch_embed.img_size)
        with torch.no_grad():
            torch.testing.assert_close(made(x), plain(x), atol=1e-4, rtol=1e-3)


@pytest.mark.everything
def test_what_this_machine_has_measured_is_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done: list[Execution] = []
    measure = piece_times.measured_piece
    monkeypatch.setattr(
        piece_times, "measured_piece", lambda piece, execution: done.append(execution) or measure(piece, execution)
    )

    def measured() -> Measured:
        return student_changes.keep_dense_where_slower(load_student(folder).model)

    first, again = measured(), measured()
    assert first == again
    assert first.kernels
    assert done == 2 * [Execution()]
    # Other attention of the same sizes is another entry; a table that cannot be read is made anew.
    student_changes.keep_dense_where_slower(load_student(folder, keep=0.9).model)
    assert len(done) == 3
    (table,) = (tmp_path / "cache").rglob("latency/*.json")
    table.write_text("{")
    assert measured().choices[0].layers == first.choices[0].layers
    assert len(done) == 5
    assert len(json.loads(table.read_text())["ms"]) == 2
    # Another instruction set is another table.
    monkeypatch.setattr(piece_times.native, "target", lambda: "another")
    measured()
    assert len(done) == 7
    assert len(list((tmp_path / "cache").rglob("latency/*.json"))) == 2


@pytest.mark.everything
def test_tile_and_probe_are_chosen_at_export(folder: Path, pictures: Path, tmp_path: Path) -> None:
    own = load_student(folder).sparsity
    bundle = export_bundle(folder, tmp_path / "b", tile=4 * own.tile, probe=own.probe, keep=0.9, calibrate=pictures)
    manifest = manifest_of(bundle)
    nodes = [node for node in onnx.load(bundle / "model.onnx").graph.node if node.op_type == "SparseAttention"]
    tiles = {a.i for node in nodes for a in node.attribute if a.name == "tile"}
    assert tiles == {4 * own.tile} == {manifest["sparsity"]["tile"]}
    assert manifest["retiled"]["from"] == {"tile": own.tile, "probe": own.probe, "cells": own.cells}
    assert 0.97 <= manifest["retiled"]["cosine"] < 1
    assert manifest["retiled"]["images"] == 3


@pytest.mark.everything
def test_a_gpu_takes_tile_64_and_few_cells_where_that_passes(
    folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, images = load_student(folder, keep=0.9), sorted(pictures.iterdir())
    wide = dataclasses.replace(own, sparsity=dataclasses.replace(own.sparsity, cells=40))
    set_budget(wide.model, wide.sparsity)
    assert (own.sparsity.tile, own.sparsity.probe) == (16, 8)
    taken, changes = student_changes.changed(wide, None, None, None, images, gpu=True)
    found = changes["retiled"]
    assert Tiling(taken.sparsity.tile, taken.sparsity.probe, taken.sparsity.cells) == found.after == Tiling(64, 8, 31)
    assert (found.before.cells, found.images, found.refused) == (40, 3, None)
    assert 0.97 <= found.cosine < 1
    # The user's tile, where one is given, or its own, where that is as large.
    asked, _ = student_changes.changed(wide, 32, None, None, images, gpu=True)
    assert (asked.sparsity.tile, asked.sparsity.cells) == (32, 31)
    assert student_changes.changed(taken, None, None, None, (), gpu=True) == (taken, {"retiled": None})
    assert student_changes.changed(wide, None, None, None, images, gpu=False) == (wide, {})
    # What cannot be judged, or fails, is kept, and says why; cells may pass where the tile does not.
    kept, changes = student_changes.changed(wide, None, None, None, (), gpu=True)
    assert kept is wide
    assert "require images to judge by. Give some: --calibrate DIR" in changes["retiled"].refused
    cosine = student_changes._cosine
    monkeypatch.setattr(student_changes, "_cosine", lambda a, b, c: cosine(a, b, c) - (b.sparsity.tile > 16))
    _, changes = student_changes.changed(wide, None, None, None, images, gpu=True)
    assert changes["retiled"].after == Tiling(16, 8, 31)
    assert "allowed 0.97" in changes["retiled"].refused


def test_a_tile_is_refused_where_it_cannot_be_judged(
    folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--calibrate"):
        export_bundle(folder, tmp_path / "b", tile=32)
    with pytest.raises(ConfigError, match="multiple of probe"):
        export_bundle(folder, tmp_path / "b", tile=9, calibrate=pictures)
    pruned = {"token_keep": ((0, 0.5),), "calibrate": pictures, "tile": 32}
    with pytest.raises(ConfigError, match="different tokens"):
        export_bundle(folder, tmp_path / "b", **pruned)
    monkeypatch.setattr(student_changes, "LEAST_TOKENS_COSINE", 0.999999)
    with pytest.raises(GateError, match=r"allowed 0\.999999"):
        export_bundle(folder, tmp_path / "b", tile=64, keep=0.1, calibrate=pictures)
    assert list(tmp_path.iterdir()) == []
