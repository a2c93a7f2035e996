"""Dense vision transformers of timm, from a name and weights."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import safetensors
import safetensors.torch
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparsifiner_edge.bounds import MOST_CLASSES, MOST_SIDE, ImageSize, height_width, size_of, size_text
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError, WeightsError

StateDict = dict[str, Tensor]
Backbone: TypeAlias = VisionTransformer | Eva
"""What can be made sparse: timm's plain vision transformers, the latter with rotary position embeddings too."""


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """What a model expects of an image: x = (pixel / 255 - mean) / std per RGB channel, after a bicubic resize."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def preprocessing(model: nn.Module) -> Normalisation:
    """The normalisation that timm records for a model."""
    data = resolve_model_data_config(model)
    return Normalisation(tuple(data["mean"]), tuple(data["std"]))


def normalise(images: Tensor, pre: Normalisation) -> Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W]."""
    mean, std = torch.tensor(pre.mean), torch.tensor(pre.std)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def brief(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).partition("\n")[0] or type(error).__name__


def read_weights(path: Path) -> StateDict:
    """Tensors of a .safetensors or .pth file; pickles are read with `weights_only=True`.

    Raises:
        WeightsError: missing, truncated, corrupt, or without tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist.", "Give a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is damaged, or a pickle that holds more than tensors; nothing in it was run.",
            "Give a state dict, best as .safetensors.",
        ) from error
    # torch.load and safetensors raise many kinds of error on damaged files.
    except Exception as error:
        raise WeightsError(f"{path} cannot be read as weights: {brief(error)}", "Download or make it again.") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name.", "Give a state dict with timm's key names.")
    return tensors


def create(name: str, img_size: ImageSize | None = None, num_classes: int | None = None) -> Backbone:
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
        return cast(Backbone, timm.create_model(name, pretrained=False, **options).eval())


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


def on_paper(name: str, num_classes: int | None = None) -> Backbone:
    """A model of timm for which nothing is allocated: it tells what it is, and what its weights are.

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
    if isinstance(kind, Backbone):
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


def load_model(name: str, weights: Path | None = None, img_size: ImageSize | None = None) -> Backbone:
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
        return cast(Backbone, timm.create_model(name, pretrained=True, img_size=size, dynamic_img_size=False).eval())
    # The hub clients raise their own kinds of error; all mean that no weights arrived.
    except Exception as error:
        raise WeightsError(
            f"The weights of {name!r} could not be downloaded: {brief(error)}",
            "Connect, or give a file with --weights.",
        ) from error


def load_state(model: Backbone, state: StateDict, source: str, grid: tuple[int, int] | None = None) -> None:
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
        raise WeightsError(f"{source} does not fit this model: {error}.", _FIT) from error
    check_fit(expected, filtered, source)
    for key, tensor in filtered.items():
        _check_numbers(tensor, expected[key].is_floating_point(), f"{source}: {key}")
    model.load_state_dict(filtered)


def _positions(state: StateDict, model: Backbone, grid: tuple[int, int] | None) -> StateDict:
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


_FIT = "Give weights of the same architecture, with timm's key names."


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors of other names or shapes than a model's; what they hold is not looked at.

    Raises:
        WeightsError: one is missing, left over, or of another shape.
    """
    refused = f"{source} does not fit this model"
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise WeightsError(f"{refused}: missing {_some(missing)}; left over {_some(extra)}.", _FIT)
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise WeightsError(
                f"{refused}: {key} has shape {list(tensor.shape)}, the model has {list(expected[key].shape)}.", _FIT
            )


def _check_numbers(tensor: Tensor, floating: bool, label: str) -> None:
    """Refuse what is no plain tensor of numbers: sparse, complex, on no device, NaN, infinite in float32."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_floating_point() != floating:
        kind = f"{str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}, on {tensor.device}"
        raise WeightsError(f"{label} is {kind}: no numbers that fit.", "Give plain tensors of floating-point numbers.")
    if not bool(torch.isfinite(tensor.float()).all()):
        raise WeightsError(f"{label} holds NaN or infinity.", "Download or make it again.")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else "nothing"
