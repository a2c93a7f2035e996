"""Projections of the predictor: from the weights alone, or better from a few images.

Both ways find, per head, the rank-c matrices that best preserve probe-query . key products: with moments
M_q = E[a a^T] of probe means and M_k = E[(k - mean)(k - mean)^T] of keys (a constant shift of all keys changes no
ranking), the singular vectors of M_q^1/2 M_k^1/2. A short gradient descent on the same images then lowers the
Kullback-Leibler divergence from what the queries of a probe want, to what the predictor answers for their mean. What
they want is the maximum of their attention: a key that one of them needs must be read for all.

The preset "paper" shares its projections between the heads and starts from pooled landmarks: runs of the Hilbert curve,
each read and written as one, so that it is of use before training too.
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
STEPS_PER_IMAGE = 8
QUERIES_PER_STEP = 128
LEARNING_RATE = 0.06
"""Relative to the mean absolute entry of a projection."""
UP_START, UP_CLASS = 0.16, 0.05
"""Entries of the published predictor's up-projection where it starts: of the patches in a landmark, and of the class
token in each. Lists of patches are the same at any scale, but what is learnt is the size of the predicted attention as
well, and from entries of 1 the published schedule does not come back.
"""


class _Moments(NamedTuple):
    """Of probe means and of centred keys, per head: [H,d,d] each."""

    queries: Tensor
    keys: Tensor


def sparse_layers(model: nn.Module) -> list[SparseAttention]:
    """The sparse attention modules of a model, first layer first."""
    return [m for m in model.modules() if isinstance(m, SparseAttention)]


@torch.no_grad()
def calibrate_from_weights(model: nn.Module) -> None:
    """Set the projections from the weights, as if the normalised input of each layer were white noise."""
    backbone = backbone_of(model)
    tables = backbone.rotary_table() if backbone.rotary else None
    for number, (layer, attention) in enumerate(zip(backbone.layers, backbone.attentions, strict=True)):
        if not isinstance(attention, SparseAttention):
            continue
        # Any orthogonal basis and its negative has white noise's moments; a random one is fair to qk-norm, too.
        norm, width = layer.entry_norm, backbone.width
        noise = torch.randn(width, width, generator=torch.Generator().manual_seed(number))
        basis = (torch.linalg.qr(noise)[0] * width**0.5).to(norm.weight)
        bias = 0 if getattr(norm, "bias", None) is None else norm.bias  # RMSNorm has none
        q, k, _ = attention.heads(torch.cat([basis, -basis])[None] * norm.weight + bias)
        queries, keys = (x[0].transpose(0, 1).double() for x in (q, k))
        if tables is not None:
            table = (tables[number] if tables.ndim == 4 else tables).index_select(-2, layer.curve.order)
            queries, keys = (_at_all_positions(attention, x, table) for x in (queries, keys))
        keys = keys - keys.mean(1, keepdim=True)
        moments = _Moments(*(x.mT @ x / x.shape[1] for x in (queries, keys)))
        _set_from_moments(attention, moments, backbone.grid)


def _at_all_positions(attention: SparseAttention, x: Tensor, table: Tensor, positions: int = 256) -> Tensor:
    """Vectors [H,n,d] with the moments of x, turned by RoPE to evenly taken positions: [H,m,d]."""
    some = table[..., :: max(1, table.shape[-2] // positions), :].double()
    mean = x.mean(1, keepdim=True)
    spread = _roots((x - mean).mT @ (x - mean) / x.shape[1])[0] * x.shape[2] ** 0.5
    few = torch.cat([mean + spread, mean - spread], 1).transpose(0, 1)
    return attention.rotate(few[:, None].expand(-1, some.shape[-2], -1, -1), some).flatten(0, 1).transpose(0, 1)


def calibrate_from_images(
    model: nn.Module, images: Sequence[Tensor], progress: Progress | None = None, seed: int = 0
) -> None:
    """Set the projections from images [1,3,H,W], normalised as the model expects.

    The layers attend densely meanwhile, so that each sees what its teacher sees. One image is held at a time.
    """
    steps, done, moments = PASSES * len(images), itertools.count(1), dict[SparseAttention, _Moments]()

    def tick() -> None:
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
    """Run a model with dense attention and yield each sparse layer with its qkv [1,N,3C]."""
    calls: list[tuple[SparseAttention, Tensor]] = []
    with observe(model, lambda attention, qkv, _: calls.append((attention, qkv)), densely=True), torch.no_grad():
        model(image)
    return calls


Observer = Callable[[SparseAttention, Tensor, "Tensor | None"], None]
"""Called with a sparse layer, its qkv [B,N,3C], and the sizes [B,N] of its tokens where they are merged."""


@contextlib.contextmanager
def observe(model: nn.Module, observer: Observer, densely: bool = False) -> Iterator[None]:
    """Let `observer` see every layer that is sparse in the current budget; meanwhile, if `densely`, all attend to all
    keys and no tokens are merged.
    """

    def look(attention: Any, inputs: Any, output: Any) -> None:
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
    q, k, v = (x[:, :, attention.num_prefix :] for x in ops.split_heads(qkv, attention.geometry.heads))
    return q, k, v


def _add_moments(moments: dict[SparseAttention, _Moments], attention: SparseAttention, qkv: Tensor) -> None:
    q, k, _ = _patch_heads(attention, qkv)
    probes = ops.run_means(q.double(), attention.sparsity.probe)[0]
    keys = k[0].double()
    keys = keys - keys.mean(1, keepdim=True)
    new = _Moments(probes.mT @ probes / probes.shape[1], keys.mT @ keys / keys.shape[1])
    old = moments.get(attention)
    moments[attention] = new if old is None else _Moments(old.queries + new.queries, old.keys + new.keys)


@torch.no_grad()
def _set_from_moments(attention: SparseAttention, moments: _Moments, grid: tuple[int, int]) -> None:
    select, channels = attention.select, attention.sparsity.channels
    if isinstance(select, LandmarkSelector):
        shared = _Moments(*(moment.mean(0, keepdim=True) for moment in moments))
        # The operator scales by the number of heads; the attention it stands for, by the head dimension.
        proj_q, proj_k = _factors(shared, channels, (attention.geometry.scale * attention.geometry.heads**0.5) ** 0.5)
        select.proj_q.copy_(proj_q[0].mT)
        select.proj_k.copy_(proj_k[0].mT)
        _set_landmarks(select, select.down.shape[0] - 1, grid)
    elif isinstance(select, KeySelector):
        proj_q, proj_k = _factors(moments, channels)
        select.proj_q.copy_(proj_q)
        select.proj_k.copy_(proj_k)


def _factors(moments: _Moments, channels: int, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """Best rank-c factors of the bilinear form q . k under the two moments (truncated SVD after whitening)."""
    root_q, unroot_q = _roots(moments.queries)
    root_k, unroot_k = _roots(moments.keys)
    u, values, vh = torch.linalg.svd(root_q @ root_k)
    share = values[:, None, :channels].sqrt() * gain
    return unroot_q @ u[:, :, :channels] * share, unroot_k @ vh.mT[:, :, :channels] * share


def _set_landmarks(select: LandmarkSelector, patches: int, grid: tuple[int, int]) -> None:
    """Pooled start: landmarks are runs of the curve; of the order of the tokens, where some of the grid are pruned."""
    landmarks = select.down.shape[1]
    place = torch.from_numpy(hilbert_order(*(grid if math.prod(grid) == patches else (1, patches))).argsort())
    member = F.one_hot(place * landmarks // patches, landmarks).float()
    select.down.copy_(F.pad(member / member.sum(0), (0, 0, 1, 0)))
    # The class token belongs a little to every landmark.
    select.up.copy_(F.pad(UP_START * member, (0, 0, 1, 0), value=UP_CLASS))


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of symmetric matrices [H,d,d] and its inverse, with a floor under tiny eigenvalues."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(values.amax(-1, keepdim=True) * 1e-9 + 1e-30)
    return (vectors * values.sqrt()[:, None]) @ vectors.mT, (vectors * values.rsqrt()[:, None]) @ vectors.mT


class _Learner:
    """The descent of one layer's predictor over `steps` steps."""

    def __init__(self, attention: SparseAttention, steps: int) -> None:
        select = cast(KeySelector, attention.select)
        rate = LEARNING_RATE * select.proj_q.detach().abs().mean().item()
        self.attention, self.optimiser = attention, torch.optim.Adam([select.proj_q, select.proj_k], lr=rate)
        self.schedule = CosineAnnealingLR(self.optimiser, steps)

    def learn(self, qkv: Tensor, generator: torch.Generator) -> None:
        """A few steps on one image, each on other probes."""
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
    """How far a predictor is from what its layer's queries want; qkv [B,N,3C] counts as given, and so do the sizes
    [B,N] of merged tokens; gradient flows to the predictor alone.

    Preset "edge": Kullback-Leibler divergence of the scores of some probes from the maximum of their queries'
    attention, summed over the heads. Preset "paper": squared error of some rows of the predicted attention, summed over
    keys and heads (Sparsifiner, section 3.3). Both are means over batch and rows, and hold no n x n matrix.
    """
    if isinstance(attention.select, LandmarkSelector):
        return _landmark_loss(attention, qkv.detach(), generator)
    return _probe_loss(attention, qkv.detach(), generator, sizes)


def _probe_loss(attention: SparseAttention, qkv: Tensor, generator: torch.Generator, sizes: Tensor | None) -> Tensor:
    select = cast(KeySelector, attention.select)
    probe = attention.sparsity.probe
    with torch.no_grad():
        q, k, v = (x.float() for x in _patch_heads(attention, qkv))
        sizes = None if sizes is None else sizes[:, attention.num_prefix :]
        counts = 0.0 if sizes is None else sizes.log()[:, None, None]
        deviation = ops.value_deviation(v, attention.layout.cell, sizes)
        bonus = attention.sparsity.value_power / 2 * deviation.log()[:, :, None]
        # A ragged last probe is left out: its filling would want keys too.
        runs = q[:, :, : q.shape[2] // probe * probe].unflatten(2, (-1, probe))
        some = torch.randperm(runs.shape[2], generator=generator)[: QUERIES_PER_STEP // probe].to(runs.device)
        queries = runs[:, :, some]
        averaged = queries.mean(3)
        each = (attention.geometry.scale * queries.flatten(2, 3) @ k.mT + counts).log_softmax(-1)
        wanted = each.unflatten(2, queries.shape[2:4]).amax(3)
        true = (wanted + bonus).log_softmax(-1)
    guess = ops.probe_logits(averaged, k, select.proj_q, select.proj_k, probe=1, scale=attention.geometry.scale)
    loss = F.kl_div((guess + counts + bonus).log_softmax(-1), true, reduction="sum", log_target=True)
    mean: Tensor = loss / (averaged.shape[0] * averaged.shape[2])
    return mean


def _landmark_loss(attention: SparseAttention, qkv: Tensor, generator: torch.Generator) -> Tensor:
    select = cast(LandmarkSelector, attention.select)
    with torch.no_grad():
        q, k, _ = (x.float() for x in ops.split_heads(qkv, attention.geometry.heads))
        some = 1 + torch.randperm(q.shape[2] - 1, generator=generator)[:QUERIES_PER_STEP].to(q.device)
        rows = q[:, :, some]
        true = (attention.geometry.scale * rows @ k.mT).softmax(-1)
    # The first row stands for the class token, whose attention is not predicted.
    queries = torch.cat([q[:, :, :1], rows], 2)
    guess = torch_landmarks.landmark_attention(queries, k, select.inputs(), attention.geometry.heads**-0.5)
    loss: Tensor = (guess - true).square().sum() / (true.shape[0] * true.shape[2])
    return loss
