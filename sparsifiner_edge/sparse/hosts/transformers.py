"""Vision transformers of Hugging Face's transformers: ViT, DINOv2 (registers too), DINOv3, SigLIP, CLIP's image tower,
and what is built on them, such as Depth Anything V2.

Its layers have one form under several names, so that the parts are found by name. Its own `AttentionInterface` does not
serve sparse layers: it hands over q, k and v apart, after three products, where the operators read one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.sparse.attention import HeadGeometry, PackedAttention, rotated
from sparsifiner_edge.sparse.hosts import Backbone, Host
from sparsifiner_edge.sparse.layer import SparseLayer

_SIZE = "sparsifiner_image_size"
"""Attribute of a model: pixels of its images, where they are not its configuration's."""


_UNMASKED = "sparsifiner_unmasked"
"""Name of the attention of dense models that are exported: torch's own, without a mask."""


class _Family(NamedTuple):
    """Where a class keeps its parts.

    Attributes:
        layers, embedding: names in the model. prefix: tokens before the patches, by the configuration.
        positions: of the absolute position embedding that fits one size alone; "": none such.
        rotary: whether it has rotary embeddings.
    """

    layers: str
    embedding: str
    prefix: Callable[[Any], int]
    positions: str = ""
    rotary: bool = False


def _registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


_VIT = _Family("layers", "embeddings.patch_embeddings.projection", lambda _: 1, "embeddings.position_embeddings")
_DINOV2 = _Family("encoder.layer", "embeddings.patch_embeddings.projection", lambda _: 1)
_DINOV2_REGISTERS = _DINOV2._replace(prefix=_registers)
_DINOV3 = _Family("model.layer", "embeddings.patch_embeddings", _registers, rotary=True)
_SIGLIP = _Family("encoder.layers", "embeddings.patch_embedding", lambda _: 0, "embeddings.position_embedding.weight")
FAMILIES = {
    "ViTModel": _VIT,
    "Dinov2Model": _DINOV2,
    "Dinov2Backbone": _DINOV2,
    "Dinov2WithRegistersModel": _DINOV2_REGISTERS,
    "Dinov2WithRegistersBackbone": _DINOV2_REGISTERS,
    "DINOv3ViTModel": _DINOV3,
    "DINOv3ViTBackbone": _DINOV3,
    "SiglipVisionModel": _SIGLIP,
    "CLIPVisionModel": _SIGLIP._replace(prefix=lambda _: 1),
}
"""By class."""
REFUSED = {
    "SamVisionEncoder": "SAM adds relative positions to its attention, within windows",
    "Sam2VisionModel": "SAM 2 attends within windows",
    "SwinModel": "Swin attends within windows",
    "Swinv2Model": "Swin attends within windows",
    "VitDetModel": "ViTDet attends within windows",
    "VitDetBackbone": "ViTDet attends within windows",
    "HieraModel": "Hiera attends within windows, over tokens that are pooled",
    "Siglip2VisionModel": "SigLIP 2 in its flexible form takes patches with a mask",
    "BeitModel": "BEiT adds relative positions to its attention",
    "Data2VecVisionModel": "Data2Vec adds relative positions to its attention",
}
"""What comes close, and why it cannot be taken."""


def _first(module: Any, *names: str) -> Any:
    """The first part that a module has under one of these names; None: none."""
    return next((part for part in (getattr(module, name, None) for name in names) if part is not None), None)


def _geometry(attention: Any) -> HeadGeometry:
    heads = _first(attention, "num_attention_heads", "num_heads")
    return HeadGeometry(int(heads), int(attention.head_dim), float(_first(attention, "scaling", "scale")))


class TransformersAttention(PackedAttention):
    """See `PackedAttention`."""

    @property
    def geometry(self) -> HeadGeometry:
        """See `PackedAttention`."""
        return _geometry(self)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """See `PackedAttention`."""
        own = cast(Any, self)
        parts = (own.q_proj, own.k_proj, own.v_proj)
        weight = torch.cat([part.weight for part in parts])
        if all(part.bias is None for part in parts):
            return weight, None
        biases = [torch.zeros_like(part.weight[:, 0]) if part.bias is None else part.bias for part in parts]
        return weight, torch.cat(biases)

    def rotated(self, x: Tensor, table: Tensor) -> Tensor:
        """See `PackedAttention`."""
        return rotated(x, table, half=True)

    def joined(self, x: Tensor, attended: Tensor) -> Tensor:  # noqa: ARG002  # other hosts gate by x
        """See `PackedAttention`."""
        return cast(Tensor, _first(self, "o_proj", "out_proj")(attended))


class TransformersLayer(SparseLayer):
    """See `SparseLayer`."""

    @property
    def own_attention(self) -> PackedAttention:
        """See `SparseLayer`."""
        return cast(PackedAttention, _first(self, "attention", "self_attn"))

    def rotary_table(
        self,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        output_attentions: bool = False,
        **_: Any,
    ) -> Tensor | None:
        """See `SparseLayer`."""
        if attention_mask is not None:
            raise ConfigError("Sparse attention takes no attention mask.", "Call the model without attention_mask.")
        if output_attentions:
            raise ConfigError("Sparse attention has no map of all its weights.", "Leave output_attentions out.")
        if position_embeddings is None:
            return None
        cosines, sines = position_embeddings
        return torch.cat([sines, cosines], -1)

    @property
    def entry_norm(self) -> nn.Module:
        """See `SparseLayer`."""
        return cast(nn.Module, _first(self, "norm1", "layernorm_before", "layer_norm1"))

    def after_attention(self, x: Tensor) -> Tensor:
        """See `SparseLayer`."""
        return self._added("layer_scale1", x)

    def after_mlp(self, x: Tensor) -> Tensor:
        """See `SparseLayer`."""
        norm = _first(self, "norm2", "layernorm_after", "layer_norm2")
        return self._added("layer_scale2", cast(Any, self).mlp(norm(x)))

    def _added(self, scale: str, x: Tensor) -> Tensor:
        for part in (_first(self, scale), _first(self, "drop_path", "dropout")):
            x = x if part is None else part(x)
        return x


class Transformers(Host):
    """See `Host`."""

    name = "transformers"
    layer_kind: type[SparseLayer] = TransformersLayer
    attention_kind: type[PackedAttention] = TransformersAttention

    def backbone(self, module: nn.Module) -> Backbone | None:
        """See `Host`."""
        family = _family(module)
        if family is None:
            return None
        config = cast(Any, module).config
        embedding = cast(nn.Conv2d, module.get_submodule(family.embedding))
        prefix = family.prefix(config)
        (height, width), (down, across) = image_size(module), embedding.kernel_size
        return Backbone(
            host=self, module=module, layers=list(cast(Any, module.get_submodule(family.layers))),
            layers_name=family.layers, embedding=embedding, grid=(height // int(down), width // int(across)),
            prefix=prefix, class_token=prefix > 0, width=int(config.hidden_size), rotary=family.rotary,
        )  # fmt: skip

    def near_miss(self, module: nn.Module) -> str | None:
        """See `Host`."""
        return REFUSED.get(type(module).__name__)

    def refusal(self, backbone: Backbone) -> str | None:
        """See `Host`."""
        config = backbone.module.config
        dropout = _first(config, "attention_probs_dropout_prob", "attention_dropout")
        return f"attention dropout {dropout}" if dropout else None

    def attention(self, layer: Any) -> Any:
        """See `Host`."""
        return _first(layer, "attention", "self_attn")

    def geometry(self, layer: Any) -> HeadGeometry:
        """See `Host`."""
        return _geometry(self.attention(layer))

    def mlp(self, layer: Any) -> nn.Module:
        """See `Host`."""
        return cast(nn.Module, layer.mlp)

    def resize(self, backbone: Backbone, size: tuple[int, int]) -> None:
        """See `Host`."""
        module, family = backbone.module, cast(_Family, _family(backbone.module))
        rows, columns = (side // patch for side, patch in zip(size, backbone.patch, strict=True))
        if family.positions:
            _resample(backbone, family.positions, (rows, columns))
            embeddings = module.embeddings
            # CLIP's compares both sides with one number, the others take what comes.
            embeddings.image_size = size if family is _VIT or size[0] != size[1] else size[0]
        setattr(module, _SIZE, size)

    def rotary_table(self, backbone: Backbone) -> Tensor | None:
        """See `Host`."""
        if not backbone.rotary:
            return None
        rope = backbone.module.rope_embeddings
        training = rope.training
        cosines, sines = rope.eval()(backbone.embedding.weight.new_zeros(1, 3, *backbone.image_size))
        rope.train(training)
        return torch.cat([sines, cosines], -1)

    @torch.no_grad()
    def fold_layer_scale(self, backbone: Backbone) -> None:
        """See `Host`."""
        for layer in backbone.layers:
            lasts = _first(self.attention(layer), "o_proj", "out_proj"), _first(layer.mlp, "fc2", "down_proj")
            for name, last in zip(("layer_scale1", "layer_scale2"), lasts, strict=True):
                scale = getattr(layer, name, None)
                if scale is None or isinstance(scale, nn.Identity):
                    continue
                last.weight.mul_(scale.lambda1[:, None])
                if last.bias is not None:
                    last.bias.mul_(scale.lambda1)
                setattr(layer, name, nn.Identity())

    def classes(self, backbone: Backbone) -> int:  # noqa: ARG002
        """See `Host`: classifiers are modules around a backbone."""
        return 0

    def tokens(self, backbone: Backbone, images: Tensor) -> Tensor:
        """See `Host`."""
        module = backbone.module
        if not type(module).__name__.endswith("Backbone"):
            return cast(Tensor, module(images).last_hidden_state)
        # It gives maps of some layers alone.
        seen: list[Tensor] = []
        hook = backbone.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out))
        try:
            module(images)
        finally:
            hook.remove()
        return cast(Tensor, self.final_norm(backbone)(seen[0]))

    def final_norm(self, backbone: Backbone) -> nn.Module:
        """See `Host`; CLIP normalises the class token alone, on its way to the features."""
        if type(backbone.module).__name__ == "CLIPVisionModel":
            return nn.Identity()
        return cast(nn.Module, _first(backbone.module, "layernorm", "norm", "post_layernorm"))

    def heads(self, backbone: Backbone, tokens: Tensor) -> dict[str, Tensor]:
        """See `Host`."""
        module = backbone.module
        if type(module).__name__ == "CLIPVisionModel":
            return {"features": module.post_layernorm(tokens[:, 0])}
        pool = _first(module, "pooler", "head")
        if pool is None:
            return {"features": tokens[:, 0] if backbone.class_token else tokens.mean(1)}
        return {"features": pool(tokens)}

    @torch.no_grad()
    def settle(self, backbone: Backbone) -> None:
        """See `Host`: DINOv2 interpolates its position embedding in every call, and all of them make a mask that masks
        nothing, wherever they are traced.
        """
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(_UNMASKED, _no_mask)
        backbone.module.config._attn_implementation = _UNMASKED
        embeddings = backbone.module.embeddings
        if cast(_Family, _family(backbone.module)).positions or backbone.rotary:
            return
        some = backbone.embedding.weight.new_zeros(1, 1 + backbone.patches, backbone.width)
        found = embeddings.interpolate_pos_encoding(some, *backbone.image_size)
        embeddings.register_buffer("settled_positions", found.detach().clone())
        embeddings.interpolate_pos_encoding = lambda *_: embeddings.settled_positions


TRANSFORMERS = Transformers()


def _no_mask(attention_mask: Tensor | None = None, **_: Any) -> None:
    """In place of a mask that masks nothing."""
    if attention_mask is not None:
        raise ConfigError("A model is exported without attention masks.", "Call it without attention_mask.")


def _family(module: nn.Module) -> _Family | None:
    # A student's model is of a class of its own only where its library's was a backbone's: none is.
    of_library = type(module).__module__.startswith("transformers.")
    return FAMILIES.get(type(module).__name__) if of_library else None


def image_size(module: Any) -> tuple[int, int]:
    """Pixels, height and width, of the images that a model is for."""
    size = getattr(module, _SIZE, None) or module.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


@torch.no_grad()
def _resample(backbone: Backbone, name: str, grid: tuple[int, int]) -> None:
    """Give a model the position embedding of another grid, as its library does: bicubic, without antialiasing."""
    module = backbone.module
    owner = module.get_submodule(name.rpartition(".")[0])
    old: Tensor = getattr(owner, name.rpartition(".")[2]).detach()
    rows = old.reshape(-1, old.shape[-1])
    prefix, places = rows[: backbone.prefix], rows[backbone.prefix :]
    squares = places.T.unflatten(1, backbone.grid)[None].float()
    new = F.interpolate(squares, grid, mode="bicubic", align_corners=False)[0].flatten(1).T.to(old)
    table = torch.cat([prefix, new])
    setattr(owner, name.rpartition(".")[2], nn.Parameter(table if old.ndim == 2 else table[None]))
    if old.ndim == 2:
        module.embeddings.position_ids = torch.arange(len(table), device=old.device)[None]
        owner.num_embeddings = len(table)
