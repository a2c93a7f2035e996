"""Model sources: timm names, Hugging Face folders and names, and the user's own factories."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import timm
from torch import nn

from sparsifiner_edge.artifacts import kind_of, sha256
from sparsifiner_edge.bounds import ImageSize, height_width, size_of, size_text
from sparsifiner_edge.config import SparsityConfig, require
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.plugins import NAME_IT, import_object
from sparsifiner_edge.sparse.hosts import Backbone, backbone_of, hugging_face
from sparsifiner_edge.sparse.hosts.timm import load_model, preprocessing
from sparsifiner_edge.sparse.patch import require_support
from sparsifiner_edge.sparse.student_file import HostKind, Provenance, Weights
from sparsifiner_edge.text import one_line

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_HUB = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Student:
    """Model in memory, sparse or dense, with everything needed to create it again.

    A dense one serves as a teacher or as a baseline.

    Attributes:
        model: Module in evaluation mode, sparse unless the config is dense.
        name: timm name, transformers class, or "package.module:factory"; `host` says which.
        normalisation: Normalisation of pixels that the model expects.
        sparsity: Sparsity settings.
        provenance: Origin of the weights and the projections.
        labels: Class names of a classifier, where it has names of its own.
        outputs: Output names (see `outputs_of`). None takes the module's own.
        host: Kind of source that the model comes from.
    """

    model: Any
    name: str
    normalisation: Normalisation
    sparsity: SparsityConfig = dataclasses.field(default_factory=lambda: SparsityConfig(keep=1))
    provenance: Provenance = dataclasses.field(default_factory=Provenance)
    labels: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = None
    host: HostKind = "timm"

    @property
    def backbone(self) -> Backbone:
        """Vision transformer in the model."""
        return backbone_of(self.model)

    @property
    def img_size(self) -> ImageSize:
        """Image size in pixels: one number for a square, else (height, width)."""
        return size_of(*self.backbone.image_size)


def load_source(
    source: str,
    weights: Path | None = None,
    img_size: ImageSize | None = None,
    normalisation: Normalisation | None = None,
) -> Student:
    """Load a pretrained dense model that can be made sparse.

    Args:
        source: One of: a timm name; a folder with config.json and model.safetensors; a Hugging Face name such as
            "facebook/dinov2-small", which transformers downloads; or "package.module:factory", which is imported.
        weights: For timm names: weight file with timm's key names. None lets timm download the weights.
        img_size: Image size in pixels: the side of a square, or (height, width). None takes the model's own.
        normalisation: Normalisation of pixels that the model expects. None takes the one recorded by timm or
            transformers, or the one that the user's module declares (see `normalisation_of`).

    Raises:
        SparsifinerError: If the model does not exist, cannot be loaded, does not fit the image size, has an unknown
            normalisation, or cannot be made sparse. A model that cannot be made sparse is no use as a baseline here.
    """
    from_factory = is_factory(source)
    from_folder = is_hugging_face(source)
    problem = f"--weights applies to timm names only; {source!r} has its own weights."
    require(weights is None or not (from_factory or from_folder), problem, "Leave --weights out.")
    if from_factory:
        module = call_factory(source, img_size)
        names = getattr(module, "output_names", None)
        pixels = normalisation_of(module, source, normalisation)
        student = Student(module, source, pixels, outputs=None if names is None else tuple(names), host="factory")
    elif from_folder:
        name, module, pixels = hugging_face.load(source, img_size, normalisation)
        labels, provenance = hugging_face.configured_labels(module), Provenance(Weights(origin=source))
        student = Student(module, name, pixels, provenance=provenance, labels=labels, host="transformers")
    else:
        model = load_model(source, weights, img_size)
        origin = Weights(file=weights.name, sha256=sha256(weights)) if weights else Weights(origin="timm hub")
        student = Student(model, source, normalisation or preprocessing(model), provenance=Provenance(origin))
    require_support(student.model)
    return student


def is_hugging_face(source: str) -> bool:
    """Return True if the source is a Hugging Face folder or hub name and not a timm name.

    Raises:
        ConfigError: If the source is a path that does not exist, or the path of something else.
    """
    if not source or is_factory(source) or timm.is_model(source):
        return False
    folder, on_hub = Path(source), _HUB.fullmatch(source) is not None
    fix = "Give a model's name, a folder, or your own package.module:function (docs/models.md)."
    if folder.is_dir():
        kind = kind_of(folder)
        require(kind is None, f"{source} is a {kind}, not a model.", "Give the model that it was made from.")
        is_saved = hugging_face.is_saved(folder)
        require(is_saved, f"{source} is neither a student nor a folder saved by transformers.", fix)
        return True
    is_name = ":" not in source and not folder.exists()
    require(is_name, f"{source} is {'a file, not a model' if folder.exists() else 'not a model name'}.", fix)
    # A mistyped path should not cause a network request.
    mistyped = "/" in source and (not on_hub or folder.parent.is_dir())
    require(not mistyped, f"{source} does not exist.", fix)
    return on_hub


def is_factory(source: str) -> bool:
    """Return True if the source has the form "package.module:factory"."""
    return _FACTORY.fullmatch(source) is not None


def call_factory(source: str, img_size: ImageSize | None = None) -> nn.Module:
    """Import a user's factory, call it, and return its module in evaluation mode.

    The factory is called with `img_size` if it has such a parameter. The module may declare the normalisation that it
    expects (see `normalisation_of`) and the names of its outputs (`output_names`).

    Raises:
        ConfigError: If the factory cannot be imported, fails, or returns no module.
        UnsupportedModelError: If the module contains no vision transformer, or several.
    """
    factory = import_object(source, NAME_IT)
    require(callable(factory), f"{source} is a {type(factory).__name__}.", "Name a function that returns a module.")
    parameters = inspect.signature(factory).parameters
    takes_size = "img_size" in parameters
    options = {"img_size": img_size} if takes_size and img_size is not None else {}
    needed = [n for n, x in parameters.items() if x.default is x.empty and x.kind not in _ANY and n not in options]
    takes_more = "Name a function that takes img_size only"
    fix = "Give --img-size (--like requires a default)" if needed == ["img_size"] else takes_more
    require(not needed, f"{source} requires the arguments: {', '.join(needed)}.", f"{fix}, or give them defaults.")
    try:
        model: nn.Module = factory(**options)
    # User code may raise any exception.
    except Exception as error:
        raise ConfigError(f"{source} failed: {type(error).__name__}: {one_line(error)}.", "Fix the code.") from error
    is_module, fix = isinstance(model, nn.Module), "Return a torch.nn.Module."
    require(is_module, f"{source} returned a {type(model).__name__}.", fix)
    backbone = backbone_of(model)
    if img_size is not None and backbone.image_size != height_width(img_size):
        raise ConfigError(
            f"{source} returned a model for {size_text(backbone.image_size)} pixels instead of "
            f"{size_text(height_width(img_size))}" + ("." if takes_size else ": it has no parameter img_size."),
            "Let the function take img_size and pass it on, or leave --img-size out.",
        )
    return model.eval()


def normalisation_of(module: nn.Module, whose: str, requested: Normalisation | None) -> Normalisation:
    """Return the normalisation of pixels / 255, per RGB channel, that a user's module expects.

    It is the module's `image_mean` and `image_std`, or the one that the caller requests. A module that normalises
    inside cannot be recognised, and what timm or transformers record for its backbone does not settle it.

    Args:
        module: Module that a user's factory returned.
        whose: Name of the model for error messages.
        requested: Normalisation that the caller gives, or None.

    Raises:
        ConfigError: If neither gives a normalisation, if the two differ, or if one is invalid.
    """
    mean, std = getattr(module, "image_mean", None), getattr(module, "image_std", None)
    declared = None if mean is None or std is None else Normalisation.of(mean, std)
    if declared is not None and requested not in (None, declared):
        raise ConfigError(
            f"{whose} declares {declared}, but {requested} was given.",
            "Leave yours out, or correct the declaration.",
        )
    pixels = declared or requested
    if pixels is None:
        raise ConfigError(
            f"{whose} declares no image_mean and image_std, so the normalisation of pixels is unknown.",
            "Declare both on the module, or give --mean and --std, such as --mean 0.485,0.456,0.406 "
            "--std 0.229,0.224,0.225. Give --no-normalise if the module takes pixels from 0 to 1 and normalises "
            "inside (in Python: normalise=(mean, std), or normalise=False).",
        )
    return pixels
