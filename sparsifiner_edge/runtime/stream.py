"""A camera's stream: of each frame what changed is computed, what did not is kept.

A bundle exported with `--stream` has two files for that: an embedding, which says of each patch how far it is from what
it was when it was last computed, and a step, which takes chosen tokens through all layers and lets them attend to all,
by keys and values that are kept here.
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

REFERENCES, TOKENS, CHANGE, ROWS, COUNTS, PLACES, UNCHANGED, FINAL, NEW = (
    "stream.references",
    "stream.tokens",
    "stream.change",
    "stream.rows",
    "stream.counts",
    "stream.places",
    "stream.unchanged",
    "stream.final",
    "new.",
)
"""Names in the files; no output of a model has a dot."""
CACHE = "cache."
"""How the names of kept keys and values begin; those of tokens that are read do otherwise."""
AT_LEAST, MARGIN = 0.98, 0.7
"""Fidelity, where nothing else is asked for; and the share of what may be lost that frames are planned to lose on
average: of twenty, one loses about twice as much.
"""
SHARES = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8)
"""Of the patches, that a step computes. Few different ones: engines prepare for each."""
CHANGED, NOISE = (0.25, 0.5), 3.0
"""How far a patch is at least, and at most, from what it was that counts as changed; in between so many medians of the
frame's: a camera's noise, and its gain."""
MOVING, REST = 0.25, 0.1
"""Share of the patches that change from which on a scene moves, or is another; and below which it rests again."""
STILL, FIRST_CHECK, LAST_CHECK = 2, 8, 256
"""Frames that must hardly differ before something is kept again; steps after which a frame is computed whole, first and
at last: estimates are held against it."""
_OLDEST = 4
"""Of a step's patches, one in so many is the oldest there is: what is computed anew of those that did not change tells
how far the others are from the truth, for that comes and goes with the whole frame.
"""
_STILL, _TOO_LITTLE = 1e-3, 1e-4
"""Change by which one of patches that did not change is chosen, by its age; and an error of which nothing is learnt."""
_STEPS, _FORGET, _BURST = 2, 0.7, 2.0
"""Steps of a frame, at most; of how far patches that did not change came to be elsewhere, what counts after each step;
and how many times what is planned a frame may lose before it is given another step."""
_SCALE, _SCALES, _TIMES, _RATE = 0.25, (0.02, 4.0), (0.5, 2.0), 0.5
"""How far all are from the truth: so many times that, for each frame that what is not computed waits. At first, least,
most; by how much a whole frame may say otherwise, and the power to which that counts: single frames differ."""
Infer = Callable[[dict[str, Array]], dict[str, Array]]
Places = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Axes = tuple[int | str | None, ...]


class StreamShape(NamedTuple):
    """Sizes of a stream's state: layers, channels of a token and of all heads, tokens before the patches, patches, the
    layers whose outputs what is behind them reads, and whether keys and values are kept in float16.
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
        """Prefix and patches."""
        return self.prefix + self.patches

    @property
    def caches(self) -> dict[str, int]:
        """What is kept between frames, by the name of the step's input: channels of each token."""
        caches = {f"{CACHE}{layer}": 2 * self.attended for layer in range(self.depth)}
        return caches | {f"read.{layer}": self.width for layer in self.read}


class StreamState:
    """What is known of one stream: nothing before its first frame.

    Attributes:
        caches: see `StreamShape.caches`. final: tokens after the final norm, [1,N,C].
        references: of each patch, what it was when it was computed: [1,P,C]. ages: frames since then, int64 [P].
    """

    def __init__(self, shape: StreamShape) -> None:
        self.shape = shape
        kinds = {name: np.float16 if shape.halves and name.startswith(CACHE) else np.float32 for name in shape.caches}
        self.caches = {name: np.zeros((1, shape.tokens, n), kinds[name]) for name, n in shape.caches.items()}
        self._none = {
            name: np.zeros_like(x[:, : 1 if name.startswith(CACHE) else None]) for name, x in self.caches.items()
        }
        self.final = np.zeros((1, shape.tokens, shape.width), np.float32)
        self.references = np.zeros((1, shape.patches, shape.width), np.float32)
        self.ages = np.zeros(shape.patches, np.int64)

    def step(
        self, infer: Infer, image: Array, tokens: Array, patches: Places | None, changed: Mask | None = None
    ) -> dict[str, Array]:
        """Compute the prefix and some patches, and remember them.

        Args:
            infer: the step's file, of what it takes among the inputs. image, tokens: of the frame.
            patches: ascending; None: all, and what was known counts no more.
            changed: which of them changed: how the others come out tells of those that are not computed. None: all.

        Returns:
            The model's outputs, of the whole frame.
        """
        shape, whole = self.shape, patches is None
        chosen = np.arange(shape.patches) if patches is None else patches
        rows = np.concatenate([np.arange(shape.prefix), shape.prefix + chosen])
        counts, places = np.ones((1, shape.tokens), np.float32), np.arange(shape.tokens)
        counts[:, rows], places[rows] = 0, shape.tokens + np.arange(len(rows))
        still = np.zeros((1, len(rows)), np.float32)
        if changed is not None:
            still[:, shape.prefix :] = ~changed
        inputs = {
            "image": image,
            TOKENS: tokens[:, rows],
            ROWS: rows,
            COUNTS: counts[:, : 1 if whole else None],
            PLACES: places,
            UNCHANGED: still,
        }
        outputs = infer(inputs | (self._none if whole else self.caches))
        for name, value in self.caches.items():
            new = outputs.pop(NEW + name)
            if name.startswith(CACHE):
                value[:, rows] = new[..., shape.attended :]
            else:
                value[:] = new
        self.final = outputs.pop(FINAL)
        self.references[:, chosen] = tokens[:, rows[shape.prefix :]]
        self.ages[chosen] = 0
        return outputs


def open_stream(bundle: Bundle, backend: Backend) -> StreamSessions:
    """The files of a stream in a bundle, open.

    Raises:
        BackendError: the bundle has none, or the backend runs none.
        ArtifactError: they are not what the bundle says of itself.
    """
    manifest = bundle.manifest
    if manifest.stream is None:
        raise BackendError(f"{bundle.folder} has no files of a stream.", "Export it with --stream.")
    if not isinstance(backend, ProcessorBackend):
        raise BackendError(f"{backend.name} runs no stream.", f"Choose one of: {', '.join(ON_PROCESSOR)}.")
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
    sizes = bundle.require(bundle.manifest.shape, "shape")
    first = next((spec for spec in step.inputs if spec.name == f"{CACHE}0" and spec.shape), None)
    width = first.shape[-1] if first else 0
    attended, halves = width // 2 if isinstance(width, int) else 0, first is not None and first.dtype == "float16"
    return StreamShape(sizes.depth, sizes.width, attended, sizes.prefix, sizes.patches, files.read, halves)


def _require(opened: StreamSessions, bundle: Bundle) -> None:
    """Refuse files whose inputs and outputs do not fit the bundle: nothing else looks at names and sizes."""
    shape, known = opened.shape, {spec.name: spec for spec in bundle.manifest.inputs}
    image = known["image"].shape if "image" in known else ()
    caches = {
        name: (1, None if name.startswith(CACHE) else shape.tokens, width) for name, width in shape.caches.items()
    }
    some: dict[str, Axes] = {"image": image, ROWS: (None,)}  # What not every model reads.
    takes: dict[str, Axes] = {
        TOKENS: (1, None, shape.width),
        COUNTS: (1, None),
        PLACES: (shape.tokens,),
        UNCHANGED: (1, None),
        **caches,
    }
    gives: dict[str, Axes] = {FINAL: (1, shape.tokens, shape.width)}
    gives |= {NEW + name: (1, n, width + shape.attended * (n is None)) for name, (_, n, width) in caches.items()}
    gives |= {spec.name: spec.shape for spec in bundle.manifest.outputs}
    embedding, step = opened.embedding, opened.step
    for origin, specs, needed, others in (
        (embedding, embedding.inputs, {"image": image, REFERENCES: (1, shape.patches, shape.width)}, {}),
        (embedding, embedding.outputs, {TOKENS: (1, shape.tokens, shape.width), CHANGE: (1, shape.patches)}, {}),
        (step, step.inputs, takes, some),
        (step, step.outputs, gives, {}),
    ):
        present = {spec.name: tuple(x if isinstance(x, int) else None for x in spec.shape) for spec in specs}
        wanted = {**needed, **{name: axes for name, axes in others.items() if name in present}}
        if present != wanted:
            odd = next(name for name in (*wanted, *present) if wanted.get(name) != present.get(name))
            raise ArtifactError(f"{origin.model} has {odd!r:.80} otherwise than its manifest says.", AGAIN)


class StreamSessions(NamedTuple):
    """The two files of a stream, open, for any number of streams in turn."""

    embedding: Session
    step: Session
    shape: StreamShape

    def embed(self, image: Array, references: Array) -> tuple[Array, Array]:
        """A frame's tokens, and how far each patch is from its reference: [1,N,C] and [P]."""
        outputs = self.embedding.infer({"image": image, REFERENCES: references})
        return outputs[TOKENS], outputs[CHANGE][0]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """The step, of what it takes among these."""
        return self.step.infer({spec.name: inputs[spec.name] for spec in self.step.inputs})

    def close(self) -> None:
        """Release both."""
        self.embedding.close()
        self.step.close()


class Computed(msgspec.Struct, frozen=True):
    """What was computed of a frame.

    Attributes:
        by: "whole": all, and what a stream keeps with it; "step": a part; "model": as without a stream, since too much
            changed.
        share: of the patches. oldest: frames since the patch was computed for which that is longest.
        error: estimated, 1 - the mean cosine of the frame's patches to the dense model's; None: nothing was kept.
    """

    by: str
    share: float
    oldest: int
    error: float | None = None


class Stream:
    """One stream of a session: see `Session.stream`.

    Attributes:
        computed: of the last frame; None before the first.
    """

    def __init__(
        self, whole: Session, sessions: StreamSessions, at_least: float | None = None, share: float | None = None
    ) -> None:
        require(None in (at_least, share), f"at_least is {at_least}, and share {share}.", "Give one of them.")
        at_least = AT_LEAST if at_least is None else at_least
        require(0 < at_least < 1, f"at_least is {at_least}.", "Give a fidelity between 0 and 1.")
        require(share is None or 0 < share <= 1, f"share is {share}.", "Give more than 0, and at most 1.")
        self._whole, self._sessions, self._state = whole, sessions, StreamState(sessions.shape)
        self._limit = math.inf if share is not None else MARGIN * (1 - at_least)
        self._share = share
        self.computed: Computed | None = None
        self.reset()

    @property
    def fresh(self) -> Mask:
        """Which patches were computed of the last frame, [rows,columns]."""
        _, height, width, _ = (side for side in self._whole.inputs[0].shape if isinstance(side, int))
        return np.asarray(self._state.ages == 0).reshape(round(math.sqrt(len(self._state.ages) * height / width)), -1)

    @property
    def description(self) -> Runtime:
        """What really runs its steps."""
        return self._sessions.step.description

    @property
    def final(self) -> Array:
        """Tokens after the final norm, [1,N,C]: of the last frame, unless the model answered it."""
        return self._state.final

    def dense(self) -> Callable[[Array], dict[str, Array]]:
        """What computes images [1,H,W,3] whole, apart from this stream: the dense model's outputs, and its "tokens"."""
        sessions, state = self._sessions, StreamState(self._sessions.shape)

        def infer(image: Array) -> dict[str, Array]:
            outputs = state.step(sessions.run, image, sessions.embed(image, state.references)[0], None)
            return {"tokens": state.final, **outputs}

        return infer

    def reset(self) -> None:
        """Forget the frames so far: the next one follows none of them."""
        self._cached, self._still, self._steps, self._check = False, STILL, 0, FIRST_CHECK
        self._drift, self._scale, self._lost = [0.0, 0.5], _SCALE, 0.0

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The model's outputs for the next frame; takes and gives what `Session.infer` does.

        Raises:
            BackendError: see `Session.infer`; the next frame is computed whole then.
        """
        self._whole.validate(inputs)
        try:
            outputs, self.computed = self._infer(inputs["image"])
        except BaseException:
            self.reset()
            raise
        return outputs

    def _infer(self, image: Array) -> tuple[dict[str, Array], Computed]:
        state, first = self._state, not self._cached and self._still == STILL
        tokens, change = self._sessions.embed(image, state.references)
        change = np.nan_to_num(change, nan=1.0, posinf=1.0)
        state.ages += 1
        if first:
            return self._all(image, tokens)
        changed = change > np.clip(NOISE * np.median(change), *CHANGED)
        if changed.mean() > (MOVING if self._cached else REST):
            self._cached, self._still = False, 0
        elif not self._cached:
            self._still += 1
        if self._cached:
            outputs, computed = self._step(image, tokens, change, changed)
            if computed.by != "step" or self._steps < self._check or math.isinf(self._limit):
                return outputs, computed
            self._check = min(4 * self._check, LAST_CHECK)
            return self._all(image, tokens, computed.error)
        if self._still == STILL:
            return self._all(image, tokens)
        state.references[:], state.ages[:] = tokens[:, state.shape.prefix :], 0
        return self._whole.infer({"image": image}), Computed("model", 1.0, 0)

    def _choose(self, change: Array, share: float) -> Places:
        """Patches that changed most, or longest ago, and some of the oldest, none of them of this frame; ascending."""
        ages, count = self._state.ages, max(1, round(share * len(change)))
        score = (change + _STILL) * np.sqrt(ages + 1)
        score[np.argsort(-ages, kind="stable")[: max(count // _OLDEST, count > 1)]] = np.inf
        score[ages == 0] = -1.0
        return np.sort(np.argsort(-score, kind="stable")[:count])

    def _estimate(self, share: float, missed: float) -> float:
        """1 - cosine of all patches, on average, where a share is computed and one that changed is not."""
        still, changed = self._drift
        return self._scale * still * min(self._steps + 1, 1 / share) + missed * changed

    def _least_share(self, changed: float) -> float:
        """The least share that is expected to do where one changed; the largest, where none is."""
        fresh = 1 - 1 / _OLDEST
        fits = (share for share in SHARES if self._estimate(share, max(0.0, changed - fresh * share)) <= self._limit)
        return next(fits, SHARES[-1])

    def _step(self, image: Array, tokens: Array, change: Array, changed: Mask) -> tuple[dict[str, Array], Computed]:
        """A step, and another one where a frame loses far more than planned; the whole where that is not enough."""
        state, total, error = self._state, 0.0, 0.0
        for _ in range(_STEPS):
            share = self._share or self._least_share(float(changed.mean()))
            chosen = self._choose(change, share)
            rows, moved = state.shape.prefix + chosen, changed[chosen]
            before = state.final[0, rows]
            outputs = state.step(self._sessions.run, image, tokens, chosen, moved)
            total += len(chosen) / len(change)
            change[chosen], changed[chosen] = 0.0, False
            lost = (1 - cosine(before, state.final[0, rows])).clip(0)
            if not np.isfinite(lost).all():  # What is kept of it would be read by all frames that follow.
                return self._all(image, tokens)
            for number, some in enumerate((lost[~moved], lost[moved])):
                if some.size:
                    self._drift[number] += (1 - _FORGET) * (float(some.mean()) - self._drift[number])
            error = min(1.0, self._estimate(total, float(changed.mean())))
            if error <= _BURST * self._limit:
                self._steps += 1
                return outputs, Computed("step", total, int(state.ages.max()), error)
            if share == SHARES[-1]:
                break
        answer = self._all(image, tokens, error)
        if self._lost > self._limit / MARGIN:  # As it was feared: a scene that moves, though no patch far.
            self._cached, self._still = False, 0
        return answer

    def _all(self, image: Array, tokens: Array, error: float | None = None) -> tuple[dict[str, Array], Computed]:
        """error: as estimated of what is kept of this frame already; the whole of it tells the truth."""
        state, prefix = self._state, self._state.shape.prefix
        before = state.final[0, prefix:].copy()
        outputs = state.step(self._sessions.run, image, tokens, None)
        self._lost = true = float((1 - cosine(before, state.final[0, prefix:])).mean())
        if error is not None and math.isfinite(true) and max(true, error) > _TOO_LITTLE:
            less = true > self._limit / MARGIN  # Than was asked for: it counts in full, and is looked at again soon.
            times = float(np.clip(true / max(error, _TOO_LITTLE), *_TIMES)) ** (1.0 if less else _RATE)
            self._scale = float(np.clip(self._scale * times, *_SCALES))
            self._check = FIRST_CHECK if less else self._check
        self._cached, self._steps = True, 0
        return outputs, Computed("whole", 1.0, 0, 0.0)
