"""Streaming inference on a fixed camera: each frame recomputes only the patches that changed.

A bundle exported with `--stream` has two additional ONNX files. The *embedding* computes the tokens of a frame and
measures the change of each patch. The *step* takes selected tokens through all layers. They attend to all tokens,
through keys and values that are kept from earlier frames (`StreamState`). The step uses dense attention and no token
merging, so a step over all patches equals the dense model. Tokens are also reused over time by Eventful Transformers
(Dutson et al., ICCV 2023).

`Stream.infer` processes a frame as follows:

1. **Embedding.** Compute the tokens that enter the first layer.
2. **Change per patch.** The change of a patch is the distance between its token and its reference, relative to the
   length of the token. The reference is the token with which the patch was last recomputed. A patch counts as changed
   if its change exceeds three times the median of the frame, within bounds (`NOISE`, `CHANGED`).
3. **Incremental update.** If few patches changed, run the step on the prefix tokens and a share of the patches: those
   that changed most or waited longest, a quarter of them the oldest. Unchanged patches still drift with the global
   context, and similar patches drift in the same direction. The step therefore moves each token that it does not
   compute like the similar tokens that it does compute and whose patches did not change (`sparse.stream.carry`). The
   share is the smallest one in `SHARES` whose estimated error is low enough. If the error after the step is still far
   too high, a second step follows in the same frame.
4. **Full frame.** Run the step on all patches. This happens in the first frame, if incremental updates of a frame are
   not enough, when a moving scene has come to rest, and as a check of the estimated error after 8, 32, 128 and then
   every 256 incremental updates.
5. **Fallback to the full model.** If too many patches changed (`MOVING`), as when the camera moves or at a cut, the
   bundle's own sparse model answers and nothing is kept. A full frame follows once `STILL` frames in a row hardly
   differ from their predecessors.

**Estimated error.** The error of a frame is 1 minus the mean cosine between its final patch tokens and those of the
dense model. It is estimated as::

    scale * drift of unchanged patches * wait + missed * drift of changed patches

- The drift is a running mean of 1 minus the cosine between a patch's final token before and after its recomputation,
  kept separately for unchanged and changed patches.
- `wait` is the number of frames that a patch waits for its recomputation: the inverse of the share, but at most the
  number of updates since the last full frame.
- `missed` is the fraction of patches that changed and were not recomputed.
- `scale` is a correction factor. A full frame that follows an update in the same frame measures the error of that
  update, and the ratio of the measured to the estimated error adjusts the scale.

In shapes, N is the number of tokens, P that of patches, M that of computed tokens, C the channels of a token, and A the
channels of all attention heads together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import AGAIN
from sparsifiner_edge.config import require
from sparsifiner_edge.errors import ArtifactError, BackendError
from sparsifiner_edge.execution import ON_PROCESSOR
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.runtime.backend import Backend, ProcessorBackend
from sparsifiner_edge.runtime.session import Runtime, Session

if TYPE_CHECKING:
    from sparsifiner_edge.bundle.manifest import StreamFiles
    from sparsifiner_edge.bundle.store import Bundle

# Names of the inputs and outputs of the two files. The dots keep them apart from the model's outputs, which have none.

REFERENCES = "stream.references"
"""Input of the embedding: tokens with which the patches were last recomputed, float32 [1,P,C]."""
TOKENS = "stream.tokens"
"""Output of the embedding: tokens of the frame, float32 [1,N,C]. Input of the step: the computed ones, [1,M,C]."""
CHANGE = "stream.change"
"""Output of the embedding: change of each patch from its reference, relative to its length, float32 [1,P]."""
ROWS = "stream.rows"
"""Input of the step: indices of the tokens to compute, ascending, the prefix first, int64 [M]."""
COUNTS = "stream.counts"
"""Input of the step: weight of each stored key, float32 [1,N]: 1, or 0 if its token is recomputed.

In a full frame it is [1,1] and 0, because no stored key is read.
"""
PLACES = "stream.places"
"""Input of the step: index of each token in the N stored tokens followed by the M computed ones, int64 [N]."""
UNCHANGED = "stream.unchanged"
"""Input of the step: 1 for each computed token whose patch did not change, otherwise 0, float32 [1,M]."""
FINAL = "stream.final"
"""Output of the step: tokens after the final norm, float32 [1,N,C]."""
NEW = "new."
"""Prefix of the outputs of the step that update the caches; the name of the cache follows."""
CACHE = "cache."
"""Prefix of the names of the key and value caches. Caches of layer outputs begin with "read." instead."""

# Settings of `Stream`.

AT_LEAST = 0.98
"""Default of `at_least`: the mean cosine of a frame's patches to those of the dense model that a stream keeps."""
MARGIN = 0.7
"""Planned error of a frame as a fraction of the allowed error, 1 - `at_least`.

The plan holds on average only: about one frame in twenty has twice the planned error.
"""
SHARES = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8)
"""Shares of the patches that a step can compute, ascending. There are few, because a backend prepares for each size."""
CHANGED = (0.25, 0.5)
"""Lower and upper bound of the change (relative to the token's length) above which a patch counts as changed."""
NOISE = 3.0
"""Change above which a patch counts as changed, in medians of the frame, within `CHANGED`.

The median follows the noise and the gain of the camera, which affect all patches.
"""
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
_TOO_LITTLE = 1e-4
"""Error below which the scale of the estimate is not adjusted, because the ratio of such errors is meaningless."""
_STEPS = 2
"""Maximum number of steps in a frame. If the error is still too high, a full frame is computed instead."""
_FORGET = 0.7
"""Weight of the previous value in the running mean of the drift after each step; the new value has the rest."""
_BURST = 2.0
"""Multiple of the planned error up to which a frame is accepted without a further step."""
_SCALE = 0.25
"""Initial scale of the drift of unchanged patches in the estimate, until the first check corrects it."""
_SCALES = (0.02, 4.0)
"""Lower and upper bound of that scale, which keep the estimate plausible after unusual frames."""
_TIMES = (0.5, 2.0)
"""Lower and upper bound of the factor by which one full frame may adjust the scale."""
_RATE = 0.5
"""Exponent that damps this factor, because single frames vary. It is 1 if the error was higher than allowed."""
Infer = Callable[[dict[str, Array]], dict[str, Array]]
"""Function that runs a file: inputs by name -> outputs by name."""
Places = npt.NDArray[np.int64]
"""Indices of patches or tokens."""
Mask = npt.NDArray[np.bool_]
"""One truth value per patch."""
Axes = tuple[int | str | None, ...]
"""Expected shape of a tensor; None for a dynamic axis."""


class StreamShape(NamedTuple):
    """Sizes of a stream's state.

    Attributes:
        depth: Number of layers.
        width: Number of channels of a token, C.
        attended: Number of channels of all attention heads together, A.
        prefix: Number of tokens before the patches.
        patches: Number of patches, P.
        read: Indices of the last layer and of the layers whose outputs the rest of the model reads, such as a decoder.
        halves: True if keys and values are kept in float16.
    """

    depth: int
    width: int
    attended: int
    prefix: int
    patches: int
    read: tuple[int, ...]
    halves: bool = False

    @property
    def tokens(self) -> int:
        """Number of prefix tokens and patches, N."""
        return self.prefix + self.patches

    @property
    def caches(self) -> dict[str, int]:
        """Arrays that are kept between frames: name of the step's input -> channels per token."""
        caches = {f"{CACHE}{layer}": 2 * self.attended for layer in range(self.depth)}
        return caches | {f"read.{layer}": self.width for layer in self.read}


class StreamState:
    """State of one stream. Before the first frame it is zero.

    Attributes:
        shape: Sizes of the state.
        caches: Keys and values of each layer, [1,N,2A], and outputs of the layers that are read, [1,N,C], by the names
            in `StreamShape.caches`.
        final: Tokens after the final norm, [1,N,C].
        references: Tokens with which the patches were last recomputed, [1,P,C].
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
        counts[:, rows], places[rows] = 0, shape.tokens + np.arange(len(rows))
        unchanged = np.zeros((1, len(rows)), np.float32)
        if changed is not None:
            unchanged[:, shape.prefix :] = ~changed
        inputs = {
            "image": image,
            TOKENS: tokens[:, rows],
            ROWS: rows,
            COUNTS: counts[:, : 1 if full else None],
            PLACES: places,
            UNCHANGED: unchanged,
        }
        outputs = infer(inputs | (self._empty if full else self.caches))
        for name, value in self.caches.items():
            new = outputs.pop(NEW + name)
            if name.startswith(CACHE):
                value[:, rows] = new[..., shape.attended :]  # Without the queries.
            else:
                value[:] = new
        self.final = outputs.pop(FINAL)
        self.references[:, chosen] = tokens[:, rows[shape.prefix :]]
        self.ages[chosen] = 0
        return outputs


def open_stream(bundle: Bundle, backend: Backend) -> StreamSessions:
    """Open the stream files of a bundle.

    Args:
        bundle: Bundle exported with `--stream`.
        backend: Backend that runs the files on the CPU.

    Returns:
        The open sessions, which serve any number of streams.

    Raises:
        BackendError: The bundle has no stream, or the backend does not support streams.
        ArtifactError: The inputs or outputs of the files do not match the manifest.
    """
    manifest = bundle.manifest
    if manifest.stream is None:
        raise BackendError(f"{bundle.folder} was exported without streaming inference.", "Export it with --stream.")
    if not isinstance(backend, ProcessorBackend):
        what = f"{backend.name} does not support streaming inference."
        raise BackendError(what, f"Choose one of: {', '.join(ON_PROCESSOR)}.")
    with contextlib.ExitStack() as stack:
        sessions = list[Session]()
        for name in (manifest.stream.embedding, manifest.stream.step):
            with bundle.sealed_copy(name) as copy:
                session = backend.session(bundle.folder / name, copy, manifest.precision)
            sessions.append(stack.enter_context(session))
        opened = StreamSessions(sessions[0], sessions[1], _shape(bundle, manifest.stream, sessions[1]))
        _require(opened, bundle)
        stack.pop_all()
    return opened


def _shape(bundle: Bundle, files: StreamFiles, step: Session) -> StreamShape:
    """Derive the sizes of the state from the manifest and the first cache input of the step."""
    sizes = bundle.require(bundle.manifest.shape, "shape")
    first = next((spec for spec in step.inputs if spec.name == f"{CACHE}0" and spec.shape), None)
    width = first.shape[-1] if first else 0
    attended, halves = width // 2 if isinstance(width, int) else 0, first is not None and first.dtype == "float16"
    return StreamShape(sizes.depth, sizes.width, attended, sizes.prefix, sizes.patches, files.read, halves)


def _require(opened: StreamSessions, bundle: Bundle) -> None:
    """Check names and shapes of all inputs and outputs of the files. No other code checks them.

    Raises:
        ArtifactError: One of them does not match the manifest.
    """
    shape, known = opened.shape, {spec.name: spec for spec in bundle.manifest.inputs}
    image = known["image"].shape if "image" in known else ()
    caches = {
        name: (1, None if name.startswith(CACHE) else shape.tokens, width) for name, width in shape.caches.items()
    }
    optional: dict[str, Axes] = {"image": image, ROWS: (None,)}  # Some models do not read them.
    required: dict[str, Axes] = {
        TOKENS: (1, None, shape.width),
        COUNTS: (1, None),
        PLACES: (shape.tokens,),
        UNCHANGED: (1, None),
        **caches,
    }
    results: dict[str, Axes] = {FINAL: (1, shape.tokens, shape.width)}
    results |= {NEW + name: (1, n, width + shape.attended * (n is None)) for name, (_, n, width) in caches.items()}
    results |= {spec.name: spec.shape for spec in bundle.manifest.outputs}
    embedding, step = opened.embedding, opened.step
    for origin, specs, needed, others in (
        (embedding, embedding.inputs, {"image": image, REFERENCES: (1, shape.patches, shape.width)}, {}),
        (embedding, embedding.outputs, {TOKENS: (1, shape.tokens, shape.width), CHANGE: (1, shape.patches)}, {}),
        (step, step.inputs, required, optional),
        (step, step.outputs, results, {}),
    ):
        present = {spec.name: tuple(x if isinstance(x, int) else None for x in spec.shape) for spec in specs}
        wanted = {**needed, **{name: axes for name, axes in others.items() if name in present}}
        if present != wanted:
            odd = next(name for name in (*wanted, *present) if wanted.get(name) != present.get(name))
            raise ArtifactError(f"{odd!r:.80} in {origin.model} does not match the manifest.", AGAIN)


class StreamSessions(NamedTuple):
    """Open sessions on the two files of a stream. Several streams can use them in turn.

    Attributes:
        embedding: Session on the embedding.
        step: Session on the step.
        shape: Sizes of a stream's state.
    """

    embedding: Session
    step: Session
    shape: StreamShape

    def embed(self, image: Array, references: Array) -> tuple[Array, Array]:
        """Run the embedding.

        Args:
            image: Frame, uint8 [1,H,W,3].
            references: Tokens with which the patches were last recomputed, [1,P,C].

        Returns:
            The tokens of the frame, [1,N,C], and the change of each patch, [P].
        """
        outputs = self.embedding.infer({"image": image, REFERENCES: references})
        return outputs[TOKENS], outputs[CHANGE][0]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the step on those inputs that its file takes."""
        return self.step.infer({spec.name: inputs[spec.name] for spec in self.step.inputs})

    def close(self) -> None:
        """Close both sessions."""
        self.embedding.close()
        self.step.close()


class Computed(msgspec.Struct, frozen=True):
    """Computation that a stream did for a frame.

    Attributes:
        by: Kind of the computation: "incremental" (some patches), "full" (all patches, which are kept for later frames)
            or "fallback" (the full model answered, because too many patches changed).
        share: Fraction of the patches that were computed; 1 for a full frame or a fallback.
        oldest: Largest number of frames since a patch was last recomputed.
        error: Estimated error: 1 minus the mean cosine of the frame's patches to those of the dense model. 0 for a full
            frame; None for a fallback.
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
        # Planned error of a frame. With a fixed share there is no limit.
        self._limit = math.inf if share is not None else MARGIN * (1 - at_least)
        self._share = share
        self.computed: Computed | None = None
        self.reset()

    @property
    def fresh(self) -> Mask:
        """Mask of the patches that were computed in the last frame, bool [rows,columns]."""
        _, height, width, _ = (side for side in self._model.inputs[0].shape if isinstance(side, int))
        return np.asarray(self._state.ages == 0).reshape(round(math.sqrt(len(self._state.ages) * height / width)), -1)

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
        # Validity of the state, calm frames in a row, updates since the last full frame, and updates before a check.
        self._cached, self._calm, self._steps, self._check = False, STILL, 0, FIRST_CHECK
        # Drift of unchanged and of changed patches (0.5: a cautious guess), scale, and error at the last full frame.
        self._drift, self._scale, self._error = [0.0, 0.5], _SCALE, 0.0

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the model's outputs for the next frame. Inputs and outputs are those of `Session.infer`.

        Args:
            inputs: Arrays by input name.

        Returns:
            Outputs by name.

        Raises:
            BackendError: The inputs are invalid, or the backend fails. After a failure the next frame is a full frame.
        """
        self._model.validate(inputs)
        try:
            outputs, self.computed = self._infer(inputs["image"])
        except BaseException:
            self.reset()
            raise
        return outputs

    def _infer(self, image: Array) -> tuple[dict[str, Array], Computed]:
        """Process a frame: choose between an incremental update, a full frame and the fallback."""
        state, first = self._state, not self._cached and self._calm == STILL
        tokens, change = self._sessions.embed(image, state.references)
        change = np.nan_to_num(change, nan=1.0, posinf=1.0)
        state.ages += 1
        if first:
            return self._full_frame(image, tokens)
        changed = change > np.clip(NOISE * np.median(change), *CHANGED)
        if changed.mean() > (MOVING if self._cached else REST):
            self._cached, self._calm = False, 0
        elif not self._cached:
            self._calm += 1
        if self._cached:
            outputs, computed = self._update(image, tokens, change, changed)
            if computed.by != "incremental" or self._steps < self._check or math.isinf(self._limit):
                return outputs, computed
            self._check = min(4 * self._check, LAST_CHECK)
            return self._full_frame(image, tokens, computed.error)
        if self._calm == STILL:
            return self._full_frame(image, tokens)
        # With these references, the next frame measures its change from this one.
        state.references[:], state.ages[:] = tokens[:, state.shape.prefix :], 0
        return self._model.infer({"image": image}), Computed("fallback", 1.0, 0)

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

    def _estimate(self, share: float, missed: float) -> float:
        """Estimate the error of a frame: 1 minus the mean cosine of its patches to those of the dense model.

        Args:
            share: Fraction of the patches that is computed in each frame.
            missed: Fraction of the patches that changed and are not computed.
        """
        unchanged, changed = self._drift
        return self._scale * unchanged * min(self._steps + 1, 1 / share) + missed * changed

    def _least_share(self, changed: float) -> float:
        """Return the smallest share whose estimated error is within the limit, or the largest share if there is none.

        Args:
            changed: Fraction of the patches that changed.
        """
        available = 1 - 1 / _OLDEST  # The part of a step that is left for patches that changed.
        fits = (
            share for share in SHARES if self._estimate(share, max(0.0, changed - available * share)) <= self._limit
        )
        return next(fits, SHARES[-1])

    def _update(self, image: Array, tokens: Array, change: Array, changed: Mask) -> tuple[dict[str, Array], Computed]:
        """Compute an incremental update, or a full frame if the error stays far above the limit.

        Args:
            image: Frame, uint8 [1,H,W,3].
            tokens: Tokens of the frame, [1,N,C].
            change: Change of each patch, [P]; modified in place.
            changed: True for each patch that changed, [P]; modified in place.
        """
        state, total, error = self._state, 0.0, 0.0
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
            for kind, values in enumerate((drift[~moved], drift[moved])):
                if values.size:
                    self._drift[kind] += (1 - _FORGET) * (float(values.mean()) - self._drift[kind])
            error = min(1.0, self._estimate(total, float(changed.mean())))
            if error <= _BURST * self._limit:
                self._steps += 1
                return outputs, Computed("incremental", total, int(state.ages.max()), error)
            if share == SHARES[-1]:
                break
        answer = self._full_frame(image, tokens, error)
        if self._error > self._limit / MARGIN:  # The scene really moves, although no patch changed much.
            self._cached, self._calm = False, 0
        return answer

    def _full_frame(self, image: Array, tokens: Array, error: float | None = None) -> tuple[dict[str, Array], Computed]:
        """Compute all patches, and adjust the scale of the estimate to the measured error.

        Args:
            image: Frame, uint8 [1,H,W,3].
            tokens: Tokens of the frame, [1,N,C].
            error: Estimated error of the update that this frame had before; None if it had none.
        """
        state, prefix = self._state, self._state.shape.prefix
        before = state.final[0, prefix:].copy()
        outputs = state.step(self._sessions.run, image, tokens, None)
        self._error = measured = float((1 - cosine(before, state.final[0, prefix:])).mean())
        if error is not None and math.isfinite(measured) and max(measured, error) > _TOO_LITTLE:
            # An error above the allowed one is not damped, and the next check comes soon.
            exceeded = measured > self._limit / MARGIN
            factor = float(np.clip(measured / max(error, _TOO_LITTLE), *_TIMES)) ** (1.0 if exceeded else _RATE)
            self._scale = float(np.clip(self._scale * factor, *_SCALES))
            self._check = FIRST_CHECK if exceeded else self._check
        self._cached, self._steps = True, 0
        return outputs, Computed("full", 1.0, 0, 0.0)
