"""What a search is to find: the bound, the engines that may meet it, and which of the user's images are for what."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparsifiner_edge.config import require, require_lists
from sparsifiner_edge.errors import ConfigError, SparsifinerError
from sparsifiner_edge.execution import ON_PROCESSOR, Execution
from sparsifiner_edge.fitting import Fit, require_fit
from sparsifiner_edge.front import Deployment
from sparsifiner_edge.images import evenly, list_images
from sparsifiner_edge.optimizer.trial import FIDELITIES
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.runtime.backend import ProcessorBackend
from sparsifiner_edge.runtime.open import find_backend

MOST_MS = 1e6
"""The greatest bound."""
PRECISIONS, BOARD_PRECISIONS = ("fp32", "int8"), ("fp16", "int8")
"""That are searched: here and for a CPU, and for a board's GPU."""
LEAST_IMAGES, CHECKED = 5, 5
"""Fewest images for a search; one in this many is kept back for the check."""
MOST_SEARCHED, MOST_RESERVED = 24, 12
"""Of a large folder, evenly taken."""
AT_LEAST = 0.98
"""Fidelity, where nothing else is asked for."""
PROMISING = ("bf16", "auto", "fp16")
"""Of what is computed in, what is tried first."""


class Bound(NamedTuple):
    """The least fidelity, or the most milliseconds."""

    value: float
    by_fidelity: bool = True

    @property
    def text(self) -> str:
        """For people."""
        return f"fidelity {self.value}" if self.by_fidelity else f"{self.value:.4g} ms"


class SearchRequest(NamedTuple):
    """What is searched for, in which engines, with which images.

    Attributes:
        metric: one of `trial.FIDELITIES`, or a user's own. board: None: this machine.
        unavailable: backends that do not run here, and why.
        images: that predictors and int8 are calibrated with, and that judge. reserved: that bundles are checked with.
        engines: the most promising first.
    """

    bound: Bound
    metric: str
    board: Board | None
    engines: list[Deployment]
    unavailable: dict[str, str]
    images: list[Path]
    reserved: list[Path]
    fit: Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizeOptions:
    """What is searched for, and for how long.

    Attributes:
        at_least: fidelity in (0, 1). at_most_ms: latency. One of them; none: a fidelity of .98.
        metric: "patches" or "class": cosine of these tokens; "maps": IoU of a decoder's map; or a `judge.TaskMetric` of
            yours with scores from 0 to 1, as package.module:class.
        backends: of the processor; computes: what of a file that is not int8 they compute in, of "auto" (as stored),
            "bf16" and "fp16"; none: all that run here.
        precisions: that files store; none: fp32 and int8, or for a board's GPU fp16 and int8.
        board: a board that is not here: its latency is estimated (see `estimate_bundle`), and nothing is measured but
            fidelity.
        labels: of the classes of the output "logits", in their order; none takes those that the model has.
        fit: how images are brought to the size; the bundle remembers it.
        minutes: that all may take, a hard cap; the best that was found by then is there. Ctrl-C is the cap too.

    Example:
        >>> OptimizeOptions(at_least=0.98, backends=["openvino"], minutes=5).metric
        'patches'
    """

    at_least: float | None = None
    at_most_ms: float | None = None
    metric: str = FIDELITIES[0]
    backends: Sequence[str] = ()
    computes: Sequence[str] = ()
    precisions: Sequence[str] = ()
    board: str | Path | None = None
    minutes: float = 8.0
    labels: Sequence[str] = ()
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        require_fit(self.fit)
        require_lists(backends=self.backends, computes=self.computes, precisions=self.precisions, labels=self.labels)


def read_request(options: OptimizeOptions, data: str | Path | Sequence[str | Path]) -> SearchRequest:
    """See `optimize`.

    Raises:
        ConfigError: two bounds, or a value is out of range; too few images.
        SparsifinerError: a backend that was named does not run here; no such board.
    """
    least, most_ms, metric, precisions = options.at_least, options.at_most_ms, options.metric, options.precisions
    require(least is None or most_ms is None, "There are two bounds.", "Give --at-least FIDELITY or --at-most-ms MS.")
    require(options.minutes > 0, f"minutes is {options.minutes}.", "Give more than 0.")
    bound = Bound(AT_LEAST if least is None else least) if most_ms is None else Bound(most_ms, by_fidelity=False)
    if not 0 < bound.value < (1 if bound.by_fidelity else MOST_MS):
        raise ConfigError(f"The bound is {bound.text}.", "Give a fidelity between 0 and 1, or more than 0 ms.")
    fix = f"Give {', '.join(FIDELITIES)}, or your own as package.module:class."
    require(metric in FIDELITIES or ":" in metric, f"metric is {metric!r}.", fix)
    device = None if options.board is None else load_board(options.board)
    known = BOARD_PRECISIONS if device is not None and device.kind == "gpu" else PRECISIONS
    choices = list(dict.fromkeys((*known, "fp32")))
    for precision in precisions:
        require(precision in choices, f"precision is {precision!r}.", f"Choose one of: {', '.join(choices)}.")
    if device is None:
        usable = _engines_here(options.backends, options.computes, precisions or known)
        return SearchRequest(bound, metric, None, *usable, *_split(data), options.fit)
    plain = not options.backends and not options.computes
    require(plain, "A board's latency is estimated for no backend.", "Leave one of the two out.")
    stored = precisions or [precision for precision in known if precision in device.peaks]
    require(bool(stored), f"{device.name} has no arithmetic for {' or '.join(known)}.", "Give --precision fp32.")
    engines = [Deployment(device.name, precision) for precision in stored]
    return SearchRequest(bound, metric, device, engines, {}, *_split(data), options.fit)


def _engines_here(
    backends: Sequence[str], computes: Sequence[str], precisions: Sequence[str]
) -> tuple[list[Deployment], dict[str, str]]:
    """Those that are named, or all that run here; and what does not run here, and why."""
    usable, unavailable = list[tuple[str, str]](), dict[str, str]()
    for name in backends or ON_PROCESSOR:
        backend = find_backend(Execution(backend=name))
        if name not in ON_PROCESSOR or not isinstance(backend, ProcessorBackend):
            raise ConfigError(f"{name} does not run on the processor.", f"Choose one of: {', '.join(ON_PROCESSOR)}.")
        for computed in computes or backend.computes:
            try:
                fix = f"Choose one of: {', '.join(backend.computes)}."
                require(computed in backend.computes, f"{name} computes in no {computed} but what is stored.", fix)
                find_backend(Execution(backend=name, precision=computed)).load()
                usable.append((name, computed))
            except SparsifinerError as error:
                if backends and (computes or computed == "auto"):
                    raise
                unavailable[name if computed == "auto" else f"{name} in {computed}"] = error.what
                if computed == "auto":  # It does not run here at all.
                    break
    require(bool(usable), f"Nothing runs here: {' '.join(unavailable.values())}", "Leave --computes out.")
    engines = [Deployment(name, stored, computed) for name, computed in usable for stored in precisions]
    order = sorted(engines, key=lambda x: (PROMISING.index(x.computes), x.stored != "int8", x.backend != "openvino"))
    return order, unavailable


def _split(data: str | Path | Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Images to search with, and those that are kept back for the check: of a folder always the same."""
    sources = [data] if isinstance(data, str | Path) else data
    paths = [path for each in sources for path in list_images(Path(each))]
    many = f"{', '.join(map(str, sources))[:200]} has {len(paths)} images."
    require(len(paths) >= LEAST_IMAGES, many, f"Give {LEAST_IMAGES} or more: one is kept back for the last check.")
    shuffled = random.Random(0).sample(paths, len(paths))  # noqa: S311
    reserved = max(1, len(paths) // CHECKED)
    return evenly(shuffled[reserved:], MOST_SEARCHED), evenly(shuffled[:reserved], MOST_RESERVED)
