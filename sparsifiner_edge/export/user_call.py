"""Comparison of an exported file with the user's own call of the model on real images: `export --check`."""

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


def compare_with_function(
    call: UserFunction,
    images: Mapping[Path, Pixels],
    student: Student,
    model: onnx.ModelProto,
    tokens: bool,
    exact: bool,
) -> str:
    """Compare a file with a user's function.

    A sparse, int8 or float16 file differs on purpose: then the dense model, given the same pixels, must agree with the
    function, and the file's lowest cosine is reported.

    Args:
        call: The user's function.
        images: Images in the file's size, by path.
        student: The exported model.
        model: Its file.
        tokens: See `ExportOptions`.
        exact: The file is dense and float32.

    Returns:
        The difference, as text.

    Raises:
        GateError: They differ; the message has figures and likely reasons.
        ConfigError: The function fails, or returns something else than the file.
    """
    batch = max(1, model.graph.input[0].type.tensor_type.shape.dim[0].dim_value)
    run, dense = file_runner(model), None if exact else deploy(dense_twin(student), tokens)
    rows: dict[str, list[tuple[float, str, float]]] = {}
    reason = ""
    for path, image in images.items():
        got = {name: x[:1] for name, x in run(np.repeat(image[None], batch, 0)).items()}
        compared = got if dense is None else run_torch(dense, image[None])[0]
        for name, wanted in _answers(call, image, got).items():
            error = agreement(name, compared[name], wanted, SAME.error).error
            reason = reason or ("" if error <= SAME.error else _likely_reason(student, tokens, image, name, wanted))
            rows.setdefault(name, []).append((error, path.name, agreement(name, got[name], wanted, 0).cosine))
    subject, summary = "file" if exact else "dense model", f"{_name(call)} on {len(images)} images"
    for name, values in rows.items():
        (error, worst, _), least = max(values), min(cosine for *_, cosine in values)
        summary += f"; {name} of the {subject} differs by {error:.2g} of its range (worst in {worst})"
        summary += f", least cosine of the file {least:.6f}"
    if reason:
        raise GateError(f"Answers differ from {summary}.", f"Nothing was written. {reason} {_TAKES}")
    return summary


def _name(call: UserFunction) -> str:
    return f"{call.__module__}:{getattr(call, '__qualname__', type(call).__name__)}"


def _answers(call: UserFunction, image: Pixels, got: Mapping[str, Array]) -> dict[str, Array]:
    """Return what the function gives for an image, by the file's names and in its shapes."""
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
            what = f"{_name(call)} returns {name} {list(value.shape)}, the file {expected}."
            raise ConfigError(what, "Return the outputs of the model before any resize, crop or other change.")
    return {name: value.reshape(got[name].shape) for name, value in arrays.items()}


def _likely_reason(student: Student, tokens: bool, image: Pixels, name: str, wanted: Array) -> str:
    """Return the likely reason of a difference, by trying the usual ones."""
    file_input, errors = f"the file uses RGB, {student.normalisation}", dict[str, float]()
    for scale, pixels in {"": student.normalisation, **_PIXELS}.items():
        deployed = deploy(dataclasses.replace(dense_twin(student), normalisation=pixels), tokens)
        for order, changed in (("", image), ("BGR", image[..., ::-1].copy())):
            label = ", ".join(filter(None, (order, scale and f"pixels {scale}")))
            errors[label] = agreement(name, run_torch(deployed, changed[None])[0][name], wanted, 0).error
    best = min(errors, key=lambda label: errors[label])
    if not best or errors[best] > errors[""] / 2:
        return f"No other channel order or normalisation explains it ({file_input}). Check resize, crop and weights."
    fix = "Give --mean and --std, or --no-normalise (for a sparse model at sparsify), or fix the function."
    return f"If the model is given {best}, it agrees within {errors[best]:.2g}; {file_input}. {fix}"
