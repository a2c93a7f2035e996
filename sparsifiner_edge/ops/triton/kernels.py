"""Kernels by name. Importing this needs Triton; torch it does not need."""

from __future__ import annotations

from typing import Any

import triton  # noqa: F401  fails here, at once, where it is missing

from sparsifiner_edge.ops.triton import attend, merge, select, summarise

KERNELS: dict[str, Any] = {
    "summarise": summarise.summarise_kernel, "select": select.select_kernel, "attend": attend.attend_kernel,
    "metric": merge.metric_kernel, "partners": merge.partners_kernel, "suitors": merge.suitors_kernel,
    "pairs": merge.pairs_kernel, "merge": merge.merge_kernel,
}  # fmt: skip
"""By the names of `plan.Launch.kernel`."""
