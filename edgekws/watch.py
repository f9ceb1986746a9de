"""`edgekws watch`: level, scores against their thresholds, what happens, power; moving in the terminal. People tune by looking."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

import numpy as np

from edgekws.audio import Source
from edgekws.errors import printable
from edgekws.pipeline import Pipeline
from edgekws.power.gauge import Gauge
from edgekws.values import SAMPLE_RATE_HZ, Detection, Enrolled

LOWEST_DBFS = -72.0
BELOW, ABOVE = 4.0, 2.0  # of score around the threshold that a bar shows
FRAMES_PER_S = 10
HOLD_S = 2.0  # a bar's highest mark stays
NAME = 24  # columns for a name
LAST_EVENTS = 5
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, without a cursor; and back


def watch(
    source: Source,
    pipeline: Pipeline,
    stream: TextIO,
    model: str = "",
    gauge: Gauge | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Show what the pipeline hears until the source ends or is closed: moving bars on a terminal, else a line a second. The wakes.

    A recording is shown at the pace at which it was spoken, on a terminal. `gauge` is for the power, where it can be read.
    """
    moving = stream.isatty()
    view = View(pipeline.detector.enrolled)
    wakes = 0
    shown_s = start_s = clock()
    line_due_s = 1.0

    def show() -> None:
        size = shutil.get_terminal_size()
        title = printable(f"{model} on {pipeline.engine.name}  {source.uri}")  # a long path is what is cut off
        columns, lines = size.columns or 80, size.lines or 24  # on Python 3.10 a serial console that does not tell has 0 and 0
        rows = view.screen(title, columns, lines, power(gauge), unicode="utf" in (stream.encoding or "").lower())
        stream.write("\x1b[H" + "\x1b[K\r\n".join(rows) + "\x1b[J")
        stream.flush()

    def deaf(why: str) -> None:
        view.note(f"deaf: {why}")
        if moving:
            show()
        else:
            print(f"deaf: {why}", file=stream, flush=True)

    source.on_deaf = deaf
    if moving:
        stream.write(ENTER)
    try:
        for chunk in source.chunks():
            found = pipeline.feed(chunk)
            wakes += len(found)
            stream_s = (chunk.first_sample + len(chunk.samples)) / SAMPLE_RATE_HZ
            if chunk.gap_samples:
                view.note(f"gap: {chunk.gap_samples * 1000 / SAMPLE_RATE_HZ:.0f} ms of audio were lost")
            view.hear(chunk.samples, pipeline.detector.latest, found, stream_s)
            if not moving:
                if found or chunk.gap_samples or stream_s >= line_due_s:
                    print(view.line(found, chunk.gap_samples, power(gauge)), file=stream, flush=True)
                    line_due_s = stream_s // 1 + 1
                continue
            if not source.live:
                time.sleep(max(0.0, start_s + stream_s - clock()))
            if clock() - shown_s >= 1 / FRAMES_PER_S:
                shown_s = clock()
                show()
    finally:
        if moving:
            stream.write(LEAVE)
            stream.flush()
    return wakes


def power(gauge: Gauge | None) -> str:
    """ "" where it cannot be read."""
    mw = gauge.mw() if gauge else None
    return "" if gauge is None or mw is None else f"{mw / 1000:.2f} W ({gauge.name})"


class View:
    """What is shown: the level, the scores, the highest of either in the last moments, what happened last."""

    def __init__(self, enrolled: tuple[Enrolled, ...]) -> None:
        self._enrolled = enrolled
        self._stream_s = 0.0
        self._level = Held(LOWEST_DBFS)
        self._scores = {(one.keyword, one.speaker): Held(-np.inf) for one in enrolled}
        self._events: deque[str] = deque(maxlen=LAST_EVENTS)

    def hear(self, samples: np.ndarray, scores: dict[tuple[str, str], float], found: list[Detection], stream_s: float) -> None:
        """int16 samples, and what the detector made of them so far."""
        self._stream_s = stream_s
        rms = float(samples.std()) if len(samples) else 0.0  # without a constant offset
        self._level.set(max(LOWEST_DBFS, 20 * np.log10(max(rms, 1e-3) / 32768)), stream_s)
        for key, score in scores.items():
            self._scores[key].set(score, stream_s)
        for one in found:  # the deciding score may lie within the chunk
            self._scores[one.keyword, one.speaker].set(one.score, stream_s)
            self._events.append(f"{one.end_sample / SAMPLE_RATE_HZ:9.2f} s  {_name(one)}  {one.score:.2f} / {one.threshold:.2f}")

    def note(self, text: str) -> None:
        """Something else happened."""
        self._events.append(f"{self._stream_s:9.2f} s  {text}")

    def line(self, found: list[Detection], gap_samples: int = 0, drawn: str = "") -> str:
        """The highest of the last moments, for a pipe or a log."""
        scores = [f"{_name(one)} {self._scores[one.keyword, one.speaker].highest:.2f} / {one.threshold:.2f}" for one in self._enrolled]
        woke = [f"WAKE {_name(one)}" for one in found]
        lost = [f"GAP {gap_samples * 1000 / SAMPLE_RATE_HZ:.0f} ms"] if gap_samples else []
        return "  ".join([f"{self._stream_s:9.2f} s", f"{self._level.highest:5.0f} dBFS", *scores, *filter(None, [drawn]), *woke, *lost])

    def screen(self, title: str, columns: int, lines: int, drawn: str = "", *, unicode: bool = True) -> list[str]:
        """Rows of at most `columns`, at most `lines` of them."""
        full, mark, held = ("█", "│", "▏") if unicode else ("#", "|", ":")
        width = max(8, columns - NAME - 18)

        def bar(label: str, value: Held, low: float, high: float, threshold: float | None, text: str) -> str:
            cells = [full if low + (i + 0.5) * (high - low) / width <= value.now else " " for i in range(width)]
            for at, sign in ((value.highest, held), (threshold, mark)):
                if at is not None and low <= at:
                    cells[min(width - 1, int((at - low) / (high - low) * width))] = sign
            return f"{label[:NAME]:<{NAME}} {''.join(cells)} {text}"[:columns]

        rows = [f"{self._stream_s:.1f} s  {title}  (Ctrl-C ends)"[:columns], drawn[:columns]]
        rows.append(bar("level", self._level, LOWEST_DBFS, 0.0, None, f"{self._level.now:.0f} dBFS"))
        room = max(1, lines - len(rows) - LAST_EVENTS - 3)
        for one in self._enrolled[:room]:
            score = self._scores[one.keyword, one.speaker]
            text = f"{score.now:6.2f} / {one.threshold:.2f}"
            rows.append(bar(_name(one), score, one.threshold - BELOW, one.threshold + ABOVE, one.threshold, text))
        if len(self._enrolled) > room:
            rows.append(f"and {len(self._enrolled) - room} more that find no room"[:columns])
        rows += ["", *(event[:columns] for event in self._events)]
        return rows[:lines]


class Held:
    """A value and its highest of the last `HOLD_S`."""

    def __init__(self, now: float) -> None:
        self.now = self.highest = now
        self._highest_s = 0.0

    def set(self, value: float, at_s: float) -> None:
        self.now = value
        if value >= self.highest or at_s - self._highest_s > HOLD_S:
            self.highest, self._highest_s = value, at_s


def _name(one: Enrolled | Detection) -> str:
    return f"{one.keyword} ({one.speaker})" if one.speaker else one.keyword
