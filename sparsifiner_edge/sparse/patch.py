"""In-place patch of a vision transformer: sparse attention, patch tokens laid along the Hilbert curve."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.order import hilbert_order
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.sparse.attention import SparseAttention, make_dense, make_sparse, restore_attention
from sparsifiner_edge.sparse.hosts import SUPPORTED, Backbone, backbone_of, backbones
from sparsifiner_edge.sparse.layer import TokenOrder, make_layer, restore_layer
from sparsifiner_edge.sparse.merge import Merging, Pruning

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def require_support(model: nn.Module) -> Backbone:
    """The backbone of a model that can be made sparse.

    Raises:
        UnsupportedModelError: with the first reason why it cannot.
    """
    backbone = backbone_of(model)
    reason = "it is sparse already" if backbone.sparsity is not None else backbone.refusal()
    if reason is not None:
        raise UnsupportedModelError(f"This model cannot be made sparse: {reason}.", f"Choose one of {SUPPORTED}.")
    return backbone


def make_model_sparse(model: AnyModule, sparsity: SparsityConfig) -> AnyModule:
    """Make a model sparse, in place; projections are zero until calibrated or loaded.

    Args:
        model: a vision transformer of a library with a fixed image size, or a module that contains one.
        sparsity: what is sparse; with nothing sparse and nothing pruned the model is left untouched.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: with the reason.
        ConfigError: tile, cells, shares or rates do not fit this model; it is unchanged then.
    """
    backbone = require_support(model)
    if sparsity.is_dense:
        return model
    try:
        _make_sparse(backbone, sparsity)
    except ConfigError:
        restore_model(model)
        raise
    return model


def _make_sparse(backbone: Backbone, sparsity: SparsityConfig) -> None:
    plan = plan_of(sparsity, len(backbone.layers), backbone.patches)
    # The published method knows raster order alone.
    order = np.arange(backbone.patches) if sparsity.preset == "paper" else hilbert_order(*backbone.grid)
    curve = TokenOrder(torch.from_numpy(order), torch.from_numpy(order.argsort()), backbone.prefix)
    curve.to(backbone.embedding.weight.device)
    backbone.module.sparsity = sparsity
    counts = plan.tokens(backbone.patches)
    for layer, attention, share, patches in zip(backbone.layers, backbone.attentions, plan.keep, counts, strict=False):
        if share < 1:
            make_sparse(attention, sparsity.of_share(share), patches, backbone.prefix)
        else:
            make_dense(attention)
        make_layer(layer, curve)
    set_budget(backbone.module, sparsity)


def restore_model(model: AnyModule) -> AnyModule:
    """Undo `make_model_sparse` or `sparsify_model`, in place: the host's own classes and the weights that were there,
    no predictor. Any other module is left as it is.

    Returns:
        The same object.

    Example:
        >>> import timm
        >>> model = restore_model(sparsify_model(timm.create_model("deit_tiny_patch16_224")))
        >>> type(model.blocks[0].attn).__name__
        'Attention'
    """
    for backbone in backbones(model).values():
        for layer, attention in zip(backbone.layers, backbone.attentions, strict=True):
            restore_layer(layer)
            restore_attention(attention)
        backbone.module.__dict__.pop("sparsity", None)
        _offer_maps(backbone.module, True)
    return model


def _offer_maps(module: nn.Module, possible: bool) -> None:
    """Let timm's ways to maps of layers be, or refuse them: of too few tokens they make maps of nothing."""
    for name in ("forward_intermediates", "get_intermediate_layers"):
        module.__dict__.pop(name, None)
        if not possible and hasattr(module, name):
            module.__dict__[name] = _no_maps


def _no_maps(*_: Any, **__: Any) -> Any:
    raise ConfigError("A model that prunes tokens has no maps of its layers.", "Leave --token-keep out: token_keep=().")


def set_budget(model: nn.Module, sparsity: SparsityConfig, keep_predictors: bool = False) -> None:
    """Give a sparse model, in place, another share of keys or tokens to keep; its parameters stay.

    Args:
        model: made by `make_model_sparse`.
        sparsity: as the model's own but for `keep`, `token_keep`, `merge`, `merge_window`, `tile` and `cells`.
        keep_predictors: whether a layer that is dense now keeps its predictor for budgets to come.

    Raises:
        ConfigError: the model cannot do that, or tile or cells exceed the patches that are left.
    """
    backbone = backbone_of(model)
    prefix = backbone.prefix
    if sparsity.token_keep and (backbone.rotary or not backbone.class_token):
        raise ConfigError(
            "Token pruning requires a class token, and no rotary position embedding.",
            "Leave --token-keep out, or choose a plain ViT with a class token.",
        )
    plan, current = (
        plan_of(config, len(backbone.layers), backbone.patches)
        for config in (sparsity, cast(SparsityConfig, backbone.sparsity))
    )
    counts = plan.tokens(backbone.patches)
    if sparsity.preset == "paper" and counts != current.tokens(backbone.patches):
        raise ConfigError("The published predictor is tied to its tokens.", "Give --token-keep to sparsify.")
    here = [sparsity.of_share(share) for share in plan.keep]
    layouts = {number: here[number].layout(counts[number], prefix) for number in plan.sparse_layers}
    attentions = backbone.attentions
    for number, attention in enumerate(attentions):
        if number in layouts and not isinstance(attention, SparseAttention):
            raise ConfigError(
                f"layer {number} is dense: it has no predictor.", "Give it a share of 1, or sparsify again."
            )
    for number, (layer, attention) in enumerate(zip(backbone.layers, attentions, strict=True)):
        if number in layouts:
            attention.sparsity, attention.layout, attention.num_prefix = here[number], layouts[number], prefix
        elif isinstance(attention, SparseAttention) and keep_predictors:
            attention.sparsity = here[number]
        elif isinstance(attention, SparseAttention):
            restore_attention(attention)
            make_dense(attention)
        layer.entering, layer.merging, layer.pruning = counts[number], None, None
        if plan.merge[number]:
            layer.merging = Merging(plan.merge[number], prefix, sparsity.merge_window)
        elif counts[number + 1] != counts[number]:
            layer.pruning = Pruning(counts[number + 1], prefix)
    backbone.module.sparsity = sparsity
    _offer_maps(backbone.module, not sparsity.token_keep)
