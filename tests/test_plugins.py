"""Tests of an external package, as in docs/architecture.md, that adds a backend, a model library and a metric."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import tomllib
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import UnsupportedModelError
from sparsifiner_edge.runtime.golden import check_golden
from tests import flat
from tests.flat import verify_bundle

PAGE = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
MODELS = """
import torch
from torch import nn


class Attention(nn.Module):
    num_heads, head_dim, scale = 2, 16, 0.25

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(32), nn.LayerNorm(32), Attention()
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    grid, width, windows = (10, 10), 32, False

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 32, 16, 16), nn.LayerNorm(32)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, images):
        return self.norm(self.blocks(self.embed(images).flatten(2).mT))


class Masked(nn.Module):
    output_names, image_mean, image_std = ("mask",), (0.5,) * 3, (0.5,) * 3

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, images):
        return self.net(images).mean(2).unflatten(1, (1, 10, 10)).sigmoid()


def masked():
    torch.manual_seed(0)
    return Masked().eval()
"""


@pytest.fixture
def mylab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, installed."""
    site, info = tmp_path / "site", tmp_path / "site" / "mylab-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mylab\nVersion: 1\n")
    (declared,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    groups = tomllib.loads(declared)["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items()) for group, points in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    (site / "mylab").mkdir()
    (site / "mylab" / "models.py").write_text(MODELS)
    for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        path, code = text.split("\n", 1)
        assert code.count("\n") <= 36, f"{path} is longer than the page promises"
        (site / path.removeprefix("# ")).write_text(code)
    monkeypatch.syspath_prepend(site)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def test_a_package_from_outside(mylab: None, tmp_path: Path, pictures: Path) -> None:
    from mylab.models import masked  # type: ignore[import-not-found]

    model, x = masked(), torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        expected = model(x)
        se.sparsify_model(model, keep=0.999, background_tokens=4, channels=8, calibrate=x)
        torch.testing.assert_close(model(x), expected, atol=1e-2, rtol=1e-2)
    bundle = open_bundle(flat.export_model(model, x[:1], tmp_path / "bundle"))
    assert "sparsifiner::SparseAttention" in bundle.manifest.ops
    with flat.open_session(bundle.folder, "onnx-reference") as session:
        assert check_golden(session, bundle)
        assert session.backend == "onnx-reference"
    assert verify_bundle(bundle.folder, backend="onnx-reference").passed
    result = flat.evaluate_student(bundle.folder, pictures, against=bundle.folder, metric="task", task="coverage")
    assert result.method.metric == "coverage"
    assert 0 <= result.statistics["subject_score"].mean.value <= 1
    assert torch.equal(se.restore_model(model)(x), expected)
    model.net.windows = True
    with pytest.raises(UnsupportedModelError, match="windows are not supported"):
        se.sparsify_model(model)
