"""Explanations: what layers read and merged, that their faithfulness is measured, the command and its page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.explain import look
from sparsifiner_edge.evaluate.faithfulness import faithfulness, groups_of, importance_of, saco
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.outcomes import ExplainResult
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.records import read_record
from sparsifiner_edge.sparse.student import save_student
from tests.commands import assert_refused, call, process
from tests.models import student
from tests.once import Once

KINDS = {
    "edge": SparsityConfig(keep=0.2, cells=4, channels=8),
    "merging": SparsityConfig(keep=0.2, cells=4, channels=8, merge=(12, 8, 0, 0, 0, 0)),
    "no cells": SparsityConfig(keep=0.2, cells=0, channels=8),
    "some dense": SparsityConfig(keep=(0.2, 1, 0.2, 0.2, 1, 0.2), cells=4, channels=8, merge=(6,)),
    "paper": SparsityConfig.for_preset("paper", keep=0.25, channels=8),
}
SHAPES: dict[str, dict[str, Any]] = {"square": {}, "rectangle": {"img_size": (96, 160)}}


@pytest.mark.parametrize(("kind", "shape"), [*((kind, "square") for kind in KINDS), ("merging", "rectangle")])
def test_what_is_read_and_merged_is_what_the_layers_did(kind: str, shape: str) -> None:
    """Each head's list has as many keys as the layout says; a merged token is read for all of its patches."""
    made = student(sparsity=KINDS[kind], **SHAPES[shape])
    layers, patches = look(made, smooth_images(made.img_size)[0]), made.backbone.patches
    merges = plan_of(KINDS[kind], len(layers), patches).merge
    for number, (token, read, layer) in enumerate(layers):
        assert (layer.tokens, layer.merged) == (patches - sum(merges[:number]), merges[number])
        assert token.shape == (patches,)
        assert set(token.tolist()) == set(range(layer.tokens))
        assert (layer.keys is None) == (kind == "some dense" and number in (1, 4))
        if layer.keys is None:
            assert (read == 1).all()
        elif kind != "paper":  # Which lists the class token too.
            assert read.sum() == pytest.approx(made.backbone.geometry.heads * layer.keys)
        assert read.shape == (layer.tokens,)


PRUNED = SparsityConfig(keep=0.2, cells=4, channels=8, token_keep=((1, 0.7),))


@pytest.mark.parametrize(("sparsity", "said"), [(SparsityConfig(keep=1), "is dense"), (PRUNED, "prunes")])
def test_what_has_no_explanation(sparsity: SparsityConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        look(student(sparsity=sparsity), smooth_images(160)[0])


def test_saco() -> None:
    """1 where what is claimed is what it costs, -1 where it is the contrary; between them always."""
    random = np.random.default_rng(0)
    for count in range(2, 12):
        claimed = random.random(count)
        assert saco(claimed, claimed) == pytest.approx(1)
        assert saco(claimed, -claimed) == pytest.approx(-1)
        assert -1 <= saco(claimed, random.random(count)) <= 1
    assert saco(np.ones(4), np.arange(4.0)) == 0


def left(pixels: torch.Tensor) -> torch.Tensor:
    """What a model answers that sees the left half alone."""
    return pixels[0, :, :80].reshape(10, 16, 5, 16, 3).mean((1, 3)).flatten() - 128


def test_an_explanation_that_is_true_and_one_that_is_false() -> None:
    """Naming the half that is seen is right, naming the other half is wrong; what gradients name is right."""
    image = smooth_images(160)[0]
    half = np.concatenate([np.linspace(1, 2, 50).reshape(10, 5), np.zeros((10, 5))], 1)
    (right, drop), (wrong, _) = (faithfulness(left, image, values) for values in (half, half[:, ::-1]))
    assert right > 0.5 > 0 > wrong
    assert drop.shape == (groups_of((10, 10)),) == (10,)
    assert groups_of((37, 37)) == 5  # An answer takes long there.
    assert drop[:5].min() > drop[5:].max() == pytest.approx(0)
    found = importance_of(left, image, (10, 10))
    assert found.sum() == pytest.approx(1)
    assert (found[:, 5:] == 0).all()
    assert faithfulness(left, image, found)[0] > 0.8


@pytest.fixture(scope="module")
def made(once: Once) -> Path:
    """A student that merges, and two images."""

    def make(folder: Path) -> None:
        save_student(student(sparsity=KINDS["merging"], num_classes=0), folder / "student")
        (folder / "images").mkdir()
        for number, image in enumerate(smooth_images(160, 2)):
            Image.fromarray(image).save(folder / "images" / f"{number}.png")

    return once("explained", make)


def test_the_command(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    asked = ("explain", made / "student", "--data", made / "images", "-o", page)
    done = process(*asked, "--json")
    assert done.code == 0, done.err
    result = read_record(json.loads(done.out), ExplainResult, "test", "")
    assert result.kind == "explanation"
    assert result.method.images == ["0.png", "1.png"]
    assert list(result.statistics) == list(result.samples) == ["0 0.png", "1 1.png"]
    for found in result.statistics.values():
        assert set(found.saco) == {"ours", "random", "moved"}
        assert found.better == (found.saco["ours"] > max(0, found.saco["random"], found.saco["moved"]))
        assert [layer.tokens for layer in found.layers] == [100, 88, 80, 80, 80, 80]
        assert [layer.merged for layer in found.layers] == [12, 8, 0, 0, 0, 0]
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("data:image/jpeg") == 2


def test_a_page_in_both_languages_and_what_the_command_refuses(made: Path, tmp_path: Path, capsys: Any) -> None:
    """Its size for six layers, and that a name stays a name."""
    shutil.copyfile(made / "images" / "0.png", tmp_path / "<script>x.png")
    asked = ("explain", made / "student", "--data", tmp_path / "<script>x.png", "-o")
    for language, word in (("en", "What the model read"), ("ja", "モデルが読んだもの")):
        done = call(capsys, *asked, tmp_path / "page.html", "--lang", language)
        assert done.code == 0, done.err
        assert "SaCo of what the features hang on" in done.out
        page = (tmp_path / "page.html").read_text("utf-8")
        assert word in page
        assert "<script" not in page
        assert len(page) < 200_000
    assert_refused(call(capsys, *asked, tmp_path), "is a folder")
    assert call(capsys, "explain", made, *asked[2:], tmp_path / "none.html").code == 2
    assert not (tmp_path / "none.html").exists()
