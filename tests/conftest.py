"""Fixtures shared by the tests: weights, images, a sparse model and a bundle of the smallest timm model, made once."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.made import draw_classes, draw_pictures, make_keys, save_weights
from tests.once import WORKER, Once, make_once

if WORKER:
    # One test process runs per core. More threads would only compete for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Heavy packages such as torch are imported where they are used: some tests run without them.

# A shell starts background programs with SIGINT ignored, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long tests first in the share of each worker.

    Each worker runs a contiguous part of the list in order, so a long test at the end would delay the whole run.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("long")]
    left, order = [item for item in items if not item.get_closest_marker("long")], list[pytest.Item]()
    for process in range(processes):
        lead = long[process::processes]
        fill = max(0, (len(items) - len(order)) // (processes - process) - len(lead))
        order += lead + left[:fill]
        left = left[fill:]
    items[:] = order + left


@pytest.fixture(autouse=True)
def handlers_restored() -> Iterator[None]:
    """Restore signal handlers and exception hooks, which the command line replaces when it runs in this process."""
    from tests.commands import handlers_kept  # imported after the number of threads is set

    # Child processes inherit ignored signals, and would then not stop on Ctrl-C.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a fixture left Ctrl-C to something else"
    with handlers_kept():
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a separate cache: measurements on a machine busy with tests must not enter the user's cache."""
    base = tmp_path_factory.getbasetemp()
    os.environ["XDG_CACHE_HOME"] = str((base.parent if WORKER else base) / "cache")


@pytest.fixture(scope="session", autouse=True)
def warm_briefly() -> Iterator[None]:
    """Shorten the warm-up: next to other tests no latency settles, so the maximum would always be reached."""
    from sparsifiner_edge.profiles.measure import side

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side, "_WARM_UP_S", 0.5)
        yield


@pytest.fixture(scope="session", autouse=True)
def exporter_ready() -> Iterator[None]:
    """Cache the operator list of torch's exporter: building it for every export takes longer than a small model."""
    if "torch" not in sys.modules:
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    listed = functools.cache(ONNXRegistry.from_torchlib)

    def again(**options: Any) -> Any:
        registry = copy.copy(listed(**options))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(again))
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Return a function that makes a folder once per run. The contents are read-only."""
    return make_once(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_weights(once: Once) -> Path:
    """Weights of a classifier with 10 classes."""
    return once("weights", lambda folder: save_weights(folder / "w.safetensors", 10)) / "w.safetensors"


@pytest.fixture(scope="session")
def feature_weights(once: Once) -> Path:
    """Weights of the same model without a classifier."""
    return once("features", lambda folder: save_weights(folder / "w.safetensors", 0)) / "w.safetensors"


@pytest.fixture(scope="session")
def pictures(once: Once) -> Path:
    """Folder of three small images."""
    return once("pictures", draw_pictures)


@pytest.fixture(scope="session")
def tiny_student(once: Once, tiny_weights: Path) -> Path:
    from sparsifiner_edge.sparse.student import sparsify
    from tests.models import TINY

    return (
        once("student", lambda folder: sparsify(TINY, folder / "student", weights=tiny_weights, background_tokens=4))
        / "student"
    )


@pytest.fixture(scope="session")
def tiny_bundle(once: Once, tiny_student: Path) -> Path:
    from tests.flat import export_bundle

    return once("bundle", lambda folder: export_bundle(tiny_student, folder / "bundle")) / "bundle"


@pytest.fixture(scope="session")
def stream_bundle(once: Once, tiny_student: Path) -> Path:
    """The same bundle with streaming inference."""
    from tests.flat import export_bundle

    return once("stream", lambda folder: export_bundle(tiny_student, folder / "bundle", stream=True)) / "bundle"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A bundle of two MatMuls that a test may change."""
    from tests.tiny import make_bundle

    return make_bundle(tmp_path / "tiny")


@pytest.fixture(scope="session")
def exported(once: Once) -> Path:
    """Folder of a sparse `student` and its `bundle`, and of dense `weights.safetensors` with their bundle `dense`.

    Both bundles output tokens.
    """
    from sparsifiner_edge.sparse.student import save_student
    from tests.flat import export_bundle
    from tests.models import TINY, student

    def make(folder: Path) -> None:
        weights = folder / "weights.safetensors"
        save_weights(weights, 1000)
        export_bundle(save_student(student(), folder / "student"), folder / "bundle", tokens=True)
        export_bundle(TINY, folder / "dense", weights=weights, tokens=True)

    return once("exported", make)


@pytest.fixture(scope="session")
def folder(once: Once) -> Path:
    """Folder of twelve smooth images in two classes."""
    return once("training", draw_classes)


@pytest.fixture(scope="session")
def keys(once: Once) -> Path:
    """Folder with key.pem, key.pub, other.pem and other.pub."""
    return once("keys", make_keys)
