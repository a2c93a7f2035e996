"""Backbones of timm: VisionTransformer and Eva."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.layers.attention import Attention, AttentionRope
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import eva, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sparsifiner_edge.bounds import MOST_CLASSES, ImageSize, height_width, size_of
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError, WeightsError
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.sparse.hosts import Backbone, for_size, require_size
from sparsifiner_edge.sparse.weights import FIT, StateDict, load_exactly, read_weights
from sparsifiner_edge.text import nearest, one_line

TimmModel: TypeAlias = VisionTransformer | Eva
"""Supported classes: timm's plain vision transformers, and Eva for rotary position embeddings."""


class Timm(Backbone):
    """Backbone of a timm model; see `Backbone` for the methods."""

    library = "timm"

    @classmethod
    def of(cls, module: nn.Module) -> Backbone | None:
        """Return the module as a backbone, or None if it is not a VisionTransformer or Eva."""
        if not isinstance(module, TimmModel):
            return None
        vit = cast(Any, module)
        return cls(
            module=vit,
            layers_name="blocks",
            embedding=vit.patch_embed.proj,
            grid=tuple(vit.patch_embed.grid_size),
            prefix=vit.num_prefix_tokens,
            class_token=vit.cls_token is not None,
            width=vit.embed_dim,
            rotary=getattr(vit, "rope", None) is not None,
        )

    def refusal(self) -> str | None:
        """Return the reason why the model cannot be made sparse, or None if it can."""
        model = self.module
        if type(model) not in (VisionTransformer, VisionTransformerDistilled, Eva):
            return f"it is a {type(model).__name__}"
        if type(model.patch_embed) is not PatchEmbed:
            return f"patch embedding {type(model.patch_embed).__name__}"
        if model.dynamic_img_size:
            return "dynamic image size (the token order is fixed): create it with dynamic_img_size=False"
        if not (model.patch_drop is None or isinstance(model.patch_drop, nn.Identity)):
            return "patch dropout"
        reasons = [(number, _layer_refusal(layer)) for number, layer in enumerate(self.layers)]
        return next((f"layer {number}: {reason}" for number, reason in reasons if reason), None)

    def resize(self, size: tuple[int, int]) -> None:
        """Change the image size in place and resample the position embedding."""
        vit, before = self.module, self.module.pos_embed
        old = tuple(vit.patch_embed.grid_size)
        vit.set_input_size(img_size=size)
        new = tuple(vit.patch_embed.grid_size)
        # Older timm versions compare only the number of patches, and then do not resample.
        if before is not None and vit.pos_embed is before and new != old:
            prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
            vit.pos_embed = nn.Parameter(resample_abs_pos_embed(before.detach(), list(new), list(old), prefix))

    def rotary_table(self) -> Tensor:
        """Return the rotary embeddings that timm passes to the layers."""
        tokens = self.embedding.weight.new_zeros(1, self.patches, self.width)
        return cast(Tensor, self.module._pos_embed(tokens)[1])

    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens after the final norm."""
        return cast(Tensor, self.module.forward_features(images))

    def heads(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the pooled features, and logits of a classifier."""
        outputs = {"features": self.module.forward_head(tokens, pre_logits=True)}
        return outputs | ({"logits": self.module.forward_head(tokens)} if self.classes else {})

    @property
    def classes(self) -> int:
        """Number of classes, or 0 without a classifier."""
        return int(self.module.num_classes)


def _layer_refusal(layer: nn.Module) -> str | None:
    """Return the reason why a layer cannot be made sparse, or None if it can."""
    attention: Any = getattr(layer, "attn", None)
    if type(attention) not in (Attention, AttentionRope, EvaAttention):
        return f"{type(layer).__name__} with {type(attention).__name__} instead of timm's Attention"
    if getattr(attention, "num_kv_groups", 1) > 1:
        return f"grouped-query attention, {attention.num_kv_groups} query heads per key head"
    if type(layer) not in (Block, EvaBlock):
        return f"it is a {type(layer).__name__}"
    return f"attention dropout {attention.attn_drop.p}" if attention.attn_drop.p else None


def preprocessing(model: nn.Module) -> Normalisation:
    """Return the normalisation that timm records for a model."""
    data = resolve_model_data_config(model)
    return Normalisation.of(data["mean"], data["std"])


def class_labels(model: TimmModel) -> list[str]:
    """Return one label per class: ImageNet's where timm knows the subset, else class_0, class_1, ..."""
    subset = infer_imagenet_subset(model) if model.num_classes else None
    if subset:
        info = ImageNetInfo(subset)
        return [str(info.index_to_description(i)) for i in range(model.num_classes)]
    return [f"class_{i}" for i in range(model.num_classes)]


def create(name: str, img_size: ImageSize | None = None, num_classes: int | None = None) -> TimmModel:
    """Create a vision transformer of timm with random weights, in evaluation mode.

    Raises:
        UnsupportedModelError: If timm has no such model, or it is not a VisionTransformer or Eva.
        ConfigError: If a side of the image is not a multiple of the patch size, or there are too many pixels or
            classes.
    """
    options = _options(name, img_size, num_classes)
    with _name_errors(name):
        return cast(TimmModel, timm.create_model(name, pretrained=False, **options).eval())


def _options(name: str, img_size: ImageSize | None, num_classes: int | None) -> dict[str, Any]:
    """Return the arguments of timm's `create_model`; raises the errors of `create`."""
    kind = on_paper(name, num_classes)
    size = height_width(kind.patch_embed.img_size if img_size is None else img_size)
    require_size(size, kind.patch_embed.patch_size)
    return {"img_size": size_of(*size), "dynamic_img_size": False, "num_classes": kind.num_classes}


@functools.lru_cache(maxsize=16)
def on_paper(name: str, num_classes: int | None = None) -> TimmModel:
    """Return a model of timm on the device `meta`, which describes the model and its weights without using memory.

    The result is cached and shared: do not change it.

    Raises:
        UnsupportedModelError: If timm has no such model, or it is not a VisionTransformer or Eva.
        ConfigError: If there are too many classes.
    """
    if not timm.is_model(name):
        hint = nearest(name.partition(".")[0], timm.list_models(["*it_*", "eva02*"]))
        hint = hint or "Names: python -c 'import timm; print(timm.list_models())'"
        raise UnsupportedModelError(f"timm has no model {name!r}, and no folder has that name.", hint)
    if num_classes is not None and not 0 <= num_classes <= MOST_CLASSES:
        raise ConfigError(f"num_classes is {num_classes}.", f"Give from 0 to {MOST_CLASSES} classes.")
    options = {} if num_classes is None else {"num_classes": num_classes}
    with _name_errors(name), torch.device("meta"):
        kind = timm.create_model(name, pretrained=False, **options)
    if isinstance(kind, TimmModel):
        return kind
    raise UnsupportedModelError(
        f"{name!r} is a {type(kind).__name__}, not a VisionTransformer or Eva.",
        "Choose a ViT, DeiT, DINOv2, DINOv3 or EVA-02 of timm.",
    )


@contextlib.contextmanager
def _name_errors(name: str) -> Iterator[None]:
    """Turn timm's exceptions in a `with` block into an `UnsupportedModelError` about the name."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        hint = nearest(name, timm.list_pretrained()) or "Check the model's name."
        raise UnsupportedModelError(f"timm cannot create {name!r}: {one_line(error).rstrip('.')}.", hint) from error


def load_model(name: str, weights: Path | None = None, img_size: ImageSize | None = None) -> TimmModel:
    """Load a pretrained model of timm, in evaluation mode.

    Args:
        name: timm name, such as "vit_small_patch14_dinov2.lvd142m".
        weights: File with timm's key names. None lets timm download its own.
        img_size: Image size in pixels: the side of a square, or (height, width). The position embedding is resampled as
            timm does.

    Raises:
        UnsupportedModelError: If timm has no such model; see `create`.
        ConfigError: If the image size does not suit the model; see `create`.
        WeightsError: If the weights are unreadable, belong to another architecture, or cannot be downloaded.
    """
    if weights is not None:
        size = size_of(*on_paper(name).patch_embed.img_size) if img_size is None else img_size
        state = read_weights(weights)
        head = state.get("head.weight")
        model = create(name, _trained_size(state, name, size), 0 if head is None or head.ndim == 0 else len(head))
        _load(model, state, str(weights))
        return cast(TimmModel, for_size(model, size))
    options = _options(name, img_size, None)
    try:
        return cast(TimmModel, timm.create_model(name, pretrained=True, **options).eval())
    # The hub clients raise many kinds of error. Each one means that the download failed.
    except Exception as error:
        raise WeightsError(
            f"The weights of {name!r} could not be downloaded: {one_line(error)}",
            "Connect, or give a file with --weights.",
        ) from error


def _trained_size(state: StateDict, name: str, img_size: ImageSize) -> ImageSize:
    """Return the image size of the weights if their position embedding is that of a square, else `img_size`."""
    kind, positions = cast(Any, on_paper(name)), state.get("pos_embed")
    if positions is None or positions.ndim != 3 or kind.pos_embed is None:
        return img_size
    patches = positions.shape[1] - (0 if getattr(kind, "no_embed_class", False) else kind.num_prefix_tokens)
    side, (height, width) = math.isqrt(max(patches, 0)), kind.patch_embed.patch_size
    return size_of(side * height, side * width) if side and side * side == patches else img_size


def _load(model: TimmModel, state: StateDict, source: str) -> None:
    """Convert a state dict to timm's key names and load it."""
    convert = (eva if isinstance(model, Eva) else vision_transformer).checkpoint_filter_fn
    try:
        converted = cast(StateDict, convert(state, model))
    # timm reshapes tensors here without checks. Any exception means that the weights belong to another model.
    except Exception as error:
        raise WeightsError(f"{source} does not fit this model: {error}.", FIT) from error
    load_exactly(model, converted, source)
