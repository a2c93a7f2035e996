"""State that a stream keeps between frames, and its motion with the view of a camera.

Shapes are as in `stream_files`.
"""

from __future__ import annotations

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.runtime.stream_files import (
    CACHE,
    COUNTS,
    FINAL,
    NEW,
    PLACES,
    ROWS,
    SHIFT,
    TOKENS,
    UNCHANGED,
    Infer,
    Mask,
    Places,
    StreamShape,
)


class StreamState:
    """State of one stream. Before the first frame it is zero.

    Attributes:
        shape: Sizes of the state.
        caches: Keys and values of each layer, [1,N,2A], and outputs of the layers that are read, [1,N,C], by the names
            in `StreamShape.caches`. Keys and values stay where they are when the view moves; see `move`.
        final: Tokens after the final norm, [1,N,C].
        references: Tokens with which the patches were last recomputed, [1,P,C]; 0 for a patch without one.
        ages: Number of frames since each patch was last recomputed, int64 [P].
    """

    def __init__(self, shape: StreamShape) -> None:
        self.shape = shape
        kinds = {name: np.float16 if shape.halves and name.startswith(CACHE) else np.float32 for name in shape.caches}
        self.caches = {name: np.zeros((1, shape.tokens, n), kinds[name]) for name, n in shape.caches.items()}
        # A full frame reads no stored keys. Files need at least one, so it gets one that counts as 0.
        self._empty = {
            name: np.zeros_like(x[:, : 1 if name.startswith(CACHE) else None]) for name, x in self.caches.items()
        }
        self.final = np.zeros((1, shape.tokens, shape.width), np.float32)
        self.references = np.zeros((1, shape.patches, shape.width), np.float32)
        self.ages = np.zeros(shape.patches, np.int64)
        # Row of each token in the caches of keys and values, whether it has one, and how far the view has moved.
        self._slots, self._known = np.arange(shape.tokens), np.ones(shape.tokens, np.bool_)
        self._shift = np.zeros(2, np.float32)

    def step(
        self, infer: Infer, image: Array, tokens: Array, patches: Places | None, changed: Mask | None = None
    ) -> dict[str, Array]:
        """Run the step on the prefix and some patches, and update the state.

        Args:
            infer: Runs the step file. It receives all inputs and selects those that the file takes.
            image: Frame, uint8 [1,H,W,3].
            tokens: Tokens of the frame, [1,N,C].
            patches: Ascending indices of the patches to compute. None computes all and ignores the state (full frame).
            changed: True for each of these patches that changed. The results of the others determine how tokens that
                are not computed move. None counts all as changed.

        Returns:
            The model's outputs for the whole frame, by name.
        """
        shape, full = self.shape, patches is None
        chosen = np.arange(shape.patches) if patches is None else patches
        rows = np.concatenate([np.arange(shape.prefix), shape.prefix + chosen])
        counts, places = np.ones((1, shape.tokens), np.float32), np.arange(shape.tokens)
        counts[:, self._slots[~self._known | full]] = 0
        counts[:, self._slots[rows]], places[rows] = 0, shape.tokens + np.arange(len(rows))
        unchanged = np.zeros((1, len(rows)), np.float32)
        if changed is not None:
            unchanged[:, shape.prefix :] = ~changed
        if full:
            self._shift[:] = 0
        inputs = {
            "image": image,
            TOKENS: tokens[:, rows],
            ROWS: rows,
            COUNTS: counts[:, : 1 if full else None],
            PLACES: places,
            UNCHANGED: unchanged,
            SHIFT: self._shift,
        }
        outputs = infer(inputs | (self._empty if full else self.caches))
        for name, value in self.caches.items():
            new = outputs.pop(NEW + name)
            if name.startswith(CACHE):
                value[:, self._slots[rows]] = new[..., shape.attended :]  # Without the queries.
            else:
                value[:] = new
        self.final = outputs.pop(FINAL)
        self.references[:, chosen] = tokens[:, rows[shape.prefix :]]
        self.ages[chosen], self._known[rows] = 0, True
        return outputs

    def move(self, down: int, right: int, positions: Array) -> tuple[Places, Mask]:
        """Move everything that is kept with the view, which moved by whole patches.

        Keys and values stay in place, because their order does not matter. A patch that comes into view has no key, and
        the final token of its neighbour, until it is computed.

        Args:
            down: Rows by which the view moved down.
            right: Columns by which it moved to the right.
            positions: What a token takes from its position; see `StreamSessions.positions`.

        Returns:
            The patch whose content each patch now shows, a permutation [P], and whether that was in view before, [P].
        """
        (rows, columns), prefix = self.shape.grid, self.shape.prefix
        row, column = np.arange(rows) + down, np.arange(columns) + right
        source = ((row % rows)[:, None] * columns + column % columns).reshape(-1)
        near = (row.clip(0, rows - 1)[:, None] * columns + column.clip(0, columns - 1)).reshape(-1)
        known = source == near
        self._slots[prefix:] = self._slots[prefix:][source]
        self._known[prefix:] = self._known[prefix:][source] & known
        self._shift += down, right
        for name, value in self.caches.items():
            if not name.startswith(CACHE):
                value[0, prefix:] = value[0, prefix + near]
        self.final = np.concatenate([self.final[:, :prefix], self.final[:, prefix + near]], 1)
        self.references = moved_tokens(self.references, source, positions)
        self.references[0, ~known] = 0
        self.ages = np.where(known, self.ages[source], self.ages.max() + 1)
        return source, known


def moved_tokens(tokens: Array, source: Places, positions: Array) -> Array:
    """Return tokens [1,P,C] of the first layer as they are at the patches to which their content moved."""
    moved: Array = tokens[:, source] + (positions - positions[source])
    return moved
