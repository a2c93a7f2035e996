"""Change of patches between frames.

The change of a patch is the distance between two of its tokens, relative to their length. Which change means something
depends on the camera, the light and the place: in the dark or in fog a completely different scene changes a token by
less than the noise of a bright one. So each patch has an estimate of its own noise, from the change between consecutive
frames. The change since the last full frame counts if it exceeds this noise clearly, so that the change of a still
scene is exactly 0.
"""

from __future__ import annotations

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.runtime.stream_files import Mask, Places
from sparsifiner_edge.runtime.stream_state import moved_tokens

MEDIANS = 3.0
"""Change since its last recomputation above which a patch counts as changed, in multiples of the median over the frame.

Noise, compression and exposure change all patches alike.
"""
LEAST = 0.1
"""Smallest change that counts, so that rounding and compression of a picture without noise do not."""
CHANGED = 0.5
"""Change above which a patch counts as changed, whatever the median."""
SIGNIFICANT = 1.75
"""Smallest change that noise does not explain, in multiples of its mean. In a still scene no patch reaches it."""
EMPTY = 3.0
"""Standard deviation of the brightness in a patch, of 255, below which the patch is empty: a wall, a sky, fog.

Squares of four pixels are averaged before, so that the noise of a camera in the dark hardly counts.
"""
_FIRST = 0.1
"""Highest noise after the first two frames, between which something may have moved."""
_RISE = 0.05
"""Weight of a new value above the estimate of the noise; the first values have the same weight each."""
_FALL = 0.3
"""Weight of a new value below it. It is higher, because motion only adds to the noise."""


class ChangeMeter:
    """Measures change.

    Args:
        grid: Rows and columns of patches.

    Attributes:
        noise: Estimated change of each patch between two frames of a still scene, [P].
        moved: Change since the last full frame that noise does not explain, at most 1 for each patch, as a mean over
            the patches.
        empty: Fraction of the patches that were empty in the last full frame.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self._grid, self._patches = grid, grid[0] * grid[1]
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        self.noise, self.moved = np.full(self._patches, np.nan, np.float32), 0.0
        self.empty = 0.0
        self._before: Array | None = None
        self._anchor: Array | None = None
        self._seen = 0

    def measure(self, tokens: Array, change: Array) -> Mask:
        """Return which patches changed since they were last recomputed, [P], and update the attributes.

        Args:
            tokens: Tokens of the frame's patches, [1,P,C].
            change: Change of each patch since it was last recomputed, [P].
        """
        length = np.maximum(np.sqrt(np.einsum("bpc,bpc->p", tokens, tokens)), 1e-6)
        if self._before is not None:
            self._follow(_distance(tokens, self._before) / length)
        if self._anchor is not None and not np.isnan(self.noise[0]):
            since = np.nan_to_num(_distance(tokens, self._anchor) / length, nan=1.0, posinf=1.0)
            excess = np.sqrt((since**2 - self.noise**2).clip(0, 1))
            self.moved = float(np.where(since > SIGNIFICANT * self.noise, excess, 0).mean())
        self._before = tokens
        return np.asarray(change > np.clip(MEDIANS * np.median(change), LEAST, CHANGED))

    def skip(self) -> None:
        """Forget the last frame, because the next one does not follow it directly."""
        self._before = None

    def keep(self, image: Array) -> None:
        """Compare later frames with this one, uint8 [1,H,W,3]: it was computed in full."""
        self.empty = float((_contrast(image[0], self._grid) < EMPTY).mean())
        self._anchor, self.moved = self._before, 0.0

    def move(self, source: Places, known: Mask, positions: Array) -> None:
        """Move with the view; see `StreamState.move`."""
        if self._before is None:
            return
        if not np.isnan(self.noise[0]):
            self.noise = np.where(known, self.noise[source], np.median(self.noise))
        self._before = moved_tokens(self._before, source, positions)
        if self._anchor is not None:
            self._anchor = moved_tokens(self._anchor, source, positions)
            self._anchor[0, ~known] = 0

    def _follow(self, change: Array) -> None:
        """Update the noise with the change between two consecutive frames, [P]."""
        change = np.nan_to_num(change, nan=1.0, posinf=1.0)
        if not change.any():  # The camera repeats a frame, which tells nothing about its noise.
            return
        if np.isnan(self.noise[0]):
            self.noise, self._seen = np.minimum(change, _FIRST), 1
            return
        self._seen += 1
        step = change - self.noise
        self.noise += np.where(step > 0, max(_RISE, 1 / self._seen), _FALL) * step


def _contrast(image: Array, grid: tuple[int, int]) -> Array:
    """Return the standard deviation of the brightness of each patch without noise, uint8 [H,W,3] -> [P].

    Pixels beyond the last whole patch are left out, as some models do.
    """
    (rows, columns), (height, width) = grid, (image.shape[0] // grid[0], image.shape[1] // grid[1])
    brightness = image[: rows * height, : columns * width].mean(-1, dtype=np.float32)
    patches = brightness.reshape(rows, height, columns, width)[:, : height // 2 * 2, :, : width // 2 * 2]
    squares = patches.reshape(rows, height // 2, 2, columns, width // 2, 2).mean((2, 5))
    return np.asarray(squares.std((1, 3)).reshape(-1))


def _distance(a: Array, b: Array) -> Array:
    """Return the distance of each pair of tokens, [1,P,C] x [1,P,C] -> [P]."""
    difference = a - b
    return np.asarray(np.sqrt(np.einsum("bpc,bpc->p", difference, difference)))
