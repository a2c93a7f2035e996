"""An exported file held against a user's own call of the model, on real images: `export --check`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.config import require
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.export.check import SAME, run_torch
from sparsifiner_edge.export.deployed_model import DeployedModel, deploy
from sparsifiner_edge.export.sessions import file_runner
from sparsifiner_edge.fitting import Fit, Framing
from sparsifiner_edge.images import AS_IS, Normalisation, evenly, list_images, load_image
from sparsifiner_edge.metrics import agreement
from sparsifiner_edge.plugins import NAME_IT, import_object
from sparsifiner_edge.sparse.student import MAX_CALIBRATION_IMAGES, Student, dense_twin
from sparsifiner_edge.text import one_line

_PIXELS = {
    "from 0 to 1": AS_IS,
    "from -1 to 1": Normalisation((0.5,) * 3, (0.5,) * 3),
    "from 0 to 255": Normalisation((0.0,) * 3, (1 / 255,) * 3),
    "normalised as ImageNet's": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_TAKES = "It is called with one image, uint8 [H,W,3] RGB of the file's size, and returns the model's outputs by name."


class UserFunction(NamedTuple):
    """What a file must answer as, and on which images."""

    name: str
    call: Callable[[Pixels], Any]
    images: list[Path]
    fit: Fit


def user_function(
    check: str | Callable[[Pixels], Any] | None, data: str | Path | None, fit: Fit
) -> UserFunction | None:  # fmt: skip
    """A function, imported where it is named, with at most 32 of the images.

    Raises:
        SparsifinerError: it cannot be imported or called, there is one without the other, or no image.
    """
    fix = "Give both: --check package.module:function --data IMAGES/."
    require((check is None) == (data is None), "A file is checked against a function of yours on images.", fix)
    if check is None or data is None:
        return None
    call = import_object(check, NAME_IT) if isinstance(check, str) else check
    require(callable(call), f"{check} is a {type(call).__name__}.", "Name a function.")
    name = check if isinstance(check, str) else getattr(check, "__name__", type(check).__name__)
    return UserFunction(name, call, evenly(list_images(Path(data)), MAX_CALIBRATION_IMAGES), fit)


def hold_against(
    function: UserFunction, student: Student, model: onnx.ModelProto, batch: int, tokens: bool, exact: bool
) -> str:
    """Hold a file against a user's function. What is sparse, int8 or float16 differs by intent: there the dense model,
    given pixels as the file gives them, must answer as the function does, and of the file the least cosine is said.

    Args:
        student, model: what was exported, and its file of images uint8 [batch,H,W,3]. exact: it is dense, in float32.

    Returns:
        By how much they differ, for people.

    Raises:
        GateError: they differ: with figures, and what would explain it.
        ConfigError: the function fails, or returns something else than the file gives; the student was trained.
    """
    fix = "Check the model that it was made of: export MODEL --check .."
    require(student.provenance.training is None, "A trained student is no longer the model that you would call.", fix)
    run, dense = file_runner(model), None if exact else deploy(dense_twin(student), tokens)
    errors: dict[str, tuple[float, Path]] = {}
    cosines: dict[str, float] = {}
    likely = ""
    for path in function.images:
        image = load_image(path, Framing(student.img_size, function.fit))[None]
        got = {name: x[:1] for name, x in run(np.repeat(image, batch, 0)).items()}
        judged = got if dense is None else run_torch(dense, image)[0]
        for name, wanted in _answers(function, image[0], got).items():
            error = agreement(name, judged[name], wanted, SAME.error).error
            likely = likely or ("" if error <= SAME.error else _likely(student, tokens, image, name, wanted, error))
            errors[name] = max((error, path), errors.get(name, (error, path)))
            cosines[name] = min(cosines.get(name, 1.0), agreement(name, got[name], wanted, SAME.error).cosine)
    whose = "the file" if exact else "the dense model"
    what = f"{function.name} on {len(function.images)} images: " + "; ".join(
        f"{name} of {whose} {error:.2g} of its range apart (worst in {path.name}), least cosine of the file "
        f"{cosines[name]:.6f}" for name, (error, path) in errors.items()
    )  # fmt: skip
    if likely:
        raise GateError(f"Answers differ from {what}.", f"Nothing was written. {likely} {_TAKES}")
    return what


def _answers(function: UserFunction, image: Pixels, got: Mapping[str, Array]) -> dict[str, Array]:
    """What the function gives for an image, by the file's names and in its shapes."""
    try:
        with torch.no_grad():
            answer = function.call(image.copy())
        named = answer if isinstance(answer, Mapping) or len(got) > 1 else {next(iter(got)): answer}
        arrays = {name: np.asarray(torch.as_tensor(x).detach().cpu().double()) for name, x in named.items()}
    except Exception as error:
        raise ConfigError(f"{function.name} failed: {type(error).__name__}: {one_line(error)}.", _TAKES) from error
    for name, value in arrays.items() or [("nothing", image[:0])]:
        if name not in got or value.shape not in (got[name].shape, got[name].shape[1:]):
            expected = ", ".join(f"{key} {list(x.shape)}" for key, x in got.items())
            what = f"{function.name} gives {name} {list(value.shape)}, the file {expected}."
            raise ConfigError(what, "Return what the model gives, before it is resized, cut or otherwise changed.")
    return {name: value.reshape(got[name].shape) for name, value in arrays.items()}


def _likely(student: Student, tokens: bool, image: Pixels, name: str, wanted: Array, error: float) -> str:
    """What the function does otherwise, where it is one of the usual: each is tried."""
    dense, takes, tried = dense_twin(student), f"the file gives it RGB, {student.normalisation}", {}
    for scale, pixels in {"": student.normalisation, **_PIXELS}.items():
        deployed = DeployedModel(dense.model, pixels, tokens, student.outputs)
        for order, changed in (("", image), ("BGR", image[..., ::-1].copy())):
            label = ", ".join(filter(None, (order, scale and f"pixels {scale}")))
            tried[label] = agreement(name, run_torch(deployed, changed)[0][name], wanted, SAME.error).error
    best = min(tried, key=lambda label: tried[label])
    if not best or tried[best] > error / 2:
        return f"No other channels or normalisation explain it ({takes}): a resize or crop, or other weights, would."
    fix = "Say what it expects (--mean and --std, or --no-normalise; of a student at sparsify), or mend the function."
    return f"The model answers so, but for {tried[best]:.2g}, where it is given {best}; {takes}. {fix}"
