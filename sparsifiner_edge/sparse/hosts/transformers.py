"""Vision transformers of Hugging Face's transformers: ViT, DINOv2 (registers too), DINOv3, SigLIP, CLIP's image tower,
and what is built on them, such as Depth Anything V2.

Its own `AttentionInterface` does not serve sparse layers: it hands over q, k and v apart, after three products, where
the operators read one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.bounds import size_text
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.sparse.attention import first
from sparsifiner_edge.sparse.hosts import Backbone

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


class Transformers(Backbone):
    """See `Backbone`."""

    library = "transformers"

    @classmethod
    def of(cls, module: nn.Module) -> Backbone | None:
        """See `Backbone`."""
        family = _family(module)
        if family is None:
            return None
        config = cast(Any, module).config
        embedding = cast(nn.Conv2d, module.get_submodule(family.embedding))
        prefix, size = family.prefix(config), getattr(module, _SIZE, None) or config.image_size
        (height, width), (down, across) = (size, size) if isinstance(size, int) else size, embedding.kernel_size
        return cls(
            module=module,
            layers_name=family.layers,
            embedding=embedding,
            grid=(int(height) // int(down), int(width) // int(across)),
            prefix=prefix,
            class_token=prefix > 0,
            width=int(config.hidden_size),
            rotary=family.rotary,
        )

    @property
    def _is_clip(self) -> bool:
        return type(self.module).__name__ == "CLIPVisionModel"

    @property
    def _family(self) -> _Family:
        return cast(_Family, _family(self.module))

    def refusal(self) -> str | None:
        """See `Backbone`."""
        dropout = first(self.module.config, "attention_probs_dropout_prob", "attention_dropout")
        return f"attention dropout {dropout}" if dropout else None

    def resize(self, size: tuple[int, int]) -> None:
        """See `Backbone`; CLIP compares both sides with one number."""
        if self._is_clip and size[0] != size[1]:
            raise ConfigError(f"CLIP takes squares alone, not {size_text(size)}.", "Give one side: --img-size 224.")
        if self._family.positions:
            _resample(self, self._family.positions, (size[0] // self.patch[0], size[1] // self.patch[1]))
            takes_pairs = self._family is _VIT or size[0] != size[1]
            self.module.embeddings.image_size = size if takes_pairs else size[0]
        setattr(self.module, _SIZE, size)

    def rotary_table(self) -> Tensor:
        """See `Backbone`."""
        rope = self.module.rope_embeddings
        training = rope.training
        cosines, sines = rope.eval()(self.embedding.weight.new_zeros(1, 3, *self.image_size))
        rope.train(training)
        return torch.cat([sines, cosines], -1)

    def tokens(self, images: Tensor) -> Tensor:
        """See `Backbone`."""
        if not type(self.module).__name__.endswith("Backbone"):
            return cast(Tensor, self.module(images).last_hidden_state)
        # It gives maps of some layers alone.
        return cast(Tensor, self.final_norm(self.last_output(lambda: self.module(images))[1]))

    @property
    def final_norm(self) -> nn.Module:
        """See `Backbone`; CLIP normalises the class token alone, on its way to the features."""
        return nn.Identity() if self._is_clip else super().final_norm

    def heads(self, tokens: Tensor) -> dict[str, Tensor]:
        """See `Backbone`; classifiers are modules around it."""
        if self._is_clip:
            return {"features": self.module.post_layernorm(tokens[:, 0])}
        pool = first(self.module, "pooler", "head")
        if pool is None:
            return {"features": tokens[:, 0] if self.class_token else tokens.mean(1)}
        return {"features": pool(tokens)}

    @torch.no_grad()
    def settle(self) -> None:
        """See `Backbone`: DINOv2 interpolates its position embedding in every call, and all of them make a mask that
        masks nothing, wherever they are traced.
        """
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(_UNMASKED, _no_mask)
        self.module.config._attn_implementation = _UNMASKED
        if self._family.positions or self.rotary:
            return
        embeddings, some = self.module.embeddings, self.embedding.weight.new_zeros(1, 1 + self.patches, self.width)
        positions = embeddings.interpolate_pos_encoding(some, *self.image_size)
        embeddings.register_buffer("settled_positions", positions.detach().clone())
        embeddings.interpolate_pos_encoding = lambda *_: embeddings.settled_positions


def _no_mask(attention_mask: Tensor | None = None, **_: Any) -> None:
    """In place of a mask that masks nothing."""
    if attention_mask is not None:
        raise ConfigError("A model is exported without attention masks.", "Call it without attention_mask.")


def _family(module: nn.Module) -> _Family | None:
    # A student's model is of a class of its own only where its library's was a backbone's: none is.
    of_library = type(module).__module__.startswith("transformers.")
    return FAMILIES.get(type(module).__name__) if of_library else None


@torch.no_grad()
def _resample(backbone: Backbone, name: str, grid: tuple[int, int]) -> None:
    """Give a model the position embedding of another grid, as its library does: bicubic, without antialiasing."""
    module = backbone.module
    owner, _, attribute = name.rpartition(".")
    holder = module.get_submodule(owner)
    old: Tensor = getattr(holder, attribute).detach()
    rows = old.reshape(-1, old.shape[-1])
    prefix, places = rows[: backbone.prefix], rows[backbone.prefix :]
    squares = places.T.unflatten(1, backbone.grid)[None].float()
    new = F.interpolate(squares, grid, mode="bicubic", align_corners=False)[0].flatten(1).T.to(old)
    table = torch.cat([prefix, new])
    setattr(holder, attribute, nn.Parameter(table if old.ndim == 2 else table[None]))
    if old.ndim == 2:
        module.embeddings.position_ids = torch.arange(len(table), device=old.device)[None]
        holder.num_embeddings = len(table)
