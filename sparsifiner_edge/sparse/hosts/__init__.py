"""Libraries of vision transformers, with one `Backbone` class per library.

Everything else in this package accesses a model through this interface.
"""

from __future__ import annotations

import abc
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sparsifiner_edge.bounds import MOST_SIDE, ImageSize, height_width, size_text
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.plugins import subclass
from sparsifiner_edge.sparse.attention import HeadGeometry, attention_of, first, geometry_of
from sparsifiner_edge.sparse.layer import scale_of

if TYPE_CHECKING:
    from sparsifiner_edge.config import SparsityConfig

SUPPORTED = (
    "timm's VisionTransformer (ViT, DeiT, DINOv2) and Eva (EVA-02, DINOv3, ViT with RoPE), transformers' ViT, DINOv2, "
    "DINOv3, SigLIP and CLIP"
)
LIBRARIES = "sparsifiner_edge.hosts"
"""Entry point group in which other packages register `Backbone` classes.

It is searched only for modules without a backbone of timm or transformers.
"""


@dataclasses.dataclass(frozen=True)
class Backbone(abc.ABC):
    """Vision transformer, alone or within a module.

    Methods that depend on the library are abstract. The parts of a layer are located by their names in the libraries
    (`attention.first`).

    Attributes:
        library: Name of the library's package.
        module: The vision transformer itself.
        layers_name: Name of the list of layers in `module`.
        embedding: Convolution that turns pixels into patch tokens.
        grid: Rows and columns of patches.
        prefix: Number of tokens before the patches.
        class_token: True if the first prefix token is a class token.
        width: Channels of a token.
        rotary: True if queries and keys have rotary position embeddings.
    """

    library: ClassVar[str]
    module: Any
    layers_name: str
    embedding: nn.Conv2d
    grid: tuple[int, int]
    prefix: int
    class_token: bool
    width: int
    rotary: bool

    @classmethod
    @abc.abstractmethod
    def of(cls, module: nn.Module) -> Backbone | None:
        """Return the module as a backbone, or None if it is not of this library."""

    @abc.abstractmethod
    def refusal(self) -> str | None:
        """Return the reason why the model cannot be made sparse, or None if it can."""

    @abc.abstractmethod
    def resize(self, size: tuple[int, int]) -> None:
        """Change the image size (height, width) of the dense model, in pixels and in place."""

    def rotary_table(self) -> Tensor:
        """Return the rotary embeddings as in `SparseLayer.rotary_table`, or one table per layer [L,...].

        Only called for a model with rotary embeddings.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens [B,N,C] after the final norm for normalised images [B,3,H,W], in the library's order."""

    @property
    def final_norm(self) -> nn.Module:
        """Norm that `tokens` applies to the output of the last layer."""
        return cast(nn.Module, first(self.module, "norm", "layernorm", "post_layernorm"))

    @abc.abstractmethod
    def heads(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return "features" [B,C], and "logits" of a classifier, from final tokens [B,N,C]."""

    @property
    def classes(self) -> int:
        """Number of classes of a bare classifier, or 0 if it is not a classifier."""
        return 0

    def settle(self) -> None:  # noqa: B027
        """Precompute in place what depends on the image size only, so that it is not part of an exported file."""

    @property
    def layers(self) -> Sequence[Any]:
        """Layers, first to last."""
        return list(self.module.get_submodule(self.layers_name))

    @property
    def attentions(self) -> list[Any]:
        """Attention of each layer."""
        return [attention_of(layer) for layer in self.layers]

    @property
    def geometry(self) -> HeadGeometry:
        """Sizes of the attention heads."""
        return geometry_of(self.attentions[0])

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def patch(self) -> tuple[int, int]:
        """Size of a patch (height, width) in pixels."""
        height, width = self.embedding.kernel_size
        return int(height), int(width)

    @property
    def image_size(self) -> tuple[int, int]:
        """Size of the images (height, width) in pixels."""
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

    @property
    def sparsity(self) -> SparsityConfig | None:
        """Sparsity settings, or None for an unmodified model."""
        return cast("SparsityConfig | None", getattr(self.module, "sparsity", None))

    def last_output(self, run: Callable[[], Any]) -> tuple[Any, Tensor | None]:
        """Return the result of `run`, and the output of the last layer during it (None if the layer did not run)."""
        outputs: list[Tensor] = []
        hook = self.layers[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            return run(), outputs[-1] if outputs else None
        finally:
            hook.remove()

    @torch.no_grad()
    def fold_layer_scale(self) -> None:
        """Fold the layer scales into the preceding linear layers in place, which saves a pass over the tokens."""
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            ends = first(attention, "proj", "o_proj", "out_proj"), first(layer.mlp, "fc2", "down_proj", "weights_out")
            for number, linear in enumerate(ends, 1):
                scale = scale_of(layer, number)
                factor = first(layer, f"gamma_{number}") if scale is None else first(scale, "gamma", "lambda1")
                if factor is None:
                    continue
                linear.weight.mul_(factor[:, None])
                if linear.bias is not None:
                    linear.bias.mul_(factor)
                for name in (f"ls{number}", f"layer_scale{number}", f"gamma_{number}"):
                    if hasattr(layer, name):
                        setattr(layer, name, None if scale is None else nn.Identity())


def _libraries() -> Iterator[type[Backbone]]:
    """Yield the backbone classes of the supported libraries that are imported; other modules cannot exist."""
    if "timm" in sys.modules:
        from sparsifiner_edge.sparse.hosts.timm import Timm

        yield Timm
    if "transformers" in sys.modules:
        from sparsifiner_edge.sparse.hosts.transformers import Transformers

        yield Transformers


def _others() -> Iterator[type[Backbone]]:
    """Yield the backbone classes that other packages register."""
    for point in entry_points(group=LIBRARIES):  # Two packages may register the same name.
        yield subclass(Backbone, point, UnsupportedModelError)  # type: ignore[type-abstract]


def backbones(module: nn.Module) -> dict[str, Backbone]:
    """Return the vision transformers in a module by their names in it; "" is the module itself."""
    for kinds in (_libraries, _others):
        parts = [(name, kind.of(part)) for kind in kinds() for name, part in module.named_modules()]
        if any(backbone for _, backbone in parts):
            return {name: backbone for name, backbone in parts if backbone}
    return {}


def backbone_of(module: nn.Module) -> Backbone:
    """Return the only vision transformer in a module.

    Raises:
        UnsupportedModelError: If there is none, or there are several.
    """
    every = backbones(module)
    if len(every) == 1:
        return next(iter(every.values()))
    names = f": {', '.join(every)}" if every else ""
    raise UnsupportedModelError(
        f"This {type(module).__name__} contains {len(every)} vision transformers{names}.",
        f"Give one at a time: {SUPPORTED}, alone or within a module.",
    )


def require_size(size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Check that an image size (height, width) suits patches of the given size.

    Raises:
        ConfigError: If a side is not a multiple of the patch's side, or is too large.
    """
    if max(size) > MOST_SIDE:
        raise ConfigError(
            f"image size {size_text(size)} is too large.", f"Use at most {MOST_SIDE} pixels along a side."
        )
    near = tuple(max(round(side / step), 1) * step for side, step in zip(size, patch, strict=True))
    if near != size:
        at = 0 if near[0] != size[0] else 1
        which = "image size" if size[0] == size[1] else ("image height", "image width")[at]
        raise ConfigError(
            f"{which} {size[at]} is not a multiple of the patch size {patch[at]}.",
            f"Use {size_text((near[0], near[1]))}, for instance.",
        )


def for_size(model: nn.Module, img_size: ImageSize | None) -> nn.Module:
    """Set the image size of a model in place and return the model; None leaves its own size.

    Raises:
        ConfigError: If the size does not suit the patches (see `require_size`) or the library.
    """
    backbone = backbone_of(model)
    size = backbone.image_size if img_size is None else height_width(img_size)
    if size != backbone.image_size:
        require_size(size, backbone.patch)
        backbone.resize(size)
    return model
