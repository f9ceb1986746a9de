import errno
import itertools
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from edgekws import store as store_module
from edgekws.errors import StoreError
from edgekws.store import CACHES, Store
from edgekws.values import Clip, Enrolled, Event

WAKE = Event("hey", "ann", 1.5, 0.7, 1000.0, 4.2, 0.3, "edge-3", extra={"room": "küche"})
WORD = (np.sin(np.arange(8000) / 7) * 9000).astype(np.int16)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "state")


def takes(count, gain=1.0):
    return [(WORD * gain).astype(np.int16)[i:] for i in range(count)]


def test_an_event_comes_back_as_it_was(store):
    stored = store.add_event(WAKE)
    store.close()

    assert Store(store.root).events() == [stored]
    assert (stored.keyword, stored.extra, stored.id) == ("hey", {"room": "küche"}, 1)


def test_text_that_is_no_utf_8_is_kept(store):
    """The name of a file that is listened to, say."""
    stored = store.add_event(replace(WAKE, extra={"source": "file:t\udce4st.flac"}))

    assert store.events() == [stored]


def test_events_are_read_on_from_where_one_was(store):
    for time_s in (10.0, 20.0, 30.0):
        store.add_event(Event("hey", "", 1.0, 0.7, time_s, 0.0, 0.0, "m"))

    assert [e.time_s for e in store.events(after=1)] == [20.0, 30.0]
    assert [e.time_s for e in store.events(since_s=20.0, limit=1)] == [20.0]
    assert store.last_event() == 3


def test_only_the_newest_events_are_kept(tmp_path):
    store = Store(tmp_path, events_max=3)
    for _ in range(5):
        store.add_event(WAKE)

    assert [e.id for e in store.events()] == [3, 4, 5]


@pytest.mark.parametrize("kind", ["wake", "gap"])
def test_a_database_that_is_put_aside_just_after_an_event_came_costs_no_sink(tmp_path, monkeypatch, kind):
    """Its oldest page is bad, which the event did not touch."""
    store = Store(tmp_path, events_max=20)
    execute = store._execute

    def anew(sql, *values):
        if sql.startswith(("SELECT min", "DELETE")):
            store.close()
            for path in tmp_path.glob("edgekws.db*"):
                path.unlink()
        return execute(sql, *values)

    monkeypatch.setattr(store, "_execute", anew)
    store.add_event(replace(WAKE, kind=kind))
    monkeypatch.undo()

    assert store.add_event(WAKE).id == 1


def test_a_microphone_that_gives_nothing_for_weeks_pushes_out_no_wake(tmp_path):
    store = Store(tmp_path, events_max=20)
    for kind in ("wake", "reject", "model", "round"):
        store.add_event(replace(WAKE, kind=kind))
    for _ in range(30):
        for kind in ("start", "deaf", "stop"):
            store.add_event(replace(WAKE, kind=kind))
    kinds = [event.kind for event in store.events()]
    for _ in range(18):
        store.add_event(WAKE)

    assert kinds == ["wake", "reject", "model", "round", "deaf", "stop", "start", "deaf", "stop"]
    assert [event.kind for event in store.events()] == ["deaf", "stop", *["wake"] * 18]


def test_a_client_of_the_wake_service_that_wakes_all_the_time_pushes_out_nothing_of_the_listener_s_own(tmp_path):
    store = Store(tmp_path, events_max=20)
    own = [store.add_event(replace(WAKE, kind=kind, time_s=1000.0 + 60 * i, model="m")) for i, kind in enumerate(("start", "wake", "stop"))]
    own += [store.add_event(replace(WAKE, time_s=2000.0 + 60 * i, stream_s=60.0 * i, model="n")) for i in range(3)]
    for i in range(60):
        wake = store.add_event(replace(WAKE, time_s=2200.0, extra={"client": "192.0.2.7:4711"}))
        if i % 2:
            store.reject_wake(wake.id)

    assert store.events()[:6] == own and len(store.events()) == 6 + 5
    assert store.tally("n", 3600.0).wakes == {"hey": (1, 3)}


def test_the_state_directory_is_for_its_owner_only(store):
    store.add_event(WAKE)

    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700


def test_nothing_is_made_by_looking(store):
    assert (store.enrolments(), store.models(), store.current_model(), store.prototypes("m")) == ([], {}, None, {})
    assert not store.root.exists()


WRITER = """
import sys
from pathlib import Path
from edgekws.store import Store
from edgekws.values import Event
store = Store(Path(sys.argv[1]))
for i in range(1_000_000):
    print(store.add_event(Event("hey", "", 1.0, 0.7, float(i), 0.0, 0.0, "m")).id, flush=True)
"""


def test_what_was_acknowledged_outlives_kill_9(tmp_path):
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        acknowledged = [int(process.stdout.readline()) for _ in range(200)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.wait()
        store = Store(tmp_path)

        assert {e.id for e in store.events(limit=10**9)} >= set(acknowledged)
        assert not list(tmp_path.glob("*damaged*"))
        store.close()


def test_a_listener_that_was_killed_is_told_of_by_the_next_and_one_beside_it_is_not_meant(tmp_path):
    script = """
import sys, time
from pathlib import Path
from edgekws.store import Store
store = Store(Path(sys.argv[1]))
print(store.begin_listening(), flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    beside = Store(tmp_path).begin_listening()
    process.kill()
    process.communicate()
    store = Store(tmp_path)
    after = store.begin_listening()
    store.end_listening()

    assert (first, beside, after, Store(tmp_path).begin_listening()) == ("False\n", False, True, False)


def test_two_processes_write_at_once(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ids = [int(process.stdout.readline()) for _ in range(100) for process in processes]
    for process in processes:
        process.kill()
        process.wait()

    assert len(set(ids)) == len(ids) == 200


DAMAGE = {
    "header": lambda data: b"\xa5" * 100 + data[100:],
    "pages": lambda data: data[:4096] + b"\xa5" * 8192 + data[12288:],
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "overwritten": lambda data: b"junk" * 10_000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_database_is_kept_aside_and_a_new_one_begun(tmp_path, caplog, damage):
    store = Store(tmp_path)
    for _ in range(500):
        store.add_event(WAKE)
    store.close()
    path = tmp_path / "edgekws.db"
    data = damage(path.read_bytes())
    path.write_bytes(data)
    store = Store(tmp_path)

    assert store.add_event(WAKE).id == 1
    (kept,) = tmp_path.glob("edgekws.db.damaged-*")
    assert kept.read_bytes() == data
    (record,) = caplog.records
    assert "damaged" in record.getMessage() and kept.name in record.getMessage()


@pytest.mark.parametrize("damage", [None, lambda data: data[:-3000], lambda data: b"\xa5" * len(data)], ids=["gone", "truncated", "junk"])
def test_without_its_last_notes_the_database_opens_with_what_was_before_them(tmp_path, damage):
    """The write-ahead log, as a listener that was killed leaves it."""
    first = Store(tmp_path)
    first.add_event(WAKE)
    first._execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for _ in range(50):
        first.add_event(WAKE)
    shutil.copytree(tmp_path, tmp_path / "killed")
    wal = tmp_path / "killed" / "edgekws.db-wal"
    if damage is None:
        wal.unlink()
    else:
        wal.write_bytes(damage(wal.read_bytes()))
    store = Store(tmp_path / "killed")

    kept = len(store.events())
    assert 1 <= kept < 51
    assert store.add_event(WAKE).id == kept + 1
    first.close()


def test_damage_that_comes_later_is_found_when_it_is_met(tmp_path, caplog):
    store = Store(tmp_path)
    store.add_event(WAKE)
    rows = [("wake", 1.0, 1.0, "hey", "", 1.0, 0.7, 0.1, "m", "{}")] * 100_000  # more than SQLite keeps in memory
    with sqlite3.connect(tmp_path / "edgekws.db") as db:
        db.executemany(f"INSERT INTO events VALUES (NULL{', ?' * 10})", rows)
    db.close()
    store.add_event(WAKE)
    store._execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / "edgekws.db").open("r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * 1_000_000)

    assert store.events(limit=200_000) == []
    assert store.add_event(WAKE).id == 1
    assert len(list(tmp_path.glob("edgekws.db.damaged-*"))) == 1 and "damaged" in caplog.text


@pytest.mark.parametrize("damage", [b'["wake": 2}', b'{"wa\xebe": 2}', b"[2]"], ids=["no JSON", "no UTF-8", "no object"])
def test_a_flipped_bit_in_the_text_of_one_event_costs_that_text_and_nothing_else(store, damage):
    """SQLite has no checksums: to its check such a page is whole."""
    store.add_event(replace(WAKE, kind="start", model="edge-0"))
    first, second = store.add_event(WAKE), store.add_event(WAKE)
    store.reject_wake(first.id)
    store.add_event(replace(WAKE, kind="gap"))
    with sqlite3.connect(store.root / "edgekws.db") as db:
        db.execute("UPDATE events SET extra = CAST(? AS TEXT) WHERE id > 3", (damage,))
    db.close()

    for looking in (store, Store(store.root), Store(store.root, read_only=True)):
        assert [(e.id, e.kind) for e in looking.events()] == [(1, "start"), (2, "wake"), (3, "wake"), (4, "reject"), (5, "gap")]
        assert looking.events(after=1, limit=1) == [first]
        assert looking.rejected(0) == set()
        assert looking.tally("edge-3", 60.0).rejects == {"hey": (0, 1)}
    clip = store.add_clip(Clip("positive", "hey", "ann", 1.5, 4000, 0.5, "woke", event=second.id), WORD)
    store.note_alike(4, clip.file)
    assert store.reject_wake(second.id)[1].label == "negative" and store.rejected(4) == {second.id}
    assert store.confirm_clip(clip.id).label == "positive" and store.rejected(0) == set()


def test_an_event_is_written_where_the_database_should_be_after_it_was_moved(tmp_path):
    store = Store(tmp_path)
    store.add_event(WAKE)
    for path in tmp_path.glob("edgekws.db*"):
        path.unlink()
    store.add_event(WAKE)

    assert len(Store(tmp_path).events()) == 1


def test_a_database_of_a_later_version_is_refused_and_left_alone(tmp_path):
    Store(tmp_path).add_event(WAKE)
    db = sqlite3.connect(tmp_path / "edgekws.db")
    db.execute("PRAGMA user_version = 7")
    db.close()

    with pytest.raises(StoreError, match="schema 7, this edgekws reads up to 3"):
        Store(tmp_path).add_event(WAKE)
    assert not list(tmp_path.glob("*damaged*"))


PAIR = ("manifest.json", "tokenizer.json")


def everything_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".db-shm"}


def test_whoever_only_looks_sees_what_is_there_and_changes_nothing(tmp_path, store):
    for _ in range(3):
        store.add_event(WAKE)
    (store.root / "clips").mkdir()
    (store.root / "clips" / "orphan.wav").write_bytes(b"a clip whose row is still to be written")
    before = everything_in(store.root)
    looking = Store(store.root, read_only=True)

    assert looking.events() == store.events()
    assert looking.clips() == []
    with pytest.raises(StoreError, match="readonly"):
        looking.add_event(WAKE)
    assert everything_in(store.root) == before
    looking.close()


def test_where_there_is_nothing_a_look_finds_nothing_and_makes_nothing(tmp_path):
    looking = Store(tmp_path / "state", read_only=True)

    assert (looking.events(), looking.clips(), looking.last_event()) == ([], [], 0)
    assert not looking.root.exists()


def test_whoever_only_looks_mends_no_damaged_database(tmp_path):
    (tmp_path / "edgekws.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"not a database\. It is damaged: the next `edgekws run`"):
        Store(tmp_path, read_only=True).events()

    assert [path.name for path in tmp_path.iterdir()] == ["edgekws.db"]


@pytest.fixture
def small_disk(tmp_path):
    """512 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_clear_error_and_costs_nothing_that_was_there(small_disk):
    store = Store(small_disk / "state")
    store.save_enrolment("hey", "ann", takes(3))
    for _ in range(20):
        store.add_event(WAKE)
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 1024)

    with pytest.raises(StoreError, match=r"full.*Free space"):
        for _ in range(1000):
            store.add_event(WAKE)
    with pytest.raises(StoreError, match=r"No space.*Free space"):
        store.save_enrolment("hey", "ann", takes(3, gain=0.5))
    assert (kept := len(store.events(limit=10**6))) >= 20
    assert [np.array_equal(a, b) for a, b in zip(store.enrolments()[0].recordings(), takes(3), strict=True)] == [True] * 3
    filler.unlink()
    assert len(store.events(limit=10**6)) == kept
    store.add_event(WAKE)
    assert len(store.events(limit=10**6)) == kept + 1
    store.close()


def fill(folder):
    with pytest.raises(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 1024)


@pytest.mark.parametrize("read_only", [False, True])
def test_on_a_full_disk_what_is_there_is_read_and_what_is_new_is_refused_with_the_reason(small_disk, read_only):
    """SQLite needs 32 kB beside the database even to read it, and its own word for that is "disk I/O error"."""
    store = Store(small_disk / "state")
    event = store.add_event(WAKE)
    store.close()
    fill(small_disk)
    store = Store(store.root, read_only=read_only)

    for _ in range(2):  # the first failure leaves an empty log of writes behind
        assert (store.events(), store.last_event(), store.clips()) == ([event], 1, [])
        if not read_only:
            with pytest.raises(StoreError, match=r"the disk is full.*Free space"):
                store.add_event(WAKE)
    store.close()
    (small_disk / "filler").unlink()
    store = Store(store.root)
    assert store.add_event(WAKE).id == 2
    store.close()


def test_on_a_full_disk_writes_of_a_killed_listener_are_not_passed_over(small_disk, tmp_path):
    """They are in the log of writes, which is not read without those 32 kB."""
    store = Store(tmp_path / "state")
    for _ in range(3):
        store.add_event(WAKE)
    root = shutil.copytree(store.root, small_disk / "state", ignore=shutil.ignore_patterns("*-shm"))
    fill(small_disk)

    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"the disk is full.*Free space"):
            Store(root, read_only=read_only).events()
    (small_disk / "filler").unlink()
    after = Store(root)
    assert len(after.events()) == 3
    after.close()
    store.close()


def test_a_disk_that_is_full_before_the_first_event_is_said_and_leaves_no_empty_database(small_disk, caplog):
    store = Store(small_disk / "state")
    store.save_enrolment("hey", "ann", takes(3))
    fill(small_disk)

    for _ in range(3):
        with pytest.raises(StoreError, match=r"full.*Free space"):
            store.add_event(WAKE)
    assert store.events() == [] and not list(store.root.glob("edgekws.db*")) and not caplog.records
    (small_disk / "filler").unlink()
    assert store.add_event(WAKE).id == 1
    store.close()


def test_a_full_disk_under_a_promotion_is_told_by_its_reason_alone(small_disk, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "model.onnx").write_bytes(bytes(1_000_000))

    with pytest.raises(StoreError, match=r"models/new: No space left on device\. Free space"):
        Store(small_disk / "state").promote(tmp_path / "new", "new")


def test_a_state_directory_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "state").write_text("")

    for use in (lambda s: s.add_event(WAKE), lambda s: s.enrolments(), lambda s: s.save_enrolment("hey", "", takes(1))):
        with pytest.raises(StoreError, match="another"):
            use(Store(tmp_path / "state"))


@pytest.mark.parametrize("name", ["hey", "a/b", "..", "../../etc", "küche", "你好", "-", "x" * 300, "a\nb", "A", "a"])
def test_any_name_can_be_enrolled_and_stays_inside(store, name):
    store.save_enrolment(name, name, takes(3))
    store.save_enrolment(name, "", takes(1))

    assert [(one.keyword, one.speaker) for one in store.enrolments()] == [(name, ""), (name, name)]
    for one in store.enrolments():
        assert (store.root / "enrolments").resolve() in one.takes[0].resolve().parents
    assert {path.name for path in store.root.iterdir()} <= {"enrolments", "lock"}


def test_names_that_look_alike_are_kept_apart(store):
    for name in ("a/b", "a b", "A B", "a-b"):
        store.save_enrolment(name, "ann", takes(1))

    assert len(store.enrolments()) == 4


def test_enrolling_again_takes_the_place_of_the_old_recordings(store):
    first = store.save_enrolment("hey", "ann", takes(3))
    second = store.save_enrolment("hey", "ann", takes(2, gain=0.5), only_enrolled=True)

    assert store.enrolments() == [second]
    assert second.only_enrolled and len(second.takes) == 2 and first.id != second.id
    assert sorted(second.takes[0].parent.glob("*.wav")) == sorted(second.takes)


def test_the_listener_sees_what_is_called_wrong_what_is_taken_back_and_what_is_deleted(tmp_path):
    """Also where nobody is enrolled, and the clip comes after the rejection; not what nobody judged."""
    store = Store(tmp_path / "state")
    wake, heard = store.add_event(WAKE), Clip("positive", "hey", "ann", 1.5, 12_800, 1.0, "woke")
    seen = []

    def look(change):
        change()
        time.sleep(0.01)
        seen.append((store.enrolment_stamp(), [one.id for one in store.wrong("hey")]))

    for change in (
        lambda: store.add_clip(heard, WORD),
        lambda: store.reject_clip(1),
        lambda: store.confirm_clip(1),
        lambda: (store.reject_wake(wake.id), store.add_clip(replace(heard, event=wake.id), WORD)),
        lambda: store.purge_clips(label="positive"),
        lambda: store.purge_clips(),
    ):
        look(change)

    stamps, wrong = zip(*seen, strict=True)
    assert wrong == ([], [1], [], [2], [2], [])
    assert [a != b for a, b in itertools.pairwise((None, *stamps))] == [False, True, True, True, False, True]


def test_the_listener_sees_who_enrols_again_and_who_of_several_is_removed(store):
    """The stamp is all that it looks at."""
    for who in ("ann", "bob"):
        store.save_enrolment("hey", who, takes(1))
    stamps = [store.enrolment_stamp()]
    store.save_enrolment("hey", "ann", takes(1, gain=0.5))
    stamps.append(store.enrolment_stamp())
    store.remove_enrolment("hey", "ann")
    stamps.append(store.enrolment_stamp())

    assert len(set(stamps)) == 3


def test_an_enrolment_that_fails_leaves_no_recording_behind(small_disk):
    store = Store(small_disk / "state")
    before = store.save_enrolment("hey", "ann", takes(1))
    with pytest.raises(StoreError, match="No space left"):
        store.save_enrolment("hey", "ann", [np.tile(WORD, 25)] * 3)  # 400 kB each

    assert store.enrolments() == [before] and list(before.takes[0].parent.glob("*.wav")) == list(before.takes)


def test_a_broken_enrolment_is_said_and_the_others_are_heard(store, caplog):
    store.save_enrolment("good", "", takes(1))
    broken = store.save_enrolment("bad", "", takes(1))
    (broken.takes[0].parent / "enrolment.json").write_text("{")

    assert [one.keyword for one in store.enrolments()] == ["good"]
    assert "damaged" in caplog.text


def test_a_damaged_take_is_a_store_error(store):
    one = store.save_enrolment("hey", "", takes(1))
    one.takes[0].write_bytes(b"RIFF")

    with pytest.raises(StoreError, match="Enrol that keyword again"):
        one.recordings()


def test_removing_leaves_no_voice_behind(store):
    store.save_enrolment("hey", "ann", takes(1))
    store.save_enrolment("hey", "bob", takes(1))
    store.save_prototypes("m", {"1": Enrolled("hey", "ann", np.ones((1, 4), np.float32), 0.7)})

    assert [one.speaker for one in store.remove_enrolment("hey", "ann")] == ["ann"]
    assert [one.speaker for one in store.enrolments()] == ["bob"]
    assert store.prototypes("m") == {}
    store.remove_enrolment("hey")
    assert [path for path in store.root.rglob("*") if path.name != "lock" and path.is_file()] == []


def test_recordings_that_are_replaced_or_removed_are_written_over(store):
    """A second name of each file shows what became of its bytes."""
    for gain in (1.0, 0.5):
        store.save_enrolment("hey", "ann", takes(2, gain))
        store.save_prototypes("m", {"1": Enrolled("hey", "ann", np.ones((1, 4), np.float32), 0.7)})
        for path in (*store.root.rglob("take-*.wav"), *store.root.glob("prototypes/*.npz")):
            os.link(path, store.root / f"{gain}-{path.name}")
    store.remove_enrolment("hey")

    left = {path.name: path.read_bytes().strip(b"\0") for path in store.root.glob("[01].*")}
    assert len(left) == 6  # of these the first prototypes, which the second took the place of, are a cache of numbers
    assert {name for name, data in left.items() if data and "take" in name} == set()
    assert [name for name, data in left.items() if data and name.startswith("0.5")] == []


class Killed(BaseException):
    """The process ends here."""


def dies(monkeypatch, name, when, of=store_module):
    """At a call for which `when` holds, once it is done."""
    does = getattr(of, name)

    def then(*given, **named):
        found = does(*given, **named)
        if when(*given):
            raise Killed
        return found

    monkeypatch.setattr(of, name, then)


def test_recordings_are_whole_where_the_process_ends_just_after_the_new_ones_took_the_place_of_the_old(store, monkeypatch):
    store.save_enrolment("hey", "ann", takes(3))
    folder = store.enrolments()[0].takes[0].parent
    named = (folder / "enrolment.json").read_bytes()
    dies(monkeypatch, "_sync", lambda path: path == folder and (folder / "enrolment.json").read_bytes() != named)
    with pytest.raises(Killed):
        store.save_enrolment("hey", "ann", takes(3, 0.5))

    for said, kept in zip(takes(3, 0.5), store.enrolments()[0].recordings(), strict=True):
        np.testing.assert_array_equal(kept, said)


def test_the_same_recordings_mend_a_torn_one(store):
    enrolment = store.save_enrolment("hey", "ann", takes(3))
    os.truncate(enrolment.takes[1], 100)
    with pytest.raises(StoreError, match="not whole"):
        enrolment.recordings()

    np.testing.assert_array_equal(store.save_enrolment("hey", "ann", takes(3)).recordings()[1], takes(3)[1])


def test_a_removal_that_is_killed_is_told_to_a_listener_and_asked_for_again_leaves_nothing(store, monkeypatch):
    for speaker in ("ann", "bob"):
        store.save_enrolment("hey", speaker, takes(3))
    before = store.enrolment_stamp()
    with monkeypatch.context() as patch:
        dies(patch, "rename", lambda *_: True, os)
        with pytest.raises(Killed):
            store.remove_enrolment("hey", "ann")

    assert [one.speaker for one in store.enrolments()] == ["bob"] and store.enrolment_stamp() != before
    assert len([*store.root.rglob("take-*.wav")]) == 6
    assert store.remove_enrolment("hey", "ann") == []
    assert len([*store.root.rglob("take-*.wav")]) == 3


def test_what_somebody_else_put_beside_the_enrolments_stays(store):
    store.save_enrolment("hey", "ann", takes(3))
    enrolments = store.root / "enrolments"
    for name in ("backup", ".git"):
        shutil.copytree(enrolments, store.root / "copy", dirs_exist_ok=True)
        shutil.move(store.root / "copy", enrolments / name)
    store.save_enrolment("hey", "bob", takes(3))

    assert [len([*(enrolments / name).rglob("take-*.wav")]) for name in ("backup", ".git")] == [3, 6]


def test_recordings_of_an_enrolment_that_was_killed_are_gone_with_the_next(store):
    enrolment = store.save_enrolment("hey", "ann", takes(3))
    (enrolment.takes[0].parent / "enrolment.json").unlink()
    store.save_enrolment("hey", "bob", takes(3))

    assert not enrolment.takes[0].parent.exists() and len(store.enrolments()) == 1


def test_a_missing_recording_is_told_as_that(store):
    enrolment = store.save_enrolment("hey", "ann", takes(3))
    enrolment.takes[0].unlink()
    with pytest.raises(StoreError, match=r"is not there any more\. Enrol that keyword again"):
        enrolment.recordings()


@pytest.mark.parametrize("what", ["a folder", "on a bad block"])
def test_what_cannot_be_deleted_among_the_clips_costs_nobody_the_log(store, monkeypatch, what):
    clips = store.root / "clips"
    clips.mkdir(parents=True)
    if what == "a folder":
        (clips / "lost+found").mkdir()
    else:
        (clips / "0123456789abcdef.wav").write_bytes(b"sound")
        put = store_module._put

        def bad(path, *rest):
            if path.suffix == ".wav":
                raise OSError(errno.EIO, "Input/output error")
            put(path, *rest)

        monkeypatch.setattr(store_module, "_put", bad)
    store.add_event(WAKE)

    assert [event.keyword for event in Store(store.root).events()] == ["hey"]


def test_prototypes_come_back_bit_for_bit_and_share_their_cohort(store):
    cohort = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    rows = [Enrolled("küche", who, np.eye(2, 4, k, np.float32), 0.7, 1 / 3, -0.1, cohort, True) for k, who in enumerate("ab")]
    store.save_prototypes("edge/1", {"x": rows[0], "y": rows[1]})
    back = store.prototypes("edge/1")

    for key, one in zip("xy", rows, strict=True):
        assert (back[key].keyword, back[key].scale, back[key].only_enrolled) == (one.keyword, one.scale, True)
        np.testing.assert_array_equal(back[key].prototypes, one.prototypes)
    np.testing.assert_array_equal(back["x"].cohort, cohort)
    assert back["x"].cohort is back["y"].cohort
    assert store.prototypes("edge/2") == {}


def test_prototypes_of_the_last_eight_models_are_kept(store):
    one = {"1": Enrolled("hey", "ann", np.ones((1, 4), np.float32), 0.7)}
    (store.root / "prototypes" / ".new-killed").mkdir(parents=True)
    for i in range(10):
        store.save_prototypes(f"m-{i}", one)
        for path in store.root.glob("prototypes/*.npz"):  # each is older than whatever comes next by the time that the clock was set back
            os.utime(path, (path.stat().st_mtime + 1000,) * 2)

    assert len(list(store.root.glob("prototypes/*"))) == CACHES == 8
    assert store.prototypes("m-9")


def test_prototypes_that_are_used_are_kept(store):
    one = {"1": Enrolled("hey", "ann", np.ones((1, 4), np.float32), 0.7)}
    store.save_prototypes("factory", one)
    for i in range(20):
        store.save_prototypes(f"adapted-{i}", one)
        assert store.prototypes("factory")

    assert store.prototypes("adapted-19") and not store.prototypes("adapted-0")


def test_prototypes_from_before_voices_were_kept_are_read(store):
    store.save_prototypes("m", {"x": Enrolled("hey", "ann", np.ones((1, 4), np.float32), 0.7)})
    (path,) = store.root.glob("prototypes/*.npz")
    with np.load(path) as data:
        arrays = dict(data)
    (facts, names) = json.loads(str(arrays["rows"]))["x"]
    del names["voice"], facts["word_samples"]
    np.savez(path, **{**arrays, "rows": np.array(json.dumps({"x": (facts, names)}))})

    assert len(store.prototypes("m")["x"].voice) == 0


def test_a_damaged_cache_is_as_none(store):
    store.save_prototypes("m", {"x": Enrolled("hey", "", np.ones((1, 4), np.float32), 0.7)})
    (path,) = (store.root / "prototypes").glob("*.npz")
    path.write_bytes(path.read_bytes()[:100])

    assert store.prototypes("m") == {}


def a_model(folder, id, text="x"):
    path = folder / f"{id}{text}"
    path.mkdir()
    (path / "manifest.json").write_text(f'{{"id": "{id}", "text": "{text}"}}')
    (path / "model.onnx").write_text(text)
    return path


def test_promotion_and_rollback_go_forth_and_back(store, tmp_path):
    one, two = (store.promote(a_model(tmp_path, id), id) for id in ("m-1", "m-2"))

    assert (store.current_model(), store.previous_model(), list(store.models())) == (two, one, ["m-1", "m-2"])
    assert (two / "model.onnx").read_text() == "x"
    assert store.rollback() == one == store.current_model()
    assert store.rollback() is None is store.current_model()
    with pytest.raises(StoreError, match="nothing to go back from"):
        store.rollback()
    assert store.promote(two, "m-2") == two == store.current_model()


def test_a_state_that_was_copied_without_its_links_listens_with_the_promoted_version(store, tmp_path):
    for id in ("m-1", "m-2"):
        store.promote(a_model(tmp_path, id), id)
    copies = [Store(shutil.copytree(store.root, tmp_path / name, symlinks=False)) for name in ("first", "second")]
    for copy in copies:
        models = copy.root / "models"
        assert (copy.current_model(), copy.previous_model()) == (models / "m-2", models / "m-1")
        assert list(copy.models()) == ["m-1", "m-2"] and copy.promoted_s() > 0 and copy.model_stamp() is not None
    first, second = copies

    assert first.rollback() == first.root / "models" / "m-1" == first.current_model() and first.previous_model() is None
    assert second.promote(a_model(tmp_path, "m-3"), "m-3") == second.current_model()
    assert second.previous_model().name == "m-2" and list(second.models()) == ["m-1", "m-2", "m-3"]
    assert [path for copy in copies for path in copy.root.glob("models/.*")] == []


def test_a_version_never_changes(store, tmp_path):
    store.promote(a_model(tmp_path, "m-1"), "m-1")

    with pytest.raises(StoreError, match="its own id"):
        store.promote(a_model(tmp_path, "m-1", "y"), "m-1")
    assert (store.models()["m-1"] / "model.onnx").read_text() == "x"


def test_promoting_twice_keeps_the_way_back(store, tmp_path):
    path = a_model(tmp_path, "m-1")
    store.promote(path, "m-1")
    store.promote(path, "m-1")

    assert store.rollback() is None


@pytest.mark.parametrize("how", ["promoted", "gone back to"])
def test_failed_starts_of_one_version_are_not_held_against_the_next(store, tmp_path, how):
    for id in ("m-1", "m-2"):
        store.promote(a_model(tmp_path, id), id)
    assert [store.count_start(), store.count_start()] == [0, 1]
    store.promote(a_model(tmp_path, "m-3"), "m-3") if how == "promoted" else store.rollback()

    assert store.count_start() == 0


@pytest.mark.parametrize("how", ["promoted", "gone back to"])
def test_nor_where_the_power_goes_in_between(store, tmp_path, monkeypatch, how):
    for id in ("m-1", "m-2"):
        store.promote(a_model(tmp_path, id), id)
    assert [store.count_start(), store.count_start()] == [0, 1]
    third = a_model(tmp_path, "m-3")
    dies(monkeypatch, "_link", lambda self, name, target: name == "current", Store)
    with pytest.raises(Killed):
        store.promote(third, "m-3") if how == "promoted" else store.rollback()

    assert (store.current_model().name, store.count_start()) == ({"promoted": "m-3", "gone back to": "m-1"}[how], 0)


def test_what_is_left_of_a_version_or_a_second_copy_that_was_being_deleted_is_in_nobody_s_way(store, tmp_path):
    for id in ("m-1", "m-2"):
        store.promote(a_model(tmp_path, id), id)
    copy = Store(shutil.copytree(store.root, tmp_path / "copy", symlinks=False))
    shutil.copytree(copy.root / "models" / "m-1", copy.root / "models" / "m-0")
    for name in ("previous", "m-0"):
        (copy.root / "models" / name / "manifest.json").unlink()
    copy.promote(a_model(tmp_path, "m-3"), "m-3")

    assert (copy.current_model().name, copy.previous_model().name) == ("m-3", "m-2")
    assert sorted(path.name for path in (copy.root / "models").iterdir()) == ["current", "m-1", "m-2", "m-3", "previous"]


def test_what_else_is_in_a_directory_that_the_settings_name_stays(tmp_path):
    store, outside = Store(tmp_path / "pictures"), tmp_path / "outside"
    outside.write_text("of somebody else")
    others = [
        *("clips/holiday.mp4", "clips/take.wav", "models/llama/weights.bin", "models/.git/HEAD", "prototypes/design.npz", "round/1/score"),
        *("enrolments/choir/monday/take-1.wav", "lock", "round.lock", *(f"models/tiny-{i}/{name}" for i in range(6) for name in PAIR)),
    ]
    for path in (store.root / name for name in others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of somebody else")
    for name in ("clips/link.txt", "clips/0123456789abcdef.wav", "models/.link"):
        (store.root / name).symlink_to(outside)
    before = everything_in(tmp_path)
    store.add_event(WAKE)
    for id in ("m-1", "m-2"):
        store.promote(a_model(tmp_path, id), id)
    store.save_enrolment("hey", "ann", takes(3))
    store.save_prototypes("m-1", {"1": Enrolled("hey", "ann", np.ones((1, 4), np.float32), 0.7)})
    store.remove_enrolment("hey")
    with store.round_folder() as folder:
        assert not [*folder.iterdir()]

    assert before.items() <= everything_in(tmp_path).items()
    assert [path.name for path in store.root.glob("prototypes/*")] == ["design.npz"]


def test_what_edgekws_left_itself_is_in_nobody_s_way(store, tmp_path):
    """A copy that followed the links and was cut short, a round of an earlier edgekws that was killed, a mending that was."""
    first = store.promote(a_model(tmp_path, "m-0"), "m-0")
    for link in ("current", "previous"):
        (store.root / "models" / link).unlink(missing_ok=True)
        (store.root / "models" / link).mkdir()
    (store.root / "round" / "onda1").mkdir(parents=True)
    (first / ".model.onnx-17").touch()
    for i in range(1, 9):
        store.promote(a_model(tmp_path, f"m-{i}"), f"m-{i}")
    with store.round_folder():
        pass

    assert sorted(store.models()) == [f"m-{i}" for i in range(4, 9)] and store.current_model().name == "m-8"
    assert not (store.root / "round").exists()


@pytest.mark.parametrize("junk", [b"\xff\xfe", "²".encode(), b"9" * 5000, b""])
def test_junk_in_the_small_files_counts_as_nothing(store, junk):
    store.save_engine("tensorrt")
    for name in ("starts", "engine", "loading-tensorrt"):
        (store.root / name).write_bytes(junk)
    with store.loading("tensorrt") as may:
        assert may

    assert [store.count_start(), store.count_start()] == [0, 1] and store.engine() != "tensorrt"
