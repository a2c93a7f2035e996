"""Models of transformers from a folder or the hub, and as a student keeps them: configuration, weights as safetensors,
what they expect of pixels. No code and no pickle is ever taken from there.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sparsifiner_edge.artifacts import ARCHITECTURE_FILE, MAX_JSON
from sparsifiner_edge.bounds import MOST_SIDE, ImageSize, height_width, size_text
from sparsifiner_edge.errors import (
    ConfigError,
    MissingExtraError,
    SparsifinerError,
    UnsupportedModelError,
    WeightsError,
)
from sparsifiner_edge.files import read_bytes
from sparsifiner_edge.sparse.hosts import Backbone, backbone_of
from sparsifiner_edge.sparse.weights import Normalisation, brief

_ATTENTION = "eager"
"""What every model has, whatever its configuration names."""
_TOWERS = {"CLIPModel": "CLIPVisionModel", "SiglipModel": "SiglipVisionModel"}
"""Models of images and text: their image tower is taken."""


def library() -> Any:
    """transformers.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error


def is_saved(folder: Path) -> bool:
    """Whether a folder has a configuration of transformers'."""
    path = folder / "config.json"
    return path.is_file() and b'"model_type"' in read_bytes(path, MAX_JSON)


def load_pretrained(source: str, img_size: ImageSize | None = None) -> tuple[str, nn.Module, Normalisation]:
    """A pretrained model: its class, itself, and what it expects of pixels.

    Args:
        source: folder, or a name on the hub, which is downloaded.
        img_size: see `for_size`.

    Raises:
        SparsifinerError: it cannot be had, does not fit its configuration, or is none that can be taken.
    """
    transformers, local = library(), Path(source).is_dir()
    with _quiet(transformers), _about(source):
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        kind = _class(config, source)
        given, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local)
        model, found = kind.from_pretrained(
            source,
            local_files_only=local,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # to say which
            attn_implementation=_ATTENTION,
        )
    for what in ("missing_keys", "mismatched_keys"):
        if found[what]:
            some = sorted(map(str, found[what]))[:3]
            raise WeightsError(
                f"The weights in {source} do not fit its configuration: {what.replace('_', ' ')} {', '.join(some)}.",
                "Give the folder whole, as transformers saves it.",
            )
    return kind.__name__, for_size(_with_attention(model), img_size), _pixels(given, source)


def blank(folder: Path, img_size: ImageSize) -> nn.Module:
    """The model that a student's folder describes, with random weights.

    Raises:
        SparsifinerError: it describes none that can be taken.
    """
    transformers = library()
    with _quiet(transformers), _about(str(folder)):
        config = transformers.AutoConfig.from_pretrained(
            (folder / ARCHITECTURE_FILE).parent, local_files_only=True, trust_remote_code=False
        )
        config._attn_implementation = _ATTENTION
        model: nn.Module = _class(config, str(folder))(config)
    return for_size(_with_attention(model), img_size)


def _with_attention(model: nn.Module) -> nn.Module:
    """The model, its backbone with torch's own attention: a configuration may name others, even code on a hub."""
    backbone_of(model).module.config._attn_implementation = "sdpa"
    return model.eval()


def write_configuration(model: nn.Module, folder: Path) -> None:
    """Write into a student's folder what `blank` reads."""
    config = copy.deepcopy(cast(Any, model).config)
    config.architectures = [type(model).__name__]
    config.save_pretrained((folder / ARCHITECTURE_FILE).parent)


def for_size(model: nn.Module, img_size: ImageSize | None) -> nn.Module:
    """The model for images of another size, in place; None leaves it at its configuration's.

    Raises:
        ConfigError: a side is no multiple of the patch size, or too large, or CLIP's are not equal.
    """
    if img_size is None:
        return model
    backbone, size = backbone_of(model), height_width(img_size)
    _check_size(backbone, size)
    if size != backbone.image_size:
        backbone.host.resize(backbone, size)
    return model


def _check_size(backbone: Backbone, size: tuple[int, int]) -> None:
    if max(size) > MOST_SIDE:
        raise ConfigError(
            f"image size {size_text(size)} is too large.", f"Use at most {MOST_SIDE} pixels along a side."
        )
    near = [max(round(side / patch), 1) * patch for side, patch in zip(size, backbone.patch, strict=True)]
    if tuple(near) != size:
        raise ConfigError(
            f"image size {size_text(size)} is no multiple of the patch size {size_text(backbone.patch)}.",
            f"Use {size_text((near[0], near[1]))}, for instance.",
        )
    if size[0] != size[1] and type(backbone.module).__name__ == "CLIPVisionModel":
        raise ConfigError(f"CLIP takes squares alone, not {size_text(size)}.", "Give one side: --img-size 224.")


def _class(config: Any, source: str) -> Any:
    """The class that a configuration names."""
    names = list(config.architectures or ())
    name = _TOWERS.get(names[0], names[0]) if names else None
    kind = getattr(library(), str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UnsupportedModelError(
            f"{source} is of the architecture {', '.join(map(str, names)) or 'none'}, unknown to transformers.",
            "Give a folder that transformers has saved.",
        )
    return kind


def _pixels(given: Mapping[str, Any], source: str) -> Normalisation:
    """What an image processor does to pixels, resizing excepted, as x = (pixel / 255 - mean) / std."""
    factor = 255.0 * float(given.get("rescale_factor", 1 / 255)) if given.get("do_rescale", True) else 255.0
    if not given.get("do_normalize", True):
        return Normalisation.checked([0.0] * 3, [1 / factor] * 3)
    mean, std = given.get("image_mean"), given.get("image_std")
    if mean is None or std is None:
        raise ConfigError(
            f"{source} does not say what its model expects of pixels: no image_mean and image_std.",
            "Add them to its preprocessor_config.json.",
        )
    return Normalisation.checked([x / factor for x in mean], [x / factor for x in std])


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own progress bars and advice."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _about(source: str) -> Iterator[None]:
    """What the library raises becomes an error about the source."""
    try:
        yield
    except SparsifinerError:
        raise
    # It, and what it uses, raise kinds of their own.
    except Exception as error:
        raise WeightsError(
            f"{source} could not be loaded by transformers: {brief(error)}",
            "Give a folder with config.json, model.safetensors and preprocessor_config.json; for a hub's name connect.",
        ) from error
