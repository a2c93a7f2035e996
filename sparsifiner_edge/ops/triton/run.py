"""Execution of schedules in PyTorch. Importing this module requires torch and Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sparsifiner_edge.ops.operator import Attributes, Shapes
from sparsifiner_edge.ops.triton.compile import OPTIONS, kernel
from sparsifiner_edge.ops.triton.schedule import Schedule, fit

INTERPRETED = 80
"""Compute capability (times ten) that stands for Triton's interpreter on CPU tensors."""


def capability(device: torch.device) -> int:
    """Return the compute capability of a device times ten, such as 87."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(schedule: Schedule, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a schedule.

    Args:
        schedule: Schedule to run.
        inputs: Contiguous tensors of its input buffers, by name.

    Returns:
        Tensors of all buffers (inputs, outputs and scratch), by name.
    """
    like = next(iter(inputs.values()))
    tensors = dict(inputs)
    for name, buffer in schedule.buffers.items():
        if name not in tensors:
            tensors[name] = torch.empty(buffer.shape, dtype=getattr(torch, buffer.dtype), device=like.device)
    # Triton launches on the current device, which may differ from the device of the tensors.
    with torch.cuda.device_of(like):
        for step in (fit(each, capability(like.device)) for each in schedule.launches):
            arguments = {name: None if buffer is None else tensors[buffer] for name, buffer in step.arguments.items()}
            kernel(step.kernel)[step.grid](
                **arguments, **step.constants, num_warps=step.warps, num_stages=step.stages, **OPTIONS
            )
    return tensors


@functools.lru_cache(maxsize=256)
def _make(make: Callable[..., Schedule], shapes: Shapes, items: tuple[tuple[str, float], ...], dtype: str) -> Schedule:
    """Make a schedule; cached, because every layer and step repeats the same sizes."""
    return make(shapes, dict(items), dtype)


def run(make: Callable[..., Schedule], attributes: Attributes, **inputs: Tensor | None) -> dict[str, Tensor]:
    """Make the schedule for the inputs and launch it, without gradient.

    Args:
        make: `schedule_layer`, `schedule_match` or `schedule_merge`.
        attributes: Attributes for `make`.
        **inputs: Inputs in the order of the schema. The first one determines the element type. Other floating-point
            inputs are converted to float32 and integers to int32. None is left out.

    Returns:
        Tensors of all buffers by name; see `launch`.
    """
    tensors: dict[str, Tensor] = _run(make, attributes, {name: x for name, x in inputs.items() if x is not None})
    return tensors


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _run(make: Callable[..., Schedule], attributes: Attributes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the inputs, and make and launch the schedule, outside of torch.compile and autograd."""
    first, *others = (x.contiguous() for x in inputs.values())
    tensors = [first, *(x.float() if x.is_floating_point() else x.int() for x in others)]
    element = str(first.dtype).removeprefix("torch.")
    schedule = _make(make, tuple(x.shape for x in tensors), tuple(attributes.items()), element)
    return launch(schedule, dict(zip(inputs, tensors, strict=True)))
