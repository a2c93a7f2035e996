"""timm's VisionTransformer and Eva."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.layers.attention import Attention, AttentionRope
from timm.layers.patch_embed import PatchEmbed
from timm.models import eva, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, LayerScale, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sparsifiner_edge.bounds import MOST_CLASSES, MOST_SIDE, ImageSize, height_width, size_of, size_text
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError, WeightsError
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.sparse.attention import HeadGeometry, PackedAttention, rotated
from sparsifiner_edge.sparse.hosts import Backbone, Host
from sparsifiner_edge.sparse.layer import SparseLayer
from sparsifiner_edge.sparse.weights import FIT, StateDict, brief, check_fit, check_numbers, read_weights

TimmModel: TypeAlias = VisionTransformer | Eva
"""What can be made sparse: timm's plain vision transformers, the latter with rotary position embeddings too."""


def _geometry(attention: Any) -> HeadGeometry:
    return HeadGeometry(attention.num_heads, attention.head_dim, attention.scale)


class TimmAttention(PackedAttention):
    """Of timm's `Attention`, `AttentionRope` and `EvaAttention`."""

    @property
    def geometry(self) -> HeadGeometry:
        """See `PackedAttention`."""
        return _geometry(self)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """See `PackedAttention`; timm stores q, k and v as one matrix or as three, their biases together or apart."""
        own = cast(Any, self)
        if own.qkv is not None:
            apart = getattr(own, "q_bias", None)
            separate = None if apart is None else torch.cat([apart, own.k_bias, own.v_bias])
            return own.qkv.weight, own.qkv.bias if separate is None else separate
        parts = (own.q_proj, own.k_proj, own.v_proj)
        biases = [torch.zeros_like(x.weight[:, 0]) if x.bias is None else x.bias for x in parts]
        return torch.cat([x.weight for x in parts]), torch.cat(biases)

    @property
    def norms(self) -> tuple[nn.Module, nn.Module] | None:
        """See `PackedAttention`."""
        own = cast(Any, self)
        norms = own.q_norm, own.k_norm
        return None if all(isinstance(norm, nn.Identity) for norm in norms) else norms

    def rotated(self, x: Tensor, table: Tensor) -> Tensor:
        """See `PackedAttention`."""
        return rotated(x, table, cast(Any, self).rotate_half)

    def joined(self, x: Tensor, attended: Tensor) -> Tensor:
        """See `PackedAttention`."""
        own = cast(Any, self)
        out = own.norm(attended)
        if own.gate is not None:
            out = out * own.gate(x).sigmoid()
        return cast(Tensor, own.proj_drop(own.proj(out)))


class TimmLayer(SparseLayer):
    """Of timm's `Block` and `EvaBlock`."""

    @property
    def own_attention(self) -> PackedAttention:
        """See `SparseLayer`."""
        return cast(PackedAttention, self.attn)

    def rotary_table(
        self, attn_mask: Tensor | None = None, is_causal: bool = False, *, rope: Tensor | None = None
    ) -> Tensor | None:
        """See `SparseLayer`."""
        if attn_mask is not None or is_causal:
            raise ConfigError("Sparse attention takes no attention mask.", "Call the model without attn_mask.")
        return rope

    @property
    def entry_norm(self) -> nn.Module:
        """See `SparseLayer`."""
        return cast(nn.Module, self.norm1)

    def after_attention(self, x: Tensor) -> Tensor:
        """See `SparseLayer`."""
        return cast(Tensor, cast(Any, self).drop_path1(self._scaled(1, x)))

    def after_mlp(self, x: Tensor) -> Tensor:
        """See `SparseLayer`."""
        own = cast(Any, self)
        return cast(Tensor, own.drop_path2(self._scaled(2, own.mlp(own.norm2(x)))))

    def _scaled(self, branch: int, x: Tensor) -> Tensor:
        """A residual branch times its layer scale, as `Block` (a module) or `EvaBlock` (a parameter or None) has it."""
        scale = getattr(self, f"ls{branch}", None)
        if scale is not None:
            return cast(Tensor, scale(x))
        factor = getattr(self, f"gamma_{branch}", None)
        return x if factor is None else factor * x


class Timm(Host):
    """See `Host`."""

    name = "timm"
    layer_kind: type[SparseLayer] = TimmLayer
    attention_kind: type[PackedAttention] = TimmAttention

    def backbone(self, module: nn.Module) -> Backbone | None:
        """See `Host`."""
        if not isinstance(module, TimmModel):
            return None
        vit = cast(Any, module)
        return Backbone(
            host=self, module=vit, layers=list(vit.blocks), layers_name="blocks", embedding=vit.patch_embed.proj,
            grid=tuple(vit.patch_embed.grid_size), prefix=vit.num_prefix_tokens, class_token=vit.cls_token is not None,
            width=vit.embed_dim, rotary=getattr(vit, "rope", None) is not None,
        )  # fmt: skip

    def near_miss(self, module: nn.Module) -> str | None:  # noqa: ARG002
        """See `Host`."""
        return None

    def refusal(self, backbone: Backbone) -> str | None:
        """See `Host`."""
        model = backbone.module
        if type(model) not in (VisionTransformer, VisionTransformerDistilled, Eva):
            return f"it is a {type(model).__name__}"
        if type(model.patch_embed) is not PatchEmbed:
            return f"patch embedding {type(model.patch_embed).__name__}"
        if model.dynamic_img_size:
            return "dynamic image size (the token order is fixed): create it with img_size"
        if not (model.patch_drop is None or isinstance(model.patch_drop, nn.Identity)):
            return "patch dropout"
        reasons = [(number, _layer_refusal(layer)) for number, layer in enumerate(backbone.layers)]
        return next((f"layer {number}: {reason}" for number, reason in reasons if reason), None)

    def attention(self, layer: Any) -> Any:
        """See `Host`."""
        return layer.attn

    def geometry(self, layer: Any) -> HeadGeometry:
        """See `Host`."""
        return _geometry(layer.attn)

    def mlp(self, layer: Any) -> nn.Module:
        """See `Host`."""
        return cast(nn.Module, layer.mlp)

    def resize(self, backbone: Backbone, size: tuple[int, int]) -> None:
        """See `Host`."""
        backbone.module.set_input_size(img_size=size)

    def rotary_table(self, backbone: Backbone) -> Tensor | None:
        """See `Host`."""
        if not backbone.rotary:
            return None
        tokens = backbone.embedding.weight.new_zeros(1, backbone.patches, backbone.width)
        return cast(Tensor, backbone.module._pos_embed(tokens)[1])

    @torch.no_grad()
    def fold_layer_scale(self, backbone: Backbone) -> None:
        """See `Host`."""
        for layer in backbone.layers:
            for last, name, parameter in ((layer.attn.proj, "ls1", "gamma_1"), (layer.mlp.fc2, "ls2", "gamma_2")):
                scale = getattr(layer, name, None)
                gamma = scale.gamma if isinstance(scale, LayerScale) else getattr(layer, parameter, None)
                if gamma is None:
                    continue
                last.weight.mul_(gamma[:, None])
                if last.bias is not None:
                    last.bias.mul_(gamma)
                if isinstance(scale, LayerScale):
                    setattr(layer, name, nn.Identity())
                else:
                    setattr(layer, parameter, None)

    def classes(self, backbone: Backbone) -> int:
        """See `Host`."""
        return int(backbone.module.num_classes)

    def tokens(self, backbone: Backbone, images: Tensor) -> Tensor:
        """See `Host`."""
        return cast(Tensor, backbone.module.forward_features(images))

    def final_norm(self, backbone: Backbone) -> nn.Module:
        """See `Host`."""
        return cast(nn.Module, backbone.module.norm)

    def heads(self, backbone: Backbone, tokens: Tensor) -> dict[str, Tensor]:
        """See `Host`."""
        found = {"features": backbone.module.forward_head(tokens, pre_logits=True)}
        return found | ({"logits": backbone.module.forward_head(tokens)} if backbone.module.num_classes else {})

    def settle(self, backbone: Backbone) -> None:
        """See `Host`: sizes are fixed when a model is made."""


TIMM = Timm()


def _layer_refusal(layer: nn.Module) -> str | None:
    attention: Any = getattr(layer, "attn", None)
    if type(attention) not in (Attention, AttentionRope, EvaAttention):
        return f"{type(layer).__name__} with {type(attention).__name__} instead of timm's Attention"
    if getattr(attention, "num_kv_groups", 1) > 1:
        return f"grouped-query attention, {attention.num_kv_groups} query heads per key head"
    if isinstance(layer, (ResPostBlock, EvaBlockPostNorm)):
        return f"{type(layer).__name__} normalises after attention"
    if type(layer) not in (Block, EvaBlock):
        return f"it is a {type(layer).__name__}"
    return f"attention dropout {attention.attn_drop.p}" if attention.attn_drop.p else None


def preprocessing(model: nn.Module) -> Normalisation:
    """The normalisation that timm records for a model."""
    data = resolve_model_data_config(model)
    return Normalisation.checked(data["mean"], data["std"])


def class_labels(model: TimmModel) -> list[str]:
    """One label per class: ImageNet's where timm knows the set, else class_0, class_1, ...; none without classifier."""
    subset = infer_imagenet_subset(model) if model.num_classes else None
    if subset:
        info = ImageNetInfo(subset)
        return [str(info.index_to_description(i)) for i in range(model.num_classes)]
    return [f"class_{i}" for i in range(model.num_classes)]


def create(name: str, img_size: ImageSize | None = None, num_classes: int | None = None) -> TimmModel:
    """A vision transformer of timm with random weights, in evaluation mode.

    Raises:
        UnsupportedModelError: timm has no such model, or it is no VisionTransformer or Eva.
        ConfigError: a side of the image is no multiple of the patch size, or there are too many pixels or classes.
    """
    kind = on_paper(name, num_classes)
    height, width = height_width(kind.patch_embed.img_size if img_size is None else img_size)
    _check_size(height, width, kind.patch_embed.patch_size, name)
    with _named(name):
        options = {"img_size": size_of(height, width), "dynamic_img_size": False, "num_classes": kind.num_classes}
        return cast(TimmModel, timm.create_model(name, pretrained=False, **options).eval())


def _check_size(height: int, width: int, patch: tuple[int, int], name: str) -> None:
    text = size_text((height, width))
    if max(height, width) > MOST_SIDE:
        raise ConfigError(f"image size {text} is too large.", f"Use at most {MOST_SIDE} pixels along a side.")
    near_height, near_width = (max(round(n / p), 1) * p for n, p in zip((height, width), patch, strict=True))
    if (near_height, near_width) != (height, width):
        side, step = (height, patch[0]) if near_height != height else (width, patch[1])
        what = f"image {'height' if near_height != height else 'width'}" if height != width else "image size"
        raise ConfigError(
            f"{what} {side} is not a multiple of the patch size {step} of {name}.",
            f"Use {size_text((near_height, near_width))}, for instance.",
        )


@functools.lru_cache(maxsize=16)
def on_paper(name: str, num_classes: int | None = None) -> TimmModel:
    """A model of timm for which nothing is allocated: it tells what it is, and what its weights are. The next caller
    gets the same.

    Raises:
        UnsupportedModelError, ConfigError: as of `create`.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models("*it_*"))
        hint = (
            f"Did you mean {', '.join(close)}?"
            if close
            else "Names: python -c 'import timm; print(timm.list_models())'"
        )
        raise UnsupportedModelError(f"timm has no model {name!r}.", hint)
    if num_classes is not None and not 0 <= num_classes <= MOST_CLASSES:
        raise ConfigError(f"num_classes is {num_classes}.", f"Give from 0 to {MOST_CLASSES} classes.")
    options = {} if num_classes is None else {"num_classes": num_classes}
    with _named(name), torch.device("meta"):
        kind = timm.create_model(name, pretrained=False, **options)
    if isinstance(kind, TimmModel):
        return kind
    raise UnsupportedModelError(
        f"{name!r} is a {type(kind).__name__}, not a VisionTransformer or Eva.",
        "Choose a ViT, DeiT, DINOv2, DINOv3 or EVA-02 of timm.",
    )


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """What timm raises in the block becomes an `UnsupportedModelError` about the name."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UnsupportedModelError(f"timm cannot create {name!r}: {error}.", "Check the model's name.") from error


def load_model(name: str, weights: Path | None = None, img_size: ImageSize | None = None) -> TimmModel:
    """A pretrained model of timm, in evaluation mode.

    Args:
        name: timm's name, such as "vit_small_patch14_dinov2.lvd142m".
        weights: file with timm's key names; None lets timm download its own.
        img_size: pixels: a square's side, or height and width; the position embedding is resampled as timm does.

    Raises:
        UnsupportedModelError, ConfigError: see `create`.
        WeightsError: unreadable, of another architecture, or not to be downloaded.
    """
    if weights is not None:
        state = read_weights(weights)
        head = state.get("head.weight")
        classes = 0 if head is None or head.ndim == 0 else len(head)
        model = create(name, img_size, classes)
        load_state(model, state, str(weights))
        return model
    size = size_of(*create(name, img_size).patch_embed.img_size)
    try:
        return cast(TimmModel, timm.create_model(name, pretrained=True, img_size=size, dynamic_img_size=False).eval())
    # The hub clients raise their own kinds of error; all mean that no weights arrived.
    except Exception as error:
        raise WeightsError(
            f"The weights of {name!r} could not be downloaded: {brief(error)}",
            "Connect, or give a file with --weights.",
        ) from error


def load_state(model: TimmModel, state: StateDict, source: str, grid: tuple[int, int] | None = None) -> None:
    """Load tensors into a model; the position embedding is resampled where sizes differ.

    Args:
        grid: rows and columns of patches that the position embedding is of; None takes a square wherever their number
            is one's, and otherwise what timm knows of the model.

    Raises:
        WeightsError: a tensor is missing, left over, of another shape, or holds no plain finite numbers.
    """
    expected = model.state_dict()
    convert = (eva if isinstance(model, Eva) else vision_transformer).checkpoint_filter_fn
    try:
        positions = _positions(state, model, grid)
        # timm would take a grid of as many patches for the model's own.
        rest = {key: tensor for key, tensor in state.items() if key not in positions}
        filtered = cast(StateDict, convert(rest, model)) | positions
    # timm takes tensors of any shape apart here; each way to fail means that they are another model's.
    except Exception as error:
        raise WeightsError(f"{source} does not fit this model: {error}.", FIT) from error
    check_fit(expected, filtered, source)
    for key, tensor in filtered.items():
        check_numbers(tensor, expected[key].is_floating_point(), f"{source}: {key}")
    model.load_state_dict(filtered)


def _positions(state: StateDict, model: TimmModel, grid: tuple[int, int] | None) -> StateDict:
    """The position embedding, resampled to the model's grid; empty where there is none, or its own grid is unknown."""
    vit, found = cast(Any, model), state.get("pos_embed")
    if found is None or vit.pos_embed is None:
        return {}
    prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
    side = math.isqrt(found.shape[1] - prefix)
    if grid is None and side * side == found.shape[1] - prefix:
        grid = (side, side)
    if grid is None:
        return {}
    new = tuple(vit.patch_embed.grid_size)
    return {"pos_embed": found if grid == new else resample_abs_pos_embed(found, list(new), list(grid), prefix)}
