"""What is asked of a search: the bound, engines that may meet it, and which of the user's images are for what."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparsifiner_edge.errors import ConfigError, MissingExtraError, SparsifinerError
from sparsifiner_edge.execution import ON_PROCESSOR, Execution
from sparsifiner_edge.images import evenly, list_images
from sparsifiner_edge.judge import MAPS
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.runtime.processor import ProcessorBackend
from sparsifiner_edge.search.explore import Bound
from sparsifiner_edge.search.judge import FIDELITIES
from sparsifiner_edge.search.latency import Deployment

MOST_ASKED = 1e6
"""Milliseconds."""
PRECISIONS, BOARD_PRECISIONS = ("fp32", "int8"), ("fp16", "int8")
"""That are searched: here and for a CPU, and for a board's GPU."""
COMPUTES = ("auto", "bf16", "fp16")
"""What of a file that is not int8 is computed in, here: auto is as it is stored."""
Runs = tuple[Sequence[str], Sequence[str], Sequence[str]]
LEAST_IMAGES, CHECKED = 5, 5
"""Images that a search takes at least; one of so many is kept for the check."""
LEAST_TRIED, MOST_TRIED, PATCHES = 6, 24, 16_000
"""Images that plans are judged by: of large ones fewer, so that they have about so many patches together."""


class ImageSplit(NamedTuple):
    """searched: what predictors and int8 are calibrated with; tried: of those, what plans are judged by; checked: of
    no use before the last check.
    """

    searched: list[Path]
    tried: list[Path]
    checked: list[Path]


class Asked(NamedTuple):
    """What is searched for, in which engines, on which images; left_out: backends that do not run here, and why."""

    bound: Bound
    metric: str
    task: str | None
    seed: int
    board: Board | None
    engines: list[Deployment]
    left_out: dict[str, str]
    images: ImageSplit

    def judged_by(self, patches: int) -> Asked:
        """The same, with the images that judge plans of a model that makes so many patches of one."""
        count = min(MOST_TRIED, max(LEAST_TRIED, PATCHES // patches))
        return self._replace(images=self.images._replace(tried=evenly(self.images.searched, count)))


def what_is_asked(
    bound: Bound, metric: str, task: str | None, runs: Runs, board: str | Path | None, data: str | Path, seed: int
) -> Asked:
    """See `search_model`; runs: its backends, computes, precisions.

    Raises:
        ConfigError: not one bound, or a value is out of range; too few images.
        SparsifinerError: a backend that was named does not run here; no such board.
    """
    _require_one(bound)
    if metric not in FIDELITIES:
        raise ConfigError(f"metric is {metric!r}.", f"Choose one of: {', '.join(FIDELITIES)}.")
    if task is not None and metric != "task":
        raise ConfigError(f"--task goes with --metric task, not {metric}.", "Leave one of the two out.")
    device = None if board is None else load_board(board)
    engines, left_out = _engines(runs, device)
    return Asked(bound, metric, None if task == MAPS else task, seed, device, engines, left_out, _split(data, seed))


def _require_one(bound: Bound) -> None:
    if (bound.at_least is None) == (bound.at_most_ms is None):
        raise ConfigError("A search needs one bound.", "Give --at-least FIDELITY or --at-most-ms MS.")
    if bound.at_least is not None and not 0 < bound.at_least < 1:
        raise ConfigError(f"at least is {bound.at_least}.", "Give a fidelity between 0 and 1, such as 0.98.")
    if bound.at_most_ms is not None and not 0 < bound.at_most_ms < MOST_ASKED:
        raise ConfigError(f"at most is {bound.at_most_ms} ms.", "Give more than 0, and less than a million.")


def _engines(runs: Runs, board: Board | None) -> tuple[list[Deployment], dict[str, str]]:
    """Those asked for, or all that run here, or the board; and what does not run here, and why."""
    backends, computes, precisions = runs
    gpu = board is not None and board.kind == "gpu"
    known = BOARD_PRECISIONS if gpu else PRECISIONS
    for precision in precisions:
        if precision not in (*known, "fp32"):
            raise ConfigError(
                f"precision is {precision!r}.", f"Choose of: {', '.join(dict.fromkeys((*known, 'fp32')))}."
            )
    if board is not None:
        if backends or computes:
            raise ConfigError("A board's latency is estimated for no backend.", "Leave one of the two out.")
        chosen = precisions or [precision for precision in known if board.has_peak(precision)]
        return [Deployment(board.name, precision) for precision in chosen], {}
    found, left_out = list[tuple[str, str]](), dict[str, str]()
    for name in backends or ON_PROCESSOR:
        backend = find_backend(Execution(backend=name))
        if not isinstance(backend, ProcessorBackend):
            raise ConfigError(f"{name} does not run on the processor.", f"Choose of: {', '.join(ON_PROCESSOR)}.")
        for computed in computes or backend.computes:
            try:
                _require_computed(backend, computed)
                found.append((name, computed))
            except SparsifinerError as error:
                if backends and (computes or computed == "auto"):
                    raise
                left_out[name if computed == "auto" else f"{name} in {computed}"] = error.what
                if isinstance(error, MissingExtraError):
                    break
    if not found:
        raise ConfigError(f"Nothing runs here: {' '.join(left_out.values())}", "Leave --computes out.")
    return [Deployment(name, stored, used) for name, used in found for stored in precisions or PRECISIONS], left_out


def _require_computed(backend: ProcessorBackend, precision: str) -> None:
    """Refuse a precision that a backend does not compute in here."""
    if precision not in backend.computes:
        raise ConfigError(
            f"{backend.name} computes in no {precision} but what a file stores.", f"Choose of: {', '.join(COMPUTES)}."
        )
    find_backend(Execution(backend=backend.name, precision=precision)).load()


def _split(data: str | Path, seed: int) -> ImageSplit:
    paths = list_images(Path(data))
    if len(paths) < LEAST_IMAGES:
        raise ConfigError(
            f"{data} has {len(paths)} images.", f"Give at least {LEAST_IMAGES}: one is kept for the last check."
        )
    shuffled = random.Random(seed).sample(paths, len(paths))  # noqa: S311
    count = max(1, len(paths) // CHECKED)
    return ImageSplit(sorted(shuffled[count:]), [], sorted(shuffled[:count]))
