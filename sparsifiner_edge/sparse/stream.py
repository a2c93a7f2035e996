"""Streaming form of a model: each layer keeps its keys and values from frame to frame.

An incremental update passes some of the tokens through the layers. They attend to all tokens, and the part behind the
layers receives all tokens, recomputed and stored ones.

The model itself runs, whatever its library and the module around it. Only its layers differ. The first layer takes the
tokens of the update instead of its input, each layer passes its tokens on through a `Passage`, and a decoder that reads
an intermediate layer receives all tokens in raster order. Attention is dense and no tokens merge: an update of all
tokens is the dense model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsifiner_edge.errors import UnsupportedModelError
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import PackedAttention, mix
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.layer import SparseLayer, TokenOrder
from sparsifiner_edge.sparse.patch import restore_model

_NOTHING = torch.empty(0)
_LIKE = 0.1
"""Decrease of the cosine similarity that lowers the weight of a token by a factor of e; see `carry`."""
_FEW = 1e-6
"""Added to the sum of weights, so that a token without similar recomputed tokens stays as it is; see `carry`."""


@dataclasses.dataclass
class Passage:
    """Inputs and outputs of one call of the model, apart from images and model outputs.

    N is the number of tokens and M the number of those computed. L is the number of stored keys and values: N, or a
    single one that counts as 0 where all tokens are computed.

    Attributes:
        rows: Tokens that are computed, ascending, prefix first: int64 [M]. None runs the embedding only.
        tokens: Input of the first layer [1,M,C], then the output of each layer. All tokens [1,N,C] where only the
            embedding runs.
        counts: 1 for each stored key, 0 where it is recomputed: [1,L].
        places: Index of each token in the N stored tokens followed by the M new ones: int64 [N].
        still: 1 for each computed row whose patch did not change, else 0: [1,M]; see `carry`.
        caches: Stored keys and values of each layer, [1,L,2C].
        new: Queries, keys and values of the computed rows in each layer, [1,M,3C].
        read: Stored outputs [1,N,C] of the layers that the model itself reads, by layer number.
        outputs: Updated outputs [1,N,C] of these layers, by layer number.
        watched: Outputs of these layers, detached from their inputs, by layer number. None disables watching.
        shift: Rows and columns by which the view moved since the first stored key, [2]; see `moved_table`. None: 0.
    """

    rows: Tensor | None = None
    tokens: Tensor | None = None
    counts: Tensor = _NOTHING
    places: Tensor = _NOTHING
    still: Tensor = _NOTHING
    caches: list[Tensor] = dataclasses.field(default_factory=list)
    new: list[Tensor] = dataclasses.field(default_factory=list)
    read: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    outputs: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    watched: dict[int, Tensor] | None = None
    shift: Tensor | None = None


def carry(stored: Tensor, values: Tensor, rows: Tensor, still: Tensor) -> Tensor:
    """Return stored tokens, moved by the drift of similar tokens that were recomputed.

    Unchanged patches still drift with the global context, and similar patches drift in the same direction. The drift is
    measured on rows that were recomputed although their patch did not change.

    Args:
        stored: Stored tokens [1,N,C].
        values: Recomputed tokens [1,M,C].
        rows: Index of each recomputed token, int64 [M].
        still: 1 for each recomputed token whose patch did not change, else 0: [1,M].
    """
    before = stored.index_select(1, rows)
    alike = functional.normalize(stored, dim=-1) @ functional.normalize(before, dim=-1).mT
    weights = ((alike - 1) / _LIKE).exp() * still[:, None]
    return stored + weights @ (values - before) / (weights.sum(-1, keepdim=True) + _FEW)


def moved_table(table: Tensor, grid: tuple[int, int], shift: Tensor) -> Tensor:
    """Return the table of rotary embeddings for a view that moved by whole patches.

    Angles are linear in the position, so that each channel turns by the same angle per row and per column. Attention
    depends on differences of positions only: keys that are stored need no change.

    Args:
        table: Sines, then cosines, with the patches in raster order: [P,2d], or [H,P,2d] where heads differ.
        grid: Rows and columns of patches.
        shift: Rows and columns by which the view moved, [2]; whole numbers.
    """
    sines, cosines = table.chunk(2, -1)
    angle = table.new_zeros(())
    for axis, neighbour in enumerate((grid[1] if grid[0] > 1 else 0, 1 if grid[1] > 1 else 0)):
        (sine, first), (cosine, other) = ((x[..., neighbour, :], x[..., 0, :]) for x in (sines, cosines))
        step = torch.atan2(sine * other - cosine * first, cosine * other + sine * first)
        angle = angle + shift[axis] * step
    sine, cosine = angle.sin().unsqueeze(-2), angle.cos().unsqueeze(-2)
    return torch.cat([sines * cosine + cosines * sine, cosines * cosine - sines * sine], -1)


class Call:
    """Passage of the current call, shared by the layers of a model.

    It is an object because torch's exporter would copy a list.
    """

    passage = Passage()


class StreamAttention(PackedAttention):
    """Attention of the computed tokens to all tokens.

    Attributes:
        call: Passage holder, shared by the layers of a model.
    """

    call: Call

    def attend(self, qkv: Tensor, _: Tensor | None = None) -> Tensor:
        """Attend from the rows of qkv [1,M,3C] to their own and the stored keys; see `PackedAttention.attend`."""
        passage, geometry = self.call.passage, self.geometry
        caches = passage.caches[len(passage.new)]
        passage.new.append(qkv)
        return ops.cached_attention(qkv, caches, passage.counts, num_heads=geometry.heads, scale=geometry.scale)


class StreamLayer(SparseLayer):
    """Mixin for a library's transformer layer.

    Attributes:
        call: Passage holder, shared by the layers of a model.
        number: Number of the layer.
        grid: Rows and columns of patches.
    """

    call: Call
    number: int
    grid: tuple[int, int]

    def forward(self, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        """Run the layer on the passage's tokens.

        The input x [B,N,C] is used only by the first layer when the embedding alone runs.

        Returns:
            All tokens [1,N,C] in raster order if the model reads this layer, else x.
        """
        passage, prefix = self.call.passage, self.curve.prefix
        if passage.rows is None:
            passage.tokens = x if self.number == 0 else passage.tokens
            return x
        table, values = self.rotary_table(*masks, **options), cast(Tensor, passage.tokens)
        if table is not None and passage.shift is not None:
            table = moved_table(table, self.grid, passage.shift)
        turns = None if table is None else table.index_select(-2, passage.rows[prefix:] - prefix)
        attended, _ = self.packed_attention(self.entry_norm(values), turns)
        values = values + self.after_attention(attended)
        passage.tokens = values = values + self.after_mlp(values)
        if self.number not in passage.read:
            return x
        stored = carry(passage.read[self.number], values, passage.rows, passage.still)
        every = torch.cat([stored, values], 1).index_select(1, passage.places)
        if passage.watched is not None:
            every = passage.watched[self.number] = every.detach().requires_grad_()
        passage.outputs[self.number] = every
        return every


class StreamModel(nn.Module):
    """Vision transformer, or a module that contains one, in its streaming form.

    Attributes:
        module: The given module, patched in place.
        backbone: Vision transformer in it.
        read: Numbers of the layers whose outputs the module itself reads, ascending, always with the last layer.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        """Patch a module in place.

        Args:
            module: Module that is called with images only and returns a tuple of tensors.
            example: Image as the module takes it.

        Raises:
            UnsupportedModelError: If the model has no streaming form.
        """
        super().__init__()
        self.backbone = backbone_of(module)
        sparsity = self.backbone.sparsity
        if sparsity is not None and (sparsity.token_keep or sparsity.preset == "paper"):
            raise _refused("it prunes tokens" if sparsity.token_keep else "preset paper always selects its keys")
        self.module, self._call = restore_model(module), Call()
        unused = torch.empty(0, dtype=torch.long)
        curve = TokenOrder(unused, unused, self.backbone.prefix)
        for number, (layer, attention) in enumerate(zip(self.backbone.layers, self.backbone.attentions, strict=True)):
            attention.__class__ = mix("StreamAttention", StreamAttention, type(attention))
            layer.__class__ = mix(f"Stream{type(layer).__name__}", StreamLayer, type(layer))
            attention.call = layer.call = self._call
            layer.number, layer.curve, layer.grid = number, curve, self.backbone.grid
        self.read = self._find_read(example)

    @property
    def count(self) -> int:
        """Number of tokens N of an image, prefix included."""
        return self.backbone.prefix + self.backbone.patches

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens [1,N,C] of one image that enter the first layer.

        Raises:
            UnsupportedModelError: If the tokens have another shape.
        """
        self._call.passage = Passage()
        self.module(images)
        tokens, wanted = self._call.passage.tokens, (1, self.count, self.backbone.width)
        if tokens is None or tokens.shape != wanted:
            sizes = None if tokens is None else list(tokens.shape)
            raise _refused(f"its layers receive tokens of shape {sizes} for one image instead of {list(wanted)}")
        return tokens

    def step(self, images: Tensor, passage: Passage) -> tuple[Tensor, ...]:
        """Compute the passage's rows and return the outputs of the module.

        The passage then holds `new` for the computed rows, `outputs` for all tokens, and the tokens after the final
        norm in `tokens`.

        Args:
            images: Images, for modules that read pixels besides the vision transformer.
            passage: Inputs of the update; receives its results.
        """
        self._call.passage = passage
        outputs: tuple[Tensor, ...] = self.module(images)
        passage.tokens = self.backbone.final_norm(list(passage.outputs.values())[-1])
        return outputs

    def whole(self, tokens: Tensor, read: Iterable[int] | None = None) -> Passage:
        """Return the passage of a full frame, which computes all tokens and stores none.

        Args:
            tokens: Embedded tokens [1,N,C].
            read: Numbers of the layers whose outputs are read. None takes the model's own.
        """
        rows, (heads, dim, _) = torch.arange(self.count), self.backbone.geometry
        caches = [tokens.new_zeros(1, 1, 2 * heads * dim)] * len(self.backbone.layers)
        return Passage(
            rows,
            tokens,
            tokens.new_zeros(1, 1),
            len(rows) + rows,
            tokens.new_zeros(1, len(rows)),
            caches,
            read=dict.fromkeys(self.read if read is None else read, torch.zeros_like(tokens)),
        )

    def _find_read(self, example: Tensor) -> tuple[int, ...]:
        """Return the layers that an output depends on by gradient, or all layers if an output has no gradient."""
        every = range(len(self.backbone.layers))
        with torch.no_grad():
            passage = self.whole(self.embed(example), every)
        passage.watched = {}
        with torch.enable_grad():
            outputs = self.step(example, passage)
            total = torch.stack([output.float().sum() for output in outputs]).sum()
        if not all(output.requires_grad for output in outputs):
            return tuple(every)
        gradients = torch.autograd.grad(total, list(passage.watched.values()), allow_unused=True)
        read = [number for number, slope in zip(passage.watched, gradients, strict=True) if slope is not None]
        return tuple(sorted({*read, every[-1]}))


def _refused(reason: str) -> UnsupportedModelError:
    """Return the error for a model without a streaming form."""
    return UnsupportedModelError(f"Streaming does not support this model: {reason}.", "Leave --stream out.")
