"""SparsityConfig: what is sparse in a student, and the sizes that follow for a given number of patches."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from sparsifiner_edge.bounds import MOST_COUNT
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.records import read_record, write_record

PRESETS: dict[str, dict[str, float]] = {
    "edge": {},
    "paper": {"tile": 1, "probe": 1, "cells": 0, "value_power": 0.0},
}
"""Presets, and the values in which each differs from the defaults of `SparsityConfig`."""
LANDMARK_FACTOR, TOP_COEFFICIENTS, BASIS_THRESHOLD = 6, 8, 0.02
"""Of the preset "paper": tokens per landmark; coefficients that count for a query, and entries of the basis that do."""
Share = Annotated[float, Meta(gt=0, le=1)]
Pairs = Annotated[int, Meta(ge=0, le=MOST_COUNT)]
"""Of tokens that merge in a layer."""
_Count = Annotated[int, Meta(ge=1, le=MOST_COUNT)]
Keep = Share | Annotated[tuple[Share, ...], Meta(min_length=1)]
"""One share of keys for all layers, or one of each; the last goes on to the layers that are left."""
_FIX = "Give shares in (0, 1], such as 0.25, and whole numbers, such as tile 16, probe 8, merge 160,0."


def require(condition: bool, what: str, fix: str) -> None:
    """Raise a `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(what, fix)


def require_lists(**values: object) -> None:
    """Raise a `ConfigError` where a value is no list or tuple: of a text every letter would count."""
    for name, value in values.items():
        require(isinstance(value, (list, tuple)), f"{name} is {value!r:.80}.", "Give a list.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes of one sparse layer over `patches` patch tokens.

    Attributes:
        keys: K, keys read by each tile: patch keys, in the preset "paper" any tokens.
        tiles: T, runs of `tile` consecutive patches, the last one ragged.
        cell: tokens per background cell (0: no background).
        cells: R, number of cells that result.
    """

    patches: int
    keys: int
    tiles: int
    cell: int
    cells: int


@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    """What a student's attention layers do: read it as `student.sparsity`. Where they are left out `sparsify` chooses
    cells, and keep where tokens merge, by the model.

    Attributes:
        preset: "edge": tile-shared key lists, probe predictor and background cells. "paper": the published method
            (Sparsifiner, CVPR 2023), one list per query and nothing else.
        keep: share of the patch keys that each tile of queries reads, in (0, 1]; 1 means dense. Several: of the layers
            from the first; the last goes on to those left, so that (1, .1, .25, 1) is dense in layer 0 and from 3 on.
        tile: consecutive queries that share one key list.
        probe: consecutive queries whose mean is the predictor's query; divides `tile`.
        channels: low-rank width c of the predictor, at most the head dimension.
        cells: background cells R that stand for the keys not selected; 0 for none.
        value_power: weight, in the selection, of how far a key's value lies from its cell's mean.
        token_keep: (layer, share) pairs, layers ascending: after the attention of each such layer only that share of
            the patch tokens is kept, those that the class token attends to most (EViT, ICLR 2022, section 3).
        merge: pairs of patch tokens that become one after the attention of each layer (`sparse.merge`): one rate for
            all layers, the first and the last, or one of each; empty: none. A layer merges at most a quarter of its
            patches.
        merge_window: partners along the curve that a token is compared with; see the operator MatchTokens.

    Raises:
        ConfigError: a value is out of range.
    """

    preset: str = "edge"
    keep: Keep = 0.25
    tile: _Count = 16
    probe: _Count = 8
    channels: _Count = 24
    cells: Annotated[int, Meta(ge=0, le=MOST_COUNT)] = 16
    value_power: Annotated[float, Meta(ge=0, le=64)] = 2.0  # far beyond useful values, within float32
    token_keep: tuple[tuple[Annotated[int, Meta(ge=0, le=MOST_COUNT)], Annotated[float, Meta(gt=0, lt=1)]], ...] = ()
    merge: tuple[Pairs, ...] = ()
    merge_window: Annotated[int, Meta(ge=2, le=MOST_COUNT, multiple_of=2)] = 16

    def __post_init__(self) -> None:
        # What NumPy computes counts as the number that it is.
        settings = msgspec.to_builtins(vars(self), enc_hook=lambda x: getattr(x, "tolist", lambda: repr(x))())
        checked = read_record(settings, _Ranges, "The settings of sparsity", _FIX, ConfigError)
        one = isinstance(checked.keep, tuple) and len(set(checked.keep)) == 1
        shortened = {"keep": checked.keep[0]} if one else {}
        if not any(checked.merge):
            shortened["merge"] = ()
        for name, value in {**msgspec.structs.asdict(checked), **shortened}.items():
            object.__setattr__(self, name, value)
        require(self.preset in tuple(PRESETS), f"preset is {self.preset!r}.", f"Choose one of: {', '.join(PRESETS)}.")
        for name, value in PRESETS[self.preset].items():
            require(
                getattr(self, name) == value,
                f"{name} is {getattr(self, name)}, but the preset {self.preset!r} has {value}.",
                "Leave it out, or choose another preset.",
            )
        what, fix = f"tile {self.tile} is not a multiple of probe {self.probe}.", "Choose a probe that divides the tile"
        require(self.tile % self.probe == 0, what, f"{fix}, such as 4 and 16.")
        layers = [layer for layer, _ in self.token_keep]
        fix = "Give distinct layer indices from 0, ascending, such as 3:.7,6:.7."
        require(layers == sorted(set(layers)), f"tokens are pruned at layers {layers}.", fix)
        alone, what = not self.token_keep and self.preset == "edge", "merge cannot be combined with token_keep"
        require(not self.merge or alone, f"{what} or the preset paper.", "Leave one of them out.")

    @property
    def is_dense(self) -> bool:
        """True when nothing is left out: plain attention in every layer, and all tokens to the end."""
        return self.keep == 1 and not self.token_keep and not self.merge

    def of_share(self, share: float) -> SparsityConfig:
        """The config of a layer that reads this share of its keys."""
        return dataclasses.replace(self, keep=share)

    def layout(self, patches: int, prefix: int = 1) -> Layout:
        """Sizes for `patches` patch tokens after `prefix` others, where one share of keys is for all layers.

        Raises:
            ConfigError: tile or cells exceed the number of patches.
        """
        most = f"the {patches} patches of this image size."
        require(self.tile <= patches, f"tile {self.tile} exceeds {most}", "Choose a smaller tile or a larger image.")
        # Where tokens merge, later layers see too few for as many cells: then each holds four tokens.
        wanted = min(self.cells, patches // 4) if self.merge else self.cells
        require(wanted <= patches, f"{self.cells} cells exceed {most}", "Choose fewer cells or a larger image.")
        cell = math.ceil(patches / wanted) if wanted else 0
        choices = patches + prefix if self.preset == "paper" else patches
        if isinstance(self.keep, tuple):
            raise TypeError("the layout of which layer? See of_share.")
        return Layout(
            patches=patches,
            keys=share_of(self.keep, choices),
            tiles=math.ceil(patches / self.tile),
            cell=cell,
            cells=math.ceil(patches / cell) if cell else 0,
        )

    def to_dict(self) -> Any:
        """JSON-ready fields."""
        return write_record(self)

    @classmethod
    def for_preset(cls, preset: str = "edge", **settings: Any) -> SparsityConfig:
        """The defaults of a preset, with those `settings` that are not None; `merge` may be one number.

        Raises:
            ConfigError: no such preset, or a value is out of range or cannot be combined with it.
        """
        fields = {name: value for name, value in settings.items() if value is not None}
        fields |= {"merge": (fields["merge"],)} if isinstance(fields.get("merge"), int) else {}
        return cls(**{"preset": preset, **PRESETS.get(preset, {}), **fields})

    @classmethod
    def from_dict(cls, fields: object) -> SparsityConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: it is not a dict, or a field is unknown, of another type or out of range.
        """
        fix = f"Known fields: {', '.join(_Ranges.__struct_fields__)}."
        return cls(**msgspec.structs.asdict(read_record(fields, _Ranges, "sparsity", fix, ConfigError)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a student spends in place of its own settings; None leaves one as it is.

    Attributes:
        keep, token_keep, merge: as in `SparsityConfig`; merge is a tuple: (8,), or (160, 0) from first to last layer.

    Example:
        >>> Budget(keep=0.1, merge=(160, 0)).is_unchanged
        False
    """

    keep: Keep | None = None
    token_keep: tuple[tuple[int, float], ...] | None = None
    merge: tuple[int, ...] | None = None

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing is changed."""
        return self == Budget()


_KINDS = get_type_hints(SparsityConfig, include_extras=True)
_Ranges: Any = msgspec.defstruct(
    "_Ranges",
    [(field.name, _KINDS[field.name], field.default) for field in dataclasses.fields(SparsityConfig)],
    forbid_unknown_fields=True,
)
"""What each setting may be, as `SparsityConfig` declares it."""


def share_of(share: float, count: int) -> int:
    """How many of `count` are kept, rounded up, at least one."""
    # Rounded first: 0.1 * 1370 is 137.00000000000003 in binary and must not become 138.
    return min(max(1, math.ceil(round(share * count, 9))), count)


def parse_token_keep(text: str) -> tuple[tuple[int, float], ...]:
    """ "3:.7,6:.7" -> ((3, 0.7), (6, 0.7)); "" -> ().

    Raises:
        ConfigError: not a list of layer:share.
    """
    try:
        pairs = [part.split(":") for part in text.split(",") if part.strip()]
        return tuple((int(layer), float(share)) for layer, share in pairs)
    except ValueError:
        raise ConfigError(f"token_keep holds {text!r}.", "Give layer:share pairs such as 3:.7,6:.7,9:.7.") from None


def parse_keep(text: str) -> Keep:
    """ "0.25" -> .25; ".1,.1,1" -> (.1, .1, 1.0), from the first layer on.

    Raises:
        ConfigError: neither of these.
    """
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        fix = "Give a share such as 0.25, or shares from the first layer on, such as .1,.1,.25,1."
        raise ConfigError(f"keep is {text!r}.", fix) from None
    return shares if len(shares) > 1 else shares[0]


def keep_text(keep: Keep) -> str:
    """As `parse_keep` reads it: "0.25", "0.1,0.1,1"."""
    return ",".join(f"{share:g}" for share in (keep if isinstance(keep, tuple) else (keep,)))


def parse_merge(text: str) -> tuple[int, ...]:
    """ "80" -> (80,); "160..0" -> (160, 0), from the first layer to the last; "160,140,0" -> one of each layer.

    Raises:
        ConfigError: neither of these.
    """
    try:
        rates = tuple(map(int, text.replace("..", ",").split(",")))
    except ValueError:
        rates = ()
    fits = rates and (".." not in text or len(rates) == 2)
    require(bool(fits), f"merge is {text!r}.", "Give a rate such as 80, first and last such as 160..0, or a list.")
    return rates


def merge_text(merge: tuple[int, ...]) -> str:
    """As `parse_merge` reads it: "80", "160..0", "3,2,1"."""
    return ("..".join if len(merge) == 2 else ",".join)(map(str, merge))
