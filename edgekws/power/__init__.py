"""MEASURE: what this machine draws, by whichever meter can be read here. Needs the standard library only.

A meter's module has one function:

    open_meter(sysfs: Path) -> PowerMeter       raises PowerError: why it cannot be read here, and what to do

Energy is the integral of our own samples (`Recording`). The averages that jtop and tegrastats print are never used: jtop's is
(new + last average) // 2, tegrastats' runs since it was started.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from edgekws.errors import PowerError
from edgekws.power.recording import Energy, Recording, integrate

__all__ = ["AGREE_SHARE", "ORDER", "Energy", "NoMeter", "PowerMeter", "Recording", "disagreement", "integrate", "load_meter", "whole"]

# The INA3221 by sysfs gives a fresh reading whenever it is asked; jtop and tegrastats read the same chip, at their own pace.
ORDER = ("ina3221", "jtop", "tegrastats", "nvml", "rapl")
SYSFS = Path("/sys")
AGREE_SHARE, READINGS = 0.1, 6  # two meters of the same rails that differ by more, over so many readings, are reported
# Which rails together are the whole module: Orin Nano and Orin NX have one for it, AGX Orin has not. There VDDQ_VDD2_1V8AO is fed with 5 V,
# as VIN_SYS_5V0 is, and so counted as a part of that. (jtop adds all four up.)
WHOLE = (("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))


class PowerMeter(Protocol):
    """One source of readings; what is said here is so unless a meter says otherwise."""

    name: str
    rail: str
    """The key of `read()` that stands for everything that this meter covers."""
    covers: frozenset[str] = frozenset({"cpu", "gpu"})
    """Of {"cpu", "gpu"}: whose power is in `rail`."""
    counts: bool = False
    """False: readings are mW. True: mJ since the meter was opened."""
    interval_s: float
    """How far apart readings are worth taking."""
    waits: bool = False
    """`read()` itself waits for the source's next reading, 3 s at most."""
    step_mw: float | None = None
    """The least difference that `rail` can show; None = not known."""

    def read(self) -> dict[str, float]:
        """Label → mW or mJ. Raises PowerError."""

    def close(self) -> None:
        """Give everything back, where something is held."""
        return None


class NoMeter(PowerMeter):
    """Stands where there is none, and knows why."""

    name = "none"
    rail = ""
    covers = frozenset()
    interval_s = 1.0

    def __init__(self, why: str) -> None:
        self.why = why

    def read(self) -> dict[str, float]:
        """Raises PowerError with the reason, always."""
        raise PowerError(self.why)


def load_meter(wanted: str = "auto", *, gpu: bool = False, sysfs: Path = SYSFS) -> PowerMeter:
    """The first meter that gave a reading here; NoMeter with each one's reason if none did.

    Args:
        wanted: auto, or a meter's name.
        gpu: what is to be measured computes on the GPU too, so that a meter of the CPU alone will not do.

    Raises:
        PowerError: there is no meter of that name.
    """
    if wanted not in ("auto", *ORDER):
        raise PowerError(f'no power meter "{wanted}". Accepted: auto, {", ".join(ORDER)}')
    reasons = []
    for name in ORDER if wanted == "auto" else (wanted,):
        try:
            meter: PowerMeter = importlib.import_module(f"edgekws.power.{name}").open_meter(sysfs)
        except PowerError as error:
            reasons.append(f"{name}: {error}")
            continue
        try:
            meter.read()
        except PowerError as error:
            reason = str(error)
        else:
            if missing := {"cpu", *(["gpu"] if gpu else [])} - meter.covers:
                reason = f"measures only the {''.join(meter.covers)}, and the {' and '.join(sorted(missing))} computes too"
            else:
                return meter
        meter.close()
        reasons.append(f"{name}: {reason}")
    return NoMeter("no power meter can be read here (" + "; ".join(reasons) + ")")


def whole(rails_mw: dict[str, float]) -> tuple[str, float]:
    """Name and mW of the module's input among an INA3221's rails. Raises PowerError if none is known to be that."""
    for labels in WHOLE:
        if all(label in rails_mw for label in labels):
            return " + ".join(labels), sum(rails_mw[label] for label in labels)
    found = ", ".join(rails_mw) or "none"
    raise PowerError(f"no rail is known to be the whole module's: found {found}; known are {' or '.join(map(' + '.join, WHOLE))}")


def disagreement(one: PowerMeter, other: PowerMeter) -> str | None:
    """A warning with both numbers when two meters' means over the rails of both differ by more than AGREE_SHARE; else None.

    Raises:
        PowerError: one of them stopped, or they have no rail in common.
    """
    totals = [0.0, 0.0]
    for _ in range(READINGS):
        slow = other.read()  # waits for its turn; the fast one is asked right after
        fast = one.read()
        both = (fast.keys() & slow.keys()) - {one.rail if "+" in one.rail else "", other.rail if "+" in other.rail else ""}
        if not both:
            raise PowerError(f"{one.name} and {other.name} have no rail in common: {', '.join(fast)} and {', '.join(slow)}")
        totals[0] += sum(fast[label] for label in both)
        totals[1] += sum(slow[label] for label in both)
    mw = [total / READINGS for total in totals]
    if abs(mw[0] - mw[1]) <= AGREE_SHARE * max(mw):
        return None
    return (
        f"{one.name} reads {mw[0]:.0f} mW and {other.name} {mw[1]:.0f} mW over the same rails ({', '.join(sorted(both))}): more than"
        f" {AGREE_SHARE:.0%} apart, so trust neither before you know why"
    )
