"""The kernels under torch: launches of a schedule. Importing this needs torch and Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sparsifiner_edge.ops.operator import Attributes, Shapes
from sparsifiner_edge.ops.triton.compile import OPTIONS, kernel
from sparsifiner_edge.ops.triton.schedule import Schedule, fit

INTERPRETED = 80
"""Compute capability that Triton's interpreter, on CPU tensors, plays."""


def capability(device: torch.device) -> int:
    """Compute capability times ten, such as 87."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(schedule: Schedule, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a schedule.

    Args:
        inputs: its input buffers; they must be contiguous.

    Returns:
        Inputs, outputs and scratch by name.
    """
    like = next(iter(inputs.values()))
    tensors = dict(inputs)
    for name, buffer in schedule.buffers.items():
        if name not in tensors:
            tensors[name] = torch.empty(buffer.shape, dtype=getattr(torch, buffer.dtype), device=like.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(like):
        for step in (fit(each, capability(like.device)) for each in schedule.launches):
            arguments = {name: None if buffer is None else tensors[buffer] for name, buffer in step.arguments.items()}
            kernel(step.kernel)[step.grid](
                **arguments, **step.constants, num_warps=step.warps, num_stages=step.stages, **OPTIONS
            )
    return tensors


@functools.lru_cache(maxsize=256)
def _make(make: Callable[..., Schedule], shapes: Shapes, items: tuple[tuple[str, float], ...], dtype: str) -> Schedule:
    return make(shapes, dict(items), dtype)


def run(make: Callable[..., Schedule], attributes: Attributes, **inputs: Tensor | None) -> dict[str, Tensor]:
    """Make the schedule for inputs and launch it, without gradient. The same sizes come again at every layer and step.

    Args:
        make: `schedule_layer`, `schedule_match` or `schedule_merge`. attributes: as it takes them.
        inputs: in the schema's order; the first has the element type, further floats become float32, None is left out.

    Returns:
        See `launch`.
    """
    tensors: dict[str, Tensor] = _run(make, attributes, {name: x for name, x in inputs.items() if x is not None})
    return tensors


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _run(make: Callable[..., Schedule], attributes: Attributes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    first, *others = (x.contiguous() for x in inputs.values())
    tensors = [first, *(x.float() if x.is_floating_point() else x.int() for x in others)]
    element = str(first.dtype).removeprefix("torch.")
    schedule = _make(make, tuple(x.shape for x in tensors), tuple(attributes.items()), element)
    return launch(schedule, dict(zip(inputs, tensors, strict=True)))
