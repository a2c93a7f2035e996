"""The model of a bundle for the image and video commands: checks and opens it, and turns its outputs into records."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.camera.align import Aligned, Aligner
from sparsifiner_edge.camera.answers import Answer, Class, MapSummary
from sparsifiner_edge.errors import ArtifactError, ConfigError, MissingExtraError, SparsifinerError
from sparsifiner_edge.execution import ON_PROCESSOR
from sparsifiner_edge.fitting import Box, Fit, Fitting, Framing
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.runtime import Execution, Session
from sparsifiner_edge.runtime.open import checked_bundle, session_on
from sparsifiner_edge.runtime.session import Runtime
from sparsifiner_edge.runtime.stream import Computed, Stream
from sparsifiner_edge.scoring import THRESHOLD
from sparsifiner_edge.text import finite

_MOST_CHANNELS = 32
"""Most channels of a map without labels; outputs with more channels are features rather than maps."""
_FOLLOW = 0.05
"""Weight of a new frame in the running mean of the features: it forgets a frame in about twenty."""


class Inferred(NamedTuple):
    """Outputs for a frame.

    Attributes:
        outputs: Outputs of the model.
        image: What the model read, uint8 RGB [H,W,3]: the frame, aligned if the camera moves.
        fitting: Geometry between `image` and the frame, if that of the frame was given.
        computed: Kind and share of the update; None without streaming inference.
        motion: What the camera does, one of `align.MOTIONS`; None if that is not looked at.
    """

    outputs: dict[str, Array]
    image: Pixels
    fitting: Fitting | None
    computed: Computed | None = None
    motion: str | None = None


class Model:
    """An open bundle. A context manager.

    Args:
        folder: Folder of the bundle.
        execution: Backend and its settings.
        top: Most classes of a classifier's answer, and most channels of an output that are summarised as maps.
        threshold: Least probability of a class (default: none), and threshold of a map's area (default: one half).
        public_key: File of the key that must have signed the bundle; None requires no signature.
        fit: How frames are brought to the input size, see `Framing`; None uses the bundle's own setting.
        region: Part of each frame that is read, see `Framing`; None for all of it.
        any_outputs: Whether outputs that `answer` cannot summarise give an empty answer instead of an error.

    Attributes:
        framing: How frames become the input of the model.
        labels: Labels of the classes; empty if the bundle has none.
        map_threshold: Threshold of a map's area.
        session: Session that runs the model.
        stream: Streaming inference, once `follow` has started it.
        why_whole: Why the ordinary model runs on every frame although the bundle supports streaming inference;
            otherwise None.
        why_fixed: Why frames are not aligned although `follow` should; otherwise None.

    Raises:
        ConfigError: The bundle takes a fixed batch above 1.
        SparsifinerError: The bundle or backend is unusable.
    """

    def __init__(
        self,
        folder: Path,
        execution: Execution | None = None,
        top: int = 5,
        threshold: float | None = None,
        public_key: Path | None = None,
        fit: Fit | None = None,
        region: Box | None = None,
        any_outputs: bool = False,
    ) -> None:
        bundle = checked_bundle(folder, public_key)
        fit = fit or bundle.require(bundle.manifest.preprocessing, "preprocessing").fit
        self.framing = Framing(bundle.image_size, fit, region)
        self.labels = bundle.labels()
        self._top, self._threshold, self._any_outputs = top, threshold or 0.0, any_outputs
        self.map_threshold = THRESHOLD if threshold is None else threshold
        self._reference: Array | None = None
        self.stream: Stream | None = None
        self.why_whole: str | None = None
        self.why_fixed: str | None = None
        self._aligner: Aligner | None = None
        self._answered: tuple[dict[str, Array], list[dict[str, Array]]] = {}, []
        self.session: Session = session_on(bundle, execution)
        try:
            _require_image(self.session, bundle)
        except SparsifinerError:
            self.session.close()
            raise

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def infer(self, image: Array) -> dict[str, Array]:
        """Return the outputs of the model for one image, uint8 RGB [H,W,3]."""
        return self.session.infer({"image": image[None]})

    def follow(self, at_least: float | None = None, share: float | None = None, stabilise: bool = True) -> None:
        """Start streaming inference: `infer_frame` then processes consecutive frames and recomputes only what changed.

        Does nothing unless the bundle supports it, or one of the arguments requires it. If the backend does not support
        it, sets `why_whole` to a message.

        Args:
            at_least: Target fidelity; see `Session.stream`.
            share: Fixed share of the patches to recompute; see `Session.stream`.
            stabilise: Whether to align frames when the camera moves; see `camera.align`.

        Raises:
            SparsifinerError: An argument is given, and the bundle or the backend does not support streaming inference.
        """
        opened, backend = self.session.opened_as, self.session.backend
        has = opened is not None and opened[0].manifest.stream is not None
        if at_least is not None or share is not None or (has and backend in ON_PROCESSOR):
            self.stream = self.session.stream(at_least, share)
            if stabilise:
                self._align(self.stream)
        elif has:
            self.why_whole = f"{backend} does not support streaming inference: the ordinary model runs on every frame"

    def _align(self, stream: Stream) -> None:
        """Align frames from now on, or say why not."""
        if self.framing.fit == "letterbox":
            self.why_fixed = "frames are not aligned when the camera moves, because of the bars of --fit letterbox"
            return
        try:
            self._aligner = Aligner(height_width(self.framing.size), stream.grid)
        except MissingExtraError as error:
            self.why_fixed = f"frames are not aligned when the camera moves: {error.what} {error.fix}"

    @property
    def runtime(self) -> Runtime:
        """Description of what runs the frames, and why it was chosen."""
        session = self.session.description
        return session if self.stream is None else replace(self.stream.description, chosen=session.chosen)

    def infer_frame(self, image: Pixels, follows: bool = True, fitting: Fitting | None = None) -> Inferred:
        """Return the outputs for one frame, and what was computed of it.

        Args:
            image: The frame, uint8 RGB [H,W,3].
            follows: False if it does not follow the previous frame, which resets the stream.
            fitting: Geometry of the frame.
        """
        if self.stream is None:
            return Inferred(self.infer(image), image, fitting)
        if not follows:
            self.stream.reset()
            if self._aligner is not None:
                self._aligner.reset()
        aligned = Aligned(image, None, (0, 0), None) if self._aligner is None else self._aligner.align(image)
        if fitting is not None and aligned.affine is not None:
            across, down = ((float(a), float(b), float(c)) for a, b, c in aligned.affine)
            fitting = replace(fitting, affine=(across, down))
        outputs = self.stream.infer({"image": aligned.image[None]}, aligned.moved)
        return Inferred(outputs, aligned.image, fitting, self.stream.computed, aligned.motion)

    def answer(self, outputs: dict[str, Array], fitting: Fitting | None = None) -> Answer:
        """Return the answer for one image: `top` of a classifier, otherwise `features`, otherwise `maps`.

        Args:
            outputs: Outputs of the model.
            fitting: Geometry of the image, used to cut bars off maps; None if there are no bars.

        Raises:
            ArtifactError: The bundle has none of these outputs, and `any_outputs` is False.
        """
        if "logits" in outputs:
            logits = outputs["logits"][0].astype(np.float64)
            bad = int(np.count_nonzero(~np.isfinite(logits)))
            return Answer(top=[], not_finite=bad) if bad else Answer(top=self._classes(logits))
        if "features" in outputs:
            features, bad = finite([round(float(x), 6) for x in outputs["features"][0]])
            return Answer(features=features, not_finite=bad or None)
        maps, summaries = self._maps(outputs, fitting), list[MapSummary]()
        self._answered = outputs, maps
        if maps or self._any_outputs:
            bad = sum(int(np.count_nonzero(~np.isfinite(x))) for channels in maps for x in channels.values())
            for channels in [] if bad else maps:
                entries = [_summary(*item, self.map_threshold) for item in channels.items()]
                ordered = entries if len(entries) <= self._top else sorted(entries, key=lambda x: -(x.area or 0))
                summaries += ordered[: self._top]
            return Answer(maps=summaries if maps else None, not_finite=bad or None)
        what = f"The bundle outputs {', '.join(outputs)}; logits, features or a dense map are needed."
        raise ArtifactError(what, "Export it again.")

    def heats(self, outputs: dict[str, Array], fitting: Fitting | None = None) -> list[Array]:
        """Return the maps that an overlay draws into the box, [rows,columns] each.

        These are the maps with values from 0 to 1, except those of a background. If there are none, it is the first
        map, scaled to its own range.
        """
        answered, maps = self._answered
        maps = maps if answered is outputs else self._maps(outputs, fitting)
        heats = {name: np.nan_to_num(x.astype(np.float64)) for channels in maps for name, x in channels.items()}
        shown = [x for name, x in heats.items() if x.min() >= 0 and x.max() <= 1 and not name.endswith(".background")]
        others = [] if shown else list(heats.values())[:1]
        return shown or [(x - x.min()) / max(float(np.ptp(x)), 1e-12) for x in others]

    def frame_answer(self, outputs: dict[str, Array], fitting: Fitting | None = None) -> Answer:
        """Return the answer for a frame; unlike `answer`, with the change of its features.

        The change is 1 - cosine between the features and their running mean over previous frames. It is None if a
        feature is NaN or infinite; such features do not enter the mean, which would never recover.
        """
        answer = self.answer(outputs, fitting)
        if answer.features is None or answer.not_finite:
            return answer
        features = outputs["features"][0].astype(np.float64)
        before = features if self._reference is None else self._reference
        self._reference = before + _FOLLOW * (features - before)
        return replace(answer, change=round(max(0.0, float(1 - cosine(features, before))), 6))

    def _maps(self, outputs: dict[str, Array], fitting: Fitting | None) -> list[dict[str, Array]]:
        """Return the maps of each output that has them, [rows,columns] without bars, by name.

        An output [B,h,w] or [B,C,h,w] is a map if it has the aspect ratio of the input. Each of several channels is one
        map, named after its class if there is a label for each channel. Labelled channels become probabilities by a
        softmax, unless they are between 0 and 1 already.
        """
        maps, (down, across), labels = list[dict[str, Array]](), height_width(self.framing.size), self.labels
        for name, values in outputs.items():
            rows, columns = values.shape[-2:] if values.ndim in (3, 4) else (0, 0)
            # The aspect ratio of the input, as far as rounding to whole rows and columns allows.
            is_map = rows and abs(rows * across - columns * down) <= max(across, down)
            if name == "tokens" or not is_map:
                continue
            x = fitting.cut(values[0]) if fitting else values[0]
            if x.ndim == 2 or len(x) == 1:
                maps.append({name: x.reshape(x.shape[-2:])})
            elif len(labels) == len(x) or len(x) <= _MOST_CHANNELS:
                names = labels if len(labels) == len(x) else range(len(x))
                if names is labels and not (x.min() >= 0 and x.max() <= 1):
                    x = np.exp(x - x.max(0)) / np.exp(x - x.max(0)).sum(0)
                maps.append({f"{name}.{part}": channel for part, channel in zip(names, x, strict=True)})
        return maps

    def _classes(self, logits: Array) -> list[Class]:
        """Return the most probable classes."""
        weights = np.exp(logits - logits.max())
        probabilities = weights / weights.sum()
        best = np.argsort(-probabilities, kind="stable")[: self._top]
        names = self.labels if len(self.labels) == len(logits) else [f"class_{i}" for i in range(len(logits))]
        probable = (i for i in best if probabilities[i] >= self._threshold)
        return [Class(int(i), names[i], float(probabilities[i])) for i in probable]


def _summary(name: str, values: Array, threshold: float) -> MapSummary:
    """Return the summary of one map."""
    x = values.astype(np.float64)
    low, high = float(x.min()), float(x.max())
    area, centroid = None, None
    if low >= 0 and high <= 1:
        rows, columns = np.nonzero(x > threshold)
        area = round(rows.size / x.size, 6)
        if rows.size:
            place = (columns.mean() + 0.5) / x.shape[1], (rows.mean() + 0.5) / x.shape[0]
            centroid = round(float(place[0]), 6), round(float(place[1]), 6)
    mean, low, high = (round(value, 6) for value in (float(x.mean()), low, high))
    return MapSummary(output=name, mean=mean, least=low, greatest=high, area=area, centroid=centroid)


def _require_image(session: Session, bundle: Bundle) -> None:
    """Refuse a model whose input is not one image of the size in its manifest.

    Raises:
        ConfigError: It takes larger batches.
        ArtifactError: It takes other inputs.
    """
    takes, (height, width) = session.inputs[0], height_width(bundle.image_size)
    batch, *rest = takes.shape
    if [len(session.inputs), takes.name, takes.dtype, *rest] != [1, "image", "uint8", height, width, 3]:
        what = f"{bundle.folder} takes {', '.join(f'{spec.name} ({spec})' for spec in session.inputs)}."
        raise ArtifactError(what, f"Export it again: one uint8 image [B, {height}, {width}, 3] is needed.")
    if isinstance(batch, int) and batch != 1:
        raise ConfigError(f"{bundle.folder} takes batches of {batch}.", "Export it with --batch 1 or dynamic.")
