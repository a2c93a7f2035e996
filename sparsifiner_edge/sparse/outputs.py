"""Named outputs of a vision transformer, or of a module that contains one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsifiner_edge.config import require
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.scoring import Prediction
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.layer import riding

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
TOKENS = "tokens"
"""Name of the output that holds the final tokens."""
ALONE = ("logits", "features", TOKENS)
"""Outputs of a vision transformer without a module around it, in this order."""


def outputs_of(
    module: nn.Module, images: Tensor, names: Sequence[str] | None = None, *, tokens: bool = False
) -> dict[str, Tensor]:
    """Call a module and return its outputs by name.

    Args:
        module: Vision transformer, or a module that contains one.
        images: Images [B,3,H,W], as the module expects them.
        names: Names of the module's outputs. None takes the module's own: "logits" (with a classifier), "features" and
            "tokens" for a bare vision transformer, the keys of a dictionary, else "output" or "output_0", "output_1",
            ...
        tokens: Also return "tokens" [B,N,C] of the vision transformer in the module, after its final norm. A bare
            vision transformer always returns them. If tokens are pruned, "token_positions" [B,P] holds the raster
            positions of the patches that are left.

    Raises:
        ConfigError: If the module returns something other than tensors, lacks a named output, does not run its vision
            transformer up to the last layer, or has an output named "tokens" of its own.
    """
    backbone = backbone_of(module)
    alone = backbone.module is module
    if not alone and not tokens:
        return _tensors(module(images), names)
    result, last = backbone.last_output(lambda: backbone.tokens(images) if alone else module(images))
    if last is None:
        raise ConfigError(
            "This module does not run its vision transformer to the last layer.", "Let it use the last layer, too."
        )
    final, outputs = (result, backbone.heads(result)) if alone else (backbone.final_norm(last), _tensors(result, names))
    if TOKENS in outputs:
        raise ConfigError(
            f"The module has an output named {TOKENS!r}, which is the name of its backbone's tokens.",
            "Rename that output, or export without --tokens.",
        )
    outputs = outputs | {TOKENS: final}
    if backbone.sparsity is not None and backbone.sparsity.token_keep:
        outputs[POSITIONS] = riding(last).positions.sort(1).values
    return outputs


@torch.no_grad()
def prediction_of(module: nn.Module, images: Tensor, names: Sequence[str] | None = None) -> Prediction:
    """Return all outputs of a bundle of the module for one image [1,3,H,W], tokens included, for a metric."""
    outputs = outputs_of(module, images, names, tokens=True)
    arrays = {name: (x.float() if x.is_floating_point() else x).cpu().numpy() for name, x in outputs.items()}
    return Prediction(arrays, backbone_of(module).prefix)


def _tensors(result: Any, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the tensors in a module's result by name."""
    if isinstance(result, Mapping):
        tensors = {str(name): value for name, value in result.items() if isinstance(value, Tensor)}
        absent = [name for name in names or () if name not in tensors]
        if absent:
            raise ConfigError(
                f"The module returns no tensor named {absent[0]!r}.",
                f"Available names: {', '.join(tensors) or 'none'}.",
            )
        tensors = tensors if names is None else {name: tensors[name] for name in names}
    else:
        values = list(result) if isinstance(result, (tuple, list)) else [result]
        if names is None:
            names = ["output"] if isinstance(result, Tensor) else [f"output_{i}" for i in range(len(values))]
        if len(names) != len(values) or not all(isinstance(value, Tensor) for value in values):
            raise ConfigError(
                f"The module returns {_kinds(result)}, but has {len(names)} output names: {', '.join(names)}.",
                "Return a tensor, a tuple of tensors or a dictionary of tensors, and name each output.",
            )
        tensors = dict(zip(names, values, strict=True))
    if not tensors:
        raise ConfigError(
            f"The module returns {_kinds(result)} and no tensor.",
            "Return a tensor, a tuple of tensors or a dictionary of tensors.",
        )
    return tensors


def _kinds(result: Any) -> str:
    """Describe the types in a module's result."""
    if isinstance(result, (tuple, list)):
        return f"{len(result)} values ({', '.join(type(value).__name__ for value in result)})"
    return f"a {type(result).__name__}"


def check_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return output names after checking that each can be used in a file.

    Raises:
        ConfigError: If a name is invalid or occurs twice.
    """
    if names is None:
        return None
    are_names = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    require(are_names, f"The output names are {names!r:.80}.", "Give a list of strings.")
    for name in names:
        if not _NAME.fullmatch(name) or name in ("image", *ALONE[2:]) or list(names).count(name) > 1:
            raise ConfigError(
                f"{name!r} is not a valid output name.",
                "Use letters, digits and underscores, and each name once. The names image and tokens are reserved.",
            )
    return tuple(names)
