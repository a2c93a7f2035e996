"""Manifest of a bundle: the type of `manifest.json`. No other package reads its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sparsifiner_edge.artifacts import BUNDLE_FILE, ENGINE_FOLDER, SIGNATURE_FILE, parse_json
from sparsifiner_edge.bounds import MOST_SIDE
from sparsifiner_edge.bundle.engines import Engine
from sparsifiner_edge.bundle.entries import BoardKernels, Check, Float16, Quantisation, Retiled
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.fitting import Fit
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.records import read_record, write_record

BUNDLE_SCHEMA = 4
"""Version of the manifest's format."""
MODEL_FILE = "model.onnx"
AGAIN = "Export the bundle again: sparsifiner-edge export STUDENT/ -o BUNDLE/"
"""Advice of messages about a broken bundle."""
_Side = Annotated[int, Meta(ge=1, le=MOST_SIDE)]
_ImageSize = _Side | Annotated[tuple[_Side, ...], Meta(min_length=2, max_length=2)]
"""Image size as `bounds.ImageSize`, with limits.

msgspec 0.22 crashes on a union of a fixed-length tuple and a number with limits, hence the tuple of variable length.
"""


class TensorSpec(msgspec.Struct, frozen=True):
    """Input or output of a model.

    Attributes:
        name: Name of the tensor.
        dtype: NumPy name of the element type, such as "uint8".
        shape: One entry per axis: a size, the name of a dynamic axis such as "batch", or None for an unnamed dynamic
            axis.
    """

    name: str
    dtype: str
    shape: tuple[Annotated[int, Meta(ge=1)] | str | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {shape_text(self.shape)}"


def shape_text(shape: tuple[int | str | None, ...]) -> str:
    """Format a shape, such as "[batch, 224, 224, 3]"."""
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def tensor_spec(value: Any) -> TensorSpec:
    """Return the specification of an input or output in an ONNX file (onnx's `ValueInfoProto`)."""
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


class Preprocessing(msgspec.Struct, frozen=True):
    """Steps between an image and the model.

    Attributes:
        size: Input size in pixels: one number for a square, else height and width.
        fit: How an image is brought to this size unless the caller chooses another fit; see `fitting.Framing`.
        folded: Normalisation of pixels that export added to the file; None if the model normalises them itself.
    """

    size: _ImageSize
    fit: Fit = "crop"
    folded: Normalisation | None = None


class Intended(msgspec.Struct, frozen=True):
    """Backend and compute precision that run a bundle unless the caller chooses others; see `Execution`."""

    backend: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    compute_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


class StreamFiles(msgspec.Struct, frozen=True):
    """Files of a bundle for streaming inference, which recomputes only what changed between frames.

    Attributes:
        embedding: Model that embeds the tokens and measures how far they differ from the previous tokens.
        step: Model that runs selected tokens through all layers.
        golden: Reference sequence of frames.
        read: Layers whose outputs are read by the part of the model behind the layers.
    """

    embedding: str = "stream/embedding.onnx"
    step: str = "stream/step.onnx"
    golden: str = "stream/golden.npz"
    read: tuple[Annotated[int, Meta(ge=0)], ...] = ()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a bundle's `manifest.json`. Code that needs a missing entry raises an error.

    Attributes:
        schema_version: Version of the format.
        files: SHA-256 in hexadecimal by file name, for all files except the manifest and the signature.
        name: Name of the model in timm.
        precision: Weight precision: "fp32", "fp16" or "int8"; None if unknown.
        shape: Sizes that determine the cost of the model.
        ops: Operators of the ONNX domain `sparsifiner` that the model uses.
        inputs: Inputs of the model, in order. Images are "NHWC", RGB, 0 to 255.
        outputs: Outputs of the model, in order.
        preprocessing: Steps between an image and the model.
        sparsity: Settings of sparsity; None if attention is dense.
        plan: Settings of each layer.
        tolerances: Largest allowed difference from the golden output, relative to its range, per output. A tolerance
            above 1 would accept any output.
        engines: Engines, oldest first.
        stream: Files for streaming inference, written by `export --stream`.
        intended: Backend and compute precision to use, if known.
        user_call: Difference from the user's own function, measured by `export --check`.
        check: Comparison with PyTorch, measured by export.
        retiled: Change of layout for a board, made by export.
        quantisation: Accuracy of int8 quantisation, measured by export.
        float16: Accuracy of float16, measured by export; also decides `float_precision`.
        boards: CUDA kernels per board, compiled by export.
        provenance: Source of the weights, copied from the sparse model's configuration.
        tools: Version per package.
    """

    schema_version: int
    files: dict[str, str]
    name: str | None = None
    precision: str | None = None
    shape: ModelShape | None = None
    ops: tuple[str, ...] = ()
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    preprocessing: Preprocessing | None = None
    sparsity: SparsityConfig | None = None
    plan: LayerPlan | None = None
    tolerances: dict[str, Annotated[float, Meta(ge=0, le=1)]] = {}
    engines: tuple[Engine, ...] = ()
    stream: StreamFiles | None = None
    intended: Intended | None = None
    check: Check | None = None
    user_call: str | None = None
    retiled: Retiled | None = None
    quantisation: Quantisation | None = None
    float16: Float16 | None = None
    boards: tuple[BoardKernels, ...] = ()
    provenance: Any = {}
    tools: dict[str, str] = {}

    @property
    def float_precision(self) -> str:
        """Precision of everything that is not int8: "fp32", or "fp16" with some nodes in float32."""
        return "fp16" if self.precision == "fp16" or self.float16 is not None else "fp32"

    @property
    def to_float32(self) -> float | None:
        """Smallest cosine, over the outputs, of an int8 file to the float32 file; None if unknown."""
        cosines = self.quantisation and (self.quantisation.own_matches_cosines or self.quantisation.cosines)
        return min(cosines.values()) if cosines else None

    @property
    def batch(self) -> int | None:
        """Batch size; None if it is dynamic or unknown."""
        size = self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else None
        return size if isinstance(size, int) else None


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Parse the bytes of a manifest.

    Args:
        text: Content of the manifest.
        path: File that the content was read from, for messages.

    Raises:
        ArtifactError: The content is not a bundle's manifest or has another schema version, a field is mistyped, NaN or
            infinite, or a file name could lead out of the bundle.
    """
    content, folder = parse_json(text, path, BUNDLE_SCHEMA, AGAIN), path.parent
    files = content.get("files")
    if content.get("kind") != "bundle" or not isinstance(files, dict) or MODEL_FILE not in files:
        raise ArtifactError(f"{path} is not a bundle's manifest.", AGAIN)
    _check_names(files, folder)
    settings = content.pop("sparsity", None)
    try:
        sparsity = None if settings is None else SparsityConfig.from_dict(settings)
    except ConfigError as error:
        raise ArtifactError(f"{folder}: {error.what}", AGAIN) from error
    manifest = read_record(content, Manifest, folder, AGAIN)
    roles = (manifest.stream.embedding, manifest.stream.step, manifest.stream.golden) if manifest.stream else ()
    if lacking := [name for name in roles if name not in files]:
        raise ArtifactError(f"{folder} lists {lacking[0]!r:.80} without a hash.", AGAIN)
    for engine in manifest.engines:
        if engine.file not in files:
            raise ArtifactError(f"{folder} lists {engine.file!r:.80} without a hash.", AGAIN)
        if PurePosixPath(engine.file).parent != PurePosixPath(ENGINE_FOLDER):
            raise ArtifactError(f"{folder} lists the engine {engine.file!r} outside {ENGINE_FOLDER}/.", AGAIN)
    return msgspec.structs.replace(manifest, sparsity=sparsity)


def _check_names(files: Mapping[str, object], folder: Path) -> None:
    """Check the file names of a manifest, which become paths wherever a bundle is read, copied or extended.

    Raises:
        ArtifactError: A name is absolute, has an empty part, `.` or `..`, a backslash or an unprintable character, or
            is that of the manifest or the signature.
    """
    for name in files:
        parts = name.split("/")
        reserved = parts[0] in (BUNDLE_FILE, SIGNATURE_FILE)
        if reserved or not {"", ".", ".."}.isdisjoint(parts) or not name.isprintable() or "\\" in name:
            fix = "Do not use this bundle: the name could lead out of it. Export it again."
            raise ArtifactError(f"{folder} names the file {name!r:.200}, which is not allowed.", fix)


def manifest_content(manifest: Manifest) -> Any:
    """Return the JSON-ready content of `manifest.json`."""
    return {"schema_version": manifest.schema_version, "kind": "bundle", "sparsity": None} | write_record(manifest)
