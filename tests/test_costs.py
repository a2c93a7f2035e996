"""Tests of cost counts: published values (Sparsifiner, CVPR 2023, tables 1 and 2) and the operations that run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import LayerCosts, ModelShape, layer_costs, summary
from sparsifiner_edge.export.export import model_shape
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.sparse.patch import make_model_sparse
from tests.models import images, vit

DEIT_S = ModelShape(depth=12, heads=6, width=384, hidden=1536, prefix=1, patches=196, patch=16)
LV_S = ModelShape(depth=16, heads=6, width=384, hidden=1152, prefix=1, patches=196, patch=16)
DENSE = SparsityConfig(keep=1)
PUBLISHED_PREDICTOR = 6.12e6
"""MACs per layer that fit the published rows; the authors' counter is not published."""
TABLE_1 = {
    0.9: 396.8,
    0.8: 360.6,
    0.7: 324.6,
    0.6: 290.3,
    0.5: 254.2,
    0.4: 218.0,
    0.3: 183.6,
    0.2: 147.5,
    0.1: 111.4,
    0.05: 93.3,
    0.01: 78.9,
}
STAGES = ((1, 0.7), (3, 0.5))


def attention_core(costs: list[LayerCosts]) -> int:
    """Return the MACs of logits and weighted sums over all layers, without the predictor, which papers count."""
    return sum(layer["attention"].macs + layer["background"].macs for layer in costs)


def paper(keep: float) -> SparsityConfig:
    return SparsityConfig.for_preset("paper", keep=keep, channels=32)


def test_dense_is_exact() -> None:
    assert attention_core(layer_costs(DEIT_S, DENSE)) == 12 * 2 * 197 * 197 * 384
    assert attention_core(layer_costs(LV_S, DENSE)) / 1e6 == pytest.approx(476.9, rel=1e-4)
    predictor = layer_costs(DEIT_S, paper(0.25))[0]["predictor"].macs
    assert 0.5 * PUBLISHED_PREDICTOR < predictor < 2 * PUBLISHED_PREDICTOR


@pytest.mark.parametrize("keep", TABLE_1)
def test_every_row_of_the_first_table(keep: float) -> None:
    core = attention_core(layer_costs(DEIT_S, paper(keep)))
    assert (core + 12 * PUBLISHED_PREDICTOR) / 1e6 == pytest.approx(TABLE_1[keep], rel=0.005)


@pytest.mark.parametrize(("rate", "published"), [(0.7, 193.1), (0.5, 149.1)])
def test_token_pruned_dense_rows(rate: float, published: float) -> None:
    pruned = SparsityConfig(keep=1, token_keep=tuple((layer, rate) for layer in (3, 6, 9)))
    if rate == 0.7:
        patches = plan_of(pruned, 12, 196).tokens(196)
        assert patches == [196] * 4 + [138] * 3 + [97] * 3 + [68] * 3
    core = attention_core(layer_costs(DEIT_S, pruned))
    assert core / 1e6 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(
    "changes", [{"keep": 1}, {"keep": 0.3}, {"keep": 1, "token_keep": STAGES}, {"keep": 0.4, "token_keep": STAGES}]
)
def test_total_is_what_torch_counts(changes: dict[str, Any]) -> None:
    sparsity, dense = SparsityConfig(background_tokens=4, channels=8, **changes), vit()
    shape = model_shape(dense)
    for block in dense.blocks:
        block.attn.fused_attn = False  # torch does not count fused attention on a CPU
    model = make_model_sparse(dense, sparsity)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(dense, 1))
    macs = summary(shape, sparsity)["total_macs"] + shape.width * 1000  # the classifier is not a layer
    # torch also counts padded rows of the last tile and the sums of selected logits per background token.
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.04)


def test_merged_tokens_are_counted_where_they_are_left() -> None:
    shape, merging = model_shape(vit()), SparsityConfig(keep=1, merge=(8,))
    dense, layers = layer_costs(shape, DENSE), layer_costs(shape, merging)
    assert plan_of(SparsityConfig(merge=(12, 2)), shape.depth, 100).tokens(100) == [100, 88, 78, 70, 64, 60, 58]
    assert layers[0]["projections"] == dense[0]["projections"]
    assert layers[0]["mlp"].macs == dense[0]["mlp"].macs * 93 // 101
    assert layers[1]["attention"].macs == 2 * 93 * 93 * shape.width
    assert layers[0]["pruning"].macs == 101 * shape.width + 50 * 16 * shape.width // shape.heads
