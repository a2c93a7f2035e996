"""The two files of a stream: names of their inputs and outputs, sizes of the state, and open sessions.

A bundle exported with `--stream` has two additional ONNX files. The *embedding* computes the tokens of a frame and
measures the change of each patch. The *step* takes selected tokens through all layers. They attend to all tokens,
through keys and values that are kept from earlier frames (`StreamState`). The step uses dense attention and no token
merging, so a step over all patches equals the dense model.

In shapes, N is the number of tokens, P that of patches, M that of computed tokens, C the channels of a token, and A the
channels of all attention heads together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.bundle.manifest import AGAIN
from sparsifiner_edge.errors import ArtifactError, BackendError
from sparsifiner_edge.execution import ON_PROCESSOR
from sparsifiner_edge.runtime.backend import Backend, ProcessorBackend
from sparsifiner_edge.runtime.session import Session

if TYPE_CHECKING:
    from sparsifiner_edge.bundle.manifest import StreamFiles
    from sparsifiner_edge.bundle.store import Bundle

# The dots in the names keep them apart from the model's outputs, which have none.

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
SHIFT = "stream.shift"
"""Input of the step, in models with rotary embeddings: rows and columns by which the view has moved, float32 [2].

The keys that are kept hold the positions of earlier views, and attention depends on differences of positions only.
"""
FINAL = "stream.final"
"""Output of the step: tokens after the final norm, float32 [1,N,C]."""
NEW = "new."
"""Prefix of the outputs of the step that update the caches; the name of the cache follows."""
CACHE = "cache."
"""Prefix of the names of the key and value caches. Caches of layer outputs begin with "read." instead."""

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
        grid: Rows and columns of patches.
        read: Indices of the last layer and of the layers whose outputs the rest of the model reads, such as a decoder.
        halves: True if keys and values are kept in float16.
    """

    depth: int
    width: int
    attended: int
    prefix: int
    grid: tuple[int, int]
    read: tuple[int, ...]
    halves: bool = False

    @property
    def patches(self) -> int:
        """Number of patches, P."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of prefix tokens and patches, N."""
        return self.prefix + self.patches

    @property
    def caches(self) -> dict[str, int]:
        """Arrays that are kept between frames: name of the step's input -> channels per token."""
        caches = {f"{CACHE}{layer}": 2 * self.attended for layer in range(self.depth)}
        return caches | {f"read.{layer}": self.width for layer in self.read}


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
    sizes, (height, width) = bundle.require(bundle.manifest.shape, "shape"), height_width(bundle.image_size)
    rows = round(math.sqrt(sizes.patches * height / width))
    grid = rows, sizes.patches // max(1, rows)
    first = next((spec for spec in step.inputs if spec.name == f"{CACHE}0" and spec.shape), None)
    channels = first.shape[-1] if first else 0
    attended, halves = channels // 2 if isinstance(channels, int) else 0, first is not None and first.dtype == "float16"
    return StreamShape(sizes.depth, sizes.width, attended, sizes.prefix, grid, files.read, halves)


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
    optional: dict[str, Axes] = {"image": image, ROWS: (None,), SHIFT: (2,)}  # Some models do not read them.
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

    def positions(self) -> Array:
        """Return what a patch's token takes from its position, up to a constant: [P,C].

        These are the tokens of a uniform image.
        """
        shape = tuple(side for side in self.embedding.inputs[0].shape if isinstance(side, int))
        nothing = np.zeros((1, self.shape.patches, self.shape.width), np.float32)
        return self.embed(np.full(shape, 128, np.uint8), nothing)[0][0, self.shape.prefix :]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the step on those inputs that its file takes."""
        return self.step.infer({spec.name: inputs[spec.name] for spec in self.step.inputs})

    def close(self) -> None:
        """Close both sessions."""
        self.embedding.close()
        self.step.close()
