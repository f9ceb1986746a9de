"""RAPL, the energy counters of x86 processors: /sys/class/powercap/intel-rapl:* (AMD's too), in µJ. Each starts again at its range."""

from __future__ import annotations

from pathlib import Path

from edgekws.errors import PowerError
from edgekws.power import PowerMeter
from edgekws.power.sysfs import number, text


def open_meter(sysfs: Path) -> Rapl:
    """Raises PowerError where there are no such counters, or only root may read them."""
    return Rapl(sysfs)


class Rapl(PowerMeter):
    """mJ since it was opened. Processor packages and, where they are counted, their memory."""

    name = "rapl"
    covers = frozenset({"cpu"})
    counts = True
    interval_s = 0.05

    def __init__(self, sysfs: Path) -> None:
        base = sysfs / "class" / "powercap"
        # Not intel-rapl-mmio: that is package 0 once more.
        zones = {zone.name: zone for zone in sorted(base.glob("intel-rapl:*")) if (zone / "energy_uj").exists()}
        if not zones:
            raise PowerError(f"no intel-rapl under {base} (virtual machines seldom have it)")
        self._files: dict[str, Path] = {}
        self._range_uj: dict[str, int] = {}
        for name, zone in zones.items():
            parent = zones.get(name.rpartition(":")[0])
            label = f"{text(parent / 'name')}/{text(zone / 'name')}" if parent else text(zone / "name")
            self._files[label] = zone / "energy_uj"
            self._range_uj[label] = number(zone / "max_energy_range_uj")
        # core and uncore are parts of their package, psys is more than the processor.
        self._parts = [label for label in self._files if label.startswith("package") and ("/" not in label or label.endswith("/dram"))]
        if not self._parts:
            raise PowerError(f"no processor package among {', '.join(self._files)}")
        self.rail = " + ".join(self._parts)
        self._last_uj = {label: number(file) for label, file in self._files.items()}
        self._total_uj = dict.fromkeys(self._files, 0)

    def read(self) -> dict[str, float]:
        """Label → mJ. A counter that started again goes on: it takes minutes at full power, and we ask each 50 ms."""
        for label, file in self._files.items():
            now = number(file)
            step = now - self._last_uj[label]
            self._total_uj[label] += step if step >= 0 else step + self._range_uj[label]
            self._last_uj[label] = now
        rails = {label: total / 1000 for label, total in self._total_uj.items()}
        return {**rails, self.rail: sum(rails[label] for label in self._parts)}
