"""Result files and manifests as the page needs them: sides with their figures, accuracies, and what was sparse."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.artifacts import BUNDLE_FILE, sha256
from sparsifiner_edge.bundle.manifest import Manifest, parse_manifest
from sparsifiner_edge.bundle.store import bundle_hash, read_manifest
from sparsifiner_edge.errors import ArtifactError, ConfigError, SparsifinerError
from sparsifiner_edge.report.values import GREATEST, LEAST, Interval, clean, get, interval, mapping, number
from sparsifiner_edge.results import Result, read_result

PROGRAM = "sparsifiner-edge"
MEASURED_KINDS = ("profile", "comparison")
LatencySamples = np.ndarray[Any, np.dtype[np.float64]]


class ResultFile(NamedTuple):
    """One result file; `command`: what made it, as one would type it."""

    path: Path
    sha256: str
    command: str
    result: Result

    @property
    def name(self) -> str:
        """The file's name, as the page shows it."""
        return clean(self.path.name)


class ResultSide(NamedTuple):
    """One bundle in one result.

    Attributes:
        role: "subject" or "against". sha: hash that names the bundle.
        label: a name that no other side on the page has; before " · " it is the bundle's.
        place: its folder. figures: its part of `statistics`.
        samples: latencies in ms, empty where there are none.
        runtime: backend, precision and threads. estimated: computed, not measured.
    """

    file: ResultFile
    role: str
    sha: str
    label: str
    place: str
    figures: Mapping[str, Any]
    samples: LatencySamples
    runtime: Mapping[str, Any]
    estimated: bool

    @property
    def bundle_name(self) -> str:
        """The label without the file's name."""
        return self.label.partition(" · ")[0]

    def figure(self, *path: str) -> Interval | None:
        """The figure at a path below `figures`."""
        return interval(self.figures, *path)


def read_result_files(paths: Sequence[Path]) -> list[ResultFile]:
    """Read results, each file once.

    Raises:
        ArtifactError: a file is not a result, of another version, or holds NaN or infinity.
        ConfigError: no file.
    """
    if not paths:
        raise ConfigError("There is no result to report.", "Give files that profile or evaluate wrote with -o.")
    files: dict[str, ResultFile] = {}
    for path in paths:
        if path.is_dir():
            raise ArtifactError(f"{path} is a folder.", "Give the result files in it; bundles go with --bundle.")
        result = read_result(path)
        digest = sha256(path)
        files.setdefault(digest, ResultFile(path, digest, _command(result.command), result))
    return list(files.values())


def _command(arguments: Sequence[Any]) -> str:
    """The command line of a result, with this package's program for whatever file started it."""
    first, *rest = [clean(argument, 500) for argument in arguments] or [""]
    if Path(first).name in ("__main__.py", PROGRAM):
        first = PROGRAM
    elif first.endswith(".py"):
        return shlex.join(["python", first, *rest])
    return shlex.join([first, *rest])


def sides_of(files: Sequence[ResultFile]) -> list[ResultSide]:
    """The bundles that results measured or estimated, in the order given; labels tell them apart."""
    found = [side for file in files for side in _sides(file)]
    names = _names(found)
    times = Counter((side.sha, side.estimated) for side in found)
    labelled = []
    for side in found:
        again = times[side.sha, side.estimated] > 1
        labelled.append(side._replace(label=names[side.sha] + (f" · {side.file.name}" if again else "")))
    return labelled


def _sides(file: ResultFile) -> Iterator[ResultSide]:
    """Of an estimate, all figures are its first subject's; of others each role's."""
    result = file.result
    measured = result.kind in MEASURED_KINDS
    if not measured and result.kind != "estimate":
        return
    for position, subject in enumerate(result.subjects if measured else result.subjects[:1]):
        role = subject.role or ("subject" if position == 0 else "")
        figures = mapping(result.statistics, role) if measured else result.statistics
        if not figures:
            continue
        place = str(subject.path)
        yield ResultSide(
            file=file,
            role=role,
            sha=str(subject.sha256),
            label=clean(subject.name or Path(place).name),
            place=place,
            figures=figures,
            samples=_samples(get(result.samples, role, "latency_ms")),
            runtime=mapping(result.method, "runtime", role),
            estimated=result.kind == "estimate",
        )


def _samples(content: Any) -> LatencySamples:
    """Latencies in ms; a result whose samples are not positive numbers of a believable size has none."""
    believable = isinstance(content, list) and all(type(x) in (int, float) and LEAST <= x <= GREATEST for x in content)
    return np.asarray(content if believable else [], dtype=np.float64)


def _names(sides: Sequence[ResultSide]) -> dict[str, str]:
    """Hash -> name: the model's, else the folder's, else with the hash's beginning."""
    models = {side.sha: side.label for side in sides}
    folders = {side.sha: clean(Path(side.place).name or side.place) for side in sides}
    for names in (models, folders):
        if len(set(names.values())) == len(names):
            return names
    return {sha: f"{name} #{sha[:6]}" for sha, name in folders.items()}


class Accuracy(NamedTuple):
    """How one subject of an evaluation did.

    Attributes:
        role: "subject" or "teacher". sha: of the subject. metric: "cosine" or what the method says.
        task: what was asked, in a text that equals another's when both are comparable.
        figures: name -> a part of `statistics`.
    """

    file: ResultFile
    role: str
    sha: str
    label: str
    metric: str
    task: str
    figures: Mapping[str, Any]
    runtime: Mapping[str, Any]

    @property
    def value(self) -> Interval | None:
        """Mean cosine of the features, or percent; the interval of a share is Wilson's."""
        if self.metric == "cosine":  # The teacher's with itself is 1.
            return interval(self.figures, "features_cosine", "mean") if self.role == "subject" else Interval(1.0)
        percent, queries = (number(self.figures.get(name)) for name in (f"{self.role}_percent", "queries"))
        if percent is None or not 0 <= percent <= 100:
            return None
        return Interval(percent) if queries is None or queries < 1 else _wilson(percent / 100, queries).times(100)


def _wilson(share: float, count: float, z: float = 1.96) -> Interval:
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * ((share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5) / (1 + z * z / count)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def accuracies_of(files: Sequence[ResultFile], sides: Sequence[ResultSide]) -> list[Accuracy]:
    """Accuracies in results of kind "evaluation"; a bundle that was also profiled has the name that it has there."""
    names = {side.sha: side.bundle_name for side in sides}
    found = []
    for file in files:
        statistics, method = file.result.statistics, file.result.method
        cosine = any(get(statistics, name, "mean") is not None for name in ("features_cosine", "patches_cosine"))
        if file.result.kind != "evaluation" or not (cosine or "subject_percent" in statistics):
            continue
        metric = "cosine" if cosine else clean(method.get("metric", ""))
        for subject in file.result.subjects:
            role = subject.role or ""
            if role in ("subject", "teacher"):
                sha = str(subject.sha256)
                label = names.get(sha, clean(subject.name or Path(str(subject.path)).name))
                runtime = mapping(method, "runtime", role)
                found.append(Accuracy(file, role, sha, label, metric, _task(method), statistics, runtime))
    return found


def _task(method: Mapping[str, Any]) -> str:
    """What decides whether two accuracies can stand side by side."""
    return repr([method.get(name) for name in ("metric", "queries", "gallery", "images", "preprocessing", "classes")])


class LabelledManifest(NamedTuple):
    """A bundle's manifest and the label of its side."""

    label: str
    sha: str
    manifest: Manifest


def manifests_of(sides: Sequence[ResultSide], folders: Sequence[Path]) -> list[LabelledManifest]:
    """Manifests of the bundles measured: of `folders`, and of those that still lie where the result says, unchanged.

    Raises:
        ArtifactError: a folder given is not a bundle.
        ConfigError: a folder given is in none of the results.
    """
    known = {side.sha: side.bundle_name for side in sides}
    found: dict[str, LabelledManifest] = {}
    for folder in folders:
        manifest, digest = _manifest(folder), bundle_hash(folder)
        if digest not in known:
            raise ConfigError(f"{folder} was measured by none of the results.", "Leave it out, or add its profile.")
        found[digest] = LabelledManifest(known[digest], digest, manifest)
    for side in sides:
        folder = Path(side.place)
        try:
            if side.sha not in found and "\0" not in side.place and bundle_hash(folder) == side.sha:
                found[side.sha] = LabelledManifest(known[side.sha], side.sha, _manifest(folder))
        except (OSError, SparsifinerError):  # Moved or exported again since: the page says so.
            continue
    return [found[sha] for sha in known if sha in found]


def _manifest(folder: Path) -> Manifest:
    """A bundle's manifest; whether its files match their hashes does not matter to a page."""
    return parse_manifest(read_manifest(folder), folder / BUNDLE_FILE)
