"""What an engine of TensorRT-RTX 1.7 launches, by the names in its file: it needs no GPU to be read."""

from __future__ import annotations

import re


def compiled_kernels(engine: bytes) -> dict[str, int]:
    """Kernels that an engine launches, by their names in its file, and how many of them are fused attention."""
    fused = engine.count(b"struct _gemm_mha_v2_callback {")
    return {"kernels": len(re.findall(rb"__myl_[A-Za-z]+(?![A-Za-z_])", engine)) + fused, "fused_attention": fused}
