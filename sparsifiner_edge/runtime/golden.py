"""Golden check: a bundle carries a golden pair (inputs and outputs), and a session must reproduce these outputs.

A bundle with a stream also carries a golden sequence of frames, which is checked in the same way.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import AGAIN
from sparsifiner_edge.bundle.store import GOLDEN_FILE, Bundle
from sparsifiner_edge.errors import ArtifactError, GateError
from sparsifiner_edge.metrics import OTHER_TOKENS, POSITIONS, Agreement, agreement, align
from sparsifiner_edge.runtime.backend import Backend
from sparsifiner_edge.runtime.session import Session
from sparsifiner_edge.runtime.stream_files import REFERENCES, TOKENS, Infer, StreamShape, open_stream
from sparsifiner_edge.runtime.stream_state import StreamState
from sparsifiner_edge.text import one_line

SEQUENCE_TOLERANCE = 1e-3
"""Tolerance of a stream's outputs in float32: maximum absolute difference, relative to the output's range.

Streaming inference selects no keys, so rounding cannot change a selection and the differences stay small.
"""
_LEAST_MEAN = 0.99
"""Minimum mean cosine of an output's rows if other tokens merged than in the golden output."""
LEAST_DENSE_COSINE = 0.97
"""Minimum mean cosine of an output's rows between dense attention and the golden output of sparse attention.

The two compute different functions, so the outputs are only required to be similar.
"""
_MOST_BYTES = 1 << 31
"""Maximum size of `golden.npz` in bytes, compressed or uncompressed (2 GiB); it bounds the memory that is used."""
Pair = tuple[dict[str, Array], dict[str, Array]]
"""Golden inputs and golden outputs, each by name."""


def check_golden(session: Session, bundle: Bundle) -> dict[str, dict[str, float]]:
    """Run the bundle's golden inputs and compare every output with the golden output.

    Args:
        session: Session on the bundle, or on an engine built from it.
        bundle: Bundle with the golden pair.

    Returns:
        Figures of the last run by output. `range_relative_error` is the maximum absolute difference divided by the
        range (maximum minus minimum) of the golden output; `tolerance` is the largest value allowed. `share_beyond`,
        the share of elements beyond the tolerance, is present if other tokens merged than in the golden output.
        `mean_cosine` is present if the session computes dense attention in place of sparse attention.

    Raises:
        ArtifactError: `golden.npz` or a tolerance is missing or corrupt.
        GateError: An output is missing, has the wrong shape, or differs by more than its tolerance; the message names
            the worst element.
    """
    inputs, expected = _repeat(read_golden(bundle), session.least_batch)
    report: dict[str, dict[str, float]] = {}
    for _ in range(session.golden_runs):
        report = _check_outputs(session.infer(inputs), dict(expected), session, bundle)
    return report


def check_sequence(bundle: Bundle, backend: Backend) -> str:
    """Run a bundle's golden sequence of frames as a stream and compare the outputs of every frame.

    Returns:
        A summary for users; "" if the bundle has no stream.

    Raises:
        ArtifactError: The golden sequence is missing or malformed.
        GateError: An output of a frame differs by more than the tolerance.
    """
    files, worst = bundle.manifest.stream, 0.0
    if files is None:
        return ""
    with contextlib.closing(open_stream(bundle, backend)) as opened:
        inputs, expected = read_golden(bundle, files.golden)
        stated = bundle.manifest.tolerances.values() if bundle.manifest.precision == "int8" else ()
        least = max(SEQUENCE_TOLERANCE, opened.step.least_tolerance, *stated)
        sequence = _sequence(bundle, inputs, expected, opened.shape)
        frames = play(opened.shape, opened.embedding.infer, opened.run, *sequence)
        for number, outputs in enumerate(frames):
            for name, wanted in expected.items():
                figures = _compare(name, outputs[name], wanted[number], least, 0.0, opened.step)
                worst = max(worst, figures["range_relative_error"])
    return f"; a stream of {len(sequence[0])} frames, within {worst:.1e}"


def _sequence(
    bundle: Bundle, inputs: dict[str, Array], expected: dict[str, Array], shape: StreamShape
) -> tuple[Array, Array]:
    """Return the frames and the recomputed patches of a golden sequence, as `play` takes them.

    Raises:
        ArtifactError: The arrays are not a valid sequence.
    """
    images, patches = inputs.get("image", np.empty(0)), inputs.get("patches", np.empty(0))
    fits = images.ndim == 5 and patches.dtype.kind == "i" and patches.ndim == 2 and len(patches) == len(images) - 1
    fits = fits and bool((np.diff(patches) > 0).all()) and patches.min() >= 0 and patches.max() < shape.patches
    if not fits or any(len(values) != len(images) for values in expected.values()):
        raise ArtifactError(f"The golden sequence of {bundle.folder} is malformed.", AGAIN)
    return images, patches


def _check_outputs(
    outputs: dict[str, Array], expected: dict[str, Array], session: Session, bundle: Bundle
) -> dict[str, dict[str, float]]:
    """Compare the outputs of one run; see `check_golden`."""
    for name, wanted in expected.items():
        if name not in outputs or outputs[name].shape != wanted.shape:
            shape = f"has shape {outputs[name].shape}" if name in outputs else f"is missing from {', '.join(outputs)}"
            raise GateError(f"Output {name!r} {shape}; the golden output has shape {wanted.shape}.", AGAIN)
    if POSITIONS in expected:
        outputs, missing = align(outputs, expected)
        total = expected.pop(POSITIONS).size
        if missing > OTHER_TOKENS * total:
            what = f"{missing} of the {total} tokens kept in the golden output were pruned."
            raise GateError(what, _distrust(session))
    merges = bundle.manifest.plan is not None and any(bundle.manifest.plan.merge)
    report = {}
    for name, wanted in expected.items():
        stated = bundle.require(bundle.manifest.tolerances.get(name), f"the tolerance of {name!r}")
        tolerance = max(stated, session.least_tolerance)
        report[name] = _compare(name, outputs[name], wanted, tolerance, OTHER_TOKENS if merges else 0.0, session)
    return report


def play(shape: StreamShape, embed: Infer, step: Infer, images: Array, patches: Array) -> Iterator[dict[str, Array]]:
    """Run a golden sequence and yield the outputs of each frame.

    The first frame is a full frame. Each later frame is an incremental update of its row of `patches`.

    Args:
        shape: Sizes of the stream's state.
        embed: Runs the embedding file.
        step: Runs the step file.
        images: Frames, uint8 [F,1,H,W,3].
        patches: Ascending patch indices to recompute in all frames but the first, [F-1,n].

    Yields:
        The outputs of a frame by name.
    """
    state = StreamState(shape)
    for number, image in enumerate(images):
        tokens = embed({"image": image, REFERENCES: state.references})[TOKENS]
        yield state.step(step, image, tokens, patches[number - 1] if number else None)


def read_golden(bundle: Bundle, name: str = GOLDEN_FILE) -> Pair:
    """Read the golden inputs and outputs of a bundle.

    Args:
        bundle: Bundle to read from.
        name: Path of the archive within the bundle.

    Returns:
        Nonempty numeric arrays by the model's names: inputs and outputs.

    Raises:
        ArtifactError: The file is missing, altered, too large when uncompressed, or not an archive of such arrays.
    """
    path, content = bundle.folder / name, bundle.read(name, _MOST_BYTES)
    try:
        arrays = _unpack(content)
    # zipfile, zlib and NumPy's header parser each raise exceptions of their own.
    except Exception as error:
        raise ArtifactError(f"{path} cannot be read: {one_line(error, 200)}.", AGAIN) from error
    wrong = [key for key, value in arrays.items() if value.dtype.kind not in "fiub" or not value.size or not value.ndim]
    if wrong:
        value = arrays[wrong[0]]
        raise ArtifactError(
            f"{path} holds {wrong[0]!r} of type {value.dtype} and shape {list(value.shape)}.",
            "Export the bundle again: golden arrays are numbers, batch first.",
        )
    inputs, outputs = (
        {key.removeprefix(side): value for key, value in arrays.items() if key.startswith(side)}
        for side in ("input.", "output.")
    )
    if not inputs or not outputs:
        raise ArtifactError(f"{path} holds no golden inputs or no golden outputs.", AGAIN)
    return inputs, outputs


def _unpack(content: bytes) -> dict[str, Array]:
    """Return the arrays of an npz archive, within the limit of `_MOST_BYTES`."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > _MOST_BYTES:  # A small archive may expand to more than the memory holds.
        raise ValueError(f"it unpacks to {size} bytes")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {key: np.asarray(file[key]) for key in file.files}


def _repeat(pair: Pair, least: int) -> Pair:
    """Repeat a golden pair along the batch axis until the batch has at least `least` images."""
    times = max(1, math.ceil(least / min(map(len, pair[0].values()))))
    inputs, outputs = ({k: np.concatenate([v] * times) for k, v in arrays.items()} for arrays in pair)
    return inputs, outputs


def _compare(
    name: str, got: Array, wanted: Array, tolerance: float, beyond: float, session: Session
) -> dict[str, float]:
    """Compare one output with the golden output and return its figures; see `check_golden`.

    Args:
        name: Name of the output.
        got: Output of the session.
        wanted: Golden output.
        tolerance: Maximum difference, relative to the range of `wanted`.
        beyond: Share of elements that may exceed the tolerance. It is above 0 in models that merge tokens, since
            either of two equally similar tokens may merge.
        session: Session that computed the output.

    Raises:
        GateError: The output differs too much.
    """
    result = agreement(name, got, wanted, tolerance)
    figures = {"range_relative_error": result.error, "tolerance": tolerance}
    if session.in_place_of_sparse:
        if not result.mean >= LEAST_DENSE_COSINE:  # `not >=` also catches NaN.
            raise GateError(
                f"Output {name!r} of dense attention has mean cosine {result.mean:.4f} to the golden output of the "
                f"sparse model; the minimum is {LEAST_DENSE_COSINE}.",
                "For dense attention export with --keep 1, or export the dense model.",
            )
        return figures | {"mean_cosine": result.mean}
    if is_beyond(result, tolerance, beyond):
        raise GateError(
            f"Output {name!r} differs from golden by {result.error:.3g} of its range (tolerance {tolerance:.3g}); "
            f"worst at {list(result.worst)}: {result.got:.9g} instead of {result.expected:.9g}.",
            _distrust(session),
        )
    return figures | ({"share_beyond": result.beyond} if result.error > tolerance else {})


def is_beyond(result: Agreement, tolerance: float, share: float) -> bool:
    """Return True if an output differs too much from its reference.

    Args:
        result: Comparison of the output with the reference.
        tolerance: Maximum difference, relative to the range of the reference.
        share: Share of elements that may exceed the tolerance, if the mean cosine is high enough.
    """
    return result.error > tolerance and not (result.beyond <= share and result.mean >= _LEAST_MEAN)


def _distrust(session: Session) -> str:
    """Return the advice for a session whose outputs are wrong."""
    return f"Do not trust {session.backend} with this bundle on this machine; export it again or report it."


def beyond_text(figures: dict[str, float]) -> str:
    """Return a note, for users, on an output that passed although it exceeds its tolerance; "" for other outputs.

    Args:
        figures: Figures of one output, from `check_golden`.
    """
    if "mean_cosine" in figures:
        return f" (dense attention: cosine {figures['mean_cosine']:.4f})"
    share = figures.get("share_beyond", 0.0)
    return f" ({share:.2%} of the elements exceed it, because other tokens merged; this is allowed)" if share else ""
