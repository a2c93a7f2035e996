"""Estimate of a stream's error without the dense model.

The error of a frame is 1 minus the mean cosine between its final patch tokens and those of the dense model. It has
three parts::

    scale * drift of unchanged patches * wait + missed * drift of changed patches + rate * moved

- The drift is a running mean of 1 minus the cosine between a patch's final token before and after its recomputation,
  kept separately for unchanged and changed patches.
- `wait` is the number of frames that a patch waits for its recomputation: the inverse of the share, but at most the
  number of updates since the last full frame.
- `missed` is the fraction of patches that changed and were not recomputed.
- `moved` is the fraction of patches that changed since the last full frame.

A full frame that follows an update in the same frame measures the error of that update, and corrects `scale` and
`rate`. After the first frame `rate` is high, so that the first events in a scene cause full frames, which show how much
an event changes there. If they show little, `rate` falls, but no further than what allows `TRUSTED` times as much
change, because the effect of an event can start suddenly.
"""

from __future__ import annotations

import numpy as np

from sparsifiner_edge.arrays import Array

_FORGET = 0.7
"""Weight of the previous value in the running mean of the drift after each step; the new value has the rest."""
SCALE = 0.25
"""Initial scale of the drift of unchanged patches."""
_SCALES = (0.02, 4.0)
"""Lower and upper bound of the scale, which keep the estimate plausible after unusual frames."""
_TIMES = (0.5, 2.0)
"""Lower and upper bound of the factor by which one full frame may adjust the scale."""
_DAMPING = 0.5
"""Exponent that damps this factor, because single frames vary. It is 1 if the error was higher than allowed."""
_TOO_LITTLE = 1e-4
"""Error below which the scale is not adjusted, because the ratio of such errors is meaningless."""
RATE = 4.0
"""Initial error per fraction of the patches that changed since the last full frame."""
MOST_RATE = 20.0
"""Upper bound of the rate."""
LEAST_RATE = 0.02
"""Lower bound of the rate."""
SAFETY = 1.5
"""Factor by which the rate exceeds the measured one."""
TRUSTED = 2.0
"""Change that is allowed without a full frame, as a multiple of the change at which the last one found little error.

It is also the most by which one full frame may lower the rate. In a scene where events were missed before, its root is
taken: the second after one miss, the third after two.
"""
FORGIVE = 0.95
"""Factor of the number of misses after each full frame that finds little error."""
FEW = 0.005
"""Fraction of moved patches below which they cannot explain a measured error, so that the scale is corrected."""


class ErrorEstimate:
    """Estimate of the error, with what was learned from the frames of a scene.

    Args:
        allowed: Error that a frame may have.
    """

    def __init__(self, allowed: float) -> None:
        self._allowed = allowed
        self.reset()

    def reset(self) -> None:
        """Forget everything, as before the first frame of a scene."""
        self._rate, self._misses = RATE, 0.0
        self.restart()

    def restart(self) -> None:
        """Forget what holds for one scene only; what events changed in earlier ones stays known."""
        # Drift of unchanged and of changed patches (0.5: a cautious guess).
        self._drift, self._scale, self._rate = [0.0, 0.5], SCALE, max(self._rate, RATE)

    def usual(self, wait: float, missed: float) -> float:
        """Return the error without that of events.

        Args:
            wait: Frames that a patch waits for its recomputation.
            missed: Fraction of the patches that changed and are not computed.
        """
        unchanged, changed = self._drift
        return self._scale * unchanged * wait + missed * changed

    def event(self, moved: float) -> float:
        """Return the error of events if this fraction of the patches changed since the last full frame."""
        return self._rate * moved

    def follow(self, unchanged: Array, changed: Array) -> None:
        """Update the drift with the errors of tokens before their recomputation."""
        for kind, values in enumerate((unchanged, changed)):
            if values.size:
                self._drift[kind] += (1 - _FORGET) * (float(values.mean()) - self._drift[kind])

    def correct(self, measured: float, usual: float, moved: float) -> None:
        """Correct the estimate of an update by its measured error.

        Args:
            measured: Measured error.
            usual: What `usual` gave.
            moved: Fraction of the patches that changed since the previous full frame.
        """
        if moved >= FEW:
            rate = SAFETY * max(0.0, measured - usual) / moved
            self._misses = self._misses + 1 if measured > self._allowed else FORGIVE * self._misses
            trusted = TRUSTED ** (1 / (1 + self._misses))
            least = max(self._rate / trusted, min(self._rate, self._allowed / (trusted * moved)))
            self._rate = float(np.clip(max(rate, least), LEAST_RATE, MOST_RATE))
        if max(measured, usual) > _TOO_LITTLE and (moved < FEW or measured < usual):
            factor = float(np.clip(measured / max(usual, _TOO_LITTLE), *_TIMES)) ** (
                1.0 if measured > self._allowed else _DAMPING
            )
            self._scale = float(np.clip(self._scale * factor, *_SCALES))
