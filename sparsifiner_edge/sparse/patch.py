"""Patch a vision transformer in place: sparse attention, with patch tokens in Hilbert-curve order."""

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
    """Return the backbone of a model that can be made sparse.

    Raises:
        UnsupportedModelError: If the model cannot be made sparse. The message gives the first reason.
    """
    backbone = backbone_of(model)
    reason = "it is sparse already" if backbone.sparsity is not None else backbone.refusal()
    if reason is not None:
        raise UnsupportedModelError(f"This model cannot be made sparse: {reason}.", f"Choose one of {SUPPORTED}.")
    return backbone


def make_model_sparse(model: AnyModule, sparsity: SparsityConfig) -> AnyModule:
    """Make a model sparse in place, with predictor projections that are still zero.

    Calibrate the projections or load them before use.

    Args:
        model: Vision transformer of a supported library with a fixed image size, or a module that contains one.
        sparsity: Sparsity settings. If they are dense, the model is left untouched.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: If the model cannot be made sparse.
        ConfigError: If the tile, the background tokens, the shares or the rates do not fit this model. The model is
            unchanged in this case.
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
    """Replace the layers and attentions of a backbone and set its budget."""
    plan = plan_of(sparsity, len(backbone.layers), backbone.patches)
    # The published method uses raster order.
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
    """Undo `make_model_sparse` or `sparsify_model` in place.

    The library's own classes and the weights stay, and the predictors are removed. A module without sparse layers is
    left as it is.

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
    """Enable or disable timm's methods for intermediate feature maps, which would be wrong for pruned tokens."""
    for name in ("forward_intermediates", "get_intermediate_layers"):
        module.__dict__.pop(name, None)
        if not possible and hasattr(module, name):
            module.__dict__[name] = _no_maps


def _no_maps(*_: Any, **__: Any) -> Any:
    """Replace a method that returns intermediate feature maps."""
    raise ConfigError(
        "A model that prunes tokens has no intermediate feature maps.", "Make it sparse without token_keep."
    )


def set_budget(model: nn.Module, sparsity: SparsityConfig, keep_predictors: bool = False) -> None:
    """Change the shares of keys and tokens of a sparse model in place, without changing its parameters.

    Args:
        model: Model made by `make_model_sparse`.
        sparsity: New settings. They may differ from the model's own in `keep`, `token_keep`, `merge`, `merge_window`,
            `tile` and `background_tokens` only.
        keep_predictors: Keep the predictors of layers that are dense in this budget, so that a later budget can use
            them.

    Raises:
        ConfigError: If the model does not support the settings, or if the tile or the background tokens exceed the
            patches that are left.
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
        raise ConfigError(
            "The predictor of preset 'paper' is tied to its number of tokens.", "Give --token-keep to sparsify."
        )
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
