"""Files, standard input and URIs. The microphone is in test_capture.py."""

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edgekws.audio import StdinSource, duration_s, microphone, open_source, read_recording, record
from edgekws.audio.microphone import SampleClock
from edgekws.audio.stdin import STALL_S
from edgekws.errors import AudioError, EdgekwsError, UsageError
from edgekws.values import SAMPLE_RATE_HZ

soundfile = pytest.importorskip("soundfile")
RNG = np.random.default_rng(0)
NOISE = RNG.integers(-20_000, 20_000, 40_321).astype(np.int16)  # 2.5 s, in no whole number of any block


def tone(rate_hz, seconds=2.0, hz=500.0, channels=1):
    """float, ±0.5; each channel louder than the one before."""
    wave = 0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate_hz * seconds)) / rate_hz)
    return np.stack([wave * (channel + 1) / channels for channel in range(channels)], axis=1)


def heard(source):
    """All samples of a source; its chunks must follow each other."""
    parts = [np.zeros(0, np.int16)]
    for chunk in source.chunks():
        assert chunk.samples.dtype == np.int16 and len(chunk.samples) and chunk.gap_samples == 0
        assert chunk.first_sample == sum(map(len, parts))
        parts.append(chunk.samples)
    return np.concatenate(parts)


@pytest.mark.parametrize(("name", "subtype"), [("a.wav", "PCM_16"), ("a.flac", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "FLOAT")])
def test_lossless_files_at_16_khz_come_out_bit_for_bit(tmp_path, name, subtype):
    soundfile.write(tmp_path / name, NOISE / 32_768, 16_000, subtype)

    with open_source(f"file:{tmp_path / name}") as source:
        assert np.array_equal(heard(source), NOISE)
    assert np.array_equal(read_recording(tmp_path / name), NOISE)


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_number_of_channels_becomes_16_khz_mono(tmp_path, rate_hz, channels):
    soundfile.write(tmp_path / "a.wav", tone(rate_hz, channels=channels), rate_hz, "PCM_16")

    samples = read_recording(tmp_path / "a.wav")

    loudness = (channels + 1) / (2 * channels)  # the mean of the channels
    expected = 32_768 * loudness * tone(16_000)[:, 0]
    assert len(samples) == 32_000
    assert np.abs(samples - expected)[400:-400].max() < 40  # 0.1 % of full scale; at the very ends the filter rings


def test_opus_is_read(tmp_path):
    soundfile.write(tmp_path / "a.opus", tone(48_000, channels=2), 48_000, format="OGG", subtype="OPUS")

    samples = read_recording(tmp_path / "a.opus")

    assert abs(len(samples) - 32_000) < 400
    assert np.argmax(np.abs(np.fft.rfft(samples[8_000:24_000].astype(float)))) == 500


@pytest.mark.parametrize("chunk", [1, 160, 1_280, 16_000, 1_000_000])
def test_any_chunking_gives_the_same_samples(tmp_path, chunk):
    soundfile.write(tmp_path / "a.wav", tone(44_100, seconds=1.1), 44_100)
    whole = read_recording(tmp_path / "a.wav")

    with open_source(f"file:{tmp_path}/a.wav?chunk={chunk}") as source:
        chunks = list(source.chunks())

    assert np.array_equal(np.concatenate([each.samples for each in chunks]), whole)
    assert {len(each.samples) for each in chunks[:-1]} <= {chunk}


def test_a_paced_file_takes_as_long_as_it_plays(tmp_path):
    soundfile.write(tmp_path / "a.wav", NOISE[:8_000], 16_000)
    start_s = time.monotonic()

    with open_source(f"file:{tmp_path}/a.wav?paced=1&chunk=1600") as source:
        samples = heard(source)

    assert time.monotonic() - start_s >= 0.5
    assert source.live and np.array_equal(samples, NOISE[:8_000])


def test_closed_by_another_thread_under_a_read_a_file_ends(tmp_path):
    """In a process of its own: libsndfile crashed where the file was closed under it, in 5 of 5 runs of this."""
    soundfile.write(tmp_path / "long.flac", np.random.default_rng(0).integers(-9999, 9999, 20 * 16_000, dtype=np.int16), 16_000)
    script = """
import sys, threading, time
from edgekws.audio import open_source
for i in range(60):
    source = open_source("file:" + sys.argv[1])
    thread = threading.Thread(target=lambda: (time.sleep(i / 60 * 0.02), source.close()))
    thread.start()
    for chunk in source.chunks():
        pass
    thread.join()
"""
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "long.flac"], timeout=60).returncode == 0


def test_close_ends_a_paced_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000 * 3600, np.int16), 16_000)
    with open_source(f"file:{tmp_path}/a.wav?paced=1") as source:
        threading.Timer(0.3, source.close).start()

        assert len(heard(source)) < 16_000 * 600


def test_a_bare_path_is_a_file_whatever_is_in_its_name(tmp_path, monkeypatch):
    for name in ("take 1: what?.wav", "50% a?b&c.wav", "ünï.wav", "mic"):
        soundfile.write(tmp_path / name, NOISE, 16_000, format="WAV")
        monkeypatch.chdir(tmp_path)

        for uri in (name, str(tmp_path / name), f"file:{name}"):
            with open_source(uri) as source:
                assert np.array_equal(heard(source), NOISE)


def test_a_name_that_is_no_utf_8_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"t\xe4st") / os.fsdecode(b"t\xe4st.wav")
    path.parent.mkdir()
    path.write_bytes(wav_bytes(NOISE))

    assert np.array_equal(read_recording(path), NOISE) and duration_s(path) == len(NOISE) / 16_000
    with open_source(f"file:{path}") as source:
        assert np.array_equal(heard(source), NOISE)


def test_a_link_to_nothing_is_not_advised_to_be_itself(tmp_path):
    (tmp_path / "dang.wav").symlink_to("gone.wav")

    with pytest.raises(AudioError, match=r"dang\.wav: no such file$"):
        read_recording(tmp_path / "dang.wav")


def test_record_gives_what_was_asked_for_or_all_there_is(tmp_path):
    soundfile.write(tmp_path / "a.wav", NOISE, 16_000)

    assert np.array_equal(record(f"file:{tmp_path}/a.wav", 1.5), NOISE[:24_000])
    assert np.array_equal(record(f"file:{tmp_path}/a.wav", 60), NOISE)
    with pytest.raises(AudioError, match="must be above 0 s"):
        record(f"file:{tmp_path}/a.wav", 0)


def wav_bytes(samples, rate_hz=16_000, subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, subtype, format="WAV")
    return buffer.getvalue()


BAD_FILES = {
    "empty.wav": (b"", "the file is empty"),
    "text.wav": (b"hello " * 1_000, "not audio that is known here .* Accepted: WAV, FLAC, Opus"),
    "silent.wav": (wav_bytes(NOISE[:0]), "there are no samples in it"),
    "killed.wav": (wav_bytes(NOISE[:0]) + NOISE.tobytes(), "by its header, which was never finished. This reads .* run --source stdin: < "),
    "header.wav": (wav_bytes(NOISE)[:20], "not audio that is known here|there are no samples in it"),
    "samples.raw": (NOISE.tobytes(), "raw samples have no header; read them as stdin:"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_recording_is_explained(tmp_path, name):
    content, error = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(AudioError, match=error):
        read_recording(tmp_path / name)
    with pytest.raises(AudioError, match=error), open_source(f"file:{tmp_path / name}") as source:
        heard(source)
    assert (tmp_path / name).read_bytes() == content


def test_of_what_is_no_file_only_a_pipe_is_sent_to_standard_input(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(AudioError, match=r"is a directory, not a file\. Accepted: WAV, FLAC, Opus") as error:
        read_recording(tmp_path)
    assert "stdin" not in str(error.value)
    with pytest.raises(AudioError, match="a pipe is read as stdin:"):
        read_recording(tmp_path / "pipe")


def test_where_nothing_can_be_played_the_advice_is_a_command_that_works(monkeypatch):
    class Silent:
        PortAudioError = OSError

        def play(self, *_, **__):
            raise self.PortAudioError("no output")

    monkeypatch.setattr(microphone, "_portaudio", Silent)
    with pytest.raises(AudioError, match="Write it to a file: edgekws clips play ID --out FILE"):
        microphone.play(np.zeros(8, np.int16))


def test_a_damaged_file_ends_in_an_error_or_early_but_never_in_noise(tmp_path):
    soundfile.write(tmp_path / "a.flac", NOISE, 16_000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (tmp_path / "a.flac").write_bytes(content)

    try:
        samples = read_recording(tmp_path / "a.flac")
    except AudioError as error:
        assert "damaged" in str(error)
    else:
        assert np.array_equal(samples[:16_000], NOISE[:16_000])


def test_a_wav_file_that_was_cut_off_gives_what_is_there(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(NOISE)[:30_001])

    samples = read_recording(tmp_path / "a.wav")

    assert len(samples) >= 14_900 and np.array_equal(samples, NOISE[: len(samples)])


WRONG = {
    "": "no source of audio was named. Accepted: mic:NAME",
    "http://host/a.wav": 'unknown kind of source "http:". Accepted: mic:NAME .mic:default., file:PATH or a path, stdin:',
    "flie:a.wav": r'unknown kind of source "flie:" \(did you mean "file:"\?\)',
    "stdin": r'no such file \(did you mean "stdin:"\?\)',
    "file:a.wav?pace=1": r'unknown option "pace" \(did you mean "paced"\?\). Accepted here: paced, chunk',
    "file:a.wav?paced=yes": 'paced="yes" is not accepted; it takes 0 or 1',
    "file:a.wav?chunk=0": 'chunk="0" is not accepted; it takes a whole number from 1 to',
    "file:a.wav?chunk=1e3": 'chunk="1e3" is not accepted',
    "stdin:a.wav": 'standard input has no name, but here is "a.wav"',
    "stdin:?rate=16": 'rate="16" is not accepted',
    "mic:pulse?gain=2": 'unknown option "gain". Accepted here: host_api, rate',
    "mic:pulse?rate=fast": 'rate="fast" is not accepted; it takes a whole number from 4000 to 384000',
}
MISSING = {
    "ReSpeaker": r'no such file\. Is it a microphone, "mic:ReSpeaker"\?',
    "file:takes/alexa1.wav": r'takes/alexa1.wav: no such file \(did you mean "alexa.wav"\?\)',
    "file:missing/a.wav": "missing/a.wav: no such file",
    "file:takes": "not a file",
    "file:": "not a file",
}


@pytest.mark.parametrize(("uri", "error"), [*WRONG.items(), *MISSING.items()])
def test_a_uri_that_names_nothing_is_explained_and_one_that_never_can_is_wrong_usage(tmp_path, monkeypatch, uri, error):
    """What is missing may come, so a unit that ends by it is started again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "takes").mkdir()
    (tmp_path / "takes" / "alexa.wav").touch()

    with pytest.raises(EdgekwsError, match=error) as raised:
        open_source(uri)
    assert raised.type is (UsageError if uri in WRONG else AudioError)


def from_pipe(content, uri="stdin:", pieces=(1 << 30,)):
    """What a StdinSource hears when `content` is written into its pipe piece by piece."""
    read_end, write_end = os.pipe()

    def write():
        with os.fdopen(write_end, "wb", buffering=0) as pipe:
            left = content
            while left:
                for size in pieces:
                    pipe.write(left[:size])
                    left = left[size:]

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with StdinSource(uri, uri.removeprefix("stdin:"), descriptor=read_end) as source:
            return heard(source)
    finally:
        os.set_blocking(read_end, False)
        while writer.is_alive():  # after an error: let the writer end
            with open(os.dup(read_end), "rb") as rest:
                rest.read(1 << 20)
        os.close(read_end)


def test_raw_samples_come_out_bit_for_bit_however_they_are_written():
    assert np.array_equal(from_pipe(NOISE.tobytes()), NOISE)
    assert np.array_equal(from_pipe(NOISE.tobytes(), pieces=(1, 3, 4_001, 2, 65_537)), NOISE)


def test_a_pipe_is_live_and_a_file_on_standard_input_is_not(tmp_path):
    """The sinks are waited for where the samples wait too."""
    (tmp_path / "samples").write_bytes(NOISE.tobytes())
    read_end, write_end = os.pipe()
    with open(tmp_path / "samples") as file:
        live = [StdinSource("stdin:", "", descriptor).live for descriptor in (read_end, file.fileno())]
    os.close(read_end)
    os.close(write_end)

    assert live == [True, False]


@pytest.mark.parametrize("trailing", [1, 3])
def test_half_a_sample_at_the_end_is_left_out_and_said(trailing, caplog):
    with caplog.at_level(logging.WARNING):
        samples = from_pipe(NOISE.tobytes() + bytes(trailing))

    assert np.array_equal(samples[: len(NOISE)], NOISE) and len(samples) == len(NOISE) + trailing // 2
    assert caplog.messages == ["stdin:: the last 1 bytes are only a part of a sample and were left out"]


@pytest.mark.parametrize("content", [b"", b"\x01"])
def test_standard_input_without_a_sample_is_an_error(content):
    with pytest.raises(AudioError, match="ended without a sample"):
        from_pipe(content)


def test_standard_input_of_another_rate_with_two_channels():
    stereo = np.round(tone(48_000, channels=2) * 32_767).astype(np.int16)

    samples = from_pipe(stereo.tobytes(), "stdin:?rate=48000&channels=2", pieces=(4_001,))

    assert len(samples) == 32_000
    assert np.abs(samples - 32_768 * 0.75 * tone(16_000)[:, 0])[400:-400].max() < 40


def streaming_header(wav, size):
    """The same with the sizes that a program writes when it cannot know them yet."""
    return wav[:4] + size.to_bytes(4, "little") + wav[8:40] + size.to_bytes(4, "little") + wav[44:]


def test_what_is_behind_a_header_that_was_never_finished_is_read_as_a_stream():
    assert np.array_equal(from_pipe(wav_bytes(NOISE[:0]) + NOISE.tobytes()), NOISE)


def test_a_wav_header_in_the_stream_is_read_and_taken_off():
    wav = wav_bytes(NOISE)

    assert np.array_equal(from_pipe(wav, pieces=(7, 100)), NOISE)
    assert np.array_equal(from_pipe(wav + b"LIST\4\0\0\0abcd"), NOISE)
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        assert np.array_equal(from_pipe(streaming_header(wav, size)), NOISE)
    assert len(from_pipe(wav_bytes(tone(48_000, channels=2), 48_000))) == 32_000


@pytest.mark.parametrize(
    ("content", "uri", "error"),
    [
        (wav_bytes(NOISE, subtype="PCM_24"), "stdin:", "24-bit samples in WAV format 1; accepted: 16-bit PCM"),
        (wav_bytes(NOISE), "stdin:?rate=48000", "its WAV header says rate 16000; leave \\?rate out"),
        (wav_bytes(NOISE)[:30], "stdin:", "header"),
        (wav_bytes(NOISE)[:16] + bytes([255]) * 1_000, "stdin:", "the WAV header is damaged"),
        (b"fLaC" + bytes(100), "stdin:", "this is FLAC, not raw samples"),
    ],
)
def test_a_stream_that_is_not_what_it_should_be_is_explained(content, uri, error):
    with pytest.raises(AudioError, match=error):
        from_pipe(content, uri)


SCRIPT = """
import sys
from edgekws.audio import open_source
from edgekws.errors import AudioError
from edgekws.values import SAMPLE_RATE_HZ
try:
    with open_source("stdin:") as source:
        for chunk in source.chunks():
            sys.stdout.buffer.write(chunk.samples.tobytes())
            sys.stdout.flush()
except AudioError as error:
    sys.exit(str(error))
"""


def test_a_process_hears_what_is_piped_into_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=NOISE.tobytes(), capture_output=True)
    (tmp_path / "samples").write_bytes(NOISE.tobytes())
    with open(tmp_path / "samples", "rb") as redirected:
        again = subprocess.run([sys.executable, "-c", SCRIPT], stdin=redirected, capture_output=True)

    assert done.stdout == NOISE.tobytes() == again.stdout


def test_standard_input_that_nobody_writes_to_is_explained():
    import pty

    terminal, other_end = pty.openpty()
    on_terminal = subprocess.run([sys.executable, "-c", SCRIPT], stdin=other_end, capture_output=True, text=True)
    os.close(terminal), os.close(other_end)
    closed = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&-', sys.executable, SCRIPT], capture_output=True, text=True)

    assert "standard input is a terminal" in on_terminal.stderr
    assert "standard input is closed" in closed.stderr


def test_close_in_a_signal_handler_ends_a_silent_pipe():
    on_signal = "import signal; signal.signal(signal.SIGTERM, lambda *_: source.close()); print('open')"
    script = SCRIPT.replace("        for", f"        {on_signal}\n        for")
    process = subprocess.Popen([sys.executable, "-u", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"open\n"
    process.send_signal(signal.SIGTERM)

    assert process.wait(30) == 0
    process.communicate()


@pytest.mark.parametrize(("stalls_behind", "uri"), [(4000, "stdin:"), (4001, "stdin:"), (20_000, "stdin:?rate=48000")])
def test_standard_input_that_stalls_is_told_once_and_a_gap_when_it_goes_on(stalls_behind, uri, caplog):
    """On a whole and on half a sample, and with samples that the resampler holds back."""
    read_end, write_end = os.pipe()
    now_s, told, data = [100.0], [], NOISE[:30_000].tobytes()

    def deaf(why):
        told.append(why)
        now_s[0] += 7.5
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(data[stalls_behind:])

    os.write(write_end, data[:stalls_behind])
    with StdinSource(uri, uri.removeprefix("stdin:"), read_end, stall_s=0.4, clock=lambda: now_s[0]) as source:
        source.on_deaf = deaf
        chunks = list(source.chunks())
    os.close(read_end)
    at = np.cumsum([0] + [len(chunk.samples) + chunk.gap_samples for chunk in chunks])

    assert told == ["no samples come on standard input"]
    behind = (len(data) - stalls_behind) // (2 if uri == "stdin:" else 6)  # what came right after it is not lost
    (gap,) = [chunk.gap_samples for chunk in chunks if chunk.gap_samples]
    assert abs(gap - (120_000 - behind)) <= 1 and not chunks[0].gap_samples
    assert [chunk.first_sample for chunk in chunks] == [int(i) + chunk.gap_samples for i, chunk in zip(at, chunks, strict=False)]
    if uri == "stdin:":
        assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), NOISE[:30_000])
    else:
        assert at[-1] == gap + 10_000
    lost_s = gap / SAMPLE_RATE_HZ
    assert caplog.messages == [f"{uri}: no samples come on standard input", f"{uri}: listening again, {lost_s:.1f} s lost"]


def test_a_writer_that_starts_late_is_waited_for_and_nothing_was_lost(caplog):
    read_end, write_end = os.pipe()
    now_s, told = [100.0], []

    def deaf(why):
        told.append(why)
        now_s[0] += 75.0
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(NOISE[:30_000].tobytes())

    with StdinSource("stdin:", "", read_end, stall_s=0.4, clock=lambda: now_s[0]) as source:
        source.on_deaf = deaf
        chunks = list(source.chunks())
    os.close(read_end)

    assert told == ["no samples come on standard input"]
    assert [chunk.gap_samples for chunk in chunks] == [1] + [0] * (len(chunks) - 1)  # that it listens now
    assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), NOISE[:30_000])
    assert caplog.messages[1:] == ["stdin:: listening again, 0.0 s lost"]


def test_after_an_outage_of_standard_input_live_sound_is_not_taken_for_what_came_late():
    """Pieces of 20 ms at real time after two seconds of nothing, by the real clock."""
    read_end, write_end = os.pipe()
    ended = threading.Event()

    def writer():
        time.sleep(2)
        while not ended.wait(0.02):
            os.write(write_end, NOISE[:320].tobytes())
        os.close(write_end)

    writing = threading.Thread(target=writer)
    os.write(write_end, NOISE[:320].tobytes())
    with StdinSource("stdin:", "", read_end, stall_s=0.6) as source:
        chunks = source.chunks()
        next(chunks)
        writing.start()
        first = next(chunks)
        source.close()
    ended.set()
    writing.join()
    os.close(read_end)

    assert first.gap_samples > 1.5 * SAMPLE_RATE_HZ
    assert len(first.samples) < 1.5 * SAMPLE_RATE_HZ


def test_of_standard_input_that_comes_seldom_and_much_at_a_time_nothing_is_lost():
    """A second of sound each second, but all at once: told once, and known from then on."""
    read_end, write_end = os.pipe()
    now_s, told = [100.0], []

    def writer():
        for _ in range(3):
            time.sleep(1)
            now_s[0] += 1
            os.write(write_end, NOISE[:SAMPLE_RATE_HZ].tobytes())
        os.close(write_end)

    with StdinSource("stdin:", "", read_end, stall_s=0.6, clock=lambda: now_s[0]) as source:
        source.on_deaf = told.append
        writing = threading.Thread(target=writer)
        writing.start()
        chunks = list(source.chunks())
        writing.join()
    os.close(read_end)

    assert len(told) == 1 and sum(chunk.gap_samples for chunk in chunks) == 1  # that it listens again
    assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), np.tile(NOISE[:SAMPLE_RATE_HZ], 3))


def test_of_standard_input_that_comes_late_nothing_is_lost_though_a_pipe_holds_less():
    """Two seconds and a half of it, where a pipe takes two."""
    read_end, write_end = os.pipe()
    now_s = [100.0]

    def write():
        os.write(write_end, NOISE[320:].tobytes())
        os.close(write_end)

    writing = threading.Thread(target=write)

    def late(why):
        now_s[0] += len(NOISE[320:]) / SAMPLE_RATE_HZ
        writing.start()

    os.write(write_end, NOISE[:320].tobytes())
    with StdinSource("stdin:", "", read_end, stall_s=0.4, clock=lambda: now_s[0]) as source:
        source.on_deaf = late
        chunks = list(source.chunks())
    writing.join()
    os.close(read_end)

    assert sum(chunk.gap_samples for chunk in chunks) == 1  # that it listens again
    assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), NOISE)


@pytest.mark.parametrize("stopped_s", [2.5, 3.0, 10.0])
def test_what_standard_input_lost_while_this_process_was_stopped_is_a_gap_behind_what_the_pipe_held(stopped_s, caplog):
    read_end, write_end = os.pipe()
    now_s, told = [100.0], []
    with StdinSource("stdin:", "", read_end, clock=lambda: now_s[0]) as source:
        source.on_deaf = told.append
        chunks = source.chunks()
        found = []
        for samples, passed_s in ((NOISE[:320], stopped_s), (NOISE[320:30_000], 0.0), (NOISE[30_000:], 0.0)):
            os.write(write_end, samples.tobytes())
            found.append(next(chunks))
            now_s[0] += passed_s
        os.close(write_end)
        assert list(chunks) == []
    os.close(read_end)

    lost = round(stopped_s * SAMPLE_RATE_HZ) - len(NOISE[320:]) if stopped_s >= STALL_S else 0
    assert [chunk.gap_samples for chunk in found] == [0, 0, lost]
    assert np.array_equal(np.concatenate([chunk.samples for chunk in found]), NOISE)
    assert told == [] and len(caplog.messages) == bool(lost)


def test_of_standard_input_that_waits_for_whoever_reads_it_nothing_is_lost_while_this_process_is_stopped():
    """Ten seconds, and a writer that gives at once what a pipe takes."""
    read_end, write_end = os.pipe()
    now_s, samples = [100.0], np.tile(NOISE, 5)

    def write():
        os.write(write_end, samples.tobytes())
        os.close(write_end)

    writing = threading.Thread(target=write)
    writing.start()
    with StdinSource("stdin:", "", read_end, clock=lambda: now_s[0]) as source:
        chunks = source.chunks()
        found = [next(chunks)]
        now_s[0] += 10.0
        found += chunks
    writing.join()
    os.close(read_end)

    assert not any(chunk.gap_samples for chunk in found)
    assert np.array_equal(np.concatenate([chunk.samples for chunk in found]), samples)


def test_standard_input_that_ends_while_it_is_waited_for_ends_in_order():
    read_end, write_end = os.pipe()
    os.write(write_end, NOISE[:20_000].tobytes())
    with StdinSource("stdin:", "", read_end, stall_s=0.2) as source:
        source.on_deaf = lambda why: os.close(write_end)

        assert np.array_equal(heard(source), NOISE[:20_000])
    os.close(read_end)


def run_clock(clock, start_s, blocks, *, drift=0.0, late_s=lambda block: 0.0):
    """Feed blocks of 80 ms captured from `start_s` on. Returns (block, ms lost) where something was."""
    lost = [(block, clock.lost_s(1280, start_s + block * 0.08 * (1 + drift) + late_s(block), False)) for block in range(blocks)]
    return [(block, round(lost_s * 1000)) for block, lost_s in lost if lost_s]


def test_a_drifting_clock_and_late_blocks_are_no_loss():
    for drift in (-2e-4, 0.0, 2e-4):
        jitter = np.random.default_rng(1).uniform(-0.03, 0.05, 45_000)  # an hour
        assert run_clock(SampleClock(16_000), 5.0, 45_000, drift=drift, late_s=lambda block, jitter=jitter: jitter[block]) == []
    assert run_clock(SampleClock(16_000), 5.0, 400, late_s=lambda block: 2.0 if block % 20 == 7 else 0.0) == []


def test_samples_that_vanish_without_a_word_are_found_within_two_seconds():
    found = run_clock(SampleClock(16_000), 5.0, 400, drift=1e-4, late_s=lambda block: 0.5 if block >= 200 else 0.0)

    assert len(found) == 1
    assert 200 <= found[0][0] <= 225 and abs(found[0][1] - 500) < 20


def test_an_overrun_that_the_driver_reports_is_a_gap_at_once():
    clock = SampleClock(16_000)
    run_clock(clock, 5.0, 100)

    assert abs(clock.lost_s(1280, 5.0 + 100 * 0.08 + 0.3, True) - 0.3) < 0.01
    assert run_clock(clock, 5.0 + 101 * 0.08 + 0.3, 100) == []
    assert clock.lost_s(1280, 5.0 + 201 * 0.08 + 0.3, True) > 0  # too short to measure, and yet not nothing


def test_a_late_block_right_after_an_overrun_is_not_the_same_loss_again():
    clock = SampleClock(16_000)
    run_clock(clock, 5.0, 100)
    at_s = 5.0 + 101 * 0.08 + 0.3

    assert clock.lost_s(1280, at_s - 0.08, True) > 0
    assert run_clock(clock, at_s, 200, late_s=lambda block: 0.15 if block == 0 else 0.0) == []
    lost = run_clock(clock, at_s + 200 * 0.08 + 0.5, 100)  # and what is lost later is found as ever
    assert len(lost) == 1 and abs(lost[0][1] - 500) < 20


def test_importing_it_loads_no_vendor_library():
    script = "import sys, edgekws.audio; print({'sounddevice', 'soundfile', 'soxr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])

    assert done.stdout.strip() == "set()"
