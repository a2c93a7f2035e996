"""Explanations: that they are what the operators did, that their faithfulness is measured, the command and its page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.connections import look, reaching, scores_of, weights_of
from sparsifiner_edge.evaluate.explain import explain_image
from sparsifiner_edge.evaluate.faithfulness import elsewhere, faithfulness, groups_of, saco
from sparsifiner_edge.explained import ExplainResult
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.report.explain_page import write_explanation, write_overview
from sparsifiner_edge.results import read_result
from sparsifiner_edge.sparse.in_memory import sparsify_model
from sparsifiner_edge.sparse.outputs import seen_by, tokens_of
from sparsifiner_edge.sparse.student import save_student
from tests.commands import assert_refused, call, process
from tests.models import images, student, vit
from tests.once import Once

KINDS = {
    "edge": SparsityConfig(keep=0.2, cells=4, channels=8),
    "merging": SparsityConfig(keep=0.2, cells=4, channels=8, merge=(12, 8, 0, 0, 0, 0)),
    "no cells": SparsityConfig(keep=0.2, cells=0, channels=8),
    "some dense": SparsityConfig(keep=(0.2, 1, 0.2, 0.2, 1, 0.2), cells=4, channels=8, merge=(6,)),
    "paper": SparsityConfig.for_preset("paper", keep=0.25, channels=8),
}
SHAPES: dict[str, dict[str, Any]] = {"square": {}, "rectangle": {"img_size": (96, 160)}}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("shape", list(SHAPES))
@torch.no_grad()
def test_weights_are_what_the_operator_weighed_by(kind: str, shape: str) -> None:
    """Attention times values is the operator's result; rows, shares on cells included, sum to 1."""
    made = student(sparsity=KINDS[kind], **SHAPES[shape])
    for seen in look(made, smooth_images(made.img_size)[0]):
        weights = weights_of(seen)
        v = ops.split_heads(seen.qkv, seen.attention.geometry.heads)[2][0]
        got = (weights.attention @ v).transpose(0, 1).flatten(1)
        wanted = seen.attention.attend(seen.qkv, seen.tokens.sizes)[0]
        assert torch.allclose(got, wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-5)
        assert torch.allclose(weights.attention.sum(-1), torch.ones(()), atol=1e-5)
        assert (weights.attention >= 0).all()
        assert (weights.cells <= 1 + 1e-5).all()
        has_cells = seen.sparse is not None and KINDS[kind].cells > 0 and kind != "paper"
        assert bool((weights.cells > 0).any()) == has_cells


@torch.no_grad()
def test_dense_weights_are_those_of_dense_attention() -> None:
    made = student(sparsity=KINDS["merging"])
    for seen in look(made, smooth_images(160)[0], densely=True):
        q, k, _ = ops.split_heads(seen.qkv, seen.attention.geometry.heads)
        wanted = (seen.attention.geometry.scale * q[0] @ k[0].mT).softmax(-1)
        weights = weights_of(seen)
        assert torch.allclose(weights.attention, wanted, atol=1e-6)
        assert weights.read is None
        assert scores_of(seen) is None


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_the_parts_of_a_score_add_up_and_explain_the_list(kind: str) -> None:
    made = student(sparsity=KINDS[kind])
    for number, seen in enumerate(look(made, smooth_images(made.img_size)[0])):
        scores, weights = scores_of(seen), weights_of(seen)
        if kind == "paper" or (kind == "some dense" and number in (1, 4)):
            assert scores is None
            continue
        assert scores is not None
        assert weights.read is not None
        assert seen.sparse is not None
        total = scores.probe + scores.deviation[:, None]
        select: Any = seen.sparse.select
        settings = {name: value for name, value in seen.sparse.selection.items() if name != "keys"}
        wanted = ops.key_scores(seen.qkv, select.proj_q, select.proj_k, **settings, sizes=seen.tokens.sizes)[0]
        assert torch.allclose(total, wanted, atol=1e-5)
        read = total.masked_fill(~weights.read, torch.inf).amin(-1)
        rest = total.masked_fill(weights.read, -torch.inf).amax(-1)
        assert (read >= rest - 1e-5).all()
        assert (weights.read.sum(-1) == seen.sparse.layout.keys).all()


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("kind", ["edge", "merging", "paper"])
def test_what_reached_an_output_adds_up(kind: str, by_length: bool) -> None:
    """Backwards from one token at a time, as from all of them together; plain rollout is the product of matrices."""
    made = student(sparsity=KINDS[kind])
    image = smooth_images(made.img_size)[0]
    for densely in (False, True):
        layers = look(made, image, densely)
        rows = torch.eye(layers[-1].left.values.shape[1])
        found = torch.stack([reaching(layers, row, by_length) for row in rows[:5]])
        assert found.shape == (5, 101)
        assert torch.allclose(found.sum(1), torch.ones(()), atol=1e-5)
        assert (found >= 0).all()
        assert torch.allclose(reaching(layers, rows[:5].sum(0), by_length), found.sum(0), atol=1e-5)
    if not by_length:
        product = torch.eye(101)
        for seen in layers:
            product = (weights_of(seen).attention.mean(0) + torch.eye(101)) / 2 @ product
        assert torch.allclose(found, product[:5], atol=1e-5)
    # Looking leaves the model as it was.
    assert not any(attention.densely for attention in made.backbone.attentions)


def test_a_merged_token_is_its_patches() -> None:
    """Its size is how many patches have it for their token."""
    made = student(sparsity=KINDS["merging"])
    seen = look(made, smooth_images(made.img_size)[0])
    last = seen[-1].left
    assert last.places is not None
    assert last.sizes is not None
    counts = torch.bincount(last.places[0], minlength=last.positions.shape[1])
    assert torch.equal(counts.float(), last.sizes[0, 1:])


PRUNED = SparsityConfig(keep=0.2, cells=4, channels=8, token_keep=((1, 0.7),))


@pytest.mark.parametrize(("sparsity", "said"), [(SparsityConfig(keep=1), "is dense"), (PRUNED, "prunes")])
def test_what_has_no_explanation(sparsity: SparsityConfig, said: str) -> None:
    made = student(sparsity=sparsity)
    with pytest.raises(ConfigError, match=said):
        look(made, smooth_images(160)[0])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.randoms())
@settings(max_examples=50, deadline=None)
def test_saco(importance: list[float], random: Any) -> None:
    """1 where what is claimed is what it costs, -1 where it is the contrary; between them always."""
    claimed = np.array(importance)
    if np.ptp(claimed) > 0:
        assert saco(claimed, claimed) == pytest.approx(1)
        assert saco(claimed, -claimed) == pytest.approx(-1)
    assert -1 <= saco(claimed, np.array([random.random() for _ in claimed])) <= 1
    assert saco(np.ones(4), np.arange(4.0)) == 0


def test_an_explanation_that_is_true_and_one_that_is_false() -> None:
    """Of a model that sees the left half alone: naming it is right, naming the other half is wrong."""
    image = smooth_images(160)[0]

    def answer(images: Any) -> Any:
        return np.stack([x[:, :80].reshape(10, 16, 5, 16, 3).mean((1, 3)).ravel() - 128 for x in images])

    left = np.concatenate([np.linspace(1, 2, 50).reshape(10, 5), np.zeros((10, 5))], 1)
    found = faithfulness(answer, image, {"true": left, "false": left[:, ::-1]})
    assert found["true"].saco > 0.5 > 0 > found["false"].saco
    assert found["true"].deletion < found["false"].deletion
    assert found["true"].insertion > found["false"].insertion
    assert len(found["true"].curve) == 9


def test_many_patches_are_judged_by_fewer_groups() -> None:
    """An answer takes long there."""
    image = smooth_images(37 * 4)[0]
    found = faithfulness(lambda images: np.stack([x.ravel() - 128.0 for x in images]), image, {"any": np.eye(37)})
    assert groups_of((32, 32)) == 10
    assert groups_of((37, 37)) == 5
    assert len(found["any"].curve) == len(found["any"].gained) == 4


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_explanation_at_another_place(rows: int, columns: int, seed: int) -> None:
    """The same values, neighbours as before but at the seams, and its greatest no longer where it was."""
    values = np.random.default_rng(seed).permutation(rows * columns).reshape(rows, columns)
    found = elsewhere(values, np.random.default_rng(seed))
    assert sorted(found.ravel()) == sorted(values.ravel())
    for column in range(columns):  # Each goes round as a whole.
        (where,) = np.nonzero(found[0] == found[0, column])
        assert set(found[:, where[0]]) in [set(values[:, x]) for x in range(columns)]
    if rows >= 4:
        before, after = (int(np.nonzero(x == values.max())[0][0]) for x in (values, found))
        assert rows // 4 <= (after - before) % rows <= rows - rows // 4


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
    asked = ("explain", made / "student", "--data", made / "images", "--at", "100,40")
    done = process(*asked, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    result = read_result(tmp_path / "out" / "explain.json", ExplainResult)
    assert result.kind == "explanation"
    assert result.method.explained == "the token of the patch in row 2, column 6"
    assert result.method.images == ["0.png", "1.png"]
    for found in result.statistics.images:
        assert set(found.faithful) == {"ours", "dense", "random", "moved"}
        assert [layer.tokens for layer in found.layers] == [100, 88, 80, 80, 80, 80]
        assert [layer.merged for layer in found.layers] == [12, 8, 0, 0, 0, 0]
        for layer in found.layers:
            assert layer.place
            assert [key.heads for key in layer.place] == sorted((key.heads for key in layer.place), reverse=True)
            assert 0 < sum(key.attention for key in layer.place) <= 1
        chance = f"{found.image}: this explanation is no better than chance" in done.out
        assert chance != found.better
    page = (tmp_path / "out" / "index.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for name in ("0-0.png", "1-1.png"):
        with Image.open(tmp_path / "out" / name) as drawn:
            assert drawn.size == (4 * 160 + 3 * 6, 160)


def test_what_the_command_refuses(made: Path, tmp_path: Path, capsys: Any) -> None:
    asked = ("explain", made / "student", "--data", made / "images", "-o", tmp_path / "out")
    assert_refused(call(capsys, *asked, "--at", "160,0"), "lies outside of the image")
    assert_refused(call(capsys, *asked, "--at", "1;2"), "--at is '1;2'")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "index.html").write_text("mine")
    assert_refused(call(capsys, *asked[:4], "-o", tmp_path / "own"), "holds something else")
    assert (tmp_path / "own" / "index.html").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert call(capsys, *asked[:4], "-o", tmp_path / "file").code == 2
    assert call(capsys, "explain", made, "--data", made / "images", "-o", tmp_path / "out").code == 2


def test_an_explanation_is_written_whole_and_its_files_are_named_harmlessly(
    made: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsifiner_edge.report import explain_page

    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    shutil.copyfile(made / "images" / "0.png", images / "a\x1b[2J\nb.png")
    asked = ("explain", made / "student", "--data", images, "-o", out)
    with monkeypatch.context() as patch:
        patch.setattr(explain_page, "write_overview", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert_refused(call(capsys, *asked), "No space left")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    for _ in range(2):
        assert call(capsys, *asked).code == 0
        assert sorted(path.name for path in out.iterdir()) == ["0-a__2J_b.png", "explain.json", "index.html"]
    (out / "notes.txt").write_text("mine")
    assert_refused(call(capsys, *asked), "holds something else")


def test_a_page_in_both_languages(made: Path, tmp_path: Path) -> None:
    """Its size for six layers, and that a name stays a name."""
    from sparsifiner_edge.evaluate.explain import explain_student

    result, (found, _) = explain_student(made / "student", made / "images")
    hostile = found._replace(path=Path("<script>alert(1)</script>.png"))
    for language, word in (("en", "What the model read"), ("ja", "モデルが読んだもの")):
        page = write_explanation([hostile], result.method, tmp_path / f"{language}.html", language).read_text("utf-8")
        assert word in page
        assert "<script>alert" not in page
        assert len(page) < 200_000
    assert "<script" not in page


def test_an_overview_without_faithfulness(made: Path, tmp_path: Path) -> None:
    """What a demonstration draws."""
    from sparsifiner_edge.sparse.student import load_student

    found = explain_image(load_student(made / "student"), made / "images" / "0.png", judge=False)
    assert found.summary.faithful == {}
    with Image.open(write_overview(found, tmp_path / "picture.png")) as drawn:
        assert np.asarray(drawn).std() > 10


class Around(torch.nn.Module):
    """A module around a backbone, which counts how often what is behind it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.ran = vit(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.backbone.forward_features(x)
        self.ran += 1
        return tokens.mean(1)


class Idle(Around):
    """One that asks its backbone nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@torch.no_grad()
def test_tokens_are_had_without_what_is_behind_them() -> None:
    around = sparsify_model(Around(), keep=0.25, merge=4).eval()
    image = images(around.backbone, 2)
    wanted = seen_by(around, image).tokens
    assert around.ran == 1
    assert torch.equal(tokens_of(around, image), wanted)
    assert around.ran == 1
    assert torch.equal(tokens_of(around.backbone, image), wanted)
    with pytest.raises(ConfigError, match="does not run its vision transformer"):
        tokens_of(sparsify_model(Idle(), keep=0.25), image)
