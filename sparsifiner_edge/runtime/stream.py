"""Streaming inference on a camera: each frame recomputes only the patches that changed.

Tokens are also reused over time by Eventful Transformers (Dutson et al., ICCV 2023). `Stream.infer` processes a frame
as follows:

1. **Move.** If the view of the camera moved by whole patches, everything that is kept moves with it
   (`StreamState.move`).
2. **Embedding.** Compute the tokens that enter the first layer.
3. **Change per patch.** A patch counts as changed if its token differs from the one with which it was last recomputed,
   by more than the noise of that patch (`ChangeMeter`).
4. **Incremental update.** If few patches changed, run the step on the prefix tokens and a share of the patches: those
   that changed most or waited longest, a quarter of them the oldest. Unchanged patches still drift with the global
   context, and similar patches drift in the same direction. The step therefore moves each token that it does not
   compute like the similar tokens that it does compute and whose patches did not change (`sparse.stream.carry`). The
   share is the smallest one in `SHARES` whose estimated error (`ErrorEstimate`) is low enough. If the error after the
   step is too high, a second step follows in the same frame.
5. **Full frame.** Run the step on all patches. This happens in the first frame; if something changed in front of an
   empty background (`MOSTLY_EMPTY`); if the error of incremental updates may be higher than allowed; when a moving
   scene has come to rest; and as a check of the estimate after 8, 32, 128 and then every 256 incremental updates.
6. **Fallback to the full model.** If too many patches changed (`MOVING`), as at a cut, or if full frames in a row find
   too high an error, the bundle's own sparse model answers and nothing is kept. A full frame follows once `STILL`
   frames in a row hardly differ from their predecessors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.config import require
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.runtime.change import ChangeMeter
from sparsifiner_edge.runtime.error_estimate import ErrorEstimate
from sparsifiner_edge.runtime.stream_files import Mask, Places
from sparsifiner_edge.runtime.stream_state import StreamState

if TYPE_CHECKING:
    from sparsifiner_edge.runtime.session import Runtime, Session
    from sparsifiner_edge.runtime.stream_files import StreamSessions

AT_LEAST = 0.98
"""Default of `at_least`: the mean cosine of a frame's patches to those of the dense model that a stream keeps."""
MARGIN = 0.7
"""Planned error of a frame as a fraction of the allowed error, 1 - `at_least`.

The plan holds on average only: about one frame in twenty has twice the planned error.
"""
SHARES = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8)
"""Shares of the patches that a step can compute, ascending. There are few, because a backend prepares for each size."""
MOVING = 0.25
"""Fraction of changed patches above which the scene moves or was replaced, so that the full model answers.

The largest step can compute about that many: three quarters of 3/8 of the patches, besides the oldest ones.
"""
REST = 0.1
"""Fraction of patches changed since the last frame up to which a moving scene counts as calm.

It is lower than `MOVING`, so that the stream does not switch back and forth.
"""
STILL = 2
"""Number of consecutive calm frames before tokens are kept again, so that a short pause of the motion is not enough."""
PAUSE = 4
"""Number of frames that the full model answers without a look at the change, after one that moved as well."""
HOPELESS = 2
"""Number of full frames in a row that find a higher error than allowed, after which the scene counts as moving."""
FIRST_CHECK = 8
"""Number of incremental updates before the first check of the estimated error by a full frame.

If a check finds a higher error than allowed, the next one follows after this number again. Otherwise the number of
updates between two checks grows by a factor of 4 each time.
"""
LAST_CHECK = 256
"""Maximum number of incremental updates between two checks, so that an error cannot grow unnoticed."""
_OLDEST = 4
"""One in this many patches of a step is the oldest one, whether it changed or not.

The unchanged patches among them show how far the others have drifted, because the drift follows the global context.
"""
_CHANGE_FLOOR = 1e-3
"""Constant added to the change of each patch, so that patches without any change are chosen by their age."""
SUMMARY_RATE = 0.4
"""Error per drift of the final prefix tokens since the last full frame.

Each step computes the prefix tokens. They summarise the image, so they drift when the scene changes as a whole while
its patches keep each other in the old state, for instance because something left an empty scene.
"""
MOSTLY_EMPTY = 0.5
"""Fraction of empty patches above which each event causes full frames.

Tokens of an empty background (a wall, a sky, fog) take their meaning from the whole image. They keep each other in the
old state when something enters, so that those computed anew do not tell, and a few changed patches can change all.
"""
EMPTY_RATE = 100.0
"""Error per fraction of the patches that changed in such a scene: one in 5,000 exceeds an allowed error of .02."""
_STEPS = 2
"""Maximum number of steps in a frame. If the error is still too high, a full frame is computed instead."""


class Computed(msgspec.Struct, frozen=True):
    """Computation that a stream did for a frame.

    Attributes:
        by: Kind of the computation: "incremental" (some patches), "full" (all patches, which are kept for later frames)
            or "fallback" (the full model answered, because too many patches changed).
        share: Fraction of the patches that were computed; 1 for a full frame or a fallback.
        oldest: Largest number of frames since a patch was last recomputed.
        error: Estimated error, with a margin: 1 minus the mean cosine of the frame's patches to those of the dense
            model. 0 for a full frame; None for a fallback.
    """

    by: str
    share: float
    oldest: int
    error: float | None = None


class Stream:
    """A stream of consecutive frames; see `Session.stream`, which creates it, and this module for the algorithm.

    Args:
        model: Session on the bundle's own model, for the fallback.
        sessions: Sessions on the files of the stream.
        at_least: Fidelity to keep; None selects `AT_LEAST`.
        share: Fraction of the patches to recompute in every frame instead; None lets the estimated error decide.

    Attributes:
        computed: Computation done for the last frame; None before the first frame.

    Raises:
        ConfigError: A value is out of range, or both are given.
    """

    def __init__(
        self, model: Session, sessions: StreamSessions, at_least: float | None = None, share: float | None = None
    ) -> None:
        require(None in (at_least, share), f"at_least is {at_least} and share is {share}.", "Give only one of them.")
        at_least = AT_LEAST if at_least is None else at_least
        require(0 < at_least < 1, f"at_least is {at_least}.", "Give a fidelity between 0 and 1.")
        require(share is None or 0 < share <= 1, f"share is {share}.", "Give more than 0, and at most 1.")
        self._model, self._sessions, self._state = model, sessions, StreamState(sessions.shape)
        # Error that a frame may have. With a fixed share there is no limit.
        self._allowed = math.inf if share is not None else 1 - at_least
        self._share = share
        self._change, self._estimate = ChangeMeter(sessions.shape.grid), ErrorEstimate(self._allowed)
        self._positions: Array | None = None
        self._summary = np.zeros(0, np.float32)  # Final prefix tokens of the last full frame.
        # Validity of the state, calm frames in a row, frames without a look at the change, updates since the last full
        # frame, updates before a check, and full frames in a row that found too high an error.
        self._cached, self._calm, self._pause, self._steps, self._check, self._failures = False, 0, 0, 0, 0, 0
        self.computed: Computed | None = None
        self.reset()

    @property
    def fresh(self) -> Mask:
        """Mask of the patches that were computed in the last frame, bool [rows,columns]."""
        return np.asarray(self._state.ages == 0).reshape(self.grid)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self._sessions.shape.grid

    @property
    def description(self) -> Runtime:
        """Software and hardware that run the steps."""
        return self._sessions.step.description

    @property
    def final(self) -> Array:
        """Tokens after the final norm, [1,N,C], of the last frame that was not a fallback."""
        return self._state.final

    def dense(self) -> Callable[[Array], dict[str, Array]]:
        """Return a function that runs the dense model on images independently of this stream.

        It maps an image, uint8 [1,H,W,3], to the model's outputs and "tokens", the tokens after the final norm [1,N,C].
        """
        sessions, state = self._sessions, StreamState(self._sessions.shape)

        def infer(image: Array) -> dict[str, Array]:
            outputs = state.step(sessions.run, image, sessions.embed(image, state.references)[0], None)
            return {"tokens": state.final, **outputs}

        return infer

    def reset(self) -> None:
        """Forget all frames, as if the next one were the first."""
        self._change.reset()
        self._estimate.reset()
        self._release()
        self._calm = STILL

    def infer(self, inputs: Mapping[str, Array], moved: tuple[int, int] | None = (0, 0)) -> dict[str, Array]:
        """Return the model's outputs for the next frame. Inputs and outputs are those of `Session.infer`.

        Args:
            inputs: Arrays by input name.
            moved: Patches by which the view moved down and to the right since the last frame: what was in row r and
                column c is now in row r - moved[0] and column c - moved[1]. None if the view is a new one, which leads
                to a full frame. See `camera.align`, which estimates it.

        Returns:
            Outputs by name.

        Raises:
            BackendError: The inputs are invalid, or the backend fails. After a failure the next frame is a full frame.
        """
        self._model.validate(inputs)
        try:
            outputs, self.computed = self._infer(inputs["image"], moved)
        except BaseException:
            self.reset()
            raise
        return outputs

    def _infer(self, image: Array, moved: tuple[int, int] | None) -> tuple[dict[str, Array], Computed]:
        """Process a frame: choose between an incremental update, a full frame and the fallback."""
        state = self._state
        if moved is None:
            self._change.skip()
        elif moved != (0, 0):
            if self._positions is None:
                self._positions = self._sessions.positions()
            self._change.move(*state.move(*moved, self._positions), self._positions)
        if self._pause:
            self._pause -= 1
            return self._model.infer({"image": image}), Computed("fallback", 1.0, 0)
        tokens, change = self._sessions.embed(image, state.references)
        change, state.ages = np.nan_to_num(change, nan=1.0, posinf=1.0), state.ages + 1
        changed = self._change.measure(tokens[:, state.shape.prefix :], change)
        if (not self._cached and self._calm == STILL) or (self._cached and moved is None):
            return self._full_frame(image, tokens)
        if self._cached and changed.mean() > MOVING:
            self._release()
        elif not self._cached and changed.mean() <= REST:
            self._calm += 1
        elif not self._cached:
            self._calm, self._pause = 0, PAUSE
            self._change.skip()
        if self._cached:
            return self._update(image, tokens, change, changed)
        if self._calm == STILL:
            return self._full_frame(image, tokens)
        # With these references, the next frame measures its change from this one.
        state.references[:], state.ages[:] = tokens[:, state.shape.prefix :], 0
        return self._model.infer({"image": image}), Computed("fallback", 1.0, 0)

    def _release(self) -> None:
        """Keep nothing: the next frames are a fallback until the scene is calm."""
        self._cached, self._calm, self._pause, self._steps, self._check, self._failures = False, 0, 0, 0, FIRST_CHECK, 0
        self._estimate.restart()

    def _choose(self, change: Array, share: float) -> Places:
        """Return the ascending indices of the patches to compute in a step.

        These are the oldest patches (one in `_OLDEST`), then those that changed most or waited longest, without the
        patches that were already computed in this frame.
        """
        ages, count = self._state.ages, max(1, round(share * len(change)))
        score = (change + _CHANGE_FLOOR) * np.sqrt(ages + 1)
        score[np.argsort(-ages, kind="stable")[: max(count // _OLDEST, count > 1)]] = np.inf
        score[ages == 0] = -1.0
        return np.sort(np.argsort(-score, kind="stable")[:count])

    def _usual(self, share: float, missed: float) -> float:
        """Return the estimated error without that of events if a share is computed in each frame."""
        return self._estimate.usual(min(self._steps + 1, 1 / share), missed)

    def _least_share(self, changed: float) -> float:
        """Return the smallest share whose estimated error is within the plan, or the largest share if there is none.

        Args:
            changed: Fraction of the patches that changed.
        """
        available = 1 - 1 / _OLDEST  # The part of a step that is left for patches that changed.
        fits = (
            share
            for share in SHARES
            if self._usual(share, max(0.0, changed - available * share)) <= MARGIN * self._allowed
        )
        return next(fits, SHARES[-1])

    def _summary_drift(self) -> float:
        """Return the drift of the final prefix tokens since the last full frame; 0 for a model without such tokens."""
        prefix = self._state.shape.prefix
        return float((1 - cosine(self._state.final[0, :prefix], self._summary)).mean()) if prefix else 0.0

    def _update(self, image: Array, tokens: Array, change: Array, changed: Mask) -> tuple[dict[str, Array], Computed]:
        """Compute an incremental update, or a full frame if its error may be higher than allowed or a check is due.

        Args:
            image: Frame, uint8 [1,H,W,3].
            tokens: Tokens of the frame, [1,N,C].
            change: Change of each patch, [P]; modified in place.
            changed: True for each patch that changed, [P]; modified in place.
        """
        state, total, usual = self._state, 0.0, 0.0
        if self._change.empty > MOSTLY_EMPTY and EMPTY_RATE * self._change.moved > self._allowed:
            return self._full_frame(image, tokens)
        event = self._estimate.event(self._change.moved)
        for _ in range(_STEPS):
            share = self._share or self._least_share(float(changed.mean()))
            chosen = self._choose(change, share)
            rows, moved = state.shape.prefix + chosen, changed[chosen]
            before = state.final[0, rows]
            outputs = state.step(self._sessions.run, image, tokens, chosen, moved)
            total += len(chosen) / len(change)
            change[chosen], changed[chosen] = 0.0, False
            drift = (1 - cosine(before, state.final[0, rows])).clip(0)
            if not np.isfinite(drift).all():  # Values that are not finite would spread to all later frames.
                return self._full_frame(image, tokens)
            self._estimate.follow(drift[~moved], drift[moved])
            usual = self._usual(total, float(changed.mean()))
            event = max(event, SUMMARY_RATE * self._summary_drift())
            if usual + event <= self._allowed or event > self._allowed or share == SHARES[-1]:
                break
        error = min(1.0, usual + event)
        if error <= self._allowed and (self._steps + 1 < self._check or math.isinf(self._allowed)):
            self._steps, self._failures = self._steps + 1, 0
            return outputs, Computed("incremental", total, int(state.ages.max()), error)
        return self._full_frame(image, tokens, usual)

    def _full_frame(self, image: Array, tokens: Array, usual: float | None = None) -> tuple[dict[str, Array], Computed]:
        """Compute all patches, and correct the estimate by the measured error.

        Args:
            image: Frame, uint8 [1,H,W,3].
            tokens: Tokens of the frame, [1,N,C].
            usual: Estimated error, without that of events, of the update that this frame had before; None if it had
                none.
        """
        state, prefix = self._state, self._state.shape.prefix
        before, moved = state.final[0, prefix:].copy(), self._change.moved
        outputs = state.step(self._sessions.run, image, tokens, None)
        self._change.keep(image)
        self._summary = state.final[0, :prefix].copy()
        if usual is not None:
            measured = float((1 - cosine(before, state.final[0, prefix:])).mean())
            exceeded = not measured <= self._allowed
            if math.isfinite(measured):
                self._estimate.correct(measured, usual, moved)
            self._failures = self._failures + 1 if exceeded else 0
            self._check = FIRST_CHECK if exceeded else min(4 * self._check, LAST_CHECK)
        self._cached, self._steps = True, 0
        if self._failures == HOPELESS:
            self._release()
        return outputs, Computed("full", 1.0, 0, 0.0)
