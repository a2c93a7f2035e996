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

from sparsifiner_edge.bundle.engines import Candidate, Details, Engine
from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, GateError, SparsifinerError
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.ops.bodies import function_body
from sparsifiner_edge.ops.graph import drop_unused
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.progress import Progress, prefixed
from sparsifiner_edge.runtime.cuda import CudaDevice, Driver
from sparsifiner_edge.runtime.tensorrt import plugin
from sparsifiner_edge.runtime.tensorrt.build import BuilderOptions, build_engine_file
from sparsifiner_edge.runtime.tensorrt.session import BODIES, DENSE, PLUGIN, EngineSession

MEASURED_VARIANT = "measured"
"""In `Engine.variant`: the details say which candidate was the fastest."""
WARM_UP, RUNS = 10, 30


@dataclasses.dataclass(frozen=True)
class Work:
    """One engine to build, with everything that its candidates share."""

    trt: Any
    bundle: Bundle
    engine: Engine
    options: BuilderOptions
    driver: Driver


def possible_candidates(trt: Any, bundle: Bundle, device: CudaDevice, kernels: str) -> tuple[str, ...]:
    """The ways that are possible for a bundle on a device, the one that always works first.

    Args:
        kernels: see `BuilderOptions`.

    Raises:
        BackendError: "plugin" is asked for and not possible; says why.
    """
    sparse = f"{DOMAIN}::SparseAttention" in bundle.manifest.ops
    reason = plugin.why_not(trt, bundle, device) if sparse else "the model has no sparse attention"
    if kernels == PLUGIN:
        if reason:
            raise BackendError(
                f"The plugin cannot be used: {reason}.", "Leave the option kernels out, or say portable."
            )
        return (PLUGIN,)
    if kernels == "portable" or not sparse:
        return (BODIES,)
    return (BODIES, DENSE) if reason else (BODIES, PLUGIN, DENSE)


def build_fastest(work: Work, output: Path, tell: Progress) -> Details:
    """Build every candidate, time those that give the golden output, and leave the fastest at `output`.

    Raises:
        SparsifinerError: not one of them could be built, or not one gives the golden output.
    """
    names = possible_candidates(work.trt, work.bundle, work.driver.device, work.options.kernels)
    if len(names) == 1:
        return msgspec.structs.replace(_build(work, names[0], output, tell), kernels=names[0])
    found: dict[str, Candidate] = {}
    built: dict[str, Details] = {}
    failures: list[SparsifinerError] = []
    for name in names:
        path = output.with_name(f"{name}.candidate")
        try:
            built[name] = _build(work, name, path, prefixed(tell, f"{name}: "))
            found[name] = time_engine(work, path)
        except SparsifinerError as error:
            failures.append(error)
            found[name] = Candidate(failed=error.what)
    passed = {n: c.compute_ms for n, c in found.items() if c.compute_ms is not None and isinstance(c.golden, dict)}
    if not passed:
        raise failures[0] if failures else GateError(str(found[names[0]].golden), "Export the bundle again.")
    best = min(passed, key=passed.__getitem__)
    output.with_name(f"{best}.candidate").replace(output)
    for name in names:
        output.with_name(f"{name}.candidate").unlink(missing_ok=True)
    return msgspec.structs.replace(built[best], kernels=best, candidates=found)


def _build(work: Work, name: str, path: Path, tell: Progress) -> Details:
    model, device = work.bundle.read(MODEL_FILE), work.driver.device
    if name == DENSE:
        model = dense_model(model)
    if name == PLUGIN:
        model = plugin.prepare(work.trt, model, work.bundle, device)
    free = work.driver.free_bytes()
    content, details = build_engine_file(work.trt, model, device, free, work.engine, work.options, tell)
    with io_errors(path):
        path.write_bytes(content)
    return details


def time_engine(work: Work, path: Path) -> Candidate:
    """Median milliseconds that the device computes, at the batch size that the engine is tuned for, and the gate."""
    with EngineSession(work.trt, path, path.read_bytes(), work.engine, work.bundle.manifest) as session:
        try:
            golden: Any = check_golden(session, work.bundle)
        except GateError as error:
            golden = error.what
        spec = session.inputs[0]
        shape = [work.engine.batch.best, *(size for size in spec.shape[1:] if isinstance(size, int))]
        image = np.random.default_rng(0).integers(0, 256, shape).astype(spec.dtype)
        times = []
        for number in range(WARM_UP + RUNS):
            session.infer({spec.name: image})
            if number >= WARM_UP and session.last_times is not None:
                times.append(session.last_times.compute_ms)
    return Candidate(golden=golden, compute_ms=statistics.median(times), runs=len(times))


def dense_model(content: bytes) -> bytes:
    """The model with DenseAttention, in standard operators, where it has SparseAttention: for comparison.

    Args:
        content: an ONNX file.
    """
    import onnx

    model = onnx.load_from_string(content)
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, "SparseAttention"):
            kept = [a for a in node.attribute if a.name in ("num_heads", "scale")]
            made = onnx.helper.make_node("DenseAttention", node.input[:1], node.output, node.name, domain=DOMAIN)
            made.attribute.extend(kept)
            node.CopyFrom(made)
    drop_unused(model)
    if not any(function.name == "DenseAttention" for function in model.functions):
        model.functions.append(function_body("DenseAttention"))
    return bytes(model.SerializeToString())
