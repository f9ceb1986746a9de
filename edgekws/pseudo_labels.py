"""SELECT: which moments are kept as clips, with which label and reason. A pure object: no clock, thread or disk, time is in samples.

A score is -log10 of the false wakes an hour that a threshold there would give, so a distance from the threshold means the same for
any keyword: 1 below it are ten times as many false wakes.

    positive   a wake
    between    a peak less than `BETWEEN` below the threshold: keyword or not, nobody knows yet; or what the version before would have
               woken at, where that listens along
    negative   a peak further below, down to `FAR`: a hard negative of that keyword; or ten seconds in which every score stayed lower
               than that: the room, of no keyword
    alike      a wake that is the recording of an earlier clip: nothing to keep, but what a person says of it holds for that clip
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, Clip, Detection, Enrolled

# Measured with the model edge on 340 takes of the development words, and on 2.85 h of read speech for the negatives:
#                                  below -2.5   to -1.2   to 0    woke
#   takes, clean                        1 %        8 %     30 %    61 %
#   takes, noise 10 dB below           11 %       25 %     32 %    35 %       (0 dB: 20 %, 32 %, 31 %, 16 %)
#   peaks of read speech, an hour     1287        44        4       0
# So between the two bounds a moment is far more often speech than a keyword that was missed, and above them one cannot know.
BETWEEN = 1.2
# Not done: down to 3.0, two to three times as many near misses. In 13 rounds of seven development lives recall, averaged over 0 to 4 false
# accepts, in room and quiet: +2.2 ± 1.7 and +1.1 ± 1.0 points; but at the deployed threshold 36 false accepts for 27. A third of
# the near misses, held out, tells little of what a version wakes at: of 26 rounds of such lives the two with most false accepts, 4 in 1.77
# hours of the room, heard none that was no word nearer than 1.2 and 1.6 below their threshold; seven others did, and had no false accept.
FAR = 2.5
# A clip is cut at hops, so that whoever hears it from zero states gets the very frames that the detector had.
BEFORE_HOPS = 38  # 3.04 s before the decision: more than the 1.9 s that a network hears
AFTER_HOPS = 6  # 0.48 s after it
SETTLE_HOPS = 13  # a peak counts when for 1 s nothing higher followed, and no wake
QUIET_HOPS = 25  # 2 s after a wake its tail is no near miss
ROOM_HOPS = 125  # 10 s
RING_HOPS = SETTLE_HOPS + ROOM_HOPS
# The room is taken often while little is known of it, then every half hour, so that a day is covered: at most 29 in the first hour, 80 in
# the first day, 49 in each day after.
ROOM_FIRST_S, ROOM_GROWTH, ROOM_LAST_S = 10.0, 1.15, 1800.0
HOUR, DAY = 3600 * SAMPLE_RATE_HZ, 86_400 * SAMPLE_RATE_HZ
# Of one keyword. What only the version before wakes at is asked about at the end of a trial: near misses crowd out none of it.
PER_HOUR = {"positive": 20, "between": 10, "missed": 10, "negative": 10}
PER_DAY = {"positive": 100, "between": 50, "missed": 50, "negative": 50}
MISSED = ", where the version before would have woken"  # ends the reason of such a clip
# How much the waveforms of two words must have in common, from 100 to 2000 Hz, to be one recording: the highest normalised
# cross-correlation. Embeddings cannot tell: a replay lies at 0.72 to 0.99 (another raster of 80 ms), a person's takes at 0.54 to 0.99.
# Measured on the development words: a replay 0.97 to 1.00 (66 of 66 dropped), under noise at 10 dB 52 of 52, twice in one room under other
# noise at 10 dB 19 of 19, heard clean and then in a room 46 of 54. Of a person's own takes, each against all earlier ones, none of 51
# of a name was dropped, and 18 of 188 digits, which costs little: such a take teaches nothing new.
ALIKE = 0.75
RECENT = 50  # clips of a keyword that a new one is compared with: 8 kB each
PRINT_SAMPLES, PRINT_AFTER = 16_384, HOP_SAMPLES  # about the second before the decision, and a hop after it
PRINT_BINS = slice(round(100 / SAMPLE_RATE_HZ * PRINT_SAMPLES), round(2000 / SAMPLE_RATE_HZ * PRINT_SAMPLES))


@dataclass(frozen=True)
class Cut:
    """A clip, its audio, and where in the stream it was decided."""

    clip: Clip
    """Without model, time, event and id, which are nothing that one can hear. Its file is a name for it until it is stored; of a wake that
    was alike, that of the clip that it is like."""
    samples: np.ndarray
    """int16, shape (n,); empty for a wake that was alike."""
    end_sample: int


@dataclass
class _Moment:
    label: str
    keyword: str
    speaker: str
    score: float
    margin: float
    hop: int
    end_sample: int
    due: int
    """The hop with which the clip is complete."""
    missed: bool = False
    """The version before would have woken."""

    @property
    def kind(self) -> str:
        """By which they are counted."""
        return "missed" if self.missed else self.label


class PseudoLabels:
    """The same hops give the same clips."""

    def __init__(
        self,
        enrolled: Sequence[Enrolled],
        *,
        per_hour: Mapping[str, int] = PER_HOUR,
        per_day: Mapping[str, int] = PER_DAY,
        room_growth: float = ROOM_GROWTH,
    ) -> None:
        self.counts = {"cut": 0, "too_many": 0, "alike": 0}
        """Clips that were cut, and moments that were no clip: one too many, or the same recording again."""
        self._limits = ((HOUR, per_hour), (DAY, per_day))
        self._room_growth = room_growth
        # Of each hop the samples, held and not copied, and the highest clear score.
        self._ring = deque([(np.zeros(HOP_SAMPLES, np.int16), 0.0)] * RING_HOPS, RING_HOPS)
        self._hops = self._first = self._end_sample = self._clear = self._room_from = 0
        self._moments: list[_Moment] = []
        self._peaks: dict[str, _Moment] = {}
        self._quiet_until: dict[str, int] = {}
        self._taken: dict[tuple[str, str], deque[int]] = {}  # (label, keyword) → end_sample of those of the last day
        self._prints: dict[str, deque[tuple[np.ndarray, str]]] = {}  # with the name of the file
        self.listen_for(enrolled)

    def listen_for(self, enrolled: Sequence[Enrolled]) -> None:
        """Other keywords or thresholds from the next hop on. What is known of the room and of recent clips stays; of somebody who was
        removed nothing is kept any more, not even what has just woken.
        """
        self._thresholds = {(one.keyword, one.speaker): one.threshold for one in enrolled}
        self._moments = [one for one in self._moments if (one.keyword, one.speaker) in self._thresholds]
        self._peaks = {name: one for name, one in self._peaks.items() if (one.keyword, one.speaker) in self._thresholds}

    def remember(self, clip: Clip, samples: np.ndarray | None, age_s: float) -> None:
        """A clip from before the start, oldest first, so that caps hold across restarts, and with its samples also duplicates."""
        at = self._end_sample - round(max(0.0, age_s) * SAMPLE_RATE_HZ)
        kind = "missed" if clip.reason.endswith(MISSED) else clip.label
        self._taken.setdefault((kind, clip.keyword), deque()).append(at)
        self._room_from = 0
        if clip.keyword and samples is not None:
            self._prints.setdefault(clip.keyword, deque(maxlen=RECENT)).append((print_of(samples, clip.decided_sample), clip.file))

    def step(
        self,
        samples: np.ndarray,
        end_sample: int,
        scores: Mapping[tuple[str, str], float],
        found: Sequence[Detection],
        missed: Sequence[Detection] = (),
    ) -> list[Cut]:
        """The clips that this hop completes.

        Args:
            samples: of the hop, int16, shape (1280,); nobody changes them any more.
            end_sample: samples of the stream so far.
            scores: what each (keyword, speaker) has at the end of the hop.
            found: its wakes.
            missed: wakes of the version before, where it listens along. Unless the one in use wakes too, each is a moment between, however
                low its score.
        """
        hop = self._hops
        self._hops, self._end_sample = hop + 1, end_sample
        for wake in found:
            self._peaks.pop(wake.keyword, None)
            self._quiet_until[wake.keyword] = hop + QUIET_HOPS
            margin = wake.score - wake.threshold
            self._moments.append(
                _Moment("positive", wake.keyword, wake.speaker, wake.score, margin, hop, wake.end_sample, hop + AFTER_HOPS)
            )
        clear, highest = bool(self._thresholds), -1e9  # where nothing is listened for nobody can tell the room from speech
        for key, threshold in self._thresholds.items():
            score = scores[key]
            if score < threshold - FAR:
                if score > highest:
                    highest = score
            else:  # a score that is no number is not clear either
                clear = False
                self._near(*key, score - threshold, score, hop)
        for wake in missed:
            key = wake.keyword, wake.speaker
            if key in self._thresholds and hop >= self._quiet_until.get(wake.keyword, 0):
                clear, score = False, scores[key]
                margin = score - self._thresholds[key]
                self._peaks[wake.keyword] = _Moment("between", *key, score, margin, hop, end_sample, hop + SETTLE_HOPS, missed=True)
        self._ring.append((samples, highest))
        self._clear = self._clear + 1 if clear else 0
        cuts: list[Cut] = []
        if self._peaks:
            for moment in [one for one in self._peaks.values() if one.due <= hop]:
                del self._peaks[moment.keyword]
                self._moments.append(moment)
        if self._moments:
            due = [one for one in self._moments if one.due <= hop]
            self._moments = [one for one in self._moments if one.due > hop]
            cuts = self._cut(due)
        if self._clear >= RING_HOPS and end_sample >= self._room_from:
            cuts += self._room()
        return cuts

    def end(self) -> list[Cut]:
        """The stream ends here, or has a gap: what waited for its last half second is cut without it, and nothing from before counts."""
        moments, self._moments = self._moments, []
        self._peaks.clear()
        cuts = self._cut(moments)
        self._first, self._clear = self._hops, 0
        return cuts

    def _near(self, keyword: str, speaker: str, margin: float, score: float, hop: int) -> None:
        """A score that is less than `FAR` below the threshold: the highest of its surroundings counts."""
        if not margin < 0:  # the detector knew why this is no wake, or no other one
            self._peaks.pop(keyword, None)
            return
        if hop < self._quiet_until.get(keyword, 0):
            return
        before = self._peaks.get(keyword)
        if before is None or (margin > before.margin and not before.missed):
            label = "between" if margin >= -BETWEEN else "negative"
            self._peaks[keyword] = _Moment(label, keyword, speaker, score, margin, hop, self._end_sample, hop + SETTLE_HOPS)

    def _cut(self, moments: Sequence[_Moment]) -> list[Cut]:
        cuts = []
        for one in moments:
            if not self._allowed(one):
                self.counts["too_many"] += 1
                continue
            first = max(self._first, one.hop + 1 - BEFORE_HOPS)
            samples = self._audio(first, min(one.hop + 1 + AFTER_HOPS, self._hops))
            decided = (one.hop + 1 - first) * HOP_SAMPLES
            mark = print_of(samples, decided)
            known = self._prints.setdefault(one.keyword, deque(maxlen=RECENT))
            threshold = one.score - one.margin
            like = next((name for other, name in reversed(known) if likeness(mark, other) > ALIKE), None)
            if like is not None:
                self.counts["alike"] += 1
                if one.label == "positive":
                    same = "woke by the same recording as an earlier clip"
                    clip = Clip("alike", one.keyword, one.speaker, one.score, 0, 0.0, same, file=like, threshold=threshold)
                    cuts.append(Cut(clip, samples[:0], one.end_sample))
                continue
            self._taken.setdefault((one.kind, one.keyword), deque()).append(one.end_sample)
            reason = "woke" if one.label == "positive" else f"{-one.margin:.2f} below the threshold"
            if one.missed:
                reason += MISSED
            self.counts["cut"] += 1
            facts = one.label, one.keyword, one.speaker, one.score, decided, len(samples) / SAMPLE_RATE_HZ, reason
            clip = Clip(*facts, file=f"cut {self.counts['cut']}", threshold=threshold)
            known.append((mark, clip.file))
            cuts.append(Cut(clip, samples, one.end_sample))
        return cuts

    def _allowed(self, one: _Moment) -> bool:
        taken = self._taken.get((one.kind, one.keyword), deque())
        while taken and taken[0] < one.end_sample - DAY:
            taken.popleft()
        return all(sum(at > one.end_sample - window for at in taken) < most[one.kind] for window, most in self._limits)

    def _room(self) -> list[Cut]:
        taken = self._taken.setdefault(("negative", ""), deque())
        while taken and taken[0] < self._end_sample - DAY:
            taken.popleft()
        gap_s = min(ROOM_FIRST_S * self._room_growth ** len(taken), ROOM_LAST_S)
        if taken and self._end_sample - taken[-1] < gap_s * SAMPLE_RATE_HZ:
            self._room_from = taken[-1] + round(gap_s * SAMPLE_RATE_HZ)
            return []
        # Its last second is left off: there a word may have begun that nobody has scored yet.
        samples = self._audio(self._hops - len(self._ring), self._hops - SETTLE_HOPS)
        if (samples == samples[0]).all():  # a muted microphone, or one that is stuck
            self._room_from = self._end_sample + ROOM_HOPS * HOP_SAMPLES
            return []
        self._clear = 0
        taken.append(self._end_sample)
        self.counts["cut"] += 1
        reason = f"the room: for 10 s every score was more than {FAR} below its threshold"
        clip = Clip("negative", "", "", max(score for _, score in self._ring), len(samples), len(samples) / SAMPLE_RATE_HZ, reason)
        return [Cut(clip, samples, self._end_sample)]

    def _audio(self, first: int, end: int) -> np.ndarray:
        """The samples of hops first to end - 1."""
        before = self._hops - len(self._ring)
        return np.concatenate([hop for hop, _ in islice(self._ring, first - before, end - before)])


def print_of(samples: np.ndarray, decided_sample: int) -> np.ndarray:
    """What tells one recording from another: spectrum and phases of the sound before the decision. float16 (bins, 2), of norm 100."""
    end = decided_sample + PRINT_AFTER
    spectrum = np.fft.rfft(samples[max(0, end - PRINT_SAMPLES) : end], PRINT_SAMPLES)[PRINT_BINS]
    spectrum *= 100 / max(float(np.linalg.norm(spectrum)), 1e-9)  # 100: a bin is about 1 then, where float16 is at home
    return np.stack([spectrum.real, spectrum.imag], 1).astype(np.float16)


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The highest correlation of two prints over all shifts in time, whatever their sign: 0 to 1."""
    a, b = (mark.astype(np.float32).view(np.complex64)[:, 0] / 100 for mark in (one, other))
    shifted = np.zeros(2 * PRINT_BINS.stop, np.complex64)
    shifted[PRINT_BINS] = a * b.conj()
    return float(np.abs(np.fft.ifft(shifted)).max()) * len(shifted)
