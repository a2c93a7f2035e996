"""Another package names a class of `Backbone`: its models are made sparse and exported as ours are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsifiner_edge as se
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import UnsupportedModelError
from sparsifiner_edge.runtime.golden import check_golden
from tests.hosts.foreign import Net
from tests.hosts.hugging_face import images


def install(place: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    info = place / "foreign-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[sparsifiner_edge.hosts]\nforeign = tests.hosts.foreign:{point}\n")
    monkeypatch.syspath_prepend(place)


def test_another_package_adds_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), images((160, 160))
    with pytest.raises(UnsupportedModelError, match="This Net contains 0 vision transformers"):
        se.sparsify_model(model)
    install(tmp_path / "site", monkeypatch, "Foreign")
    with torch.no_grad():
        expected = model(x)
        se.sparsify_model(model, keep=0.999, cells=4, channels=8, calibrate=x)
        torch.testing.assert_close(model(x), expected, atol=1e-2, rtol=1e-2)
    bundle = open_bundle(se.export_model(model, x, tmp_path / "bundle", normalise=False))
    assert "sparsifiner::SparseAttention" in bundle.manifest.ops
    with se.open_session(bundle.folder) as session:
        assert check_golden(session, bundle)
    assert torch.equal(se.restore_model(model)(x), expected)


def test_what_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "Net")
    with pytest.raises(UnsupportedModelError, match=r"foreign:Net is no class of Backbone"):
        se.sparsify_model(Net())
