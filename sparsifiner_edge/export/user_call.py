"""An exported file held against a user's own call of the model, on real images: `export --check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.export.check import SAME, run_torch
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.sessions import file_runner
from sparsifiner_edge.images import AS_IS, Normalisation
from sparsifiner_edge.metrics import agreement
from sparsifiner_edge.sparse.student import Student, dense_twin
from sparsifiner_edge.text import one_line

UserFunction: TypeAlias = Callable[[Pixels], Any]
_TAKES = "It is called with one image, uint8 [H,W,3] RGB of the file's size, and returns the model's outputs by name."
_PIXELS = {
    "from 0 to 1": AS_IS,
    "from -1 to 1": Normalisation((0.5,) * 3, (0.5,) * 3),
    "from 0 to 255": Normalisation((0.0,) * 3, (1 / 255,) * 3),
    "normalised as ImageNet's": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def hold_against(
    call: UserFunction,
    images: Mapping[Path, Pixels],
    student: Student,
    model: onnx.ModelProto,
    tokens: bool,
    exact: bool,
) -> str:
    """Hold a file against a user's function. What is sparse, int8 or float16 differs by intent: there the dense model,
    given pixels as the file gives them, must answer as the function does, and of the file the least cosine is said.

    Args:
        images: of the file's size. student, model: what was exported, and its file. tokens: see `ExportOptions`.
        exact: the file is dense, in float32.

    Returns:
        By how much they differ, for people.

    Raises:
        GateError: they differ: with figures, and what would explain it.
        ConfigError: the function fails, or returns something else than the file gives.
    """
    batch = max(1, model.graph.input[0].type.tensor_type.shape.dim[0].dim_value)
    run, dense = file_runner(model), None if exact else deploy(dense_twin(student), tokens)
    rows: dict[str, list[tuple[float, str, float]]] = {}
    likely = ""
    for path, image in images.items():
        got = {name: x[:1] for name, x in run(np.repeat(image[None], batch, 0)).items()}
        judged = got if dense is None else run_torch(dense, image[None])[0]
        for name, wanted in _answers(call, image, got).items():
            error = agreement(name, judged[name], wanted, SAME.error).error
            likely = likely or ("" if error <= SAME.error else _likely(student, tokens, image, name, wanted))
            rows.setdefault(name, []).append((error, path.name, agreement(name, got[name], wanted, 0).cosine))
    whose, what = "file" if exact else "dense model", f"{_name(call)} on {len(images)} images"
    for name, values in rows.items():
        (error, worst, _), least = max(values), min(cosine for *_, cosine in values)
        what += f"; {name} of the {whose} {error:.2g} of its range apart (worst in {worst}), least cosine of the file "
        what += f"{least:.6f}"
    if likely:
        raise GateError(f"Answers differ from {what}.", f"Nothing was written. {likely} {_TAKES}")
    return what


def _name(call: UserFunction) -> str:
    return f"{call.__module__}:{getattr(call, '__qualname__', type(call).__name__)}"


def _answers(call: UserFunction, image: Pixels, got: Mapping[str, Array]) -> dict[str, Array]:
    """What the function gives for an image, by the file's names and in its shapes."""
    try:
        with torch.no_grad():
            answer = call(image.copy())
        named = answer if isinstance(answer, Mapping) or len(got) > 1 else {next(iter(got)): answer}
        arrays = {name: np.asarray(torch.as_tensor(x).detach().cpu().double()) for name, x in named.items()}
    except Exception as error:
        raise ConfigError(f"{_name(call)} failed: {type(error).__name__}: {one_line(error)}.", _TAKES) from error
    for name, value in arrays.items() or [("nothing", image[:0])]:
        if name not in got or value.shape not in (got[name].shape, got[name].shape[1:]):
            expected = ", ".join(f"{key} {list(x.shape)}" for key, x in got.items())
            what = f"{_name(call)} gives {name} {list(value.shape)}, the file {expected}."
            raise ConfigError(what, "Return what the model gives, before it is resized, cut or otherwise changed.")
    return {name: value.reshape(got[name].shape) for name, value in arrays.items()}


def _likely(student: Student, tokens: bool, image: Pixels, name: str, wanted: Array) -> str:
    """What the function does otherwise, where it is one of the usual: each is tried."""
    takes, errors = f"the file gives it RGB, {student.normalisation}", dict[str, float]()
    for scale, pixels in {"": student.normalisation, **_PIXELS}.items():
        deployed = deploy(dataclasses.replace(dense_twin(student), normalisation=pixels), tokens)
        for order, changed in (("", image), ("BGR", image[..., ::-1].copy())):
            label = ", ".join(filter(None, (order, scale and f"pixels {scale}")))
            errors[label] = agreement(name, run_torch(deployed, changed[None])[0][name], wanted, 0).error
    best = min(errors, key=lambda label: errors[label])
    if not best or errors[best] > errors[""] / 2:
        return f"No other channels or normalisation explain it ({takes}): a resize or crop, or other weights, would."
    fix = "Say what it expects (--mean and --std, or --no-normalise; of a student at sparsify), or mend the function."
    return f"The model answers so, but for {errors[best]:.2g}, where it is given {best}; {takes}. {fix}"
