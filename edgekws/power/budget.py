"""The share of a board that a round of training may take. The training loop calls `pause()` between its steps, and knows no more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from edgekws.errors import PowerError
from edgekws.power.conditions import free_memory_mb, hottest_c

log = logging.getLogger("edgekws")

COOLER_C = 3.0  # below the limit before it goes on, so that it does not flicker around it
MORE_MEMORY = 1.1  # times the limit, likewise
LOOK_S = 2.0  # between two looks while it waits
LONGEST_REST_S = 60.0  # after one step: one that took an hour because the machine slept is not paid for with hours
REST_S = 0.1  # between two looks at the meter


class Budget:
    """Holds a loop to a share of the time, and stops it while the board is hot or memory is short.

    Args:
        duty: share of the time that may be worked, above 0, at most 1.
        max_temperature_c: of the hottest zone. None: any.
        min_free_mb: of memory for everything else. None: any.
        max_w: of what the meter covers, for this and everything else, on average from each step to the next. None: any.
        patience_s: the longest wait for any of them; then the round is given up.
        thermometer: °C, or None where it cannot be read. A limit that cannot be checked is reported once and not held.
        free_mb: likewise, of memory.
        joules: likewise, drawn between two moments of the clock.
    """

    def __init__(
        self,
        duty: float = 1.0,
        max_temperature_c: float | None = None,
        min_free_mb: float | None = None,
        max_w: float | None = None,
        *,
        patience_s: float = 900.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        thermometer: Callable[[], float | None] = hottest_c,
        free_mb: Callable[[], float | None] = free_memory_mb,
        joules: Callable[[float, float], float | None] = lambda begin_s, end_s: None,
    ) -> None:
        if not 0 < duty <= 1:
            raise PowerError(f"a duty cycle of {duty} is no share of the time. Accepted: above 0, at most 1")
        self.duty = duty
        self.max_temperature_c = max_temperature_c
        self.min_free_mb = min_free_mb
        self.max_w = max_w
        self.worked_s = 0.0
        """Between two calls of `pause`."""
        self.rested_s = 0.0
        """For the duty cycle and the power."""
        self.hot_s = 0.0
        """Waiting for a cooler board."""
        self.short_s = 0.0
        """Waiting for memory."""
        self._patience_s = patience_s
        self._clock, self._sleep, self._thermometer, self._free_mb, self._joules = clock, sleep, thermometer, free_mb, joules
        self._unread: set[str] = set()
        self._since_s = clock()

    def pause(self) -> None:
        """Between two steps: rest as long as duty cycle and power ask, then wait while the board is hot or memory short.

        Raises:
            PowerError: that lasted longer than `patience_s`.
        """
        now = self._clock()
        worked = now - self._since_s
        self.worked_s += worked
        if owed := min(worked * (1 / self.duty - 1), LONGEST_REST_S):
            self._sleep(owed)
        self._pay()
        self.rested_s += self._clock() - now
        self.hot_s += self._wait(self._too_hot)
        self.short_s += self._wait(self._too_full)
        self._since_s = self._clock()

    def _pay(self) -> None:
        """Rest until the machine drew no more than `max_w` on average since the last step ended."""
        begin, asked_s, drawn = self._clock(), self._since_s, 0.0
        while self.max_w is not None:
            now = self._clock()
            joules = self._read("power", partial(self._joules, asked_s, now))
            if joules is None:
                return
            drawn, asked_s = drawn + joules, now
            mean_w = drawn / max(now - self._since_s, 1e-9)
            if mean_w <= self.max_w:
                return
            if now - begin > self._patience_s:
                raise PowerError(
                    f"training was given up after {self._patience_s:g} s of rest: the machine draws {mean_w:.1f} W on average,"
                    f" accepted are {self.max_w:g}"
                )
            self._sleep(REST_S)

    def _wait(self, wrong: Callable[[bool], str | None]) -> float:
        """Until it is well; the seconds that took."""
        begin = self._clock()
        reason = wrong(False)
        if reason is None:
            return 0.0
        log.info("training pauses: %s", reason)
        while reason is not None:
            if self._clock() - begin > self._patience_s:
                raise PowerError(f"training was given up after {self._patience_s:g} s of waiting: {reason}")
            self._sleep(LOOK_S)
            reason = wrong(True)
        log.info("training goes on after %.0f s", self._clock() - begin)
        return self._clock() - begin

    def _too_hot(self, waiting: bool) -> str | None:
        if self.max_temperature_c is None:
            return None
        now = self._read("temperature", self._thermometer)
        if now is None or now <= self.max_temperature_c - (COOLER_C if waiting else 0):
            return None
        return f"the board has {now:.0f} °C, accepted is {self.max_temperature_c:g}"

    def _too_full(self, waiting: bool) -> str | None:
        if self.min_free_mb is None:
            return None
        now = self._read("free memory", self._free_mb)
        if now is None or now >= self.min_free_mb * (MORE_MEMORY if waiting else 1):
            return None
        return f"{now:.0f} MB of memory are free, wanted are {self.min_free_mb:g}"

    def _read(self, what: str, reader: Callable[[], float | None]) -> float | None:
        value = reader()
        if value is None and what not in self._unread:
            self._unread.add(what)
            log.warning("the %s cannot be read here, so that its limit is not held", what)
        return value
