"""Which way of carrying out sparse attention an engine takes is measured on the device that runs it.

`bodies` are the standard operators in the file, `plugin` the project's CUDA kernels, `dense` ordinary attention. The
fastest that gives the bundle's golden output wins. Dense attention computes something else, so it wins only where
that makes no difference within the bundle's tolerance; its time is recorded all the same, as the yardstick.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sparsifiner_edge.bundle.engines import Candidate, Details, Golden
from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import BackendError, ConfigError, GateError, SparsifinerError
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.backend import Job
from sparsifiner_edge.runtime.cuda import Device, Driver
from sparsifiner_edge.runtime.tensorrt import plugin
from sparsifiner_edge.runtime.tensorrt.build import Settings, build_engine_file, write_engine
from sparsifiner_edge.runtime.tensorrt.models import dense_model
from sparsifiner_edge.runtime.tensorrt.session import BODIES, DENSE, PLUGIN, EngineSession

MEASURED = "measured"
"""In `Engine.variant`: the details say which candidate was the fastest."""
KERNELS = ("auto", "portable", "plugin")
WARM_UP, RUNS = 10, 30


@dataclasses.dataclass(frozen=True)
class Work:
    """One engine to build, with everything that candidates share. content: the bundle's `model.onnx`."""

    trt: Any
    content: bytes
    job: Job
    settings: Settings
    driver: Driver

    def bundle(self) -> Bundle:
        """The bundle, checked anew: this process has only its place."""
        return open_bundle(Path(self.settings.bundle))


def candidates(trt: Any, bundle: Bundle, device: Device, kernels: str) -> tuple[str, ...]:
    """The ways that are possible for a bundle on a device, the one that always works first.

    Args:
        kernels: "auto", or "portable" or "plugin" for that alone.

    Raises:
        ConfigError: no such choice.
        BackendError: "plugin" is asked for and not possible; says why.
    """
    if kernels not in KERNELS:
        raise ConfigError(f"kernels is {kernels!r}.", f"Choose one of: {', '.join(KERNELS)}.")
    sparse = f"{DOMAIN}::SparseAttention" in bundle.manifest.ops
    reason = plugin.why_not(trt, bundle, device) if sparse else "the model has no sparse attention"
    if kernels == PLUGIN and reason:
        raise BackendError(f"The plugin cannot be used: {reason}.", "Leave the option kernels out, or say portable.")
    if kernels == PLUGIN:
        return (PLUGIN,)
    if kernels == "portable" or not sparse:
        return (BODIES,)
    return (BODIES, DENSE) if reason else (BODIES, PLUGIN, DENSE)


def build_fastest(work: Work, tell: Progress) -> Details:
    """Build every candidate, time those that give the golden output, and leave the fastest at the job's `output`.

    Raises:
        SparsifinerError: not one of them could be built, or not one gives the golden output.
    """
    names, output = work.settings.candidates, Path(work.job.output)
    if len(names) == 1:
        return msgspec.structs.replace(_build(work, names[0], output, tell), kernels=names[0])
    found: dict[str, Candidate] = {}
    built: dict[str, Details] = {}
    failures: list[SparsifinerError] = []
    for name in names:
        path = output.with_name(f"{name}.candidate")
        try:
            built[name] = _build(work, name, path, _prefixed(tell, name))
            found[name] = measure(work, path)
        except SparsifinerError as error:
            failures.append(error)
            found[name] = Candidate(failed=error.what)
    passed = {n: c.compute_ms for n, c in found.items() if c.compute_ms is not None and isinstance(c.golden, dict)}
    if not passed:
        raise failures[0] if failures else GateError(str(found[names[0]].golden), "Export the bundle again.")
    best = min(passed, key=passed.__getitem__)
    for name in built:
        path = output.with_name(f"{name}.candidate")
        if name == best:
            path.replace(output)
        else:
            path.unlink(missing_ok=True)
    return msgspec.structs.replace(built[best], kernels=best, candidates=found)


def _prefixed(tell: Progress, name: str) -> Progress:
    return lambda stage, done, total: tell(f"{name}: {stage}", done, total)


def _build(work: Work, name: str, path: Path, tell: Progress) -> Details:
    content, driver = work.content, work.driver
    if name == DENSE:
        content = dense_model(content)
    if name == PLUGIN:
        content = plugin.prepare(work.trt, content, work.bundle(), driver.device)
    free = driver.free_bytes()
    built = build_engine_file(work.trt, content, driver.device, free, work.job.engine, work.settings, tell)
    write_engine(path, built.content)
    return built.details


def measure(work: Work, path: Path) -> Candidate:
    """Median milliseconds that the device computes, at the batch size that the engine is tuned for, and the gate."""
    bundle = work.bundle()
    with EngineSession(work.trt, path, work.job.engine, bundle.manifest) as session:
        golden = _golden(session, bundle)
        spec = session.inputs[0]
        shape = [work.job.engine.batch.best, *(size for size in spec.shape[1:] if isinstance(size, int))]
        image = np.random.default_rng(0).integers(0, 256, shape).astype(spec.dtype)
        times = []
        for number in range(WARM_UP + RUNS):
            session.infer({spec.name: image})
            if number >= WARM_UP and session.last_times is not None:
                times.append(session.last_times.compute_ms)
    return Candidate(golden=golden, compute_ms=statistics.median(times), runs=len(times))


def _golden(session: EngineSession, bundle: Bundle) -> Golden | str:
    try:
        return check_golden(session, bundle)
    except GateError as error:
        return error.what
