"""Boards: what an estimate or a build needs to know of a device, as validated TOML with a source for every value."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sparsifiner_edge.artifacts import parse_toml, read_toml
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.records import read_record
from sparsifiner_edge.text import printable

Text = Annotated[str, Meta(pattern=r"\S")]
Version = Annotated[str, Meta(pattern=r"^[0-9]{1,4}(\.[0-9]{1,4}){0,3}$")]
Gigahertz = Annotated[float, Meta(ge=0.05, le=10)]
Watts = Annotated[float, Meta(ge=0.5, le=5000)]
Bandwidth = Annotated[float, Meta(ge=0.1, le=1e5)]
Cores = Annotated[int, Meta(ge=0, le=200_000)]
Peak = Annotated[float, Meta(ge=0, le=1e5)]


class PowerMode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A power mode, such as nvpmodel's: it caps clocks, and what power it is named after.

    Attributes:
        id: number that the tool takes. name: as the tool prints it.
        cap_w: watts it is meant for; 0: none is stated.
        gpu_ghz: highest GPU clock. cuda_cores: those that are switched on. bandwidth_gb_s: at the memory clock's cap.
            Each 0: as without the mode.
    """

    id: Annotated[int, Meta(ge=0, le=255)]
    name: Text
    cap_w: Watts = 0.0
    gpu_ghz: Gigahertz = 0.0
    cuda_cores: Cores = 0
    bandwidth_gb_s: Bandwidth = 0.0


class JetPack(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Versions of what a JetPack release installs; those of CUDA and TensorRT are numbers with points between."""

    version: Text
    cuda: Version
    tensorrt: Version
    python: Text


class Board(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A device. Peaks are dense (no structured sparsity), counted as two operations per multiply-accumulate.

    Attributes:
        name: as `--board` takes it. title: as people say it.
        kind: "gpu" or "cpu".
        sm: CUDA compute capability times ten, such as 87; 0 for a CPU. cuda_cores: of the GPU; 0 for a CPU.
        clock_ghz: highest clock (boost), at which the peaks hold.
        fp32_tflops: of plain float32 arithmetic. tf32_tflops: of float32 rounded to 19 bits in tensor cores; 0: none.
        fp16_tflops: products of float16, summed in float32; 0: none. int8_tops: 0: none.
        memory_gb, bandwidth_gb_s: 1e9 bytes.
        tdp_w: most power, of the module or card. idle_w: power at rest; 0: not known.
        power_modes, jetpack: empty where the device has none.
        sources: a public document, or the computation, by key; one key for each value or list of values above.
        unverified: keys whose value no document confirmed.
    """

    name: Text
    title: Text
    kind: Annotated[str, Meta(pattern=r"^(gpu|cpu)$")]
    clock_ghz: Gigahertz
    fp32_tflops: Annotated[float, Meta(ge=1e-4, le=1e4)]
    memory_gb: Annotated[float, Meta(ge=0.1, le=1e4)]
    bandwidth_gb_s: Bandwidth
    tdp_w: Watts
    sources: dict[str, Text]
    sm: Annotated[int, Meta(ge=0, le=200)] = 0
    cuda_cores: Cores = 0
    tf32_tflops: Peak = 0.0
    fp16_tflops: Peak = 0.0
    int8_tops: Peak = 0.0
    idle_w: Annotated[float, Meta(ge=0, le=5000)] = 0.0
    power_modes: tuple[PowerMode, ...] = ()
    jetpack: tuple[JetPack, ...] = ()
    unverified: tuple[Text, ...] = ()

    def peak(self, precision: str) -> float:
        """Operations per second at "fp32", "tf32", "fp16" or "int8".

        Raises:
            ConfigError: no such precision, or the board has no arithmetic for it.
        """
        if precision not in self.peaks:
            what = f"{self.name} states no peak for {printable(precision)}."
            raise ConfigError(what, f"Choose one of: {', '.join(self.peaks)}.")
        return self.peaks[precision] * 1e12

    @property
    def peaks(self) -> dict[str, float]:
        """In 1e12 operations per second, by the precisions that it has arithmetic for."""
        return {name: getattr(self, field) for name, field in _PEAKS.items() if getattr(self, field)}

    def release(self, jetpack: str | None) -> JetPack | None:
        """The newest of its JetPacks, of a series or version ("6", "6.2") if one is given; None where it has none.

        Raises:
            ConfigError: it has not that one.
        """
        matching = [one for one in self.jetpack if jetpack in (None, one.version, one.version.partition(".")[0])]
        if jetpack is not None and not matching:
            known = ", ".join(one.version for one in self.jetpack)
            fix = f"Choose one of: {known}." if known else "Leave --jetpack out: the board has none."
            raise ConfigError(f"{self.name} has no JetPack {jetpack!r:.40}.", fix)
        return max(matching, key=lambda one: [*map(int, re.findall(r"\d+", one.version))], default=None)

    def in_mode(self, mode: str) -> Board:
        """The same board with clocks, peaks, bandwidth and power of a power mode, given by name or number.

        Raises:
            ConfigError: no such mode.
        """
        for entry in self.power_modes:
            name = entry.name.casefold()
            if mode.strip().casefold() in (name, name.removeprefix("mode_"), str(entry.id)):
                share = (entry.gpu_ghz or self.clock_ghz) / self.clock_ghz
                share *= entry.cuda_cores / self.cuda_cores if entry.cuda_cores else 1.0
                return msgspec.structs.replace(
                    self,
                    clock_ghz=entry.gpu_ghz or self.clock_ghz,
                    cuda_cores=entry.cuda_cores or self.cuda_cores,
                    bandwidth_gb_s=entry.bandwidth_gb_s or self.bandwidth_gb_s,
                    tdp_w=entry.cap_w or self.tdp_w,
                    **{name: getattr(self, name) * share for name in _PEAKS.values()},
                )
        known = ", ".join(f"{m.id} ({m.name})" for m in self.power_modes)
        fix = f"Choose one of: {known}." if known else "Leave --power-mode out: the board has none."
        raise ConfigError(f"{self.name} has no power mode {mode!r}.", fix)


_PEAKS = {"fp32": "fp32_tflops", "tf32": "tf32_tflops", "fp16": "fp16_tflops", "int8": "int8_tops"}
_FOLDER = "sparsifiner_edge.boards"
"""Where `profiles/boards` is installed."""
_BARE = {"name", "title", "sources", "unverified"}
"""Keys that are names or speak of the others, and need no source."""
_DOCUMENT = "See docs/boards.md for the form of a board file."
_MOST_TEXT = 2000
"""Characters of a name or a source."""


def board_names() -> list[str]:
    """Boards that come with the package."""
    folder = importlib.resources.files(_FOLDER)
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_board(name_or_path: str | Path) -> Board:
    """A board of the package by name, or from the user's own TOML file.

    Raises:
        ConfigError: no such board, no TOML, or a key is unknown, missing, mistyped, out of range or without source.
    """
    name, names = str(name_or_path), board_names()
    if name in names:
        return parse_board((importlib.resources.files(_FOLDER) / f"{name}.toml").read_text("utf-8"), name)
    if Path(name).suffix != ".toml":
        raise ConfigError(f"There is no board {name!r}.", f"Choose one of: {', '.join(names)}; or give a TOML file.")
    return _board(read_toml(Path(name), f"Give a TOML file in UTF-8. {_DOCUMENT}"), name)


def parse_board(text: str, origin: str) -> Board:
    """A board from TOML text; `origin` stands in messages.

    Raises:
        ConfigError: see `load_board`.
    """
    return _board(parse_toml(text, origin, _DOCUMENT), origin)


def _harmless(value: Any) -> Any:
    """Texts go into tables, results and manifests."""
    if isinstance(value, Mapping):
        return {name: _harmless(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_harmless(child) for child in value]
    return printable(value, _MOST_TEXT) if isinstance(value, str) else value


def _refuse(origin: str, problem: str, fix: str = _DOCUMENT) -> None:
    raise ConfigError(f"{origin}: {problem}.", fix)


def _board(content: Mapping[str, Any], origin: str) -> Board:
    board = read_record(_harmless(content), Board, origin, _DOCUMENT, ConfigError)
    for name in ("sm", "cuda_cores"):
        if board.kind == "gpu" and not getattr(board, name):
            _refuse(origin, f"{name} is missing, for a board of kind {board.kind!r}")
    for name in sorted(content.keys() - _BARE - board.sources.keys()):
        _refuse(origin, f"{name} has no source", f"Add it to the section [sources]. {_DOCUMENT}")
    for mode in board.power_modes:
        for name, cap in (("cuda_cores", "cuda_cores"), ("gpu_ghz", "clock_ghz"), ("bandwidth_gb_s", "bandwidth_gb_s")):
            if getattr(mode, name) > getattr(board, cap):
                _refuse(origin, f"power mode {mode.name}: {name} exceeds the board's")
    return board


BOARD_COLUMNS = (
    "board",
    "SM",
    "GHz",
    "fp32",
    "fp16",
    "int8",
    "memory, GB",
    "GB/s",
    "W",
    "power modes",
    "JetPack",
)
_FIGURES = ("sm", "clock_ghz", "fp32_tflops", "fp16_tflops", "int8_tops", "memory_gb", "bandwidth_gb_s", "tdp_w")


def board_row(board: Board) -> list[str]:
    """A board under `BOARD_COLUMNS`."""
    cells = [f"{getattr(board, name):g}" if getattr(board, name) else "-" for name in _FIGURES]
    modes = ", ".join(f"{mode.id} {mode.name}" for mode in board.power_modes)
    return [board.name, *cells, modes or "-", ", ".join(entry.version for entry in board.jetpack) or "-"]
