"""In-place sparsification of a live module: `sparsify_model`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig, require
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.sparse.calibrate import calibrate_from_images, calibrate_from_weights, sparse_layers
from sparsifiner_edge.sparse.defaults import SparsityOptions, default_background_tokens, fit_to_model
from sparsifiner_edge.sparse.hosts import Backbone, backbone_of
from sparsifiner_edge.sparse.patch import AnyModule, make_model_sparse, require_support, restore_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

CALIBRATION_SIDE = 16
"""Most patches along the longer side of the images from which a predictor is calibrated."""


def sparsify_model(
    module: AnyModule,
    *,
    calibrate: Tensor | Iterable[Tensor] | None = None,
    progress: Progress | None = None,
    **options: Unpack[SparsityOptions],
) -> AnyModule:
    """Make the vision transformer in a module sparse, in place.

    Args:
        module: Vision transformer of timm or transformers with a fixed image size, or any module that contains one, on
            any device and in any mode. Its own weights do not change.
        calibrate: Images to calibrate the predictor, float [B,3,H,W], or several such batches, as the module is called
            with them. A dozen images help a lot; more than 32 bring no further gain. None uses the weights only.
        progress: Callback that counts images; see `Progress`.
        options: Sparsity settings, such as `keep=0.25, merge=(160, 0)`; see `SparsityOptions`.

    Returns:
        The same object. `restore_model` undoes the change.

    Raises:
        UnsupportedModelError: If the module contains no supported vision transformer, contains several, or contains one
            that cannot be made sparse.
        ConfigError: If a value is out of range or does not fit the model, or if the images are unsuitable. The module
            is unchanged in this case.

    Example:
        >>> import timm, torch
        >>> model = sparsify_model(timm.create_model("deit_tiny_patch16_224"), keep=0.5)
        >>> model(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    backbone = require_support(module)
    sparsity = fit_to_model(SparsityConfig.for_preset(**options), backbone, options)
    images = [] if calibrate is None else arriving(module, backbone, calibrate)
    make_model_sparse(module, sparsity)
    calibrate_from_weights(module)
    if images and sparse_layers(module):
        learn(backbone, images, progress)
    return module


def learn(backbone: Backbone, images: Sequence[Tensor], progress: Progress | None = None) -> None:
    """Calibrate the predictor of a sparse transformer from normalised images [1,3,H,W].

    The calibration runs in a dense float32 copy at `calibration_size`. With the preset "edge" this is faster than at a
    larger size and no worse on held-out photographs (profiles/results/fidelity, row "at size").
    """
    sparsity = cast(SparsityConfig, backbone.sparsity)
    size = calibration_size(backbone, sparsity.preset)
    dense = restore_model(copy.deepcopy(cast(nn.Module, backbone.module))).float().eval()
    twin = backbone_of(dense)
    if size != twin.image_size:
        twin.resize(size)
        twin = backbone_of(dense)
        # The predictor hardly depends on the tile and the background tokens, which must fit the smaller image.
        tile = sparsity.tile if sparsity.tile <= twin.patches else sparsity.query_pool
        sparsity = dataclasses.replace(
            sparsity,
            tile=tile,
            background_tokens=min(sparsity.background_tokens, default_background_tokens(twin.patches)),
        )
    # No tokens merge during calibration, and the rate may be too high for the smaller image.
    make_model_sparse(dense, dataclasses.replace(sparsity, merge=()))
    like = twin.embedding.weight
    calibrate_from_images(dense, [_resize(image, size).to(like) for image in images], progress)
    for layer, learnt in zip(sparse_layers(backbone.module), sparse_layers(dense), strict=True):
        layer.select.load_state_dict(learnt.select.state_dict())


def calibration_size(backbone: Backbone, preset: str) -> tuple[int, int]:
    """Return the size (height, width) in pixels of the images from which a predictor is calibrated.

    It is the model's own size. With the preset "edge", whose predictor does not depend on the resolution, it is at most
    `CALIBRATION_SIDE` patches along the longer side.
    """
    longer = max(backbone.grid)
    if preset != "edge" or longer <= CALIBRATION_SIDE:
        return backbone.image_size
    height, width = (max(1, round(side * CALIBRATION_SIDE / longer)) for side in backbone.grid)
    return height * backbone.patch[0], width * backbone.patch[1]


def arriving(module: nn.Module, backbone: Backbone, images: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return the images [1,3,H,W] that reach the transformer when the module around it is called with `images`.

    Raises:
        ConfigError: If there are no images, if they are unsuitable, or if the module does not use its transformer.
    """
    batches = [images] if isinstance(images, Tensor) else list(images)
    for batch in batches:
        require_images(batch)
    if not batches:
        raise ConfigError("There is no image to calibrate with.", "Give images, or leave calibrate out.")
    like = backbone.embedding.weight
    tensors: list[Tensor] = []
    if module is backbone.module:
        tensors = [batch.to(like) for batch in batches]
    else:
        hook = backbone.embedding.register_forward_pre_hook(lambda _, inputs: tensors.append(inputs[0].detach()))
        try:
            with _evaluating(module), torch.no_grad():
                for batch in batches:
                    module(batch.to(like))
        finally:
            hook.remove()
        if not tensors:
            raise ConfigError(
                f"This {type(module).__name__} did not use its vision transformer when it was called with the images.",
                "Give the transformer itself to sparsify_model.",
            )
    return [image[None] for batch in tensors for image in batch]


def require_images(batch: Any) -> None:
    """Check that a batch is a floating-point tensor [B,3,H,W] of finite numbers.

    Raises:
        ConfigError: If it is not. The message describes the batch.
    """
    x = batch if isinstance(batch, Tensor) else torch.empty(0)
    fits = x.ndim == 4 and x.shape[1] == 3 and x.numel() > 0 and x.is_floating_point()
    kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if x is batch else type(batch).__name__
    require(fits, f"Images are {kind}.", "Give floating-point [B,3,H,W], normalised as the module expects.")
    require(bool(torch.isfinite(x).all()), "An image holds NaN or infinity.", "Leave it out.")


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images [B,3,H,W] bicubically with antialiasing, unless they have the size already."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image.float(), size, mode="bicubic", antialias=True)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode inside a `with` block, and restore the mode of each part afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
