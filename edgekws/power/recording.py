"""A meter read at its pace in a thread of its own, and the energy between two moments of the monotonic clock."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from edgekws.errors import PowerError

if TYPE_CHECKING:
    from edgekws.power import PowerMeter

GAP_S = 1.0  # longer without a reading and nobody knows what was drawn; shorter is bridged by a straight line
GAP_INTERVALS = 4  # the same for a meter whose own pace is slower than that


@dataclass(frozen=True)
class Energy:
    """What was drawn between two moments; or why that is not known."""

    joules: float | None
    """None = not known, see `why_not`. Never 0 for lack of a meter."""
    seconds: float
    rails_j: Mapping[str, float] = field(default_factory=dict)
    """Of each rail that was read throughout."""
    samples: int = 0
    missing: int = 0
    """Readings that did not come when they were due."""
    why_not: str = ""

    @property
    def mean_mw(self) -> float | None:
        """Mean power over the window."""
        return None if self.joules is None or not self.seconds else self.joules / self.seconds * 1000


def integrate(
    times_s: Sequence[float], values: Sequence[float], begin_s: float, end_s: float, *, counts: bool = False, gap_s: float = GAP_S
) -> float:
    """Joules from `begin_s` to `end_s`: the trapezoid over mW, or the difference of a counter of mJ.

    Args:
        times_s: of the values, ascending.

    Raises:
        PowerError: for longer than `gap_s` within the window there is no value.
    """
    first, last = max(bisect_right(times_s, begin_s) - 1, 0), bisect_left(times_s, end_s)
    near = times_s[first : last + 1]  # with the readings just outside, which say what was drawn at the window's edges
    for before, after in pairwise([min([begin_s, *near[:1]]), *near, max([end_s, *near[-1:]])]):
        if after - before > gap_s:
            begin, end = max(before - begin_s, 0), min(after, end_s) - begin_s
            raise PowerError(f"no reading from {begin:.1f} s to {end:.1f} s of {end_s - begin_s:.1f} s")
    moments = [begin_s, *(max(begin_s, min(end_s, t)) for t in near), end_s]
    if not near:
        raise PowerError("no reading at all")

    def at(moment: float) -> float:
        """The value at a moment: on the line between its neighbours, at the ends that of the nearest."""
        after = bisect_left(times_s, moment)
        if after == 0 or after == len(times_s):
            return values[min(after, len(times_s) - 1)]
        t0, t1 = times_s[after - 1], times_s[after]
        return values[after - 1] + (values[after] - values[after - 1]) * (moment - t0) / (t1 - t0)

    if counts:
        return (at(end_s) - at(begin_s)) / 1000
    area = sum((at(t0) + at(t1)) / 2 * (t1 - t0) for t0, t1 in pairwise(moments))
    return area / 1000


class Recording:
    """Reads a meter from `with` to its end. What was drawn is asked afterwards, or meanwhile, for any window of it."""

    def __init__(self, meter: PowerMeter, *, gap_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`gap_s`: bridge this long without a reading, instead of `GAP_S`."""
        self.meter = meter
        self._gap_s, self._clock = gap_s, clock
        self._times: list[float] = []
        self._readings: list[dict[str, float]] = []
        self._trouble: list[tuple[float, str]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"power {meter.name}", daemon=True)
        self._begin_s = self._end_s = 0.0

    def __enter__(self) -> Recording:
        self._begin_s = self._clock()
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        self._end_s = self._clock()
        if not self._thread.is_alive():  # one that hangs in a driver is left behind; the gap shows
            self.sample()

    def sample(self) -> None:
        """Take one reading now, or note why it did not come."""
        try:
            reading = self.meter.read()
        except PowerError as error:
            with self._lock:
                self._trouble.append((self._clock(), str(error)))
            return
        with self._lock:
            self._times.append(self._clock())
            self._readings.append(reading)

    def _run(self) -> None:
        due = self._clock()
        while not self._stop.is_set():
            due = max(due + self.meter.interval_s, self._clock())  # late: no burst to catch up
            failed = bool(self._trouble) and (not self._times or self._trouble[-1][0] > self._times[-1])
            if not self._stop.wait(0.0 if self.meter.waits and not failed else max(0.0, due - self._clock())):
                self.sample()

    def energy(self, begin_s: float | None = None, end_s: float | None = None) -> Energy:
        """Between two moments of the clock (time.monotonic); by default from the recording's begin to its end, or until now."""
        begin_s = self._begin_s if begin_s is None else begin_s
        end_s = (self._end_s or self._clock()) if end_s is None else end_s
        with self._lock:
            first = max(bisect_left(self._times, begin_s) - 1, 0)  # with the one just before
            times, readings, trouble = self._times[first:], self._readings[first:], list(self._trouble)
        rails: dict[str, tuple[list[float], list[float]]] = {}
        for moment, reading in zip(times, readings, strict=True):
            for label, value in reading.items():
                rails.setdefault(label, ([], []))
                rails[label][0].append(moment)
                rails[label][1].append(value)
        interval_s = self.meter.interval_s
        gap_s = max(GAP_S if self._gap_s is None else self._gap_s, GAP_INTERVALS * interval_s)
        joules: dict[str, float] = {}
        why_not = ""
        for label in {self.meter.rail: None, **rails}:
            try:
                series = rails.get(label, ([], []))
                joules[label] = integrate(*series, begin_s, end_s, counts=self.meter.counts, gap_s=gap_s)
            except PowerError as error:
                if label == self.meter.rail:
                    # The last trouble that can have to do with it; a recovered one is older than the window.
                    said = [text for moment, text in trouble if begin_s - GAP_S <= moment <= end_s + GAP_S]
                    why_not = said[-1] if said and not series[0] else f"{self.meter.name}: {error}" + (f" ({said[-1]})" if said else "")
        within = [moment for moment in times if begin_s <= moment <= end_s]
        missing = sum(max(0, round((b - a) / interval_s) - 1) for a, b in pairwise(within))
        total = joules.pop(self.meter.rail, None)
        if total is not None and "+" not in self.meter.rail:
            joules[self.meter.rail] = total
        return Energy(total, end_s - begin_s, joules if total is not None else {}, len(within), missing, why_not)
