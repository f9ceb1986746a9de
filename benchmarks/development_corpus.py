"""A corpus of development words, on which to choose what enrolment does: `edgekws eval --corpus DIR` measures on it as on any other.

    python benchmarks/development_corpus.py DIR --corpus CORPUS --negatives FOLDER [FOLDER …] [--users 6]

Text-to-speech users of nine words that training never spoke, who vary in pace, pitch, level, room and microphone from take to take; from
CORPUS the two real users of amelia and ey ordenador, and the noise that training heard (nothing of its evaluation side). The negatives
must be yours: any recordings of people without the words. The constants of edgekws/enrolment.py were chosen with 2.4 hours of the prompts
of Debian's asterisk-core-sounds-{en,es,fr,it,ru}-g722, decoded to WAV: five voices.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile

from edgekws.audio import read_recording
from edgekws.errors import EdgekwsError
from edgekws.training import synthesis
from edgekws.training.material import LEVEL_DBFS, TRAIN_NOISE_FOLDS, at_level, coloured, room_response, to_int16
from edgekws.values import SAMPLE_RATE_HZ

WORDS = ("hey nabu", "hey mycroft", "mycroft", "porcupine", "bumblebee", "snapdragon", "hey snips", "amelia", "ordenador")
REAL = ("amelia", "ey ordenador")
TAKES = 11  # the first three enrol
STREAM_S, PAUSE_S = 300, 0.4
COLUMNS = ("path", "kind", "label", "speaker", "take", "split", "duration_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--negatives", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--users", type=int, default=6, help="of each word")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    rows = real(arguments.corpus.absolute())
    for folder in arguments.negatives:
        rows += negatives(arguments.out, folder)
    for number, word in enumerate(WORDS):
        for user in range(arguments.users):
            rows += spoken(arguments.out, word, user, np.random.default_rng([77, number, user]))
        print(f"{word}: {arguments.users} users", flush=True)
    with (arguments.out / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def real(corpus: Path) -> list[Sequence[object]]:
    """The development users of the corpus, and the noise that training heard: rows that point there."""
    with (corpus / "manifest.csv").open(newline="") as file:
        found = [
            row for row in csv.DictReader(file) if row["label"] in REAL or (row["kind"] == "noise" and row["split"] in TRAIN_NOISE_FOLDS)
        ]
    return [(corpus / row["path"], *(row[c] + " (real)" * (row[c] in REAL) for c in COLUMNS[1:])) for row in found]


def negatives(out: Path, folder: Path) -> Iterator[Sequence[object]]:
    """The recordings of a folder in random order, joined to streams of five minutes."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".wav", ".flac", ".opus", ".ogg"))
    if not paths:
        raise EdgekwsError(f"{folder}: no recording in it. WAV, FLAC and Opus are read")
    rng = np.random.default_rng(1)
    pieces: list[np.ndarray] = []
    for i in rng.permutation(len(paths)):
        quiet = rng.standard_normal(round(PAUSE_S * SAMPLE_RATE_HZ)) * 10
        pieces += [read_recording(paths[i]), to_int16(quiet)]
        if sum(map(len, pieces)) >= STREAM_S * SAMPLE_RATE_HZ:
            yield write(out, f"neg-{folder.name}-{i}.flac", np.concatenate(pieces), "negative", folder.name, "", 0, "negative")
            pieces = []
    if pieces:
        yield write(out, f"neg-{folder.name}-rest.flac", np.concatenate(pieces), "negative", folder.name, "", 0, "negative")


def spoken(out: Path, word: str, user: int, rng: np.random.Generator) -> Iterator[Sequence[object]]:
    """One voice's takes. Festival's are too slow to make."""
    voice = synthesis.Voice("festival", "")
    while voice.program == "festival":
        voice = synthesis.random_voice(rng)
    microphone = int(rng.integers(1 << 30))
    take = 0
    while take < TAKES:
        pace, pitch = (float(np.exp(rng.normal(0, spread))) for spread in (0.12, 0.08))
        try:
            said = synthesis.say(word, synthesis.Voice(voice.program, voice.name, voice.speed * pace, voice.pitch * pitch))
        except EdgekwsError:  # a few variants refuse a few texts
            voice = synthesis.random_voice(rng)
            continue
        before, after = (np.zeros(round(rng.uniform(0.3, 0.6) * SAMPLE_RATE_HZ), np.int16) for _ in range(2))
        samples = at_level(np.concatenate([before, said, after]), LEVEL_DBFS + rng.uniform(-4, 4))
        if rng.random() < 0.5:
            samples = np.convolve(samples, room_response(rng, rng.uniform(0.1, 0.4)))[: len(samples)].astype(np.float32)
        samples = coloured(samples, np.random.default_rng(microphone) if rng.random() < 0.6 else rng)
        split = "enrol" if take < 3 else "test"
        name = f"{word.replace(' ', '_')}-{user}-{take:02}.flac"
        yield write(out, name, to_int16(samples + rng.standard_normal(len(samples)) * 8), "keyword", word, f"voice {user}", take, split)
        take += 1


def write(out: Path, name: str, samples: np.ndarray, kind: str, label: str, speaker: str, take: int, split: str) -> Sequence[object]:
    """One file, and its row of the manifest."""
    soundfile.write(out / name, samples, SAMPLE_RATE_HZ)
    return name, kind, label, speaker, take, split, len(samples) / SAMPLE_RATE_HZ


if __name__ == "__main__":
    main()
