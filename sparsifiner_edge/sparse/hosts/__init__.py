"""Libraries that vision transformers come from: one class of `Backbone` each, in a file each. All else in this package
sees a model as one of these.
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
"""Group in which other packages name classes of `Backbone`. Searched for modules that hold none of ours."""


@dataclasses.dataclass(frozen=True)
class Backbone(abc.ABC):
    """A vision transformer within a module, or alone. What depends on its library is abstract here; the parts of its
    layers are found by the names that libraries give them (`attention.first`).

    Attributes:
        library: the package that it is of.
        module: itself. layers_name: of the list of its layers in `module`.
        embedding: the convolution that makes patches of pixels. grid: rows and columns of patches.
        prefix: tokens before the patches; the first is a class token, if `class_token`. width: channels of a token.
        rotary: whether queries and keys are turned to their places.
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
        """A module as a backbone; None if it is not of this library."""

    @abc.abstractmethod
    def refusal(self) -> str | None:
        """Why it cannot be made sparse; None: it can."""

    @abc.abstractmethod
    def resize(self, size: tuple[int, int]) -> None:
        """Let it, dense, take images of another size, in place; pixels, height and width."""

    def rotary_table(self) -> Tensor:
        """Where it is rotary, its embeddings as of `SparseLayer.rotary_table`, or one for each layer [L,..]."""
        raise NotImplementedError

    @abc.abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W], normalised -> tokens [B,N,C] after the final norm, as the library has them."""

    @property
    def final_norm(self) -> nn.Module:
        """What `tokens` does to what leaves the last layer."""
        return cast(nn.Module, first(self.module, "norm", "layernorm", "post_layernorm"))

    @abc.abstractmethod
    def heads(self, tokens: Tensor) -> dict[str, Tensor]:
        """Final tokens [B,N,C] -> "features" [B,C], and "logits" of a classifier."""

    @property
    def classes(self) -> int:
        """Of a classifier that is a backbone alone; 0: it is none."""
        return 0

    def settle(self) -> None:  # noqa: B027
        """Work out, in place and for good, what depends on the images' size alone, so that no exported file does."""

    @property
    def layers(self) -> Sequence[Any]:
        """Its layers, first to last."""
        return list(self.module.get_submodule(self.layers_name))

    @property
    def attentions(self) -> list[Any]:
        """Of the layers."""
        return [attention_of(layer) for layer in self.layers]

    @property
    def geometry(self) -> HeadGeometry:
        """Of the heads."""
        return geometry_of(self.attentions[0])

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
    def sparsity(self) -> SparsityConfig | None:
        """What is sparse; None: nothing is."""
        return cast("SparsityConfig | None", getattr(self.module, "sparsity", None))

    def last_output(self, run: Callable[[], Any]) -> tuple[Any, Tensor | None]:
        """What `run` gives, and what left the last layer meanwhile; None: that did not run."""
        outputs: list[Tensor] = []
        hook = self.layers[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            return run(), outputs[-1] if outputs else None
        finally:
            hook.remove()

    @torch.no_grad()
    def fold_layer_scale(self) -> None:
        """Multiply, in place, what a layer adds to its input into the linear layer that makes it: one pass over the
        tokens less.
        """
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
    """Those that are in use: no module of another can be about."""
    if "timm" in sys.modules:
        from sparsifiner_edge.sparse.hosts.timm import Timm

        yield Timm
    if "transformers" in sys.modules:
        from sparsifiner_edge.sparse.hosts.transformers import Transformers

        yield Transformers


def _others() -> Iterator[type[Backbone]]:
    """Those that other packages add."""
    for point in entry_points(group=LIBRARIES):  # Names of two packages may be one.
        yield subclass(Backbone, point, UnsupportedModelError)  # type: ignore[type-abstract]


def backbones(module: nn.Module) -> dict[str, Backbone]:
    """The vision transformers in a module by their names in it; "" is the module itself."""
    for kinds in (_libraries, _others):
        parts = [(name, kind.of(part)) for kind in kinds() for name, part in module.named_modules()]
        if any(backbone for _, backbone in parts):
            return {name: backbone for name, backbone in parts if backbone}
    return {}


def backbone_of(module: nn.Module) -> Backbone:
    """The one vision transformer in a module.

    Raises:
        UnsupportedModelError: there is none, or there are several.
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
    """Refuse an image size, height and width, that does not suit patches of this size.

    Raises:
        ConfigError: a side is no multiple of the patch's, or too large.
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
    """The model for images of another size, in place; None leaves it at its own.

    Raises:
        ConfigError: see `require_size`; or its library has none of that size.
    """
    backbone = backbone_of(model)
    size = backbone.image_size if img_size is None else height_width(img_size)
    if size != backbone.image_size:
        require_size(size, backbone.patch)
        backbone.resize(size)
    return model
