"""Check of an exported file against torch: outputs within tolerance, selections compared, several batch sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from torch.nn import functional

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.bundle.entries import Check
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.export.deployed_model import DeployedModel
from sparsifiner_edge.export.sessions import file_runner, results_of, with_outputs
from sparsifiner_edge.metrics import OTHER_TOKENS, POSITIONS, Agreement, agreement, align
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.runtime.backend import native_library
from sparsifiner_edge.sparse.calibrate import sparse_layers
from sparsifiner_edge.sparse.merge import Merging
from sparsifiner_edge.sparse.outputs import ALONE


class _Limits(NamedTuple):
    """Limits of an output.

    Attributes:
        error: Greatest difference relative to the output's range.
        least: Lowest cosine of a row.
        mean: Mean cosine of the rows.
        beyond: Share of elements that may exceed `error`.
    """

    error: float
    least: float
    mean: float
    beyond: float = 0.0


SAME = _Limits(1e-3, 0.9999, 0.9999)
"""Limits with equal key selection, where only rounding differs (the operators' agreement rules)."""
OTHERS = _Limits(5e-2, 0.99, 0.999)
"""Limits if file and torch select keys themselves and some keys differ.

Of two keys with equal scores either may be read, and later layers follow from that; with shared landmarks, all rows do.
"""
MAPS_OTHERS = _Limits(0.25, 0.99, 0.99)
"""Limits for a decoder's output from such tokens: it depends on all of them, and may amplify differences."""
MERGED_OTHERS = _Limits(5e-2, -1.0, 0.99, OTHER_TOKENS)
"""Limits if some tokens that merge differ: the patches of such a pair carry another token's features."""
INT8_TOLERANCE = 5e-2
"""Greatest difference from the golden outputs, relative to their range, for int8: processors round int8 differently."""
INT8_HALF_TOLERANCE = 2e-1
"""The same if the rest is float16: two versions of ONNX Runtime differ by .11 on a sparse DINOv2."""
HALF_TOLERANCE = 2e-2
"""Tolerance in float16, which processors accumulate in different orders."""
HALF_TOLERANCE_FREE = 5e-2
"""Tolerance in float16 if each session selects keys or tokens itself."""
FREE_TOLERANCE = 2e-2
"""Tolerance in fp32 if keys or tokens are selected."""


def smooth_images(size: ImageSize, batch: int = 1, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return smooth random images, uint8 [batch,height,width,3], which look more like images than white noise does."""
    rng, sides = np.random.default_rng(seed), height_width(size)
    total = torch.zeros(batch, 3, *sides, dtype=torch.float64)
    for cells in (2, 5, 11, 23):
        coarse = torch.from_numpy(rng.normal(size=(batch, cells + 1, cells + 1, 3)) / np.sqrt(cells))
        total += functional.interpolate(coarse.permute(0, 3, 1, 2), sides, mode="bilinear", align_corners=True)
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return (255 * (total - low) / (high - low)).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def check_export(
    model: onnx.ModelProto, deployed: DeployedModel, size: ImageSize, batches: Sequence[int]
) -> tuple[Check, dict[str, Array]]:
    """Run an exported model in ONNX Runtime and compare it with torch.

    It is compared twice: with the keys that the file selected, where only rounding may differ, and with torch's own
    (limits `OTHERS` if some keys differ).

    Args:
        model: The exported model.
        deployed: The module that it was exported from.
        size: Size of the images.
        batches: Batch sizes to run; the first gives the golden pair.

    Returns:
        The check, and the golden arrays "input.image" and "output.<name>" (torch's).

    Raises:
        GateError: An output is beyond tolerance; names the output, the worst element and the share of elements.
    """
    sparse = any(node.domain == DOMAIN for node in model.graph.node)
    kernels = ("portable", "native") if sparse and native_library("auto") else ("portable",)
    selects, matches = results_of(model, "KeySelect"), results_of(model, "MatchTokens")
    runners = [file_runner(with_outputs(model, selects + matches), kind) for kind in kernels]
    free: dict[str, Agreement] = {}
    equal: dict[str, Agreement] = {}
    golden: dict[str, Array] = {}
    indices = differing = pruned = 0
    for number, batch in enumerate(batches):
        image = smooth_images(size, batch, seed=number)
        expected, chosen = run_torch(deployed, image)
        golden = golden or {"input.image": image, **{f"output.{k}": v for k, v in expected.items()}}
        for run in runners:
            results = run(image)
            lists, pairs = ([results[name] for name in names] for names in (selects, matches))
            same, _ = run_torch(deployed, image, lists, pairs)
            with_same_keys, lost = align(results, same)
            _compare(equal, with_same_keys, same, OTHERS if lost else SAME, batch)
            results, missing = align(results, expected)
            lists += [_as_numbers(x) for x in pairs]
            others = sum(count_differing(a, b) for a, b in zip(lists, chosen, strict=True))
            looser = MERGED_OTHERS if matches else OTHERS
            _compare(free, results, expected, looser if others or missing else SAME, batch)
            allowed = OTHER_TOKENS * expected.get(POSITIONS, np.empty(0)).size
            if missing > allowed:  # Rounding may decide which tokens are pruned, but only for a few.
                what = f"At batch {batch} the file prunes {missing} tokens that torch keeps, allowed {allowed:.0f}."
                raise GateError(what, "Nothing was written. Report this with the command.")
            pruned += missing
            indices += sum(x.size for x in chosen)
            differing += others
    errors, alike = ({name: stats.error for name, stats in worst.items()} for worst in (free, equal))
    cosines = {name: stats.cosine for name, stats in free.items()}
    return Check(errors, cosines, alike, indices, differing, pruned, tuple(batches), kernels), golden


def tolerances_of(check: Check, precision: str, int8_target: str, selects: bool) -> dict[str, float]:
    """Return the greatest allowed difference by output, relative to its range.

    Args:
        check: Result of `check_export`.
        precision: See `ExportOptions`.
        int8_target: See `ExportOptions`.
        selects: True if the file selects keys or tokens.
    """
    general = {
        "int8": INT8_HALF_TOLERANCE if int8_target == "tensorrt" else INT8_TOLERANCE,
        "fp16": HALF_TOLERANCE_FREE if selects else HALF_TOLERANCE,
    }.get(precision, SAME.error)
    if precision == "fp32" and selects:  # Take the wide tolerance only if the check itself needed it.
        general = FREE_TOLERANCE if max(check.errors.values(), default=0) <= FREE_TOLERANCE else OTHERS.error
    # A decoder's map may differ by as much as the check allowed.
    wide = {name for name, error in check.errors.items() if name not in ALONE and error > FREE_TOLERANCE}
    return {name: max(general, MAPS_OTHERS.error) if name in wide else general for name in check.errors}


def _compare(
    worst: dict[str, Agreement],
    results: Mapping[str, Array],
    expected: Mapping[str, Array],
    limits: _Limits,
    batch: int,
) -> None:
    """Require every output within limits, and keep the worst agreement of each."""
    for name, reference in expected.items():
        if name == POSITIONS:
            continue
        allowed = MAPS_OTHERS if limits is not SAME and name not in ALONE else limits
        stats = agreement(name, results[name], reference, allowed.error)
        within = stats.error <= allowed.error or stats.beyond <= allowed.beyond
        if not (within and stats.cosine >= allowed.least and stats.mean >= allowed.mean):
            raise GateError(
                f"Output {name!r} at batch {batch} differs from torch: at {list(stats.worst)} {stats.got:.6g} instead "
                f"of {stats.expected:.6g} ({stats.error:.2e} of the range, allowed {allowed.error:.0e}; "
                f"{stats.beyond:.2%} of the elements beyond; least cosine of a row {stats.cosine:.6f}, allowed "
                f"{allowed.least}; mean {stats.mean:.6f}, allowed {allowed.mean}).",
                "Nothing was written. Report this with the command.",
            )
        if name not in worst or stats.error > worst[name].error:
            worst[name] = stats


def count_differing(a: Array, b: Array) -> int:
    """Count the keys of `a` that `b` does not list, over index lists [...,K]."""
    pairs = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
    return sum(len(np.setdiff1d(x, y, assume_unique=True)) for x, y in pairs)


def _as_numbers(pairs: Array) -> Array:
    """Encode pairs int32 [B,M,2] as one number each [B,M]."""
    return pairs[..., 0].astype(np.int64) << 32 | pairs[..., 1]


@torch.no_grad()
def run_torch(
    deployed: DeployedModel,
    image: Array,
    lists: Sequence[Array] | None = None,
    pairs: Sequence[Array] | None = None,
) -> tuple[dict[str, Array], list[Array]]:
    """Run the module, and return its outputs and its choices.

    The choices are each sparse layer's keys, then each merging layer's pairs. With `lists` and `pairs`, one array per
    layer, these keys are read and these tokens merge.
    """
    merging = [part for part in deployed.modules() if isinstance(part, Merging)]
    with _choices(sparse_layers(deployed), "indices", lists) as read, _choices(merging, "pairs", pairs) as matched:
        outputs = deployed(torch.from_numpy(image))
    chosen = read + [_as_numbers(x) for x in matched]
    return {name: x.numpy() for name, x in zip(deployed.output_names, outputs, strict=True)}, chosen


@contextlib.contextmanager
def _choices(parts: Sequence[nn.Module], method: str, fixed: Sequence[Array] | None) -> Iterator[list[Array]]:
    """Record what a method of modules returns in the block; with `fixed`, return that instead."""
    chosen: list[Array] = []

    def instead(part: nn.Module) -> Callable[..., torch.Tensor]:
        original = getattr(part, method)

        def choose(*inputs: Any) -> torch.Tensor:
            choice: torch.Tensor = original(*inputs) if fixed is None else torch.from_numpy(fixed[len(chosen)])
            chosen.append(choice.numpy())
            return choice

        return choose

    try:
        for part in parts:
            setattr(part, method, instead(part))
        yield chosen
    finally:
        for part in parts:
            part.__dict__.pop(method, None)
