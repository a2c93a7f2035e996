"""A library of another package's: a vision transformer, and what it says of it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sparsifiner_edge.sparse.hosts import Backbone


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
