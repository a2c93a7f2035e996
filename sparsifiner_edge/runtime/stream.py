"""A camera's stream: of each frame what changed is computed, what did not is kept.

A bundle exported with `--stream` has two files for that: an embedding, which says of each patch how far it is from when
it was last computed, and a step, which takes chosen tokens through all layers and lets them attend to all, by keys and
values that are kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Array

REFERENCES, TOKENS, CHANGE, ROWS, STALE, PLACES, NEW = (
    "stream.references", "stream.tokens", "stream.change", "stream.rows", "stream.stale", "stream.places", "new."
)  # fmt: skip
"""Names in the files; no output of a model has a dot."""
_UNREAD = -6e4
"""Added to the logit of a kept key whose row is computed anew. float16 has it."""
Infer = Callable[[dict[str, Array]], dict[str, Array]]


class StreamShape(NamedTuple):
    """Sizes of a stream's state: layers, heads, channels of a token, tokens before the patches, patches, and the layers
    whose outputs what is behind them reads.
    """

    depth: int
    heads: int
    width: int
    prefix: int
    patches: int
    read: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Prefix and patches."""
        return self.prefix + self.patches

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """What is kept between frames, by the name of the step's input: shapes, of which the last axis but one counts
        the tokens.
        """
        names = [f"{kind}.{layer}" for layer in range(self.depth) for kind in ("keys", "values")]
        heads = 1, self.heads, self.tokens, self.width // self.heads
        return dict.fromkeys(names, heads) | {f"read.{layer}": (1, self.tokens, self.width) for layer in self.read}


class StreamState:
    """What is known of one stream: empty before its first frame.

    Attributes:
        kept: see `StreamShape.kept`. references: of each patch, what it was when it was computed: [1,P,C].
        ages: frames since then, int64 [P]. empty: nothing is known.
    """

    def __init__(self, shape: StreamShape) -> None:
        self.shape = shape
        self.kept = {name: np.zeros(axes, np.float32) for name, axes in shape.kept.items()}
        self._none = {name: value[..., :0, :] for name, value in self.kept.items()}
        self.references = np.zeros((1, shape.patches, shape.width), np.float32)
        self.ages = np.zeros(shape.patches, np.int64)
        self.empty = True

    def step(
        self, infer: Infer, image: Array, tokens: Array, patches: npt.NDArray[np.int64] | None
    ) -> dict[str, Array]:
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
        count = 0 if whole else shape.tokens
        stale, places = np.zeros(shape.tokens, np.float32), np.arange(shape.tokens)
        stale[rows], places[rows] = _UNREAD, count + np.arange(len(rows))
        given = {"image": image, TOKENS: tokens[:, rows], ROWS: rows, STALE: stale[:count], PLACES: places}
        outputs = infer(given | (self._none if whole else self.kept))
        for name, value in self.kept.items():
            value[..., rows, :] = outputs.pop(NEW + name)
        self.references[:, chosen] = tokens[:, rows[shape.prefix :]]
        self.ages += 1
        self.ages[chosen], self.empty = 0, False
        return outputs


def play(shape: StreamShape, embed: Infer, step: Infer, golden: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """The outputs of each frame of a golden sequence: the first one is computed whole, of the others some patches."""
    state = StreamState(shape)
    for number, image in enumerate(golden["input.image"]):
        tokens = embed({"image": image, REFERENCES: state.references})[TOKENS]
        yield state.step(step, image, tokens, golden["input.patches"][number - 1] if number else None)
