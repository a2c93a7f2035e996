"""What every power sensor offers, and how one says that it is not there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

ReadNumber = Callable[[], float]
"""Reads one rail; raises OSError or ValueError."""


class UnavailableError(Exception):
    """A sensor is not there, or does not answer; the message says why. Never leaves this folder's public functions."""


class Reading(NamedTuple):
    """One look at a sensor.

    Attributes:
        watts: power by rail; a rail whose value was unusable is left out, and named in `problems`.
        joules: energy counters by rail, as the sensor counts them: they start anywhere and may wrap.
        problems: what was wrong with this reading, one short sentence each.
    """

    watts: Mapping[str, float] = {}
    joules: Mapping[str, float] = {}
    problems: tuple[str, ...] = ()


class SensorDescription(msgspec.Struct, frozen=True, kw_only=True):
    """A `PowerSensor` in a result; not_used: its `probes`. idle_s, readings: of a recording by it."""

    name: str
    total: str
    rails: list[str]
    period_s: float
    averaging_s: float
    not_used: dict[str, str]
    idle_s: list[float] | None = None
    readings: int | None = None


@dataclasses.dataclass(frozen=True)
class PowerSensor:
    """A way to read power; see `find_sensor`.

    Attributes:
        name: "ina238", "ina3221", "tegrastats", "nvml", "rapl" or "none".
        total: what the total is made of, for people.
        rails: every rail, those of the total included.
        total_rails: the rails whose sum is the total: never a rail together with a part of it.
        period_s: how often it is worth reading.
        read: takes a reading; raises OSError, ValueError or UnavailableError. May be called again after it did.
        close: releases what reading holds, such as a process.
        averaging_s: the time over which the sensor itself averages, or after which it refreshes its value.
        wraps_j: the joules at which a rail's counter starts again from 0; a rail that is not named never wraps.
        probes: by sensor, why those that are preferred to this one are not there.
    """

    name: str
    total: str
    rails: tuple[str, ...]
    total_rails: tuple[str, ...]
    period_s: float
    read: Callable[[], Reading]
    close: Callable[[], None] = lambda: None
    averaging_s: float = 0.0
    wraps_j: Mapping[str, float] = dataclasses.field(default_factory=dict)
    probes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def available(self) -> bool:
        """Whether there is any power to read."""
        return bool(self.rails)

    def describe(self, idle_s: list[float] | None = None, readings: int | None = None) -> SensorDescription:
        """For a result's `method`."""
        return SensorDescription(
            name=self.name,
            total=self.total,
            rails=list(self.rails),
            period_s=self.period_s,
            averaging_s=self.averaging_s,
            not_used=dict(self.probes),
            idle_s=idle_s,
            readings=readings,
        )


def read_text(path: Path) -> str:
    """A small system file, stripped of blanks and null bytes.

    Raises:
        OSError: as reading does.
    """
    return path.read_bytes().decode("ascii", "replace").strip("\0\n\t ")


def read_number(path: Path) -> float:
    """The number at the start of a small system file: "732", "732 mW" and "732\\n" are all 732.

    Raises:
        OSError: as reading does.
        ValueError: no finite number stands there; the message names the file.
    """
    text = read_text(path)
    try:
        value = float(text.split()[0])
    except (IndexError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path} holds {text[:40]!r}, not a number")
    return value


def why(error: BaseException) -> str:
    """An error in one line, without Python's decoration."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def read_rails(rails: Mapping[str, ReadNumber]) -> tuple[dict[str, float], tuple[str, ...]]:
    """All rails, one after another, and why some of them failed, which leaves a gap.

    Raises:
        UnavailableError: all fail.
    """
    values: dict[str, float] = {}
    problems: list[str] = []
    for rail, read in rails.items():
        try:
            values[rail] = read()
        except (OSError, ValueError) as error:
            problems.append(why(error))
    if not values:
        raise UnavailableError("; ".join(problems))
    return values, tuple(problems)
