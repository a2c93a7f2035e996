"""Weights as files and by name, and images as models take them: of no library in particular."""

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
FIT = "Give weights of the same architecture, with the library's own key names."


def normalise(images: Tensor, pre: Normalisation) -> Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W]."""
    mean, std = (torch.tensor(x, device=images.device) for x in (pre.mean, pre.std))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


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
        raise WeightsError(f"{path} cannot be read as weights: {one_line(error)}", "Get or make it again.") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name.", "Give a state dict with the library's own key names.")
    return tensors


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors of other names or shapes than a model's; what they hold is not looked at.

    Raises:
        WeightsError: one is missing, left over, or of another shape.
    """
    refused = f"{source} does not fit this model"
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise WeightsError(f"{refused}: missing {_some(missing)}; left over {_some(extra)}.", FIT)
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise WeightsError(
                f"{refused}: {key} has shape {list(tensor.shape)}, the model has {list(expected[key].shape)}.", FIT
            )


def load_exactly(
    model: nn.Module, state: StateDict, source: str, which: Callable[[str], bool] = lambda _: True
) -> None:
    """Load tensors, all that the model has of a kind and no others, in place.

    Raises:
        WeightsError: one is missing, left over, of another shape, or holds no plain finite numbers.
    """
    expected = {key: tensor for key, tensor in model.state_dict().items() if which(key)}
    check_fit(expected, state, source)
    for key, tensor in state.items():
        check_numbers(tensor, expected[key].is_floating_point(), f"{source}: {key}")
    model.load_state_dict(state, strict=False)


def check_numbers(tensor: Tensor, floating: bool, label: str) -> None:
    """Refuse what is no plain tensor of numbers: sparse, complex, on no device, NaN, infinite in float32."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_floating_point() != floating:
        kind = f"{str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}, on {tensor.device}"
        raise WeightsError(f"{label} is {kind}: no numbers that fit.", "Give plain tensors of floating-point numbers.")
    if not bool(torch.isfinite(tensor.float()).all()):
        raise WeightsError(f"{label} holds NaN or infinity.", "Download or make it again.")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else "nothing"
