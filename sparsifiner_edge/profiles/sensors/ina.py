"""The power monitors of NVIDIA's Jetson boards through the kernel: INA3221 (three rails each), INA238 (the input).

Files: the kernel's Documentation/hwmon/ina3221.rst and ina238.rst (JetPack 5 and later), and L4T's own iio driver
(JetPack 4): millivolts, milliamperes, milliwatts; INA238's power in microwatts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sparsifiner_edge.profiles.sensors.base import (
    PowerSensor,
    Reading,
    UnavailableError,
    read_number,
    read_rails,
    read_text,
)

WHOLE_BOARD = ("VIN", "VDD_IN", "POM_5V_IN", "5V_IN", "VDD_5V_IN")
"""Rails that feed all the others, first found counts: a sum with one of them would count power twice."""

_CARRIER = "CVB_"
"""Rails of a carrier board (IGX), which feed the module's."""

_DRIVERS = Path("sys/bus/i2c/drivers")
# Six files of an INA3221 on a 400 kHz bus take some 2 ms, most of them waiting: 2 % of one core at this period.
_PERIOD_S = 0.1
_MICRO, _MILLI = 1e-6, 1e-3
Watts = Callable[[], float]


def find_ina238(root: Path) -> PowerSensor:
    """Thor: VIN on an INA238, and the rails of its INA3221 beside it.

    Raises:
        UnavailableError: there is no INA238, or it does not answer.
        OSError, ValueError: its files are not readable.
    """
    rails = dict(_ina238_rails(root / _DRIVERS / "ina238"))
    if not rails:
        raise UnavailableError(f"no INA238 under {root / _DRIVERS / 'ina238'}")
    if "VIN" not in rails:
        raise UnavailableError(f"the INA238 measures {', '.join(rails)}, and none is named as the board's input")
    averaging_s = _averaging_s(root / _DRIVERS / "ina238")
    return _sensor("ina238", rails | dict(_hwmon_rails(root / _DRIVERS / "ina3221")), averaging_s)


def find_ina3221(root: Path) -> PowerSensor:
    """JetPack 5 and later: INA3221 through hwmon.

    Raises:
        UnavailableError: there is none, or none of its rails answers.
        OSError, ValueError: its files are not readable.
    """
    folder = root / _DRIVERS / "ina3221"
    return _sensor("ina3221", dict(_hwmon_rails(folder)) or _none(folder), _averaging_s(folder))


def find_ina3221_iio(root: Path) -> PowerSensor:
    """JetPack 4: INA3221 through L4T's iio driver.

    Raises:
        UnavailableError: there is none.
        OSError, ValueError: its files are not readable.
    """
    folder = root / _DRIVERS / "ina3221x"
    return _sensor("ina3221-iio", dict(_iio_rails(folder)) or _none(folder))


def _none(folder: Path) -> dict[str, Watts]:
    raise UnavailableError(f"no INA3221 with named rails under {folder}")


def _averaging_s(driver: Path) -> float:
    """Longest time that a chip of the driver averages over, channels and samples included; 0 where it does not tell."""
    found = [0.0]
    for folder in _hwmon_folders(driver):
        with contextlib.suppress(OSError, ValueError):
            found.append(read_number(folder / "update_interval") * _MILLI)
    return max(found)


def _sensor(name: str, rails: Mapping[str, Watts], averaging_s: float = 0.0) -> PowerSensor:
    """Of rails whose total answers; a part that does not is told with each reading."""
    total, total_rails = describe_total(rails)
    for rail in total_rails:
        rails[rail]()
    return PowerSensor(
        name,
        total,
        tuple(rails),
        total_rails,
        _PERIOD_S,
        lambda: _read(rails),
        averaging_s=averaging_s,
        notes=board_notes(rails),
    )


def describe_total(rails: Mapping[str, object]) -> tuple[str, tuple[str, ...]]:
    """What the total of a board's rails is, for people, and the rails to add up for it."""
    for rail in WHOLE_BOARD:
        if rail in rails:
            return f"{rail}, which feeds the other rails", (rail,)
    parts = tuple(rail for rail in rails if not rail.startswith(_CARRIER)) or tuple(rails)
    if len(parts) == 1:
        return f"{parts[0]} alone", parts
    return f"sum of {', '.join(parts)}; reads below a wall meter", parts


def board_notes(rails: Mapping[str, object]) -> tuple[str, ...]:
    """What a reader must know about a board's rails."""
    if {"VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"} <= set(rails):
        return (
            "on AGX Orin no rail feeds all others: the regulators' losses and the carrier board are not in the sum",
        )
    return ()


def _read(rails: Mapping[str, Watts]) -> Reading:
    watts, problems = read_rails(rails)
    return Reading(watts, problems=problems)


def _hwmon_folders(driver: Path) -> Iterator[Path]:
    """Of every chip of a driver, in the order of its bus address."""
    yield from sorted(driver.glob("*-00*/hwmon/hwmon*"))


def _hwmon_rails(driver: Path) -> Iterator[tuple[str, Watts]]:
    """in1 to in3 are the rails; in4 to in6 their shunts, in7 the shunts' sum. A rail that is not wired reads "NC"."""
    for folder in _hwmon_folders(driver):
        for channel in (1, 2, 3):
            label = _label(folder / f"in{channel}_label")
            if label and _label(folder / f"in{channel}_enable") != "0":
                yield label, _product(folder / f"in{channel}_input", folder / f"curr{channel}_input")


def _ina238_rails(driver: Path) -> Iterator[tuple[str, Watts]]:
    folders = list(_hwmon_folders(driver))
    for folder in folders:
        # The driver names no channel; a board's device tree may. Where there is one INA238, it is at the input.
        labels = (_label(folder / name) for name in ("power1_label", "in1_label", "label"))
        chip = folder.parent.parent.name
        default = "VIN" if len(folders) == 1 else f"INA238 {chip}"
        yield next(filter(None, labels), default), _scaled(folder / "power1_input", _MICRO)


def _iio_rails(driver: Path) -> Iterator[tuple[str, Watts]]:
    for folder in sorted(driver.glob("*-00*/iio:device*")):
        for name in sorted(folder.glob("rail_name_*")):
            channel = name.name.removeprefix("rail_name_")
            label = _label(name)
            power = folder / f"in_power{channel}_input"
            if label and power.exists():
                yield label, _scaled(power, _MILLI)
            elif label:
                yield label, _product(folder / f"in_voltage{channel}_input", folder / f"in_current{channel}_input")


def _label(path: Path) -> str | None:
    try:
        text = read_text(path)
    except FileNotFoundError:
        return None
    return text if re.fullmatch(r"[\w.+ -]+", text) and text.upper() != "NC" else None


def _product(millivolts: Path, milliamperes: Path) -> Watts:
    return lambda: read_number(millivolts) * read_number(milliamperes) * _MICRO


def _scaled(path: Path, unit: float) -> Watts:
    return lambda: read_number(path) * unit
