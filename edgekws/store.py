"""REMEMBER: everything under the state directory. The only SQL, and the only place that knows these paths.

    edgekws.db                              events and what is known of each clip (SQLite, WAL)
    clips/NAME.wav                          their audio: written before the row, deleted after it, and shredded where there is none
    enrolments/KEYWORD/SPEAKER/             enrolment.json, replaced last, and the takes that it names: 16-bit mono WAV at 16 kHz
    prototypes/MODEL.npz                    those takes as a model hears them: a cache, made again from the takes
    models/ID/, current → ID, previous → ID model versions that were promoted here, the last few of them
    round/, round.lock                      what one round of adaptation makes, and that it is the only one
    engine, loading-ENGINE                  what `bench --all` found best here, and one that is being loaded
    starts                                  how many starts with the current version failed in a row, of each boot of the machine
    listening                               held by a listener, and not empty until it ends in order
    lock                                    held for the moment of a change

The directory may hold other things, also in those of these names: only what edgekws could have written there itself is ever deleted.
Names become directories as a readable part and a hash, so that any name will do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from edgekws.errors import StoreError
from edgekws.values import SAMPLE_RATE_HZ, Clip, Enrolled, Event

log = logging.getLogger(__name__)

FORMAT = 1  # of enrolment.json
GENERATIONS = 5  # model versions that are kept: the current one, the previous one, and the newest of the others
LINKS = ("current", "previous")
CACHES = GENERATIONS + 3  # prototypes of as many models are kept: of those, and the packaged ones
BUSY_S = 5.0  # to wait for another process that is writing
STATES = ("quarantined", "admitted", "confirmed", "rejected")
LABELS = ("positive", "between", "negative")
# Each takes the database from the version before it to its own number, counted from 1.
MIGRATIONS = (
    """
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice, so that whoever follows the log can go on from one
    kind TEXT NOT NULL,                    -- wake, gap, deaf, start, stop, reject, model, round, bench
    time_s REAL NOT NULL,                  -- since the epoch, UTC
    stream_s REAL NOT NULL,
    keyword TEXT NOT NULL,
    speaker TEXT NOT NULL,
    score REAL NOT NULL,
    threshold REAL NOT NULL,
    latency_ms REAL NOT NULL,
    model TEXT NOT NULL,
    extra TEXT NOT NULL                    -- JSON object
)
""",
    """
CREATE TABLE clips (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order they came, whatever the clock said
    label TEXT NOT NULL,                   -- positive, between, negative
    keyword TEXT NOT NULL,
    speaker TEXT NOT NULL,
    score REAL NOT NULL,
    decided_sample INTEGER NOT NULL,
    duration_s REAL NOT NULL,
    reason TEXT NOT NULL,
    state TEXT NOT NULL,                   -- quarantined, admitted, confirmed, rejected
    model TEXT NOT NULL,
    time_s REAL NOT NULL,                  -- since the epoch, UTC
    event INTEGER NOT NULL,                -- of the table events; 0 = none
    file TEXT NOT NULL                     -- in clips/
)
""",
    # Of a clip from before, the threshold of its keyword's last wake is the best that is known.
    """
ALTER TABLE clips ADD COLUMN threshold REAL NOT NULL DEFAULT 0;
UPDATE clips SET threshold = coalesce(
    (SELECT threshold FROM events WHERE kind = 'wake' AND keyword = clips.keyword ORDER BY id DESC LIMIT 1), 0)
""",
)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
BOOTS = 20  # whose failed starts are known: more than anybody asks for
REMOVED = ".removed-"  # an enrolment whose recordings are to be written over
ADAPTED = "adapted.npz"  # in a model version that was adapted here: what it listens for, by enrolment
# What a model version may hold. In a state directory with other things in it a directory without a manifest and with more is not ours.
PARTS = {"manifest.json", "model.onnx", "model_fp16.onnx", "model_int8.onnx", "parity.npz", "negatives.npz", "prototypes.npz", ADAPTED}
NEW = ".new-"  # a directory that something is made in, until it is whole
HEX = "[0-9a-f]"
LITTER = re.compile(rf"\.(new-.*|.+-{HEX}{{16}}|(current|previous)-[0-9]+)")  # in models/: see `_remove_whole` and `_link`
TAKE = f"take-*-{HEX * 12}.wav"  # in enrolments/KEYWORD/SPEAKER/
CACHE = f"*-{HEX * 10}.npz"  # in prototypes/: see `_slug`
SCHEMA = len(MIGRATIONS)  # user_version of the database
# Of an event's `extra`. One flipped bit in that text is met by SQLite as an error of the whole statement, and no check of its finds it.
EXTRA = "CASE WHEN json_valid(extra) THEN json_extract(extra, '$.{}') END".format
OWN = f"{EXTRA('client')} IS NULL AND {EXTRA('file')} IS NULL"  # the wake service's clients and files have streams of their own
HEARD = f"""(SELECT id, time_s, stream_s, model, kind, extra FROM events
    WHERE {OWN} AND (kind IN ('start', 'stop', 'wake', 'gap') OR {EXTRA("what")} = 'live'))"""
# Seconds of audio from one such event to the next, since a time. Another stream begins where the place in it falls; what is between two
# streams is no audio. Nor is what lasted longer than it took: there a listener to a file, which older logs do not mark, came between two
# events of the one at the microphone. Nor is what a gap took.
STEPS = f"""(SELECT id, time_s, stream_s, model,
    max(0, min(stream_s - lag(stream_s) OVER (ORDER BY id), time_s - lag(time_s) OVER (ORDER BY id))
        - CASE kind WHEN 'gap' THEN coalesce({EXTRA("lost_ms")}, 0) / 1000.0 ELSE 0 END) AS step
    FROM {HEARD} WHERE time_s >= ?)"""
COMINGS = ("start", "stop", "gap", "deaf")  # kinds of events
COLUMNS = ("kind", "time_s", "stream_s", "keyword", "speaker", "score", "threshold", "latency_ms", "model")
CLIP = tuple(one.name for one in fields(Clip) if one.name != "id")
# What goes first where there is no more space: -1 older sound of the room than a quarter of it holds (but the 30 pieces that a round asks
# for), as else that alone took all of it in 11 days, before who says the word once a day had 12 wakes; and of near misses of either label
# older ones than an eighth holds, and than the 200 that a round takes, as those of four keywords beside a television took all of it in 4;
# 0 what came by itself, 1 what passed a second opinion, 2 what a person confirmed. What the version before would have woken at (a reason
# that ends as `pseudo_labels.MISSED`) is 0: it is asked about at the end of a trial.
_ROOM = "keyword = ''"
_NEAR = "label = '{}' AND keyword != '' AND state != 'confirmed' AND reason NOT LIKE '%, where the version before would have woken'".format
WORTH = "CASE WHEN state = 'confirmed' THEN 2 WHEN state = 'admitted' AND keyword != '' THEN 1 {} ELSE 0 END".format(
    " ".join(
        f"WHEN {those} AND id <= (SELECT id FROM clips WHERE {those} ORDER BY id DESC LIMIT 1 OFFSET ?) THEN -1"
        for those in (_ROOM, _NEAR("negative"), _NEAR("between"))
    )
)
LEAST_ROOM, ROOM_BYTES = 30, 10 * 2 * SAMPLE_RATE_HZ
MOST_NEAR, NEAR_BYTES = 200, 112_640
CONFIRMED, REJECTED = "confirmed by the user", "rejected by the user"
NOT_IT = "confirmed as not the keyword"  # of a near miss that was not taken for it either
MOST_WRONG = 20  # clips of a keyword that a listener compares with: 5 ms each when it begins
NO_AUDIO = "none of the last wake's audio is kept. Try: edgekws clips list"
DAY_S = 86_400
CLOCK_SET_S = 1_577_836_800  # 2020: a board without a battery begins in 1970
STEADY_S = 3600.0  # A clock is believed after it went steadily for this long, seen by whoever deletes by it.
FEW = 20  # clips that are deleted at once while events wait: 0.2 s, at 9 ms each (measured)
BESIDE_BYTES = 1 << 16  # 32 kB that are shared between connections, and some to spare
GOING = "its owner wants it gone"  # the reason of a clip that a purge has yet to delete
BATCH, BATCH_PAUSE_S = 10, 0.01  # clips of one hold of the lock: a purge of 600 held it for 5.4 s, and wakes waited for that (measured)


@dataclass(frozen=True)
class Enrolment:
    """One keyword of one speaker, as it was recorded."""

    keyword: str
    speaker: str
    """"" where no name was given."""
    only_enrolled: bool
    takes: tuple[Path, ...]
    id: str
    """Differs when anything of it does."""
    time_s: float
    """Seconds since the epoch at which it was kept."""

    def recordings(self) -> list[np.ndarray]:
        """int16, shape (n,), mono at 16 kHz, one array a take.

        Raises:
            StoreError: a take is missing or damaged.
        """
        return [_read_wav(path) for path in self.takes]


@dataclass(frozen=True)
class Tally:
    """What befell while a version listened, and in the time before it. Pairs are before, since."""

    since_s: float
    """Seconds since the epoch at which it began."""
    hours: tuple[float, float]
    """Of audio, by the places in the stream, so that a clock that jumps does not matter."""
    stream_s: float
    """Place in the stream of the last that is counted."""
    wakes: Mapping[str, tuple[int, int]]
    """By keyword."""
    rejects: Mapping[str, tuple[int, int]]
    """By the user; by keyword."""


class Store:
    """The state directory, made (0700) when something is first written; the database opens when an event is first written or read.

    One thread at a time. Several processes may have it open.

    Raises:
        StoreError: from every method, when the directory cannot be made, read or written.
    """

    def __init__(
        self,
        root: Path,
        events_max: int = 100_000,
        clips_max_mb: int = 200,
        clips_max_days: int = 30,
        *,
        read_only: bool = False,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        """`now` is the wall's clock, which may be set at any time, and `clock` one that only goes forward, also while the machine sleeps.

        read_only: events and clips are only looked at, and nothing is made, mended or deleted; a database that is not there is empty.
        """
        self.root = root
        self._read_only = read_only
        self._path = os.fspath(root)  # for what is asked at every hop: joining a Path costs more than the look
        self._events_max = events_max
        self._clips_max_bytes = clips_max_mb * 1_000_000
        self._clips_max_s = clips_max_days * DAY_S
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._locked = False
        self._listening: FileIO | None = None
        self._now, self._clock = now, clock
        self._told_before: int | None = None  # the newest event when this one began to tell
        self._first_kept: int | None = None  # the first clip that this one kept
        self._clock_offset_s = now() - clock()
        self._shifted_s = 0.0  # by which the clips that this one kept were dated anew
        # By `clock`: from when on the age of a clip is trusted. No event vouches for the wall's clock, as it may be dated by the wrong one.
        self._believed_from_s = clock() + STEADY_S

    # Events.

    def add_event(self, event: Event) -> Event:
        """The event with the id that it was stored under. Once this returns, the event outlives the process."""
        columns, marks = ", ".join((*COLUMNS, "extra")), ", ".join("?" * (len(COLUMNS) + 1))
        values = [*(getattr(event, name) for name in COLUMNS), _json(event.extra)]
        number = self._execute(f"INSERT INTO events ({columns}) VALUES ({marks})", *values)[1]
        with contextlib.suppress(StoreError):  # The event is safe, and the next one tries this again.
            self._drop_old_events(event, number)
            self.drop_old_clips()
        return replace(event, id=number)

    def _drop_old_events(self, event: Event, number: int) -> None:
        """Comings and goings have a quarter of the room: of a microphone that opens and gives nothing there are 9 000 a day, which pushed
        out every wake, rejection, version and round in eleven. So have the wake service's clients: one that sent audio faster than real
        time woke 14 times a second."""
        share = f"{EXTRA('client')} IS NOT NULL" if "client" in event.extra else f"kind IN {COMINGS}" if event.kind in COMINGS else ""
        if share and number % (self._events_max // 1000 | 1) == 0:  # not each time: of 100 000 events it takes 0.1 s
            oldest = f"SELECT id FROM events WHERE {share} ORDER BY id DESC LIMIT 1 OFFSET ?"
            self._execute(f"DELETE FROM events WHERE {share} AND id <= ({oldest})", max(1, self._events_max // 4))
        first = self._execute("SELECT min(id) FROM events")[0][0][0]  # None: a damaged database was put aside just now
        if first is not None and number - first >= self._events_max:  # else there is no need to count
            self._execute("DELETE FROM events WHERE id <= (SELECT id FROM events ORDER BY id DESC LIMIT 1 OFFSET ?)", self._events_max)

    def events(self, *, since_s: float = 0.0, after: int = 0, limit: int = 1000) -> list[Event]:
        """At most `limit` events in the order they came, none older than `since_s` (epoch) and all with an id above `after`.

        For the next ones ask again with the last one's id as `after`.
        """
        return self._events("id > ? AND time_s >= ? ORDER BY id LIMIT ?", after, since_s, limit)

    def last_of(self, kind: str) -> Event | None:
        """The newest event of a kind; None = there is none."""
        return next(iter(self._events("kind = ? ORDER BY id DESC LIMIT 1", kind)), None)

    def _events(self, which: str, *values: object) -> list[Event]:
        rows, _ = self._execute(f"SELECT {', '.join((*COLUMNS, 'extra', 'id'))} FROM events WHERE {which}", *values)
        return [Event(**dict(zip(COLUMNS, row, strict=False)), extra=_object(row[-2]), id=row[-1]) for row in rows]

    def last_event(self) -> int:
        """The id of the newest event that there ever was, even if it was taken back, so it falls with a new database only; 0 = none."""
        return int(self._execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'")[0][0][0])

    def rejected(self, after: int) -> set[int]:
        """The wakes that a person says were wrong, in events with an id above `after`."""
        rows, _ = self._execute(f"SELECT {EXTRA('wake')} FROM events WHERE id > ? AND kind = 'reject'", after)
        return {wake for (wake,) in rows if wake is not None}

    def tally(self, model: str, before_s: float) -> Tally | None:
        """From when `model` alone was heard, and of the `before_s` before that; None = it never was, or nothing was before it.

        Counted by SQLite: as Python objects the 100 000 events that may be there took 68 MB of the listener, this takes 2 (measured).
        """
        first = self._first_heard(model)
        if first is None:
            return None
        id, since_s = first
        from_s = since_s - before_s
        hours = "total(step) FILTER (WHERE id <= ?) / 3600, total(step) FILTER (WHERE id > ?) / 3600"
        ((old_h, new_h, stream_s, _),) = self._execute(f"SELECT {hours}, stream_s, max(id) FROM {STEPS}", id, id, from_s)[0]
        # Of the hours before some may be its own: another version was tried and gone back from. Then so are the wakes.
        pair = "count(*) FILTER (WHERE model != ? OR time_s < ?), count(*) FILTER (WHERE model = ? AND time_s >= ?)"
        counted = f"SELECT keyword, {pair} FROM events WHERE kind = ? AND time_s >= ? AND {OWN} GROUP BY keyword"
        wakes, rejects = (
            {row[0]: (row[1], row[2]) for row in self._execute(counted, model, since_s, model, since_s, kind, from_s)[0]}
            for kind in ("wake", "reject")
        )
        return Tally(since_s, (old_h, new_h), stream_s or 0.0, wakes, rejects)

    def listened_s(self, model: str, hours: float) -> float | None:
        """When `model` had heard so many hours of audio, seconds since the epoch; None = not yet, as far as events tell."""
        id, since_s = self._first_heard(model) or (0, 0.0)  # what was before it may be deleted
        so_far = f"SELECT time_s, total(step) FILTER (WHERE id > ? AND model = ?) OVER (ORDER BY id) AS heard_s FROM {STEPS}"
        rows, _ = self._execute(f"SELECT min(time_s) FROM ({so_far}) WHERE heard_s >= ?", id, model, since_s, hours * 3600)
        return rows[0][0]

    def _first_heard(self, model: str) -> tuple[int, float] | None:
        """Id and time of the event from which on `model` alone was heard; None = it never was, or nothing was before it."""
        other = f"SELECT id FROM {HEARD} WHERE model != ? ORDER BY id DESC LIMIT 1"
        first, _ = self._execute(f"SELECT id, time_s FROM {HEARD} WHERE id > ({other}) ORDER BY id LIMIT 1", model)
        return first[0] if first else None

    def begin_listening(self) -> bool:
        """A listener begins. Whether the one before it ended without a word: it was killed, or the power went."""
        path = self.root / "listening"
        with _told(path), self._lock():
            file = path.open("a+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends, however it does
            except BlockingIOError:  # another one listens beside us
                file.close()
                return False
            self._listening = file
            died = file.tell() > 0
            if not died:
                file.write(f"{os.getpid()}\n".encode())
            return died

    def listens(self) -> bool:
        """Whether a listener is at work here just now."""
        try:
            with (self.root / "listening").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def end_listening(self) -> None:
        """It ends in order."""
        if self._listening is not None:
            with _told(self.root / "listening"):
                self._listening.truncate(0)
                self._listening.close()
            self._listening = None

    def close(self) -> None:
        """Let go of the database; the next use opens it again."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _execute(self, sql: str, *values: object) -> tuple[list[tuple[Any, ...]], int]:
        """Rows, and the id that was inserted."""
        path = self.root / "edgekws.db"
        for attempt in (1, 2):
            try:
                with _told(path):
                    # Somebody may have moved the file away while we had it open: what we write must be found.
                    if self._db is not None and (not path.exists() or path.stat().st_ino != self._inode):
                        self.close()
                    if self._db is None:
                        self._db = _look_at(path) if self._read_only else self._open(path)
                        self._inode = path.stat().st_ino if path.exists() else 0
                    cursor = self._db.execute(sql, values)
                    return cursor.fetchall(), int(cursor.lastrowid or 0)
            except sqlite3.Error as error:
                self.close()
                if attempt == 1 and _is_damage(error):
                    continue  # Opening it again moves it aside.
                reason = str(error)
                if re.search("disk I/O|unable to open", reason) and _is_full(self.root):
                    reason = f"the disk is full ({reason})"
                if "full" in reason and sql.startswith("SELECT"):
                    with contextlib.suppress(sqlite3.Error, StoreError), contextlib.closing(_look_at(path, alone=True)) as db:
                        return db.execute(sql, values).fetchall(), 0
                raise StoreError(f"{path}: {reason}. {_advice(reason)}") from error
        raise AssertionError("unreachable")

    def _open(self, path: Path) -> sqlite3.Connection:
        with self._lock():
            try:
                if path.exists() and not path.stat().st_size and not path.with_name(f"{path.name}-wal").exists():
                    raise _Damaged("the file is empty")  # which SQLite takes for a new one
                return self._ready(_connect(path))
            except _Damaged as damage:
                kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
                for suffix in ("-wal", "-shm", ""):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{path}{suffix}", f"{kept}{suffix}")
                log.warning("%s: damaged (%s); it is kept as %s, and a new one is begun", path, damage, kept.name)
                return self._ready(_connect(path))

    def _ready(self, db: sqlite3.Connection) -> sqlite3.Connection:
        """Audio of which no row knows is deleted: whoever wrote it was killed, or the rows were lost with a damaged database."""
        known = {row[0] for row in db.execute("SELECT file FROM clips")}
        named = (self.root / "clips").glob(f"{HEX * 16}.wav")
        orphans = [path for path in named if path.name not in known and path.is_file() and not path.is_symlink()]
        for path in orphans:
            try:
                _shred(path)
            except OSError as error:  # it costs nobody the log
                log.warning("%s: no row in the database knows this clip, and it cannot be deleted: %s", path, error.strerror)
        if orphans:
            log.warning(
                "%s: %d clips without a row in the database were deleted", self.root / "clips", sum(not one.exists() for one in orphans)
            )
        return db

    # Clips.

    def add_clip(self, clip: Clip, samples: np.ndarray) -> Clip:
        """Keep a clip with its audio (int16, mono, 16 kHz), and drop others where there are too many or they are too old.

        A wake that was rejected before its clip came is kept as what it is: a negative. Killed at any moment, no row is left without audio.
        """
        folder = self.root / "clips"
        path = folder / f"{secrets.token_hex(8)}.wav"
        clip = replace(clip, file=path.name, duration_s=len(samples) / SAMPLE_RATE_HZ)
        self._execute("PRAGMA user_version")  # opened, and not only looked at, before there is a file without a row
        with _told(folder), self._lock():
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                write_wav(path, samples.astype("<i2", copy=False))
                _sync(folder)
                if clip.event and self._is_rejected(clip.event):
                    clip = _revoked(clip)
                values = [getattr(clip, name) for name in CLIP]
                number = self._execute(f"INSERT INTO clips ({', '.join(CLIP)}) VALUES ({', '.join('?' * len(CLIP))})", *values)[1]
                if not path.exists():  # a database without this row was opened in between, in place of a damaged one
                    write_wav(path, samples.astype("<i2", copy=False))
            except BaseException:
                _shred(path)
                raise
        self._first_kept = self._first_kept or number
        self._look_again([clip])
        self.drop_old_clips()
        size = "SELECT coalesce(sum(duration_s), 0) FROM clips"
        for _ in range(FEW):  # The next clip goes on: where the settings allow less than before it may be a thousand.
            if self._execute(size)[0][0][0] * 2 * SAMPLE_RATE_HZ <= self._clips_max_bytes:
                break
            of_the_room = max(LEAST_ROOM, self._clips_max_bytes // 4 // ROOM_BYTES)
            near = min(MOST_NEAR, self._clips_max_bytes // 8 // NEAR_BYTES)
            self._delete_clips(self._rows(f"ORDER BY {WORTH}, id LIMIT 1", of_the_room, near, near))
        return replace(clip, id=number)

    def clips(
        self,
        label: str | None = None,
        state: str | None = None,
        keyword: str | None = None,
        *,
        before_s: float | None = None,
        newest: int = -1,
    ) -> list[Clip]:
        """Those that are all of what is given, in the order they came. The keyword "" is the room; `before_s` is since the epoch.

        newest: no more than so many, the last; -1 = all.
        """
        wanted = {"label = ?": label, "state = ?": state, "keyword = ?": keyword, "time_s < ?": before_s}
        wanted = {test: value for test, value in wanted.items() if value is not None}
        return self._rows(f"WHERE {' AND '.join(wanted) or '1'} ORDER BY id DESC LIMIT ?", *wanted.values(), newest)[::-1]

    def wrong(self, keyword: str) -> list[Clip]:
        """The latest that a person called no keyword, at most `MOST_WRONG`."""
        return self._rows("WHERE reason = ? AND keyword = ? ORDER BY id DESC LIMIT ?", REJECTED, keyword, MOST_WRONG)

    def clip(self, id: int) -> Clip:
        """Raises StoreError when there is none (any more)."""
        rows = self._rows("WHERE id = ?", id)
        if not rows:
            raise StoreError(f"there is no clip {id}. Try: edgekws clips list")
        return rows[0]

    def last_clip(self) -> Clip:
        """The last wake's, or the one that is the same recording. Raises StoreError when there is none."""
        wake = self.last_of("wake")
        for clip in self.clips_of(wake) if wake else ():
            return clip
        raise StoreError(NO_AUDIO)

    def clips_of(self, wake: Event) -> list[Clip]:
        """A wake's own, or the one that is the same recording."""
        return self._rows("WHERE event = ?", wake.id) or self._rows("WHERE id = ?", wake.extra.get("alike"))

    def clip_samples(self, clip: Clip) -> np.ndarray:
        """int16, shape (n,), mono at 16 kHz.

        Raises:
            StoreError: the file is missing, truncated or no such audio. Leave that clip out and go on.
        """
        path = self.root / "clips" / clip.file
        samples = _read_wav(path, "Leave that clip out, or delete it: edgekws clips purge")
        if len(samples) != round(clip.duration_s * SAMPLE_RATE_HZ):
            raise StoreError(f"{path}: {len(samples)} samples, where clip {clip.id} has {clip.duration_s:.2f} s. Leave that clip out")
        return samples

    def mark_clip(self, id: int, state: str, reason: str, *, label: str | None = None) -> Clip:
        """Another state, for a reason that is kept instead of the old one; the label only where one is given. The clip as it is now."""
        if state not in STATES or label not in (None, *LABELS):
            raise StoreError(f"a clip cannot be {state} or {label}. States are {', '.join(STATES)}; labels are {', '.join(LABELS)}")
        was = self.clip(id)
        marked = replace(was, state=state, reason=reason)
        marked = marked if label is None else replace(marked, label=label)
        with self.unchanged():
            self._execute("UPDATE clips SET state = ?, reason = ?, label = ? WHERE id = ?", state, reason, marked.label, id)
        self._look_again([was, marked])
        return marked

    def _look_again(self, clips: Sequence[Clip]) -> None:
        """A listener looks anew at what was called wrong, where one of these is or was."""
        if any(clip.reason == REJECTED for clip in clips):
            folder = self.root / "enrolments"
            with contextlib.suppress(OSError):  # it does when it is started next
                folder.mkdir(exist_ok=True)
                os.utime(folder)

    def settle_clip(self, id: int, state: str, reason: str) -> None:
        """What a round found, of a clip that nobody has decided on, by now: a person's word holds, and the clip may be gone."""
        self._execute("UPDATE clips SET state = ?, reason = ? WHERE id = ? AND state = 'quarantined'", state, reason, id)

    def confirm_clip(self, id: int) -> Clip:
        """A person says that the label is right; that of a moment between, that it was the keyword; of what was rejected, that it was so
        by mistake: then the wake does not count as rejected any more.
        """
        clip = self.clip(id)
        mistaken = bool(clip.keyword) and clip.reason == REJECTED
        if mistaken:
            wakes = f"SELECT ? UNION SELECT id FROM events WHERE {EXTRA('alike')} = ?"
            self._execute(f"DELETE FROM events WHERE kind = 'reject' AND {EXTRA('wake')} IN ({wakes})", clip.event, id)
        if clip.keyword and clip.label == "negative" and not mistaken:
            return self.mark_clip(id, "confirmed", NOT_IT)
        return self.mark_clip(id, "confirmed", CONFIRMED, label="positive" if clip.keyword else None)

    def confirm_last(self) -> tuple[Event, Clip | None]:
        """A person says that the last wake was right: it does not count as rejected any more, and its clip is a positive. The wake, and
        the clip; None where none of its audio is kept.

        Raises:
            StoreError: there is nothing to confirm, neither a clip nor a rejection.
        """
        wake = self.last_of("wake")
        if wake is None or not (self._is_rejected(wake.id) or self.clips_of(wake)):
            raise StoreError(NO_AUDIO)
        self._execute(f"DELETE FROM events WHERE kind = 'reject' AND {EXTRA('wake')} = ?", wake.id)
        clips = [self.confirm_clip(clip.id) for clip in self.clips_of(wake)]
        return wake, self.mark_clip(clips[0].id, "confirmed", CONFIRMED, label="positive") if clips else None

    def reject_clip(self, id: int) -> Clip:
        """A person says that this was not the keyword: it becomes a hard negative, and the wake that it was counts as rejected.

        A near miss that was taken for none is confirmed by that, so that taking it back makes no positive of it.
        """
        clip = self.clip(id)
        if clip.label == "negative" and clip.reason != REJECTED and not clip.event:
            return self.confirm_clip(id)
        for wake in self._events("id = ? AND kind = 'wake'", clip.event):  # none where it is too long ago
            self._count_reject(wake, wake.time_s)  # with what else was heard then, whenever the clips are gone through
        return self._revoke(clip)

    def reject_last(self) -> tuple[Event, Clip | None]:
        """A person says that the last wake was wrong: what any program may call. The wake, and its clip, which is a hard negative now.

        Of a wake that was the same recording as a kept clip it is that one, unless a person confirmed it. The clip is None where none is
        there: it was one too many, audio is not kept, or it comes in half a second (and is a negative then). Said twice it holds once.

        Raises:
            StoreError: also where nothing ever woke.
        """
        if (wake := self.last_of("wake")) is None:
            raise StoreError("nothing woke yet, so there is nothing to reject")
        return self.reject_wake(wake.id)

    def reject_wake(self, id: int) -> tuple[Event, Clip | None]:
        """The same of any wake, by the id of its event. Raises StoreError where that is no wake, or is not known any more."""
        found = self.events(after=id - 1, limit=1)
        if not found or found[0].id != id or found[0].kind != "wake":
            raise StoreError(f"there is no wake {id}. Try: edgekws log --json")
        (wake,) = found
        with self.unchanged():  # else a clip that comes just now is kept as what it was
            self._count_reject(wake, self._now())
            clips = self._rows("WHERE event = ?", wake.id) or self._alike(wake)
            return wake, self._revoke(clips[0]) if clips else None

    def note_alike(self, wake: int, file: str) -> None:
        """The wake of this event was the same recording as the clip in this file: what a person says of the one holds for the other."""
        with self.unchanged():
            for clip in self._rows("WHERE file = ?", file):  # none where it was deleted
                self._execute("UPDATE events SET extra = json_set(extra, '$.alike', ?) WHERE id = ? AND json_valid(extra)", clip.id, wake)
                if self._is_rejected(wake):
                    self.reject_wake(wake)

    def _alike(self, wake: Event) -> list[Clip]:
        """The kept clip that a wake was noted to be like; what a person said of that very clip stays."""
        return self._rows("WHERE id = ? AND (state != 'confirmed' OR label = 'negative')", wake.extra.get("alike"))

    def _is_rejected(self, wake: int) -> bool:
        return bool(self._execute(f"SELECT 1 FROM events WHERE kind = 'reject' AND {EXTRA('wake')} = ?", wake)[0])

    def _count_reject(self, wake: Event, time_s: float) -> None:
        """Once, and with whose wake it was: `tally` leaves those of the wake service's clients out."""
        if not self._is_rejected(wake.id):
            self.add_event(replace(wake, kind="reject", time_s=time_s, extra={**wake.extra, "wake": wake.id}, id=0))

    def _revoke(self, clip: Clip) -> Clip:
        clip = _revoked(clip)
        return self.mark_clip(clip.id, clip.state, clip.reason, label=clip.label)

    def purge_clips(
        self, label: str | None = None, state: str | None = None, keyword: str | None = None, *, before_s: float | None = None
    ) -> int:
        """Delete those that are all of what is given, so without anything given all, after writing over their audio. How many."""
        clips = self.clips(label, state, keyword, before_s=before_s)
        self._purge(clips)
        return len(clips)

    def forget_voice(self, keyword: str, speaker: str | None = None, *, since_s: float = 0.0) -> None:
        """Delete the clips that were heard of a speaker's keyword, or of everybody's, from then on, as `purge_clips` does."""
        clips = self.clips(keyword=keyword)
        self._purge([one for one in clips if speaker in (None, one.speaker) and one.time_s >= since_s])

    def _purge(self, clips: Sequence[Clip]) -> None:
        """All of them are called gone before the first is: who looks in between takes none for one that stays."""
        if others := clips[BATCH:]:  # the first few go in one hold of the lock
            with contextlib.suppress(StoreError), self.unchanged():  # on a full disk that cannot be written, but they can be deleted
                for clip in others:
                    self._execute("UPDATE clips SET state = 'rejected', reason = ? WHERE id = ?", GOING, clip.id)
        self._delete_clips(clips)

    def _rows(self, which: str, *values: object) -> list[Clip]:
        rows, _ = self._execute(f"SELECT {', '.join(CLIP)}, id FROM clips {which}", *values)
        return [Clip(**dict(zip((*CLIP, "id"), row, strict=True))) for row in rows]

    def _delete_clips(self, clips: Sequence[Clip]) -> None:
        """A few at a time, so that who waits for the lock gets it in between; where there is nothing to delete nobody waits for it."""
        for first in range(0, len(clips), BATCH):
            if first:
                time.sleep(BATCH_PAUSE_S)  # else we have the lock again before who waits for it is awake
            with _told(self.root / "clips"), self._lock():
                some = clips[first : first + BATCH]
                try:
                    for clip in some:
                        self._execute("DELETE FROM clips WHERE id = ?", clip.id)
                        _shred(self.root / "clips" / clip.file)
                except StoreError:  # On a full disk even a row cannot be deleted before there is room for the note of it.
                    for clip in some:
                        _shred(self.root / "clips" / clip.file)
                    self._execute(f"DELETE FROM clips WHERE id IN ({', '.join('?' * len(some))})", *(clip.id for clip in some))
        self._look_again(clips)

    def drop_old_clips(self) -> bool:
        """Some of them, by a clock that can be believed: one that is set to a wrong year for a moment must not cost everything that was
        kept. So only a store that is open for long does it: the listener's own. Whether there may be more.
        """
        now_s, clock_s = self._now(), self._clock()
        if self._told_before is None:
            self._told_before = self.last_event()
        leap_s = now_s - clock_s - self._clock_offset_s
        if leap_s > DAY_S and self._first_kept:  # What it kept is dated by a clock that nobody had set, and would be years old in an hour.
            kept = "id >= ? AND time_s <= ?"  # the time: not what came since the leap, nor what another listener has dated anew
            self._execute(f"UPDATE clips SET time_s = time_s + ? WHERE {kept}", leap_s, self._first_kept, now_s - leap_s)
            self._shifted_s += leap_s
        if leap_s < -DAY_S and self._shifted_s:  # it was the leap that was wrong
            kept = "id >= ? AND time_s > ?"
            self._execute(f"UPDATE clips SET time_s = time_s - ? WHERE {kept}", self._shifted_s, self._first_kept, now_s + DAY_S)
            self._shifted_s = 0.0
        if abs(leap_s) > 60:
            self._clock_offset_s = now_s - clock_s
            self._believed_from_s = clock_s + STEADY_S
        if clock_s >= self._believed_from_s:
            future = now_s + DAY_S
            if self._execute("SELECT 1 FROM clips WHERE time_s > ? LIMIT 1", future)[0] and not self._lags(now_s):
                self._execute("UPDATE clips SET time_s = ? WHERE time_s > ?", now_s, future)  # they age from now on
            old = self._rows("WHERE time_s < ? ORDER BY id LIMIT ?", now_s - self._clips_max_s, FEW)
            self._delete_clips(old)
            return len(old) == FEW
        return False

    def _lags(self, now_s: float) -> bool:
        """Where something is of the future: whether it is this clock that is wrong, as on a board without a battery at first.

        Then half of what earlier listeners told is later than now. A single event, such as the first of all, may itself be of a wrong year.
        """
        told = f"FROM events WHERE id <= {self._told_before or self.last_event()}"
        middle = f"SELECT time_s {told} ORDER BY time_s LIMIT 1 OFFSET (SELECT count(*) / 2 {told})"
        return now_s <= CLOCK_SET_S or any(row[0] > now_s + DAY_S for row in self._execute(middle)[0])

    # Enrolments.

    def save_enrolment(self, keyword: str, speaker: str, recordings: Sequence[np.ndarray], *, only_enrolled: bool = False) -> Enrolment:
        """Keep recordings (int16, mono, 16 kHz), in place of those that this speaker had for this keyword.

        When it fails the old ones stay, or the new ones are whole.
        """
        folder = self._enrolment(keyword, speaker)
        takes = {}
        for i, samples in enumerate(recordings, 1):
            samples = samples.astype("<i2", copy=False)
            takes[f"take-{i}-{hashlib.sha256(samples.tobytes()).hexdigest()[:12]}.wav"] = samples
        record = {"format": FORMAT, "keyword": keyword, "speaker": speaker, "only_enrolled": only_enrolled, "takes": list(takes)}
        data = json.dumps(record, ensure_ascii=False, indent=1).encode("utf-8", "surrogateescape")
        path = folder / "enrolment.json"
        with _told(folder), self._lock():
            self._sweep_takes()
            folder.mkdir(parents=True, exist_ok=True)
            new = [folder / name for name in takes if not (folder / name).exists()]
            try:
                for name, samples in takes.items():
                    _write(folder / name, wav(samples))  # one that was there may be torn
                _write(path, data)
            except BaseException:
                if not path.exists() or path.read_bytes() != data:  # else they are the enrolment by now
                    for take in new:
                        take.unlink(missing_ok=True)
                raise
            finally:
                os.utime(self.root / "enrolments")
            self._sweep_takes()
        return _read_enrolment(folder)

    def enrolments(self) -> list[Enrolment]:
        """All of them, by keyword and speaker. One that cannot be read is said in the log and left out."""
        found = []
        with _told(self.root):
            if self.root.exists():
                os.listdir(self.root)  # glob() finds nothing, without a word, where it may not look
        for path in sorted(self.root.glob("enrolments/*/*/enrolment.json")):
            try:
                found.append(_read_enrolment(path.parent))
            except StoreError as error:
                log.warning("%s", error)
        return sorted(found, key=lambda one: (one.keyword, one.speaker))

    def remove_enrolment(self, keyword: str, speaker: str | None = None) -> list[Enrolment]:
        """Delete a speaker's recordings of a keyword, or everybody's, and the clips that it heard of them. What was deleted."""
        gone = [one for one in self.enrolments() if one.keyword == keyword and speaker in (None, one.speaker)]
        if not gone:
            if (self.root / "enrolments").exists():
                with self.unchanged():
                    self._sweep_takes()  # of a removal that was cut short
            return []
        # The enrolment itself goes last, and at once: a removal that is cut short before can be asked for again.
        if (self.root / "edgekws.db").exists():
            self.forget_voice(keyword, speaker)
        with self.unchanged():  # else a listener that starts keeps the voice in the cache again in between
            with _told(self.root / "prototypes"):
                for path in (self.root / "prototypes").glob(CACHE):
                    _shred(path)
                _sweep_new(self.root / "prototypes")
            for one in gone:
                folder = self._enrolment(one.keyword, one.speaker)
                with _told(folder):
                    os.rename(folder, self.root / "enrolments" / f"{REMOVED}{secrets.token_hex(8)}")  # a listener sees that
                    with contextlib.suppress(OSError):  # other speakers are left
                        folder.parent.rmdir()
            self._sweep_takes()
        return gone

    def _sweep_takes(self) -> None:
        """Recordings that no enrolment names: of one that was replaced or removed, or of a process that was killed."""
        folder = self.root / "enrolments"
        with _told(folder):
            for one in folder.glob("[!.]*/*"):
                if one.is_dir():
                    there = (one / "enrolment.json").exists()
                    try:
                        named = _read_enrolment(one).takes if there else ()
                    except StoreError:  # it may be mended by hand
                        continue
                    for path in (*one.glob(TAKE), *one.glob(f".{TAKE}-*"), *one.glob(".enrolment.json-*")):
                        if path not in named:
                            _shred(path)
                    if not there:
                        with contextlib.suppress(OSError):  # something of somebody else's
                            one.rmdir()
            for one in folder.glob(f"{REMOVED}*"):
                for path in one.glob("*.wav"):
                    _shred(path)
                shutil.rmtree(one)

    def enrolment_stamp(self) -> object:
        """Differs after any change of the enrolments that was made here. One system call."""
        try:
            return os.stat(f"{self._path}/enrolments").st_mtime_ns
        except OSError:
            return None

    def _enrolment(self, keyword: str, speaker: str) -> Path:
        return self.root / "enrolments" / _slug(keyword) / _slug(speaker or "anyone", speaker)

    def prototypes(self, model: str) -> dict[str, Enrolled]:
        """What was kept for a model with `save_prototypes`; {} if nothing was or it cannot be read. Equal arrays are one array."""
        path = self.root / "prototypes" / f"{_slug(model)}.npz"
        try:
            found = load_enrolled(path)
            if not self._read_only:
                with contextlib.suppress(OSError):
                    os.utime(path)  # what is used is kept
            return found
        except FileNotFoundError:
            return {}
        except Exception as error:  # zipfile, NumPy and JSON have a dozen kinds; it is a cache, made again from the takes
            log.info("%s: not readable (%s), so it is made again", path, error)
            return {}

    def save_prototypes(self, model: str, enrolled: Mapping[str, Enrolled]) -> None:
        """Keep them for the next start, under keys of the caller's. Where there are too many, those of the model unused for longest go."""
        folder = self.root / "prototypes"
        own = folder / f"{_slug(model)}.npz"
        with _told(folder), self._lock():
            _sweep_new(folder)
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=NEW, dir=folder) as new:
                path = Path(new) / "prototypes.npz"
                save_enrolled(path, enrolled)
                os.replace(path, own)
            others = [one for one in folder.glob(CACHE) if one != own]  # whatever the clock says its own age is
            for old in sorted(others, key=lambda one: one.stat().st_mtime_ns)[: 1 - CACHES]:
                _shred(old)

    # Model versions.

    def models(self) -> dict[str, Path]:
        """The versions that were promoted here: name of the directory → directory."""
        folders = sorted(self.root.glob("models/*/manifest.json"))
        own = [path.parent for path in folders if not path.parent.is_symlink() and path.parent.name[0] != "."]
        return {path.name: path for path in own if path.name not in LINKS}  # copies of what they pointed at, where links were followed

    def current_model(self) -> Path | None:
        """The promoted version; None = none is, so the packaged default listens."""
        return self._model("current")

    def previous_model(self) -> Path | None:
        """The version that `rollback` goes back to; None = the packaged default."""
        previous = self._model("previous")
        # The same where the power went between the two links of a promotion: then what was before the current one is not known any more.
        return None if previous == self._model("current") else previous

    def promoted_s(self) -> float:
        """When the current version became current, seconds since the epoch; 0.0 = none is."""
        link = self.root / "models" / "current"
        with _told(link):
            then_s, now_s = (link.lstat().st_mtime if os.path.lexists(link) else 0.0), self._now()
            if then_s > now_s + DAY_S and not self._lags(now_s):  # else its week on trial would not end
                os.utime(link, (now_s, now_s), follow_symlinks=False)
                return now_s
            return then_s

    def models_touched(self) -> int:
        """Differs after a promotion or rollback, but for two within one tick of the kernel's clock. One system call, 2 µs."""
        try:
            return os.stat(f"{self._path}/models").st_mtime_ns
        except OSError:
            return 0

    def model_stamp(self) -> object:
        """Differs when another version is current, or the current one was written again; None = none is."""
        try:
            name = os.readlink(f"{self._path}/models/current")
        except OSError:
            name = "current"  # copied as a directory, or not there
        try:
            return name, os.stat(f"{self._path}/models/{name}").st_mtime_ns  # not the link's, which may be another's by now
        except OSError:
            return None if name == "current" else (name, 0)

    def promote(self, path: Path, id: str, *, keeps_previous: bool = False) -> Path:
        """Copy a model directory here, unless this very version is there, and make it current at once. Its directory here.

        The caller has checked the model. A copy here that is damaged is mended from it. Of the versions here the last few are kept.

        Args:
            keeps_previous: what `rollback` goes back to stays, instead of becoming the version that was current.
        """
        folder = self.root / "models"
        name = re.sub(r"[^A-Za-z0-9._-]", "-", id).lstrip(".") or "model"
        if name in LINKS:
            raise StoreError(f'a model cannot be named "{name}": that is a link\'s name here. Give it another id in its manifest')
        target = folder / name
        with _told(target), self._lock():
            folder.mkdir(exist_ok=True)
            for litter in [*folder.iterdir()]:  # of a promotion that was killed
                with contextlib.suppress(OSError):  # lost+found, which is in nobody's way
                    if LITTER.fullmatch(litter.name):
                        litter.unlink() if litter.is_symlink() else shutil.rmtree(litter)
                    elif litter.name not in LINKS and _is_left_of_a_version(litter):
                        shutil.rmtree(litter)
            if not (target / "manifest.json").exists():
                with tempfile.TemporaryDirectory(prefix=NEW, dir=folder) as new:
                    shutil.copytree(path, Path(new) / name)
                    for copied in (Path(new) / name, *(Path(new) / name).rglob("*")):
                        _sync(copied)
                    os.rename(Path(new) / name, target)
                _sync(folder)
            elif (target / "manifest.json").read_bytes() != (path / "manifest.json").read_bytes():
                raise StoreError(f"{target}: another model has this id already, and a version never changes. Give the new one its own id")
            else:
                for file in path.iterdir():
                    if not (target / file.name).exists() or not filecmp.cmp(file, target / file.name, shallow=False):
                        _write(target / file.name, file.read_bytes())
                        os.utime(folder)
            old = self._model("current")
            if old != target:
                os.utime(target)  # asked for again: a listener that went back from it takes it up
                if not keeps_previous:
                    self._link("previous", old)
                self._forget_starts()
                self._link("current", target)
            kept = (target, self.previous_model())
            others = [one for one in self.models().values() if one not in kept and _is_version(one)]
            others.sort(key=lambda one: (one / "manifest.json").stat().st_ctime_ns)  # when it came here; mtime was copied
            for one in others[: max(0, len(others) + sum(one is not None for one in kept) - GENERATIONS)]:
                _remove_whole(one)
        return target

    @contextlib.contextmanager
    def round_folder(self) -> Iterator[Path]:
        """An empty directory for one round of adaptation at a time, gone afterwards; what a killed round left there is gone as well.

        Raises:
            StoreError: another round is under way.
        """
        folder = self.root / "round"
        with _told(folder):
            with self._lock():
                pass  # makes the state directory
            with (self.root / "round.lock").open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends, however it does
                except BlockingIOError:
                    raise StoreError(
                        f"{folder}: another round of adaptation is under way. Wait for its end: edgekws log --follow"
                    ) from None
                _sweep_new(folder)
                for recipe in ("weights-only", "onda1", "onda2"):  # of a round of an earlier edgekws, which knew no other name
                    shutil.rmtree(folder / recipe, ignore_errors=True)
                folder.mkdir(exist_ok=True)
                try:
                    yield Path(tempfile.mkdtemp(prefix=NEW, dir=folder))
                finally:
                    _sweep_new(folder)

    def rollback(self) -> Path | None:
        """Make the previous version current, or the packaged default (None) where there is no previous one."""
        if self._model("current") is None:
            raise StoreError("no model was promoted, so there is nothing to go back from: the packaged default is in use")
        with _told(self.root / "models"), self._lock():
            old = self.previous_model()
            self._forget_starts()
            self._link("current", old)
            self._link("previous", None)
        return old

    def _forget_starts(self) -> None:
        """Before another version becomes current, also where the power goes in between: the failures are not its own."""
        self.clear_starts()
        _sync(self.root)

    def count_start(self) -> int:
        """A start of the listener begins; how many before it failed in a row since the machine booted: all until `clear_starts`."""
        return self._add_start(1)

    def failed_boots(self) -> int:
        """In how many boots of the machine in a row, before this one, starts failed and none did not."""
        with _told(self.root):
            return sum(boot != _boot() for boot in self._starts())

    def _starts(self) -> dict[str, int]:
        """Failed starts by boot, oldest first."""
        path = self.root / "starts"
        text = path.read_text(errors="replace") if path.exists() else ""
        return {boot: int(count) for boot, count in re.findall(r"^(\S+) ([1-9][0-9]{0,8})$", text, re.M)}

    @contextlib.contextmanager
    def start_waits(self) -> Iterator[None]:
        """A start that ends meanwhile has not failed: it waits for something that is not the model's."""
        counted = (self.root / "starts").exists()

        def add(more: int) -> None:
            with contextlib.suppress(StoreError):
                if counted:
                    self._add_start(more)

        add(-1)
        yield
        add(1)

    def _add_start(self, more: int) -> int:
        path = self.root / "starts"
        with _told(path), self._lock():
            starts = self._starts()
            failed = starts.pop(_boot(), 0)
            starts[_boot()] = max(0, failed + more)
            _write(path, "".join(f"{boot} {count}\n" for boot, count in list(starts.items())[-BOOTS:]).encode())
        return failed

    def clear_starts(self) -> None:
        """The start has not failed."""
        with _told(self.root):
            (self.root / "starts").unlink(missing_ok=True)

    @contextlib.contextmanager
    def loading(self, engine: str) -> Iterator[bool]:
        """Around the load of an engine whose libraries may take the whole process with them. False: the last load of it did, and this
        one should be left out; the next is tried again. It is not the model's fault, and must not cost a listener one start after another.
        """
        path = self.root / f"loading-{engine}"
        ended = False
        try:
            with _told(path), self._lock():
                pid = _number(path)
                ended = pid > 0 and not _another_lives(pid)
                _write(path, str(os.getpid()).encode())
        except StoreError as error:  # on a full disk it listens too
            log.warning("%s", error)
        try:
            yield not ended
        finally:
            with contextlib.suppress(OSError):
                path.unlink()

    def engine(self) -> str | None:
        """The engine that cost least on this machine, as `bench --all` found; None if that was not measured."""
        path = self.root / "engine"
        with _told(path):
            return (path.read_text(errors="replace").strip() or None) if path.exists() else None

    def save_engine(self, name: str) -> None:
        """Listening takes this one from its next start on, unless the settings name another."""
        path = self.root / "engine"
        with _told(path), self._lock():
            _write(path, f"{name}\n".encode())

    def _model(self, link: str) -> Path | None:
        path = self.root / "models" / link
        with _told(path):
            if path.is_symlink():
                return self.root / "models" / os.readlink(path)
            if not (path / "manifest.json").exists():
                return None
            # A directory, as a copy that follows links makes one: the version that it is a second copy of.
            manifest = (path / "manifest.json").read_bytes()
            return next((one for one in self.models().values() if (one / "manifest.json").read_bytes() == manifest), None)

    def _link(self, name: str, target: Path | None) -> None:
        path = self.root / "models" / name
        if path.is_dir() and not path.is_symlink():
            if self._model(name) is not None or _is_left_of_a_version(path):
                _remove_whole(path)  # the second copy, or what is left of one
            else:
                with contextlib.suppress(OSError):  # somebody else's things are in it
                    path.rmdir()
        if target is None:
            path.unlink(missing_ok=True)
        else:
            new = path.with_name(f".{name}-{os.getpid()}")
            new.unlink(missing_ok=True)
            new.symlink_to(target.name)
            os.replace(new, path)
        _sync(path.parent)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Meanwhile others wait who remove, purge, judge a clip, promote or go back: what was looked at is so when it is acted on."""
        with _told(self.root), self._lock():
            yield

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Before any change. One inside another is the same one."""
        if self._locked:
            yield
            return
        if not self.root.exists():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
        with (self.root / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._locked = True
            try:
                yield
            finally:
                self._locked = False


class _Damaged(Exception):
    """The file is a broken database, or none."""


def _connect(path: Path) -> sqlite3.Connection:
    new = not path.exists()
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    db.text_factory = _text
    try:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA:
            raise StoreError(f"{path}: schema {version}, this edgekws reads up to {SCHEMA}. Upgrade edgekws or name another [store] root")
        complaints = [row[0] for row in db.execute("PRAGMA quick_check(1)")]
        if complaints != ["ok"]:
            raise _Damaged("; ".join(complaints).replace("\n", " "))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA cache_size = -256")  # kB; the 2 MB that SQLite takes for itself is each connection's growth over a day
        db.execute("PRAGMA synchronous = NORMAL")  # kill -9 loses nothing, a power cut the last moments, neither damages
        for number, statements in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(f"BEGIN; {statements}; PRAGMA user_version = {number}; COMMIT;")
    except BaseException as error:
        db.close()
        if new and path.exists() and not path.stat().st_size:  # else it would be taken for a damaged one
            path.unlink()
        if _is_damage(error):
            raise _Damaged(str(error)) from error
        raise
    return db


def _look_at(path: Path, *, alone: bool = False) -> sqlite3.Connection:
    """The database as it is, which is not written to; an empty one where there is none.

    alone: as a file that nobody changes, for which nothing is made beside it. Not where there are writes that are not in it yet.
    """
    if not path.exists():
        db = sqlite3.connect(":memory:")
        for statements in MIGRATIONS:
            db.executescript(statements)
        return db
    notes = path.with_name(f"{path.name}-wal")
    pending = notes.exists() and (not alone or notes.stat().st_size > 0)  # an empty one is left by who found the disk full
    # Whoever may not write beside the file cannot take part in its locks: then too it is read as a file that nobody changes.
    alone = (alone or not os.access(path.parent, os.W_OK)) and not pending
    how = "&immutable=1" if alone else ""
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro{how}", uri=True, timeout=BUSY_S, check_same_thread=False)
    db.text_factory = _text
    try:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
    except BaseException:
        db.close()
        raise
    if version != SCHEMA:
        db.close()
        todo = "Upgrade edgekws" if version > SCHEMA else "`edgekws log` brings it up to date"
        raise StoreError(f"{path}: schema {version}, and this edgekws reads {SCHEMA}. {todo}")
    return db


def _text(data: bytes) -> str:
    """Of a flipped bit a sign, instead of an error of the whole statement."""
    return data.decode(errors="replace")


def _json(extra: Mapping[str, Any]) -> str:
    """Of a name of a file that is no UTF-8, which SQLite takes no text of, the escapes of JSON."""
    return json.dumps(extra, ensure_ascii=False).encode(errors="backslashreplace").decode()


def _object(text: str) -> dict[str, Any]:
    """{} where it is no JSON object any more: the event still is."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_full(folder: Path) -> bool:
    """Whether there is no room for what SQLite makes beside a database, of which it says no more than "disk I/O error"."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * BESIDE_BYTES)
            file.flush()
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def _is_damage(error: BaseException) -> bool:
    """Of SQLite's errors these two come as the bare class: "malformed" and "not a database"."""
    return type(error) is sqlite3.DatabaseError


def save_enrolled(path: Path, enrolled: Mapping[str, Enrolled]) -> None:
    """Write what a model listens for, under keys of the caller's, as an npz without pickle."""
    arrays: dict[str, np.ndarray] = {}
    rows: dict[str, tuple[dict[str, object], dict[str, str]]] = {}
    for key, one in enrolled.items():
        values: dict[str, object] = {}
        names: dict[str, str] = {}
        for field in fields(one):
            value = getattr(one, field.name)
            if isinstance(value, np.ndarray):
                digest = hashlib.sha256(str(value.shape).encode() + value.tobytes()).hexdigest()
                names[field.name] = f"array-{digest[:16]}"
                arrays[names[field.name]] = value
            else:
                values[field.name] = value
        rows[key] = values, names
    np.savez(path, rows=np.array(json.dumps(rows)), **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle


def load_enrolled(path: Path) -> dict[str, Enrolled]:
    """What `save_enrolled` wrote; equal arrays are one array. Any exception of NumPy's, zipfile's or JSON's where it cannot be read.

    Fields of a later edgekws are left out, so that a downgrade costs no version; what changes the meaning of the others raises the
    FORMAT of manifest.json.
    """
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    known = {field.name for field in fields(Enrolled)}
    found = {}
    for key, (values, names) in json.loads(str(arrays["rows"])).items():
        every = {**values, **{field: arrays[name] for field, name in names.items()}}
        found[key] = Enrolled(**{field: value for field, value in every.items() if field in known})
    return found


def _read_enrolment(folder: Path) -> Enrolment:
    path = folder / "enrolment.json"
    with _told(path):
        data, time_s = path.read_bytes(), path.stat().st_mtime
    try:
        raw = json.loads(data)
        if raw["format"] > FORMAT:
            raise StoreError(f"{path}: format {raw['format']}, this edgekws reads up to {FORMAT}. Upgrade edgekws")
        takes = tuple(folder / Path(str(name)).name for name in raw["takes"])
        id = hashlib.sha256(data).hexdigest()[:16]
        return Enrolment(str(raw["keyword"]), str(raw["speaker"]), bool(raw["only_enrolled"]), takes, id, time_s)
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path}: damaged ({type(error).__name__}: {error}). Enrol that keyword again, or delete the directory") from error


def _slug(name: str, hashed: str | None = None) -> str:
    """A directory's name for any name: what can be read of it, and a hash."""
    digest = hashlib.sha256((name if hashed is None else hashed).encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:40] or 'name'}-{digest}"


def write_wav(path: Path, samples: np.ndarray) -> None:
    """16-bit mono at 16 kHz; on the disk once this returns."""
    _put(path, wav(samples))


def wav(samples: np.ndarray) -> bytes:
    """Such a file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE_HZ, len(samples), "NONE", ""))
        out.writeframes(samples.tobytes())
    return file.getvalue()


def _read_wav(path: Path, advice: str = "Enrol that keyword again") -> np.ndarray:
    with _told(path):
        try:
            with wave.open(str(path), "rb") as file:
                data = file.readframes(file.getnframes())
                if file.getparams()[:3] == (1, 2, SAMPLE_RATE_HZ) and len(data) == 2 * file.getnframes():
                    return np.frombuffer(data, "<i2").astype(np.int16)
        except FileNotFoundError:
            raise StoreError(f"{path}: is not there any more. {advice}") from None
        except OSError:
            raise
        except Exception:  # wave.Error, EOFError, and for some lengths a bare RuntimeError (found by mutating clips)
            pass
    raise StoreError(f"{path}: not whole, or not 16-bit mono at {SAMPLE_RATE_HZ} Hz any more. {advice}")


def _shred(path: Path) -> None:
    """Write over the file, then delete it. A card or SSD that spreads its writes may keep the old bytes: that is beyond us. Of a link only
    the link goes."""
    with contextlib.suppress(FileNotFoundError):
        if not path.is_symlink():
            _put(path, b"\0" * path.stat().st_size, "r+b")
        path.unlink()


def _sweep_new(folder: Path) -> None:
    """What was being made in it by a process that was killed; and the folder, where nothing else is in it."""
    for litter in folder.glob(f"{NEW}*"):
        shutil.rmtree(litter, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_version(folder: Path) -> bool:
    """Of ours: other things have a manifest.json too."""
    try:
        return "id" in json.loads((folder / "manifest.json").read_bytes()) and any(
            name.endswith(".onnx") for name in PARTS & set(os.listdir(folder))
        )
    except (OSError, ValueError, TypeError):
        return False


def _is_left_of_a_version(folder: Path) -> bool:
    """Of one that was being deleted, or was damaged: without its manifest, and with nothing in it that a version does not have."""
    left = set(os.listdir(folder)) if folder.is_dir() and not folder.is_symlink() else set()
    return bool(left) and left <= PARTS - {"manifest.json"}


def _remove_whole(folder: Path) -> None:
    """At once no version any more; what is left where it is cut short is litter by its name."""
    gone = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _revoked(clip: Clip) -> Clip:
    return replace(clip, label="negative", state="confirmed", reason=REJECTED)


def _number(path: Path) -> int:
    """What a small file holds; 0 where it is not there, or holds anything else, as a card may after the power went."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


def _boot() -> str:
    """Differs after a boot of the machine; where that is not told all are one."""
    try:
        return BOOT_ID.read_text().strip() or "-"
    except OSError:
        return "-"


def _another_lives(pid: int) -> bool:
    """Whether that process is there, and is not this one: in a container the one that ended had the same number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, also after a power cut."""
    new = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        _put(new, data)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    _sync(path.parent)


def _put(path: Path, data: bytes, mode: str = "wb") -> None:
    """On the disk once this returns."""
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """OSError → StoreError."""
    try:
        yield
    except shutil.Error as error:  # of a tree: (from, to, why) of each file
        why = re.sub(r"^\[Errno \d+\] ([^:]*).*", r"\1", str(error.args[0][0][2]))
        raise StoreError(f"{path}: {why}. {_advice(why)}") from error
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {error.strerror or error}. {_advice(str(error))}") from error


def _advice(reason: str) -> str:
    if re.search("full|No space|quota", reason):
        return "Free space on that disk, or name another [store] root in edgekws.toml; what was there is untouched"
    if re.search("malformed|not a database", reason):
        return "It is damaged: the next `edgekws run` or `edgekws log` puts it aside and begins a new one"
    if re.search("locked", reason):
        return "Another program holds it; end that, or try again"
    return (
        "Accepted is a directory that this user may write: run edgekws as its owner (sudo edgekws … where that is the service), or name"
        " another [store] root in edgekws.toml"
    )
