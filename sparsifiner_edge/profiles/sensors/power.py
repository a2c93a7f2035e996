"""Interface of power sensors, and the sensors that are files: INA238 and INA3221 on a Jetson, RAPL on an x86 processor.

Files: the kernel's Documentation/hwmon/ina3221.rst and ina238.rst (JetPack 5 and later), in millivolts and milliamperes
or microwatts; power/powercap/powercap.rst, in microjoules.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

Rail = tuple[Path, ...]
"""Files whose product is the reading of a rail, in millionths of a watt or joule."""
_WHOLE_BOARD = ("VIN", "VDD_IN", "5V_IN", "VDD_5V_IN")
"""Rails that feed all others, in the order of preference; adding other rails would count power twice."""
_DRIVERS = Path("sys/bus/i2c/drivers")
_CHIPS = "*-00*/hwmon/hwmon*"
_POWERCAP = Path("sys/class/powercap")
_INA_PERIOD_S = 0.1
"""Time between readings of an INA sensor in seconds.

Six files of an INA3221 on a 400 kHz bus take some 2 ms, mostly waiting: 2 % of one core at this period.
"""
_RAPL_PERIOD_S = 0.05
"""Time between readings of RAPL in seconds."""
_RAPL_REFRESH_S = 0.001
"""Time in seconds after which RAPL's counters are updated."""
_MICRO = 1e-6


class UnavailableError(Exception):
    """A sensor is missing or does not respond; the message gives the reason.

    No public function of this package raises it.
    """


@dataclasses.dataclass(frozen=True)
class PowerSensor:
    """Source of power readings; see `find_sensor`.

    Attributes:
        name: "ina", "nvml", "rapl" or "none".
        total: Components of the total, for people.
        period_s: Useful time between readings in seconds.
        read: Function that returns the reading of each rail in the total, in watts, or in joules if `counts`. No rail
            is part of another. Counters start at any value and may wrap. Raises OSError, ValueError or
            UnavailableError, and may be called again after that.
        counts: True if the sensor counts energy instead of measuring power.
        averaging_s: Time in seconds over which the sensor averages, or after which it updates its value.
        wraps_j: Energy in joules at which a rail's counter starts again from 0; a rail that is missing here never
            wraps.
        not_used: Reason, by name of a preferred sensor, why it is not used.
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
        """True if the sensor can be read."""
        return self.name != "none"


def read_text(path: Path) -> str:
    """Return the text of a small system file, without surrounding whitespace and null bytes.

    Raises:
        OSError: The file cannot be read.
    """
    return path.read_bytes().decode("ascii", "replace").strip("\0\n\t ")


def read_number(path: Path) -> float:
    """Return the number at the start of a small system file: "732" and "732 mW" are both 732.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file does not start with a finite number; the message names the file.
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
    """Return an error message in one line, without the formatting of Python's exceptions."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def find_ina(root: Path) -> PowerSensor:
    """Return the sensor of a Jetson.

    Thor's input is measured by an INA238, which has no channel names. On other Jetsons, the channels in1 to in3 of each
    INA3221 are rails; in4 to in6 are shunts, and in7 is their sum. A rail that is not connected has the label "NC".
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
    board = next((rail for rail in _WHOLE_BOARD if rail in rails), None)
    if board is None:
        return _file_sensor("ina", f"sum of {', '.join(rails)}; lower than a wall meter reads", rails, _INA_PERIOD_S)
    return _file_sensor("ina", f"{board}, which feeds the other rails", {board: rails[board]}, _INA_PERIOD_S)


def find_rapl(root: Path) -> PowerSensor:
    """Return the sensor of a processor: its packages, and their DRAM if it is counted separately.

    All other zones are left out: `intel-rapl-mmio` counts the same packages again, `psys` contains them, and `core` and
    `uncore` are parts of them.
    """
    zones: dict[str, Path] = {}
    for zone in sorted((root / _POWERCAP).glob("intel-rapl:*")):
        name, parent = read_text(zone / "name"), zone.parent / zone.name.rpartition(":")[0]
        if name.startswith(("package", "dram")) and (zone / "energy_uj").exists():
            zones[f"{name} ({read_text(parent / 'name')})" if (parent / "name").exists() else name] = zone
    if not zones:
        raise UnavailableError(f"no package under {root / _POWERCAP}/intel-rapl:*, as in most virtual machines")
    total = f"{' + '.join(zones)}: the processor only, without board, disk or graphics card"
    try:
        wraps = {name: read_number(zone / "max_energy_range_uj") * _MICRO for name, zone in zones.items()}
        sensor = _file_sensor("rapl", total, {name: (z / "energy_uj",) for name, z in zones.items()}, _RAPL_PERIOD_S)
    except PermissionError as error:
        raise UnavailableError(f"{why(error)}; as root: chmod a+r {root / _POWERCAP}/intel-rapl:*/energy_uj") from error
    return dataclasses.replace(sensor, counts=True, averaging_s=_RAPL_REFRESH_S, wraps_j=wraps)


def _file_sensor(name: str, total: str, rails: Mapping[str, Rail], period_s: float) -> PowerSensor:
    """Return a sensor that reads files, after checking that all rails respond."""

    def read() -> dict[str, float]:
        return {rail: math.prod(map(read_number, files)) * _MICRO for rail, files in rails.items()}

    read()
    return PowerSensor(name, total, period_s, read)
