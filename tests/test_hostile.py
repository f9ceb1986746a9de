"""Hostile words, settings and files: one clear line and exit code 1 or 2, never a traceback. What there is to attack is read from the code.

Some seconds of each, always the same ones. `EDGEKWS_FUZZ=50 pytest tests/test_hostile.py` takes 50 times as many, by chance.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edgekws import cli
from edgekws.audio import read_recording
from edgekws.audio.stdin import StdinSource
from edgekws.cli import _parser, main
from edgekws.config import Settings, load_settings
from edgekws.engines import load_engine
from edgekws.enrolment import enrol
from edgekws.errors import ConfigError, EdgekwsError, StoreError
from edgekws.model import find_model, load_model
from edgekws.store import Store
from edgekws.values import Clip, Event

DEMO = Path(__file__).parent.parent / "edgekws" / "demo"
MORE = int(os.environ.get("EDGEKWS_FUZZ", "1"))
LONGEST_S = 0.5  # a command that runs for so long has taken what it was given, and is stopped
# fmt: off
HOSTILE = [
    "", " ", "-", "--", "-1", "0", "007", "1", "nan", "inf", "-inf", "1e309", "1e-400", "0x10", "9" * 40, "9" * 5000, "-" + "9" * 20, "½",
    "٣", "\0", "a\0b", "\udcff\udcfe", "\n", "\x1b[2J", "\u202eevil", "küche", "🤖" * 40, "x" * 5000, "%s%n{0}", "'; DROP TABLE events; --",
    ".", "..", "~", "no/such", "/no/such", "/dev/null", "/dev/full", "/dev/null/x", "/proc/self/x", "here.flac", "short", "folder",
    "mic:", "mic:x?rate=0", "file:", "file:folder", "file:here.flac?chunk=0", "file:here.flac?chunk=1", "stdin:?rate=x", "ftp://x", "stdin",
    "tcp://", "tcp://[::1", "tcp://127.0.0.1:99999", "tcp://127.0.0.1:-1", "tcp://256.1.1.1:80", "mqtt://", "mqtts://[", "http://x:y",
    "1h", "-1h", "999999999w", "1e9d", "9999-12-31", "0001-01-01", "2026-02-30", "params=0", "params=nan", "params=-1", "params=1e999",
    "latency_ms=0", "latency_ms=", "=", "energy_mj=1", "edge", "edge-small", "EDGE", "hap", "onda1", "clean", "paper", "all", "onnxruntime",
]
# fmt: on
TEXTS = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30))


def examples(count):
    return hypothesis_settings(
        max_examples=count * MORE,
        derandomize=MORE == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


class Enough(BaseException):
    """It ran for as long as it may here."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory to work in, and the settings and a state that has something of everything."""
    folder = tmp_path_factory.mktemp("hostile") / "deep" / "down"
    (folder / "folder").mkdir(parents=True)
    shutil.copy(DEMO / "enrol-1.flac", folder / "here.flac")
    (folder / "short").write_bytes(b"RI")
    (folder / "edgekws.toml").write_text(f'[audio]\nsource = "file:{folder / "here.flac"}"\n[store]\nroot = "{folder / "state"}"\n')
    store = Store(folder / "state")
    takes = [read_recording(path) for path in sorted(DEMO.glob("enrol-*.flac"))]
    enrolled = store.save_enrolment("open sesame", "ann", takes)
    wake = store.add_event(Event("open sesame", "ann", 1.0, 0.5, 1e9, 1.0, 0.1, "edge-3"))
    store.add_clip(Clip("positive", "open sesame", "ann", 1.0, 16000, 1.0, "woke", event=wake.id), np.ones(32000, np.int16))
    model = load_model(find_model("edge"))
    made = enrol("open sesame", "ann", takes, load_engine(model), model)
    store.save_prototypes(cli._cached_for(model), {f"{enrolled.id} False": made})
    store.close()
    (folder / "state").rename(folder / "untouched")
    with contextlib.suppress(ImportError):  # not within the time of a command
        import edgekws.training.adaptation
        import edgekws.training.pretrain
        import edgekws.training.trial  # noqa: F401
    return folder


@pytest.fixture
def place(prepared, monkeypatch):
    """It, worked in, with the state as it was."""
    shutil.rmtree(prepared / "state", ignore_errors=True)
    shutil.copytree(prepared / "untouched", prepared / "state")
    monkeypatch.chdir(prepared)
    for name, value in (("HOME", str(prepared)), ("PIP_NO_INDEX", "1"), ("PULSE_SERVER", "unix:/no/such")):
        monkeypatch.setenv(name, value)
    for name in ("STATE_DIRECTORY", "RUNTIME_DIRECTORY", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    return prepared


def edgekws(*words):
    """(exit code or None if it was stopped, what it said on stderr); whatever else it raises goes through."""
    stopped = False

    def enough(number, frame):
        nonlocal stopped
        stopped = True
        raise Enough

    out, err = io.StringIO(), io.StringIO()
    handlers, dup2, hook = list(logging.getLogger().handlers), os.dup2, sys.unraisablehook
    before = signal.signal(signal.SIGALRM, enough)
    sys.unraisablehook = lambda what: None  # Enough in a destructor
    os.dup2 = lambda *numbers: None  # main() has nobody behind it; pytest's own output goes on here
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            signal.setitimer(signal.ITIMER_REAL, LONGEST_S, 0.1)  # again, where a destructor swallowed the first
            code = main(list(words))
            signal.setitimer(signal.ITIMER_REAL, 0)
    except SystemExit as end:
        code = end.code
    except BaseException:
        if not stopped:  # else whatever it made of it, in the middle of anything
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.dup2, sys.unraisablehook = dup2, hook
        logging.getLogger().handlers[:] = handlers
    return None if stopped else code, err.getvalue()


def assert_clear(words, code, said):
    """None of them: a traceback, silence about a failure, an exit code that means something else."""
    assert code in (0, 1, 2, None), (words, code, said)
    if code is not None:
        assert "Traceback" not in said, (words, said)
        assert said.strip() or code == 0, words
        assert max(map(len, said.splitlines()), default=0) < 9000, (words, said)


# The command line.


def actions(parser):
    return [one for one in parser._actions if not isinstance(one, argparse._HelpAction)]


def commands():
    (chosen,) = [one for one in _parser()._actions if isinstance(one, argparse._SubParsersAction)]
    return chosen.choices


@st.composite
def usage(draw, parser, every=False):
    """Some of a command's options and positionals, each with words that somebody hostile chose."""
    words = []
    named = actions(parser)
    for one in named if every else draw(st.lists(st.sampled_from(named), max_size=4, unique_by=id)) if named else []:
        values = []
        if one.nargs != 0:
            kind = st.one_of(TEXTS, st.sampled_from(sorted(one.choices))) if one.choices else TEXTS
            values = draw(st.lists(kind, min_size=1, max_size=3 if one.nargs in ("+", "*") else 1))
        words += [*([one.option_strings[-1]] if one.option_strings else []), *values]
    return words


@pytest.mark.parametrize("command", sorted(commands()))
def test_no_word_on_the_command_line_ends_in_a_traceback(place, command):
    parser = commands()[command]
    configurable = "--config" in parser._option_string_actions

    @examples(12)
    @given(usage(parser))
    def attack(words):
        if configurable and "--config" not in words:
            words = ["--config", str(place / "edgekws.toml"), *words]
        assert_clear((command, *words), *edgekws(command, *words))

    attack()


@examples(40)
@given(st.lists(TEXTS, max_size=4))
def test_no_words_at_all_end_in_a_traceback(place, words):
    assert_clear(words, *edgekws(*words))


# The settings.


def keys():
    """(section, key, type) of everything that the file can say."""
    found = []
    for section, kind in typing.get_type_hints(Settings).items():
        if dataclasses.is_dataclass(kind):
            found += [(section, key, hint) for key, hint in typing.get_type_hints(kind).items()]
    (keyword,) = typing.get_args(typing.get_type_hints(Settings)["keyword"])[1:]
    return found + [('keyword."open sesame"', key, hint) for key, hint in typing.get_type_hints(keyword).items()]


def toml(text):
    return (
        json.dumps(text.encode("utf-8", "replace").decode(), ensure_ascii=True) if text.isascii() else f"'''{text.replace(chr(39), '')}'''"
    )


VALUES = st.one_of(
    TEXTS.map(toml),
    st.sampled_from(
        ["true", "nan", "-inf", "1e400", "-0.0", "9" * 400, "[]", "[[]]", '["", 1]', "{}", "{ a = 1 }", "1979-05-27", "07:32:00", ""]
    ),
    st.lists(TEXTS.map(toml), max_size=3).map(lambda items: f"[{', '.join(items)}]"),
    st.integers().map(str),
    st.floats().map(repr),
)


@pytest.mark.parametrize(("section", "key", "kind"), keys())
def test_no_value_of_a_key_ends_in_a_traceback(place, section, key, kind):
    """What the file may not say is refused; with what it may, `edgekws run` works or says why not."""
    path = place / "hostile.toml"
    base = {"audio": f'source = "file:{place / "here.flac"}"', "store": f'root = "{place / "state"}"'}
    runs = 0

    @examples(8)
    @given(VALUES)
    def attack(value):
        nonlocal runs
        tables = {**{name: [line] for name, line in base.items() if not line.startswith(f"{key} ")}}
        tables.setdefault(section, []).append(f"{key} = {value}")
        text = "".join(f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in tables.items())
        path.write_text(text, errors="surrogateescape")
        try:
            load_settings(path)
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            return
        if key != "root" and (runs < 2 or MORE > 1):  # what is accepted of a number is in range
            runs += 1
            assert_clear((section, key, value), *edgekws("run", "--config", str(path)))

    attack()


# Files.


def mutated(data, seed):
    """A real file, somewhat changed: bits, runs, lengths, its end."""
    rng = random.Random(seed)
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, size = (
            rng.randrange(len(found) + 1) if rng.random() < 0.5 else rng.randrange(min(len(found), 200) + 1),
            rng.choice((1, 2, 4, 64, 4096)),
        )
        what = rng.randrange(6)
        if what == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            found[at : at + size] = rng.randbytes(size)
        elif what == 2:
            found[at : at + 4] = rng.choice(
                (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0", b"-1e9", b"null")
            )
        elif what == 3:
            del found[at : at + size]
        elif what == 4:
            found[at:at] = found[at : at + size] * rng.choice((1, 2, 30))
        else:
            del found[at:]
        if not found:
            break
    return bytes(found)


SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """The same word as each kind of file."""
    folder = tmp_path_factory.mktemp("kinds")
    samples = read_recording(DEMO / "enrol-1.flac")
    for name, options in (
        ("a.wav", {"subtype": "PCM_16"}),
        ("b.wav", {"subtype": "FLOAT"}),
        ("c.flac", {}),
        ("d.opus", {"format": "OGG", "subtype": "OPUS"}),
    ):
        soundfile.write(folder / name, samples, 16_000, **options)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("which", range(4))
def test_a_damaged_recording_is_samples_or_one_line(place, recordings, which):
    data = recordings[which].read_bytes()
    path = place / f"damaged{recordings[which].suffix}"

    @examples(60)
    @given(SEEDS)
    def attack(seed):
        path.write_bytes(mutated(data, seed))
        try:
            samples = read_recording(path)
        except EdgekwsError as error:
            assert "\n" not in str(error)
        else:
            assert samples.dtype == np.int16 and len(samples)

    attack()


def test_a_damaged_wav_stream_is_samples_or_one_line(place, recordings):
    data = recordings[0].read_bytes()
    path = place / "stream"

    @examples(60)
    @given(SEEDS)
    def attack(seed):
        path.write_bytes(mutated(data, seed))
        with path.open("rb") as file, contextlib.suppress(EdgekwsError):
            source = StdinSource("stdin:", "", file.fileno())
            assert all(len(chunk.samples) for chunk in source.chunks())

    attack()


def test_a_damaged_settings_file_is_settings_or_one_line(place):
    data = (DEMO.parent.parent / "deploy" / "edgekws.toml").read_bytes()
    path = place / "damaged.toml"

    @examples(60)
    @given(SEEDS)
    def attack(seed):
        path.write_bytes(mutated(data, seed))
        with contextlib.suppress(ConfigError):
            load_settings(path)

    attack()


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "negatives.npz", "parity.npz", "prototypes.npz"])
def test_a_damaged_model_is_refused_in_one_line_even_where_its_hashes_are_right(place, name):
    path = place / "model"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(find_model("edge-small"), path)
    data, manifest = (path / name).read_bytes(), json.loads((path / "manifest.json").read_text())

    @examples(12)
    @given(SEEDS)
    def attack(seed):
        (path / name).write_bytes(mutated(data, seed))
        if name != "manifest.json":
            files = {**manifest["files"], name: hashlib.sha256((path / name).read_bytes()).hexdigest()}
            (path / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        for words in (("models", "show"), ("run", "--model")):
            words = (*words, str(path), "--config", str(place / "edgekws.toml"))
            assert_clear((name, seed, *words), *edgekws(*words))

    attack()


@pytest.mark.parametrize("name", ["edgekws.db", "enrolment.json", "take-1*.wav", "prototypes/*.npz", "clips/*.wav"])
def test_a_damaged_file_of_the_state_is_left_out_set_aside_or_one_line(place, name):
    config, state = place / "state.toml", place / "damaged-state"
    config.write_text((place / "edgekws.toml").read_text().replace(str(place / "state"), str(state)))

    @examples(8)
    @given(SEEDS)
    def attack(seed):
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(place / "untouched", state)
        found = sorted(state.rglob(name))
        assert found
        found[0].write_bytes(mutated(found[0].read_bytes(), seed))
        for words in (("run",), ("enroll", "--list"), ("clips", "list"), ("log", "--all")):
            assert_clear((name, seed, *words), *edgekws(*words, "--config", str(config)))
        with contextlib.closing(Store(state)) as store, contextlib.suppress(StoreError):
            for clip in store.clips():
                store.clip_samples(clip)

    attack()


def test_models_that_ship_are_not_refused_here(place):
    """The attacks above begin at something that works."""
    for name in ("edge", "edge-small"):
        assert load_model(find_model(name))
    assert edgekws("run", "--config", str(place / "edgekws.toml"))[0] in (0, None)
