"""NVML, for desktop and server GPUs: the card's own energy counter, or its power. On Orin it loads and then refuses each reading."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from edgekws.errors import PowerError
from edgekws.power import PowerMeter


def open_meter(sysfs: Path) -> Nvml:
    """Raises PowerError without the package, without a driver or without a GPU. `sysfs` is not looked at."""
    if importlib.util.find_spec("pynvml") is None:
        raise PowerError("the package is not installed (pip install nvidia-ml-py)")
    return Nvml()


class Nvml(PowerMeter):
    """The first GPU alone: the processor beside it is not in the number."""

    name = "nvml"
    rail = "GPU 0"
    covers = frozenset({"gpu"})
    interval_s = 0.05

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise PowerError(f"pynvml cannot be imported: {error}") from None
        self._nvml: Any = pynvml
        self.counts = True
        self._begin_mj = 0
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise PowerError(f"{error} (no NVIDIA driver, or none that runs)") from None
        try:
            self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
            try:
                self._begin_mj = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
            except pynvml.NVMLError_NotSupported:
                self.counts = False
                pynvml.nvmlDeviceGetPowerUsage(self._device)
        except pynvml.NVMLError as error:
            self.close()
            raise PowerError(f"{error}: this GPU gives no reading") from None

    def read(self) -> dict[str, float]:
        """mJ since it was opened, or mW."""
        try:
            if self.counts:
                return {self.rail: float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device) - self._begin_mj)}
            return {self.rail: float(self._nvml.nvmlDeviceGetPowerUsage(self._device))}
        except self._nvml.NVMLError as error:
            raise PowerError(f"nvml: {error}") from None

    def close(self) -> None:
        """Give the library back."""
        self._nvml.nvmlShutdown()
