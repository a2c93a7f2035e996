"""Request of a search: the bound, the deployments, and the use of the images."""

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
from sparsifiner_edge.images import evenly, list_images
from sparsifiner_edge.optimizer.trial import FIDELITIES
from sparsifiner_edge.pareto import Deployment
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.runtime.backend import ProcessorBackend
from sparsifiner_edge.runtime.open import find_backend

MOST_MS = 1e6
"""Maximum latency bound in milliseconds."""
PRECISIONS = ("fp32", "int8")
"""Weight precisions that are searched on a CPU."""
BOARD_PRECISIONS = ("fp16", "int8")
"""Weight precisions that are searched for a board's GPU."""
LEAST_HELD_OUT = 4
"""Minimum number of held-out images for a check that can be relied on."""
LEAST_IMAGES = 2 * LEAST_HELD_OUT
"""Minimum number of images for a search."""
CHECKED = 5
"""One image in this many is held out for the check, and at least `LEAST_HELD_OUT`."""
MOST_SEARCHED = 24
"""Maximum number of images for the search, evenly taken from a large folder."""
MOST_RESERVED = 12
"""Maximum number of held-out images."""
AT_LEAST = 0.98
"""Default fidelity."""
PROMISING = ("bf16", "auto", "fp16")
"""Compute precisions in the order in which they are tried."""


class Bound(NamedTuple):
    """The minimum fidelity, or the maximum milliseconds."""

    value: float
    by_fidelity: bool = True

    @property
    def text(self) -> str:
        """Text of the bound."""
        return f"fidelity {self.value}" if self.by_fidelity else f"{self.value:.4g} ms"


class SearchRequest(NamedTuple):
    """Request of a search: bound, deployments and images.

    Attributes:
        bound: The bound.
        metric: One of `trial.FIDELITIES`, or a user's own.
        board: Board; None for this machine.
        deployments: Deployments, the most promising first.
        unavailable: Backends that do not run here, with the reason.
        images: Images for calibration and selection.
        reserved: Held-out images for the check of bundles.
        fit: How images are brought to the size.
    """

    bound: Bound
    metric: str
    board: Board | None
    deployments: list[Deployment]
    unavailable: dict[str, str]
    images: list[Path]
    reserved: list[Path]
    fit: Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizeOptions:
    """Options of a search.

    Attributes:
        at_least: Fidelity to keep, in (0, 1); without a bound .98.
        at_most_ms: Latency to keep, in milliseconds; give at most one of the two bounds.
        metric: "patches" or "class": cosine of these tokens; "maps": IoU of a dense map; or your own
            `scoring.TaskMetric` with scores from 0 to 1, as package.module:class.
        backends: CPU backends to consider; empty for all that run here.
        compute_precisions: Arithmetic of everything that is not int8: "auto" (the weight precision), "bf16", "fp16";
            empty for all that run here.
        precisions: Weight precisions; empty for fp32 and int8, or fp16 and int8 on a board's GPU.
        board: A board that is not here: its latency is estimated (see `estimate_bundle`), and only fidelity is
            measured.
        minutes: Hard limit for everything, with the best result so far; Ctrl-C ends the search earlier.
        labels: Class names of the output "logits", in order; empty takes the model's own.
        fit: How images are brought to the size; the bundle stores it.
        teacher: Dense model of a sparse model that was trained.

    Example:
        >>> OptimizeOptions(at_least=0.98, backends=["openvino"], minutes=5).metric
        'patches'
    """

    at_least: float | None = None
    at_most_ms: float | None = None
    metric: str = FIDELITIES[0]
    backends: Sequence[str] = ()
    compute_precisions: Sequence[str] = ()
    precisions: Sequence[str] = ()
    board: str | Path | None = None
    minutes: float = 8.0
    labels: Sequence[str] = ()
    fit: Fit = "crop"
    teacher: str | None = None

    def __post_init__(self) -> None:
        require_fit(self.fit)
        require_lists(
            backends=self.backends,
            compute_precisions=self.compute_precisions,
            precisions=self.precisions,
            labels=self.labels,
        )


def read_request(options: OptimizeOptions, data: str | Path | Sequence[str | Path]) -> SearchRequest:
    """Read and check the request; see `optimize`.

    Raises:
        ConfigError: There are two bounds, a value is out of range, or there are too few images.
        SparsifinerError: A named backend does not run here, or there is no such board.
    """
    least, most_ms, metric, precisions = options.at_least, options.at_most_ms, options.metric, options.precisions
    require(
        least is None or most_ms is None, "Two bounds are given.", "Give either --at-least FIDELITY or --at-most-ms MS."
    )
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
        usable = _deployments_here(options.backends, options.compute_precisions, precisions or known)
        return SearchRequest(bound, metric, None, *usable, *_split(data), options.fit)
    plain = not options.backends and not options.compute_precisions
    require(plain, "A board cannot be combined with a backend or a compute precision.", "Leave one of the two out.")
    stored = precisions or [precision for precision in known if precision in device.peaks]
    require(bool(stored), f"{device.name} does not support {' or '.join(known)}.", "Give --precision fp32.")
    deployments = [Deployment(device.name, precision) for precision in stored]
    return SearchRequest(bound, metric, device, deployments, {}, *_split(data), options.fit)


def _deployments_here(
    backends: Sequence[str], computes: Sequence[str], precisions: Sequence[str]
) -> tuple[list[Deployment], dict[str, str]]:
    """Return the named deployments, or all that run here; and what does not run here, with the reason."""
    usable, unavailable = list[tuple[str, str]](), dict[str, str]()
    for name in backends or ON_PROCESSOR:
        backend = find_backend(Execution(backend=name))
        if name not in ON_PROCESSOR or not isinstance(backend, ProcessorBackend):
            raise ConfigError(f"{name} does not run on the processor.", f"Choose one of: {', '.join(ON_PROCESSOR)}.")
        for computed in computes or backend.compute_precisions:
            try:
                fix = f"Choose one of: {', '.join(backend.compute_precisions)}."
                require(
                    computed in backend.compute_precisions,
                    f"{name} does not support the compute precision {computed}.",
                    fix,
                )
                find_backend(Execution(backend=name, compute_precision=computed)).load()
                usable.append((name, computed))
            except SparsifinerError as error:
                if backends and (computes or computed == "auto"):
                    raise
                unavailable[name if computed == "auto" else f"{name} in {computed}"] = error.what
                if computed == "auto":  # The backend does not run here at all.
                    break
    require(
        bool(usable),
        f"No backend runs here: {' '.join(unavailable.values())}",
        "Leave out --compute-precision if you gave it; otherwise "
        "`sparsifiner-edge doctor` shows how to install a backend.",
    )
    deployments = [Deployment(name, stored, computed) for name, computed in usable for stored in precisions]
    order = sorted(
        deployments,
        key=lambda x: (x.precision != "int8", x.backend != "openvino", PROMISING.index(x.compute_precision)),
    )
    return order, unavailable


def _split(data: str | Path | Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Split the images into those for the search and those held out for the check, always the same for a folder."""
    sources = [data] if isinstance(data, str | Path) else data
    paths = [path for each in sources for path in list_images(Path(each))]
    count_text = f"{', '.join(map(str, sources))[:200]} has {len(paths)} images."
    fix = f"Give {LEAST_IMAGES} or more: {LEAST_HELD_OUT} are held out to check the answer."
    require(len(paths) >= LEAST_IMAGES, count_text, fix)
    shuffled = random.Random(0).sample(paths, len(paths))  # noqa: S311
    reserved = held_out_count(len(paths))
    return evenly(shuffled[reserved:], MOST_SEARCHED), evenly(shuffled[:reserved], MOST_RESERVED)


def held_out_count(images: int) -> int:
    """Return how many of the images are held out."""
    return max(LEAST_HELD_OUT, images // CHECKED)
