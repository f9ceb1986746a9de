import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from edgekws import enrolment
from edgekws.cli import main
from edgekws.engines import load_engine
from edgekws.errors import EdgekwsError, UsageError
from edgekws.frontend import log_mel
from edgekws.model import find_model, load_model, rewrite_manifest
from edgekws.power import load_meter

torch = pytest.importorskip("torch")
pytest.importorskip("torch_pruning")
soundfile = pytest.importorskip("soundfile")
from test_power import ORIN_NANO, jetson  # noqa: E402
from test_round import ENDS_S, STREAM, TAKES, ambience  # noqa: E402

from edgekws.training import lives, trial  # noqa: E402
from edgekws.training import round as rounds  # noqa: E402

torch.set_num_threads(1)
# `edgekws bench adaptation --json`, as it is promised.
KEYS = {
    "user",
    "keyword",
    "network",
    "arm",
    "compression",
    "parameters",
    "file_kb",
    "seed",
    "condition",
    "recall_at_0.5",
    "recall_interval",
}
KEYS |= {"gate", "train_ms_per_step", "round_s", "cpu_s_per_audio_hour", "energy_j"}


def nathalie(corpus):
    """As if a network had been trained on one side of the corpus."""
    return frozenset([sha256_16(corpus / "neg/nathalie/0.wav")])


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus")


def make_corpus(root, noises=2, sides=("neg/nathalie", "neg/other"), prefix="", takes=6, fold="fold5", users=("slt",)):
    """Users with six takes each, a little speech to live among, a little to be tested on, one kind of noise."""
    rows = []

    def add(path, kind, label, speaker, split, samples):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / path, samples, 16_000)
        rows.append([path, kind, label, speaker, 0, split, len(samples) / 16_000, ""])

    for user in users:
        for i, take in enumerate(TAKES):
            add(f"kw/{user}/e{i}.wav", "keyword", "open sesame", user, f"{prefix}enrol", take)
        for i in range(takes):
            end = round(ENDS_S[i % 5] * 16_000)
            add(f"kw/{user}/t{i}.wav", "keyword", "open sesame", user, f"{prefix}test", STREAM[end - 20_000 : end + 4000])
    for side, talk in zip(sides, (ambience(4), ambience(6)[4:]), strict=False):
        add(f"{side}/0.wav", "negative", "talk", "", "negative", np.concatenate(talk))
    hum = (np.random.default_rng(0).standard_normal((max(noises, 1), 32_000)) * 500).astype(np.int16)
    for i in range(noises):
        add(f"noise/{i}.wav", "noise", "hum", "", fold, hum[i])
    with (root / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "kind", "label", "speaker", "take", "split", "duration_s", "source_repo"])
        table.writerows(rows)
    return root


@pytest.fixture
def in_process(monkeypatch):
    """Each life runs here, where torch is loaded already: a process of its own takes 3 s to load it."""
    monkeypatch.setattr(trial, "ProcessPoolExecutor", lambda *_, **__: contextlib.nullcontext(SimpleNamespace(map=map)))


def bench(corpus, *options):
    return main(["bench", "adaptation", "--corpus", str(corpus), "--networks", "edge-small", "--keyword", "open sesame", *options])


def test_a_life_gives_the_rows_that_are_promised_and_is_not_lived_again(corpus, tmp_path, capsys):
    """Only `before`, so that nothing is trained; what a round does is in test_round.py."""
    path = tmp_path / "rows.jsonl"
    assert bench(corpus, "--arms", "before", "--condition", "noise10", "--save", str(path), "--json") == 0
    rows = json.loads(capsys.readouterr().out)

    assert [row["condition"] for row in rows] == ["room", "clean"]
    assert all(set(row) >= KEYS for row in rows)
    for row in rows:  # half a minute of test speech: no false accept is allowed, and the next count is beyond two an hour
        assert row["recall_by_false_accepts"] == sorted(row["recall_by_false_accepts"]) and len(row["recall_by_false_accepts"]) == 2
        assert row["recall_at_0.5"] == row["recall_by_false_accepts"][0]
    assert {(row["user"], row["arm"], row["gate"], row["snr_db"], row["noise"]) for row in rows} == {("slt", "before", None, 10.0, "hum")}
    assert trial.saved(path) == rows

    assert bench(corpus, "--arms", "before", "--condition", "noise10", "--save", str(path)) == 0
    shown = capsys.readouterr()
    assert trial.saved(path) == rows
    assert "life 1" not in shown.err and shown.out.startswith("network")


def test_a_life_of_weeks_learns_from_all_of_them_and_each_row_is_of_what_listens(corpus, tmp_path, in_process, monkeypatch, capsys):
    """By the one recipe that trains nothing; what the others do is in test_round.py."""
    monkeypatch.setattr(trial, "ONCE_MORE", ("prototypes",))
    asked = []
    adapt = trial.adapt
    monkeypatch.setattr(trial, "adapt", lambda *args, **options: asked.append(options["incumbent"]) or adapt(*args, **options))
    path = tmp_path / "rows.jsonl"
    assert bench(corpus, "--arms", "before", "weeks", "--condition", "noise10", "--save", str(path)) == 0
    before, *weeks = [row for row in trial.saved(path) if row["condition"] == "clean"]

    assert [row["week"] for row in weeks] == [1, 2, 3]
    heard = [row["pseudo_positives"] for row in weeks]
    assert heard[0] == before["pseudo_positives"] > 0 and heard == sorted(set(heard))
    assert asked[0] is None and [row["gate"] == "promoted" for row in weeks[:-1]] == [one is not None for one in asked[1:]]
    shown = [line.split()[1:3] for line in capsys.readouterr().out.splitlines()]
    assert [[name, "1"] for name in ("before",)] + [["weeks,", str(n)] for n in (1, 2, 3)] == shown[1::2]


def test_published_corpora_are_lived_in_as_they_are(corpus, in_process, tmp_path, monkeypatch, capsys):
    """Qualcomm's folder has no negatives: another one lends them, and of the two who say its keyword nobody is added by text-to-speech."""
    said = tmp_path / "qualcomm"
    for i, take in enumerate([*TAKES, *(STREAM[round(end * 16_000) - 20_000 :][:24_000] for end in ENDS_S)]):
        (said / "hey_snapdragon/ana").mkdir(parents=True, exist_ok=True)
        soundfile.write(said / f"hey_snapdragon/ana/{i}.wav", take, 16_000)

    options = ["--keyword", "hey snapdragon", "--arms", "before", "--json"]
    assert main(["bench", "adaptation", "--corpus", str(said), "--corpus", str(corpus), *options]) == 0
    told = capsys.readouterr()
    rows = json.loads(told.out)
    assert {(row["user"], row["keyword"]) for row in rows} == {("ana", "hey snapdragon")}
    assert rows[0]["spoken"] + rows[0]["takes"] == 5
    assert "1 users of the corpus can live" in told.err


def test_many_hours_of_negatives_are_drawn_from_and_few_are_taken_whole(monkeypatch):
    lasts_s = {f"{i}.wav": 600.0 for i in range(60)}
    some = lives._some_hours(list(lasts_s), lasts_s)

    assert 3600 * lives.MOST_HOURS <= 600 * len(some) < 3600 * lives.MOST_HOURS + 601
    assert some == sorted(some, key=list(lasts_s).index) and some != list(lasts_s)[: len(some)]
    assert lives._some_hours(some[:6], lasts_s) == some[:6]


def test_an_utterance_in_which_a_reader_says_the_keyword_is_no_negative(corpus):
    header, said = "path,start_s,duration_s,speaker,source_path\n", "neg/other/0.wav,1.0,2.0,reader,data/arctic_b0358_7.wav\n"
    (corpus / "segments.csv").write_text(header + said)
    seven, zero = (np.concatenate(list(lives.test_speech(corpus, keyword, nathalie(corpus)))) for keyword in ("digit-seven", "digit-zero"))

    assert len(seven) > 48_000
    assert np.array_equal(zero, np.concatenate([seven[:16_000], seven[48_000:]]))


def test_a_copy_of_a_network_lives_as_the_packaged_one_and_another_seed_is_another_room(corpus, in_process, tmp_path, capsys):
    shutil.copytree(find_model("edge-small"), tmp_path / "copy")
    rows = []
    for options in ([], ["--networks", str(tmp_path / "copy")], ["--first-seed", "1"]):
        assert bench(corpus, "--arms", "before", *options, "--json") == 0
        rows.append([row | {"network_us_per_hop": 0, "cpu_s_per_audio_hour": 0} for row in json.loads(capsys.readouterr().out)])

    assert rows[0] == rows[1]
    assert [{row["seed"] for row in each} for each in rows] == [{0}, {0}, {1}]


def test_in_a_household_all_are_enrolled_and_tested_and_guests_do_not_speak(in_process, tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", users=("ann", "bob", "cy", "eve"))
    assert bench(corpus, "--arms", "before", "--household", "2", "--guests", "1", "--json") == 0
    shown = capsys.readouterr()
    (room, clean) = json.loads(shown.out)
    assert "households of 3: 1" in shown.err
    assert (room["user"], room["takes_of"], room["takes"], room["spoken"]) == ("ann+bob (cy)", {"ann": 3, "bob": 3, "cy": 3}, 9, 6)

    alone = trial.people(corpus, ["open sesame"], 1)
    (_, single) = trial._life((corpus, alone, 0, 10.0, load_model(find_model("edge-small")), (("before", 1.0),), False, 0, frozenset()))
    assert "takes_of" not in single and single["heard"] == clean["heard"][:3]


def test_a_household_is_worse_where_one_of_it_is():
    before = {"user": "ann+bob", "takes": 20, "heard": "1" * 10 + "0" * 10, "takes_of": {"ann": 10, "bob": 10}}
    assert not trial.significantly_worse(before, before)
    assert trial.significantly_worse({**before, "heard": "0" * 10 + "1" * 10}, before)
    one = {name: before[name] for name in ("user", "takes", "heard")}
    assert not trial.significantly_worse({**one, "heard": "0" * 10 + "1" * 10}, one)


def test_a_round_has_the_energy_that_the_meter_counted_and_one_beside_others_says_why_not(corpus, tmp_path, monkeypatch):
    """By the meter of an Orin Nano as recorded, 4.775 W at its input; two steps on little speech."""
    few = rounds.replay()[:2]
    monkeypatch.setattr(rounds, "replay", lambda: few)
    monkeypatch.setattr(trial, "adapt", functools.partial(trial.adapt, steps=2))
    monkeypatch.setattr(trial, "GAP_S", 600.0)  # a machine that is busy with other tests
    tree = jetson(tmp_path / "sys", ORIN_NANO)
    monkeypatch.setattr(trial, "load_meter", functools.partial(load_meter, "ina3221", sysfs=tree))
    (person,), factory = trial.people(corpus, ["open sesame"], None), load_model(find_model("edge-small"))

    rows = trial._life((corpus, [person], 0, 10.0, factory, (("enrol-only", 1.0),), True, 0, frozenset()))
    assert [row["energy_j"] for row in rows] == [pytest.approx(4.775 * rows[0]["round_s"], rel=0.02, abs=0.3)] * 2
    assert [row["why_no_energy"] for row in rows] == [None, None]
    table = [line.split() for line in trial.table(rows).splitlines()]
    assert [line[table[0].index("J")] for line in table[1:]] == [f"{rows[0]['energy_j']:.0f}"] * 2

    (row, _) = trial._life((corpus, [person], 0, 10.0, factory, (("enrol-only", 1.0),), False, 0, frozenset()))
    assert (row["energy_j"], row["why_no_energy"]) == (None, "other lives ran beside it (--workers 1 runs them one by one)")


def test_int8_is_measured_on_the_engine_that_would_listen_even_where_it_is_slower(corpus, monkeypatch):
    """Two steps on little speech."""
    few = rounds.replay()[:2]
    monkeypatch.setattr(rounds, "replay", lambda: few)
    monkeypatch.setattr(trial, "adapt", functools.partial(trial.adapt, steps=2))
    monkeypatch.setattr(rounds, "INT8_SLOWER", 0.0)
    tested = []
    by_engine = trial.by_engine
    monkeypatch.setattr(trial, "by_engine", lambda engine: tested.append(engine.precision) or by_engine(engine))
    (person,), factory = trial.people(corpus, ["open sesame"], None), load_model(find_model("edge-small"))

    whole, _, small, _ = trial._life(
        (corpus, [person], 0, 10.0, factory, (("onda1-hap", 4.0), ("onda1-hap-int8", 4.0)), False, 0, frozenset())
    )
    assert tested == ["int8"]
    assert small["arm"] == "onda1-hap-int8" and small["parameters"] == whole["parameters"]
    assert small["file_kb"] < whole["file_kb"] / 2
    assert small["deployed_recall"] == pytest.approx(whole["deployed_recall"], abs=0.34)  # three takes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arms", "onda9"], 'no arm "onda9". Accepted: before, prototypes, enrol-only'),
        (["--networks", "resnet"], 'no network "resnet" to adapt. Accepted: edge'),
        (["--condition", "room"], 'no condition "room" to live in. Accepted: noise10, noise5, noise0'),
        (["--keyword", "abracadabra"], 'nobody says "abracadabra" often enough. There are: open sesame, hey snips, hey snapdragon'),
        (["--compression", "0.5"], "no compression 0.5. Accepted: 1 to 1000"),
        (["--compression", "4", "nan"], "no compression nan. Accepted: 1 to 1000"),
        (["--users", "0"], "--users 0: accepted is a whole number from 1 on"),
        (["--seeds", "-1"], "--seeds -1: accepted is a whole number from 1 on"),
        (["--household", "0"], "--household 0: accepted is a whole number from 1 on"),
        (["--household", "9", "--keyword", "open sesame"], "--household and --guests: no keyword has 9 users who can live; the most is 1"),
        (["--guests", "-1"], "--guests -1: accepted is a whole number from 0 on"),
        (["--workers", "0"], "--workers 0: accepted is a whole number from 1 on"),
        (["--report", "a.md"], "--report is an option of edgekws bench listener, this is bench adaptation"),
    ],
)
def test_what_cannot_be_is_wrong_usage(corpus, capsys, options, words):
    assert main(["bench", "adaptation", "--corpus", str(corpus), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ({"sides": ("neg/a", "neg/b")}, "negatives without a training side are shared: 0.2 min speak in the stream, 0.4 min in the test"),
        ({"sides": ("neg/nathalie",)}, "negatives without a training side are shared: 0.2 min speak in the stream, 0.2 min in the test"),
        ({"fold": "fold1"}, "no kind of noise has two recordings outside of fold1 and fold2: all of the noise is lived under"),
        ({"noises": 1}, "no kind of noise has two recordings: half the time of one is lived under, the other half is in the test"),
        ({"noises": 0}, "the corpus has no noise that can be heard: pink noise is made in its place"),
    ],
    ids=["no sides", "one file", "training's noise", "one noise", "no noise"],
)
def test_what_a_corpus_lacks_is_made_up_for_and_said(in_process, tmp_path, lacking, words):
    said = []
    corpus = make_corpus(tmp_path / "corpus", **lacking)
    (rows,) = trial.run(corpus, arms=["before"], networks=["edge-small"], keywords=["open sesame"], say=said.append)

    assert [row["condition"] for row in rows] == ["room", "clean"]
    assert words in said


def test_a_corpus_with_both_sides_needs_no_note_and_names_alone_make_no_side(corpus):
    assert lives.look_over(corpus, nathalie(corpus)) == []
    assert lives._sides(corpus, nathalie(corpus))[:2] == (["neg/nathalie/0.wav"], ["neg/other/0.wav"])
    note = "negatives without a training side are shared: 0.2 min speak in the stream, 0.4 min in the test"
    assert lives.look_over(corpus) == [note]


def test_the_false_accepts_of_short_files_are_those_of_a_listener_that_heard_quiet_before():
    """From a fresh stream this one scores -3.3 at most, behind quiet -4.8."""
    model = load_model(find_model("edge-small"))
    frames = log_mel(STREAM[4800:36_800])
    both = {"room": [frames], "clean": [frames]}
    takes = {where: [(frames, 0)] for where in both}
    with contextlib.closing(load_engine(model)) as engine:
        enrolled = dataclasses.replace(enrolment.enrol("open sesame", "slt", TAKES, engine, model), threshold=-4.0)
        life = lives.Life([], None, None, 0, [], {}, takes, both)
        found = lives.measure(life, functools.partial(enrolment.embed_frames, engine=engine), [enrolled])

    assert [(found[where]["false_accepts"], found[where]["hours"]) for where in both] == [(0, 0.001)] * 2


@pytest.mark.parametrize("sides", [("neg/a", "neg/b"), ("neg/nathalie", "neg/librispeech/librispeech_000"), ("neg/a",)])
def test_speech_is_either_in_the_stream_or_in_the_test_and_always_there(tmp_path, sides):
    found = []
    for name in "ab":
        corpus = make_corpus(tmp_path / name, sides=sides)
        said = [lives.at_level(lives.read_recording(corpus / side / "0.wav"), lives.LEVEL_DBFS) for side in sides]
        stream = lives._stream([], corpus, np.random.default_rng(0))[0]
        found.append(np.concatenate([stream, *lives.test_speech(corpus, "open sesame")]))

    assert np.array_equal(np.sort(found[0]), np.sort(np.concatenate(said)))
    assert np.array_equal(*found)


def test_negatives_that_training_had_are_no_test(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus", sides=("neg/a",))
    trained = frozenset([hashlib.sha256((corpus / "neg/a/0.wav").read_bytes()).hexdigest()[:16]])
    monkeypatch.setattr(lives, "load_model", lambda path: SimpleNamespace(trained_on_sha256=trained))

    with pytest.raises(EdgekwsError, match=r"no negatives .*: 1 there, 1 of a second or more, 0 that no network was trained on"):
        list(trial.run(corpus, arms=["before"], networks=["edge-small"], keywords=["open sesame"]))


def test_a_recording_of_silence_is_no_noise(corpus):
    soundfile.write(corpus / "noise/0.wav", np.zeros(32_000, np.int16), 16_000)

    assert lives._noises(corpus)[0] == {"hum": [corpus / "noise/1.wav"]}
    for part in ("live", "test"):
        assert lives.Room(corpus, 0, 5.0).hear(np.zeros(48_000, np.float32), part, 1).std() > 100


def test_noise_with_an_offset_is_as_strong_as_the_same_without_and_an_offset_alone_is_no_noise(tmp_path):
    heard = []
    for offset in (0, 2000):
        corpus = make_corpus(tmp_path / str(offset))
        for path in (corpus / "noise").iterdir():
            soundfile.write(path, lives.read_recording(path) + np.int16(offset), 16_000)
        heard.append(lives.Room(corpus, 0, 5.0).hear(np.zeros(48_000, np.float32), "live", 1).std())
    assert heard[1] == pytest.approx(heard[0], rel=0.01)

    corpus = make_corpus(tmp_path / "constant")
    for path in (corpus / "noise").iterdir():
        soundfile.write(path, np.full(32_000, 700, np.int16), 16_000)
    assert "the corpus has no noise that can be heard: pink noise is made in its place" in lives.look_over(corpus)


def sha256_16(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_what_a_given_network_was_trained_on_is_left_out_of_its_lives_and_said(in_process, tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus", sides=("neg/nathalie", "neg/a"), takes=7, noises=3)
    with (corpus / "manifest.csv").open("a") as file:
        file.write("neg/b/0.wav,negative,talk,,0,negative,12,\n")
    (corpus / "neg/b").mkdir()
    soundfile.write(corpus / "neg/b/0.wav", np.concatenate(ambience(3)), 16_000)
    known = [corpus / name for name in ("neg/nathalie/0.wav", "neg/a/0.wav", "noise/0.wav", "kw/slt/t2.wav")]
    shutil.copytree(find_model("edge-small"), tmp_path / "mine")
    rewrite_manifest(tmp_path / "mine", {"trained_on_sha256": sorted(map(sha256_16, known))})
    said, jobs = [], []
    monkeypatch.setattr(trial, "_life", lambda job: jobs.append(job) or [{"keyword": "", "network": "", "snr_db": 0}])
    list(trial.run(corpus, arms=["before"], networks=[str(tmp_path / "mine")], keywords=["open sesame"], say=said.append))

    seen = jobs[0][-1]
    assert len(jobs[0][1][0].takes) == 6
    assert lives._sides(corpus, seen)[:2] == (["neg/nathalie/0.wav"], ["neg/b/0.wav"])
    assert lives._noises(corpus, seen)[0] == {"hum": [corpus / "noise/1.wav", corpus / "noise/2.wav"]}
    assert "3 files of the corpus left out: a network that is tried was trained on them" in said
    list(trial.run(corpus, arms=["before"], networks=["edge-small"], keywords=["open sesame"], say=said.append))
    assert sum("a network that is tried" in line for line in said) == 1


def test_an_arm_that_is_named_twice_is_tried_once(corpus, in_process, monkeypatch):
    ran = []
    monkeypatch.setattr(trial, "_life", lambda job: ran.append(job[5]) or [{"keyword": "", "network": "", "snr_db": 0}])
    twice = {"arms": ["before", "before", "onda1-hap"], "compressions": [4.0, 4.0]}
    list(trial.run(corpus, **twice, networks=["edge-small"], keywords=["open sesame"]))

    assert ran == [(("before", 1.0), ("onda1-hap", 4.0))]


def test_a_corpus_that_nobody_can_live_in_is_said(tmp_path):
    wanted = "none of its 1 users has 3 takes of split enrol and 5 of split test. Record more .*text-to-speech: hey snips, hey snapdragon$"
    with pytest.raises(EdgekwsError, match=wanted):
        list(trial.run(make_corpus(tmp_path / "few", takes=4)))
    with pytest.raises(EdgekwsError, match=r"manifest\.csv: cannot be read .*No such file"):
        list(trial.run(tmp_path / "nowhere", keywords=["open sesame"]))
    corpus = make_corpus(tmp_path / "torn")
    (corpus / "neg/other/0.wav").write_text("words")
    with pytest.raises(EdgekwsError, match=r"neg/other/0\.wav: not audio that is known"):
        list(trial.run(corpus))


def test_who_can_live_who_cannot_and_who_is_added_is_said(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus", prefix="seenkw-")
    with (corpus / "manifest.csv").open("a") as file:
        file.write("kw/e0.wav,keyword, open sesame ,bob,0,test,1,\n")
    synthetic = lives.Person("hey snips", "flite:slt", TAKES, [np.zeros(7 * 16_000, np.int16)])
    monkeypatch.setattr(trial, "spoken_people", lambda: [synthetic])
    said = []

    assert [one.speaker for one in trial.people(corpus, None, None, said.append)] == ["slt", "flite:slt"]
    assert said == [
        "1 users of the corpus can live, 1 cannot (3 takes of split enrol and 5 of split test); 1 of text-to-speech are added",
        "1 takes are longer than 6 s: any event inside one counts as its keyword",
    ]
    assert trial.people(make_corpus(tmp_path / "few", takes=4), ["hey snips"], None) == [synthetic]


def test_only_what_a_file_lacks_of_a_life_is_run(corpus, in_process, monkeypatch):
    ran = []
    life = {"user": "slt", "keyword": "open sesame", "network": "edge-small", "seed": 0, "snr_db": 5.0}
    before = {**life, "arm": "before", "compression": 1.0}
    pruned = {**life, "arm": "onda1-hap", "compression": 4.0}
    refused = {**life, "arm": "before", "refused": "a take is silent"}
    monkeypatch.setattr(trial, "_life", lambda job: ran.append(job[5]) or [before])
    wanted = {"arms": ["before", "onda1-hap"], "compressions": [4.0, 10.0], "networks": ["edge-small"], "keywords": ["open sesame"]}
    for done in ([], [before], [before, pruned], [refused]):
        list(trial.run(corpus, **wanted, rooms_db=[5.0], done=set(map(trial.life_of, done))))

    whole = (("before", 1.0), ("onda1-hap", 4.0), ("onda1-hap", 10.0))
    assert ran == [whole, whole[1:], whole[2:]]


def test_a_refused_enrolment_stands_under_the_table():
    refused = {"user": "bob", "keyword": "k", "network": "edge", "seed": 3, "snr_db": 5.0, "arm": "before", "refused": "a take is silent"}

    assert trial.table([row("before", 0.8), refused]).splitlines()[2:] == ["k, bob, edge, seed 3: a take is silent"]


def test_a_life_whose_process_is_killed_says_what_to_do(corpus, monkeypatch, capsys):
    class Killed(trial.ProcessPoolExecutor):
        def map(self, call, jobs):
            future = self.submit(os.getpid)
            os.kill(future.result(), signal.SIGKILL)
            return super().map(call, jobs)

    monkeypatch.setattr(trial, "ProcessPoolExecutor", Killed)
    assert bench(corpus, "--arms", "before") == 1
    assert "a life's process was ended from outside, most likely as memory ran out. A life takes up to 2 GB" in capsys.readouterr().err


def test_a_file_of_rows_that_was_cut_short_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert trial.saved(path) == []
    path.write_text('{"user": "a", "keyword": "k", "network": "edge", "seed": 0, "snr_db": 5.0}\n{"user": "a", "keyw')

    with pytest.raises(EdgekwsError, match=r"rows\.jsonl: not rows of bench adaptation, or cut short"):
        trial.saved(path)


def row(arm, recall, takes=40, gate=None):
    facts = {"recall_at_0.5": recall, "deployed_recall": recall, "fa_per_hour": 0.0, "parameters": 10, "gate": gate, "takes": takes}
    common = {"user": "u", "keyword": "k", "network": "edge", "seed": 0, "snr_db": 5.0, "arm": arm, "compression": 1.0, "condition": "room"}
    return {**common, **facts, "train_ms_per_step": None, "round_s": None, "energy_j": None, "network_us_per_hop": 1.0}


def test_worse_is_what_chance_does_not_explain():
    before = row("before", 0.8)

    assert trial.significantly_worse(row("random", 0.5, gate="promoted"), before)
    assert not trial.significantly_worse(row("random", 0.75, gate="promoted"), before)
    assert not trial.significantly_worse(row("random", 0.1), None)
    lines = trial.table([before, row("random", 0.5, gate="promoted"), {**row("scratch", 0.5), "gate": "it is worse"}]).splitlines()
    assert [line.split()[11] for line in lines] == ["worse", "0", "1", "0"]
    assert [line.split()[10] for line in lines] == ["refused", "0", "0", "1"]


def test_a_room_is_one_of_three():
    assert trial.room_db("noise0") == 0.0
    with pytest.raises(UsageError, match="no condition"):
        trial.room_db("quiet")
