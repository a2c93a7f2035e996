"""Boards: specifications of a device for estimates and builds, as validated TOML with a source for every value."""

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
    """Power mode of a board, such as a mode of nvpmodel: it caps clocks and switches off cores.

    Attributes:
        id: Number of the mode in nvpmodel.
        name: Name that nvpmodel prints.
        cap_w: Power budget in watts; 0 if none is stated.
        gpu_ghz: Highest GPU clock in GHz; 0 if the mode does not change it.
        cuda_cores: Number of CUDA cores that are switched on; 0 if the mode does not change it.
        bandwidth_gb_s: Memory bandwidth in 1e9 bytes per second at the mode's memory clock; 0 if the mode does not
            change it.
    """

    id: Annotated[int, Meta(ge=0, le=255)]
    name: Text
    cap_w: Watts = 0.0
    gpu_ghz: Gigahertz = 0.0
    cuda_cores: Cores = 0
    bandwidth_gb_s: Bandwidth = 0.0


class JetPack(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Software versions of a JetPack release.

    Attributes:
        version: Version of JetPack.
        cuda: Version of CUDA, numbers separated by points.
        tensorrt: Version of TensorRT, numbers separated by points.
        python: Version of Python.
    """

    version: Text
    cuda: Version
    tensorrt: Version
    python: Text


class Board(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Specifications of a device.

    Peaks are dense (without structured sparsity) and count two operations per multiply-accumulate.

    Attributes:
        name: Name that `--board` takes.
        title: Name for people.
        kind: "gpu" or "cpu".
        clock_ghz: Highest (boost) clock in GHz, at which the peaks apply.
        fp32_tflops: Peak of float32 arithmetic.
        memory_gb: Memory in 1e9 bytes.
        bandwidth_gb_s: Memory bandwidth in 1e9 bytes per second.
        tdp_w: Maximum power of the module or card in watts.
        sources: Public document or computation behind each value, by key; one key per value or list of values.
        sm: CUDA compute capability times ten, such as 87; 0 for a CPU.
        cuda_cores: Number of CUDA cores of the GPU; 0 for a CPU.
        tf32_tflops: Peak of tensor cores with float32 rounded to 19 bits; 0 if not supported.
        fp16_tflops: Peak of float16 products accumulated in float32; 0 if not supported.
        int8_tops: Peak of int8 arithmetic; 0 if not supported.
        idle_w: Idle power in watts; 0 if not known.
        power_modes: Power modes; empty if the device has none.
        jetpack: JetPack releases; empty if the device has none.
        unverified: Keys whose value no document confirms.
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
        """Return the operations per second at a precision: "fp32", "tf32", "fp16" or "int8".

        Raises:
            ConfigError: The precision is unknown, or the board does not support it.
        """
        if precision not in self.peaks:
            what = f"{self.name} states no peak for {printable(precision)}."
            raise ConfigError(what, f"Choose one of: {', '.join(self.peaks)}.")
        return self.peaks[precision] * 1e12

    @property
    def peaks(self) -> dict[str, float]:
        """Peak in 1e12 operations per second for each precision that the board supports."""
        return {name: getattr(self, field) for name, field in _PEAKS.items() if getattr(self, field)}

    def release(self, jetpack: str | None) -> JetPack | None:
        """Return the newest JetPack release, optionally of a series or version; None if the board has none.

        Args:
            jetpack: Series or version, such as "6" or "6.2"; None takes any.

        Raises:
            ConfigError: The board does not have this release.
        """
        matching = [r for r in self.jetpack if jetpack in (None, r.version, r.version.partition(".")[0])]
        if jetpack is not None and not matching:
            known = ", ".join(r.version for r in self.jetpack)
            fix = f"Choose one of: {known}." if known else "Leave --jetpack out: the board has none."
            raise ConfigError(f"{self.name} has no JetPack {jetpack!r:.40}.", fix)
        return max(matching, key=lambda r: [*map(int, re.findall(r"\d+", r.version))], default=None)

    def in_mode(self, mode: str) -> Board:
        """Return the board with the clock, peaks, bandwidth and power of a power mode.

        Args:
            mode: Name or number of the power mode.

        Raises:
            ConfigError: The board does not have this power mode.
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
"""Attribute of `Board` with the peak of each precision."""
_FOLDER = "sparsifiner_edge.boards"
"""Package in which `profiles/boards` is installed."""
_BARE = {"name", "title", "sources", "unverified"}
"""Keys that need no source: names, and keys that describe other keys."""
_DOCUMENT = "See docs/jetson.md for the format of a board file."
_MOST_TEXT = 2000
"""Maximum number of characters of a name or a source."""


def board_names() -> list[str]:
    """Return the names of the boards that come with the package."""
    folder = importlib.resources.files(_FOLDER)
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_board(name_or_path: str | Path) -> Board:
    """Load a board of the package by name, or from the user's own TOML file.

    Raises:
        ConfigError: The board does not exist, the file is not TOML, or a key is unknown, missing, mistyped, out of
            range or without a source.
    """
    name, names = str(name_or_path), board_names()
    if name in names:
        return parse_board((importlib.resources.files(_FOLDER) / f"{name}.toml").read_text("utf-8"), name)
    if Path(name).suffix != ".toml":
        raise ConfigError(f"There is no board {name!r}.", f"Choose one of: {', '.join(names)}; or give a TOML file.")
    return _board(read_toml(Path(name), f"Give a TOML file in UTF-8. {_DOCUMENT}"), name)


def parse_board(text: str, origin: str) -> Board:
    """Parse a board from TOML text; `origin` names it in messages.

    Raises:
        ConfigError: See `load_board`.
    """
    return _board(parse_toml(text, origin, _DOCUMENT), origin)


def _harmless(value: Any) -> Any:
    """Make all texts printable, because they go into tables, results and manifests."""
    if isinstance(value, Mapping):
        return {name: _harmless(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_harmless(child) for child in value]
    return printable(value, _MOST_TEXT) if isinstance(value, str) else value


def _refuse(origin: str, problem: str, fix: str = _DOCUMENT) -> None:
    """Raise a `ConfigError` about a board file."""
    raise ConfigError(f"{origin}: {problem}.", fix)


def _board(content: Mapping[str, Any], origin: str) -> Board:
    """Convert parsed content to a board, and check what its types cannot express."""
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
"""Column headings of `board_row`."""
_FIGURES = ("sm", "clock_ghz", "fp32_tflops", "fp16_tflops", "int8_tops", "memory_gb", "bandwidth_gb_s", "tdp_w")


def board_row(board: Board) -> list[str]:
    """Return the table row of a board, for the columns `BOARD_COLUMNS`."""
    figures = [f"{getattr(board, name):g}" if getattr(board, name) else "-" for name in _FIGURES]
    modes = ", ".join(f"{mode.id} {mode.name}" for mode in board.power_modes)
    return [board.name, *figures, modes or "-", ", ".join(entry.version for entry in board.jetpack) or "-"]
