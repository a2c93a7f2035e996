"""The exported file against torch: outputs within tolerance, selections compared, several batch sizes run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from sparsifiner_edge.errors import GateError, MissingExtraError
from sparsifiner_edge.export.deployed import DeployedModel
from sparsifiner_edge.metrics import Agreement, agreement
from sparsifiner_edge.sparse.calibrate import sparse_layers

Array = npt.NDArray[Any]
COSINE = 0.9999
"""Least cosine of every row of every output, end to end (the operators' agreement rules)."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What the comparison found.

    Attributes:
        agreements: per output.
        indices, differing: selected keys in all layers, and how many of them differ from torch's.
        batches: batch sizes that were run.
    """

    agreements: Mapping[str, Agreement]
    indices: int
    differing: int
    batches: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        outputs = {
            name: {"error_relative_to_range": a.error, "least_row_cosine": a.cosine}
            for name, a in self.agreements.items()
        }
        return {
            "outputs": outputs,
            "selected_indices": self.indices,
            "differing_indices": self.differing,
            "batches_run": list(self.batches),
        }


def golden_image(size: int, batch: int = 1, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth random pictures, uint8 [batch,size,size,3]: unlike white noise they look like pictures to a model."""
    rng = np.random.default_rng(seed)
    total = np.zeros((batch, size, size, 3))
    for cells in (2, 5, 11, 23):
        coarse = rng.normal(size=(batch, cells + 1, cells + 1, 3)) / np.sqrt(cells)
        total += _upsample(_upsample(coarse, size, 1), size, 2)
    low, high = total.min(axis=(1, 2, 3), keepdims=True), total.max(axis=(1, 2, 3), keepdims=True)
    return np.asarray(np.round(255 * (total - low) / (high - low)), dtype=np.uint8)


def _upsample(x: Array, size: int, axis: int) -> Array:
    position = np.linspace(0, x.shape[axis] - 1, size)
    left = np.minimum(position.astype(int), x.shape[axis] - 2)
    share = (position - left).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return np.asarray(np.take(x, left, axis) * (1 - share) + np.take(x, left + 1, axis) * share)


def check_export(
    model: onnx.ModelProto, deployed: DeployedModel, size: int, batches: Sequence[int], tolerance: float
) -> tuple[Check, dict[str, Array]]:
    """Run an exported model in ONNX Runtime and hold it against torch.

    Args:
        batches: batch sizes to run; the first gives the golden pair.
        tolerance: greatest difference, relative to the range of an output.

    Returns:
        The check, and the golden arrays "input.image" and "output.<name>" (torch's).

    Raises:
        GateError: an output is beyond tolerance; names output, worst element and share of elements.
    """
    session = _session(model)
    agreements: dict[str, Agreement] = {}
    golden: dict[str, Array] = {}
    indices = differing = 0
    for number, batch in enumerate(batches):
        image = golden_image(size, batch, seed=number)
        expected, chosen = _run_torch(deployed, image)
        results = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": image}), strict=True))
        for name, reference in expected.items():
            found = agreement(results[name], reference, tolerance)
            _require(name, batch, found, tolerance)
            if name not in agreements or found.error > agreements[name].error:
                agreements[name] = found
        for name, reference in zip(_selection_names(model), chosen, strict=True):
            indices += reference.size
            differing += count_differing(results[name], reference)
        golden = golden or {"input.image": image, **{f"output.{k}": v for k, v in expected.items()}}
    return Check(agreements, indices, differing, tuple(batches)), golden


def count_differing(a: Array, b: Array) -> int:
    """Keys of `a` that `b` does not list, over index lists [...,K]."""
    pairs = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
    return sum(len(np.setdiff1d(x, y, assume_unique=True)) for x, y in pairs)


def _require(name: str, batch: int, found: Agreement, tolerance: float) -> None:
    if found.error <= tolerance and found.cosine >= COSINE:
        return
    raise GateError(
        f"Output {name!r} at batch {batch} differs from torch: at {list(found.worst)} {found.got:.6g} instead of "
        f"{found.expected:.6g} ({found.error:.2e} of the range, allowed {tolerance:.0e}; {found.beyond:.2%} of the "
        f"elements beyond; least cosine {found.cosine:.6f}, allowed {COSINE}).",
        "Nothing was written. Report this with the command.",
    )


def _selection_names(model: onnx.ModelProto) -> list[str]:
    return [node.output[0] for node in model.graph.node if node.op_type.endswith("KeySelect")]


def _session(model: onnx.ModelProto) -> Any:
    """A session whose selections are outputs too."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    for name in _selection_names(model):
        probed.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _run_torch(deployed: DeployedModel, image: Array) -> tuple[dict[str, Array], list[Array]]:
    chosen: list[Array] = []
    layers = sparse_layers(deployed)
    try:
        for layer in layers:
            find = layer.indices

            def record(qkv: torch.Tensor, find: Any = find) -> torch.Tensor:
                found: torch.Tensor = find(qkv)
                chosen.append(found.numpy())
                return found

            layer.indices = record  # type: ignore[method-assign]
        outputs = deployed(torch.from_numpy(image))
    finally:
        for layer in layers:
            layer.__dict__.pop("indices", None)
    return {name: x.numpy() for name, x in zip(deployed.output_names, outputs, strict=True)}, chosen
