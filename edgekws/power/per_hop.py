"""What one hop costs: from windows of energy, and whether the sensor can tell it from nothing; and CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev
from typing import Any

from edgekws.power.recording import Energy


def per_hop(idle: Sequence[Energy], load: Sequence[Energy], hops: Sequence[int], step_mw: float | None) -> dict[str, Any]:
    """One mode of work: each window of load with the idle one before it and the one after.

    Args:
        idle: two for each of `load`: before, after, before, after, ...
        hops: done in each window of load.
        step_mw: the least difference that the sensor can show, if known.

    Returns:
        `mw`, `idle_mw` and `above_idle_mw`, each median, min and max; `mj_per_hop` with everything that the machine draws;
        `mj_per_hop_above_idle`, None below `resolution_mw`; `rails_mj_per_hop`; `why_not`, "" if all of it is known.
    """
    unknown = [one.why_not for one in (*idle, *load) if one.joules is None]
    if unknown or not load:
        return {"mj_per_hop": None, "mj_per_hop_above_idle": None, "why_not": unknown[0] if unknown else "nothing was measured"}
    idle_mw = [one.mean_mw or 0.0 for one in idle]
    load_mw = [one.mean_mw or 0.0 for one in load]
    if fmean(idle_mw) <= 0:
        return {
            "mj_per_hop": None,
            "mj_per_hop_above_idle": None,
            "why_not": "the meter stood still: it told no power while the machine was on",
        }
    above_mw = [mw - fmean(idle_mw[2 * i : 2 * i + 2]) for i, mw in enumerate(load_mw)]
    # What the mean of the repeats can be trusted to: two standard errors; of a single one, what idle itself drifted by.
    scatter_mw = 2 * stdev(above_mw) / len(above_mw) ** 0.5 if len(above_mw) > 1 else abs(idle_mw[1] - idle_mw[0])
    resolution_mw = max(step_mw or 0.0, scatter_mw)
    total = sum(one.joules or 0.0 for one in load)
    count, seconds = sum(hops), sum(one.seconds for one in load)
    above, to_mj_per_hop = fmean(above_mw), seconds / count  # mW · s / hops = mJ a hop
    rails = {label for one in load for label in one.rails_j}
    return {
        "windows": len(load),
        "window_s": round(seconds / len(load), 2),
        "hops": count,
        "mw": _spread(load_mw),
        "idle_mw": _spread(idle_mw),
        "above_idle_mw": _spread(above_mw),
        "resolution_mw": round(resolution_mw, 2),
        "mj_per_hop": _short(total / count * 1000),
        "mj_per_hop_above_idle": _short(above * to_mj_per_hop) if above >= resolution_mw else None,
        "mj_per_hop_resolution": _short(resolution_mw * to_mj_per_hop),
        "rails_mj_per_hop": {
            label: _short(sum(one.rails_j[label] for one in load) / count * 1000)
            for label in sorted(rails)
            if all(label in one.rails_j for one in load)
        },
        "why_not": ""
        if above >= resolution_mw
        else f"below the sensor's resolution ({above:.1f} mW above idle, {resolution_mw:.1f} can be told)",
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def least_cpu_s(runs: Sequence[Callable[[int], None]], hops: int, repeats: int) -> list[float]:
    """CPU time of one hop of each, in turns: the lowest mean of some passes, which is the one that was disturbed least."""
    lowest = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start_s = time.thread_time()
            run(hops)
            lowest[i] = min(lowest[i], (time.thread_time() - start_s) / hops)
    return lowest
