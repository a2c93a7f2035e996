"""Loading and saving of transformers models, from a folder or the hub.

A student folder stores the configuration, the weights as safetensors, and the normalisation that the model expects.
Code and pickles from a folder or the hub are never used.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import safetensors
import torch
from torch import nn

from sparsifiner_edge.artifacts import ARCHITECTURE_FILE, MAX_JSON, WEIGHTS_FILE
from sparsifiner_edge.bounds import MOST_CLASSES, ImageSize
from sparsifiner_edge.errors import (
    ConfigError,
    MissingExtraError,
    SparsifinerError,
    UnsupportedModelError,
    WeightsError,
)
from sparsifiner_edge.files import read_bytes
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.records import read_record
from sparsifiner_edge.sparse.hosts import backbone_of, for_size
from sparsifiner_edge.sparse.weights import check_numbers
from sparsifiner_edge.text import one_line

_ATTENTION = "eager"
"""Attention implementation while loading. Every model has it, whatever its configuration names."""
_FETCHED = ("config.json", "p*processor_config.json", WEIGHTS_FILE)
"""Files downloaded for a hub name."""
_AGAIN = "Give the complete folder, as transformers saves it."
"""Fix for a folder with files that do not fit together."""
_MANY = re.compile("layer|depth|stage|block|expert")
"""Names of configuration entries that count modules."""
_MOST_LAYERS = 1024
"""Upper limit for configuration entries that match `_MANY`: each counted module costs memory, whatever its size."""
_SPARE = 1 << 24
"""Numbers that a model may hold beyond twice those in its files.

A mismatch below this limit is reported later by tensor name.
"""
_TOWERS = {"CLIPModel": "CLIPVisionModel", "SiglipModel": "SiglipVisionModel"}
"""Image tower that is taken from models of images and text."""


def library() -> Any:
    """Import transformers and return it.

    Raises:
        MissingExtraError: If transformers is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error


def is_saved(folder: Path) -> bool:
    """Return True if the folder has a configuration of transformers."""
    path = folder / "config.json"
    return path.is_file() and b'"model_type"' in read_bytes(path, MAX_JSON)


class _Processor(msgspec.Struct):
    """Entries of `preprocessor_config.json` that concern pixel values."""

    do_rescale: bool | None = True
    rescale_factor: Annotated[float, msgspec.Meta(gt=0)] = 1 / 255
    do_normalize: bool | None = True
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


def load(
    source: str, img_size: ImageSize | None = None, pixels: Normalisation | None = None
) -> tuple[str, nn.Module, Normalisation]:
    """Load a pretrained model and return its class name, the model, and the normalisation that it expects.

    Args:
        source: Folder, or a hub name, which is downloaded.
        img_size: Image size in pixels; see `for_size`.
        pixels: Normalisation that the model expects. None takes that of its image processor.

    Raises:
        SparsifinerError: If the model cannot be downloaded or read, does not fit its configuration, holds NaN, or is
            not supported.
    """
    with _loading(source) as transformers:
        folder = _folder(source)
        kind, config = _configuration(folder, source)
        _require_plausible_size(kind, config, folder / WEIGHTS_FILE, source)
        if pixels is None:
            processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
            pixels = _pixels(processor, source)
        # Mismatched sizes are ignored here, so that the error below can name the tensors.
        model, loading = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            attn_implementation=_ATTENTION,
        )
        for what in ("missing_keys", "mismatched_keys"):
            if loading[what]:
                some = f"{what.replace('_', ' ')} {', '.join(sorted(map(str, loading[what]))[:3])}"
                raise WeightsError(f"The weights in {source} do not fit its configuration: {some}.", _AGAIN)
        for name, tensor in model.named_parameters():
            check_numbers(tensor, True, f"{source}: {name}")
        return kind.__name__, for_size(_with_attention(model), img_size), pixels


def _folder(source: str) -> Path:
    """Return the folder of a model, after downloading it for a hub name."""
    if (folder := Path(source)).is_dir():
        return folder
    hub = importlib.import_module("huggingface_hub")
    return Path(hub.snapshot_download(source, allow_patterns=list(_FETCHED)))


def blank(source: str, img_size: ImageSize | None = None, student: Path | None = None) -> nn.Module:
    """Create the model that a source or a student folder describes, with random weights.

    On the device `meta` the weights take no memory.

    Args:
        source: Folder or hub name.
        img_size: Image size in pixels; see `for_size`.
        student: Student folder, whose configuration is then read instead of the source's.

    Raises:
        SparsifinerError: If the model is not supported.
    """
    with _loading(source):
        folder = (student / ARCHITECTURE_FILE).parent if student else _folder(source)
        kind, config = _configuration(folder, source)
        model: nn.Module = kind(config)
        return for_size(_with_attention(model), img_size)


def _configuration(folder: Path, source: str) -> tuple[Any, Any]:
    """Return the class that a folder's configuration names, and the configuration of that class.

    Raises:
        ConfigError: If the configuration has an implausible number of modules or classes, or names a weight file.
    """
    path = folder / "config.json"
    waiting = [json.loads(read_bytes(path, MAX_JSON))]
    while waiting:
        content = waiting.pop()
        waiting += content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
        for name, value in content.items() if isinstance(content, dict) else ():
            most = MOST_CLASSES if name == "num_labels" else _MOST_LAYERS if _MANY.search(name) else None
            numbers = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)]
            if (most is not None and any(x > most for x in numbers)) or name == "transformers_weights":
                raise ConfigError(f"{path}: {name} is {value!r:.60}, which is not supported.", _AGAIN)
    config = library().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = _class(config, source)
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    config._attn_implementation = _ATTENTION
    return kind, config


def _require_plausible_size(kind: Any, config: Any, weights: Path, source: str) -> None:
    """Refuse a configuration whose model is far larger than its weights, before memory is allocated for it.

    Raises:
        WeightsError: If the model is far larger than its weights.
    """
    with torch.device("meta"):
        model = kind(config)
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    with safetensors.safe_open(weights, "pt") as file:
        held = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    if wanted > 2 * held + _SPARE:
        raise WeightsError(
            f"The weights in {source} do not fit its configuration: they hold {held:,} numbers, but the model has "
            f"{wanted:,}.",
            _AGAIN,
        )


def _with_attention(model: nn.Module) -> nn.Module:
    """Return the model in evaluation mode, with torch's attention in its backbone.

    A configuration may name another attention, even code on a hub.
    """
    backbone_of(model).module.config._attn_implementation = "sdpa"
    return model.eval()


def write_configuration(model: nn.Module, folder: Path) -> None:
    """Write the configuration that `blank` reads into a student folder."""
    config = copy.deepcopy(cast(Any, model).config)
    config.architectures = [type(model).__name__]
    config.save_pretrained((folder / ARCHITECTURE_FILE).parent)


def _class(config: Any, source: str) -> Any:
    """Return the class that a configuration names."""
    names = list(config.architectures or ())
    name = _TOWERS.get(names[0], names[0]) if names else None
    kind = getattr(library(), str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UnsupportedModelError(
            f"{source} has the architecture {', '.join(map(str, names)) or 'none'}, which transformers does not know.",
            "Give a folder that transformers has saved.",
        )
    return kind


def _pixels(content: object, source: str) -> Normalisation:
    """Return the normalisation x = (pixel / 255 - mean) / std that an image processor applies."""
    processor = read_record(content, _Processor, source, "Correct its preprocessor_config.json.", ConfigError)
    factor = 255.0 * processor.rescale_factor if processor.do_rescale else 255.0
    if not processor.do_normalize:
        return Normalisation.of([0.0] * 3, [1 / factor] * 3)
    if processor.image_mean is None or processor.image_std is None:
        raise ConfigError(
            f"{source} has no image_mean and image_std, so the normalisation of pixels is unknown.",
            "Add them to its preprocessor_config.json, or give --mean and --std.",
        )
    mean, std = (tuple(x / factor for x in values) for values in (processor.image_mean, processor.image_std))
    return Normalisation.of(mean, std)


def configured_labels(model: nn.Module) -> tuple[str, ...]:
    """Return the class names of the classifier in a module as configured, or none if they are only numbers.

    Raises:
        ConfigError: If the configuration names other classes than the model has.
    """
    parts = (part for part in model.modules() if type(part).__name__.endswith("ForImageClassification"))
    classifier: Any = next(parts, None)
    if classifier is None:
        return ()
    names = {int(number): str(name) for number, name in classifier.config.id2label.items()}
    if names == {number: f"LABEL_{number}" for number in names}:
        return ()
    if sorted(names) != list(range(len(names))):
        raise ConfigError(
            f"id2label names the classes {sorted(names)}, not 0 to {len(names) - 1}.", "Correct it in config.json."
        )
    return tuple(names[number] for number in range(len(names)))


@contextlib.contextmanager
def _loading(source: str) -> Iterator[Any]:
    """Provide transformers without its progress bars and advice, and turn its errors into errors about the source."""
    transformers = library()
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield transformers
    except SparsifinerError:
        raise
    # transformers and its dependencies raise many kinds of error.
    except Exception as error:
        raise WeightsError(
            f"{source} could not be loaded by transformers: {one_line(error)}",
            "Give a folder with config.json, model.safetensors and preprocessor_config.json. A hub name requires a "
            "network connection.",
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
