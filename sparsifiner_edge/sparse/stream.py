"""A model as a stream runs it: keys and values of every layer stay from frame to frame; a step takes some of the tokens
through the layers, lets them attend to all, and what is behind the layers gets all tokens, old and new.

The model itself runs, whatever its library and whatever surrounds it: only its layers differ. The first one takes the
step's tokens in place of what comes in, what a layer hands to the next rides beside, and what a decoder reads of a
layer are all tokens in raster order. Attention is dense and nothing merges: a step over all tokens is the dense model.
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
_LIKE, _FEW = 0.1, 1e-6
"""Difference of cosines over which a token says e times less of another one; and what stands for none that says any."""


@dataclasses.dataclass
class Passage:
    """What a call of the model takes and gives beside images and outputs: N tokens, M of them computed, keys and
    values of L kept: N, or one that counts as 0 where all are computed.

    Attributes:
        rows: which tokens are computed, ascending, the prefix first: int64 [M]; None: none, the embedding alone.
        tokens: what the first layer takes, [1,M,C], then what each layer gave; of the embedding alone, all: [1,N,C].
        counts: 1 of each key stored, but 0 where it is computed anew: [1,L].
        places: of each token, where it is in N kept ones with the new ones behind them: int64 [N].
        still: 1 of each row that is computed though its patch did not change, else 0: [1,M]; see `carry`.
        caches: keys and values of each layer, [1,L,2C]. new: of the rows, after their queries, as they come, [1,M,3C].
        read: by number, of layers whose outputs the model itself reads, those stored, [1,N,C]. outputs: what it reads,
            [1,N,C].
        watched: what these layers returned, cut off from what made it; None: they are not watched.
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


def carry(stored: Tensor, values: Tensor, rows: Tensor, still: Tensor) -> Tensor:
    """Tokens that are stored, moved as those moved that are like them and were computed anew. What an image means to a
    token that did not change itself comes and goes with the whole of it, and with like tokens alike.

    Args:
        stored: [1,N,C]. values: of the rows, [1,M,C]. rows: int64 [M]. still: see `Passage`.
    """
    before = stored.index_select(1, rows)
    alike = functional.normalize(stored, dim=-1) @ functional.normalize(before, dim=-1).mT
    weights = ((alike - 1) / _LIKE).exp() * still[:, None]
    return stored + weights @ (values - before) / (weights.sum(-1, keepdim=True) + _FEW)


class Call:
    """Holds the passage of a model's call at hand, for its layers. (Of a list torch's exporter would make copies.)"""

    passage = Passage()


class StreamAttention(PackedAttention):
    """Attention of some tokens to all. Attributes: call: shared by the layers of a model."""

    call: Call

    def attend(self, qkv: Tensor, _: Tensor | None = None) -> Tensor:
        """See `PackedAttention`: qkv [1,M,3C] of the rows."""
        passage, geometry = self.call.passage, self.geometry
        caches = passage.caches[len(passage.new)]
        passage.new.append(qkv)
        return ops.cached_attention(qkv, caches, passage.counts, num_heads=geometry.heads, scale=geometry.scale)


class StreamLayer(SparseLayer):
    """Mixed into the class of a library's layer. Attributes: call: see `StreamAttention`. number: its own."""

    call: Call
    number: int

    def forward(self, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        """x [1,N,C] as the library has it, of which the first layer may take the embedding, and the others nothing."""
        passage, prefix = self.call.passage, self.curve.prefix
        if passage.rows is None:
            passage.tokens = x if self.number == 0 else passage.tokens
            return x
        table, values = self.rotary_table(*masks, **options), cast(Tensor, passage.tokens)
        turns = None if table is None else table.index_select(-2, passage.rows[prefix:] - prefix)
        attended, _ = self.packed_attention(self.entry_norm(values), turns)
        values = values + self.after_attention(attended)
        passage.tokens = values = values + self.after_mlp(values)
        if self.number not in passage.read:
            return x
        stored = carry(passage.read[self.number], values, passage.rows, passage.still)
        whole = torch.cat([stored, values], 1).index_select(1, passage.places)
        if passage.watched is not None:
            whole = passage.watched[self.number] = whole.detach().requires_grad_()
        passage.outputs[self.number] = whole
        return whole


class StreamModel(nn.Module):
    """A module around a vision transformer, or one alone, as a stream runs it.

    Attributes:
        module: what was given. backbone: within it.
        read: numbers of the layers whose outputs the module itself reads, ascending, and of the last.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        """Take over a module, in place.

        Args:
            module: called with images alone; it gives a tuple of tensors. example: an image as it takes them.

        Raises:
            UnsupportedModelError: a stream cannot run it; with the reason.
        """
        super().__init__()
        self.backbone = backbone_of(module)
        sparsity = self.backbone.sparsity
        if sparsity is not None and (sparsity.token_keep or sparsity.preset == "paper"):
            raise _refused("it prunes tokens" if sparsity.token_keep else "preset paper always selects its keys")
        self.module, self._call = restore_model(module), Call()
        none = torch.empty(0, dtype=torch.long)
        curve = TokenOrder(none, none, self.backbone.prefix)
        for number, (layer, attention) in enumerate(zip(self.backbone.layers, self.backbone.attentions, strict=True)):
            attention.__class__ = mix("StreamAttention", StreamAttention, type(attention))
            layer.__class__ = mix(f"Stream{type(layer).__name__}", StreamLayer, type(layer))
            attention.call = layer.call = self._call
            layer.number, layer.curve = number, curve
        self.read = self._find_read(example)

    @property
    def count(self) -> int:
        """Tokens of an image, N, prefix included."""
        return self.backbone.prefix + self.backbone.patches

    def embed(self, images: Tensor) -> Tensor:
        """One image -> the tokens that enter the first layer, [1,N,C]."""
        self._call.passage = Passage()
        self.module(images)
        tokens, wanted = self._call.passage.tokens, (1, self.count, self.backbone.width)
        if tokens is None or tokens.shape != wanted:
            sizes = None if tokens is None else list(tokens.shape)
            raise _refused(f"its layers get tokens {sizes} of one image, and not {list(wanted)}")
        return tokens

    def step(self, images: Tensor, passage: Passage) -> tuple[Tensor, ...]:
        """What the module gives once some rows are computed anew; of these `passage` then has `new`, and of all tokens
        `outputs` and, as `tokens`, what leaves the final norm.

        Args:
            images: for what reads pixels beside the transformer.
        """
        self._call.passage = passage
        outputs: tuple[Tensor, ...] = self.module(images)
        passage.tokens = self.backbone.final_norm(list(passage.outputs.values())[-1])
        return outputs

    def whole(self, tokens: Tensor, read: Iterable[int] | None = None) -> Passage:
        """What a step takes that computes all of an image's tokens [1,N,C], and keeps none of before."""
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
        """By gradients: those that an output depends on; all where one has none, such as a map of classes."""
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
    return UnsupportedModelError(f"No stream runs this model: {reason}.", "Leave --stream out.")
