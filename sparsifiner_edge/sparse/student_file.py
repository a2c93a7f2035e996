"""A student's file: what it says of itself, as types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sparsifiner_edge.artifacts import STUDENT_FILE, STUDENT_SCHEMA, read_json, require_kind
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.records import read_record

SPARSIFY_AGAIN = "Make the student again: sparsifiner-edge sparsify MODEL -o STUDENT/"
HostKind = Literal["timm", "transformers", "factory"]
"""Where a model is from: a name of timm's, a configuration of transformers', or a user's own function."""
ClassNames = tuple[Annotated[str, Meta(pattern=r"^[^\ud800-\udfff]{1,1000}$")], ...]
"""ImageNet's longest has 130 characters. Surrogates stand for bytes in a folder's name that are not UTF-8."""


class _Labels(msgspec.Struct):
    """Names of a classifier's classes, alone."""

    labels: ClassNames


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """A file by name and SHA-256, or where else they are from."""

    file: str | None = None
    sha256: str | None = None
    origin: str | None = msgspec.field(default=None, name="from")


class Calibration(msgspec.Struct, frozen=True):
    """What the predictor was learnt from.

    Attributes:
        origin: "weights" alone, or "images".
        images: how many. img_size: pixels at which it learnt. files: their names.
    """

    origin: str = msgspec.field(name="from")
    images: int | None = None
    img_size: ImageSize | None = None
    files: list[str] | None = None


class Provenance(msgspec.Struct, frozen=True):
    """What is known of a student's making.

    Attributes:
        tools: package -> version.
        training: JSON of `distill.distill.TrainingSummary`, as the version that trained wrote it; None: never trained.
    """

    weights: Weights | None = None
    calibration: Calibration | None = None
    tools: dict[str, str] | None = None
    training: Any = None


class StudentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A student's file.

    Attributes:
        host: where the model is from. model: timm's name, transformers' class (its configuration lies beside), or the
            function as "package.module:function".
        img_size: pixels, one number for a square. sparsity: see `SparsityConfig.from_dict`.
        normalisation: what the model expects of pixels. outputs: names for what it gives; None: its own.
        weights_sha256: of the file beside it.
    """

    schema_version: int = STUDENT_SCHEMA
    kind: str = "student"
    host: HostKind = "timm"
    model: str
    img_size: ImageSize
    num_classes: int
    labels: ClassNames = ()
    normalisation: Normalisation
    outputs: tuple[str, ...] | None = None
    sparsity: Any
    provenance: Provenance
    weights_sha256: str | None = None


def read_config(folder: Path) -> StudentConfig:
    """What a student folder says of itself, without its weights.

    Raises:
        ArtifactError: no student, corrupt, or of another version.
    """
    require_kind(folder, "student")
    path = folder / STUDENT_FILE
    return read_record(read_json(path, STUDENT_SCHEMA, SPARSIFY_AGAIN), StudentConfig, path, SPARSIFY_AGAIN)


def check_labels(labels: object, origin: object, fix: str = SPARSIFY_AGAIN) -> tuple[str, ...]:
    """Names of classes as a student takes them; see `ClassNames`.

    Args:
        labels: whatever was read. origin, fix: where, and what to do, for the message.

    Raises:
        ArtifactError: something else.
    """
    return read_record({"labels": labels}, _Labels, origin, fix).labels
