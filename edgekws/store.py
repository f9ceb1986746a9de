"""REMEMBER: everything under the state directory. The only SQL, and the only place that knows these paths.

    edgekws.db                              events (SQLite, WAL)
    enrolments/KEYWORD/SPEAKER/             enrolment.json, replaced last, and the takes that it names: 16-bit mono WAV at 16 kHz
    prototypes/MODEL.npz                    those takes as a model hears them: a cache, made again from the takes
    models/ID/, current → ID, previous → ID model versions that were promoted here, the last few of them
    starts                                  how many starts with the current version failed in a row
    lock                                    held for the moment of a change

Names become directories as a readable part and a hash, so that any name will do.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import tempfile
import time
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekws.errors import StoreError
from edgekws.values import SAMPLE_RATE_HZ, Enrolled, Event

log = logging.getLogger(__name__)

SCHEMA = 1  # user_version of the database
FORMAT = 1  # of enrolment.json
GENERATIONS = 5  # model versions that are kept: the current one, the previous one, and the newest of the others
BUSY_S = 5.0  # to wait for another process that is writing
CREATE = """
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice, so that whoever follows the log can go on from one
    kind TEXT NOT NULL,                    -- wake, gap, start, stop
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
"""
COLUMNS = ("kind", "time_s", "stream_s", "keyword", "speaker", "score", "threshold", "latency_ms", "model")


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


class Store:
    """The state directory, made (0700) when something is first written; the database opens when an event is first written or read.

    One thread at a time. Several processes may have it open.

    Raises:
        StoreError: from every method, when the directory cannot be made, read or written.
    """

    def __init__(self, root: Path, events_max: int = 100_000) -> None:
        self.root = root
        self._events_max = events_max
        self._db: sqlite3.Connection | None = None
        self._inode = 0

    # Events.

    def add_event(self, event: Event) -> Event:
        """The event with the id that it was stored under. Once this returns, the event outlives the process."""
        columns, marks = ", ".join((*COLUMNS, "extra")), ", ".join("?" * (len(COLUMNS) + 1))
        values = [*(getattr(event, name) for name in COLUMNS), json.dumps(event.extra, ensure_ascii=False)]
        number = self._execute(f"INSERT INTO events ({columns}) VALUES ({marks})", *values)[1]
        with contextlib.suppress(StoreError):  # The event is safe, and the next one tries this again.
            self._execute("DELETE FROM events WHERE id <= ?", number - self._events_max)
        return replace(event, id=number)

    def events(self, *, since_s: float = 0.0, after: int = 0, limit: int = 1000) -> list[Event]:
        """At most `limit` events in the order they came, none older than `since_s` (epoch) and all with an id above `after`.

        For the next ones ask again with the last one's id as `after`.
        """
        columns = ", ".join((*COLUMNS, "extra", "id"))
        query = f"SELECT {columns} FROM events WHERE id > ? AND time_s >= ? ORDER BY id LIMIT ?"
        rows, _ = self._execute(query, after, since_s, limit)
        return [Event(**dict(zip(COLUMNS, row, strict=False)), extra=json.loads(row[-2]), id=row[-1]) for row in rows]

    def last_event(self) -> int:
        """The id of the newest event; 0 = there is none."""
        return int(self._execute("SELECT coalesce(max(id), 0) FROM events")[0][0][0])

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
                        self._db = self._open(path)
                        self._inode = path.stat().st_ino
                    cursor = self._db.execute(sql, values)
                    return cursor.fetchall(), int(cursor.lastrowid or 0)
            except sqlite3.Error as error:
                self.close()
                if attempt == 1 and _is_damage(error):
                    continue  # Opening it again moves it aside.
                raise StoreError(f"{path}: {error}. {_advice(str(error))}") from error
        raise AssertionError("unreachable")

    def _open(self, path: Path) -> sqlite3.Connection:
        with self._lock():
            try:
                return _connect(path)
            except _Damaged as damage:
                kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
                for suffix in ("-wal", "-shm", ""):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{path}{suffix}", f"{kept}{suffix}")
                log.warning("%s: damaged (%s); it is kept as %s, and a new one is begun", path, damage, kept.name)
                return _connect(path)

    # Enrolments.

    def save_enrolment(self, keyword: str, speaker: str, recordings: Sequence[np.ndarray], *, only_enrolled: bool = False) -> Enrolment:
        """Keep recordings (int16, mono, 16 kHz), in place of those that this speaker had for this keyword.

        Until it returns the old ones hold; when it fails they stay.
        """
        folder = self._enrolment(keyword, speaker)
        takes = {}
        for i, samples in enumerate(recordings, 1):
            data = samples.astype("<i2", copy=False)
            takes[f"take-{i}-{hashlib.sha256(data.tobytes()).hexdigest()[:12]}.wav"] = data
        record = {"format": FORMAT, "keyword": keyword, "speaker": speaker, "only_enrolled": only_enrolled, "takes": list(takes)}
        with _told(folder), self._lock():
            folder.mkdir(parents=True, exist_ok=True)
            made = []
            try:
                for name, data in takes.items():
                    if not (folder / name).exists():
                        made.append(folder / name)
                        _write_wav(folder / name, data)
                _write(folder / "enrolment.json", json.dumps(record, ensure_ascii=False, indent=1).encode("utf-8", "surrogateescape"))
            except BaseException:
                for path in made:
                    path.unlink(missing_ok=True)
                raise
            for path in folder.glob("take-*.wav"):
                if path.name not in takes:
                    path.unlink()
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
        """Delete a speaker's recordings of a keyword, or everybody's. What was deleted."""
        gone = [one for one in self.enrolments() if one.keyword == keyword and speaker in (None, one.speaker)]
        for one in gone:
            folder = self._enrolment(one.keyword, one.speaker)
            with _told(folder), self._lock():
                (folder / "enrolment.json").unlink()
                shutil.rmtree(folder)
                with contextlib.suppress(OSError):  # other speakers are left
                    folder.parent.rmdir()
        if gone:  # A voice is not kept in the cache either.
            with _told(self.root / "prototypes"):
                shutil.rmtree(self.root / "prototypes", ignore_errors=True)
        return gone

    def enrolment_stamp(self) -> object:
        """Differs after any change of the enrolments. A few stat calls, without a lock or the database."""
        found = []
        for path in self.root.glob("enrolments/*/*/enrolment.json"):
            with contextlib.suppress(OSError):
                found.append((str(path), path.stat().st_mtime_ns, path.stat().st_ino))
        return sorted(found)

    def _enrolment(self, keyword: str, speaker: str) -> Path:
        return self.root / "enrolments" / _slug(keyword) / _slug(speaker or "anyone", speaker)

    def prototypes(self, model: str) -> dict[str, Enrolled]:
        """What was kept for a model with `save_prototypes`; {} if nothing was or it cannot be read. Equal arrays are one array."""
        path = self.root / "prototypes" / f"{_slug(model)}.npz"
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
            rows = json.loads(str(arrays["rows"]))
            return {
                key: Enrolled(**values, **{field: arrays[name] for field, name in names.items()}) for key, (values, names) in rows.items()
            }
        except FileNotFoundError:
            return {}
        except Exception as error:  # zipfile, NumPy and JSON have a dozen kinds; it is a cache, made again from the takes
            log.info("%s: not readable (%s), so it is made again", path, error)
            return {}

    def save_prototypes(self, model: str, enrolled: Mapping[str, Enrolled]) -> None:
        """Keep them for the next start, under keys of the caller's."""
        folder = self.root / "prototypes"
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
        with _told(folder), self._lock():
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
                path = Path(new) / "prototypes.npz"
                np.savez(path, rows=np.array(json.dumps(rows)), **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
                os.replace(path, folder / f"{_slug(model)}.npz")

    # Model versions.

    def models(self) -> dict[str, Path]:
        """The versions that were promoted here: name of the directory → directory."""
        folders = sorted(self.root.glob("models/*/manifest.json"))
        return {path.parent.name: path.parent for path in folders if not path.parent.is_symlink() and path.parent.name[0] != "."}

    def current_model(self) -> Path | None:
        """The promoted version; None = none is, so the packaged default listens."""
        return self._model("current")

    def previous_model(self) -> Path | None:
        """The version that `rollback` goes back to; None = the packaged default."""
        previous = self._model("previous")
        # The same where the power went between the two links of a promotion: then what was before the current one is not known any more.
        return None if previous == self._model("current") else previous

    def model_stamp(self) -> object:
        """Differs when another version is current, or the current one was written again; None = none is. Two system calls."""
        link = self.root / "models" / "current"
        try:
            name = os.readlink(link)
        except OSError:
            return None
        try:
            return name, os.stat(link).st_mtime_ns
        except OSError:
            return name, 0

    def promote(self, path: Path, id: str) -> Path:
        """Copy a model directory here, unless this very version is there, and make it current at once. Its directory here.

        The caller has checked the model. A copy here that is damaged is mended from it. Of the versions here the last few are kept.
        """
        folder = self.root / "models"
        name = re.sub(r"[^A-Za-z0-9._-]", "-", id).lstrip(".") or "model"
        if name in ("current", "previous"):
            raise StoreError(f'a model cannot be named "{name}": that is a link\'s name here. Give it another id in its manifest')
        target = folder / name
        with _told(target), self._lock():
            folder.mkdir(exist_ok=True)
            for litter in folder.glob(".*"):  # of a promotion that was killed
                litter.unlink() if litter.is_symlink() else shutil.rmtree(litter)
            if not (target / "manifest.json").exists():
                shutil.rmtree(target, ignore_errors=True)  # deleted in part
                with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
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
            old = self._model("current")
            if old != target:
                self._link("previous", old)
                self._link("current", target)
                (self.root / "starts").unlink(missing_ok=True)
            kept = (target, self.previous_model())
            others = [one for one in self.models().values() if one not in kept]
            others.sort(key=lambda one: (one / "manifest.json").stat().st_ctime_ns)  # when it came here; mtime was copied
            for one in others[: max(0, len(others) + sum(one is not None for one in kept) - GENERATIONS)]:
                (one / "manifest.json").unlink()  # at once no version any more
                shutil.rmtree(one)
        return target

    def rollback(self) -> Path | None:
        """Make the previous version current, or the packaged default (None) where there is no previous one."""
        if self._model("current") is None:
            raise StoreError("no model was promoted, so there is nothing to go back from: the packaged default is in use")
        with _told(self.root / "models"), self._lock():
            old = self.previous_model()
            self._link("current", old)
            self._link("previous", None)
            (self.root / "starts").unlink(missing_ok=True)
        return old

    def count_start(self) -> int:
        """A start of the listener begins; how many before it failed in a row, which is all of them until `clear_starts`."""
        path = self.root / "starts"
        with _told(path), self._lock():
            failed = int(path.read_text()) if path.exists() and path.read_text().isdigit() else 0
            _write(path, str(failed + 1).encode())
        return failed

    def clear_starts(self) -> None:
        """The start has not failed."""
        with _told(self.root):
            (self.root / "starts").unlink(missing_ok=True)

    def _model(self, link: str) -> Path | None:
        path = self.root / "models" / link
        with _told(path):
            return self.root / "models" / os.readlink(path) if path.is_symlink() else None

    def _link(self, name: str, target: Path | None) -> None:
        path = self.root / "models" / name
        if target is None:
            path.unlink(missing_ok=True)
        else:
            new = path.with_name(f".{name}-{os.getpid()}")
            new.unlink(missing_ok=True)
            new.symlink_to(target.name)
            os.replace(new, path)
        _sync(path.parent)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Before any change."""
        if not self.root.exists():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
        with (self.root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class _Damaged(Exception):
    """The file is a broken database, or none."""


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA:
            raise StoreError(f"{path}: schema {version}, this edgekws reads up to {SCHEMA}. Upgrade edgekws or name another [store] root")
        complaints = [row[0] for row in db.execute("PRAGMA quick_check(1)")]
        if complaints != ["ok"]:
            raise _Damaged("; ".join(complaints).replace("\n", " "))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # kill -9 loses nothing, a power cut the last moments, neither damages
        if version == 0:
            db.executescript(f"BEGIN; {CREATE}; PRAGMA user_version = {SCHEMA}; COMMIT;")
    except BaseException as error:
        db.close()
        if _is_damage(error):
            raise _Damaged(str(error)) from error
        raise
    return db


def _is_damage(error: BaseException) -> bool:
    """Of SQLite's errors these two come as the bare class: "malformed" and "not a database"."""
    return type(error) is sqlite3.DatabaseError


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


def _write_wav(path: Path, samples: np.ndarray) -> None:
    with path.open("wb") as file:
        with wave.open(file, "wb") as out:
            out.setparams((1, 2, SAMPLE_RATE_HZ, len(samples), "NONE", ""))
            out.writeframes(samples.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _read_wav(path: Path) -> np.ndarray:
    with _told(path):
        try:
            with wave.open(str(path), "rb") as file:
                if file.getparams()[:3] == (1, 2, SAMPLE_RATE_HZ):
                    return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)
        except (wave.Error, EOFError):
            pass
    raise StoreError(f"{path}: not 16-bit mono at {SAMPLE_RATE_HZ} Hz any more. Enrol that keyword again")


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, also after a power cut."""
    new = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    _sync(path.parent)


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
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {error.strerror or error}. {_advice(str(error))}") from error


def _advice(reason: str) -> str:
    if re.search("full|No space|quota", reason):
        return "Free space on that disk, or name another [store] root in edgekws.toml; what was there is untouched"
    if re.search("locked", reason):
        return "Another program holds it; end that, or try again"
    return "Accepted is a directory that this user may write: run edgekws as its owner, or name another [store] root in edgekws.toml"
