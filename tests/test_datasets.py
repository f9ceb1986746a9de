"""The published layouts, in small: real folders, real wav and opus files, no mocks."""

import csv
import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from edgekws.errors import EdgekwsError
from edgekws.evaluation import read_manifest, read_segments
from edgekws.training.datasets import (
    Utterance,
    as_corpus,
    is_for_training,
    layout,
    load,
    load_corpus,
    load_gsc,
    load_hey_snapdragon,
    load_hey_snips,
    load_mswc,
)


def tone(path: Path, seconds: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = (1000 * np.sin(np.arange(int(16_000 * seconds)) * 0.1)).astype(np.int16)
    opus = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {}
    soundfile.write(path, samples, 16_000, **opus)
    return path


def splits_by_speaker(utterances: list[Utterance]) -> dict[str, set[str]]:
    splits = defaultdict(set)
    for one in utterances:
        splits[one.speaker].add(one.split)
    return dict(splits)


@pytest.fixture
def gsc(tmp_path):
    for name in ("yes/0a7c2a8d_nohash_0", "yes/0a7c2a8d_nohash_1", "no/0a7c2a8d_nohash_0", "yes/c1d39ce8_nohash_0", "no/105a0eea_nohash_0"):
        tone(tmp_path / f"{name}.wav")
    tone(tmp_path / "_background_noise_/running_tap.wav", 2.0)
    (tmp_path / "_background_noise_/README.md").write_text("noise")
    (tmp_path / "validation_list.txt").write_text("yes/c1d39ce8_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/105a0eea_nohash_0.wav\n")
    return tmp_path


def mswc_row(word: str, number: int, speaker: str, valid: str = "TRUE") -> list[str]:
    return [f"{word}/common_voice_en_{number}.opus", word, valid, speaker, "FEMALE"]


MSWC_ROWS = {
    "train": [mswc_row("aachen", 1, "s1"), mswc_row("aachen", 2, "s2"), mswc_row("zürich", 3, "s1")],
    "dev": [mswc_row("aachen", 4, "s3")],
    "test": [mswc_row("zürich", 5, "s4"), mswc_row("zürich", 6, "s5", "FALSE")],
}


def write_table(path: Path, header: str, rows: list[list[str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


@pytest.fixture
def mswc(tmp_path):
    """One language with both kinds of lists, as the splits archive has them."""
    english = tmp_path / "en"
    for rows in MSWC_ROWS.values():
        for link, *_ in rows:
            tone(english / "clips" / link, 1.0)
    write_table(
        english / "en_splits.csv", "SET,LINK,WORD,VALID,SPEAKER,GENDER", [[s.upper(), *r] for s, rows in MSWC_ROWS.items() for r in rows]
    )
    for split, rows in MSWC_ROWS.items():
        write_table(english / f"en_{split}.csv", "LINK,WORD,VALID,SPEAKER,GENDER", rows)
    return tmp_path


@pytest.fixture
def hey_snips(tmp_path):
    for split, worker in (("train", 12), ("dev", 7), ("test", 40)):
        entries = []
        for number, hot in enumerate((1, 0)):
            name = f"audio_files/{split}-{number}.wav"
            tone(tmp_path / name, 0.5)
            entries.append({"duration": 0.5, "worker_id": worker, "audio_file_path": name, "id": f"{split}-{number}", "is_hotword": hot})
        (tmp_path / f"{split}.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.fixture
def hey_snapdragon(tmp_path):
    for keyword in ("hey_android", "hey_snapdragon", "hi_galaxy", "hi_lumina"):
        for speaker in ("ana", "bo"):
            tone(tmp_path / keyword / speaker / "1.wav")
    (tmp_path / "hi_galaxy" / "bo" / "._1.wav").write_bytes(b"not audio")
    return tmp_path


CORPUS_HEADER = "path,kind,label,speaker,speaker_basis,take,split,duration_s"


@pytest.fixture
def corpus(tmp_path):
    rows = [
        ["kw/jarvis/a_0.opus", "keyword", "jarvis", "a", "clustered", "0", "enrol", "0.5"],
        ["kw/jarvis/a_1.opus", "keyword", "jarvis", "a", "clustered", "1", "test", "0.5"],
        ["neg/books_0.opus", "negative", "speech-en", "", "", "0", "negative", "2.0"],
        ["noise/rain.opus", "noise", "rain", "", "", "0", "fold1", "1.0"],
    ]
    for row in rows:
        tone(tmp_path / row[0], float(row[-1]))
    write_table(tmp_path / "manifest.csv", CORPUS_HEADER, rows)
    segments = [["neg/books_0.opus", "0.0", "0.8", "r1", "one.flac"], ["neg/books_0.opus", "1.2", "0.8", "r2", "two.flac"]]
    write_table(tmp_path / "segments.csv", "path,start_s,duration_s,speaker,source_path", segments)
    return tmp_path


def test_hey_snips_is_measured_on_whom_training_leaves_out(hey_snips):
    """Three takes of a worker enrol, the others are the test; of whom there are three takes nothing can be tested."""
    for split, worker, takes in (("train", 12, 5), ("test", 7, 3), ("test", 40, 5)):
        entries = json.loads((hey_snips / f"{split}.json").read_text())
        for i in range(takes):
            name = f"audio_files/{worker}-{i}.wav"
            tone(hey_snips / name, 0.5)
            entries.append({"duration": 0.5, "worker_id": f"{worker} again", "audio_file_path": name, "is_hotword": 1})
        (hey_snips / f"{split}.json").write_text(json.dumps(entries))

    with as_corpus([hey_snips]) as folder:
        rows = read_manifest(folder)
        assert all((folder / row.path).is_file() for row in rows)

    said = [(row.path, row.label, row.speaker, row.split) for row in rows if row.kind == "keyword"]
    enrol, test = (
        [(f"0/audio_files/40-{i}.wav", "hey snips", "40 again", split) for i in numbers]
        for split, numbers in (("enrol", range(3)), ("test", (3, 4)))
    )
    assert said == enrol + test
    assert [(row.path, row.kind, row.duration_s) for row in rows if row.kind != "keyword"] == [
        ("0/audio_files/dev-1.wav", "negative", 0.5),
        ("0/audio_files/test-1.wav", "negative", 0.5),
    ]
    assert not folder.exists()


def test_a_corpus_without_negatives_is_measured_beside_one_that_has_some(hey_snapdragon, tmp_path_factory):
    ours = tmp_path_factory.mktemp("ours")
    tone(ours / "neg/books_0.wav")
    tone(ours / "noise/rain.wav")
    write_table(
        ours / "manifest.csv",
        CORPUS_HEADER,
        [
            ["neg/books_0.wav", "negative", "speech-en", "", "", "0", "negative", "2.0"],
            ["noise/rain.wav", "noise", "rain", "", "", "0", "fold1", "1"],
        ],
    )
    write_table(ours / "segments.csv", "path,start_s,duration_s,speaker,source_path", [["neg/books_0.wav", "0.0", "0.8", "r1", "one.flac"]])
    for i in range(2, 6):
        tone(hey_snapdragon / "hi_galaxy" / "bo" / f"{i}.wav")

    with as_corpus([hey_snapdragon, ours]) as folder:
        rows = read_manifest(folder)
        assert [(one.path, one.end) for one in read_segments(folder)] == [("1/neg/books_0.wav", 12_800)]

    assert [(row.label, row.speaker, row.split) for row in rows[:5]] == [
        ("hi galaxy", "bo", split) for split in ["enrol"] * 3 + ["test"] * 2
    ]
    assert [(row.path, row.kind, row.label, row.split) for row in rows[5:]] == [
        ("1/neg/books_0.wav", "negative", "speech-en", "negative"),
        ("1/noise/rain.wav", "noise", "rain", "fold1"),
    ]


def test_the_noise_of_speech_commands_is_noise_to_be_measured_in(gsc):
    with as_corpus([gsc]) as folder:
        assert [(row.kind, row.label) for row in read_manifest(folder)] == [("noise", "_background_noise_")]


def test_a_corpus_with_a_manifest_is_measured_on_as_it_is(corpus):
    with as_corpus([corpus]) as folder:
        assert folder == corpus


def test_speech_commands_labels_are_folders_and_speakers_hashes(gsc):
    words = [one for one in load_gsc(gsc) if one.is_keyword]

    assert {one.label for one in words} == {"yes", "no"}
    assert splits_by_speaker(words) == {"0a7c2a8d": {"train"}, "c1d39ce8": {"dev"}, "105a0eea": {"test"}}


def test_speech_commands_noise_is_no_keyword_and_nobodys(gsc):
    noise = [one for one in load_gsc(gsc) if not one.is_keyword]

    assert noise == [Utterance(gsc / "_background_noise_/running_tap.wav", "_background_noise_", "", "train", False)]


def test_speech_commands_with_a_speaker_in_two_splits_is_refused(gsc):
    (gsc / "testing_list.txt").write_text("no/105a0eea_nohash_0.wav\nno/0a7c2a8d_nohash_0.wav\n")

    with pytest.raises(EdgekwsError, match="0a7c2a8d is in two splits"):
        load_gsc(gsc)


def test_speech_commands_name_without_a_speaker_is_refused(gsc):
    tone(gsc / "yes" / "mine.wav")

    with pytest.raises(EdgekwsError, match=r"mine\.wav.*HASH_nohash_NUMBER"):
        load_gsc(gsc)


@pytest.mark.parametrize("lists", ["en_splits.csv", "en_train.csv"])
def test_spoken_words_load_from_either_kind_of_list(mswc, lists):
    for table in (mswc / "en").glob("*.csv"):
        if (table.name == "en_splits.csv") != (lists == "en_splits.csv"):
            table.unlink()

    found = load_mswc(mswc)

    assert [one.split for one in found] == ["train"] * 3 + ["dev", "test"]
    assert {one.label for one in found} == {"aachen", "zürich"}
    assert {one.speaker for one in found} == {"s1", "s2", "s3", "s4"}, "the invalid row is left out"
    assert mswc / "en/clips/aachen/common_voice_en_1.opus" == found[0].path


def test_one_language_of_spoken_words_loads_like_all(mswc):
    assert load_mswc(mswc / "en") == load_mswc(mswc)


def test_spoken_words_lists_may_lie_in_a_folder_splits(mswc):
    before = load_mswc(mswc)
    (mswc / "en/splits").mkdir()
    for table in (mswc / "en").glob("*.csv"):
        table.rename(table.parent / "splits" / table.name)

    assert load_mswc(mswc) == before


def test_two_languages_of_spoken_words_are_both_there(mswc):
    link = "hola/common_voice_es_9.opus"
    tone(mswc / "es/clips" / link)
    write_table(mswc / "es/es_splits.csv", "SET,LINK,WORD,VALID,SPEAKER,GENDER", [["TEST", link, "hola", "True", "s9", "NA"]])

    found = load_mswc(mswc)

    assert len(found) == 6
    assert found[-1] == Utterance(mswc / "es/clips" / link, "hola", "s9", "test", True)


def test_hey_snips_tells_keyword_from_other_speech_and_keeps_workers_apart(hey_snips):
    found = load_hey_snips(hey_snips)

    assert {(one.label, one.is_keyword) for one in found} == {("hey snips", True), ("speech-en", False)}
    assert splits_by_speaker(found) == {"12": {"train"}, "7": {"dev"}, "40": {"test"}}
    assert {one.duration_s for one in found} == {0.5}


def test_hey_snips_entries_of_no_length_are_left_out(hey_snips):
    entries = json.loads((hey_snips / "dev.json").read_text())
    entries[0]["duration"] = 0.0
    (hey_snips / "dev.json").write_text(json.dumps(entries))

    assert len(load_hey_snips(hey_snips)) == 5


def test_hey_snapdragon_takes_keyword_and_speaker_from_folders(hey_snapdragon):
    found = load_hey_snapdragon(hey_snapdragon)

    assert {one.label for one in found} == {"hey android", "hey snapdragon", "hi galaxy", "hi lumina"}
    assert splits_by_speaker(found) == {"ana": {""}, "bo": {""}}
    assert len(found) == 8, "macOS's ._ files are no audio"


def test_a_corpus_without_splits_trains_on_four_fifths_of_its_speakers_the_same_each_time_whatever_they_say():
    said = [Utterance(Path("1.wav"), word, f"speaker {i}", "", True) for word in ("hi galaxy", "hi lumina") for i in range(1000)]

    heard = [is_for_training(one) for one in said]

    assert 770 < sum(heard[:1000]) < 830
    assert heard[:1000] == heard[1000:]
    assert heard[:8] == [True, False, True, True, False, True, True, True], "another version must not hear whom this one left out"


def test_a_corpus_with_splits_trains_on_its_train_split_alone(gsc):
    found = load_gsc(gsc)

    assert {one.split for one in found if is_for_training(one)} == {"train"}
    assert {one.split for one in found if not is_for_training(one)} == {"dev", "test"}


def test_our_corpus_gives_each_segment_of_a_negative_its_speaker_and_place(corpus):
    found = load_corpus(corpus)

    assert [(o.label, o.speaker, o.split, o.is_keyword) for o in found[:2]] == [
        ("jarvis", "a", "enrol", True),
        ("jarvis", "a", "test", True),
    ]
    assert [(o.speaker, o.start_s, o.duration_s) for o in found[2:4]] == [("r1", 0.0, 0.8), ("r2", 1.2, 0.8)]
    assert found[4] == Utterance(corpus / "noise/rain.opus", "rain", "", "fold1", False, 0.0, 1.0)


def test_the_real_corpus_loads_whole():
    if "EDGEKWS_CORPUS" not in os.environ:
        pytest.skip("EDGEKWS_CORPUS does not name the corpus' folder")
    root = Path(os.environ["EDGEKWS_CORPUS"])
    with open(root / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    found = load(root)

    assert {str(one.path.relative_to(root)) for one in found} == {row["path"] for row in rows}
    assert sum(row["kind"] == "keyword" for row in rows) == sum(one.is_keyword for one in found)


@pytest.mark.parametrize("name", ["gsc", "mswc", "hey_snips", "hey_snapdragon", "corpus"])
def test_each_layout_is_recognised_and_its_audio_can_be_read(name, request):
    root = request.getfixturevalue(name)
    own = {"gsc": load_gsc, "mswc": load_mswc, "hey_snips": load_hey_snips, "hey_snapdragon": load_hey_snapdragon, "corpus": load_corpus}

    found = load(root)

    assert layout(root) == name
    assert found == own[name](root)
    for one in found:
        seconds = soundfile.info(one.path).duration
        assert one.start_s + (one.duration_s or 0.0) <= seconds


def test_unknown_layout_says_what_is_here_and_what_is_accepted(tmp_path):
    tone(tmp_path / "holiday.wav")

    with pytest.raises(EdgekwsError) as error:
        load(tmp_path)

    for wanted in ("holiday.wav", "validation_list.txt", "LANG_splits.csv", "train.json", "hey_snapdragon", "manifest.csv"):
        assert wanted in str(error.value)


@pytest.mark.parametrize("loader", [load, load_gsc, load_mswc, load_hey_snips, load_hey_snapdragon, load_corpus])
def test_missing_root_is_one_clear_error(loader, tmp_path):
    with pytest.raises(EdgekwsError, match="no such folder"):
        loader(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("gsc", "validation_list.txt"),
        ("gsc", "testing_list.txt"),
        ("hey_snips", "dev.json"),
        ("mswc", "en/en_test.csv"),
    ],
)
def test_missing_list_is_named(layout, name, request):
    root = request.getfixturevalue(layout)
    (root / "en/en_splits.csv").unlink(missing_ok=True)
    (root / name).unlink()

    with pytest.raises(EdgekwsError, match=f"{Path(name).name} is missing.*Found here"):
        load(root)


def test_spoken_words_without_any_list_say_which_archive_to_unpack(mswc):
    for table in (mswc / "en").glob("*.csv"):
        table.unlink()

    with pytest.raises(EdgekwsError, match=r"no LANG_splits\.csv.*unpack it here"):
        load(mswc)


@pytest.mark.parametrize(
    ("layout", "gone", "total"),
    [
        ("gsc", ["yes/c1d39ce8_nohash_0.wav"], 2),
        ("mswc", ["en/clips/aachen/common_voice_en_2.opus", "en/clips/aachen/common_voice_en_4.opus"], 5),
        ("hey_snips", ["audio_files/train-1.wav", "audio_files/test-0.wav"], 6),
        ("corpus", ["kw/jarvis/a_1.opus", "noise/rain.opus"], 4),
    ],
)
def test_listed_files_that_are_missing_are_counted_and_the_first_is_named(layout, gone, total, request):
    root = request.getfixturevalue(layout)
    for name in gone:
        (root / name).unlink()

    with pytest.raises(EdgekwsError) as error:
        load(root)

    assert f"{len(gone)} of the {total} files" in str(error.value)
    assert gone[0] in str(error.value)


def test_layouts_without_one_utterance_are_refused(tmp_path):
    for name in ("gsc", "mswc/clips", "snips", "qualcomm/hey_snapdragon", "ours"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("validation_list.txt", "testing_list.txt"):
        (tmp_path / "gsc" / name).touch()
    write_table(tmp_path / "mswc/en_splits.csv", "SET,LINK,WORD,VALID,SPEAKER,GENDER", [])
    for split in ("train", "dev", "test"):
        (tmp_path / f"snips/{split}.json").write_text("[]")
    write_table(tmp_path / "ours/manifest.csv", CORPUS_HEADER, [])

    for name in ("gsc", "mswc", "snips", "qualcomm", "ours"):
        with pytest.raises(EdgekwsError, match="not one utterance"):
            load(tmp_path / name)


def test_list_entry_without_a_needed_field_is_refused(hey_snips):
    (hey_snips / "test.json").write_text('[{"id": "x", "is_hotword": 1, "duration": 1.0, "audio_file_path": "audio_files/test-0.wav"}]')

    with pytest.raises(EdgekwsError, match=r"test\.json.*worker_id.*Accepted"):
        load(hey_snips)


def test_cut_off_json_is_refused(hey_snips):
    (hey_snips / "train.json").write_text('[{"id": "x", ')

    with pytest.raises(EdgekwsError, match=r"train\.json.*Unpack the archive again"):
        load(hey_snips)


def test_table_without_a_needed_column_is_refused(mswc):
    write_table(mswc / "en/en_splits.csv", "SET,LINK,WORD", [["TRAIN", "aachen/common_voice_en_1.opus", "aachen"]])

    with pytest.raises(EdgekwsError, match=r"no column VALID, SPEAKER.*SET, LINK, WORD"):
        load(mswc)


def test_table_that_was_cut_off_is_refused(corpus):
    whole = (corpus / "manifest.csv").read_text()
    (corpus / "manifest.csv").write_text(whole[: whole.index("fold1")].rstrip(","))

    with pytest.raises(EdgekwsError, match="row 5 has fewer cells"):
        load(corpus)


def test_list_that_is_not_text_is_refused(gsc):
    (gsc / "testing_list.txt").write_bytes(b"\xff\xfe\x00\x81")

    with pytest.raises(EdgekwsError, match=r"testing_list\.txt cannot be read"):
        load(gsc)


def test_set_that_no_layout_has_is_refused(mswc):
    row = ["HOLDOUT", *mswc_row("aachen", 1, "s1")]
    write_table(mswc / "en/en_splits.csv", "SET,LINK,WORD,VALID,SPEAKER,GENDER", [row])

    with pytest.raises(EdgekwsError, match="'HOLDOUT'"):
        load(mswc)


@pytest.mark.parametrize(
    ("old", "new", "said"), [("noise,rain", "weather,rain", "of kind 'weather'"), ("fold1,1.0", "fold1,long", "seconds")]
)
def test_our_corpus_with_a_wrong_cell_is_refused(corpus, old, new, said):
    manifest = corpus / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(old, new))

    with pytest.raises(EdgekwsError, match=said):
        load(corpus)
