"""Where a model's layers looked, frame by frame: `run --overlay-reads`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.order import hilbert_order, inverse
from sparsifiner_edge.runtime.watched import MATCHES, WATCHED


class Read(NamedTuple):
    """What was read of one image.

    Attributes:
        shares: of each patch, the share of tiles and heads that list its token, mean of the layers with lists
            [rows, columns]. keys: mean share of the tokens that a list names. tokens: on entry of the first and of the
            last such layer.
    """

    shares: Array
    keys: float
    tokens: tuple[int, int]

    @property
    def line(self) -> str:
        """For people."""
        first, last = self.tokens
        return f"reads {self.keys:.0%} of its tokens   {first}" + (f" > {last} tokens" if last < first else " tokens")


class Reads:
    """Reads the outputs of `runtime.watched`.

    Raises:
        ConfigError: the bundle's model is dense, or prunes tokens: what is gone is read by none.
    """

    def __init__(self, bundle: Bundle) -> None:
        made, tokens = bundle.manifest.sparsity, bundle.manifest.tokens
        if made is None or tokens is None or tokens.grid is None:
            raise ConfigError(f"{bundle.folder} does not say which tokens it reads.", "Leave --overlay-reads out.")
        if made.token_keep:
            raise ConfigError(f"{bundle.folder} prunes tokens.", "Leave --overlay-reads out.")
        self.grid = tokens.grid
        patches = math.prod(tokens.grid)
        self._places = np.arange(patches) if made.preset == "paper" else inverse(hilbert_order(*tokens.grid))

    def taken_from(self, outputs: dict[str, Array]) -> tuple[Read, dict[str, Array]]:
        """What outputs of one image say of it, and those that are the model's own."""
        places, shares, keys, counts = self._places, np.zeros(len(self._places)), list[float](), list[int]()
        for name, values in outputs.items():
            kind = name.split(".")[1] if name.startswith(f"{WATCHED}.") else ""
            count = int(places.max()) + 1
            if kind == MATCHES:
                places = _after(values[0], places, count)
            elif kind:
                lists = values[0].reshape(-1, values.shape[-1]) - (kind == "LandmarkKeySelect")  # From 0: class token.
                named = lists[lists >= 0]
                shares = shares + (np.bincount(named, minlength=count) / len(lists))[places]
                keys.append(len(named) / len(lists) / count)
                counts.append(count)
        found = Read((shares / len(counts)).reshape(self.grid), sum(keys) / len(keys), (counts[0], counts[-1]))
        return found, {name: values for name, values in outputs.items() if not name.startswith(f"{WATCHED}.")}


def _after(pairs: Array, places: Array, count: int) -> Array:
    """Where patches are once tokens became one by pairs [N,2], the first of them not patches; see MatchTokens."""
    merged = pairs[:, 0] != pairs[:, 1]
    total = len(pairs) + int(merged.sum())
    patches = pairs[total - count :] - (total - count)
    new = np.zeros(count, np.int64)
    new[patches[:, 0]] = new[patches[:, 1]] = np.arange(len(patches))
    return new[places]
