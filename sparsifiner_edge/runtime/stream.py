"""A camera's stream: of each frame what changed is computed, what did not is kept.

A bundle exported with `--stream` has two files for that: an embedding, which says of each patch how far it is from what
it was when it was last computed, and a step, which takes chosen tokens through all layers and lets them attend to all,
by keys and values that are kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.metrics import cosine

if TYPE_CHECKING:
    from sparsifiner_edge.runtime.session import Session

REFERENCES, TOKENS, CHANGE, ROWS, COUNTS, PLACES, FINAL, NEW = (
    "stream.references", "stream.tokens", "stream.change", "stream.rows", "stream.counts", "stream.places",
    "stream.final", "new.",
)  # fmt: skip
"""Names in the files; no output of a model has a dot."""
Infer = Callable[[dict[str, Array]], dict[str, Array]]
Places = npt.NDArray[np.int64]


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
    def kept(self) -> dict[str, int]:
        """What is kept between frames, by the name of the step's input: channels of each token."""
        kept = {f"kept.{layer}": 2 * self.attended for layer in range(self.depth)}
        return kept | {f"read.{layer}": self.width for layer in self.read}


class StreamState:
    """What is known of one stream: nothing before its first frame.

    Attributes:
        kept: see `StreamShape.kept`. final: tokens after the final norm, [1,N,C].
        references: of each patch, what it was when it was computed: [1,P,C]. ages: frames since then, int64 [P].
    """

    def __init__(self, shape: StreamShape) -> None:
        self.shape = shape
        self.kept = {name: np.zeros((1, shape.tokens, width), np.float32) for name, width in shape.kept.items()}
        self._none = {name: value[:, :1] for name, value in self.kept.items()}
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
        given = {"image": image, TOKENS: tokens[:, rows], ROWS: rows, COUNTS: counts[:, :count], PLACES: places}
        outputs = infer(given | (self._none if whole else self.kept))
        for name, value in self.kept.items():
            value[:, rows] = outputs.pop(NEW + name)
        self.final[:, rows] = outputs.pop(FINAL)
        self.references[:, chosen] = tokens[:, rows[shape.prefix :]]
        self.ages += 1
        self.ages[chosen] = 0
        return outputs


def play(shape: StreamShape, embed: Infer, step: Infer, golden: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """The outputs of each frame of a golden sequence: the first one is computed whole, of the others some patches."""
    state = StreamState(shape)
    for number, image in enumerate(golden["input.image"]):
        tokens = embed({"image": image, REFERENCES: state.references})[TOKENS]
        yield state.step(step, image, tokens, golden["input.patches"][number - 1] if number else None)
