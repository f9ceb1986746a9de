import csv
import dataclasses
import hashlib
import itertools
import json
import math
from importlib import resources

import numpy as np
import pytest

from edgekws import evaluation
from edgekws.audio import read_recording
from edgekws.detector import Detector, scores
from edgekws.engines import load_engine
from edgekws.enrolment import embed, enrol
from edgekws.errors import EdgekwsError, EnrolmentError, UsageError
from edgekws.evaluation import (
    CONDITIONS,
    Take,
    User,
    chance_of_fall,
    effective_takes,
    evaluate,
    events,
    false_accept_steps,
    measure,
    plot,
    poisson,
    read_manifest,
    report_table,
    wilson,
)
from edgekws.model import find_model, load_model
from edgekws.pipeline import Pipeline
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ, AudioChunk, Enrolled

DEMO = resources.files("edgekws") / "demo"


@pytest.fixture(scope="module")
def model():
    return load_model(find_model("edge-small"))


@pytest.fixture(scope="module")
def demo():
    """The bundled stream and where its keyword is, as (first, end) samples."""
    truth = json.loads((DEMO / "truth.json").read_text())
    spoken = [(round(one["start_s"] * SAMPLE_RATE_HZ), round(one["end_s"] * SAMPLE_RATE_HZ)) for one in truth["spoken"]]
    return read_recording(DEMO / "stream.flac"), spoken


@pytest.fixture
def corpus(tmp_path, demo):
    """Our own recordings as a corpus: two users, one with two takes to enrol from; negatives, noise, odd names."""
    return make_corpus(tmp_path, demo)


def make_corpus(root, demo, noise=True):
    import soundfile

    stream, spoken = demo
    rng = np.random.default_rng(0)
    rows = []

    def add(path, kind, label, speaker, take, split, samples):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / path, samples, SAMPLE_RATE_HZ)
        rows.append([path, kind, label, speaker, take, split, len(samples) / SAMPLE_RATE_HZ, "somewhere/else"])

    recordings = [read_recording(DEMO / f"enrol-{i}.flac") for i in (1, 2, 3)]
    for user, prefix in (("slt", ""), ("häns 2", "seenkw-")):
        for i, samples in enumerate(recordings if user == "slt" else recordings[:2]):
            add(f"kw/{user}/{i}.wav", "keyword", "open-sesame 7", user, i, f"{prefix}enrol", samples)
        for i, (first, end) in enumerate(spoken[:2]):
            add(
                f"kw/{user}/t{i}.wav",
                "keyword",
                "open-sesame 7",
                user,
                3 + i,
                f"{prefix}test",
                stream[first - 8000 : end + 8000 + 100 * len(prefix)],
            )
    add("kw/extra.wav", "keyword", "open-sesame 7", "nobody", 0, "extra", recordings[0])
    between = [stream[end + 4000 : first - 4000] for (_, end), (first, _) in itertools.pairwise(spoken)]
    add("neg/a/0.wav", "negative", "talk", "", 0, "negative", np.concatenate(between))
    add("neg/b/0.wav", "negative", "chat", "", 0, "negative", np.concatenate(between[::-1]))
    if noise:
        add("noise/hum.wav", "noise", "hum", "", 0, "fold1", (rng.standard_normal(16000) * 500).astype(np.int16))
    with (root / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "kind", "label", "speaker", "take", "split", "duration_s", "source_repo"])
        table.writerows(rows)
    return root


# Counting.


def detector_events(values, threshold):
    """What a Detector says to embeddings of which `values` are the similarities to its one prototype."""
    enrolled = Enrolled("k", "s", np.array([[1, 0]], np.float32), threshold)
    detector = Detector([enrolled])
    embeddings = np.stack([values, np.sqrt(1 - values**2)], 1).astype(np.float32)
    found = [detector.step(embedding, (i + 1) * HOP_SAMPLES) for i, embedding in enumerate(embeddings)]
    return [i for i, one in enumerate(found) if one]


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.7, 0.9, 1.0])
def test_events_are_those_of_the_detector(threshold):
    values = np.random.default_rng(1).random(2000).astype(np.float32)

    assert events(values, threshold).tolist() == detector_events(values, threshold)


def test_events_are_those_of_the_detector_on_a_real_stream(model, demo):
    engine = load_engine(model)
    enrolled = enrol("open sesame", "slt", [read_recording(DEMO / f"enrol-{i}.flac") for i in (1, 2, 3)], engine, model)
    embeddings = embed(demo[0], engine)
    values = scores(embeddings, enrolled)
    for quantile in (0.5, 0.9, 0.99):
        # Between two scores, so that the last bit of a product of other shape decides nothing.
        ordered = np.sort(values.astype(np.float64))
        k = int(quantile * (len(ordered) - 1))
        threshold = (ordered[k] + ordered[k + 1]) / 2
        detector = Detector([dataclasses.replace(enrolled, threshold=threshold)])
        told = [i for i, embedding in enumerate(embeddings) if detector.step(embedding, (i + 1) * HOP_SAMPLES)]

        assert events(values, threshold).tolist() == told


def test_a_score_that_stays_high_is_an_event_every_two_seconds():
    assert events(np.ones(60, np.float32), 1.0).tolist() == [0, 25, 50]


def test_a_threshold_that_float32_cannot_hold_is_not_rounded_down():
    just_below = np.float32(0.1)  # 0.100000001490116

    assert len(events(np.array([just_below]), 0.1)) == 1
    assert len(events(np.array([just_below]), 0.1000000015)) == 0


def test_the_steps_tell_the_events_of_every_threshold():
    rng = np.random.default_rng(2)
    streams = [np.convolve(rng.standard_normal(n + 4), np.ones(5), "valid").astype(np.float32) for n in (400, 1, 10, 700)]
    streams.append(np.zeros(0, np.float32))
    steps = false_accept_steps(streams, 30)

    assert len(steps) == 30
    for threshold in np.unique(np.concatenate(streams))[::-1]:
        if threshold >= steps[-1]:
            assert min(30, sum(len(events(s, float(threshold))) for s in streams)) == (steps >= threshold).sum()


def test_a_fall_of_recall_is_judged_on_the_takes_that_only_one_of_two_heard():
    """One take of ten either way: as likely as not. Five lost and none gained: 1 in 32. Six lost, one gained: 8 of 128."""
    for before, now, chance in (
        ("1111111110", "0111111111", 0.75),
        ("1111111111", "0000011111", 1 / 32),
        ("11111100000", "00000010000", 8 / 128),
        ("1100", "1100", 1.0),
    ):
        assert chance_of_fall({"heard": now}, {"heard": before}) == pytest.approx(chance)


def test_a_fall_of_rows_that_do_not_tell_which_takes_is_judged_as_two_proportions():
    def row(recall):
        return {"deployed_recall": recall, "takes": 35}

    assert chance_of_fall(row(22 / 35), row(29 / 35)) == pytest.approx(0.0301, abs=1e-3)  # z = 1.88
    assert chance_of_fall(row(0.8), row(0.8)) == pytest.approx(0.5)
    assert chance_of_fall(row(1.0), row(0.2)) > 0.999


def test_takes_of_people_who_are_heard_always_or_never_tell_as_much_as_one_take_of_each():
    assert effective_takes([[True] * 10, [False] * 10] * 8) == pytest.approx(15)
    assert effective_takes([[True, False]] * 20) == 40  # no less alike than chance makes them
    assert effective_takes([[True] * 10, [], [True] * 5]) == 15 and effective_takes([]) == 0


def test_wilson_interval_of_known_cases():
    assert wilson(0.5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
    assert wilson(81 / 263, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)


def test_poisson_interval_of_known_cases():
    assert poisson(0, 1.0) == pytest.approx([0.0, 3.6889], abs=1e-3)
    assert poisson(1, 1.0) == pytest.approx([0.0253, 5.5716], abs=1e-3)
    assert poisson(10, 2.0) == pytest.approx([4.7954 / 2, 18.3904 / 2], abs=1e-3)
    assert poisson(5000, 1.0) == pytest.approx([5000 - 1.96 * math.sqrt(5000), 5000 + 1.96 * math.sqrt(5000)], rel=1e-3)


def test_scores_of_users_who_share_a_cohort_are_the_detectors():
    rng = np.random.default_rng(4)
    embeddings, prototypes, cohort = (unit_rows(rng, n) for n in (50, 2, 32))
    people = [User("k", str(i), Enrolled("k", str(i), row[None], 0.7, 9.0 + i, 0.3, cohort)) for i, row in enumerate(prototypes)]
    listener = object.__new__(evaluation._Listener)
    listener.protocol = "stream"

    for user, values in listener._score(embeddings, [*people, User("k", "refused", None)]):
        assert values == pytest.approx(scores(embeddings, user.enrolled), abs=1e-5)


def unit_rows(rng, count):
    rows = rng.standard_normal((count, 64)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# One keyword.


def user(name, threshold, false_peaks, take_peaks):
    """A user whose negatives, one hour of them, and takes hold single peaks of these scores."""
    hour = np.full(45_000, -1.0, np.float32)
    hour[np.arange(len(false_peaks)) * 100] = false_peaks
    takes = []
    for peak in take_peaks:
        values = np.full(60, -1.0, np.float32)
        values[30] = peak  # the event comes at 2.48 s
        takes.append(Take(values, 24_000, 56_000, 36_800))
    enrolled = Enrolled("k", name, np.zeros((1, 2), np.float32), threshold)
    return User("k", name, enrolled, [hour], takes)


def test_one_threshold_for_all_users_keeps_their_mean_rate():
    users = [user("a", 5.0, [9, 8, 7], [8.5, 6.5]), user("b", 0.5, [3, 2], [2.5, 1.0])]

    entry, _ = measure(users, hours=1.0)

    # 0.5 an hour over two users of one hour each is one event: the 9. 1.0 an hour is two: down to just above 7.
    assert entry["recall_at_fa_per_hour"] == {"0.1": 0.0, "0.5": 0.25, "1.0": 0.25}
    assert entry["false_accepts"] == {"0.1": 0, "0.5": 1, "1.0": 2}
    assert entry["takes"] == 4
    assert entry["delay_ms"]["p50"] == pytest.approx((31 * HOP_SAMPLES - 36_800) / 16)
    # 0, .25, .25, .5 and then, at 2 an hour, four events: each half an hour's worth of the range.
    assert entry["average_viable_recall"] == pytest.approx((0 + 0.25 + 0.25 + 0.5) / 4)


def test_the_deployed_thresholds_count_as_they_are():
    deployed = measure([user("a", 5.0, [9, 8, 7], [8.5, 6.5]), user("b", 2.2, [3, 2], [2.5, 1.0])], hours=1.0)[0]["deployed"]

    assert deployed["recall"] == 0.75
    assert deployed["fa_per_hour_by_user"] == {"a": 3.0, "b": 1.0}
    assert deployed["fa_per_hour"] == 2.0
    assert deployed["worst_user_fa_per_hour"] == 3.0
    assert deployed["users_above_2"] == 1
    assert deployed["recall_below_oracle"] == 0.25 - 0.75


def test_in_the_papers_protocol_each_user_has_a_threshold():
    entry, _ = measure([user("a", 5.0, [9, 8, 7], [8.5, 6.5]), user("b", 0.5, [3, 2], [2.5, 1.0])], hours=1.0, protocol="paper")

    assert entry["recall_at_fa_per_hour"] == {"0.1": 0.0, "0.5": 0.0, "1.0": 0.5}


def test_an_event_before_or_long_after_the_take_does_not_recognise_it():
    values = np.full(60, -1.0, np.float32)
    values[[10, 50]] = 1.0
    take = Take(values, 24_000, 56_000, 36_800)

    assert take.heard(0.5) == (None, 2)


def test_an_event_beside_the_one_that_recognises_a_take_is_a_stray_one():
    one = user("a", 0.5, [], [1.0])
    one.takes[0].scores[0] = 1.0

    assert measure([one], hours=1.0)[0]["deployed"]["stray_events"] == 1


def test_a_user_who_could_not_enrol_misses_every_take_and_dilutes_no_false_accepts_nor_allows_the_others_more():
    refused = User("k", "c", None, [], [Take(np.zeros(0, np.float32), 0, 1, 0)] * 2)

    entry, _ = measure([user("a", 5.0, [9, 8, 7], [9.5, 9.5]), refused], hours=1.0)

    assert entry["recall_at_fa_per_hour"]["0.1"] == 0.5
    assert entry["false_accepts"] == {"0.1": 0, "0.5": 0, "1.0": 1}
    assert entry["deployed"]["recall"] == 0.5
    assert entry["deployed"]["fa_per_hour"] == 3.0


def test_each_keyword_counts_the_same_in_the_mean_and_the_worst_user_of_any_is_told():
    easy = measure([user("a", 5.0, [], [9, 9, 9])], hours=1.0)[0]
    hard = measure([user("b", 5.0, [9, 8, 7], [9, 1]), user("c", 5.0, [9], [1, 1])], hours=1.0)[0]
    mean = evaluation._mean({"easy": easy, "hard": hard})["deployed"]

    assert mean["recall"] == pytest.approx((1 + 0.25) / 2)
    assert mean["fa_per_hour"] == pytest.approx((0 + 2) / 2) and mean["fa_per_hour_over_users"] == pytest.approx(4 / 3)
    assert (mean["worst_user_fa_per_hour"], mean["users_above_2"]) == (3.0, 1)


# Sound.


@pytest.mark.parametrize("snr_db", [10.0, 0.0])
def test_noise_is_so_much_weaker_than_the_speech_while_it_is_active(demo, snr_db):
    speech, noise = demo[0].astype(np.float32), np.random.default_rng(0).standard_normal(len(demo[0])).astype(np.float32)
    on = evaluation.active(demo[0])
    power = evaluation.speech_power(speech, on)

    added = evaluation.add_noise(speech, power, noise, snr_db) - speech

    in_frames = (speech[: len(on) * 320].reshape(-1, 320)[on].astype(np.float64) ** 2).mean()
    assert 10 * np.log10(in_frames / (added.astype(np.float64) ** 2).mean()) == pytest.approx(snr_db, abs=0.01)


@pytest.mark.parametrize("minutes", [0.2, 5])
def test_made_noise_of_any_length_takes_transforms_of_short_and_fast_ones(monkeypatch, minutes):
    """Of a prime number of samples NumPy's transform took minutes and gigabytes."""
    lengths = []
    real = np.fft.rfft
    monkeypatch.setattr(np.fft, "rfft", lambda samples, *given: lengths.append(len(samples)) or real(samples, *given))
    count = {0.2: 192_007, 5: 4_800_007}[minutes]
    noise = evaluation.pink(np.random.default_rng(0), count)

    assert (noise.shape, noise.dtype) == ((count,), np.float32)
    assert all(length & (length - 1) == 0 and length <= 1 << 20 for length in lengths)
    assert len({float(part.std()) for part in np.array_split(noise, 4)}) == 4  # nothing is said again
    assert abs(noise.mean()) < 0.1 * noise.std()


def test_made_noise_is_heard_as_loud_as_it_is():
    power = np.abs(np.fft.rfft(evaluation.pink(np.random.default_rng(0), 5 * SAMPLE_RATE_HZ))) ** 2  # every 0.2 Hz

    assert power[: 20 * 5].sum() < 0.02 * power.sum()


@pytest.mark.parametrize("offset", [0, 1000])
def test_noise_is_as_strong_as_asked_whatever_its_offset(tmp_path, offset):
    import soundfile

    noise = np.random.default_rng(0).standard_normal(32_000) * 300
    soundfile.write(tmp_path / "rain.wav", np.round(noise + offset).astype(np.int16), SAMPLE_RATE_HZ)
    drawn = evaluation._Noise([tmp_path / "rain.wav"]).draw(np.random.default_rng(0), 80_000)

    assert evaluation.add_noise(np.zeros(80_000, np.float32), 1e6, drawn, 0.0).std() == pytest.approx(1000, rel=0.01)


def test_a_small_offset_stays_so_that_figures_stay():
    noise = np.random.default_rng(0).standard_normal(32_000).astype(np.float32) * 300 + 20

    assert evaluation.without_offset(noise) is noise
    assert abs(evaluation.without_offset(noise + 20).mean()) < 0.01


def test_the_word_ends_where_its_energy_does(demo):
    stream, spoken = demo
    for first, end in spoken:
        clip = stream[first - 8000 : end + 8000]

        assert abs(evaluation.word_end(clip) - (end - first + 8000)) <= 0.15 * SAMPLE_RATE_HZ


def test_speech_fills_silence_and_a_click_is_not_the_word():
    word = np.zeros(32_000, np.int16)
    word[8_000:16_000] = (3000 * np.sin(np.arange(8_000) / 5)).astype(np.int16)
    word[30_000:30_010] = 20_000

    assert evaluation.word_end(word) == pytest.approx(16_000, abs=320)
    assert evaluation.active(np.zeros(3200, np.int16)).all()


def test_a_room_keeps_the_energy_and_decays(demo):
    response = evaluation.room_response(np.random.default_rng(3))
    speech = demo[0].astype(np.float32)

    assert 0.3 <= len(response) / SAMPLE_RATE_HZ <= 0.6
    assert (response**2).sum() == pytest.approx(1.0, rel=1e-4)
    assert (response[-1600:] ** 2).mean() < 1e-3 * (response[32:1632] ** 2).mean()
    assert evaluation.reverberate(speech, response) == pytest.approx(np.convolve(speech, response)[: len(speech)], abs=0.5)


# A whole corpus.


def test_a_corpus_of_any_names_gives_every_condition(model, corpus, tmp_path):
    said = []

    report = evaluate(corpus, model, progress=said.append)

    assert list(report["conditions"]) == list(CONDITIONS)
    assert report["keywords"] is report["conditions"]["clean"]["keywords"]
    entry = report["keywords"]["open-sesame 7"]
    assert (entry["users"], entry["takes"]) == (2, 4)
    assert set(entry["recall_at_fa_per_hour"]) == set(entry["recall_interval"]) == {"0.1", "0.5", "1.0"}
    seconds = sum(len(read_recording(corpus / "neg" / name / "0.wav")) for name in "ab") / SAMPLE_RATE_HZ
    assert report["negative_hours"] == pytest.approx(seconds / 3600)
    assert report["zero_events_bound_fa_per_hour"] == pytest.approx(3 * 3600 / seconds)
    assert report["conditions"]["others"]["keywords"]["open-sesame 7"]["takes"] == 4
    assert report["conditions"]["follow"]["mean"]["deployed"]["fa_per_hour"] == report["mean"]["deployed"]["fa_per_hour"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert said == ["enrolling 2 users"]
    assert "open-sesame 7" in report_table(report)


def test_the_deployed_false_accepts_are_what_the_listener_would_report(model, corpus):
    report = evaluate(corpus, model, conditions=["clean"])

    engine = load_engine(model)
    recordings = [read_recording(corpus / f"kw/slt/{i}.wav") for i in range(3)]
    enrolled = enrol("open-sesame 7", "slt", recordings, engine, model)
    count = 0
    for name in "ab":
        engine.reset()
        count += len(Pipeline(engine, Detector([enrolled])).feed(AudioChunk(read_recording(corpus / "neg" / name / "0.wav"), 0)))
    reported = report["keywords"]["open-sesame 7"]["deployed"]["fa_per_hour_by_user"]["slt"]
    assert reported * report["negative_hours"] == pytest.approx(count)


def test_the_false_accepts_of_short_files_are_those_of_a_listener_that_heard_quiet_before(model, corpus, demo, monkeypatch):
    """From a fresh stream the highest score of this one is -3.3, at hop 7; behind quiet -4.8."""
    import soundfile

    samples = demo[0][4800:36_800]
    for name in "ab":
        soundfile.write(corpus / f"neg/{name}/0.wav", samples, SAMPLE_RATE_HZ)
    made = []

    def low(*given, **how):
        made.append(dataclasses.replace(enrol(*given, **how), threshold=-4.0))
        return made[-1]

    monkeypatch.setattr(evaluation, "enrol", low)
    report = evaluate(corpus, model, conditions=["clean"])

    quiet = (np.random.default_rng(1).standard_normal(40 * HOP_SAMPLES) * 10).astype(np.int16)
    listener = Pipeline(load_engine(model), Detector(made[:1]))
    listener.feed(AudioChunk(quiet, 0))
    count = 2 * len(listener.feed(AudioChunk(samples, len(quiet))))
    assert report["keywords"]["open-sesame 7"]["deployed"]["fa_per_hour_by_user"]["slt"] * report["negative_hours"] == pytest.approx(count)
    assert report["negative_hours"] == pytest.approx(2 * 2 / 3600)


def test_the_same_command_gives_the_same_figures(model, corpus):
    first, second = (evaluate(corpus, model, conditions=["noise5", "room", "follow"]) for _ in range(2))

    assert list(first["conditions"]) == ["clean", "noise5", "follow", "room"]
    assert first == second


def test_what_the_model_was_trained_on_is_left_out(model, corpus):
    seen = frozenset(hashlib.sha256((corpus / p).read_bytes()).hexdigest()[:16] for p in ("neg/a/0.wav", "kw/slt/t0.wav"))

    report = evaluate(corpus, dataclasses.replace(model, trained_on_sha256=seen), conditions=["clean"])

    left_out = len(read_recording(corpus / "neg/a/0.wav")) / SAMPLE_RATE_HZ / 3600
    assert report["negatives_left_out_hours"] == pytest.approx(left_out)
    assert report["negative_files"] == 1
    assert report["keywords"]["open-sesame 7"]["takes"] == 3
    assert any("1 test takes left out" in note for note in report["notes"])


def test_without_durations_in_the_manifest_hours_and_progress_are_those_of_the_files(model, corpus, monkeypatch):
    table = list(csv.reader((corpus / "manifest.csv").open(encoding="utf-8")))
    with (corpus / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(row[:6] for row in table)
    seen = frozenset([hashlib.sha256((corpus / "neg/a/0.wav").read_bytes()).hexdigest()[:16]])
    left_out_h = len(read_recording(corpus / "neg/a/0.wav")) / SAMPLE_RATE_HZ / 3600
    monkeypatch.setattr(evaluation._Progress.__init__, "__defaults__", (0.0,))
    said = []

    report = evaluate(corpus, dataclasses.replace(model, trained_on_sha256=seen), conditions=["clean"], progress=said.append)

    assert report["negatives_left_out_hours"] == pytest.approx(left_out_h)
    assert f"1 negative files ({left_out_h:.2f} h) left out: the model was trained on them" in report["notes"]
    for what in ("reading ", "clean, "):
        shares = [int(line.split(": ")[1].split(" %")[0]) for line in said if line.startswith(what)]
        assert 0 < shares[0] < 90 and shares == sorted(shares) and shares[-1] == 100


def test_noise_that_was_all_trained_on_or_is_missing_is_said(model, corpus, demo, tmp_path_factory):
    seen = frozenset([hashlib.sha256((corpus / "noise/hum.wav").read_bytes()).hexdigest()[:16]])
    trained = evaluate(corpus, dataclasses.replace(model, trained_on_sha256=seen), conditions=["noise10"])
    without = evaluate(make_corpus(tmp_path_factory.mktemp("corpus"), demo, noise=False), model, conditions=["noise10"])

    assert any("trained on all of the corpus' noise" in note for note in trained["notes"])
    assert any("pink noise" in note for note in without["notes"])


@pytest.mark.parametrize("value", [0, 700])
def test_noise_that_is_silent_is_made_instead_and_said(model, corpus, value):
    import soundfile

    soundfile.write(corpus / "noise/hum.wav", np.full(32_000, value, np.int16), SAMPLE_RATE_HZ)
    clean, noisy = (evaluate(corpus, model, conditions=[condition])["notes"] for condition in ("clean", "noise10"))

    note = "the corpus has no noise that can be heard: pink noise was generated in its place"
    assert note in noisy and note not in clean


@pytest.mark.parametrize("protocol", ["stream", "paper"])
def test_an_utterance_in_which_a_reader_says_the_keyword_holds_no_false_accept_and_no_hours(model, corpus, demo, protocol):
    import soundfile

    stream, spoken = demo
    first, end = spoken[0]
    soundfile.write(corpus / "neg/a/0.wav", stream[: end + 32_000], SAMPLE_RATE_HZ)
    rewritten(corpus, lambda row: row | {"label": "digit-zero"} if row["kind"] == "keyword" else row)
    found = []
    for source in ("arctic_b0357", "arctic_b0358"):
        rows = [("neg/a/0.wav", first / SAMPLE_RATE_HZ, (end - first) / SAMPLE_RATE_HZ, f"data/{source}_7.wav")]
        rows += [("neg/b/0.wav", 0, 2, "data/other.wav")]
        with (corpus / "segments.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "start_s", "duration_s", "source_path"), *rows])
        found.append(evaluate(corpus, model, conditions=["clean"], protocol=protocol))
    (before, after), negatives = ([one["keywords"]["digit-zero"]["deployed"] for one in found], found[1]["negative_hours"])

    assert before["false_accepts"] - after["false_accepts"] == 2  # one of each user
    left_out_s = (end - first) / SAMPLE_RATE_HZ + (0.5 if protocol == "stream" else 0)
    (interval,) = (one["fa_interval"] for one in [after])
    assert interval[1] == pytest.approx(poisson(after["false_accepts"], 2 * (negatives - left_out_s / 3600))[1], rel=0.02)
    assert "digit-zero is said in 1 of the utterances of the negatives: these are no negatives of it" in found[1]["notes"]
    assert not any("is said in" in note for note in found[0]["notes"])


@pytest.mark.parametrize("name", ["talk", "a", "neg/a"])
def test_negatives_are_narrowed_by_label_folder_or_path(model, corpus, name):
    assert evaluate(corpus, model, conditions=["clean"], negatives=[name])["negative_files"] == 1


@pytest.mark.parametrize("segments", [False, True])
def test_the_papers_protocol_listens_to_utterances(model, corpus, segments):
    if segments:
        (corpus / "segments.csv").write_text("path,start_s,duration_s\nneg/a/0.wav,0,4\nneg/b/0.wav,0,2\nneg/b/0.wav,2.5,2\n")

    report = evaluate(corpus, model, protocol="paper")

    assert list(report["conditions"]) == ["clean"]
    if segments:
        assert report["negative_hours"] == pytest.approx(8 / 3600)


def test_the_picture_is_a_picture(model, corpus, tmp_path):
    pytest.importorskip("matplotlib")
    report = evaluate(corpus, model, conditions=["follow"])

    plot(report, tmp_path / "det.png")

    assert (tmp_path / "det.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(EdgekwsError, match="cannot be written"):
        plot(report, tmp_path / "none" / "det.png")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"keywords": ["simsalabim"]}, {"conditions": ["rain"]}, {"protocol": "oww"}, {"negatives": ["music"]}),
        *({"shots": 0}, {"only_enrolled": True, "shots": 1}),
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_asking_for_what_is_not_there_is_wrong_usage(model, corpus, wrong):
    with pytest.raises(UsageError, match=r"Accepted|There are|Labels|at least"):
        evaluate(corpus, model, **wrong)


def test_a_folder_that_is_no_corpus_is_one_clear_error(model, tmp_path):
    with pytest.raises(EdgekwsError, match=r"manifest\.csv"):
        evaluate(tmp_path, model)


def test_recordings_that_nobody_can_enrol_from_are_reported(model, corpus):
    import soundfile

    for i in range(2):
        soundfile.write(corpus / f"kw/häns 2/{i}.wav", np.zeros(16_000, np.int16), SAMPLE_RATE_HZ)
    report = evaluate(corpus, model, conditions=["clean"])

    assert [one["speaker"] for one in report["refused"]] == ["häns 2"]
    assert "silent" in report["refused"][0]["reason"]
    assert report["keywords"]["open-sesame 7"]["takes"] == 4
    for i in range(3):
        soundfile.write(corpus / f"kw/slt/{i}.wav", np.zeros(16_000, np.int16), SAMPLE_RATE_HZ)
    with pytest.raises(EnrolmentError, match="silent"):
        evaluate(corpus, model, conditions=["clean"])


def rewritten(corpus, change):
    """The corpus with another table: `change` is given each row as a dict, and gives it or None."""
    with (corpus / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = [new for row in csv.DictReader(file) if (new := change(row))]
    with (corpus / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return corpus


def test_users_with_too_few_takes_and_takes_too_long_for_one_word_are_noted(model, corpus):
    import soundfile

    rewritten(corpus, lambda row: row | {"split": "enrol"} if row["speaker"] == "nobody" else row)
    soundfile.write(corpus / "kw/slt/t0.wav", np.tile(read_recording(corpus / "kw/slt/t0.wav"), 4), SAMPLE_RATE_HZ)
    notes = evaluate(corpus, model, conditions=["clean"])["notes"]

    assert "1 users were enrolled from fewer than 3 recordings: they have no more" in notes
    assert "1 speakers have no test takes and were left out" in notes
    assert "1 takes are longer than 6 s: any event inside one counts as its keyword" in notes


def test_who_is_left_out_is_said_of_everybody_and_of_keywords_that_have_nobody(model, corpus):
    """`nobody` has a take of split extra alone; of "sun" one has no take to test with and one none to enrol from."""
    with (corpus / "manifest.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            ["kw/slt/0.wav", "keyword", label, speaker, 0, split, 1, ""]
            for label, speaker, split in (("sun", "ann", "enrol"), ("sun", "bob", "test"))
        )
    said = []
    report = evaluate(corpus, model, conditions=["clean"], progress=said.append)

    assert said[0] == "enrolling 2 users"
    assert "2 speakers have no test takes and were left out" in report["notes"]
    assert "1 speakers with test takes but nothing to enrol them from were left out" in report["notes"]
    assert "sun: nobody has takes both to enrol from and to test, so it is in no row and no mean" in report["notes"]
    assert list(report["keywords"]) == ["open-sesame 7"]


def test_an_enrolment_that_enroll_refuses_as_copies_is_measured_and_named(model, corpus):
    import soundfile

    assert evaluate(corpus, model, conditions=["clean"])["copies"] == []
    for i, gain in ((1, 1), (2, 0.5)):
        soundfile.write(corpus / f"kw/slt/{i}.wav", (read_recording(corpus / "kw/slt/0.wav") * gain).astype(np.int16), SAMPLE_RATE_HZ)
    report = evaluate(corpus, model, conditions=["clean"])

    reason = "recording 2 is recording 1 again, recording 3 is recording 1 again"
    assert report["copies"] == [{"keyword": "open-sesame 7", "speaker": "slt", "reason": reason}] and report["refused"] == []
    note = "1 users' enrolments hold the same recording twice, which `edgekws enroll` refuses: measured all the same"
    assert note in report["notes"] and f"open-sesame 7, slt: {reason}" in report_table(report)
    assert report["keywords"]["open-sesame 7"]["users"] == 2


def test_takes_that_are_an_enrolment_recording_once_more_are_counted_and_told_apart(model, corpus):
    import soundfile

    whole = evaluate(corpus, model, conditions=["clean"])
    one = whole["keywords"]["open-sesame 7"]
    assert one["without_copies"]["recall_at_fa_per_hour"]["0.5"] == one["recall_at_fa_per_hour"]["0.5"]
    assert one["without_copies"]["takes"] == one["takes"] == whole["mean"]["without_copies"]["takes"]
    assert not [note for note in whole["notes"] if "once more" in note]

    rows = [row for row in read_manifest(corpus) if row.kind == "keyword" and row.speaker == "slt" and row.split == "test"]
    for row in rows[1:]:  # all but one
        soundfile.write(corpus / row.path, (read_recording(corpus / "kw/slt/0.wav") * 0.5).astype(np.int16), SAMPLE_RATE_HZ)
    report = evaluate(corpus, model, conditions=["clean"])

    copies, entry = len(rows) - 1, report["keywords"]["open-sesame 7"]
    assert copies and entry["without_copies"]["takes"] == entry["takes"] - copies
    assert [note for note in report["notes"] if note.startswith(f"{copies} of {entry['takes']} test takes are a recording once more")]


def test_where_nobody_can_be_measured_the_splits_that_are_there_are_named(model, corpus):
    rewritten(corpus, lambda row: row | {"split": "train" if row["kind"] == "keyword" else ""})

    with pytest.raises(EdgekwsError, match=r'nobody has both .* The splits of its keywords: "train"$'):
        evaluate(corpus, model)


def test_all_files_that_cannot_be_read_are_named_before_anything_is_heard(model, corpus):
    import soundfile

    (corpus / "kw/slt/t1.wav").unlink()
    (corpus / "neg/a/0.wav").write_text("words")
    soundfile.write(corpus / "noise/hum.wav", np.zeros(0, np.int16), SAMPLE_RATE_HZ)

    bad = r"3 files of its .*t1\.wav: no such file.*0\.wav: not audio that is known.*hum\.wav: there are no samples"
    with pytest.raises(EdgekwsError, match=bad):
        evaluate(corpus, model, progress=pytest.fail)


def test_all_files_that_are_cut_off_are_named_before_anything_is_heard(model, corpus, monkeypatch):
    import soundfile

    def cut_off(path):
        samples = np.random.default_rng(0).integers(-9000, 9000, 48_000).astype(np.int16)
        soundfile.write(corpus / path, samples, SAMPLE_RATE_HZ, format="FLAC")
        (corpus / path).write_bytes((corpus / path).read_bytes()[:40_000])

    for path in ("noise/hum.wav", "kw/slt/9.wav"):
        cut_off(path)
    with (corpus / "manifest.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(["kw/slt/9.wav", "keyword", "open-sesame 7", "slt", 9, "enrol", 1, ""])
    evaluate(corpus, model, conditions=["clean"])  # which hears no noise, and three recordings of each user
    for path in ("kw/slt/1.wav", "kw/slt/t1.wav", "neg/a/0.wav"):
        cut_off(path)
    monkeypatch.setattr(evaluation, "load_engine", lambda *_: pytest.fail("it goes on"))

    bad = r"4 files of its .*slt/1\.wav any further: .*t1\.wav any further: .*a/0\.wav any .*hum\.wav any .* Unpack the whole corpus"
    with pytest.raises(EdgekwsError, match=bad):
        evaluate(corpus, model, conditions=["noise5"])


def test_files_that_are_shorter_than_the_table_says_are_noted(model, corpus):
    import soundfile

    samples = read_recording(corpus / "neg/b/0.wav")
    soundfile.write(corpus / "neg/b/0.wav", samples[: len(samples) // 2], SAMPLE_RATE_HZ)
    lasts_s = len(samples) / SAMPLE_RATE_HZ
    notes = evaluate(corpus, model, conditions=["clean"])["notes"]

    first = f"neg/b/0.wav lasts {lasts_s / 2:.1f} s, not {lasts_s:.1f}"
    assert f"1 files are longer or shorter than duration_s of manifest.csv: {first}. Were they cut off?" in notes


def test_a_file_that_takes_more_memory_than_there_is_is_named(model, corpus, monkeypatch):
    monkeypatch.setattr(
        evaluation, "embed", lambda samples, engine: np.zeros(1 << 55) if len(samples) > 160_000 else embed(samples, engine)
    )

    with pytest.raises(EdgekwsError, match=r"neg/a/0\.wav, 0\.00 h: there is not enough memory\. Split"):
        evaluate(corpus, model, conditions=["clean"])


def test_rows_that_are_listed_twice_count_once_and_are_noted(model, corpus):
    once = evaluate(corpus, model, conditions=["clean"])
    with (corpus / "manifest.csv").open("r+", encoding="utf-8", newline="") as file:
        rows = file.read().splitlines(keepends=True)[1:]
        file.writelines(row.replace("seenkw-", "") for row in rows)
    twice = evaluate(corpus, model, conditions=["clean"])

    note = f"{len(rows)} rows of manifest.csv say what another one says, and were left out"
    assert twice == once | {"notes": [note, *once["notes"]]}


def test_negatives_in_which_no_event_can_come_give_no_hours(model, corpus):
    import soundfile

    once = evaluate(corpus, model, conditions=["clean"])
    with (corpus / "manifest.csv").open("a", encoding="utf-8", newline="") as file:
        for i in range(40):
            soundfile.write(corpus / f"neg/{i}.wav", np.full(HOP_SAMPLES - 1, 100, np.int16), SAMPLE_RATE_HZ)
            csv.writer(file).writerow([f"neg/{i}.wav", "negative", "talk", "", 0, "", "", ""])

    assert evaluate(corpus, model, conditions=["clean"])["negative_hours"] == once["negative_hours"]
    rewritten(corpus, lambda row: None if row["path"] in ("neg/a/0.wav", "neg/b/0.wav") else row)
    with pytest.raises(EdgekwsError, match="the negatives are too short"):
        evaluate(corpus, model, conditions=["clean"])


def test_negatives_of_a_few_samples_are_one_clear_error(model, corpus):
    import soundfile

    for name in "ab":
        soundfile.write(corpus / f"neg/{name}/0.wav", np.full(1000 if name == "a" else 300, 100, np.int16), SAMPLE_RATE_HZ)
    rewritten(corpus, lambda row: None if row["path"] == "neg/b/0.wav" else row)
    with pytest.raises(EdgekwsError, match="the negatives are too short"):
        evaluate(corpus, model, conditions=["clean"])
    rewritten(corpus, lambda row: row | {"path": "neg/b/0.wav"} if row["kind"] == "negative" else row)
    with pytest.raises(EdgekwsError, match="the negatives are too short"):
        evaluate(corpus, model, conditions=["follow"])


def test_a_table_in_utf_16_is_one_clear_error(model, corpus):
    (corpus / "manifest.csv").write_text((corpus / "manifest.csv").read_text(encoding="utf-8"), encoding="utf-16")

    with pytest.raises(EdgekwsError, match=r"manifest\.csv: cannot be read .* in UTF-8"):
        evaluate(corpus, model)
