"""What a measurement depends on and a round must heed: temperatures, clocks, power mode, free memory. What cannot be read is left out."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgekws.power import SYSFS

PLAUSIBLE_C = (-50.0, 150.0)  # a zone that is switched off reads -256, an unset one 0 K


def conditions(sysfs: Path = SYSFS, meter: object = None) -> dict[str, Any]:
    """`temperature_c` by zone, `clock_mhz` by core and GPU, `power_mode`; empty or None is what neither the kernel nor jtop tells."""
    told: dict[str, Any] = {}
    if hasattr(meter, "conditions"):
        with suppress(Exception):  # a layout of another version: the kernel's own files are there too
            told = meter.conditions()
    return {
        "temperature_c": temperatures_c(sysfs) or told.get("temperature_c", {}),
        "clock_mhz": clocks_mhz(sysfs) or told.get("clock_mhz", {}),
        "power_mode": power_mode() or told.get("power_mode"),
    }


def temperatures_c(sysfs: Path = SYSFS) -> dict[str, float]:
    """Zone → °C."""
    found = {}
    for zone in sorted((sysfs / "class" / "thermal").glob("thermal_zone*")):
        with suppress(OSError, ValueError):  # EAGAIN: the part is switched off
            celsius = int((zone / "temp").read_text()) / 1000
            if PLAUSIBLE_C[0] < celsius < PLAUSIBLE_C[1]:
                found[(zone / "type").read_text().strip().removesuffix("-thermal")] = round(celsius, 1)
    return found


def hottest_c(sysfs: Path = SYSFS) -> float | None:
    """The hottest zone; None where there is no thermometer."""
    return max(temperatures_c(sysfs).values(), default=None)


def on_battery(sysfs: Path = SYSFS) -> bool:
    """Whether a battery that drives this machine is drained; a mouse's or a headset's is of scope Device."""

    def told(supply: Path, name: str) -> str:
        with suppress(OSError, ValueError):
            return (supply / name).read_text().strip()
        return ""

    supplies = (sysfs / "class" / "power_supply").glob("*")
    return any(told(s, "type") == "Battery" and told(s, "status") == "Discharging" and told(s, "scope") != "Device" for s in supplies)


def clocks_mhz(sysfs: Path = SYSFS) -> dict[str, float]:
    """Core or GPU → MHz now."""
    found = {}
    for file in sorted((sysfs / "devices" / "system" / "cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")):
        with suppress(OSError, ValueError):
            found[file.parent.parent.name] = int(file.read_text()) / 1000
    for device in sorted((sysfs / "class" / "devfreq").glob("*gpu*")):
        with suppress(OSError, ValueError):
            found["gpu"] = int((device / "cur_freq").read_text()) / 1e6
    return found


def power_mode() -> str | None:
    """A Jetson's power mode by name, as `nvpmodel -q` tells it; None elsewhere."""
    try:
        said = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=5.0).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"NV Power Mode:\s*(\S+)", said)
    return found[1] if found else None


def free_memory_mb(meminfo: Path = Path("/proc/meminfo")) -> float | None:
    """What can be had without swapping; None where it cannot be read."""
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / 1e6
    return None
