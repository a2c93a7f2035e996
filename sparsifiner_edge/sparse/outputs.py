"""What a model gives, by name: of a vision transformer alone, or of any module that contains one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsifiner_edge.config import require
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.judge import Prediction
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.layer import riding

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
TOKENS = "tokens"
ALONE = ("logits", "features", TOKENS)
"""What a vision transformer alone gives, in this order."""


def outputs_of(
    module: nn.Module, images: Tensor, names: Sequence[str] | None = None, *, tokens: bool = False
) -> dict[str, Tensor]:
    """Call a module with images [B,3,H,W], as it wants them.

    Args:
        names: of its outputs; None takes the module's own: for a vision transformer alone "logits" (where it has
            classes), "features" and "tokens", for a dictionary its keys, else "output" or "output_0", ...
        tokens: of a module around a vision transformer also "tokens" of that, after its final norm: [B,N,C]; a vision
            transformer alone always gives them. Where some are pruned, "token_positions" says which are left: the
            raster places [B,P] of the patches.

    Raises:
        ConfigError: the module gives something else than tensors, or what was named; it does not run its transformer
            to the last layer, or an own output is called "tokens".
    """
    backbone = backbone_of(module)
    alone = backbone.module is module
    if not alone and not tokens:
        return _tensors(module(images), names)
    result, last = backbone.last_output(lambda: backbone.tokens(images) if alone else module(images))
    if last is None:
        raise ConfigError("This module does not run its vision transformer to the last layer.", "Let it read that too.")
    final, outputs = (result, backbone.heads(result)) if alone else (backbone.final_norm(last), _tensors(result, names))
    if TOKENS in outputs:
        raise ConfigError(
            f"The module's own output {TOKENS!r} bears the name of its backbone's.",
            "Name it otherwise; to export it, leaving --tokens out helps too.",
        )
    outputs = outputs | {TOKENS: final}
    if backbone.sparsity is not None and backbone.sparsity.token_keep:
        outputs[POSITIONS] = riding(last).positions.sort(1).values
    return outputs


@torch.no_grad()
def prediction_of(module: nn.Module, images: Tensor, names: Sequence[str] | None = None) -> Prediction:
    """All that a bundle of the module would give for one image [1,3,H,W], tokens too, for a judge."""
    outputs = outputs_of(module, images, names, tokens=True)
    arrays = {name: (x.float() if x.is_floating_point() else x).cpu().numpy() for name, x in outputs.items()}
    return Prediction(arrays, backbone_of(module).prefix)


def _tensors(result: Any, names: Sequence[str] | None) -> dict[str, Tensor]:
    """The tensors in what a module returned."""
    if isinstance(result, Mapping):
        tensors = {str(name): value for name, value in result.items() if isinstance(value, Tensor)}
        absent = [name for name in names or () if name not in tensors]
        if absent:
            raise ConfigError(
                f"The module gives no tensor {absent[0]!r}.", f"Name some of: {', '.join(tensors) or 'nothing'}."
            )
        tensors = tensors if names is None else {name: tensors[name] for name in names}
    else:
        values = list(result) if isinstance(result, (tuple, list)) else [result]
        if names is None:
            names = ["output"] if isinstance(result, Tensor) else [f"output_{i}" for i in range(len(values))]
        if len(names) != len(values) or not all(isinstance(value, Tensor) for value in values):
            raise ConfigError(
                f"The module returns {_kinds(result)}, for {len(names)} outputs {', '.join(names)}.",
                "Let it return tensors, alone, as a tuple or by name, and name each.",
            )
        tensors = dict(zip(names, values, strict=True))
    if not tensors:
        raise ConfigError(f"The module returns {_kinds(result)}: no tensor.", "Let it return some, best by name.")
    return tensors


def _kinds(result: Any) -> str:
    """The types in what a module returned."""
    if isinstance(result, (tuple, list)):
        return f"{len(result)} values ({', '.join(type(value).__name__ for value in result)})"
    return f"a {type(result).__name__}"


def check_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names as they may stand in a file.

    Raises:
        ConfigError: one is none, or occurs twice.
    """
    if names is None:
        return None
    are_names = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    require(are_names, f"The names of outputs are {names!r:.80}.", "Give a list of names.")
    for name in names:
        if not _NAME.fullmatch(name) or name in ("image", *ALONE[2:]) or list(names).count(name) > 1:
            raise ConfigError(
                f"{name!r} cannot name an output.",
                "Give letters, digits and underscores, each name once; image and tokens mean something else.",
            )
    return tuple(names)
