"""Tests of bfloat16 attention in sessions: it is reported, kept apart, and never silently float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.ops import native
from sparsifiner_edge.sparse.student import save_student
from tests.commands import process
from tests.flat import export_bundle, open_session
from tests.models import TINY, student
from tests.native.test_kernels import LACKING

pytestmark = [LACKING]


def test_a_session_of_onnx_runtime_says_so_and_leaves_others_alone(tmp_path: Path) -> None:
    sparsity = SparsityConfig(keep=(0.2, 0.5, 1.0), background_tokens=4, channels=8, merge=(9, 0))
    made = save_student(student(TINY, sparsity), tmp_path / "student")
    bundle = export_bundle(made, tmp_path / "bundle", tokens=True)
    with open_session(bundle) as exact, open_session(bundle, compute_precision="bf16") as session:
        image = {"image": np.random.default_rng(0).integers(0, 256, exact.inputs[0].shape, dtype=np.uint8)}
        wanted, got, again = exact.infer(image), session.infer(image), exact.infer(image)
        assert exact.description.kernels == f"native, {native.target()}"
        assert session.description.kernels == f"native, {native.target()}, attention in bfloat16"
        assert (session.description.backend, exact.description.precision) == ("onnxruntime", "fp32")
        assert session.description.precision == "fp32, attention bf16"
    for name, value in wanted.items():
        np.testing.assert_array_equal(again[name], value)
        assert cosine(got[name], value).min() > 0.9  # random weights have near ties among keys and pairs
    assert any((got[name] != value).any() for name, value in wanted.items())
    built = process("bundle", "verify", bundle, "--compute-precision", "bf16")
    assert built.code == 0, built.err


@pytest.mark.everything
def test_a_session_of_onnx_runtime_is_never_silently_float32(tmp_path: Path) -> None:
    bundle = export_bundle(save_student(student(TINY), tmp_path / "student"), tmp_path / "bundle")
    bf16 = ("--backend", "onnxruntime", "--compute-precision", "bf16")
    refused = process("profile", bundle, *bf16, env={native.TARGET_VARIABLE: "AVX2"})
    assert (refused.code, refused.out) == (2, "")
    assert "AVX2 has no bfloat16" in refused.err
    with pytest.raises(BackendError, match="Function bodies have no bfloat16"):
        open_session(bundle, "onnxruntime", compute_precision="bf16", kernels="portable")
    plain = export_bundle(save_student(student(TINY, SparsityConfig(keep=1)), tmp_path / "dense"), tmp_path / "plain")
    with pytest.raises(
        BackendError, match=r"no attention that could run in bfloat16\.\n.*Leave --compute-precision out"
    ):
        open_session(plain, "onnxruntime", compute_precision="bf16")
    with pytest.raises(BackendError, match=r"(?s)computes in the file's precision, fp32, .* export .* fp16"):
        open_session(plain, "onnxruntime", compute_precision="fp16")
