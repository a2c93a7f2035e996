"""A bundle's manifest: what `manifest.json` says, as a type. No other room reads its JSON."""

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

BUNDLE_SCHEMA = 3
MODEL_FILE = "model.onnx"
AGAIN = "Export the bundle again: sparsifiner-edge export STUDENT/ -o BUNDLE/"
_Side = Annotated[int, Meta(ge=1, le=MOST_SIDE)]
_ImageSize = _Side | Annotated[tuple[_Side, ...], Meta(min_length=2, max_length=2)]
"""`bounds.ImageSize`. (msgspec 0.22 crashes on a tuple of fixed length beside a number with limits.)"""


class TensorSpec(msgspec.Struct, frozen=True):
    """An input or output of a model.

    Attributes:
        name: the tensor's name.
        dtype: NumPy's name of the element type, such as "uint8".
        shape: one entry per axis: a size, or the name of a dynamic axis such as "batch", or None for an unnamed one.
    """

    name: str
    dtype: str
    shape: tuple[Annotated[int, Meta(ge=1)] | str | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {shape_text(self.shape)}"


def shape_text(shape: tuple[int | str | None, ...]) -> str:
    """Such as "[batch, 224, 224, 3]"."""
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def tensor_spec(value: Any) -> TensorSpec:
    """Of an input or output in a file (onnx's ValueInfoProto)."""
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


class Preprocessing(msgspec.Struct, frozen=True):
    """What is done to an image before the model, and what the model does itself.

    Attributes:
        size: pixels, one number for a square, else height and width.
        fit: how an image gets there, unless one says otherwise; see `fitting.Framing`.
        folded: what the file does to pixels, where the model does not do it itself.
    """

    size: _ImageSize
    fit: Fit = "crop"
    folded: Normalisation | None = None


class Intended(msgspec.Struct, frozen=True):
    """What a bundle is to be run by, where a caller does not say; see `Execution`."""

    backend: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


class StreamFiles(msgspec.Struct, frozen=True):
    """Files by role, of a bundle that computes of a stream's frames what changed.

    Attributes:
        embedding: what tokens are, and how far they are from what they were. step: chosen tokens through all layers.
        golden: a sequence of frames. read: layers whose outputs what is behind them reads.
    """

    embedding: str = "stream/embedding.onnx"
    step: str = "stream/step.onnx"
    golden: str = "stream/golden.npz"
    read: tuple[Annotated[int, Meta(ge=0)], ...] = ()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle says about itself. Code that needs a missing entry refuses the bundle.

    Attributes:
        files: every file but manifest and signature: name -> SHA-256 in hexadecimal.
        name: of the model, as timm has it. precision: "fp32", "fp16" or "int8"; None: it does not say.
        shape: the sizes that decide costs. ops: operators of the domain `sparsifiner`.
        inputs, outputs: of the model, in its order. Images are "NHWC", 0 to 255, RGB.
        sparsity: None where attention is dense. plan: what each layer does.
        tolerances: output -> greatest difference from golden, relative to its range; more than 1 would pass anything.
        engines: in the order in which they were built. stream: of `export --stream`.
        intended: what is to run it, where that is known.
        user_call: how far from a user's own function: `export --check`.
        check, retiled, quantisation, float16, boards: what export found; float16 decides `float_precision`.
        provenance: where the weights came from, as the student's own file says. tools: package -> version.
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
        """What is not int8 in the file: "fp32", or "fp16" with islands of float32."""
        return "fp16" if self.precision == "fp16" or self.float16 is not None else "fp32"

    @property
    def to_float32(self) -> float | None:
        """Of an int8 file, the least over outputs of their cosines to the float32 file's; None: not said."""
        cosines = self.quantisation and (self.quantisation.own_matches_cosines or self.quantisation.cosines)
        return min(cosines.values()) if cosines else None

    @property
    def batch(self) -> int | None:
        """Images at once; None where that is dynamic, or not said."""
        size = self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else None
        return size if isinstance(size, int) else None


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """The manifest in bytes that were read from `path`.

    Raises:
        ArtifactError: it is not a bundle's manifest, of another version, a field is mistyped, NaN or infinite, or a
            name could lead out of the bundle.
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
    """Names become paths wherever a bundle is read, copied or added to; none may lead out of it.

    Raises:
        ArtifactError: one is absolute, has an empty part, `.` or `..`, a backslash or a character that cannot be shown,
            or is that of the manifest or its signature.
    """
    for name in files:
        parts = name.split("/")
        reserved = parts[0] in (BUNDLE_FILE, SIGNATURE_FILE)
        if reserved or not {"", ".", ".."}.isdisjoint(parts) or not name.isprintable() or "\\" in name:
            fix = "Do not use this bundle: it could lead elsewhere. Export it again."
            raise ArtifactError(f"{folder} names the file {name!r:.200}.", fix)


def manifest_content(manifest: Manifest) -> Any:
    """JSON-ready, as `manifest.json` holds it."""
    return {"schema_version": manifest.schema_version, "kind": "bundle", "sparsity": None} | write_record(manifest)
