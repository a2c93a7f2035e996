"""TensorRT-RTX, if it is installed: it builds engines without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.records import write_record
from sparsifiner_edge.runtime.build import build_engine

RTX = "tensorrt-rtx"
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="it exists for x86-64 alone")


def rtx(bundle: Path, *capabilities: str, **options: Any) -> list[dict[str, Any]]:
    """Build engines for these compute capabilities into a bundle; return their manifest entries."""
    built = build_engine(bundle, RTX, compute_capabilities=capabilities, **options)
    engines: list[dict[str, Any]] = write_record(built.engines)
    return engines
