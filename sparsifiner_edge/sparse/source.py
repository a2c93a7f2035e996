"""Where models come from: a name of timm's, a folder or name of Hugging Face's, or a user's own factory."""

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
    """A model in memory (a student, or dense: a teacher, a baseline), and what it takes to make it again.

    Attributes:
        model: in evaluation mode; sparse unless the config is dense.
        name: timm's name, transformers' class, or "package.module:factory"; `host` says which.
        normalisation: what it expects of pixels.
        sparsity: what is sparse.
        provenance: where weights and projections came from.
        labels: names of a classifier's classes, where its own are known.
        outputs: names for what it gives (see `outputs_of`); None: its own.
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
        """The vision transformer in the model."""
        return backbone_of(self.model)

    @property
    def img_size(self) -> ImageSize:
        """Pixels of its images: one number for a square."""
        return size_of(*self.backbone.image_size)


def load_source(
    source: str,
    weights: Path | None = None,
    img_size: ImageSize | None = None,
    normalisation: Normalisation | None = None,
) -> Student:
    """A pretrained model, dense, that can be made sparse.

    Args:
        source: timm's name; a folder with config.json and model.safetensors, or a name such as
            "facebook/dinov2-small", which transformers downloads; or "package.module:factory", which is imported.
        weights: for timm's names: file with its key names; None lets timm download them.
        img_size: pixels: a square's side, or height and width; None takes the model's own.
        normalisation: what it expects of pixels, where that is not what is recorded for a model of timm's or
            transformers'; a user's own declares it otherwise (see `normalisation_of`).

    Raises:
        SparsifinerError: there is no such model, it cannot be had, the size does not suit it, or nobody says what it
            expects of pixels; or it could not be made sparse, so that it is no baseline for anything here.
    """
    from_factory = is_factory(source)
    from_folder = is_hugging_face(source)
    brings = f"--weights are for timm's names; {source!r} brings its own."
    require(weights is None or not (from_factory or from_folder), brings, "Leave --weights out.")
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
    """Whether this is a folder or a hub's name of Hugging Face's, and not what may be a name of timm's.

    Raises:
        ConfigError: it is a path to nothing, or to something else.
    """
    if not source or is_factory(source) or timm.is_model(source):
        return False
    folder, on_hub = Path(source), _HUB.fullmatch(source) is not None
    fix = "Give a model's name or folder (docs/models.md); one of your own is package.module:function."
    if folder.is_dir():
        kind = kind_of(folder)
        require(kind is None, f"{source} is a {kind}, not a model.", "Give the model that it was made of.")
        require(hugging_face.is_saved(folder), f"{source} is not a student, nor saved by transformers.", fix)
        return True
    is_name = ":" not in source and not folder.exists()
    require(is_name, f"{source} is {'a file' if folder.exists() else 'no name'}, not a model.", fix)
    # A slip in a path is no reason to ask a network.
    slip = "/" in source and (not on_hub or folder.parent.is_dir())
    require(not slip, f"{source} does not exist.", fix)
    return on_hub


def is_factory(source: str) -> bool:
    """Whether a model's name is of the form "package.module:factory"."""
    return _FACTORY.fullmatch(source) is not None


def call_factory(source: str, img_size: ImageSize | None = None) -> nn.Module:
    """What a user's own function makes, in evaluation mode: it is imported, and called with `img_size` where it takes
    that. The module may say what it expects of pixels (see `normalisation_of`), and name its outputs (`output_names`).

    Raises:
        ConfigError: it cannot be imported, fails, or makes no module.
        UnsupportedModelError: the module contains no vision transformer, or several.
    """
    factory = import_object(source, NAME_IT)
    require(callable(factory), f"{source} is a {type(factory).__name__}.", "Name a function that makes a module.")
    parameters = inspect.signature(factory).parameters
    takes_size = "img_size" in parameters
    options = {"img_size": img_size} if takes_size and img_size is not None else {}
    needed = [n for n, x in parameters.items() if x.default is x.empty and x.kind not in _ANY and n not in options]
    fix = "Give --img-size (--like needs a default)" if needed == ["img_size"] else "Name one that takes img_size alone"
    require(not needed, f"{source} needs {', '.join(needed)}.", f"{fix}, or give defaults.")
    try:
        model: nn.Module = factory(**options)
    # A user's own code may raise anything.
    except Exception as error:
        raise ConfigError(f"{source} failed: {type(error).__name__}: {one_line(error)}.", "Fix the code.") from error
    is_module, fix = isinstance(model, nn.Module), "Let it return a torch.nn.Module."
    require(is_module, f"{source} made a {type(model).__name__}.", fix)
    backbone = backbone_of(model)
    if img_size is not None and backbone.image_size != height_width(img_size):
        raise ConfigError(
            f"{source} was asked for {size_text(height_width(img_size))} pixels and made a model of "
            f"{size_text(backbone.image_size)}" + ("." if takes_size else ": it takes no img_size."),
            "Let the function take img_size and pass it on, or leave --img-size out.",
        )
    return model.eval()


def normalisation_of(module: nn.Module, whose: str, requested: Normalisation | None) -> Normalisation:
    """What a user's own module expects of pixels / 255, per RGB channel: its `image_mean` and `image_std`, or what the
    caller gives. Whether it normalises inside cannot be seen, and a record of the backbone in it says nothing of that.

    Args:
        whose: for messages.

    Raises:
        ConfigError: neither says; or both, and something else; or it is nonsense.
    """
    mean, std = getattr(module, "image_mean", None), getattr(module, "image_std", None)
    declared = None if mean is None or std is None else Normalisation.of(mean, std)
    if declared is not None and requested not in (None, declared):
        raise ConfigError(f"{whose} declares {declared}, not {requested}.", "Leave yours out, or mend the declaration.")
    pixels = declared or requested
    if pixels is None:
        raise ConfigError(
            f"{whose} does not say what its module expects of pixels: it declares no image_mean and image_std.",
            "Declare both on the module; or give --mean and --std, such as --mean 0.485,0.456,0.406 "
            "--std 0.229,0.224,0.225; or --no-normalise where the module normalises inside, of pixels from 0 to 1 "
            "(in Python normalise=(mean, std), or normalise=False).",
        )
    return pixels
