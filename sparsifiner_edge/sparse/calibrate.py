"""Predictor calibration, from the weights alone or from a few images.

Both ways compute, per head, the rank-c matrices that best preserve the products of pooled queries and keys. They take
the singular vectors of M_q^1/2 M_k^1/2, with these moments:

- M_q = E[a a^T] of pooled queries a.
- M_k = E[(k - mean)(k - mean)^T] of keys k. They are centred because a constant shift of all keys changes no ranking.

With images, a short gradient descent follows. It lowers the Kullback-Leibler divergence between the target and the
prediction for the pooled query. The target is the maximum of the attention of the queries in the pool: a key that one
of them needs is read for all.

The preset "paper" shares its projections between the heads. Its landmarks start as runs of the Hilbert curve, each of
which is averaged and written back as one, so that the predictor is useful before training.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.ops import torch_landmarks
from sparsifiner_edge.order import hilbert_order
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.sparse.attention import KeySelector, LandmarkSelector, PackedAttention, SparseAttention
from sparsifiner_edge.sparse.hosts import backbone_of

PASSES = 2
"""Number of passes of the gradient descent over the calibration images."""
STEPS_PER_IMAGE = 8
"""Optimiser steps per image in each pass."""
QUERIES_PER_STEP = 128
"""Patch queries per optimiser step and head, before pooling. It bounds the memory of a step."""
LEARNING_RATE = 0.06
"""Initial learning rate, relative to the mean absolute entry of a projection."""
UP_START = 0.16
"""Initial entries of the published predictor's up-projection for the patches in a landmark.

The key lists are the same at any scale. Training also fits the size of the predicted attention, however, and does not
recover from entries of 1 within the published schedule.
"""
UP_CLASS = 0.05
"""Initial entry of the published predictor's up-projection for the class token, in each landmark."""


class _Moments(NamedTuple):
    """Second moments of pooled queries and of centred keys, per head: [H,d,d] each."""

    queries: Tensor
    keys: Tensor


def sparse_layers(model: nn.Module) -> list[SparseAttention]:
    """Return the sparse attention modules of a model, first layer first."""
    return [m for m in model.modules() if isinstance(m, SparseAttention)]


@torch.no_grad()
def calibrate_from_weights(model: nn.Module) -> None:
    """Set the projections from the weights, as if the normalised input of each layer were white noise."""
    backbone = backbone_of(model)
    tables = backbone.rotary_table() if backbone.rotary else None
    for number, (layer, attention) in enumerate(zip(backbone.layers, backbone.attentions, strict=True)):
        if not isinstance(attention, SparseAttention):
            continue
        # An orthogonal basis and its negative have the moments of white noise. A random basis also suits qk-norm.
        norm, width = layer.entry_norm, backbone.width
        noise = torch.randn(width, width, generator=torch.Generator().manual_seed(number))
        basis = (torch.linalg.qr(noise)[0] * width**0.5).to(norm.weight)
        bias = 0 if getattr(norm, "bias", None) is None else norm.bias  # RMSNorm has no bias.
        q, k, _ = attention.heads(torch.cat([basis, -basis])[None] * norm.weight + bias)
        queries, keys = (x[0].transpose(0, 1).double() for x in (q, k))
        if tables is not None:
            table = (tables[number] if tables.ndim == 4 else tables).index_select(-2, layer.curve.order)
            queries, keys = (_at_all_positions(attention, x, table) for x in (queries, keys))
        keys = keys - keys.mean(1, keepdim=True)
        moments = _Moments(*(x.mT @ x / x.shape[1] for x in (queries, keys)))
        _set_from_moments(attention, moments, backbone.grid)


def _at_all_positions(attention: SparseAttention, x: Tensor, table: Tensor, positions: int = 256) -> Tensor:
    """Return vectors [H,m,d] with the moments of x [H,n,d], rotated (RoPE) to evenly spaced positions."""
    sample = table[..., :: max(1, table.shape[-2] // positions), :].double()
    mean = x.mean(1, keepdim=True)
    spread = _roots((x - mean).mT @ (x - mean) / x.shape[1])[0] * x.shape[2] ** 0.5
    vectors = torch.cat([mean + spread, mean - spread], 1).transpose(0, 1)
    every = vectors[:, None].expand(-1, sample.shape[-2], -1, -1)
    return attention.rotate(every, sample).flatten(0, 1).transpose(0, 1)


def calibrate_from_images(
    model: nn.Module, images: Sequence[Tensor], progress: Progress | None = None, seed: int = 0
) -> None:
    """Set the projections from images, while all layers use dense attention.

    Dense attention gives each layer the input that it has in the dense model. Activations of one image are held at a
    time.

    Args:
        model: Sparse model.
        images: Images [1,3,H,W], normalised as the model expects.
        progress: Callback that counts images over all passes; see `Progress`.
        seed: Seed of the order of the images and of the sampled queries.
    """
    steps, done, moments = PASSES * len(images), itertools.count(1), dict[SparseAttention, _Moments]()

    def tick() -> None:
        """Report one more image."""
        if progress:
            progress("calibrating", next(done), len(images) + steps)

    for image in images:
        for attention, qkv in _dense_pass(model, image):
            _add_moments(moments, attention, qkv)
        tick()
    grid, generator = backbone_of(model).grid, torch.Generator().manual_seed(seed)
    for attention in sparse_layers(model):
        _set_from_moments(attention, moments[attention], grid)
    learners = {x: _Learner(x, steps * STEPS_PER_IMAGE) for x in moments if isinstance(x.select, KeySelector)}
    for _ in range(PASSES):
        for number in torch.randperm(len(images), generator=generator).tolist():
            for attention, qkv in _dense_pass(model, images[number]) if learners else ():
                learners[attention].learn(qkv, generator)
            tick()


def _dense_pass(model: nn.Module, image: Tensor) -> Iterable[tuple[SparseAttention, Tensor]]:
    """Run a model with dense attention and return each sparse layer with its qkv [1,N,3C]."""
    calls: list[tuple[SparseAttention, Tensor]] = []
    with observe(model, lambda attention, qkv, _: calls.append((attention, qkv)), densely=True), torch.no_grad():
        model(image)
    return calls


Observer = Callable[[SparseAttention, Tensor, "Tensor | None"], None]
"""Callback that receives a sparse layer, its qkv [B,N,3C], and the token sizes [B,N] where tokens are merged."""


@contextlib.contextmanager
def observe(model: nn.Module, observer: Observer, densely: bool = False) -> Iterator[None]:
    """Call `observer` for every layer that is sparse in the current budget, inside a `with` block.

    Args:
        model: Sparse model.
        observer: Callback; see `Observer`.
        densely: Use dense attention in all layers and merge no tokens inside the block.
    """

    def look(attention: Any, inputs: Any, output: Any) -> None:
        """Pass the layer's qkv and token sizes to the observer."""
        if attention.sparsity.keep != 1:
            observer(attention, output[1], inputs[2])

    attentions = [part for part in model.modules() if isinstance(part, PackedAttention)]
    with contextlib.ExitStack() as stack:
        for attention in attentions:
            attention.densely = densely
            stack.callback(delattr, attention, "densely")
            if isinstance(attention, SparseAttention):
                stack.callback(attention.register_forward_hook(look).remove)
        yield


def _patch_heads(attention: SparseAttention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v [B,H,P,d] of the patch tokens."""
    q, k, v = (x[:, :, attention.num_prefix :] for x in ops.split_heads(qkv, attention.geometry.heads))
    return q, k, v


def _add_moments(moments: dict[SparseAttention, _Moments], attention: SparseAttention, qkv: Tensor) -> None:
    """Add the moments of one image to those of an attention layer."""
    q, k, _ = _patch_heads(attention, qkv)
    pooled_queries = ops.run_means(q.double(), attention.sparsity.query_pool)[0]
    keys = k[0].double()
    keys = keys - keys.mean(1, keepdim=True)
    new = _Moments(pooled_queries.mT @ pooled_queries / pooled_queries.shape[1], keys.mT @ keys / keys.shape[1])
    old = moments.get(attention)
    moments[attention] = new if old is None else _Moments(old.queries + new.queries, old.keys + new.keys)


@torch.no_grad()
def _set_from_moments(attention: SparseAttention, moments: _Moments, grid: tuple[int, int]) -> None:
    """Set a predictor to the best low-rank projections under the given moments."""
    select, channels = attention.select, attention.sparsity.channels
    if isinstance(select, LandmarkSelector):
        shared = _Moments(*(moment.mean(0, keepdim=True) for moment in moments))
        # The operator scales by the number of heads, the predicted attention by the head dimension.
        proj_q, proj_k = _factors(shared, channels, (attention.geometry.scale * attention.geometry.heads**0.5) ** 0.5)
        select.proj_q.copy_(proj_q[0].mT)
        select.proj_k.copy_(proj_k[0].mT)
        _set_landmarks(select, select.down.shape[0] - 1, grid)
    elif isinstance(select, KeySelector):
        proj_q, proj_k = _factors(moments, channels)
        select.proj_q.copy_(proj_q)
        select.proj_k.copy_(proj_k)


def _factors(moments: _Moments, channels: int, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the best rank-c factors of the form q . k under the two moments (truncated SVD after whitening)."""
    root_q, unroot_q = _roots(moments.queries)
    root_k, unroot_k = _roots(moments.keys)
    u, values, vh = torch.linalg.svd(root_q @ root_k)
    share = values[:, None, :channels].sqrt() * gain
    return unroot_q @ u[:, :, :channels] * share, unroot_k @ vh.mT[:, :, :channels] * share


def _set_landmarks(select: LandmarkSelector, patches: int, grid: tuple[int, int]) -> None:
    """Set the landmarks to runs of the Hilbert curve, or of the token order where tokens are pruned."""
    landmarks = select.down.shape[1]
    place = torch.from_numpy(hilbert_order(*(grid if math.prod(grid) == patches else (1, patches))).argsort())
    member = F.one_hot(place * landmarks // patches, landmarks).float()
    select.down.copy_(F.pad(member / member.sum(0), (0, 0, 1, 0)))
    # The class token contributes a little to every landmark.
    select.up.copy_(F.pad(UP_START * member, (0, 0, 1, 0), value=UP_CLASS))


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of symmetric matrices [H,d,d] and its inverse, with a floor for tiny eigenvalues."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(values.amax(-1, keepdim=True) * 1e-9 + 1e-30)
    return (vectors * values.sqrt()[:, None]) @ vectors.mT, (vectors * values.rsqrt()[:, None]) @ vectors.mT


class _Learner:
    """Gradient descent on one layer's predictor."""

    def __init__(self, attention: SparseAttention, steps: int) -> None:
        """Create the optimiser and a cosine schedule over `steps` steps."""
        select = cast(KeySelector, attention.select)
        rate = LEARNING_RATE * select.proj_q.detach().abs().mean().item()
        self.attention, self.optimiser = attention, torch.optim.Adam([select.proj_q, select.proj_k], lr=rate)
        self.schedule = CosineAnnealingLR(self.optimiser, steps)

    def learn(self, qkv: Tensor, generator: torch.Generator) -> None:
        """Take `STEPS_PER_IMAGE` steps on one image, each with newly sampled queries."""
        for _ in range(STEPS_PER_IMAGE):
            with torch.enable_grad():
                selection_loss(self.attention, qkv, generator).backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.schedule.step()


def selection_loss(
    attention: SparseAttention,
    qkv: Tensor,
    generator: torch.Generator,
    sizes: Tensor | None = None,
) -> Tensor:
    """Return the loss of a predictor against the attention that its layer's queries have.

    Preset "edge": Kullback-Leibler divergence of the predicted scores of sampled pooled queries from the maximum of
    their queries' attention, summed over the heads. Preset "paper": squared error of sampled rows of the predicted
    attention, summed over keys and heads (Sparsifiner, section 3.3). Both are means over batch and rows, and need no N
    x N matrix.

    Args:
        attention: Sparse attention layer.
        qkv: Packed queries, keys and values [B,N,3C]. They are detached; gradients flow to the predictor only.
        generator: Source of the random sample of queries.
        sizes: Number of patches in each token [B,N], where tokens are merged.
    """
    if isinstance(attention.select, LandmarkSelector):
        return _landmark_loss(attention, qkv.detach(), generator)
    return _pooled_query_loss(attention, qkv.detach(), generator, sizes)


def _pooled_query_loss(
    attention: SparseAttention, qkv: Tensor, generator: torch.Generator, sizes: Tensor | None
) -> Tensor:
    """Return the loss of a `KeySelector`; see `selection_loss`."""
    select = cast(KeySelector, attention.select)
    query_pool = attention.sparsity.query_pool
    with torch.no_grad():
        q, k, v = (x.float() for x in _patch_heads(attention, qkv))
        sizes = None if sizes is None else sizes[:, attention.num_prefix :]
        counts = 0.0 if sizes is None else sizes.log()[:, None, None]
        deviation = ops.value_deviation(v, attention.layout.key_pool, sizes)
        bonus = attention.sparsity.value_power / 2 * deviation.log()[:, :, None]
        # An incomplete last pool is left out: its padding would contribute to the target.
        pools = q[:, :, : q.shape[2] // query_pool * query_pool].unflatten(2, (-1, query_pool))
        sample = torch.randperm(pools.shape[2], generator=generator)[: QUERIES_PER_STEP // query_pool].to(pools.device)
        queries = pools[:, :, sample]
        pooled_queries = queries.mean(3)
        by_query = (attention.geometry.scale * queries.flatten(2, 3) @ k.mT + counts).log_softmax(-1)
        highest = by_query.unflatten(2, queries.shape[2:4]).amax(3)
        target = (highest + bonus).log_softmax(-1)
    predicted = ops.pooled_query_logits(
        pooled_queries, k, select.proj_q, select.proj_k, query_pool=1, scale=attention.geometry.scale
    )
    loss = F.kl_div((predicted + counts + bonus).log_softmax(-1), target, reduction="sum", log_target=True)
    mean: Tensor = loss / (pooled_queries.shape[0] * pooled_queries.shape[2])
    return mean


def _landmark_loss(attention: SparseAttention, qkv: Tensor, generator: torch.Generator) -> Tensor:
    """Return the loss of a `LandmarkSelector`; see `selection_loss`."""
    select = cast(LandmarkSelector, attention.select)
    with torch.no_grad():
        q, k, _ = (x.float() for x in ops.split_heads(qkv, attention.geometry.heads))
        sample = 1 + torch.randperm(q.shape[2] - 1, generator=generator)[:QUERIES_PER_STEP].to(q.device)
        rows = q[:, :, sample]
        target = (attention.geometry.scale * rows @ k.mT).softmax(-1)
    # The first row is a placeholder for the class token, whose attention is not predicted.
    queries = torch.cat([q[:, :, :1], rows], 2)
    predicted = torch_landmarks.landmark_attention(queries, k, select.inputs(), attention.geometry.heads**-0.5)
    loss: Tensor = (predicted - target).square().sum() / (target.shape[0] * target.shape[2])
    return loss
