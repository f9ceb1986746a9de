"""What is drawn just now, for whoever looks at it: one number a second, where reading a file tells it. No figure is made of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from edgekws.errors import PowerError
from edgekws.power import SYSFS, NoMeter, PowerMeter, load_meter

BY_FILES = ("ina3221", "rapl")  # the others bring a library or a process into the listener
EVERY_S = 0.9
LONGEST_S = 60.0  # between two readings of a counter, which may have begun again since


class Gauge:
    """Reads at most about once a second, however often it is asked."""

    def __init__(self, sysfs: Path = SYSFS, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = ""
        """Meter and rail; "" = none."""
        self.why = ""
        """Why there is none."""
        self._clock = clock
        self._meter: PowerMeter | None = None
        self._asked_s = self._read_s = float("-inf")  # a reading may fail
        self._total_mj = 0.0
        self._mw: float | None = None
        for name in BY_FILES:
            meter = load_meter(name, sysfs=sysfs)
            if not isinstance(meter, NoMeter):
                self._meter, self.name, self.why = meter, f"{meter.name} {meter.rail}", ""
                break
            self.why = self.why or meter.why

    def mw(self) -> float | None:
        """Milliwatts, of a counter on average since the last reading; None = not known (yet)."""
        now_s = self._clock()
        if self._meter is None or now_s - self._asked_s < EVERY_S:
            return self._mw
        self._asked_s = now_s
        try:
            value = self._meter.read()[self._meter.rail]
        except PowerError as error:
            self.why, self._mw = str(error), None
            return None
        passed_s, self._read_s = now_s - self._read_s, now_s
        if self._meter.counts:
            drawn_mj, self._total_mj = value - self._total_mj, value
            self._mw = drawn_mj / passed_s if passed_s < LONGEST_S else None
        else:
            self._mw = value
        return self._mw
