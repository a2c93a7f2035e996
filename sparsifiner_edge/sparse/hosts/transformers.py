"""Backbones of Hugging Face transformers.

Supported are ViT, DINOv2 (also with registers), DINOv3, SigLIP, CLIP's image tower, and models built on them, such as
Depth Anything V2.

The `AttentionInterface` of transformers does not suit the sparse layers. It passes q, k and v separately, after three
matrix products, whereas the operators read one packed tensor.
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
"""Attribute of a model that holds its image size where it differs from the configuration's."""
_UNMASKED = "sparsifiner_unmasked"
"""Name under which torch's attention without a mask is registered, for dense models that are exported."""


class _Family(NamedTuple):
    """Locations of the parts of a model class.

    Attributes:
        layers: Name of the list of layers in the model.
        embedding: Name of the patch embedding convolution.
        prefix: Function from the configuration to the number of tokens before the patches.
        positions: Name of an absolute position embedding that fits a single size, or "" without one.
        rotary: True if the model has rotary position embeddings.
    """

    layers: str
    embedding: str
    prefix: Callable[[Any], int]
    positions: str = ""
    rotary: bool = False


def _registers(config: Any) -> int:
    """Return the number of prefix tokens: the class token and the registers."""
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
"""Supported classes of transformers by name."""


class Transformers(Backbone):
    """Backbone of a transformers model; see `Backbone` for the methods."""

    library = "transformers"

    @classmethod
    def of(cls, module: nn.Module) -> Backbone | None:
        """Return the module as a backbone, or None if its class is not in `FAMILIES`."""
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
        """True for CLIP's image tower."""
        return type(self.module).__name__ == "CLIPVisionModel"

    @property
    def _family(self) -> _Family:
        """Locations of the model's parts."""
        return cast(_Family, _family(self.module))

    def refusal(self) -> str | None:
        """Return the reason why the model cannot be made sparse, or None if it can."""
        dropout = first(self.module.config, "attention_probs_dropout_prob", "attention_dropout")
        return f"attention dropout {dropout}" if dropout else None

    def resize(self, size: tuple[int, int]) -> None:
        """Change the image size in place and resample the position embedding.

        Raises:
            ConfigError: If CLIP is given a size that is not square. CLIP compares both sides with a single number.
        """
        if self._is_clip and size[0] != size[1]:
            raise ConfigError(
                f"CLIP supports square images only, not {size_text(size)}.", "Give one side, such as --img-size 224."
            )
        if self._family.positions:
            _resample(self, self._family.positions, (size[0] // self.patch[0], size[1] // self.patch[1]))
            takes_pairs = self._family is _VIT or size[0] != size[1]
            self.module.embeddings.image_size = size if takes_pairs else size[0]
        setattr(self.module, _SIZE, size)

    def rotary_table(self) -> Tensor:
        """Return the rotary embeddings of the model's image size."""
        rope = self.module.rope_embeddings
        training = rope.training
        cosines, sines = rope.eval()(self.embedding.weight.new_zeros(1, 3, *self.image_size))
        rope.train(training)
        return torch.cat([sines, cosines], -1)

    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens after the final norm."""
        if not type(self.module).__name__.endswith("Backbone"):
            return cast(Tensor, self.module(images).last_hidden_state)
        # A backbone class returns feature maps of selected layers only.
        return cast(Tensor, self.final_norm(self.last_output(lambda: self.module(images))[1]))

    @property
    def final_norm(self) -> nn.Module:
        """Norm after the last layer; the identity for CLIP, which normalises only the class token in `heads`."""
        return nn.Identity() if self._is_clip else super().final_norm

    def heads(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the pooled features; classifiers are modules around the backbone."""
        if self._is_clip:
            return {"features": self.module.post_layernorm(tokens[:, 0])}
        pool = first(self.module, "pooler", "head")
        if pool is None:
            return {"features": tokens[:, 0] if self.class_token else tokens.mean(1)}
        return {"features": pool(tokens)}

    @torch.no_grad()
    def settle(self) -> None:
        """Precompute in place what depends on the image size only, so that it is not part of an exported file.

        DINOv2 interpolates its position embedding in every call. All models create an attention mask without effect
        when they are traced.
        """
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(_UNMASKED, _no_mask)
        self.module.config._attn_implementation = _UNMASKED
        if self._family.positions or self.rotary:
            return
        embeddings, tokens = self.module.embeddings, self.embedding.weight.new_zeros(1, 1 + self.patches, self.width)
        positions = embeddings.interpolate_pos_encoding(tokens, *self.image_size)
        embeddings.register_buffer("settled_positions", positions.detach().clone())
        embeddings.interpolate_pos_encoding = lambda *_: embeddings.settled_positions


def _no_mask(attention_mask: Tensor | None = None, **_: Any) -> None:
    """Return None in place of an attention mask without effect."""
    if attention_mask is not None:
        raise ConfigError("Attention masks cannot be exported.", "Call the model without attention_mask.")


def _family(module: nn.Module) -> _Family | None:
    """Return the part locations of a transformers model, or None for another module."""
    # Classes made by `mix` are no transformers classes. They replace layers and attentions, never a backbone.
    of_library = type(module).__module__.startswith("transformers.")
    return FAMILIES.get(type(module).__name__) if of_library else None


@torch.no_grad()
def _resample(backbone: Backbone, name: str, grid: tuple[int, int]) -> None:
    """Resample the position embedding to another grid as transformers does: bicubic, without antialiasing."""
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
