"""Another package names a class of `Backbone`: its models are made sparse and exported as ours are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparsifiner_edge as se
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import UnsupportedModelError
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.sparse.hosts import Backbone
from tests.hosts.hugging_face import images


def install(place: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    info = place / "foreign-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[sparsifiner_edge.hosts]\nforeign = tests.hosts.test_foreign:{point}\n")
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
    with pytest.raises(UnsupportedModelError, match=r"test_foreign:Net is no class of Backbone"):
        se.sparsify_model(Net())


class Attention(nn.Module):
    num_heads, head_dim, scale = 2, 16, 0.25

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(32), nn.LayerNorm(32), Attention()
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 32, 16, 16), nn.LayerNorm(32)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(x).flatten(2).mT))


class Foreign(Backbone):
    library = "foreign"

    @classmethod
    def of(cls, module: nn.Module) -> Backbone | None:
        made = isinstance(module, Net)
        return cls(module, "blocks", module.embed, (10, 10), 0, False, 32, False) if made else None

    def refusal(self) -> None:
        return None

    def resize(self, size: tuple[int, int]) -> None:
        raise NotImplementedError

    def tokens(self, images: Tensor) -> Tensor:
        return self.module(images)

    def heads(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"features": tokens.mean(1)}
