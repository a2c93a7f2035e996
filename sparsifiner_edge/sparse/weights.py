"""Weight files, state dicts and image tensors, independent of a model library."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sparsifiner_edge.errors import WeightsError
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.text import one_line

StateDict = dict[str, Tensor]
"""Tensors by name."""
FIT = "Give weights of the same architecture, with the library's own key names."
"""Fix for weights that do not fit a model."""


def normalise(images: Tensor, pre: Normalisation) -> Tensor:
    """Turn uint8 images [B,H,W,3] into normalised float32 images [B,3,H,W]."""
    mean, std = (torch.tensor(x, device=images.device) for x in (pre.mean, pre.std))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def read_weights(path: Path) -> StateDict:
    """Read the tensors of a .safetensors or .pth file; pickles are read with `weights_only=True`.

    Raises:
        WeightsError: If the file is missing, truncated, corrupt, or without tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist.", "Give a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is damaged, or is a pickle with more than tensors. No code in it was run.",
            "Give a state dict, preferably as .safetensors.",
        ) from error
    # torch.load and safetensors raise many kinds of error on damaged files.
    except Exception as error:
        fix = "Download or create the file again."
        raise WeightsError(f"{path} cannot be read as weights: {one_line(error)}", fix) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise WeightsError(f"{path} is not a state dict.", "Give a state dict with the library's own key names.")
    return tensors


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Check that tensors have the names and shapes that a model expects, without reading their values.

    Args:
        expected: Tensors of the model.
        state: Tensors to check.
        source: Origin of the tensors, for the error message.

    Raises:
        WeightsError: If a tensor is missing, left over, or has another shape.
    """
    refused = f"{source} does not fit this model"
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise WeightsError(f"{refused}: missing {_some(missing)}; left over {_some(extra)}.", FIT)
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise WeightsError(
                f"{refused}: {key} has shape {list(tensor.shape)}, the model expects {list(expected[key].shape)}.", FIT
            )


def load_exactly(
    model: nn.Module, state: StateDict, source: str, which: Callable[[str], bool] = lambda _: True
) -> None:
    """Load tensors into a model in place; they must be exactly the tensors that `which` selects.

    Args:
        model: Model to change.
        state: Tensors to load.
        source: Origin of the tensors, for the error message.
        which: Returns True for the names of the model's tensors to load. The default is all of them.

    Raises:
        WeightsError: If a tensor is missing, left over, has another shape, or holds something other than finite
            numbers.
    """
    expected = {key: tensor for key, tensor in model.state_dict().items() if which(key)}
    check_fit(expected, state, source)
    for key, tensor in state.items():
        check_numbers(tensor, expected[key].is_floating_point(), f"{source}: {key}")
    model.load_state_dict(state, strict=False)


def check_numbers(tensor: Tensor, floating: bool, label: str) -> None:
    """Check that a tensor is dense, on the CPU, of the expected kind of number, and finite in float32.

    Raises:
        WeightsError: If it is not.
    """
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_floating_point() != floating:
        kind = f"{str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}, on {tensor.device}"
        raise WeightsError(f"{label} is {kind}, which is not supported.", "Give dense floating-point tensors.")
    if not bool(torch.isfinite(tensor.float()).all()):
        raise WeightsError(f"{label} holds NaN or infinity.", "Download or create it again.")


def _some(keys: list[str]) -> str:
    """Format up to three names, and the number of names left out."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else "nothing"
