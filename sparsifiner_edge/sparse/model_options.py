"""Options for loading a model.

This module does not import torch, so that a command in an installation without it can report everything that is
missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.config import require_lists
from sparsifiner_edge.images import Normalisation, Normalise


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options for loading a model.

    Attributes:
        weights: For timm names: .safetensors or .pth file with timm's key names. None lets timm download the weights.
        img_size: Image size in pixels: the side of a square, or (height, width). None takes the model's own.
        normalise: Normalisation of pixels / 255 that the model expects; see `sparsify`.
        trust: Modules whose functions may be called to create the model of a student folder.

    Example:
        >>> ModelOptions(weights="dinov2.safetensors", img_size=518).img_size
        518
    """

    weights: str | Path | None = None
    img_size: ImageSize | None = None
    normalise: Normalise = None
    trust: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check that `trust` is a list or tuple."""
        require_lists(trust=self.trust)

    @property
    def file(self) -> Path | None:
        """Path of the weights, or None."""
        return Path(self.weights) if self.weights else None

    @property
    def normalisation(self) -> Normalisation | None:
        """Normalisation that was given, or None.

        Raises:
            ConfigError: If `normalise` is not a valid normalisation.
        """
        return Normalisation.parse(self.normalise)
