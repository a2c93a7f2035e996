"""Fake file trees of real boards: files as the kernel and NVIDIA's tools provide them, with realistic values."""

from __future__ import annotations

from pathlib import Path

I2C = "sys/bus/i2c/drivers"
ORIN_NANO_RAILS = {"VDD_IN": (5040, 1132), "VDD_CPU_GPU_CV": (5040, 165), "VDD_SOC": (5040, 322)}
ORIN_ZONES = {"cpu-thermal": 46531, "gpu-thermal": 46093, "cv0-thermal": -256000, "soc0-thermal": 45406}
AGX_ORIN_RAILS = {"VDD_GPU_SOC": (19104, 165), "VDD_CPU_CV": (19104, 749), "VIN_SYS_5V0": (4968, 1000)}
AGX_ORIN_MEMORY = {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (4968, 220), "NC ": (0, 0)}
THOR_RAILS = {"VDD_GPU": (12000, 410), "VDD_CPU_SOC_MSS": (12000, 520), "VIN_SYS_5V0": (5000, 900)}


def write_tree(root: Path, files: dict[str, object]) -> Path:
    """Write files by path under `root`, each ending in a line break as in sysfs."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="ascii")
    return root


def hwmon_ina3221(address: str, number: int, rails: dict[str, tuple[int, int]]) -> dict[str, object]:
    """Return one chip of the kernel's hwmon driver: three rails, three shunts, and the shunts' sum."""
    folder = f"{I2C}/ina3221/{address}/hwmon/hwmon{number}"
    files: dict[str, object] = {f"{folder}/name": "ina3221", f"{folder}/in7_label": "sum of shunt voltages"}
    files |= {f"{folder}/in7_input": 8, f"{folder}/curr4_input": 1619, f"{folder}/update_interval": 26}
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        files |= {
            f"{folder}/in{channel}_label": label.strip(),
            f"{folder}/in{channel}_input": millivolts,
            f"{folder}/curr{channel}_input": milliamperes,
            f"{folder}/in{channel + 3}_input": milliamperes * 2 // 1000,
            f"{folder}/curr{channel}_crit": 32760,
        }
    return files


def jetson(release: str, mode: str, conf: dict[int, str]) -> dict[str, object]:
    """Return the files of every Jetson: release, power mode and its names."""
    modes = "".join(f"< POWER_MODEL ID={n} NAME={name} >\nCPU_ONLINE CORE_0 1\n" for n, name in conf.items())
    release = f"# {release}, GCID: 38968081, BOARD: generic"
    return {"etc/nv_tegra_release": release, "etc/nvpmodel.conf": modes, "var/lib/nvpmodel/status": mode}


def cpu(*kilohertz: int, governor: str = "schedutil") -> dict[str, object]:
    """Return files of each frequency policy."""
    folder = "sys/devices/system/cpu/cpufreq/policy"
    clocks = {f"{folder}{number}/scaling_cur_freq": now for number, now in enumerate(kilohertz)}
    return clocks | {f"{folder}{number}/scaling_governor": governor for number in range(len(kilohertz))}


def thermal(kind: str, file: str, values: dict[str, int]) -> dict[str, object]:
    """Return zones with `temp` in thousandths of a degree, or cooling devices with `cur_state`."""
    files: dict[str, object] = {}
    for number, (name, value) in enumerate(values.items()):
        files |= {f"sys/class/thermal/{kind}{number}/type": name, f"sys/class/thermal/{kind}{number}/{file}": value}
    return files


def orin_nano(root: Path) -> Path:
    """Return an Orin Nano with JetPack 6, Super: mode 2 is MAXN_SUPER."""
    return write_tree(
        root,
        hwmon_ina3221("1-0040", 1, ORIN_NANO_RAILS)
        | jetson("R36 (release), REVISION: 4.7", "pmode:0002", {0: "15W", 1: "25W", 2: "MAXN_SUPER", 3: "7W"})
        | cpu(729600, 1344000)
        | {"sys/class/devfreq/17000000.gpu/cur_freq": 305000000}
        | {"sys/kernel/debug/bpmp/debug/clk/emc/rate": 2133000000}
        | thermal("thermal_zone", "temp", ORIN_ZONES)
        | thermal("cooling_device", "cur_state", {"pwm-fan": 1, "cpu-throttle-alert": 0, "gpu-throttle-alert": 0})
        | {f"sys/class/hwmon/hwmon3/oc{n}_event_cnt": 0 for n in (1, 2, 3)},
    )


def agx_orin(root: Path) -> Path:
    return write_tree(
        root,
        hwmon_ina3221("1-0040", 3, AGX_ORIN_RAILS)
        | hwmon_ina3221("1-0041", 4, AGX_ORIN_MEMORY)
        | jetson("R35 (release), REVISION: 4.1", "pmode:0000", {0: "MAXN", 1: "MODE_15W", 2: "MODE_30W", 3: "MODE_50W"})
        | {"sys/class/devfreq/17000000.ga10b/cur_freq": 407000000},
    )


def thor(root: Path) -> Path:
    """Return a Thor with power in microwatts on the INA238, which names no channel."""
    folder = f"{I2C}/ina238/2-0044/hwmon/hwmon6"
    return write_tree(
        root,
        hwmon_ina3221("2-0040", 5, THOR_RAILS)
        | {f"{folder}/name": "ina238", f"{folder}/power1_input": 19780000, f"{folder}/in1_input": 20100}
        | {f"{folder}/curr1_input": 984}
        | jetson("R38 (release), REVISION: 2.0", "pmode:0001", {0: "MAXN", 1: "120W", 2: "90W", 3: "70W"})
        | {"sys/class/devfreq/gpu-gpc-0/cur_freq": 314000000, "sys/class/devfreq/bwmgr/cur_freq": 4266000000},
    )


def x86(root: Path) -> Path:
    """Return two packages with separate DRAM, psys, and the mmio zone that counts package 0 again."""
    powercap = "sys/class/powercap"
    files: dict[str, object] = {}
    for zone, name, microjoules, limit in (
        ("intel-rapl:0", "package-0", 1000000000, 262143328850),
        ("intel-rapl:0:0", "core", 400000000, 262143328850),
        ("intel-rapl:0:1", "dram", 200000000, 65712999613),
        ("intel-rapl:1", "package-1", 3000000000, 262143328850),
        ("intel-rapl:1:0", "dram", 500000000, 65712999613),
        ("intel-rapl:2", "psys", 9000000000, 262143328850),
        ("intel-rapl-mmio:0", "package-0", 1000000000, 262143328850),
    ):
        files |= {f"{powercap}/{zone}/name": name, f"{powercap}/{zone}/energy_uj": microjoules}
        files |= {f"{powercap}/{zone}/max_energy_range_uj": limit}
    throttle = "sys/devices/system/cpu/cpu0/thermal_throttle"
    files |= {f"{throttle}/core_throttle_count": 0, f"{throttle}/package_throttle_count": 7}
    files |= thermal("thermal_zone", "temp", {"x86_pkg_temp": 51000, "acpitz": 27800})
    return write_tree(root, files | cpu(800000, 4700000, governor="powersave"))
