"""What several test files share: weights, images, a student and a bundle of the smallest timm model, made once."""

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
    # As many processes as cores run tests already; threads beside them only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch and the like are imported where they are used: some tests run without them.

# A shell starts programs in the background deaf to Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each process gets a part of the list and runs it in its order: long ones lead every part, so that none is left
    for the end.
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
    """The command line, called in this process, takes signals and lost exceptions over."""
    from tests.commands import handlers_kept  # after the number of threads is set

    # What a test starts inherits what is ignored, and never ends when it is told to.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a fixture left Ctrl-C to something else"
    with handlers_kept():
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is measured on a machine busy with tests is not what its user shall find in the cache."""
    base = tmp_path_factory.getbasetemp()
    os.environ["XDG_CACHE_HOME"] = str((base.parent if WORKER else base) / "cache")


@pytest.fixture(scope="session", autouse=True)
def warm_briefly() -> Iterator[None]:
    """Beside other tests no latency settles, and waiting the longest for it would show nothing."""
    from sparsifiner_edge.profiles.measure import side

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side, "_WARM_UP_S", 0.5)
        yield


@pytest.fixture(scope="session", autouse=True)
def exporter_ready() -> Iterator[None]:
    """torch's exporter lists all operators that it knows anew for every export: longer than a small model takes it."""
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
    """Makes a folder once per run; what is in it is only read."""
    return make_once(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_weights(once: Once) -> Path:
    """A classifier of 10 classes."""
    return once("weights", lambda folder: save_weights(folder / "w.safetensors", 10)) / "w.safetensors"


@pytest.fixture(scope="session")
def feature_weights(once: Once) -> Path:
    """The same without classifier."""
    return once("features", lambda folder: save_weights(folder / "w.safetensors", 0)) / "w.safetensors"


@pytest.fixture(scope="session")
def pictures(once: Once) -> Path:
    """A folder of three small images."""
    return once("pictures", draw_pictures)


@pytest.fixture(scope="session")
def tiny_student(once: Once, tiny_weights: Path) -> Path:
    from sparsifiner_edge.sparse.student import sparsify
    from tests.models import TINY

    return once("student", lambda folder: sparsify(TINY, folder / "student", weights=tiny_weights, cells=4)) / "student"


@pytest.fixture(scope="session")
def tiny_bundle(once: Once, tiny_student: Path) -> Path:
    from tests.flat import export_bundle

    return once("bundle", lambda folder: export_bundle(tiny_student, folder / "bundle")) / "bundle"


@pytest.fixture(scope="session")
def stream_bundle(once: Once, tiny_student: Path) -> Path:
    """The same with what follows a camera."""
    from tests.flat import export_bundle

    return once("stream", lambda folder: export_bundle(tiny_student, folder / "bundle", stream=True)) / "bundle"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A bundle of two products, for a test of its own."""
    from tests.tiny import make_bundle

    return make_bundle(tmp_path / "tiny")


@pytest.fixture(scope="session")
def exported(once: Once) -> Path:
    """`student`, sparse in all layers, with its `bundle`; its teacher's `weights.safetensors`, with theirs, `dense`.
    Both bundles give tokens.
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
    """Twelve smooth images in two classes."""
    return once("training", draw_classes)


@pytest.fixture(scope="session")
def keys(once: Once) -> Path:
    """key.pem, key.pub, other.pem, other.pub."""
    return once("keys", make_keys)
