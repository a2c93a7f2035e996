"""Helpers for checks in Triton's interpreter: programs in random order, tensors with guards around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from sparsifiner_edge.ops.triton.run import launch
from sparsifiner_edge.ops.triton.schedule import Schedule

GUARD = 512


def shuffled(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], np.ndarray]:
    """Run the programs of each launch in random order from now on; return the orders by grid."""
    place = interpreter.InterpreterBuilder.set_grid_idx
    orders: dict[tuple[int, ...], np.ndarray] = {}

    def elsewhere(self: Any, x: int, y: int, z: int) -> None:
        """Run another program of the same launch."""
        grid = tuple(self.grid_dim)
        if (x, y, z) == (0, 0, 0):
            orders[grid] = np.random.default_rng(len(orders)).permutation(int(np.prod(grid)))
        number = orders[grid][np.ravel_multi_index((x, y, z), grid)]
        place(self, *map(int, np.unravel_index(number, grid)))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", elsewhere)
    return orders


def launched(schedule: Schedule, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a schedule with each buffer inside a larger one of NaN (or a large number), which must not change."""
    inside, guards = {}, []
    for name, buffer in schedule.buffers.items():
        dtype = getattr(torch, buffer.dtype)
        poison = torch.nan if dtype.is_floating_point else 0x55
        size = int(np.prod(buffer.shape))
        whole = torch.full((size + 2 * GUARD,), poison, dtype=dtype)
        inside[name] = whole[GUARD:-GUARD].view(buffer.shape)
        if name in given:
            inside[name].copy_(given[name])
        guards += [whole[:GUARD], whole[-GUARD:]]
    done = launch(schedule, inside)
    assert all(bool((g.isnan() if g.is_floating_point() else g == 0x55).all()) for g in guards)
    return done
