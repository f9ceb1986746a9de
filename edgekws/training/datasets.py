"""Speech corpora in the layouts they are published in (LAYOUTS), as one list of utterances to train on, or as one corpus to measure on.

Downloads nothing, opens no audio.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgekws.errors import EdgekwsError

LAYOUTS = """\
layout          function             what the root folder holds
gsc             load_gsc             Google Speech Commands v0.02: WORD/HASH_nohash_N.wav, validation_list.txt, testing_list.txt
mswc            load_mswc            Multilingual Spoken Words: [LANG/]clips/WORD/*.opus, LANG_splits.csv or LANG_{train,dev,test}.csv
hey_snips       load_hey_snips       Hey Snips 1 and 2: train.json, dev.json, test.json, audio_files/
hey_snapdragon  load_hey_snapdragon  Qualcomm Keyword Speech: hey_snapdragon/SPEAKER/*.wav, hey_android, hi_galaxy, hi_lumina
corpus          load_corpus          ours: manifest.csv, segments.csv"""
QUALCOMM_KEYWORDS = ("hey_android", "hey_snapdragon", "hi_galaxy", "hi_lumina")
SETS = ("train", "dev", "test")
ENROL = 3  # recordings of a user
COLUMNS = ("path", "kind", "label", "speaker", "take", "split", "duration_s")


@dataclass(frozen=True)
class Utterance:
    """One stretch of one audio file, and what is said in it."""

    path: Path
    label: str
    """The keyword; of anything else what it is, "speech-en" or "rain"."""
    speaker: str
    """As the corpus names them; "" where it does not."""
    split: str
    """train, dev or test; "" where the corpus leaves splitting to us. Ours keeps its own words: enrol, test, extra, negative, fold1."""
    is_keyword: bool
    start_s: float = 0.0
    duration_s: float | None = None
    """None: to the end of the file, however long that is."""


def load(root: Path) -> list[Utterance]:
    """The utterances under `root`, whichever of the accepted layouts it has.

    Raises:
        EdgekwsError: no such folder, no such layout, a list is missing or damaged, files are missing, nothing was found.
    """
    loaders = {
        "gsc": load_gsc,
        "mswc": load_mswc,
        "hey_snips": load_hey_snips,
        "hey_snapdragon": load_hey_snapdragon,
        "corpus": load_corpus,
    }
    return loaders[layout(root)](root)


def layout(root: Path) -> str:
    """Which of the LAYOUTS `root` has, by its name there.

    Raises:
        EdgekwsError: no such folder, no such layout.
    """
    found = _names(root)
    if "manifest.csv" in found:
        return "corpus"
    if found & {"validation_list.txt", "testing_list.txt", "_background_noise_"}:
        return "gsc"
    if found & {f"{name}.json" for name in SETS}:
        return "hey_snips"
    if found & set(QUALCOMM_KEYWORDS):
        return "hey_snapdragon"
    if _mswc_languages(root):
        return "mswc"
    raise EdgekwsError(f"{root}: no layout that edgekws knows. {_here(root)}. Accepted:\n{LAYOUTS}")


@contextmanager
def as_corpus(roots: Sequence[Path]) -> Iterator[Path]:
    """A folder with a manifest.csv to measure on, while the context lasts; nothing is copied.

    One root that has a manifest is that folder. Else all are heard together, in whatever layouts they are. Of the published ones counts
    what is in no train split: where somebody said a keyword more than `ENROL` times, the first `ENROL` takes in the corpus' order enrol and
    the others are the test; what is no keyword is a negative, of Speech Commands noise.

    Raises:
        EdgekwsError: as `load`.
    """
    if len(roots) == 1 and (not roots[0].is_dir() or layout(roots[0]) == "corpus"):  # of what is not there, who measures has more to say
        yield roots[0]
        return
    with tempfile.TemporaryDirectory(prefix="edgekws-corpus-") as name:
        folder = Path(name)
        rows: list[dict[str, str]] = []
        segments: list[dict[str, str]] = []
        for i, root in enumerate(roots):
            (folder / str(i)).symlink_to(root.resolve())
            if layout(root) == "corpus":
                more, parts = (
                    _rows(root / table, ("path",)) if (root / table).exists() else [] for table in ("manifest.csv", "segments.csv")
                )
            else:
                more, parts = _to_measure_on(root), []
            for table, found in ((rows, more), (segments, parts)):
                table += [{**row, "path": f"{i}/{row['path']}"} for row in found]
        _write(folder / "manifest.csv", rows)
        if segments:
            _write(folder / "segments.csv", segments)
        yield folder


def _to_measure_on(root: Path) -> list[dict[str, str]]:
    """Rows as of our manifest.csv."""
    other = "noise" if layout(root) == "gsc" else "negative"
    takes: dict[tuple[str, str], list[dict[str, str]]] = {}
    rows = []
    for one in load(root):
        path, lasts = str(one.path.relative_to(root)), "" if one.duration_s is None else str(one.duration_s)
        row = {"path": path, "kind": "keyword", "label": one.label, "speaker": one.speaker, "duration_s": lasts}
        if not one.is_keyword and (one.split != "train" or other == "noise"):
            rows.append({**row, "kind": other, "split": other})
        elif one.is_keyword and one.split != "train":
            takes.setdefault((one.label, one.speaker), []).append(row)
    for said in takes.values():
        if len(said) > ENROL:
            rows += [{**row, "take": str(i), "split": "enrol" if i < ENROL else "test"} for i, row in enumerate(said)]
    return rows


def _write(table: Path, rows: Sequence[Mapping[str, str]]) -> None:
    columns = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row if name)]))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def is_for_training(one: Utterance) -> bool:
    """Whether it is in the train split; in a corpus without splits, whether its speaker's hash is: four fifths of the speakers are."""
    if one.split:
        return one.split == "train"
    return int.from_bytes(hashlib.sha256(one.speaker.encode()).digest(), "big") % 5 > 0


def load_gsc(root: Path) -> list[Utterance]:
    """Google Speech Commands v0.02. Who is in neither list is for training; the noise is too.

    The lists were made by hashing the speaker, so that nobody is in two splits; a tree where somebody is, is refused.
    """
    split_of: dict[Path, str] = {}
    for split, name in (("dev", "validation_list.txt"), ("test", "testing_list.txt")):
        for line in _text(root / name).split():
            if split_of.setdefault(root / line, split) != split:
                raise EdgekwsError(f"{line} is in validation_list.txt and in testing_list.txt: take both from one release of the corpus.")
    _must_exist(split_of, "validation_list.txt and testing_list.txt", root)
    found = []
    for wav in _glob(root, "*/*.wav"):
        word = wav.parent.name
        if word == "_background_noise_":
            found.append(Utterance(wav, word, "", "train", False))
            continue
        speaker, mark, _ = wav.stem.partition("_nohash_")
        if not mark:
            raise EdgekwsError(f"{wav}: no speaker in this name. Accepted: HASH_nohash_NUMBER.wav, as in Speech Commands v0.02.")
        found.append(Utterance(wav, word, speaker, split_of.get(wav, "train"), True))
    home: dict[str, Utterance] = {}
    for one in found:
        other = home.setdefault(one.speaker, one)
        if one.speaker and other.split != one.split:
            raise EdgekwsError(
                f"{root}: speaker {one.speaker} is in two splits, {other.path.relative_to(root)} ({other.split}) and "
                f"{one.path.relative_to(root)} ({one.split}). The lists must be those of this very release of the corpus."
            )
    return _some(found, root, "WORD/HASH_nohash_NUMBER.wav")


def load_mswc(root: Path) -> list[Utterance]:
    """Multilingual Spoken Words Corpus: one language (the folder that holds clips/) or several of them, rows marked invalid left out.

    Its splits are by clip: the corpus does not promise that a speaker is in one split only.
    """
    _names(root)
    found = []
    for language in _mswc_languages(root):
        tables = _mswc_tables(language)
        for table in tables:
            for row in _rows(table, ("LINK", "WORD", "VALID", "SPEAKER")):
                split = row["SET"].lower() if "SET" in row else table.stem.rpartition("_")[2]
                if split not in SETS:
                    raise EdgekwsError(f"{table}: {row['LINK']} is in the set {row.get('SET', split)!r}. Accepted: TRAIN, DEV, TEST.")
                if row["VALID"].lower() == "true":
                    found.append(Utterance(language / "clips" / row["LINK"], row["WORD"], row["SPEAKER"], split, True))
        _must_exist((one.path for one in found if language in one.path.parents), ", ".join(t.name for t in tables), language)
    return _some(found, root, "clips/WORD/common_voice_LANG_NUMBER.opus")


def load_hey_snips(root: Path) -> list[Utterance]:
    """Hey Snips, the first (2019) and the federated release, which share one layout. Entries of no length are left out.

    The federated release keeps every contributor in one split.
    """
    found = []
    for split in SETS:
        listed = root / f"{split}.json"
        try:
            entries = json.loads(_text(listed))
            for entry in entries:
                path, hot, seconds = root / entry["audio_file_path"], int(entry["is_hotword"]) == 1, float(entry["duration"])
                if seconds > 0:
                    found.append(Utterance(path, "hey snips" if hot else "speech-en", str(entry["worker_id"]), split, hot, 0.0, seconds))
        except (ValueError, TypeError, KeyError) as error:
            raise EdgekwsError(
                f"{listed}: {type(error).__name__}: {error}. Accepted: a JSON list of objects with audio_file_path, is_hotword, "
                "worker_id and duration, as published. Unpack the archive again."
            ) from error
    _must_exist((one.path for one in found), "train.json, dev.json and test.json", root)
    return _some(found, root, "audio_files/ID.wav")


def load_hey_snapdragon(root: Path) -> list[Utterance]:
    """Qualcomm Keyword Speech Dataset: those of its four keywords that are there. It has no splits: see `is_for_training`."""
    if not _names(root) & set(QUALCOMM_KEYWORDS):
        raise EdgekwsError(f"{root}: none of the folders {', '.join(QUALCOMM_KEYWORDS)} is here. {_here(root)}.")
    found = [
        Utterance(wav, keyword.replace("_", " "), wav.parent.name, "", True)
        for keyword in QUALCOMM_KEYWORDS
        for wav in _glob(root / keyword, "*/*.wav")
    ]
    return _some(found, root, "hey_snapdragon/SPEAKER/*.wav")


def load_corpus(root: Path) -> list[Utterance]:
    """Our corpus: a keyword clip or a noise is one utterance, a long negative is as many as segments.csv says sit in it."""
    segments: dict[str, list[dict[str, str]]] = {}
    if (root / "segments.csv").exists():
        for row in _rows(root / "segments.csv", ("path", "start_s", "duration_s", "speaker")):
            segments.setdefault(row["path"], []).append(row)
    found = []
    for row in _rows(root / "manifest.csv", ("path", "kind", "label", "speaker", "split", "duration_s")):
        if row["kind"] not in ("keyword", "negative", "noise"):
            raise EdgekwsError(f"{root / 'manifest.csv'}: {row['path']} is of kind {row['kind']!r}. Accepted: keyword, negative, noise.")
        for part in segments.get(row["path"], [{**row, "start_s": "0"}]):
            try:
                start_s, duration_s = float(part["start_s"]), float(part["duration_s"])
            except ValueError as error:
                raise EdgekwsError(f"{root}: {row['path']}: start_s and duration_s are seconds, like 1.5: {error}") from error
            one = Utterance(root / row["path"], row["label"], part["speaker"], row["split"], row["kind"] == "keyword", start_s, duration_s)
            found.append(one)
    _must_exist((one.path for one in found), "manifest.csv", root)
    return _some(found, root, "rows in manifest.csv")


def _names(root: Path) -> set[str]:
    if not root.is_dir():
        raise EdgekwsError(f"{root}: no such folder. Give the folder that the corpus was unpacked into.")
    return {path.name for path in root.iterdir()}


def _here(root: Path) -> str:
    names = sorted(_names(root))
    return f"Found here: {', '.join(names[:8]) or 'nothing'}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"


def _glob(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))  # "._x.wav" is macOS's, and no audio


def _text(path: Path) -> str:
    if not path.is_file():
        raise EdgekwsError(f"{path} is missing: who is in which split stands there. {_here(path.parent)}. Unpack the whole archive.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgekwsError(f"{path} cannot be read: {error}. Accepted: a text file in UTF-8. Unpack the archive again.") from error


def _rows(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(_text(table), newline=""))
    try:
        header, rows = reader.fieldnames or (), list(reader)
    except csv.Error as error:
        raise EdgekwsError(f"{table}: not a table of comma-separated values: {error}. Unpack the archive again.") from error
    if missing := [name for name in columns if name not in header]:
        raise EdgekwsError(f"{table}: no column {', '.join(missing)}. Its first line has {', '.join(header) or 'nothing'}.")
    for line, row in enumerate(rows, start=2):
        if None in row.values():
            raise EdgekwsError(f"{table}: row {line} has fewer cells than the first line. The file is cut off: unpack it again.")
    return rows


def _mswc_languages(root: Path) -> list[Path]:
    return [root] if (root / "clips").is_dir() else [path.parent for path in _glob(root, "*/clips")]


def _mswc_tables(language: Path) -> list[Path]:
    """LANG_splits.csv, which has everything, or the three that are one split each; beside clips/ or in splits/."""
    for folder in (language, language / "splits"):
        if whole := _glob(folder, "*_splits.csv"):
            return whole
        for one in _glob(folder, "*.csv"):
            prefix, _, split = one.stem.rpartition("_")
            if split in SETS:
                return [folder / (f"{prefix}_{name}.csv" if prefix else f"{name}.csv") for name in SETS]
    raise EdgekwsError(
        f"{language}: no LANG_splits.csv and no LANG_train.csv, LANG_dev.csv, LANG_test.csv beside clips/. "
        f'{_here(language)}. They come in an archive of their own ("splits"): unpack it here.'
    )


def _must_exist(paths: Iterable[Path], listed_in: str, root: Path) -> None:
    wanted = dict.fromkeys(paths)
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        raise EdgekwsError(
            f"{root}: {len(missing)} of the {len(wanted)} files named in {listed_in} are missing, "
            f"the first is {missing[0]}. Unpack the whole archive."
        )


def _some(found: list[Utterance], root: Path, wanted: str) -> list[Utterance]:
    if not found:
        raise EdgekwsError(f"{root}: not one utterance. Looked for {wanted}. {_here(root)}.")
    return found
