"""The power monitors of NVIDIA's Jetson boards through the kernel: INA3221 (three rails each), INA238 (the input).

Files: the kernel's Documentation/hwmon/ina3221.rst and ina238.rst (JetPack 5 and later): millivolts, milliamperes;
power in microwatts. JetPack 4 shows them through `tegrastats` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sparsifiner_edge.profiles.sensors.base import (
    PowerSensor,
    Reading,
    ReadNumber,
    UnavailableError,
    read_number,
    read_rails,
    read_text,
)

_WHOLE_BOARD = ("VIN", "VDD_IN", "POM_5V_IN", "5V_IN", "VDD_5V_IN")
"""Rails that feed all the others, first found counts: a sum with one of them would count power twice."""
_DRIVERS = Path("sys/bus/i2c/drivers")
# Six files of an INA3221 on a 400 kHz bus take some 2 ms, most of them waiting: 2 % of one core at this period.
_PERIOD_S = 0.1
_MICRO = 1e-6


def find_ina238(root: Path) -> PowerSensor:
    """Thor: VIN on an INA238, and the rails of its INA3221 beside it."""
    driver = root / _DRIVERS / "ina238"
    chips = _chips(driver)
    if len(chips) != 1:  # The driver names no channel.
        raise UnavailableError(f"{len(chips)} INA238 under {driver}; only one alone is known as the board's input")
    rails: dict[str, ReadNumber] = {"VIN": lambda: read_number(chips[0] / "power1_input") * _MICRO}
    return _sensor("ina238", rails | dict(_hwmon_rails(root / _DRIVERS / "ina3221")), driver)


def find_ina3221(root: Path) -> PowerSensor:
    """JetPack 5 and later: INA3221 through hwmon."""
    driver = root / _DRIVERS / "ina3221"
    return _sensor("ina3221", dict(_hwmon_rails(driver)), driver)


def board_sensor(
    name: str,
    rails: Sequence[str],
    period_s: float,
    read: Callable[[], Reading],
    close: Callable[[], None] = lambda: None,
) -> PowerSensor:
    """Of a Jetson's rails: its total is the rail that feeds the others, else their sum."""
    whole = [rail for rail in _WHOLE_BOARD if rail in rails][:1]
    parts = whole or list(rails)
    if whole:
        total = f"{whole[0]}, which feeds the other rails"
    elif len(parts) == 1:
        total = f"{parts[0]} alone"
    else:
        total = f"sum of {', '.join(parts)}; reads below a wall meter"
    return PowerSensor(name, total, tuple(rails), tuple(parts), period_s, read, close)


def _sensor(name: str, rails: dict[str, ReadNumber], driver: Path) -> PowerSensor:
    """Of rails whose total answers; a part that does not is named with each reading."""
    if not rails:
        raise UnavailableError(f"no INA3221 with named rails under {driver}")

    def read() -> Reading:
        watts, problems = read_rails(rails)
        return Reading(watts, problems=problems)

    sensor = board_sensor(name, list(rails), _PERIOD_S, read)
    for rail in sensor.total_rails:
        rails[rail]()
    return sensor


def _chips(driver: Path) -> list[Path]:
    """Folder of every chip of a driver, in the order of its bus address."""
    return sorted(driver.glob("*-00*/hwmon/hwmon*"))


def _hwmon_rails(driver: Path) -> Iterator[tuple[str, ReadNumber]]:
    """in1 to in3 are the rails; in4 to in6 their shunts, in7 the shunts' sum. A rail that is not wired reads "NC"."""
    for folder in _chips(driver):
        for channel in (1, 2, 3):
            label = _label(folder / f"in{channel}_label")
            if label and _label(folder / f"in{channel}_enable") != "0":
                yield label, partial(_watts, folder / f"in{channel}_input", folder / f"curr{channel}_input")


def _label(path: Path) -> str | None:
    try:
        text = read_text(path)
    except FileNotFoundError:
        return None
    return text if re.fullmatch(r"[\w.+ -]+", text) and text.upper() != "NC" else None


def _watts(millivolts: Path, milliamperes: Path) -> float:
    return read_number(millivolts) * read_number(milliamperes) * _MICRO
