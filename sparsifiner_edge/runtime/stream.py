"""A camera's stream: of each frame what changed is computed, what did not is kept.

A bundle exported with `--stream` has two files for that: an embedding, which says of each patch how far it is from what
it was when it was last computed, and a step, which takes chosen tokens through all layers and lets them attend to all,
by keys and values that are kept here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import AGAIN
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError
from sparsifiner_edge.execution import ON_PROCESSOR
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.runtime.backend import Backend, ProcessorBackend
from sparsifiner_edge.runtime.session import Session

if TYPE_CHECKING:
    from sparsifiner_edge.bundle.manifest import StreamFiles
    from sparsifiner_edge.bundle.store import Bundle

REFERENCES, TOKENS, CHANGE, ROWS, COUNTS, PLACES, FINAL, NEW = (
    "stream.references", "stream.tokens", "stream.change", "stream.rows", "stream.counts", "stream.places",
    "stream.final", "new.",
)  # fmt: skip
"""Names in the files; no output of a model has a dot."""
AT_LEAST, MARGIN = 0.98, 0.75
"""Fidelity, where nothing else is asked for; and the share of what may be lost that frames are planned to lose."""
SHARES = (1 / 16, 1 / 8, 1 / 4)
"""Of the patches, that a step computes; further ones follow in the same frame until it keeps to the limit."""
CHANGED, NOISE = (0.25, 0.5), 3.0
"""How far a patch is at least from what it was that counts as changed, and at most; in between so many medians of all
patches of the frame: a camera's noise, and its gain.
"""
STILL, FIRST_CHECK, LAST_CHECK = 2, 8, 256
"""Frames that must hardly differ before something is kept again; steps after which a frame is computed whole, first and
at last: estimates are held against it.
"""
_OLDEST = 8
"""Of a step's patches, one in so many is the oldest there is: what is computed anew of those that did not change tells
how far the others are from the truth, for that comes and goes with the whole frame.
"""
_SCALE, _SCALES, _SCALE_RATE = 2.0, (0.5, 6.0), 0.5
"""How far all are from the truth, of how far the oldest were from what they became, which attend to others as old: at
first, at least and at most, and how fast that follows each frame that is computed whole.
"""
Infer = Callable[[dict[str, Array]], dict[str, Array]]
Places = npt.NDArray[np.int64]
Axes = tuple[int | str | None, ...]


class StreamShape(NamedTuple):
    """Sizes of a stream's state: layers, channels of a token and of all heads, tokens before the patches, patches, and
    the layers whose outputs what is behind them reads.
    """

    depth: int
    width: int
    attended: int
    prefix: int
    patches: int
    read: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Prefix and patches."""
        return self.prefix + self.patches

    @property
    def caches(self) -> dict[str, int]:
        """What is kept between frames, by the name of the step's input: channels of each token."""
        caches = {f"cache.{layer}": 2 * self.attended for layer in range(self.depth)}
        return caches | {f"read.{layer}": self.width for layer in self.read}


class StreamState:
    """What is known of one stream: nothing before its first frame.

    Attributes:
        caches: see `StreamShape.caches`. final: tokens after the final norm, [1,N,C].
        references: of each patch, what it was when it was computed: [1,P,C]. ages: frames since then, int64 [P].
    """

    def __init__(self, shape: StreamShape) -> None:
        self.shape = shape
        self.caches = {name: np.zeros((1, shape.tokens, width), np.float32) for name, width in shape.caches.items()}
        self._none = {name: value[:, :1] for name, value in self.caches.items()}
        self.final = np.zeros((1, shape.tokens, shape.width), np.float32)
        self.references = np.zeros((1, shape.patches, shape.width), np.float32)
        self.ages = np.zeros(shape.patches, np.int64)

    def step(self, infer: Infer, image: Array, tokens: Array, patches: Places | None) -> dict[str, Array]:
        """Compute the prefix and some patches, and remember them.

        Args:
            infer: the step's file, of what it takes among the inputs. image, tokens: of the frame.
            patches: ascending; None: all, and what was known counts no more.

        Returns:
            The model's outputs, of the whole frame.
        """
        shape, whole = self.shape, patches is None
        chosen = np.arange(shape.patches) if patches is None else patches
        rows = np.concatenate([np.arange(shape.prefix), shape.prefix + chosen])
        count = 1 if whole else shape.tokens
        counts, places = np.ones((1, shape.tokens), np.float32), np.arange(shape.tokens)
        counts[:, rows], places[rows] = 0, count + np.arange(len(rows))
        inputs = {"image": image, TOKENS: tokens[:, rows], ROWS: rows, COUNTS: counts[:, :count], PLACES: places}
        outputs = infer(inputs | (self._none if whole else self.caches))
        for name, value in self.caches.items():
            value[:, rows] = outputs.pop(NEW + name)
        self.final[:, rows] = outputs.pop(FINAL)
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
    attended = next((spec.shape[-1] for spec in step.inputs if spec.name == "cache.0" and spec.shape), 0)
    attended = attended // 2 if isinstance(attended, int) else 0
    return StreamShape(sizes.depth, sizes.width, attended, sizes.prefix, sizes.patches, files.read)


def _require(opened: StreamSessions, bundle: Bundle) -> None:
    """Refuse files whose inputs and outputs do not fit the bundle: nothing else looks at names and sizes."""
    shape, known = opened.shape, {spec.name: spec for spec in bundle.manifest.inputs}
    image = known["image"].shape if "image" in known else ()
    caches = {name: (1, None, width) for name, width in shape.caches.items()}
    some: dict[str, Axes] = {"image": image, ROWS: (None,)}  # What not every model reads.
    takes: dict[str, Axes] = {TOKENS: (1, None, shape.width), COUNTS: (1, None), PLACES: (shape.tokens,), **caches}
    gives: dict[str, Axes] = {FINAL: (1, None, shape.width), **{NEW + name: axes for name, axes in caches.items()}}
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


def play(shape: StreamShape, embed: Infer, step: Infer, images: Array, patches: Array) -> Iterator[dict[str, Array]]:
    """The outputs of each frame of a golden sequence, [F,1,H,W,3]: the first is computed whole, of the others these
    patches, [F-1,n].
    """
    state = StreamState(shape)
    for number, image in enumerate(images):
        tokens = embed({"image": image, REFERENCES: state.references})[TOKENS]
        yield state.step(step, image, tokens, patches[number - 1] if number else None)


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
        self, whole: Session, sessions: StreamSessions, at_least: float = AT_LEAST, share: float | None = None
    ) -> None:
        if not 0 < at_least < 1:
            raise ConfigError(f"at_least is {at_least}.", "Give a fidelity between 0 and 1.")
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"share is {share}.", "Give a share of the patches, more than 0 and at most 1.")
        self._whole, self._sessions, self._state = whole, sessions, StreamState(sessions.shape)
        self._limit = MARGIN * (1 - at_least) if share is None else math.inf
        self._shares: tuple[float, ...] = SHARES if share is None else (share,)
        self._scale = _SCALE
        self.computed: Computed | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the frames so far: the next one follows none of them."""
        self._cached, self._still, self._steps, self._check = False, STILL, 0, FIRST_CHECK

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
        state.ages += 1
        if first:
            return self._all(image, tokens)
        changed = change > np.clip(NOISE * np.median(change), *CHANGED)
        if changed.mean() > SHARES[-1]:
            self._cached, self._still = False, 0
        elif not self._cached:
            self._still += 1
        if self._cached:
            outputs, computed = self._step(image, tokens, change, changed)
            check = computed.by == "step" and self._steps >= self._check and math.isfinite(self._limit)
            return self._all(image, tokens, computed.error) if check else (outputs, computed)
        if self._still == STILL:
            return self._all(image, tokens)
        state.references[:], state.ages[:] = tokens[:, state.shape.prefix :], 0
        return self._whole.infer({"image": image}), Computed("model", 1.0, 0)

    def _choose(self, change: Array, share: float) -> Places:
        """Patches that changed most, or longest ago, and some of the oldest; ascending."""
        ages, count = self._state.ages, max(1, round(share * len(change)))
        score = change * np.sqrt(ages + 1)
        score[np.argsort(-ages, kind="stable")[: count // _OLDEST]] = np.inf
        return np.sort(np.argsort(-score, kind="stable")[:count])

    def _step(
        self, image: Array, tokens: Array, change: Array, changed: npt.NDArray[np.bool_]
    ) -> tuple[dict[str, Array], Computed]:
        """As many steps as keep the frame to the limit, or else the whole of it."""
        state, total, error = self._state, 0.0, 1.0
        for share in self._shares:
            if share < changed.mean() and share < self._shares[-1]:
                continue
            chosen = self._choose(change, share)
            rows = state.shape.prefix + chosen
            before, still = state.final[0, rows], ~changed[chosen]
            outputs = state.step(self._sessions.run, image, tokens, chosen)
            total += len(chosen) / len(change)
            change[chosen], changed[chosen] = 0.0, False
            lost = 1 - cosine(before, state.final[0, rows])[still]
            # Where all of them changed, none of them tells.
            error = min(1.0, self._scale * max(0.0, 1 - total) * float(lost.mean() if lost.size else 1.0))
            if error <= self._limit:
                self._steps += 1
                return outputs, Computed("step", total, int(state.ages.max()), error)
        return self._all(image, tokens)

    def _all(self, image: Array, tokens: Array, error: float | None = None) -> tuple[dict[str, Array], Computed]:
        """error: as estimated of what is kept of this frame already; the whole of it tells the truth."""
        state, prefix = self._state, self._state.shape.prefix
        before = state.final[0, prefix:].copy()
        outputs = state.step(self._sessions.run, image, tokens, None)
        if error is not None:
            true = float((1 - cosine(before, state.final[0, prefix:])).mean())
            scale = float(np.clip(self._scale * true / max(error, 1e-6), *_SCALES))
            self._scale += _SCALE_RATE * (scale - self._scale)
            self._check = min(4 * self._check, LAST_CHECK)
        self._cached, self._steps = True, 0
        return outputs, Computed("whole", 1.0, 0, 0.0)
