import argparse
import contextlib
import functools
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import wave
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

import edgekws
from edgekws.audio import Source, read_recording
from edgekws.errors import EnrolmentError
from edgekws.model import find_model
from edgekws.store import Store, load_enrolled, save_enrolled
from edgekws.values import AudioChunk, Clip, Enrolled, Event

DEMO = Path(edgekws.__file__).parent / "demo"
TRUTH = json.loads((DEMO / "truth.json").read_text())
TAKES = sorted(map(str, DEMO.glob("enrol-*.flac")))
STREAM = str(DEMO / "stream.flac")
COMMAND = [sys.executable, "-m", "edgekws.cli"]


class Edgekws:
    """The command with a state directory of its own."""

    def __init__(self, root):
        self.root = root
        self.env = {**os.environ, "STATE_DIRECTORY": str(root), "OMP_NUM_THREADS": "1"}

    def __call__(self, *arguments, code=0, **options):
        done = subprocess.run([*COMMAND, *map(str, arguments)], env=self.env, capture_output=True, text=True, timeout=120, **options)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def wakes(self, *arguments, **options):
        lines = self("run", "--json", *arguments, **options).stdout.splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in ("time", "time_s", "latency_ms")} for line in lines]


@pytest.fixture
def cli(tmp_path):
    return Edgekws(tmp_path / "state")


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory):
    cli = Edgekws(tmp_path_factory.mktemp("enrolled") / "state")
    cli("enroll", TRUTH["keyword"], "--speaker", "ann", *TAKES)
    return cli


def test_running_out_of_memory_is_one_line(monkeypatch, capsys):
    from edgekws import cli

    monkeypatch.setattr(cli, "_devices", lambda options: np.zeros(1 << 55))

    assert cli.main(["devices"]) == 1
    assert re.fullmatch("edgekws: there is not enough memory .*\n", capsys.readouterr().err)


def test_the_command_verifies_models_without_openssl_in_its_memory():
    code = "import sys; sys.argv[1:] = ['models', 'list']; from edgekws.__main__ import main; main(); print(open('/proc/self/maps').read())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert "edge-tiny" in said and "libc.so" in said
    assert "libcrypto" not in said


@pytest.fixture(scope="module")
def wakes(enrolled):
    """What the demo stream is heard as."""
    return enrolled.wakes("--source", f"file:{STREAM}")


def test_every_keyword_of_the_demo_stream_is_printed_once(wakes):
    assert len(wakes) == len(TRUTH["spoken"])
    for wake, spoken in zip(wakes, TRUTH["spoken"], strict=True):
        assert spoken["start_s"] < wake["stream_s"] <= spoken["end_s"] + 0.5
        assert (wake["keyword"], wake["speaker"]) == (TRUTH["keyword"], "ann")
        assert wake["score"] >= wake["threshold"]


@pytest.mark.parametrize("chunk", [1, 160, 16000])
def test_any_chunking_gives_the_same_events(enrolled, wakes, chunk):
    assert enrolled.wakes("--source", f"file:{STREAM}?chunk={chunk}") == wakes


def test_a_pipe_gives_the_same_events_as_a_file(enrolled, wakes):
    process = subprocess.Popen(
        [*COMMAND, "run", "--json", "--source", "stdin:"], env=enrolled.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    out, _ = process.communicate(read_recording(Path(STREAM)).tobytes(), timeout=120)

    assert [json.loads(line)["stream_s"] for line in out.splitlines()] == [wake["stream_s"] for wake in wakes]


def test_the_log_reads_back_what_was_printed(enrolled, tmp_path):
    cli = Edgekws(shutil.copytree(enrolled.root, tmp_path / "state"))
    (cli.root / "edgekws.db").unlink(missing_ok=True)
    printed = cli("run", "--json", "--source", STREAM).stdout.splitlines()
    logged = [json.loads(line) for line in cli("log", "--json", "--since", "1h").stdout.splitlines()]

    assert [{k: v for k, v in event.items() if k != "id"} for event in logged] == [json.loads(line) for line in printed]
    assert len(cli("log").stdout.splitlines()) == len(printed)
    assert [json.loads(line)["kind"] for line in cli("log", "--json", "--all").stdout.splitlines()][:: len(printed) + 1] == [
        "start",
        "stop",
    ]
    assert cli("log", "--since", "2999-01-01").stdout == ""


def test_the_log_shows_what_is_asked_for_in_words(cli):
    start = Event("", "", 0.0, 0.0, 1e9, 0.0, 0.0, "edge-3", "start", extra={"source": "mic:x"})
    wake = Event("hey", "ann", 1.5, 0.7, 1e9 + 9, 9.0, 0.3, "edge-3")
    store = Store(cli.root)
    for event in (
        start,
        wake,
        replace(wake, keyword="ho"),
        replace(start, kind="gap", extra={"lost_ms": 240}),
        replace(start, kind="deaf", extra={"reason": "no samples for 5 s"}),
        replace(start, kind="stop", extra={"audio_s": 60.0, "wakes": 2, "clips": {"cut": 9, "lost": 6}}),
        replace(wake, kind="reject", extra={"wake": 2}),
        replace(start, kind="bench", extra={"backend": "onnxruntime", "cpu_s_per_audio_hour": 3.2, "energy_mj_per_hop": None}),
    ):
        store.add_event(event)

    def told(*arguments):
        return [line[21:] for line in cli("log", *arguments).stdout.splitlines()]

    woke = ["hey (ann)  score 1.50 / 0.70  latency 0.30 ms", "ho (ann)  score 1.50 / 0.70  latency 0.30 ms"]
    assert told() == [*woke, "deaf: no samples for 5 s", "reject: hey (ann) was no wake, the user says (event 2)"]
    assert told("--kind", "gap", "stop", "start", "bench") == [
        "start: listening to mic:x with edge-3",
        "gap: 240 ms of audio were lost",
        "stop: after 60.0 s of audio, 2 wakes, 3 clips kept to learn from, 6 lost",
        "bench: edge-3 on onnxruntime takes 3.2 s of CPU time for an hour, energy not measured",
    ]
    assert told("--keyword", "ho") == woke[1:]
    assert len(told("--all")) == 8
    assert "invalid choice: 'sneeze'" in cli("log", "--kind", "sneeze", code=2).stderr


def test_the_name_of_a_file_gives_a_terminal_no_orders(enrolled, tmp_path):
    cli = Edgekws(shutil.copytree(enrolled.root, tmp_path / "state"))
    name = "küche\x1b]0;title\x07"
    path = Path(shutil.copy(STREAM, tmp_path / f"{name}.flac"))
    damaged = cli.root / "enrolments" / name / "ann" / "enrolment.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    listing = cli("enroll", "--list").stderr
    shutil.rmtree(damaged.parent.parent)
    ran = cli("run", "--source", f"file:{path}").stderr
    refused = cli("enroll", "hey", str(path), str(tmp_path / f"{name}.wav"), code=1).stderr
    logged = cli("log", "--kind", "start").stdout

    for text in (listing, ran, refused, logged):
        assert "küche\\x1b]0;title\\x07" in text and "\x1b" not in text


def test_a_log_without_such_an_event_advises_what_shows_more(cli):
    assert "--all shows gaps, starts and stops too" in cli("log").stderr
    assert "--all" not in cli("log", "--kind", "gap").stderr + cli("log", "--all").stderr


def test_a_keyword_s_events_are_found_in_any_spelling(enrolled, tmp_path):
    cli = Edgekws(shutil.copytree(enrolled.root, tmp_path / "state"))
    Store(cli.root).add_event(Event("open sesame", "ann", 1.5, 0.7, 1e9, 9.0, 0.3, "edge-3"))

    told = cli("log", "--keyword", "Open Sesame").stdout
    assert "score 1.50 / 0.70" in told and told == cli("log", "--keyword", "open sesame").stdout


def test_settings_are_a_keyword_s_in_any_spelling(enrolled, tmp_path):
    (tmp_path / "off.toml").write_text('[keyword."Open Sesame"]\nenabled = false\n')
    said = enrolled("run", "--source", STREAM, "--config", tmp_path / "off.toml", code=1).stderr

    assert "every keyword is left out or disabled" in said and "configured but not enrolled" not in said


def test_a_state_directory_that_may_not_be_written_is_read_all_the_same(cli):
    store = Store(cli.root)
    store.add_event(Event("hey", "ann", 1.5, 0.7, 1e9, 9.0, 0.3, "edge-3"))
    store.add_clip(Clip("positive", "hey", "ann", 1.5, 0, 0.0, "woke", time_s=1e9), np.ones(16000, np.int16))
    store.close()
    with mounted_read_only(cli.root):
        logged, listed = (cli(*arguments).stdout for arguments in (["log"], ["clips"]))
    assert "hey (ann)  score 1.50" in logged and "woke" in listed


@contextlib.contextmanager
def mounted_read_only(folder):
    for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_relative_state_directory_is_refused_as_a_relative_root_is(cli):
    cli.env["STATE_DIRECTORY"] = here = os.path.relpath(cli.root)

    for command in ("log", "doctor", "run"):
        assert (
            cli(command, code=2).stderr
            == f'edgekws: the state directory "{here}", by $STATE_DIRECTORY or $HOME. Accepted: an absolute path\n'
        )
    assert not cli.root.exists()


def test_a_corpus_without_keywords_is_told_which_kinds_and_splits_are_accepted(cli, tmp_path):
    samples = np.random.default_rng(0).normal(0, 300, 16000)
    lines = ["path,kind,label,speaker,take,split"]
    for name, kind in (("a", "keywords"), ("b", "negative"), ("c", "noise")):
        lines.append(f"{recording(tmp_path / f'{name}.wav', samples).name},{kind},{name},ann,0,enrol")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")

    said = cli("eval", "--corpus", tmp_path, code=1).stderr
    assert "Accepted kinds are keyword, negative and noise; splits of a keyword enrol and test. The splits of its keywords: none" in said


def test_the_log_follows_a_listener(enrolled, tmp_path):
    cli = Edgekws(shutil.copytree(enrolled.root, tmp_path / "state"))
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background is started with SIGINT ignored
    follower = subprocess.Popen([*COMMAND, "log", "--follow", "--json"], env=cli.env, stdout=subprocess.PIPE, text=True, preexec_fn=heeding)
    cli("run", "--source", STREAM)
    lines = [json.loads(follower.stdout.readline()) for _ in TRUTH["spoken"]]
    follower.send_signal(signal.SIGINT)

    assert {line["keyword"] for line in lines} == {TRUTH["keyword"]}
    assert follower.wait(30) == 130


def test_prototypes_are_made_at_enrolment_and_again_where_they_are_missing(enrolled, tmp_path):
    cli = Edgekws(shutil.copytree(enrolled.root, tmp_path / "state"))
    (kept,) = (cli.root / "prototypes").glob("*.npz")
    written = kept.stat().st_ino
    first = cli.wakes("--source", STREAM)
    assert kept.stat().st_ino == written

    kept.unlink()
    assert cli.wakes("--source", STREAM) == first
    assert kept.exists()


def test_where_several_enrolled_a_keyword_the_voice_names_the_speaker_also_by_prototypes_from_before_voices(cli, tmp_path):
    """Bob recorded the demo's voice a quarter slower; the stream is played as slow."""

    def slower(path):
        soundfile.write(tmp_path / "slower.wav", scipy.signal.resample_poly(read_recording(Path(path)) / 32768, 5, 4), 16_000)
        return shutil.copy(tmp_path / "slower.wav", tmp_path / f"{Path(path).stem}.wav")

    cli("enroll", TRUTH["keyword"], "--speaker", "ann", *TAKES)
    cli("enroll", TRUTH["keyword"], "--speaker", "bob", *map(slower, TAKES))
    (kept,) = (cli.root / "prototypes").glob("*.npz")
    save_enrolled(kept, {key: replace(one, voice=one.voice[:0], word_samples=0) for key, one in load_enrolled(kept).items()})

    for stream, name in ((STREAM, "ann"), (slower(STREAM), "bob")):
        assert [one["speaker"] for one in cli.wakes("--source", stream)] == [name] * len(TRUTH["spoken"])


def test_settings_move_disable_and_tell(enrolled, tmp_path):
    settings = tmp_path / "edgekws.toml"
    wakes = enrolled.wakes("--source", STREAM)
    settings.write_text(f'[detector]\nthreshold_offset = 0.5\n[keyword."{TRUTH["keyword"]}"]\nthreshold_offset = 0.25\n')
    (moved,) = {wake["threshold"] for wake in enrolled.wakes("--source", STREAM, "--config", settings)}
    assert moved == pytest.approx(wakes[0]["threshold"] + 0.75, abs=1e-3)

    settings.write_text(f'[keyword."{TRUTH["keyword"]}"]\nenabled = false\n')
    assert "nothing to listen for" in enrolled("run", "--source", STREAM, "--config", settings, code=1).stderr

    told = tmp_path / "told"
    settings.write_text(f'[store]\nroot = "{enrolled.root}"\n[sinks]\ncommand = ["sh", "-c", "cat >> {told}"]\n')
    enrolled("run", "--source", STREAM, "--config", settings)
    assert {json.loads(line)["keyword"] for line in told.read_text().splitlines()} == {TRUTH["keyword"]}


def test_sigterm_ends_the_listener_cleanly_and_what_it_heard_is_kept(enrolled, tmp_path):
    cli = Edgekws(shutil.copytree(enrolled.root, tmp_path / "state"))
    (cli.root / "edgekws.db").unlink(missing_ok=True)
    process = subprocess.Popen(
        [*COMMAND, "run", "--json", "--source", f"file:{STREAM}?paced=1"], env=cli.env, stdout=subprocess.PIPE, text=True
    )
    wake = json.loads(process.stdout.readline())
    process.terminate()

    assert process.wait(30) == 0
    (kept,) = [json.loads(line) for line in cli("log", "--json").stdout.splitlines()]
    assert kept["stream_s"] == wake["stream_s"]


def test_what_a_listener_printed_before_it_was_killed_is_in_the_log_and_the_next_start_says_so(enrolled, tmp_path):
    """`benchmarks/kill_listener.py` kills 500."""
    cli = Edgekws(shutil.copytree(enrolled.root, tmp_path / "state"))
    before = len(cli("log", "--json").stdout.splitlines())
    process = subprocess.Popen([*COMMAND, "run", "--json", "--source", STREAM], env=cli.env, stdout=subprocess.PIPE, text=True)
    lines = process.stdout.readline()
    process.kill()
    lines += process.communicate()[0]
    cli("run", "--source", STREAM)
    said = [json.loads(line) for line in cli("log", "--json", "--all").stdout.splitlines()]

    stored = [event["time_s"] for event in said if event["kind"] == "wake"][before:]
    assert stored[: lines.count("\n")] == [json.loads(line)["time_s"] for line in lines.splitlines() if line.endswith("}")]
    assert "killed" in [event for event in said if event["kind"] == "start"][-1]["extra"]["before"]


def test_a_reader_that_has_enough_is_no_trouble(enrolled):
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} run --json --source 'file:{STREAM}?paced=1' | head -n 1"],
        env=enrolled.env,
        capture_output=True,
        text=True,
    )

    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr and "rror" not in done.stderr


def test_a_full_disk_behind_stdout_is_one_line(enrolled):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "run", "--source", STREAM], env=enrolled.env, stdout=full, stderr=subprocess.PIPE, text=True)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "edgekws: output: No space left on device"


def test_a_state_directory_that_cannot_be_written_is_said_once_and_the_listener_goes_on(cli, tmp_path):
    cli.root.write_text("a file")
    done = cli("run", "--source", STREAM, code=1)
    assert "Not a directory" in done.stderr

    cli.root.unlink()
    cli.root.mkdir()
    (cli.root / "edgekws.db").mkdir()
    done = cli("run", "--source", STREAM)
    assert len([line for line in done.stderr.splitlines() if line.startswith("edgekws:")]) == 1


def test_a_port_that_another_program_took_is_said_and_the_listener_goes_on(enrolled, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "edgekws.toml").write_text(f"[metrics]\nport = {port}\n[web]\nport = {port}\n")
        done = enrolled("run", "--config", tmp_path / "edgekws.toml", "--source", STREAM)

    assert len(done.stdout.splitlines()) == len(TRUTH["spoken"])
    assert len(re.findall(rf"cannot listen on 127.0.0.1 port {port} .*\. Listening goes on without it", done.stderr)) == 2


def test_what_is_not_there_yet_at_the_start_is_said_and_the_listener_goes_on(enrolled, tmp_path, monkeypatch):
    """A command on a stick, a directory that takes no socket: the unit would stay down for good."""
    monkeypatch.setitem(enrolled.env, "RUNTIME_DIRECTORY", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    (tmp_path / "edgekws.toml").write_text('[sinks]\ncommand = ["/no/such/lamp.sh"]\nsocket = true\n')
    done = enrolled("run", "--config", tmp_path / "edgekws.toml", "--source", STREAM)

    assert len(done.stdout.splitlines()) == len(TRUTH["spoken"])
    assert '"/no/such/lamp.sh" is no program here' in done.stderr
    assert re.search(r"control\.sock cannot be made \(.*\)\. .* Listening goes on without it", done.stderr)


def test_a_second_listener_does_not_share_the_first_one_s_socket(enrolled, tmp_path):
    """Both would keep every clip, and run every command."""
    (tmp_path / "edgekws.toml").write_text("[sinks]\nsocket = true\n")
    command = ["run", "--config", tmp_path / "edgekws.toml", "--source", "stdin:"]
    first = subprocess.Popen(
        [sys.executable, "-m", "edgekws", *command], env=enrolled.env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while "listening to" not in first.stderr.readline():
            assert first.poll() is None
        assert "another edgekws has" in enrolled(*command, code=2).stderr
    finally:
        first.communicate(timeout=30)


def test_small_files_that_hold_junk_keep_nobody_from_listening(enrolled, tmp_path):
    """As file systems of cards leave them when the power goes."""
    cli = Edgekws(shutil.copytree(enrolled.root, tmp_path / "state"))
    cli("models", "promote", find_model("edge-small"))
    (tmp_path / "edgekws.toml").write_text('[model]\nengine = "onnxruntime-cuda"\n')
    for name in ("starts", "engine", "loading-onnxruntime-cuda", "listening"):
        (cli.root / name).write_bytes(b"\xff\xfe")

    assert len(cli.wakes("--source", STREAM)) == len(TRUTH["spoken"])
    assert len(cli.wakes("--config", tmp_path / "edgekws.toml", "--source", STREAM)) == len(TRUTH["spoken"])


@pytest.fixture
def disk(enrolled, tmp_path):
    """The command with its state on a disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield Edgekws(shutil.copytree(enrolled.root, folder / "state"))
    subprocess.run(["umount", folder], check=True)


def full(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 1024)


def read_only(folder):
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


@pytest.mark.parametrize(("spoil", "said"), [(full, "full|No space left"), (read_only, "(?i)read-?only")])
def test_on_a_disk_that_takes_nothing_it_listens_on_says_so_and_loses_nothing_that_was_there(disk, spoil, said):
    before = disk("log", "--all", "--json").stdout
    spoil(disk.root.parent)
    done = disk("run", "--source", STREAM)

    assert len(done.stdout.splitlines()) == len(TRUTH["spoken"])
    complaints = [line for line in done.stderr.splitlines() if line.startswith("edgekws: ")]
    assert 1 <= len(complaints) <= 3 and all(re.search(said, line) for line in complaints), done.stderr
    subprocess.run(["mount", "-o", "remount,rw", disk.root.parent], check=True)
    (disk.root.parent / "filler").unlink(missing_ok=True)
    assert disk("log", "--all", "--json").stdout.startswith(before)
    assert len(disk.wakes("--source", STREAM)) == len(TRUTH["spoken"])
    assert disk("log", "--json").stdout.count('"wake"') >= before.count('"wake"') + len(TRUTH["spoken"])


def test_enrolments_are_listed_and_removed(enrolled, tmp_path):
    cli = Edgekws(tmp_path / "state")
    for speaker in ("ann", "bob"):
        cli("enroll", "open  sesame", "--speaker", speaker, *TAKES)
    listed = json.loads(cli("enroll", "--list", "--json").stdout)
    assert [(one["keyword"], one["speaker"], len(one["takes"])) for one in listed] == [("open sesame", who, 3) for who in ("ann", "bob")]

    assert "recordings" in cli("enroll", "--remove", "open sesame", "--speaker", "ann").stdout
    assert cli("enroll", "--list").stdout.split()[:3] == ["open", "sesame", "bob"]
    assert 'Enrolled: "open sesame" (bob)' in cli("enroll", "--remove", "shut sesame", code=2).stderr


def test_a_failed_enrolment_keeps_the_old_one(enrolled, tmp_path):
    cli = Edgekws(shutil.copytree(enrolled.root, tmp_path / "state"))
    before = cli("enroll", "--list", "--json").stdout
    silent = recording(tmp_path / "silent.wav", np.zeros(32000))
    cli("enroll", TRUTH["keyword"], "--speaker", "ann", TAKES[0], TAKES[1], silent, code=1)

    assert cli("enroll", "--list", "--json").stdout == before


def test_what_was_enrolled_once_no_later_model_refuses(tmp_path, caplog):
    """Another network may find a take unlike the others: left out, the keyword would be deaf from the exchange on."""
    from edgekws import cli, enrolment
    from edgekws.config import Settings, StoreSettings
    from edgekws.engines import load_engine
    from edgekws.model import load_model

    other = read_recording(Path(STREAM))[7 * 16_000 : round(8.2 * 16_000)]
    takes = [read_recording(Path(TAKES[0])), other, read_recording(Path(TAKES[2]))]
    model, store = load_model(find_model()), Store(tmp_path)
    engine = load_engine(model)
    with pytest.raises(EnrolmentError, match="unlike the others"):
        enrolment.enrol("open sesame", "ann", takes, engine, model)
    store.save_enrolment("open sesame", "ann", takes)
    made = cli._prototypes(Settings(store=StoreSettings(root=tmp_path)), store, store.enrolments(), model, engine)

    assert ([one.speaker for one in made], caplog.messages) == (["ann"], [])


def test_what_an_earlier_edgekws_kept_without_a_later_field_is_made_anew(tmp_path, monkeypatch):
    """As rivals came to be one: what was kept had none, and the thresholds of before."""
    from edgekws import cli, values
    from edgekws.config import Settings, StoreSettings
    from edgekws.engines import load_engine
    from edgekws.model import load_model

    @dataclass(frozen=True)
    class Later(values.Enrolled):
        louder: float = 0.0

    model, store = load_model(find_model()), Store(tmp_path)
    store.save_enrolment("open sesame", "ann", [read_recording(Path(take)) for take in TAKES])
    settings, engine = Settings(store=StoreSettings(root=tmp_path)), load_engine(model)
    (made,) = cli._prototypes(settings, store, store.enrolments(), model, engine)
    assert store.prototypes(cli._cached_for(model)) and len(made.rivals) > 0

    monkeypatch.setattr(values, "Enrolled", Later)
    assert not store.prototypes(cli._cached_for(model))


def test_a_start_that_is_cut_off_while_prototypes_are_made_anew_goes_on_where_it_was(tmp_path, monkeypatch):
    """After an upgrade, with many enrolled on a slow board, the start would take longer than it may, again and again."""
    from edgekws import cli, enrolment
    from edgekws.config import Settings, StoreSettings
    from edgekws.model import load_model

    model, store = load_model(find_model()), Store(tmp_path)
    for i in range(cli.SAVED_EVERY + 3):
        store.save_enrolment("hey", f"s{i:02}", [np.full(16_000, i, np.int16)])
    asked = []

    def enrol(keyword, speaker, *_, **__):
        asked.append(speaker)
        if len(asked) == cli.SAVED_EVERY + 2:
            raise KeyboardInterrupt
        return Enrolled(keyword, speaker, np.ones((1, 4), np.float32), 0.5, voice=np.ones(50, np.float32))

    monkeypatch.setattr(enrolment, "enrol", enrol)
    prototypes = functools.partial(cli._prototypes, Settings(store=StoreSettings(root=tmp_path)), store, store.enrolments(), model, None)
    with pytest.raises(KeyboardInterrupt):
        prototypes()

    assert len(prototypes()) == cli.SAVED_EVERY + 3
    assert asked[cli.SAVED_EVERY + 2 :] == [f"s{cli.SAVED_EVERY + i:02}" for i in range(3)]

    for i in range(cli.SAVED_EVERY + 2):  # before the others in order: what was made stays made
        store.save_enrolment("a word", f"a{i:02}", [np.full(16_000, 1000 + i, np.int16)])
    more = functools.partial(cli._prototypes, prototypes.args[0], store, store.enrolments(), model, None)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        more()
    more()
    assert asked == [f"a{i:02}" for i in [*range(cli.SAVED_EVERY + 2), cli.SAVED_EVERY, cli.SAVED_EVERY + 1]]


def test_who_is_removed_while_prototypes_are_made_is_not_kept_again(tmp_path, monkeypatch):
    from edgekws import cli, enrolment
    from edgekws.config import Settings, StoreSettings
    from edgekws.model import load_model

    store = Store(tmp_path)
    for speaker in ("ann", "bob"):
        store.save_enrolment("hey", speaker, [np.ones(16_000, np.int16)])

    def enrol(keyword, speaker, *_, **__):
        if speaker == "bob":
            Store(tmp_path).remove_enrolment(keyword, "ann")
        return Enrolled(keyword, speaker, np.ones((1, 4), np.float32), 0.5, voice=np.ones(50, np.float32))

    monkeypatch.setattr(enrolment, "enrol", enrol)
    made = cli._prototypes(Settings(store=StoreSettings(root=tmp_path)), store, store.enrolments(), load_model(find_model()), None)

    assert [one.speaker for one in made] == ["bob"]
    (kept,) = tmp_path.glob("prototypes/*.npz")
    assert [one.speaker for one in load_enrolled(kept).values()] == ["bob"]


def test_who_another_process_does_not_know_yet_stays_among_the_prototypes_of_this_one(tmp_path, monkeypatch):
    from edgekws import cli, enrolment
    from edgekws.config import Settings, StoreSettings
    from edgekws.model import load_model

    store, save = Store(tmp_path), Store.save_prototypes
    for speaker in ("ann", "bob"):
        store.save_enrolment("hey", speaker, [np.ones(16_000, np.int16)])
    made = Enrolled("hey", "", np.ones((1, 4), np.float32), 0.5, voice=np.ones(50, np.float32))
    monkeypatch.setattr(enrolment, "enrol", lambda keyword, speaker, *_, **__: replace(made, speaker=speaker))
    monkeypatch.setattr(Store, "save_prototypes", lambda self, model, found: save(self, model, dict([*found.items()][:1])))
    heard = cli._prototypes(Settings(store=StoreSettings(root=tmp_path)), store, store.enrolments(), load_model(find_model()), None)

    assert [one.speaker for one in heard] == ["ann", "bob"]


def test_who_is_enrolled_while_a_listener_starts_is_listened_for(tmp_path, monkeypatch):
    from edgekws import cli, promotion
    from edgekws.config import Settings, StoreSettings

    boot = promotion.boot

    def slowly(store, load, **counted):
        version = boot(store, load, **counted)
        Store(tmp_path).save_enrolment("open sesame", "", [read_recording(Path(take)) for take in TAKES])
        return version

    monkeypatch.setattr(promotion, "boot", slowly)
    settings = Settings(store=StoreSettings(root=tmp_path))
    pipeline, updates = cli._updates(settings, argparse.Namespace(model=None, source="stdin:", config=None), Store(tmp_path))
    at, end_s = 0, time.monotonic() + 60
    while pipeline.detector.enrolled[0].keyword != "open sesame" and time.monotonic() < end_s:
        pipeline.feed(AudioChunk(np.zeros(1280, np.int16), at * 1280))
        at += 1
        updates.step(pipeline, at * 0.08)
        time.sleep(0.01)
    updates.close()

    assert [one.keyword for one in pipeline.detector.enrolled] == ["open sesame"]


def test_a_keyword_in_another_spelling_is_the_one_that_is_enrolled(cli):
    cli("enroll", "open sesame", "--speaker", "ann", *TAKES)
    said = cli("enroll", "Open Sesame", "--speaker", "bob", *TAKES)

    assert said.stderr.splitlines()[0] == '"Open Sesame" is enrolled as "open sesame", and taken for it'
    listed = json.loads(cli("enroll", "--list", "--json").stdout)
    assert [(one["keyword"], one["speaker"]) for one in listed] == [("open sesame", "ann"), ("open sesame", "bob")]
    assert len(cli.wakes("--source", STREAM)) == len(TRUTH["spoken"])
    assert cli("enroll", "--remove", "OPEN SESAME", "--speaker", "ann").stdout == 'removed "open sesame" (ann), 3 recordings\n'


def test_a_keyword_that_was_enrolled_in_two_spellings_is_removed_in_the_one_that_is_named(cli):
    store = Store(cli.root)
    for keyword in ("open sesame", "Open Sesame"):
        store.save_enrolment(keyword, "", [read_recording(Path(take)) for take in TAKES])

    assert cli("enroll", "--remove", "open sesame").stdout == 'removed "open sesame", 3 recordings\n'


class Lossy(Source):
    """A microphone that loses a sample in the first take, and has the demo's takes to give."""

    live = True

    def __init__(self, uri, rest):
        self.uri, self.number = uri, len(Lossy.opened)  # the first one is opened to see whether there is one
        Lossy.opened.append(uri)

    def chunks(self):
        samples = read_recording(Path(TAKES[max(0, self.number - 2)]))
        yield AudioChunk(samples[:8000], 0)
        lost = int(self.number == 1)
        yield AudioChunk(samples[8000:], 8000 + lost, lost)

    def close(self):
        pass


def test_a_take_in_which_sound_was_lost_is_asked_for_again_and_the_others_are_kept(monkeypatch, capsys):
    from edgekws import cli
    from edgekws.audio import opening

    monkeypatch.setattr(Lossy, "opened", [], raising=False)
    monkeypatch.setitem(opening.SCHEMES, "mic", Lossy)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    recordings = cli._record("hey", "mic:x")

    assert [one.tobytes() for one in recordings] == [read_recording(Path(take))[:40_000].tobytes() for take in TAKES]  # 2.5 s
    assert "mic:x lost 1 ms of sound while recording; record again" in capsys.readouterr().err


def test_takes_are_not_asked_for_on_standard_input(cli, tmp_path):
    """What comes there was said before the prompt, and only the first take has arecord's header."""
    (tmp_path / "edgekws.toml").write_text('[audio]\nsource = "stdin:"\n')
    for where in (("--source", "stdin:"), ("--config", tmp_path / "edgekws.toml")):
        (line,) = cli("enroll", "x", *where, code=2, input="").stderr.splitlines()
        assert line.startswith("edgekws: enroll cannot ask for takes on stdin:") and 'edgekws enroll "x" a.wav b.wav c.wav' in line
    assert not cli.root.exists()


def test_only_enrolled_takes_two_recordings_and_promises_no_more_than_a_higher_threshold(cli):
    assert "--only-enrolled" in cli("enroll", "open sesame", "--only-enrolled", TAKES[0], code=2).stderr
    assert not cli.root.exists()

    said = cli("enroll", "open sesame", "--only-enrolled", *TAKES).stdout
    assert re.fullmatch(r'enrolled "open sesame" from 3 recordings, threshold \d\.\d\d; others wake it less, not never\n', said)

    (cli.root.parent / "edgekws.toml").write_text('[keyword."open sesame"]\nonly_enrolled = false\n')
    done = cli("enroll", "open sesame", "--only-enrolled", *TAKES, "--config", cli.root.parent / "edgekws.toml")
    assert "not never" not in done.stdout and "only_enrolled = false in the configuration holds" in done.stderr


def test_only_enrolled_of_one_recording_is_said_to_change_nothing(cli, tmp_path):
    cli("enroll", "open sesame", TAKES[0])
    cli("enroll", "open sesame", "--speaker", "bob", *TAKES)
    (tmp_path / "edgekws.toml").write_text('[keyword."open sesame"]\nonly_enrolled = true\n')
    said = cli("run", "--config", tmp_path / "edgekws.toml", "--source", STREAM).stderr

    assert said.count("only_enrolled changes nothing") == 1
    assert 'edgekws: "open sesame": only_enrolled changes nothing with one recording, it needs two or more. Enrol it again' in said


def test_a_recording_whose_name_is_no_utf_8_is_enrolled_from_and_listened_to(cli, tmp_path):
    names = []
    for i, source in enumerate((*TAKES, STREAM)):
        names.append(os.fsdecode(str(tmp_path).encode() + b"/t\xe4st%d.flac" % i))
        shutil.copy(source, names[-1])
    cli("enroll", TRUTH["keyword"], *names[:3])

    assert len(cli.wakes("--source", f"file:{names[3]}")) == len(TRUTH["spoken"])
    assert "t\\udce4st3.flac" in cli("log", "--all").stdout
    os.unlink(names[3])
    assert "no such file" in cli("run", "--source", f"file:{names[3]}", code=1).stderr


def recording(path, samples, rate_hz=16000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate_hz, 0, "NONE", ""))
        file.writeframes(np.clip(samples, -32768, 32767).astype("<i2").tobytes())
    return path


def test_recordings_that_make_no_keyword_are_refused_by_name(enrolled, tmp_path):
    loud = np.sign(np.sin(np.arange(32000) / 9)) * 32767
    bad = {"silent": np.zeros(32000), "clipped": loud, "short": np.ones(400) * 3000}
    for name, samples in bad.items():
        done = enrolled("enroll", "hey", TAKES[0], TAKES[1], recording(tmp_path / f"{name}.wav", samples), code=1)
        (line,) = done.stderr.splitlines()
        assert line.startswith("edgekws: ") and f"{name}.wav" in line
    assert "hey" not in enrolled("enroll", "--list").stdout.split()


def test_a_stereo_recording_at_another_rate_is_taken(enrolled, tmp_path):
    takes = []
    for i, take in enumerate(TAKES):
        mono = read_recording(Path(take))
        takes.append(
            recording(
                tmp_path / f"{i}.wav", np.repeat(np.interp(np.arange(0, len(mono), 16 / 44.1), np.arange(len(mono)), mono), 2), 44100, 2
            )
        )
    cli = Edgekws(tmp_path / "state")
    cli("enroll", TRUTH["keyword"], *takes)

    assert len(cli.wakes("--source", STREAM)) == len(TRUTH["spoken"])


WRONG = [
    ((), 2, "COMMAND"),
    (("sing",), 2, "invalid choice"),
    (("enroll",), 2, "KEYWORD"),
    (("enroll", "a\x07b"), 2, "printable name"),
    (("enroll", "x" * 101), 2, "1 to 100 characters"),
    (("enroll", "hey", "/no/such.wav"), 1, "no such file"),
    (("enroll", "hey", __file__), 1, "not audio"),
    (("enroll", *TAKES), 2, 'enrol-1.flac" is a recording: the KEYWORD goes before it'),
    (("enroll", "b.WAV", "c.wav"), 2, 'Try: edgekws enroll "hey kitchen" b.WAV c.wav'),
    (("enroll", "hey", TAKES[0], TAKES[1], TAKES[0]), 1, "enrol-1.flac: this is recording 1 again"),
    (("log", "--since", "yesterday"), 2, "accepted is"),
    (("models", "rollback", "edge"), 2, "models rollback takes no model, it goes to the version before. Try: edgekws models promote edge"),
    (("models", "list", "edge"), 2, "models list takes no model, it lists all. Try: edgekws models show edge"),
    (("log", "--config", "/no/such.toml"), 2, "no such file"),
    (("run", "--source", "file:/no/such.wav"), 1, "no such file"),
    (("run", "--source", f"file:{__file__}"), 1, "not audio"),
    (("run", "--source", "tape:1"), 2, "Accepted"),
    (("run", "--source", "http://x/y"), 2, "unknown kind of source"),
    (("run", "--source", "mic:default?ratee=48000"), 2, 'unknown option "ratee"'),
    (("run", "--source", ""), 2, "no source of audio was named"),
    (("watch", "--source", ""), 2, "no source of audio was named"),
    (("enroll", "hey", "--source", ""), 2, "no source of audio was named"),
    (("run", "--model", "huge", "--source", STREAM), 2, 'no model "huge"'),
    (("watch", "--model", "huge", "--source", STREAM), 2, 'no model "huge"'),
    (("enroll", "hey", *TAKES, "--model", "huge"), 2, 'no model "huge"'),
    (("eval", "--corpus", "/no/such", "--model", "huge"), 2, 'no model "huge"'),
    (("bench", "--model", "huge"), 2, 'no model "huge"'),
    (("models", "promote"), 2, "needs a model"),
    (("models", "promote", "huge"), 2, 'no model "huge"'),
    (("models", "rollback"), 1, "nothing to go back from"),
    (("eval", "--corpus", "/no/such"), 1, "/no/such"),
    (("eval", "--corpus", "/no/such", "--protocol", "guess"), 2, "protocol"),
    (("bench", "--report", "page.txt"), 2, "--report page.txt: accepted is a name that ends with .md"),
    (("bench", "--backend", "abacus"), 2, "--backend abacus: accepted is auto, onnxruntime"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), WRONG, ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None)
def test_what_is_wrong_is_said_in_a_line_with_its_exit_code(cli, arguments, code, said):
    done = cli(*arguments, code=code)

    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("source", ["mic:no such microphone", "file:/no/such.wav"])
def test_nobody_is_asked_to_speak_into_a_microphone_that_is_not_there(cli, source):
    (line,) = cli("enroll", "hey", "--source", source, code=1).stderr.splitlines()

    assert line.startswith("edgekws: ") and "say" not in line


def test_an_unknown_key_in_the_settings_is_wrong_usage(cli, tmp_path):
    (tmp_path / "edgekws.toml").write_text("[detector]\nrefractory = 1\n")

    assert 'did you mean "refractory_s"?' in cli("run", "--config", tmp_path / "edgekws.toml", code=2).stderr


def test_a_source_that_can_never_be_is_wrong_configuration(cli, tmp_path):
    """With any other exit code the unit would start again and again."""
    (tmp_path / "edgekws.toml").write_text('[audio]\nsource = "micc:x"\n')

    assert 'did you mean "mic:"?' in cli("run", "--config", tmp_path / "edgekws.toml", code=2).stderr


def altered_onnx(path):
    (path / "model.onnx").write_bytes((path / "model.onnx").read_bytes() + b"\0")


def later_manifest(path):
    raw = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**raw, "format": 99}))


MODEL_FAULTS = [(altered_onnx, "altered"), (lambda path: (path / "parity.npz").unlink(), "missing"), (later_manifest, "format 99")]


@pytest.mark.parametrize(("fault", "said"), MODEL_FAULTS, ids=["altered", "missing", "later"])
def test_a_model_that_is_not_whole_is_refused_and_the_one_in_use_stays(cli, tmp_path, fault, said):
    path = shutil.copytree(find_model(), tmp_path / "model")
    fault(path)
    for arguments in (("run", "--model", path, "--source", STREAM), ("models", "promote", path)):
        assert said in cli(*arguments, code=1).stderr.splitlines()[-1]
    listed = json.loads(cli("models", "list", "--json").stdout)

    assert [row["where"] for row in listed if row["current"]] == ["built in"]


def test_a_model_that_the_settings_give_by_its_path_is_listed_as_what_listens(cli, tmp_path):
    path = shutil.copytree(find_model("edge-small"), tmp_path / "mine")
    (tmp_path / "edgekws.toml").write_text(f'[model]\nid = "{path}"\n')
    asked = ("models", "list", "--config", tmp_path / "edgekws.toml")

    (line,) = [line for line in cli(*asked).stdout.splitlines() if line.startswith("*")]
    assert line.split()[:3] == ["*", "mine", "configured"]
    cli("models", "promote", "edge-small", "--config", tmp_path / "edgekws.toml")
    (row,) = [row for row in json.loads(cli(*asked, "--json").stdout) if row["previous"]]
    assert (row["name"], row["path"]) == ("mine", str(path))


def test_a_gate_that_was_passed_has_no_reasons_to_be_shown(cli, tmp_path):
    path = shutil.copytree(find_model("edge-small"), tmp_path / "mine")
    raw = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**raw, "gate": {"promoted": True, "reasons": []}}))

    assert re.search(r"^gate +promoted True$", cli("models", "show", path).stdout, re.MULTILINE)


def test_a_promoted_model_listens_until_it_is_rolled_back(cli):
    model = find_model("edge-small")
    cli("models", "promote", model)
    (row,) = [row for row in json.loads(cli("models", "--json").stdout) if row["current"]]
    assert (row["where"], row["network"]) == ("promoted", "edge-small")
    assert json.loads(cli("models", "show", "--json").stdout)["network"] == "edge-small"

    cli("models", "rollback")
    assert json.loads(cli("models", "show", "--json").stdout)["network"] == "edge"
    assert re.findall(r"model: .*", cli("log").stdout) == [
        "model: edge-small-4 is promoted, before it edge-3",
        "model: edge-small-4 is gone back from: by hand; back to edge-3",
    ]


@pytest.mark.parametrize("fault", [altered_onnx, shutil.rmtree, later_manifest])
def test_going_back_to_a_version_that_is_not_whole_is_refused_and_changes_nothing(cli, fault):
    cli("models", "promote", "edge-small")
    cli("models", "promote", "edge-tiny")
    with contextlib.closing(Store(cli.root)) as store:
        current, previous = store.current_model(), store.previous_model()
        fault(previous)
        done = cli("models", "rollback", code=1)

        assert (store.current_model(), store.previous_model()) == (current, previous)
    assert done.stdout == "" and "gone back" not in cli("log").stdout
    (line,) = done.stderr.splitlines()
    assert str(previous) in line and line.endswith("Nothing was changed. To go to another: edgekws models promote ID")


def test_without_any_enrolment_the_bundled_keyword_is_listened_for(cli):
    assert "hey jetson" in cli("run", "--source", STREAM).stderr


def test_watch_prints_lines_into_a_pipe(enrolled):
    lines = enrolled("watch", "--source", STREAM).stdout.splitlines()

    assert sum("WAKE" in line for line in lines) == len(TRUTH["spoken"])
    assert all(re.match(r" +\d+\.\d\d s +-?\d+ dBFS  open sesame \(ann\) ", line) for line in lines)


def test_watch_moves_on_a_terminal_and_leaves_it_as_it_was(enrolled):
    ear, terminal = pty.openpty()
    process = subprocess.Popen([*COMMAND, "watch", "--source", STREAM], env=enrolled.env, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    deadline_s = time.monotonic() + 60
    while shown.count(b"\x1b[H") < 5 and time.monotonic() < deadline_s:
        if select.select([ear], [], [], 1)[0]:
            shown += os.read(ear, 65536)
    process.send_signal(signal.SIGINT)
    while process.poll() is None or select.select([ear], [], [], 0)[0]:
        try:
            shown += os.read(ear, 65536)
        except OSError:
            break
    os.close(ear)

    assert process.wait(30) == 0
    assert shown.startswith(b"\x1b[?1049h") and b"open sesame (ann)" in shown and b"dBFS" in shown and b"edge-3 on onnxruntime" in shown
    assert b"\x1b[?25h\x1b[?1049l" in shown and b"Traceback" not in shown


@pytest.fixture
def without_torch(cli, tmp_path):
    """A stand-in for an environment without PyTorch, which the tests' own has."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    cli.env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "without"), str(Path(edgekws.__file__).parent.parent)])
    return cli


def test_without_pytorch_what_trains_is_an_error_that_says_so(without_torch):
    told = f"to train needs torch, which is not installed. Try: {sys.executable} -m pip install 'edgekws[train]'"

    assert without_torch("adapt", "--recipe", "onda1", code=1).stderr == f"edgekws: {told}\n"
    assert without_torch("adapt", "--target", "params=0.1", code=1).stderr == f"edgekws: {told}\n"
    wrong = without_torch("adapt", "--recipe", "prototypes", "--criterion", "l1", code=2).stderr
    assert wrong.startswith("edgekws: --criterion goes with a recipe that prunes, and prototypes does not.")


def test_a_learner_that_cannot_be_loaded_is_an_error_at_night_too(without_torch, tmp_path):
    (tmp_path / "without" / "torch.py").write_text("raise ImportError('libcusparseLt.so.0: cannot open shared object file')")

    assert "needs torch, which is installed and cannot be loaded: libcusparseLt" in without_torch("adapt", "--if-needed", code=1).stderr


def test_the_demo_hears_every_keyword_learns_without_pytorch_too_and_leaves_nothing_behind(without_torch):
    cli = without_torch
    done = cli("demo")
    before, after = (re.search(rf"{name} +(\d+) of 12 +0 ", done.stdout) for name in ("before", "after"))

    assert len(re.findall(r"open sesame .* latency", done.stdout)) == len(TRUTH["spoken"])
    assert "5 of 5 spoken keywords heard, 0 false wakes" in done.stderr and "--listen" in done.stderr
    assert "torch is not installed" in done.stderr and "pip install 'edgekws[train]'" in done.stderr
    assert int(after[1]) >= int(before[1]) and done.stdout.count("325,312") == 2
    assert not cli.root.exists()


def test_a_demo_that_is_interrupted_while_it_listens_ends_there_and_tells_no_result(monkeypatch, capsys):
    from edgekws import cli as cli_module

    class Interrupted(Source):
        live = False

        def __init__(self, source):
            self.uri, self.source = source.uri, source

        def chunks(self):
            for i, chunk in enumerate(self.source.chunks()):
                if i == 20:
                    os.kill(os.getpid(), signal.SIGINT)
                yield chunk

        def close(self):
            self.source.close()

    went_on = []
    monkeypatch.setattr("edgekws.audio.open_source", lambda uri, real=edgekws.audio.open_source: Interrupted(real(uri)))
    monkeypatch.setattr(cli_module, "_demo_life", lambda *_: went_on.append(1))

    assert cli_module.main(["demo"]) == 130
    assert not went_on and "spoken keywords heard" not in capsys.readouterr().err


def test_the_demo_lives_in_a_room_and_what_hears_less_goes_not_live(enrolled, tmp_path, capsys, monkeypatch):
    """With two steps of training what is left after pruning hears nothing: the gate must say so. Hardly changed, all weights may pass.

    With four of the minutes of shipped speech: an hour of it is most of a round's time.
    """
    pytest.importorskip("torch")
    from edgekws import cli
    from edgekws.config import Settings, StoreSettings
    from edgekws.store import Store
    from edgekws.training import round as rounds

    few = rounds.replay()[:4]
    monkeypatch.setattr(rounds, "replay", lambda: few)
    root = tmp_path / "state"
    shutil.copytree(enrolled.root / "enrolments", root / "enrolments")  # without the clips that other tests made there
    live = cli._demo_life(Settings(store=StoreSettings(root=root)), DEMO, steps=2)

    out, err = capsys.readouterr()
    heard, of = map(int, re.search(r"noisy room: (\d+) of (\d+) heard, 0 false wakes", err).groups())
    assert 0.4 * of <= heard <= 0.75 * of and f"kept to learn from: {heard} wakes" in err
    assert re.search(r"the gate refuses it: .* loses .*Once more without pruning", err)
    rows = dict(re.findall(r"^(before|after) +(\d+) of 12 +0 +325,312 +1306 kB +\d+ µs$", out, re.MULTILINE))
    assert (
        rows.keys() == ({"before", "after"} if live else {"before"}) and int(rows.get("after", rows["before"])) >= int(rows["before"]) - 1
    )
    store = Store(root)
    assert (store.current_model() is not None) == live
    said = [event.extra["what"] for event in store.events() if event.kind == "round"]
    assert said == ["started", "refused", "started", "promoted" if live else "refused"]


def test_help_needs_nothing_heavy():
    script = (
        "import sys; from edgekws.cli import _parser; _parser(); print(*sorted({'numpy', 'sqlite3', 'onnxruntime'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split() == []


def test_auto_is_the_engine_that_bench_found_best_here(tmp_path, monkeypatch, capsys):
    from edgekws import bench, cli
    from edgekws.config import ModelSettings, Settings, StoreSettings
    from edgekws.store import Store

    monkeypatch.setitem(bench.bench.__kwdefaults__, "paced_s", 0.1)  # no option, and ten seconds
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    settings = Settings(model=ModelSettings(id="edge-small"), store=StoreSettings(root=tmp_path / "state"))
    store = Store(tmp_path / "state")
    assert cli._backend(settings, store) == "auto"

    assert cli.main(["bench", "--all", "--seconds", "1", "--repeats", "1"]) == 0
    assert 'engine = "auto" is onnxruntime on this machine from the next start on (least CPU time' in capsys.readouterr().err
    assert (store.engine(), cli._backend(settings, store)) == ("onnxruntime", "auto")  # auto tries that one first
    (measured,) = store.events()  # for `edgekws report`
    assert (measured.kind, measured.model, measured.extra["backend"]) == ("bench", "edge-3", "onnxruntime")
    assert measured.extra["energy_mj_per_hop"] is not None or measured.extra["why_no_energy"]

    store.save_engine("tensorrt")
    assert cli._backend(settings, store) == "tensorrt"
    assert cli._backend(Settings(model=ModelSettings(engine="onnxruntime"), store=settings.store), store) == "onnxruntime"
    store.save_engine("an engine of a later version")
    assert cli._backend(settings, store) == "auto"


@pytest.mark.parametrize("name", ["det.xyz", "nowhere/det.png"])
def test_a_picture_that_cannot_be_written_is_told_before_the_measurement(cli, tmp_path, name):
    pytest.importorskip("matplotlib")
    said = cli("eval", "--corpus", tmp_path, "--plot", tmp_path / name, code=2).stderr

    assert "accepted is a name that ends with .png, .svg, .pdf, in a directory that is there" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the service's user")
def test_under_sudo_a_file_is_written_where_whoever_asked_may():
    """In a home that the service's account may not look into; the state directory is the service's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as root, tempfile.TemporaryDirectory(dir="/tmp") as home:
        os.chown(root, 65534, 65534)
        os.chmod(home, 0o700)
        with contextlib.closing(Store(Path(root))) as store:
            store.add_clip(Clip("positive", "hey", "ann", 1.0, 1280, 0.0, "woke", time_s=1e9), np.ones(1600, np.int16))
        for path in Path(root).rglob("*"):
            os.chown(path, 65534, 65534)
        # What it imports later may lie where that account cannot read, in root's home.
        code = "import sys, edgekws.store; from edgekws.cli import main; sys.exit(main(['clips', 'play', *sys.argv[1:]]))"
        env = {**os.environ, "STATE_DIRECTORY": root, "PYTHONPATH": str(Path(edgekws.__file__).parent.parent)}
        played, missing = (
            subprocess.run([sys.executable, "-c", code, *arguments], cwd=home, env=env, capture_output=True, text=True)
            for arguments in (("1", "--out", "x.wav"), ("7", "--out", "y.wav"))
        )
        with wave.open(str(Path(home, "x.wav"))) as file:
            samples = file.getnframes()

    assert (played.returncode, played.stderr, samples) == (0, "", 1600)
    assert (missing.returncode, missing.stderr) == (1, "edgekws: there is no clip 7. Try: edgekws clips list\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the service's user")
def test_what_root_caches_for_the_service_lies_with_the_service():
    program = (
        "import sys; from pathlib import Path; from edgekws import cli; from edgekws.config import Settings, StoreSettings;"
        "from edgekws.engines.tensorrt_engine import cache_directory;"
        "cli._store(Settings(store=StoreSettings(root=Path(sys.argv[1])))).close(); print(cache_directory())"
    )
    env = {name: value for name, value in os.environ.items() if name != "STATE_DIRECTORY"}
    with tempfile.TemporaryDirectory(dir="/tmp") as root:  # pytest's folders are root's alone
        os.chown(root, 65534, 65534)
        done = subprocess.run([sys.executable, "-c", program, root], env=env, capture_output=True, text=True, timeout=60)

    assert (done.stdout, done.stderr) == (f"{root}/tensorrt\n", "")


@pytest.mark.parametrize(("given", "taken"), [({}, "1"), ({"OPENBLAS_NUM_THREADS": "4"}, "4")])
def test_numpy_has_one_thread_unless_the_user_wants_more(given, taken):
    """Asked of the process that a command runs in, before NumPy is there."""
    ask = """
import os, sys
from edgekws.__main__ import main
try:
    main()
except SystemExit:
    print(os.environ["OPENBLAS_NUM_THREADS"], "numpy" in sys.modules)
"""
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"} | given
    ended = subprocess.run([sys.executable, "-c", ask, "--version"], capture_output=True, text=True, env=env, check=True)
    assert ended.stdout.splitlines()[-1] == f"{taken} False"


def test_a_round_that_is_held_to_watts_says_at_its_start_what_of(tmp_path, monkeypatch, capsys):
    """On x86 only the processor is measured."""
    pytest.importorskip("torch")
    from edgekws import cli
    from edgekws.errors import EdgekwsError
    from edgekws.power import NoMeter
    from edgekws.training import adaptation

    class Package(NoMeter):
        name, rail = "rapl", "package-0 + package-0/dram"

    def run(*_, **__):
        raise EdgekwsError("far enough")

    monkeypatch.setattr("edgekws.power.load_meter", lambda: Package("no reading is needed"))
    monkeypatch.setattr(adaptation, "run", run)
    config = tmp_path / "edgekws.toml"
    config.write_text(f'[store]\nroot = "{tmp_path / "state"}"\n[learning]\ntraining_max_w = 8\n')
    assert cli.main(["adapt", "--dry-run", "--config", str(config)]) == 1

    assert "held to 8 W of what rapl measures: package-0 + package-0/dram" in capsys.readouterr().err
