"""How a model is loaded: no torch here, so that a command without it names all that is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.config import require_lists
from sparsifiner_edge.images import Normalisation, Normalise


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded.

    Attributes:
        weights: for timm's names: .safetensors or .pth with its key names; None lets timm download them.
        img_size: pixels: a square's side, or height and width; None takes the model's own.
        normalise: what it expects of pixels / 255; see `sparsify`.
        trust: modules whose functions may make the model of a student.

    Example:
        >>> ModelOptions(weights="dinov2.safetensors", img_size=518).img_size
        518
    """

    weights: str | Path | None = None
    img_size: ImageSize | None = None
    normalise: Normalise = None
    trust: Sequence[str] = ()

    def __post_init__(self) -> None:
        require_lists(trust=self.trust)

    @property
    def file(self) -> Path | None:
        """Of the weights."""
        return Path(self.weights) if self.weights else None

    @property
    def normalisation(self) -> Normalisation | None:
        """What was said of it; None: nothing.

        Raises:
            ConfigError: it is none.
        """
        return Normalisation.parse(self.normalise)
