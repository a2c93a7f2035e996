"""Result files and manifests as the page needs them: sides with their figures, accuracies, and what was sparse."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.artifacts import BUNDLE_FILE, sha256
from sparsifiner_edge.bundle.manifest import Manifest, parse_manifest
from sparsifiner_edge.bundle.store import bundle_hash, read_manifest
from sparsifiner_edge.errors import ArtifactError, ConfigError, SparsifinerError
from sparsifiner_edge.report.values import GREATEST, LEAST, clean, get, mapping, rows
from sparsifiner_edge.results import Result, read_result

PROGRAM = "sparsifiner-edge"
MEASURED = ("profile", "comparison")
SWEEP = "sweep"
Samples = np.ndarray[Any, np.dtype[np.float64]]


class Source(NamedTuple):
    """One result file.

    Attributes:
        command: what made it, as one would type it.
    """

    path: Path
    sha256: str
    kind: str
    command: str
    result: Result

    @property
    def about(self) -> str:
        """The file's name, as the page shows it."""
        return clean(self.path.name)


class Side(NamedTuple):
    """One bundle in one result.

    Attributes:
        sha: hash that names the bundle. label: a name that no other bundle on the page has.
        role: "subject", "against", or `SWEEP`. figures: its part of `statistics`.
        samples: latencies in ms, empty where there are none.
        runtime: backend, precision and threads. estimated: computed, not measured.
    """

    source: Source
    role: str
    sha: str
    label: str
    place: str
    figures: Any
    samples: Samples
    runtime: Any
    estimated: bool


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Read results, each file once.

    Raises:
        ArtifactError: a file is no result, of a newer schema, or holds NaN or infinity.
        ConfigError: no file.
    """
    if not paths:
        raise ConfigError("There is no result to report.", "Give files that profile or evaluate wrote with -o.")
    sources: dict[str, Source] = {}
    for path in paths:
        if path.is_dir():
            raise ArtifactError(f"{path} is a folder.", "Give the result files in it; bundles go with --bundle.")
        result = read_result(path)
        digest = sha256(path)
        sources.setdefault(digest, Source(path, digest, result.kind, _command(result.command), result))
    return list(sources.values())


def _command(arguments: Sequence[Any]) -> str:
    """The command line of a result, with this package's program for whatever file started it."""
    first, *rest = [clean(argument, 500) for argument in arguments] or [""]
    if Path(first).name in ("__main__.py", PROGRAM):
        first = PROGRAM
    elif first.endswith(".py"):
        return shlex.join(["python", first, *rest])
    return shlex.join([first, *rest])


def sides_of(sources: Sequence[Source]) -> list[Side]:
    """The bundles that results measured or estimated, in the order given; labels tell them apart."""
    found = [side for source in sources for side in _sides(source)]
    names = _labels(found)
    again = Counter((side.sha, side.estimated, side.role == SWEEP) for side in found)
    return [
        side._replace(
            label=names[side.sha]
            + (f" · {side.source.about}" if again[side.sha, side.estimated, side.role == SWEEP] > 1 else "")
        )
        for side in found
    ]


def _sides(source: Source) -> list[Side]:
    sides = []
    for position, subject in enumerate(source.result.subjects):
        role = subject.role or ("subject" if position == 0 else "")
        figures = _figures(source, role if position or source.kind in MEASURED else source.kind)
        if figures:
            runtime = mapping(source.result.method, "runtime", role)
            samples = _samples(get(source.result.samples, role, "latency_ms"))
            name, place = clean(subject.name or Path(str(subject.path)).name), str(subject.path)
            shown = SWEEP if source.kind == SWEEP else role
            estimated = source.kind == "estimate"
            sides.append(Side(source, shown, str(subject.sha256), name, place, figures, samples, runtime, estimated))
    return sides


def _figures(source: Source, part: str) -> Mapping[str, Any]:
    """A role's statistics; of an estimate all, and of a sweep its rows, for the first subject."""
    statistics = source.result.statistics
    if part == source.kind:
        known = part == "estimate" or (part == SWEEP and rows(statistics, SWEEP))
        return statistics if known else {}
    return mapping(statistics, part) if source.kind in MEASURED else {}


def _samples(content: Any) -> Samples:
    """Latencies in ms; a result whose samples are no positive numbers of a believable size has none."""
    believable = isinstance(content, list) and all(type(x) in (int, float) and LEAST <= x <= GREATEST for x in content)
    return np.asarray(content if believable else [], dtype=np.float64)


def _labels(sides: Sequence[Side]) -> dict[str, str]:
    """Hash -> name: the model's, else the folder's, else with the hash's beginning."""
    places = {side.sha: side for side in sides}
    for choose in (lambda s: s.label, lambda s: clean(Path(s.place).name or s.place)):
        names = {sha: choose(side) for sha, side in places.items()}
        if len(set(names.values())) == len(names):
            return names
    return {sha: f"{name} #{sha[:6]}" for sha, name in names.items()}


class Accuracy(NamedTuple):
    """How one subject of an evaluation did.

    Attributes:
        task: what was asked, in a text that equals another's when both are comparable.
        metric: "cosine" or what the method says. sha: of the subject.
        figures: name -> a part of `statistics`. role: "subject" or "teacher".
    """

    source: Source
    role: str
    sha: str
    label: str
    place: str
    metric: str
    task: str
    figures: Any
    runtime: Any


_COSINES = ("features_cosine", "patches_cosine")


def accuracies_of(sources: Sequence[Source], sides: Sequence[Side]) -> list[Accuracy]:
    """Accuracies in results of kind "evaluation"; a bundle that was also profiled has the name that it has there."""
    names = {side.sha: side.label.partition(" · ")[0] for side in sides}
    found = []
    for source in sources:
        statistics, method = source.result.statistics, source.result.method
        if source.kind != "evaluation":
            continue
        cosine = {name: statistics[name] for name in _COSINES if get(statistics, name, "mean") is not None}
        percent = "subject_percent" in statistics
        for subject in source.result.subjects:
            role = subject.role or ""
            if (percent or cosine) and role in ("subject", "teacher"):
                sha, place = str(subject.sha256), str(subject.path)
                label = names.get(sha, clean(subject.name or Path(place).name))
                metric = "cosine" if cosine else clean(method.get("metric", ""))
                runtime = mapping(method, "runtime", role)
                figures = cosine or statistics
                found.append(Accuracy(source, role, sha, label, place, metric, _task(method), figures, runtime))
    return found


def _task(method: Any) -> str:
    """What decides whether two accuracies can stand side by side."""
    return repr([method.get(name) for name in ("metric", "queries", "gallery", "pictures", "preprocessing", "classes")])


class Described(NamedTuple):
    """A bundle's manifest and the label of its side."""

    label: str
    sha: str
    manifest: Manifest


def manifests_of(sides: Sequence[Side], folders: Sequence[Path]) -> list[Described]:
    """Manifests of the bundles measured: of `folders`, and of those that still lie where the result says, unchanged.

    Raises:
        ArtifactError: a folder given is no bundle.
        ConfigError: a folder given is in none of the results.
    """
    known = {side.sha: side.label.partition(" · ")[0] for side in sides}
    found: dict[str, Described] = {}
    for folder in folders:
        manifest, digest = _manifest(folder), bundle_hash(folder)
        if digest not in known:
            raise ConfigError(f"{folder} was measured by none of the results.", "Leave it out, or add its profile.")
        found[digest] = Described(known[digest], digest, manifest)
    for side in sides:
        folder = Path(side.place)
        try:
            if side.sha not in found and "\0" not in side.place and bundle_hash(folder) == side.sha:
                found[side.sha] = Described(known[side.sha], side.sha, _manifest(folder))
        except (OSError, SparsifinerError):  # Moved or made anew since: the page says that it is not at hand.
            continue
    return [found[sha] for sha in known if sha in found]


def _manifest(folder: Path) -> Manifest:
    """A bundle's manifest; that its files are as it says is of no matter to a page."""
    return parse_manifest(read_manifest(folder), folder / BUNDLE_FILE)


def layers_of(side: Side) -> list[Mapping[str, Any]]:
    """Timed layers of a side, in the order of the file."""
    return rows(side.figures, "layers")
