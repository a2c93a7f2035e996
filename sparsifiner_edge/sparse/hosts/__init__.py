"""Libraries that vision transformers come from, one file each: where they keep the parts of a model. All else in this
package sees a model as a `Backbone`.
"""

from __future__ import annotations

import abc
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from sparsifiner_edge.errors import UnsupportedModelError

if TYPE_CHECKING:
    from sparsifiner_edge.config import SparsityConfig
    from sparsifiner_edge.sparse.attention import HeadGeometry, PackedAttention
    from sparsifiner_edge.sparse.layer import SparseLayer

SUPPORTED = (
    "timm's VisionTransformer (ViT, DeiT, DINOv2) and Eva (EVA-02, DINOv3, ViT with RoPE), transformers' ViT, DINOv2, "
    "DINOv3, SigLIP and CLIP"
)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A vision transformer within a module, or alone.

    Attributes:
        host: whose it is. module: itself. layers: its layers. layers_name: their list's name in `module`.
        embedding: the convolution that makes patches of pixels. grid: rows and columns of patches.
        prefix: tokens before the patches; the first is a class token, if `class_token`. width: channels of a token.
        rotary: whether queries and keys are turned to their places.
    """

    host: Host
    module: Any
    layers: Sequence[Any]
    layers_name: str
    embedding: nn.Conv2d
    grid: tuple[int, int]
    prefix: int
    class_token: bool
    width: int
    rotary: bool

    @property
    def patches(self) -> int:
        """How many the model has."""
        return self.grid[0] * self.grid[1]

    @property
    def patch(self) -> tuple[int, int]:
        """Pixels of a patch, height and width."""
        height, width = self.embedding.kernel_size
        return int(height), int(width)

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels of the images, height and width."""
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

    @property
    def geometry(self) -> HeadGeometry:
        """Of the heads."""
        return self.host.geometry(self.layers[0])

    @property
    def classes(self) -> int:
        """Of a classifier that is a backbone alone; 0: it is none."""
        return self.host.classes(self)

    def tokens(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W], normalised -> tokens [B,N,C] after the final norm, as the host has them."""
        return self.host.tokens(self, images)

    def heads(self, tokens: Tensor) -> dict[str, Tensor]:
        """Final tokens [B,N,C] -> "features" [B,C], and "logits" of a classifier."""
        return self.host.heads(self, tokens)

    @property
    def attentions(self) -> list[Any]:
        """Of the layers."""
        return [self.host.attention(layer) for layer in self.layers]

    @property
    def sparsity(self) -> SparsityConfig | None:
        """What is sparse; None: nothing is."""
        return cast("SparsityConfig | None", getattr(self.module, "sparsity", None))


class Host(abc.ABC):
    """What a library's file gives.

    Attributes:
        name: of its package. layer_kind, attention_kind: where it keeps the parts of a layer, and of its attention.
    """

    name: str
    layer_kind: type[SparseLayer]
    attention_kind: type[PackedAttention]

    @abc.abstractmethod
    def backbone(self, module: nn.Module) -> Backbone | None:
        """A module as a backbone; None if it is none of this host's."""

    @abc.abstractmethod
    def near_miss(self, module: nn.Module) -> str | None:
        """Why a module of this host's is no backbone, where that is worth a word."""

    @abc.abstractmethod
    def refusal(self, backbone: Backbone) -> str | None:
        """Why a backbone cannot be made sparse; None: it can."""

    @abc.abstractmethod
    def attention(self, layer: Any) -> Any:
        """The attention of a layer."""

    @abc.abstractmethod
    def geometry(self, layer: Any) -> HeadGeometry:
        """Of the heads of a layer."""

    @abc.abstractmethod
    def mlp(self, layer: Any) -> nn.Module:
        """The MLP of a layer."""

    @abc.abstractmethod
    def resize(self, backbone: Backbone, size: tuple[int, int]) -> None:
        """Let a dense backbone, in place, take images of another size; pixels, height and width."""

    @abc.abstractmethod
    def rotary_table(self, backbone: Backbone) -> Tensor | None:
        """Rotary embeddings as of `SparseLayer.rotary_table`, or one for each layer [L,..]; None without."""

    @abc.abstractmethod
    def fold_layer_scale(self, backbone: Backbone) -> None:
        """Multiply, in place, what a layer adds to its input into the linear layer that makes it: one pass over the
        tokens less.
        """

    @abc.abstractmethod
    def classes(self, backbone: Backbone) -> int:
        """See `Backbone`."""

    @abc.abstractmethod
    def tokens(self, backbone: Backbone, images: Tensor) -> Tensor:
        """See `Backbone`."""

    @abc.abstractmethod
    def final_norm(self, backbone: Backbone) -> nn.Module:
        """What `tokens` does to what leaves the last layer."""

    @abc.abstractmethod
    def heads(self, backbone: Backbone, tokens: Tensor) -> dict[str, Tensor]:
        """See `Backbone`."""

    @abc.abstractmethod
    def settle(self, backbone: Backbone) -> None:
        """Work out, in place and for good, what depends on the images' size alone, so that no exported file does."""


def _hosts() -> Iterator[Host]:
    """Of the libraries that are in use: no module of another can be about."""
    if "timm" in sys.modules:
        from sparsifiner_edge.sparse.hosts.timm import TIMM

        yield TIMM
    if "transformers" in sys.modules:
        from sparsifiner_edge.sparse.hosts.transformers import TRANSFORMERS

        yield TRANSFORMERS


def backbones(module: nn.Module) -> dict[str, Backbone]:
    """The vision transformers in a module by their names in it; "" is the module itself."""
    found: dict[str, Backbone] = {}
    for host in _hosts():
        for name, part in module.named_modules():
            backbone = host.backbone(part)
            if backbone is not None:
                found[name] = backbone
    return found


def backbone_of(module: nn.Module) -> Backbone:
    """The one vision transformer in a module.

    Raises:
        UnsupportedModelError: there is none, or there are several.
    """
    found = backbones(module)
    if len(found) == 1:
        return next(iter(found.values()))
    names = f": {', '.join(found)}" if found else ""
    near = (host.near_miss(part) for host in _hosts() for part in module.modules()) if not found else ()
    reason = next((f" ({text})" for text in near if text), "")
    raise UnsupportedModelError(
        f"This {type(module).__name__} contains {len(found)} vision transformers{names}{reason}.",
        f"Give one at a time: {SUPPORTED}, alone or within a module.",
    )
