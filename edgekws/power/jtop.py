"""jetson-stats (AGPL-3.0, never a dependency): rails, temperatures, clocks and the power mode, as jtop.service tells them each half second.

Its `avg` is an exponential smoother and is not used.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from edgekws.errors import PowerError
from edgekws.power import PowerMeter, whole


def open_meter(sysfs: Path) -> Jtop:
    """Raises PowerError without the package or its service. `sysfs` is not looked at."""
    if importlib.util.find_spec("jtop") is None:
        raise PowerError("the package is not installed (pip install 'edgekws[jetson]'; it is AGPL-3.0)")
    return Jtop()


class Jtop(PowerMeter):
    """A client of jtop.service."""

    name = "jtop"
    interval_s = 0.5
    waits = True

    def __init__(self) -> None:
        try:
            import jtop

            self._client: Any = jtop.jtop(interval=self.interval_s)
            self._client.start()
        except Exception as error:  # its own class derives from Exception; sockets and queues raise theirs, half an installation too
            raise PowerError(" ".join(str(error).split()) or type(error).__name__) from None
        try:
            self.rail, _ = whole(self._rails())
        except PowerError:
            self.close()
            raise

    def read(self) -> dict[str, float]:
        """Label → mW. Waits for the service's next reading. Raises PowerError when the service died."""
        try:
            alive = self._client.ok()
        except Exception as error:
            raise PowerError(f"jtop: the connection to jtop.service broke ({type(error).__name__})") from None
        if not alive:
            raise PowerError("jtop: jtop.service says nothing any more")
        rails = self._rails()
        return {**rails, self.rail: whole(rails)[1]}

    def _rails(self) -> dict[str, float]:
        power = self._client.power
        if not power:
            raise PowerError("jtop.service finds no power sensor")
        try:
            rails = {label: float(one["power"]) for label, one in power["rail"].items()}
            if "name" in power["tot"]:  # the input's rail is moved there; without one "tot" is a sum of all, which counts some twice
                rails[power["tot"]["name"]] = float(power["tot"]["power"])
        except (KeyError, TypeError, ValueError) as error:
            raise PowerError(f"jtop tells power in a form that this edgekws does not know ({type(error).__name__} {error})") from None
        return rails

    def conditions(self) -> dict[str, Any]:
        """temperature_c, clock_mhz and power_mode as of the last reading."""
        temperatures = {zone: float(one["temp"]) for zone, one in self._client.temperature.items() if one.get("online", True)}
        cores = self._client.cpu["cpu"]
        clocks = {f"cpu{i}": one["freq"]["cur"] / 1000 for i, one in enumerate(cores) if one.get("online") and "freq" in one}
        clocks.update({name: one["freq"]["cur"] / 1000 for name, one in self._client.gpu.items() if "cur" in one.get("freq", {})})
        mode = self._client.nvpmodel
        return {"temperature_c": temperatures, "clock_mhz": clocks, "power_mode": None if mode is None else str(mode)}

    def close(self) -> None:
        """Leave the service."""
        self._client.close()
