"""What the tests of estimates share: bundles that speak of larger models, and the time of a workload."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from sparsifiner_edge.artifacts import BUNDLE_FILE
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.profiles.roofline import CPU_FIT, GPU_FIT, Workload
from tests.seal import seal_bundle
from tests.tiny import make_bundle

VIT_S = ModelShape(12, 6, 384, 1536, 1, 1369, 14)
DENSE = SparsityConfig(keep=1)
EDGE = SparsityConfig(keep=0.1, cells=25)
BOARDS = st.sampled_from(["jetson-orin-nano-8gb", "jetson-agx-thor", "jetson-xavier-nx", "rtx-4090", "a100"])


def counted(folder: Path, shape: ModelShape = VIT_S, sparsity: SparsityConfig = DENSE, **manifest: Any) -> Path:
    """A bundle whose manifest speaks of a larger model than its file holds."""
    sparse = not sparsity.is_dense
    content = {
        "shape": dataclasses.asdict(shape),
        "sparsity": sparsity.to_dict() if sparse else None,
        "ops": ["sparsifiner::KeySelect"] if sparse else [],
    }
    return make_bundle(folder, batch=1, **(content | manifest))


def changed(folder: Path, change: dict[str, Any]) -> Path:
    """The bundle with other entries in its manifest, sealed again."""
    manifest = json.loads((folder / BUNDLE_FILE).read_text()) | change
    (folder / BUNDLE_FILE).unlink()
    seal_bundle(folder, {name: value for name, value in manifest.items() if name != "files"})
    return folder


def total(work: Workload, board: Board, precision: str = "fp16") -> float:
    return roofline.seconds(roofline.costs(work, board, precision, GPU_FIT if board.kind == "gpu" else CPU_FIT))
