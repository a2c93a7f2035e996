"""A bundle as the camera's commands use it: checked, opened, and its outputs as records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec.structs import replace

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.camera.answers import Answer, Class, MapSummary
from sparsifiner_edge.errors import ArtifactError, ConfigError, SparsifinerError
from sparsifiner_edge.execution import ON_PROCESSOR
from sparsifiner_edge.fitting import Box, Fit, Fitting, Framing
from sparsifiner_edge.judge import THRESHOLD
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.runtime import Execution, Session
from sparsifiner_edge.runtime.open import checked_bundle, session_on
from sparsifiner_edge.runtime.session import Runtime
from sparsifiner_edge.runtime.stream import Computed, Stream
from sparsifiner_edge.text import finite

_MOST_CHANNELS = 32
"""Of a map whose channels have no labels; more are features."""
_FOLLOW = 0.05
"""How far the reference that a change is measured against moves with each frame: it forgets in some twenty."""


class Model:
    """A bundle, open. A context manager.

    Args:
        folder: the bundle.
        execution: how it is run.
        top: most classes of a classifier's answer, and channels of an output that is told as maps.
        threshold: classes less probable are left out; None: none are; and what is less of a map, None: one half.
        public_key: file of the key that must have signed the bundle; None: no signature is required.
        fit, region: how frames are brought to its size, see `Framing`; a fit of None: as the bundle says.
        any_outputs: whether outputs that `answer` cannot say in a record make an empty one.

    Raises:
        ConfigError: the bundle takes a fixed batch above 1.
        SparsifinerError: the bundle or backend is unusable.
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
        self.whole: str | None = None
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
        """The model's own outputs for one image, uint8 [H,W,3]."""
        return self.session.infer({"image": image[None]})

    def follow(self, at_least: float | None = None, share: float | None = None) -> None:
        """From now on `infer_frame` is given frames of one stream, and computes of them what changed, where the bundle
        has what that takes, or one of these is asked for: see `Session.stream`. Where a backend runs none, `whole` says
        so.
        """
        opened, backend = self.session.opened_as, self.session.backend
        has = opened is not None and opened[0].manifest.stream is not None
        if at_least is not None or share is not None or (has and backend in ON_PROCESSOR):
            self.stream = self.session.stream(at_least, share)
        elif has:
            self.whole = f"{backend} runs no stream: every frame is computed whole"

    @property
    def runtime(self) -> Runtime:
        """What really runs frames, and why it was chosen."""
        session = self.session.description
        return session if self.stream is None else replace(self.stream.description, chosen=session.chosen)

    def infer_frame(self, image: Array, follows: bool = True) -> tuple[dict[str, Array], Computed | None]:
        """As `infer`, and what of the frame was computed; None: all of it. follows: the one before, as its next."""
        if self.stream is None:
            return self.infer(image), None
        if not follows:
            self.stream.reset()
        return self.stream.infer({"image": image[None]}), self.stream.computed

    def answer(self, outputs: dict[str, Array], fitting: Fitting | None = None) -> Answer:
        """`top` of a classifier, else `features`, else `maps`, of an image that was fitted; None: without bars.

        Raises:
            ArtifactError: the bundle gives none of them.
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
        what = f"The bundle gives {', '.join(outputs)}; needed are logits, features or a dense map."
        raise ArtifactError(what, "Export it again.")

    def heats(self, outputs: dict[str, Array], fitting: Fitting | None = None) -> list[Array]:
        """What an overlay shows where in the box, [rows, columns] each: maps from 0 to 1, but of a background; where
        there is none the first map, by its own range.
        """
        answered, maps = self._answered
        maps = maps if answered is outputs else self._maps(outputs, fitting)
        heats = {name: np.nan_to_num(x.astype(np.float64)) for channels in maps for name, x in channels.items()}
        shown = [x for name, x in heats.items() if x.min() >= 0 and x.max() <= 1 and not name.endswith(".background")]
        others = [] if shown else list(heats.values())[:1]
        return shown or [(x - x.min()) / max(float(np.ptp(x)), 1e-12) for x in others]

    def frame_answer(self, outputs: dict[str, Array], fitting: Fitting | None = None) -> Answer:
        """As `answer`, of a frame; of features also how far they are from the frames' before: 1 - cosine to a mean
        that forgets, not where one is NaN or infinite, which the mean would never forget.
        """
        answer = self.answer(outputs, fitting)
        if answer.features is None or answer.not_finite:
            return answer
        features = outputs["features"][0].astype(np.float64)
        before = features if self._reference is None else self._reference
        self._reference = before + _FOLLOW * (features - before)
        return replace(answer, change=round(max(0.0, float(1 - cosine(features, before))), 6))

    def _maps(self, outputs: dict[str, Array], fitting: Fitting | None) -> list[dict[str, Array]]:
        """Of each output that is one, [B,h,w] or [B,C,h,w] in the input's shape: its maps, [rows, columns], without
        bars. Of several channels each is one, with the label of its class where there is one for each; these become
        probabilities if they are none.
        """
        maps, (down, across), labels = list[dict[str, Array]](), height_width(self.framing.size), self.labels
        for name, values in outputs.items():
            rows, columns = values.shape[-2:] if values.ndim in (3, 4) else (0, 0)
            whole = rows and abs(rows * across - columns * down) <= max(across, down)  # As whole cells allow.
            if name == "tokens" or not whole:
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
        weights = np.exp(logits - logits.max())
        probabilities = weights / weights.sum()
        best = np.argsort(-probabilities, kind="stable")[: self._top]
        names = self.labels if len(self.labels) == len(logits) else [f"class_{i}" for i in range(len(logits))]
        probable = (i for i in best if probabilities[i] >= self._threshold)
        return [Class(int(i), names[i], float(probabilities[i])) for i in probable]


def _summary(name: str, values: Array, threshold: float) -> MapSummary:
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
    """Refuse a model that takes something else than one image of the size that its manifest says.

    Raises:
        ConfigError: it takes larger batches.
        ArtifactError: it takes something else.
    """
    takes, (height, width) = session.inputs[0], height_width(bundle.image_size)
    batch, *rest = takes.shape
    if [len(session.inputs), takes.name, takes.dtype, *rest] != [1, "image", "uint8", height, width, 3]:
        what = f"{bundle.folder} takes {', '.join(f'{spec.name} ({spec})' for spec in session.inputs)}."
        raise ArtifactError(what, f"Export it again: one uint8 image [B, {height}, {width}, 3] is needed.")
    if isinstance(batch, int) and batch != 1:
        raise ConfigError(f"{bundle.folder} takes batches of {batch}.", "Export it with --batch 1 or dynamic.")
