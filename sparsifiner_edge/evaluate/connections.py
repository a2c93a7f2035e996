"""What a student attended to, for one image, layer by layer, and what of it reached an output.

A layer's attention is a matrix over its tokens whose rows sum to 1, exactly what the operator weighed values by: a
cell's share is spread over the tokens that it is the mean of, by their sizes, and a merged token counts as the patches
that it is made of. `reaching` multiplies these matrices (Abnar and Zuidema 2020), each entry weighed by how long a
vector it adds to the token, beside the token itself (as Kobayashi et al. 2021 weigh a single layer).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import KeySelector, LandmarkAttention, PackedAttention, SparseAttention
from sparsifiner_edge.sparse.calibrate import observed
from sparsifiner_edge.sparse.layer import CarriedTokens, SparseLayer
from sparsifiner_edge.sparse.outputs import tokens_of
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise


class SeenLayer(NamedTuple):
    """A layer at work on one image.

    Attributes:
        layer: the module. tokens: as they enter it. normed: what attention gets [1,N,D]. qkv: [1,N,3C].
        left: tokens as they leave it. dense: whether it attended to all.
    """

    layer: SparseLayer
    tokens: CarriedTokens
    normed: Tensor
    qkv: Tensor
    left: CarriedTokens
    dense: bool

    @property
    def attention(self) -> PackedAttention:
        """The layer's."""
        return self.layer.own_attention

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.tokens.values.shape[1] - self.tokens.positions.shape[1]

    @property
    def sizes(self) -> Tensor:
        """Patches that each token stands for [N]."""
        count = self.tokens.values.shape[1]
        return torch.ones(count) if self.tokens.sizes is None else self.tokens.sizes[0].float()

    @property
    def sparse(self) -> SparseAttention | None:
        """Its attention, where it reads lists."""
        return cast(SparseAttention, self.attention) if not self.dense else None


class LayerWeights(NamedTuple):
    """What a layer weighed values by: attention [H,N,N], rows sum to 1; of that on cells [H,N]; what each tile reads
    [H,T,P], bool, None where all is read.
    """

    attention: Tensor
    cells: Tensor
    read: Tensor | None


@torch.no_grad()
def look(student: Student, image: Pixels, densely: bool = False) -> list[SeenLayer]:
    """Run a student on an image uint8 [H,W,3] and keep what its layers saw; densely: with dense attention, unmerged.

    Raises:
        ConfigError: no layer of it is sparse or merges; or it prunes tokens: what is gone attends to nothing.
    """
    layers = [layer for layer in student.backbone.layers if isinstance(layer, SparseLayer)]
    if not layers:
        raise ConfigError(f"{student.name} is dense: all tokens attend to all.", "Give a sparse student.")
    if student.sparsity.token_keep:
        raise ConfigError(f"{student.name} prunes tokens.", 'Explain it without: --token-keep "".')
    seen: list[SeenLayer] = []
    with contextlib.ExitStack() as stack:
        if densely:
            stack.enter_context(observed(student.model, lambda *_: None, densely=True))
        for layer in layers:
            stack.enter_context(_watched(layer, seen))
        tokens_of(student.model.eval(), normalise(torch.from_numpy(image)[None], student.normalisation))
    return seen


@contextlib.contextmanager
def _watched(layer: SparseLayer, seen: list[SeenLayer]) -> Iterator[None]:
    found: dict[str, Any] = {}

    def attended(own: PackedAttention, inputs: Any, outputs: Any) -> None:
        # Asked for now: `densely` is over once the model has run.
        reads = isinstance(own, SparseAttention) and not own.densely and own.sparsity.keep != 1
        found.update(normed=inputs[0], qkv=outputs[1], dense=not reads)

    hooks = [
        layer.register_forward_pre_hook(lambda own, inputs: found.update(tokens=own.arrived(inputs[0]))),
        layer.own_attention.register_forward_hook(attended),
        layer.register_forward_hook(lambda own, _, out: seen.append(SeenLayer(own, left=own.arrived(out), **found))),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def weights_of(seen: SeenLayer) -> LayerWeights:
    """See `LayerWeights`."""
    geometry, sparse = seen.attention.geometry, seen.sparse
    q, k, _ = (x[0].float() for x in ops.split_heads(seen.qkv, geometry.heads))
    bare = geometry.scale * q @ k.mT
    sizes, prefix = seen.sizes, seen.prefix
    if sparse is None:
        whole = bare.add_(sizes.log()).softmax(-1)
        return LayerWeights(whole, torch.zeros(whole.shape[:2]), None)
    lists = sparse.indices(seen.qkv, seen.tokens.sizes)[0].long()
    if isinstance(sparse, LandmarkAttention):
        return _of_queries(bare, lists, prefix)
    read = torch.zeros(*lists.shape[:2], bare.shape[2] - prefix, dtype=torch.bool).scatter_(2, lists, True)
    return _of_tiles(bare, sizes, prefix, read, sparse.sparsity.tile, sparse.layout.cell)


def _of_queries(bare: Tensor, lists: Tensor, prefix: int) -> LayerWeights:
    """Of the published method: one list per query over all tokens."""
    listed = torch.zeros(bare.shape[0], lists.shape[1], bare.shape[2], dtype=torch.bool).scatter_(2, lists, True)
    rows = bare[:, prefix:].masked_fill(~listed, -torch.inf).softmax(-1)
    whole = torch.cat([bare[:, :prefix].softmax(-1), rows], 1)
    return LayerWeights(whole, torch.zeros(whole.shape[:2]), listed[:, :, prefix:])


def _of_tiles(bare: Tensor, sizes: Tensor, prefix: int, read: Tensor, tile: int, cell: int) -> LayerWeights:
    """Of lists that tiles share, and cells: bare logits [H,N,N], sizes [N], read [H,T,P]."""
    patches = bare.shape[2] - prefix
    weighed, counts = bare + sizes.log(), sizes[prefix:]
    tiles = torch.arange(patches) // tile
    listed = read[:, tiles]
    logits = [weighed[:, prefix:, :prefix], weighed[:, prefix:, prefix:].masked_fill(~listed, -torch.inf)]
    if cell:
        cells = torch.arange(patches) // cell
        member = torch.nn.functional.one_hot(cells).float()
        rest = counts * ~listed
        total = rest @ member
        mean = (bare[:, prefix:, prefix:] * rest) @ member / total.clamp_min(1e-9)
        logits.append(torch.where(total > 0, mean + total.clamp_min(1e-9).log(), -torch.inf))
    shares = torch.cat(logits, -1).softmax(-1)
    own = shares[..., : prefix + patches]
    on_cells = torch.zeros(own.shape[:2])
    if cell:
        spread = (shares[..., prefix + patches :] / total.clamp_min(1e-9))[..., cells] * rest
        on_cells = spread.sum(-1)
        own = own + torch.nn.functional.pad(spread, (prefix, 0))
    first = weighed[:, :prefix].softmax(-1)
    none = torch.zeros(bare.shape[0], prefix)
    return LayerWeights(torch.cat([first, own], 1), torch.cat([none, on_cells], 1), read)


class ScoreParts(NamedTuple):
    """Why keys were chosen: they are ranked by the sum of both.

    Attributes:
        probe: the most that a probe of the tile wants the key, a log share [H,T,P]. deviation: weighed logarithm of how
            far its value lies from its cell's mean [H,P].
    """

    probe: Tensor
    deviation: Tensor


@torch.no_grad()
def scores_of(seen: SeenLayer) -> ScoreParts | None:
    """Of a layer whose lists belong to tiles, else None."""
    sparse = seen.sparse
    if sparse is None or isinstance(sparse, LandmarkAttention):
        return None
    settings, sizes, select = sparse.selection, seen.tokens.sizes, cast(KeySelector, sparse.select)
    del settings["keys"]
    power = settings.pop("value_power")
    probe = ops.key_scores(seen.qkv, select.proj_q, select.proj_k, **settings, value_power=0.0, sizes=sizes)
    v = ops.split_heads(seen.qkv, sparse.geometry.heads)[2][:, :, seen.prefix :]
    deviation = ops.value_deviation(v, sparse.layout.cell, None if sizes is None else sizes[:, seen.prefix :])
    return ScoreParts(probe[0], power * deviation[0].log())


@torch.no_grad()
def reaching(
    layers: Sequence[SeenLayer],
    row: Tensor,
    by_length: bool = True,
    tell: Callable[[SeenLayer, LayerWeights], None] | None = None,
) -> Tensor:
    """What of each patch reached some tokens of the end: [prefix+P], P original patches along the curve.

    Args:
        row: how much of each token that leaves the last layer [N]; the result sums to its sum.
        by_length: weigh by the length of what is added; else attention's mean over the heads and the token itself, by
            halves.
        tell: called with each layer and its weights, the last first.
    """
    for seen in reversed(layers):
        weights, row = weights_of(seen), _unmerged(row, seen)
        if by_length:  # No [N,N] mean over the heads is made: it would take longer than all else.
            lengths, own = _lengths(seen)[:, :, None], seen.tokens.values[0].norm(dim=-1)
            row = row / ((weights.attention @ lengths)[..., 0].sum(0) + own)
            row = ((row @ weights.attention) * lengths[..., 0]).sum(0) + row * own
        else:
            row = ((row @ weights.attention).mean(0) + row) / 2
        if tell:
            tell(seen, weights)
    return row


def _lengths(seen: SeenLayer) -> Tensor:
    """Of what a head adds to a token that attends to one key alone: [H,N]."""
    v = ops.split_heads(seen.qkv, seen.attention.geometry.heads)[2]

    def added(values: Tensor) -> Tensor:
        return seen.layer.after_attention(seen.attention.joined(seen.normed, values.transpose(1, 2).flatten(2)))

    nothing, found = added(torch.zeros_like(v)), []
    for head in range(v.shape[1]):
        alone = torch.zeros_like(v)
        alone[:, head] = v[:, head]
        found.append((added(alone) - nothing)[0].norm(dim=-1))
    return torch.stack(found)


def _unmerged(row: Tensor, seen: SeenLayer) -> Tensor:
    """Of the tokens that leave, to those before they merged: each gets its part by size."""
    before, after, prefix = seen.tokens, seen.left, seen.prefix
    if after.values.shape[1] == before.values.shape[1]:
        return row
    assert after.places is not None
    first = torch.arange(after.places.shape[1]) if before.places is None else before.places[0]
    target = torch.zeros(before.positions.shape[1], dtype=torch.long)
    target[first] = after.places[0]
    index = torch.cat([torch.arange(prefix), prefix + target])
    total = torch.zeros(len(row)).index_add_(0, index, seen.sizes)
    return (row / total)[index] * seen.sizes
