"""Compares attention operators on a CUDA GPU with the fastest dense attention, and with FlexAttention.

    python benchmarks/attention_gpu.py [--tokens 1025 ...] [--dtype float16] [--tile 64] [-o FOLDER]

Eight images of 6 heads of 64 (batch x heads 48), one class token, tiles of 64, query pools of 16, 24 channels, 25
background tokens. Every engine is compiled if torch can compile it, and replayed as a CUDA graph; each round runs all
engines in a new random order. The rival gets q, k and v separately and contiguous, at no cost; our kernels read the
packed projection and write heads side by side. "attend" gets its key lists, "select" makes them, "both" is a complete
layer: three launches. Dense rivals: every backend of torch's scaled_dot_product_attention, and flash-attn if it is
installed. "flex" is FlexAttention, compiled and masked to the same lists (it reads complete blocks of keys, and no
background tokens). Without a CUDA device the exit code is 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from gpu_engines import Run, by_backend, compare, flash_attn, graph, require_gpu, show
from summary import write_summary
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import err_console
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.ops.torch_triton import triton_layer
from sparsifiner_edge.ops.triton import why_not_triton
from sparsifiner_edge.results import Result, Subject

BATCH, HEADS, WIDTH, CHANNELS, CELLS, SCALE = 8, 6, 64, 24, 25, 0.125
KEEPS = (0.25, 0.10)
TOKENS = (1025, 2305, 4097, 9217)


def settings(tokens: int, keep: float, tile: int) -> dict[str, Any]:
    """Return the attributes of KeySelect."""
    sparsity = SparsityConfig(keep=keep, tile=tile, query_pool=min(16, tile), background_tokens=CELLS)
    layout = sparsity.layout(tokens - 1)
    return {
        "num_heads": HEADS,
        "num_prefix": 1,
        "tile": tile,
        "key_pool": layout.key_pool,
        "scale": SCALE,
        "query_pool": sparsity.query_pool,
        "keys": layout.keys,
        "value_power": sparsity.value_power,
    }


def projections() -> tuple[torch.Tensor, torch.Tensor]:
    """Return random predictor projections, the same at every call."""
    torch.manual_seed(1)
    proj_q, proj_k = (torch.randn(HEADS, WIDTH, CHANNELS, device="cuda") / WIDTH**0.5 for _ in range(2))
    return proj_q, proj_k


def ours(qkv: torch.Tensor, keep: float, tile: int) -> dict[str, Any]:
    """Return a CUDA graph of one of our layers at one keep rate."""
    select = settings(qkv.shape[1], keep, tile)
    proj_q, proj_k = projections()
    reasons = why_not_triton("KeySelect", select, [qkv.shape, qkv.shape[:2], proj_q.shape, proj_k.shape], qkv)
    if reasons:
        raise SystemExit(f"Triton does not run a layer: {'; '.join(reasons)}")
    return {f"both {keep:g}": graph(lambda: triton_layer(select, qkv, None, proj_q, proj_k))}


def flex(qkv: torch.Tensor, parts: tuple[torch.Tensor, ...], keep: float, tile: int) -> Run:
    """Return FlexAttention over the lists of KeySelect and the class token."""
    batch, tokens, _ = qkv.shape
    lists = ops.key_select(qkv, *projections(), **settings(tokens, keep, tile))
    member = torch.zeros(*lists.shape[:3], tokens, dtype=torch.bool, device="cuda")
    member.scatter_(-1, lists.long() + 1, True)
    member[..., 0] = True

    def read(image: Any, head: Any, query: Any, key: Any) -> Any:
        return (query == 0) | member[image, head, (query - 1).clamp_min(0) // tile, key]

    mask = create_block_mask(read, batch, HEADS, tokens, tokens, device="cuda")
    run = torch.compile(flex_attention)
    return graph(lambda: run(*parts, block_mask=mask, scale=SCALE))


def measure(tokens: int, dtype: torch.dtype, tile: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    torch.manual_seed(0)
    qkv = torch.randn(BATCH, tokens, 3 * HEADS * WIDTH, device="cuda", dtype=dtype)
    q, k, v = (x.contiguous() for x in qkv.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4))
    rivals, refused = by_backend(lambda: F.scaled_dot_product_attention(q, k, v, scale=SCALE))
    rivals |= flash_attn(q, k, v, SCALE)

    def both() -> dict[str, Run]:
        made: dict[str, Run] = {}
        for keep in KEEPS:
            made |= ours(qkv, keep, tile) | {f"flex {keep:g}": flex(qkv, (q, k, v), keep, tile)}
        return made

    return compare((rivals, refused), both, rounds, 20)


@click.command()
@click.option("--tokens", type=int, multiple=True, default=TOKENS, help="Repeatable.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--tile", type=int, default=64, show_default=True)
@click.option("--rounds", type=int, default=15, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for attention_gpu.json.")
def main(tokens: tuple[int, ...], dtype: str, tile: int, rounds: int, output: Path | None) -> None:
    method = {
        **require_gpu(),
        "batch": BATCH,
        "heads": HEADS,
        "width": WIDTH,
        "channels": CHANNELS,
        "background_tokens": CELLS,
    }
    method |= {"dtype": dtype, "tile": tile, "rounds": rounds, "timing": "CUDA graphs, events, engines in turn"}
    samples, statistics = {}, {}
    for count in tokens:
        err_console.print(f"{count} tokens")
        samples[str(count)], statistics[str(count)] = measure(count, getattr(torch, dtype), tile, rounds)
        show(f"{count} tokens, batch x heads {BATCH * HEADS}", statistics[str(count)])
    if output:
        path = "sparsifiner_edge/ops/triton/attend.py"
        subjects = [Subject(path=path, sha256=sha256(Path(__file__).parents[1] / path))]
        result = Result("comparison", subjects, method, samples, statistics)
        write_summary(output / "attention_gpu.json", result)


if __name__ == "__main__":
    main()
