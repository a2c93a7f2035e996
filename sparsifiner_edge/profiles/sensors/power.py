"""What every power sensor offers, and those that are files: a Jetson's INA238 and INA3221, an x86 processor's RAPL.

Files: the kernel's Documentation/hwmon/ina3221.rst and ina238.rst (JetPack 5 and later): millivolts and milliamperes,
or microwatts; power/powercap/powercap.rst: microjoules.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

Rail = tuple[Path, ...]
"""Files whose product is what a rail reads, in millionths of a watt or joule."""
_WHOLE_BOARD = ("VIN", "VDD_IN", "5V_IN", "VDD_5V_IN")
"""Rails that feed all the others, first found counts: a sum with one of them would count power twice."""
_DRIVERS, _CHIPS = Path("sys/bus/i2c/drivers"), "*-00*/hwmon/hwmon*"
_POWERCAP = Path("sys/class/powercap")
# Six files of an INA3221 on a 400 kHz bus take some 2 ms, most of them waiting: 2 % of one core at this period.
_INA_PERIOD_S, _RAPL_PERIOD_S, _RAPL_REFRESH_S = 0.1, 0.05, 0.001
_MICRO = 1e-6


class UnavailableError(Exception):
    """A sensor is not there, or does not answer; the message says why. Never leaves this folder's public functions."""


@dataclasses.dataclass(frozen=True)
class PowerSensor:
    """A way to read power; see `find_sensor`.

    Attributes:
        name: "ina", "nvml", "rapl" or "none".
        total: what the total is made of, for people.
        period_s: how often it is worth reading.
        read: by rail of the total, never a rail together with a part of it; watts, or joules where `counts`, which
            start anywhere and may wrap. Raises OSError, ValueError or UnavailableError; may be called again after it.
        averaging_s: the time over which the sensor itself averages, or after which it refreshes its value.
        wraps_j: the joules at which a rail's counter starts again from 0; a rail that is not named never wraps.
        not_used: by sensor, why those that are preferred to this one are not there.
    """

    name: str
    total: str
    period_s: float
    read: Callable[[], Mapping[str, float]]
    counts: bool = False
    averaging_s: float = 0.0
    wraps_j: Mapping[str, float] = dataclasses.field(default_factory=dict)
    not_used: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def available(self) -> bool:
        """Whether there is any power to read."""
        return self.name != "none"


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


def find_ina(root: Path) -> PowerSensor:
    """A Jetson's: Thor's input on an INA238, which names no channel; else in1 to in3 of each INA3221, of which in4 to
    in6 are shunts and in7 their sum. A rail that is not wired reads "NC".
    """
    drivers, rails = root / _DRIVERS, dict[str, Rail]()
    inputs = sorted(drivers.glob(f"ina238/{_CHIPS}/power1_input"))
    if len(inputs) == 1:
        rails["VIN"] = (inputs[0],)
    for file in sorted(drivers.glob(f"ina3221/{_CHIPS}/in[123]_label")):
        label, chip, channel = read_text(file), file.parent, file.name[2]
        if re.fullmatch(r"[\w.+ -]+", label) and label.upper() != "NC":
            rails[label] = chip / f"in{channel}_input", chip / f"curr{channel}_input"
    if not rails:
        raise UnavailableError(f"no INA238 or INA3221 with named rails under {drivers}")
    whole = next((rail for rail in _WHOLE_BOARD if rail in rails), None)
    if whole is None:
        return _file_sensor("ina", f"sum of {', '.join(rails)}; reads below a wall meter", rails, _INA_PERIOD_S)
    return _file_sensor("ina", f"{whole}, which feeds the other rails", {whole: rails[whole]}, _INA_PERIOD_S)


def find_rapl(root: Path) -> PowerSensor:
    """Packages, and their DRAM where it is counted apart.

    Zones of `intel-rapl-mmio` count the same packages over again, `psys` holds them, `core` and `uncore` are parts of
    them: all of these stay out.
    """
    zones: dict[str, Path] = {}
    for zone in sorted((root / _POWERCAP).glob("intel-rapl:*")):
        name, parent = read_text(zone / "name"), zone.parent / zone.name.rpartition(":")[0]
        if name.startswith(("package", "dram")) and (zone / "energy_uj").exists():
            zones[f"{name} ({read_text(parent / 'name')})" if (parent / "name").exists() else name] = zone
    if not zones:
        raise UnavailableError(f"no package under {root / _POWERCAP}/intel-rapl:*, as in most virtual machines")
    total = f"{' + '.join(zones)}: the processor alone, no board, disk, or graphics card"
    try:
        wraps = {name: read_number(zone / "max_energy_range_uj") * _MICRO for name, zone in zones.items()}
        sensor = _file_sensor("rapl", total, {name: (z / "energy_uj",) for name, z in zones.items()}, _RAPL_PERIOD_S)
    except PermissionError as error:
        raise UnavailableError(f"{why(error)}; as root: chmod a+r {root / _POWERCAP}/intel-rapl:*/energy_uj") from error
    return dataclasses.replace(sensor, counts=True, averaging_s=_RAPL_REFRESH_S, wraps_j=wraps)


def _file_sensor(name: str, total: str, rails: Mapping[str, Rail], period_s: float) -> PowerSensor:
    """Of rails that all answer."""

    def read() -> dict[str, float]:
        return {rail: math.prod(map(read_number, files)) * _MICRO for rail, files in rails.items()}

    read()
    return PowerSensor(name, total, period_s, read)
