"""Settings of sparsity, and the sizes that follow from them for a number of patches."""

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
    "paper": {"tile": 1, "query_pool": 1, "background_tokens": 0, "value_power": 0.0},
}
"""Preset -> values in which it differs from the defaults of `SparsityConfig`."""
LANDMARK_FACTOR = 6
"""Tokens per landmark in the preset "paper"."""
TOP_COEFFICIENTS = 8
"""Number of coefficients that the preset "paper" keeps for each query."""
BASIS_THRESHOLD = 0.02
"""Entries of the basis up to this value count as 0 in the preset "paper"."""
Share = Annotated[float, Meta(gt=0, le=1)]
"""Share above 0; 1 is everything."""
Pairs = Annotated[int, Meta(ge=0, le=MOST_COUNT)]
"""Number of token pairs that merge in a layer."""
_Count = Annotated[int, Meta(ge=1, le=MOST_COUNT)]
"""Positive whole number."""
Keep = Share | Annotated[tuple[Share, ...], Meta(min_length=1)]
"""Share of the keys: one for all layers, or one per layer; the last applies to all remaining layers."""
_FIX = "Give shares in (0, 1], such as 0.25, and whole numbers, such as tile 16, query_pool 8, merge 160,0."


def require(condition: bool, what: str, fix: str) -> None:
    """Raise a `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(what, fix)


def require_lists(**values: object) -> None:
    """Raise a `ConfigError` for any value that is not a list or tuple (a string would count letter by letter)."""
    for name, value in values.items():
        require(isinstance(value, (list, tuple)), f"{name} is {value!r:.80}.", "Give a list.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one sparse layer.

    Attributes:
        patches: P, number of patch tokens.
        keys: K, number of keys that each query tile reads; patch keys, in the preset "paper" any tokens.
        tiles: T, number of query tiles; the last one may be shorter.
        key_pool: Tokens that are averaged into one background token; 0 without background tokens.
        background_tokens: R, number of background tokens.
    """

    patches: int
    keys: int
    tiles: int
    key_pool: int
    background_tokens: int


@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    """Settings of sparse attention and token merging; a model's own are `student.sparsity`.

    If they are left out, `sparsify` chooses `background_tokens`, and `keep` for a model that merges, by the size of the
    model.

    Attributes:
        preset: "edge": key lists shared by query tiles, pooled queries and background tokens. "paper": the published
            method (Sparsifiner, CVPR 2023), one key list per query and nothing else.
        keep: Share of the patch keys that each query tile reads, in (0, 1]; 1 is dense attention. A tuple gives one
            share per layer; the last applies to all remaining layers: (1, .1, .25, 1) is dense in layer 0 and from
            layer 3 on.
        tile: Number of consecutive queries that share one key list.
        query_pool: Number of consecutive queries that are averaged into one query of the predictor; divides `tile`.
        channels: Low-rank width c of the predictor, at most the head dimension.
        background_tokens: Number R of averaged tokens that stand for the keys that were not selected; 0 for none.
        value_power: Weight, in the selection, of the distance of a key's value from the mean of its pool.
        token_keep: (layer, share) pairs, layers ascending. After the attention of such a layer only this share of the
            patch tokens is kept: those that the class token attends to most (EViT, ICLR 2022, section 3).
        merge: Number of token pairs that merge after the attention of each layer (`sparse.merge`): one number for all
            layers, the first and the last, or one per layer; empty for none. A layer merges at most a quarter of its
            patches.
        merge_window: Number of neighbours along the curve that a token is compared with; see the operator MatchTokens.

    Raises:
        ConfigError: A value is out of range.
    """

    preset: str = "edge"
    keep: Keep = 0.25
    tile: _Count = 16
    query_pool: _Count = 8
    channels: _Count = 24
    background_tokens: Annotated[int, Meta(ge=0, le=MOST_COUNT)] = 16
    value_power: Annotated[float, Meta(ge=0, le=64)] = 2.0  # far beyond useful values, within float32
    token_keep: tuple[tuple[Annotated[int, Meta(ge=0, le=MOST_COUNT)], Annotated[float, Meta(gt=0, lt=1)]], ...] = ()
    merge: tuple[Pairs, ...] = ()
    merge_window: Annotated[int, Meta(ge=2, le=MOST_COUNT, multiple_of=2)] = 16

    def __post_init__(self) -> None:
        # Accept NumPy numbers.
        settings = msgspec.to_builtins(vars(self), enc_hook=lambda x: getattr(x, "tolist", lambda: repr(x))())
        checked = read_record(settings, _Ranges, "Sparsity settings", _FIX, ConfigError)
        uniform = isinstance(checked.keep, tuple) and len(set(checked.keep)) == 1
        shortened = {"keep": checked.keep[0]} if uniform else {}
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
        what, fix = (
            f"tile {self.tile} is not a multiple of query_pool {self.query_pool}.",
            "Choose a query_pool that divides the tile",
        )
        require(self.tile % self.query_pool == 0, what, f"{fix}, such as 4 and 16.")
        layers = [layer for layer, _ in self.token_keep]
        fix = "Give distinct layer indices from 0, ascending, such as 3:.7,6:.7."
        require(layers == sorted(set(layers)), f"tokens are pruned at layers {layers}.", fix)
        alone, what = not self.token_keep and self.preset == "edge", "merge cannot be combined with token_keep"
        require(not self.merge or alone, f"{what} or the preset paper.", "Leave one of them out.")

    @property
    def is_dense(self) -> bool:
        """True if attention is dense in every layer and all tokens are kept."""
        return self.keep == 1 and not self.token_keep and not self.merge

    def of_share(self, share: float) -> SparsityConfig:
        """Return the settings of a layer that reads this share of its keys."""
        return dataclasses.replace(self, keep=share)

    def layout(self, patches: int, prefix: int = 1) -> Layout:
        """Return the sizes for `patches` patch tokens after `prefix` other tokens; `keep` must be one share.

        Raises:
            ConfigError: `tile` or `background_tokens` exceeds the number of patches.
        """
        most = f"the {patches} patches of this image size."
        require(self.tile <= patches, f"tile {self.tile} exceeds {most}", "Choose a smaller tile or a larger image.")
        # Merging leaves later layers with fewer tokens. A background token then still averages at least four of them.
        wanted = min(self.background_tokens, patches // 4) if self.merge else self.background_tokens
        require(
            wanted <= patches,
            f"{self.background_tokens} background tokens exceed {most}",
            "Choose fewer background tokens or a larger image.",
        )
        key_pool = math.ceil(patches / wanted) if wanted else 0
        choices = patches + prefix if self.preset == "paper" else patches
        if isinstance(self.keep, tuple):
            raise TypeError("keep differs by layer, so there is no single layout. Use of_share first.")
        return Layout(
            patches=patches,
            keys=share_of(self.keep, choices),
            tiles=math.ceil(patches / self.tile),
            key_pool=key_pool,
            background_tokens=math.ceil(patches / key_pool) if key_pool else 0,
        )

    def to_dict(self) -> Any:
        """Return the fields, ready for JSON."""
        return write_record(self)

    @classmethod
    def for_preset(cls, preset: str = "edge", **settings: Any) -> SparsityConfig:
        """Return the defaults of a preset, changed by the `settings` that are not None; `merge` may be one number.

        Raises:
            ConfigError: There is no such preset, or a value is out of range or does not fit the preset.
        """
        fields = {name: value for name, value in settings.items() if value is not None}
        fields |= {"merge": (fields["merge"],)} if isinstance(fields.get("merge"), int) else {}
        return cls(**{"preset": preset, **PRESETS.get(preset, {}), **fields})

    @classmethod
    def from_dict(cls, fields: object) -> SparsityConfig:
        """Build settings from the result of `to_dict`.

        Raises:
            ConfigError: `fields` is no dict, or a field is unknown, of another type or out of range.
        """
        fix = f"Known fields: {', '.join(_Ranges.__struct_fields__)}."
        return cls(**msgspec.structs.asdict(read_record(fields, _Ranges, "sparsity", fix, ConfigError)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Settings that replace a model's own at export or evaluation; None keeps the model's own.

    Attributes:
        keep: As in `SparsityConfig`.
        token_keep: As in `SparsityConfig`.
        merge: As in `SparsityConfig`: (8,), or (160, 0) from the first to the last layer.

    Example:
        >>> Budget(keep=0.1, merge=(160, 0)).is_unchanged
        False
    """

    keep: Keep | None = None
    token_keep: tuple[tuple[int, float], ...] | None = None
    merge: tuple[int, ...] | None = None

    @property
    def is_unchanged(self) -> bool:
        """True if no setting is replaced."""
        return self == Budget()


_KINDS = get_type_hints(SparsityConfig, include_extras=True)
_Ranges: Any = msgspec.defstruct(
    "_Ranges",
    [(field.name, _KINDS[field.name], field.default) for field in dataclasses.fields(SparsityConfig)],
    forbid_unknown_fields=True,
)
"""Allowed range of each setting, as `SparsityConfig` declares it."""


def share_of(share: float, count: int) -> int:
    """Return a share of `count`, rounded up, and at least one."""
    # Rounded first: 0.1 * 1370 is 137.00000000000003 in binary and must not become 138.
    return min(max(1, math.ceil(round(share * count, 9))), count)


def parse_token_keep(text: str) -> tuple[tuple[int, float], ...]:
    """Parse layer:share pairs: "3:.7,6:.7" -> ((3, 0.7), (6, 0.7)), "" -> ().

    Raises:
        ConfigError: The text is no list of layer:share.
    """
    try:
        pairs = [part.split(":") for part in text.split(",") if part.strip()]
        return tuple((int(layer), float(share)) for layer, share in pairs)
    except ValueError:
        raise ConfigError(f"token_keep holds {text!r}.", "Give layer:share pairs such as 3:.7,6:.7,9:.7.") from None


def parse_keep(text: str) -> Keep:
    """Parse a share, or one share per layer: "0.25" -> .25, ".1,.1,1" -> (.1, .1, 1.0).

    Raises:
        ConfigError: The text is neither.
    """
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        fix = "Give a share such as 0.25, or shares from the first layer on, such as .1,.1,.25,1."
        raise ConfigError(f"keep is {text!r}.", fix) from None
    return shares if len(shares) > 1 else shares[0]


def keep_text(keep: Keep) -> str:
    """Format shares as `parse_keep` reads them: "0.25", "0.1,0.1,1"."""
    return ",".join(f"{share:g}" for share in (keep if isinstance(keep, tuple) else (keep,)))


def parse_merge(text: str) -> tuple[int, ...]:
    """Parse merge rates: "80" -> (80,), "160..0" -> (160, 0) (first to last layer), "160,140,0" -> one per layer.

    Raises:
        ConfigError: The text is none of these.
    """
    try:
        rates = tuple(map(int, text.replace("..", ",").split(",")))
    except ValueError:
        rates = ()
    fits = rates and (".." not in text or len(rates) == 2)
    require(bool(fits), f"merge is {text!r}.", "Give a rate such as 80, first and last such as 160..0, or a list.")
    return rates


def merge_text(merge: tuple[int, ...]) -> str:
    """Format merge rates as `parse_merge` reads them: "80", "160..0", "3,2,1"."""
    return ("..".join if len(merge) == 2 else ",".join)(map(str, merge))
