"""The real capture path: paplay → PulseAudio → PortAudio → chunks. What no real one does when it is asked to, a fake PortAudio does."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from edgekws import doctor
from edgekws.audio import input_devices, open_source, record
from edgekws.audio import microphone as microphone_module
from edgekws.audio.microphone import restart_portaudio
from edgekws.daemon import open_patiently
from edgekws.errors import AudioError

FAKE = """
import atexit, os, types
_initialized = 0
plan = None  # of a test: what a stream does when it starts
class PortAudioError(Exception):
    pass
def _initialize():
    global _initialized
    if os.environ.get("FAKE_SERVER") != "runs":
        raise PortAudioError("Error initializing PortAudio: Unanticipated host error", -9999)
    _initialized += 1
def _terminate():
    global _initialized
    _initialized -= 1
def _exit_handler():
    pass
default = types.SimpleNamespace(device=(0, 0))
def query_hostapis():
    if os.environ.get("FAKE_DEVICES") == "none":
        raise PortAudioError("Error querying host API", -9979)
    return [{"name": "PulseAudio", "devices": [0]}]
def query_devices(device):
    return {"name": "fake", "hostapi": 0, "max_input_channels": 1, "default_samplerate": 16000.0}
class RawInputStream:
    active = False
    def __init__(self, callback, finished_callback, **options):
        self.callback, self.finished = callback, finished_callback
    def start(self):
        if plan:
            plan(self)
    def abort(self, ignore_errors):
        pass
    def close(self, ignore_errors):
        pass
_initialize()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A fake sounddevice, which starts PortAudio when it is imported, as the real one does; its sound server does not run at first."""
    (tmp_path / "sounddevice.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    before = sys.modules.pop("sounddevice", None)
    yield monkeypatch
    sys.modules.pop("sounddevice", None)
    if before is not None:
        sys.modules["sounddevice"] = before


def block(stream, age_s=0.0):
    """80 ms arrive, just captured."""
    times, status = SimpleNamespace(currentTime=age_s, inputBufferAdcTime=0.0), SimpleNamespace(input_overflow=False)
    stream.callback(bytes(2560), 1280, times, status)


@pytest.mark.parametrize(("server", "devices"), [("", ""), ("runs", "none")])
def test_portaudio_that_does_not_start_is_explained_each_time_and_is_not_imported_anew(fake, server, devices):
    fake.setenv("FAKE_SERVER", server)
    fake.setenv("FAKE_DEVICES", devices)
    modules = []
    for use in (input_devices, lambda: open_source("mic:default"), input_devices):
        with pytest.raises(
            AudioError, match=r"PortAudio does not start here \(.*Error .*\)\. Is the sound server reachable by this user\?"
        ):
            use()
        modules.append(sys.modules["sounddevice"])

    assert modules[0] is modules[1] is modules[2]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("raise OSError('PortAudio library not found')", "PortAudio is not installed"),
        ("import no_such_cffi", "the package sounddevice is not"),
        ("raise RuntimeError('odd')", "does not start here .odd"),
    ],
)
def test_an_installation_that_is_broken_is_explained(fake, tmp_path, fault, error):
    (tmp_path / "sounddevice.py").write_text(fault)
    for _ in range(2):
        with pytest.raises(AudioError, match=error):
            input_devices()


def test_a_service_waits_for_a_sound_server_without_which_portaudio_does_not_start(fake, tmp_path):
    fake.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    deaf = []

    def begin(why):
        deaf.append(why)
        fake.setenv("FAKE_SERVER", "runs")

    with open_patiently("mic:default", on_deaf=begin) as source:
        assert source.uri == "mic:default"
    assert len(deaf) == 1 and "PortAudio does not start here" in deaf[0]


def test_a_microphone_that_is_gone_after_this_process_was_stopped_for_long_is_reopened(fake):
    """The clock is moved on instead, by a minute."""
    fake.setenv("FAKE_SERVER", "runs")
    source, passed_s, monotonic = open_source("mic:default"), [0.0], time.monotonic
    fake.setattr("edgekws.audio.microphone.time", SimpleNamespace(monotonic=lambda: monotonic() + passed_s[0]))
    block(source._stream)
    chunks = source.chunks()
    next(chunks)
    sys.modules["sounddevice"].plan = block
    passed_s[0] = 60.0
    source._stream.finished()
    again = next(chunks)
    source.close()

    assert again.gap_samples > 59 * 16_000 and list(chunks) == []


def test_what_a_sound_server_kept_while_this_process_was_stopped_is_not_lost(fake):
    """The clock is moved on instead; PulseAudio keeps 131 s at 16 kHz, and gives them at once."""
    fake.setenv("FAKE_SERVER", "runs")
    source, now_s = open_source("mic:default"), [100.0]
    fake.setattr("edgekws.audio.microphone.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    chunks, gaps = source.chunks(), 0
    for i in range(1700):
        if i == 50:
            now_s[0] += 130
        block(source._stream, max(0.0, now_s[0] - 100 - 0.08 * i))
        gaps += next(chunks).gap_samples
        if i < 50 or now_s[0] < 100 + 0.08 * (i + 1):
            now_s[0] += 0.08
    source.close()

    assert gaps == 0


def test_a_microphone_that_opens_and_stays_silent_is_given_up_all_the_same(fake):
    fake.setenv("FAKE_SERVER", "runs")
    fake.setattr("edgekws.audio.microphone.STALL_S", 0.02)
    fake.setattr("edgekws.audio.microphone.GIVE_UP_S", 0.6)
    source, opened = open_source("mic:default"), []
    sys.modules["sounddevice"].plan = opened.append

    with pytest.raises(AudioError, match=r"the stream stopped.*; nothing was heard for"):
        list(source.chunks())
    assert opened


def test_a_microphone_that_opens_again_and_again_and_stays_silent_is_told_once(fake):
    fake.setenv("FAKE_SERVER", "runs")
    fake.setattr("edgekws.audio.microphone.STALL_S", 0.02)
    fake.setattr("edgekws.audio.microphone.GIVE_UP_S", 3.0)
    source, opened, deaf = open_source("mic:default"), [], []
    sys.modules["sounddevice"].plan = opened.append
    source.on_deaf = deaf.append
    with pytest.raises(AudioError, match="nothing was heard for"):
        list(source.chunks())

    assert len(opened) > 1 and len(deaf) == 1


def test_a_source_that_spins_while_it_wakes_up_slowly_is_waited_for_each_fourth_time(fake):
    fake.setenv("FAKE_SERVER", "runs")
    fake.setattr("edgekws.audio.microphone.LAST_PAUSE_S", 0.01)
    source, opened = open_source("mic:default"), []
    block(source._stream)
    chunks = source.chunks()
    next(chunks)

    def wakes_up(stream):
        ends = threading.Event()

        def spin():
            until_s = time.monotonic() + 1.0
            while time.monotonic() < until_s and not ends.is_set():
                pass
            if not ends.is_set():
                block(stream)

        stream.abort = lambda ignore_errors: ends.set()
        opened.append(stream)
        threading.Thread(target=spin, daemon=True).start()

    sys.modules["sounddevice"].plan = wakes_up
    source._stream.finished()
    again = next(chunks)
    source.close()

    assert again.gap_samples > 0 and len(opened) == 4


def test_a_stream_that_opens_after_nobody_waits_for_it_is_closed(fake):
    """A sound server that hangs and recovers."""
    fake.setenv("FAKE_SERVER", "runs")
    source, late, recovers, closed = open_source("mic:default"), [], threading.Event(), threading.Event()

    def hang(stream):
        late.append(stream)
        stream.close = lambda ignore_errors: closed.set()
        recovers.wait(30)

    sys.modules["sounddevice"].plan = hang
    fake.setattr("edgekws.audio.microphone.OPEN_S", 0.2)
    with pytest.raises(AudioError, match="did not answer"):
        open_source("mic:default")
    (thread,) = microphone_module._hanging
    sys.modules["sounddevice"].plan = None
    recovers.set()
    thread.join(30)
    source.close()

    assert len(late) == 1 and closed.is_set()


def test_of_attempts_that_hung_those_that_ended_are_forgotten(fake):
    fake.setenv("FAKE_SERVER", "runs")
    source, recovers = open_source("mic:default"), threading.Event()
    sys.modules["sounddevice"].plan = lambda stream: recovers.wait(30)
    fake.setattr("edgekws.audio.microphone.OPEN_S", 0.2)
    for _ in range(3):
        recovers.clear()
        with pytest.raises(AudioError, match="did not answer"):
            open_source("mic:default")
        (thread,) = microphone_module._hanging
        recovers.set()
        thread.join(30)
    source.close()


def hangs_at_its_start(fake, before=None, at=None):
    """PortAudio, which waits for `before`, and then for `at`, while it starts: as sounddevice starts it, with stderr at /dev/null."""
    with pytest.raises(AudioError):
        input_devices()
    fake.setattr("edgekws.audio.microphone.OPEN_S", 0.2)

    def initialize():
        before is None or before.wait(5)
        kept = os.dup(2)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        try:
            at.wait(5)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        raise sys.modules["sounddevice"].PortAudioError("no server", -9999)

    sys.modules["sounddevice"]._initialize = initialize


def recovered(*events):
    for event in events:
        event.set()
    for thread in microphone_module._hanging:
        thread.join(30)


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_sound_server_that_hangs_does_not_take_stderr_with_it(fake, attempts):
    stderr, recovers = os.fstat(2), threading.Event()
    hangs_at_its_start(fake, at=recovers)
    told = []
    for _ in range(attempts):
        with pytest.raises(AudioError, match="did not answer"):
            open_source("mic:default")
        told.append(os.fstat(2))
    recovered(recovers)

    assert [one.st_ino for one in (*told, os.fstat(2))] == [stderr.st_ino] * (attempts + 1)


def test_stderr_comes_back_from_an_attempt_that_took_it_when_nobody_waited_any_more(fake):
    stderr, goes_on, recovers = os.fstat(2), threading.Event(), threading.Event()
    hangs_at_its_start(fake, before=goes_on, at=recovers)
    with pytest.raises(AudioError, match="did not answer"):
        open_source("mic:default")
    goes_on.set()
    while os.fstat(2).st_ino == stderr.st_ino:
        time.sleep(0.01)
    with pytest.raises(AudioError, match="did not answer"):
        open_source("mic:default")
    told = os.fstat(2)
    recovered(recovers)

    assert (told.st_ino, os.fstat(2).st_ino) == (stderr.st_ino, stderr.st_ino)


def test_where_stderr_is_closed_a_microphone_is_opened_all_the_same(tmp_path):
    (tmp_path / "sounddevice.py").write_text(FAKE)
    script = "import os; os.close(2); from edgekws.audio import open_source; print(open_source('mic:default').uri)"
    env = {**os.environ, "FAKE_SERVER": "runs", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    assert subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True).stdout == "mic:default\n"


def test_the_devices_of_a_sound_server_that_hangs_are_not_waited_for_and_doctor_says_how_to_restart_it(fake):
    recovers = threading.Event()
    hangs_at_its_start(fake, at=recovers)
    with pytest.raises(AudioError, match=r"^PulseAudio or PipeWire did not answer for 0 s\. Restart it$"):
        input_devices()
    check = doctor._input_device("mic:default")
    recovered(recovers)

    assert (check.ok, check.mend) == (False, "systemctl --user restart pipewire pulseaudio")


def test_doctor_looks_for_the_microphone_that_is_configured(fake):
    fake.setenv("FAKE_SERVER", "runs")
    absent, there, other = (doctor._input_device(source) for source in ("mic:nobody", "mic:FAK?rate=48000", "stdin:"))

    assert (absent.ok, absent.essential) == (False, True)
    assert absent.detail.startswith('cannot open mic:nobody: no input has "nobody" in its name')
    assert absent.mend.startswith("edgekws devices")
    assert (there.ok, other.ok, other.essential) == (True, True, False)


def test_where_no_thread_can_be_had_that_is_said(fake):
    fake.setenv("FAKE_SERVER", "runs")

    def start(thread):
        raise RuntimeError("can't start new thread")

    fake.setattr("threading.Thread.start", start)
    with pytest.raises(AudioError, match=r"can't start new thread\. Raise the unit's TasksMax="):
        open_source("mic:default")


@pytest.fixture
def microphone(null_sink, monkeypatch):
    """The null sink as this process's microphone."""
    pytest.importorskip("sounddevice", exc_type=(ImportError, OSError))
    monkeypatch.setenv("PULSE_SERVER", null_sink.env["PULSE_SERVER"])
    restart_portaudio()
    if "pulse" not in [device.name for device in input_devices()]:
        pytest.skip("ALSA does not know PulseAudio here (apt-get install libasound2-plugins)")
    yield null_sink
    monkeypatch.undo()
    restart_portaudio()


@pytest.fixture
def noise(tmp_path):
    """A WAV file with 3 s of noise, and its samples."""
    soundfile = pytest.importorskip("soundfile")
    samples = np.random.default_rng(0).integers(-20_000, 20_000, 48_000).astype(np.int16)
    soundfile.write(tmp_path / "noise.wav", samples, 16_000)
    return tmp_path / "noise.wav", samples


def captured(source, play, seconds):
    """(all samples, all chunks) of `seconds` and more, while `play` runs in a thread."""
    player = threading.Thread(target=play)
    player.start()
    chunks = []
    for chunk in source.chunks():
        chunks.append(chunk)
        if not player.is_alive():
            seconds -= len(chunk.samples) / 16_000
        if seconds < 0:
            break
    player.join()
    return np.concatenate([chunk.samples for chunk in chunks]), chunks


@pytest.mark.parametrize("uri", ["mic:pulse", "mic:PUL?host_api=alsa", "mic:default", "mic:"])
def test_what_is_played_is_captured_bit_for_bit(microphone, noise, uri):
    path, samples = noise

    with open_source(uri) as source:
        heard, chunks = captured(source, lambda: microphone.play(path), seconds=1)

    start = np.flatnonzero(heard)[0]
    assert np.array_equal(heard[start : start + len(samples)], samples)
    assert not heard[start + len(samples) :].any()
    assert [chunk.gap_samples for chunk in chunks] == [0] * len(chunks)
    assert [chunk.first_sample for chunk in chunks] == np.cumsum([0] + [len(chunk.samples) for chunk in chunks[:-1]]).tolist()


@pytest.mark.parametrize("null_sink", [48_000], indirect=True)
def test_a_device_of_another_rate_is_resampled(microphone, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    tone = (10_000 * np.sin(2 * np.pi * 1_000 * np.arange(3 * 48_000) / 48_000)).astype(np.int16)
    soundfile.write(tmp_path / "tone.wav", tone, 48_000)

    with open_source("mic:pulse?rate=48000") as source:
        heard, chunks = captured(source, lambda: microphone.play(tmp_path / "tone.wav"), seconds=1)

    loud = np.flatnonzero(np.abs(heard) > 1_000)
    middle = heard[loud[0] + 8_000 : loud[0] + 40_000].astype(float)  # 2 s
    assert len(loud) and abs((loud[-1] - loud[0]) / 16_000 - 3) < 0.01
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 2_000  # bins of 0.5 Hz
    assert abs(np.sqrt(np.mean(middle**2)) - 10_000 / np.sqrt(2)) < 10
    assert sum(chunk.gap_samples for chunk in chunks) == 0


def test_a_killed_sound_server_is_noticed_and_what_was_missed_is_counted(microphone, caplog):
    with open_source("mic:pulse") as source:
        deaf = []
        source.on_deaf = deaf.append
        chunks = source.chunks()
        before = next(chunks)
        start_s = time.monotonic()
        microphone.kill()
        restart = threading.Timer(3, microphone.start)
        restart.start()
        after = next(chunk for chunk in chunks if chunk.gap_samples)
        waited_s = time.monotonic() - start_s
        later = next(chunks)
        restart.join()

    assert "the stream st" in caplog.messages[0]  # "stopped", or "stalled" where libpulse hangs on the memory that it shared with the dead
    assert "listening again" in caplog.messages[-1]
    assert [why[:13] for why in deaf] == ["the stream st"]
    assert 2 * 16_000 < after.gap_samples <= (waited_s + 1) * 16_000
    assert before.first_sample == 0 and after.first_sample > after.gap_samples
    assert later.first_sample == after.first_sample + len(after.samples)


def test_a_service_waits_for_a_microphone_that_is_not_there_yet(microphone, tmp_path, monkeypatch):
    microphone.kill()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        with pytest.raises(AudioError):  # a person is told at once
            open_patiently("mic:pulse")
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        threading.Timer(2, microphone.start).start()

        with open_patiently("mic:pulse") as source:
            next(source.chunks())

        told = ear.recv(4096).decode()
    assert told.startswith("READY=1\nWATCHDOG=1\nSTATUS=deaf: cannot open mic:pulse: ")


def test_servers_killed_at_the_beginning_of_a_stream_leave_nothing_waiting_for_them(microphone):
    """With memory shared between client and server about half of these hang for good."""
    for _ in range(6):
        with open_source("mic:pulse") as source:
            next(source.chunks())
            microphone.kill()
            source.close()
        microphone.start()

    assert [thread.name for thread in threading.enumerate() if thread.name == "sound system"] == []


def test_a_sound_server_that_hangs_is_noticed(microphone, caplog):
    """No error and no end of the stream comes from it: only the silence tells."""
    with open_source("mic:pulse") as source:
        chunks = source.chunks()
        next(chunks)
        microphone.signal(signal.SIGSTOP)
        threading.Timer(8, microphone.signal, [signal.SIGCONT]).start()
        after = next(chunk for chunk in chunks if chunk.gap_samples)

    assert "the stream stalled" in caplog.messages[0]
    assert after.gap_samples > 4 * 16_000


def test_a_suspended_microphone_takes_little_cpu_time_and_is_heard_again(microphone, caplog):
    """PortAudio spins while it waits for one: nearly a whole core."""
    with open_source("mic:pulse") as source:
        chunks = source.chunks()
        next(chunks)
        microphone.suspend(True)
        threading.Timer(7, microphone.suspend, [False]).start()
        used_s = time.process_time()
        after = next(chunk for chunk in chunks if chunk.gap_samples)
        used_s = time.process_time() - used_s

    assert after.gap_samples > 6 * 16_000 and used_s < 1.6
    assert "it opens and gives nothing (suspended? pactl suspend-source" in " ".join(caplog.messages)


def test_a_dead_microphone_ends_in_an_error(microphone, monkeypatch):
    monkeypatch.setattr("edgekws.audio.microphone.GIVE_UP_S", 2.0)
    with open_source("mic:pulse") as source:
        chunks = source.chunks()
        next(chunks)
        microphone.kill()
        with pytest.raises(AudioError, match=r"mic:pulse: the stream (stopped|stalled).*; nothing was heard for \d+ s"):
            for _ in chunks:
                pass


def test_record_gives_the_seconds_asked_for(microphone):
    recording = record("mic:pulse", 1.5)

    assert recording.dtype == np.int16 and recording.shape == (24_000,)


def test_close_from_another_thread_ends_the_stream(microphone):
    with open_source("mic:pulse") as source:
        chunks = source.chunks()
        next(chunks)
        threading.Timer(0.3, source.close).start()

        assert all(chunk.gap_samples == 0 for chunk in chunks)


def test_devices_are_listed_with_their_default(microphone):
    devices = input_devices()

    assert {"pulse", "default"} <= {device.name for device in devices}
    assert {device.host_api for device in devices} == {"ALSA"}
    assert sum(device.is_default for device in devices) == 1


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("mic:pulsar", 'no input has "pulsar" in its name (did you mean "pulse"?). Inputs here: "pulse" (ALSA), "default" (ALSA)'),
        ("mic:0", 'no input has "0" in its name'),
        ("mic:u", '"u" fits several inputs: "pulse" (ALSA), "default" (ALSA). Give more of the name'),
        ("mic:pulse?host_api=jack", 'no input belongs to the host API "jack"'),
    ],
    ids=lambda value: value if value.startswith("mic:") else "",
)
def test_a_microphone_that_cannot_be_found_is_explained(microphone, uri, error):
    with pytest.raises(AudioError, match=re.escape(error)):
        open_source(uri)


def test_no_microphone_is_explained(tmp_path):
    """In a process where no sound server can be found and ALSA knows no card."""
    script = "from edgekws.audio import open_source; open_source('mic:default')"
    env = {"PATH": "/usr/bin", "HOME": str(tmp_path), "PULSE_SERVER": f"unix:{tmp_path}/none", "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    if not done.returncode:
        pytest.skip("there is a microphone here")

    assert "AudioError: " in done.stderr
    assert "there is no microphone here" in done.stderr or "PortAudio is not installed" in done.stderr


NAMES_SCRIPT = """
from edgekws.audio import input_devices
for _ in range(2):
    print({device.name for device in input_devices()} & {"kitchen"})
"""


def test_a_device_whose_name_is_no_utf_8_is_left_out_and_said_once(tmp_path):
    (tmp_path / ".asoundrc").write_bytes(b'pcm."K\xfcche" { type null }\npcm.kitchen { type null }\n')
    env = {"PATH": "/usr/bin", "HOME": str(tmp_path), "PULSE_SERVER": f"unix:{tmp_path}/none", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", NAMES_SCRIPT], capture_output=True, text=True, env=env)
    if "PortAudio is not installed" in done.stderr:
        pytest.skip("PortAudio not installed (apt-get install libportaudio2)")

    assert done.stdout == "{'kitchen'}\n" * 2
    assert done.stderr.count(r"b'K\xfcche' is left out") == 1


JACK_SCRIPT = """
from edgekws.audio import open_source, record
from edgekws.daemon import open_patiently
from edgekws.errors import AudioError
print(record("mic:system?host_api=jack", 1.0).shape)
try:
    open_source("mic:system?host_api=jack&rate=44100")
except AudioError as error:
    print(error)
"""


def test_a_device_that_refuses_16_khz_is_opened_at_its_own_rate(tmp_path):
    """JACK's devices run at one rate and at nothing else. In a process of its own, because libjack does not survive its server."""
    if not shutil.which("jackd"):
        pytest.skip("jackd not installed (apt-get install jackd2)")
    env = {
        **os.environ,
        "JACK_DEFAULT_SERVER": "edgekws-test",
        "JACK_NO_START_SERVER": "1",
        "PULSE_SERVER": f"unix:{tmp_path}/none",
    }
    server = subprocess.Popen(["jackd", "-r", "-d", "dummy", "-r", "48000"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(["jack_wait", "-w", "-t", "20"], env=env, capture_output=True)
    done = subprocess.run([sys.executable, "-c", JACK_SCRIPT], env=env, capture_output=True, text=True)
    server.terminate()  # Killed, it would leave one of the eight places for servers taken.
    server.wait(30)
    if 'host API "jack"' in done.stderr or "no microphone" in done.stderr:
        pytest.skip("jackd does not start here, or PortAudio was built without it")

    shape, error = done.stdout.splitlines()
    assert shape == "(16000,)"
    assert error.endswith('"system" refuses 44100 Hz. Leave ?rate out, or give its own: ?rate=48000')
