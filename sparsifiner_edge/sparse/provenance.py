"""Where a student's weights and projections came from, as its file says."""

from __future__ import annotations

from typing import Any

import msgspec


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """A file by name and SHA-256, or where else they are from."""

    file: str | None = None
    sha256: str | None = None
    origin: str | None = msgspec.field(default=None, name="from")


class Calibration(msgspec.Struct, frozen=True):
    """What the predictor was learnt from.

    Attributes:
        origin: "weights" alone, or "pictures".
        images: how many. img_size: pixels along a side at which it learnt. files: their names.
    """

    origin: str = msgspec.field(name="from")
    images: int | None = msgspec.field(default=None, name="pictures")
    img_size: int | None = None
    files: list[str] | None = None


class Provenance(msgspec.Struct, frozen=True):
    """What is known of a student's making.

    Attributes:
        tools: package -> version.
        training: JSON of `distill.summary.Summary`, as the version that trained wrote it; None: never trained.
    """

    weights: Weights | None = None
    calibration: Calibration | None = None
    tools: dict[str, str] | None = None
    training: Any = None
