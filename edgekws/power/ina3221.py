"""The INA3221 on Jetson modules, by its hwmon files: mV and mA by label, a fresh reading each time.

in{i}_label, in{i}_input (mV) and curr{i}_input (mA), i = 1 to 3. There is no power*_input, in7 is a sum of shunt voltages, and the number
of hwmonN differs from board to board, so everything is found by its label.
"""

from __future__ import annotations

from pathlib import Path

from edgekws.errors import PowerError
from edgekws.power import PowerMeter, whole
from edgekws.power.sysfs import number, text

SHUNT_STEP_UV = 40.0  # of the chip's 13 bits
SHUNT_UOHM = 5000.0  # where there is no shunt{i}_resistor: as in the device trees of Orin Nano and Orin NX (AGX Orin: 2000)


def open_meter(sysfs: Path) -> Ina3221:
    """Raises PowerError where there is no such chip."""
    return Ina3221(sysfs)


class Ina3221(PowerMeter):
    """All channels of all chips that have a label."""

    name = "ina3221"
    interval_s = 0.05

    def __init__(self, sysfs: Path) -> None:
        driver = sysfs / "bus" / "i2c" / "drivers" / "ina3221"
        self._channels: dict[str, tuple[Path, Path]] = {}
        shunts: dict[str, float] = {}
        for label_file in sorted(driver.glob("*/hwmon/hwmon*/in[123]_label")):
            label, i = text(label_file), label_file.name[2]
            volts, current = label_file.with_name(f"in{i}_input"), label_file.with_name(f"curr{i}_input")
            if label and label != "NC" and volts.exists() and current.exists():
                self._channels[label] = volts, current
                shunts[label] = _shunt_uohm(label_file.with_name(f"shunt{i}_resistor"))
        if not self._channels:
            raise PowerError(f"no labelled channel under {driver}" if driver.is_dir() else f"no {driver} (no Jetson, or no driver)")
        self.rail, _ = whole(self.read_rails())
        # One step of the current at the bus voltage of now: 8 mA of 5 V on Orin Nano, which is 40 mW.
        parts = self.rail.split(" + ")
        self.step_mw = max(SHUNT_STEP_UV / shunts[one] * number(self._channels[one][0]) for one in parts)

    def read_rails(self) -> dict[str, float]:
        """Label → mW."""
        return {label: number(volts) * number(current) / 1000 for label, (volts, current) in self._channels.items()}

    def read(self) -> dict[str, float]:
        """Label → mW, and the whole module's under `rail`."""
        rails = self.read_rails()
        return {**rails, self.rail: whole(rails)[1]}


def _shunt_uohm(file: Path) -> float:
    try:
        return number(file) or SHUNT_UOHM
    except PowerError:
        return SHUNT_UOHM
