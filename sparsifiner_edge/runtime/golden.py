"""The golden check: a bundle carries one input and its output; a session must give that output."""

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
from sparsifiner_edge.runtime.stream import REFERENCES, TOKENS, Infer, StreamShape, StreamState, open_stream
from sparsifiner_edge.text import one_line

SEQUENCE_TOLERANCE = 1e-3
"""Greatest difference of a stream's outputs from golden ones, of their range, in float32: nothing is selected there."""
_LEAST_MEAN = 0.99
"""Mean cosine of the rows of an output where some tokens that merge are others."""
LEAST_DENSE_COSINE = 0.97
"""Mean cosine of the rows of an output that dense attention gives in the place of sparse."""
_MOST_BYTES = 1 << 31
"""Of the golden pair, packed or not."""
Pair = tuple[dict[str, Array], dict[str, Array]]


def check_golden(session: Session, bundle: Bundle) -> dict[str, dict[str, float]]:
    """Run the bundle's golden input and compare every golden output.

    Args:
        session: open on the bundle, or on an engine made of it.

    Returns:
        Per output, of the last run: `range_relative_error` (the greatest difference over the output's range: its
        maximum minus its minimum) and `tolerance` (the largest `range_relative_error` allowed); where a bundle merges
        tokens and some of them are others, `share_beyond`, of the elements beyond tolerance; of dense attention
        `mean_cosine`.

    Raises:
        ArtifactError: `golden.npz` or a tolerance is missing or corrupt.
        GateError: an output is missing, has another shape, or differs beyond its tolerance; the worst element is named.
    """
    inputs, expected = _repeat(read_golden(bundle), session.least_batch)
    report: dict[str, dict[str, float]] = {}
    for _ in range(session.golden_runs):
        report = _check_outputs(session.infer(inputs), dict(expected), session, bundle)
    return report


def check_sequence(bundle: Bundle, backend: Backend) -> str:
    """Run a bundle's golden sequence of frames as a stream; what was found, for people: "" where it has none.

    Raises:
        ArtifactError, GateError: see `check_golden`, of any frame.
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
    """Images and patches of a golden sequence.

    Raises:
        ArtifactError: they are none.
    """
    images, patches = inputs.get("image", np.empty(0)), inputs.get("patches", np.empty(0))
    fits = images.ndim == 5 and patches.dtype.kind == "i" and patches.ndim == 2 and len(patches) == len(images) - 1
    fits = fits and bool((np.diff(patches) > 0).all()) and patches.min() >= 0 and patches.max() < shape.patches
    if not fits or any(len(values) != len(images) for values in expected.values()):
        raise ArtifactError(f"{bundle.folder} has a golden sequence that is none.", AGAIN)
    return images, patches


def _check_outputs(
    outputs: dict[str, Array], expected: dict[str, Array], session: Session, bundle: Bundle
) -> dict[str, dict[str, float]]:
    """See `check_golden`, of one run."""
    for name, wanted in expected.items():
        if name not in outputs or outputs[name].shape != wanted.shape:
            shape = f"has shape {outputs[name].shape}" if name in outputs else f"is missing from {', '.join(outputs)}"
            raise GateError(f"Output {name!r} {shape}; golden is {wanted.shape}.", AGAIN)
    if POSITIONS in expected:
        outputs, missing = align(outputs, expected)
        total = expected.pop(POSITIONS).size
        if missing > OTHER_TOKENS * total:
            raise GateError(f"{missing} of {total} tokens that golden keeps are pruned.", _distrust(session))
    merges = bundle.manifest.plan is not None and any(bundle.manifest.plan.merge)
    report = {}
    for name, wanted in expected.items():
        stated = bundle.require(bundle.manifest.tolerances.get(name), f"the tolerance of {name!r}")
        tolerance = max(stated, session.least_tolerance)
        report[name] = _compare(name, outputs[name], wanted, tolerance, OTHER_TOKENS if merges else 0.0, session)
    return report


def play(shape: StreamShape, embed: Infer, step: Infer, images: Array, patches: Array) -> Iterator[dict[str, Array]]:
    """The outputs of each frame of a golden sequence, [F,1,H,W,3]: the first is computed whole, of the others these
    patches, [F-1,n].
    """
    state = StreamState(shape)
    for number, image in enumerate(images):
        tokens = embed({"image": image, REFERENCES: state.references})[TOKENS]
        yield state.step(step, image, tokens, patches[number - 1] if number else None)


def read_golden(bundle: Bundle, name: str = GOLDEN_FILE) -> Pair:
    """Golden inputs and outputs of a bundle, by the model's names: arrays of numbers, none of them empty.

    Raises:
        ArtifactError: missing, altered, too large once unpacked, or no archive of arrays.
    """
    path, content = bundle.folder / name, bundle.read(name, _MOST_BYTES)
    try:
        arrays = _unpack(content)
    # An archive is read by zipfile, zlib and NumPy's own parser, which evaluates a header: each has errors of its own.
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
        raise ArtifactError(f"{path} holds no golden input or no output.", AGAIN)
    return inputs, outputs


def _unpack(content: bytes) -> dict[str, Array]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > _MOST_BYTES:  # Some bytes may unpack to more than memory holds.
        raise ValueError(f"it unpacks to {size} bytes")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {key: np.asarray(file[key]) for key in file.files}


def _repeat(pair: Pair, least: int) -> Pair:
    times = max(1, math.ceil(least / min(map(len, pair[0].values()))))
    inputs, outputs = ({k: np.concatenate([v] * times) for k, v in arrays.items()} for arrays in pair)
    return inputs, outputs


def _compare(
    name: str, got: Array, wanted: Array, tolerance: float, beyond: float, session: Session
) -> dict[str, float]:
    """`beyond`: share of the elements that may lie beyond the tolerance: of two tokens as close, either may merge."""
    result = agreement(name, got, wanted, tolerance)
    figures = {"range_relative_error": result.error, "tolerance": tolerance}
    if session.in_place_of_sparse:
        if not result.mean >= LEAST_DENSE_COSINE:  # Written so that NaN fails.
            raise GateError(
                f"Output {name!r} of dense attention has mean cosine {result.mean:.4f} to golden, which is of the "
                f"student; allowed {LEAST_DENSE_COSINE}.",
                "For dense attention export with --keep 1, or the dense model in its place.",
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
    """Whether an output is another than golden; share: of its elements, what may lie beyond the tolerance."""
    return result.error > tolerance and not (result.beyond <= share and result.mean >= _LEAST_MEAN)


def _distrust(session: Session) -> str:
    return f"Do not trust {session.backend} with this bundle on this machine; export it again or report it."


def beyond_text(figures: dict[str, float]) -> str:
    """What of an output lies beyond its tolerance, which a bundle that merges may have: " (.3 % ...)" or ""; of dense
    attention its cosine.
    """
    if "mean_cosine" in figures:
        return f" (dense attention: cosine {figures['mean_cosine']:.4f})"
    share = figures.get("share_beyond", 0.0)
    return f" ({share:.2%} of it beyond: other tokens merged)" if share else ""
