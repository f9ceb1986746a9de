"""The computing side of benchmarks/onda.py, on made-up lives whose answers are known."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import onda


def lives(arm, recalls, *, network="edge", condition="room", compression=1.0, **facts):
    """A row for each user, in order."""
    common = {
        "keyword": "alexa",
        "seed": 0,
        "snr_db": 5.0,
        "network": network,
        "arm": arm,
        "compression": compression,
        "condition": condition,
    }
    common |= {"takes": 20, "fa_per_hour": 0.0, "parameters": 300_000, "file_kb": 1200.0, "gate": None if arm == "before" else "promoted"}
    common |= {"train_ms_per_step": 50.0, "round_cpu_s": 15.0, "round_s": 20.0, "network_us_per_hop": 48.0, "pseudo_positives": 30}
    return [{**common, "user": f"u{i}", "recall_at_0.5": recall, "deployed_recall": recall, **facts} for i, recall in enumerate(recalls)]


def hybrid(recalls, compression=10.0, **facts):
    smaller = {"parameters": round(400_000 / compression), "train_ms_per_step": 20.0, "network_us_per_hop": 16.0}
    return lives("onda1-hap", recalls, compression=compression, **{**smaller, **facts})


def claim(rows, words):
    """The only line that begins so: what was measured, and whether it is met."""
    (found,) = [line for line in onda.claims(rows) if line[0].startswith(words)]
    return found[3], found[4]


def test_the_compression_is_that_of_the_smallest_version_within_a_point_of_recall():
    whole = lives("weights-only", [0.9, 0.8, 0.7], network="ds-cnn-l", parameters=400_000)
    rows = whole + hybrid([0.895, 0.795, 0.695], 10.0) + hybrid([0.85, 0.75, 0.65], 20.0)

    measured, met = claim(rows, "parameters against weights-only ds-cnn-l at equal recall, room")
    assert measured.startswith("10.0x (edge 10x") and met == "met"


def test_what_some_users_lose_is_no_plain_success_whatever_the_mean_is():
    rows = lives("weights-only", [0.9, 0.8, 0.5], network="ds-cnn-l", parameters=400_000) + hybrid([0.7, 0.7, 0.9], 10.0)

    measured, met = claim(rows, "parameters against weights-only ds-cnn-l at equal recall, room")
    assert "recall +3.3 points (-20.0 to +40.0)" in measured and met == "met, though not by all of its interval"


def test_a_compression_that_costs_recall_falls_short():
    rows = lives("weights-only", [0.9, 0.8], network="ds-cnn-l", parameters=400_000) + hybrid([0.7, 0.6], 20.0)

    measured, met = claim(rows, "parameters against weights-only ds-cnn-l at equal recall, room")
    assert "recall -20.0 points" in measured and met == "**falls short**: no size is within a point of recall"


def test_bytes_in_int8_count_where_recall_is_equal_and_stand_beside_the_same_candidate_in_float32():
    whole = lives("weights-only", [0.9, 0.8], network="ds-cnn-l", file_kb=1600.0)
    small = lives("onda1-hap-int8", [0.9, 0.795], compression=10.0, file_kb=50.0)

    measured, met = claim(whole + hybrid([0.92, 0.81]) + small, "bytes in INT8 against weights-only ds-cnn-l at equal recall, room")
    assert measured.startswith("32.0x, recall -0.3 points") and "float32 -1.8 points" in measured and met == "met"
    lost = lives("onda1-hap-int8", [0.6, 0.5], compression=10.0, file_kb=50.0)
    assert claim(whole + hybrid([0.9, 0.8]) + lost, "bytes in INT8")[1] == "**falls short**: recall"


def test_the_recall_gained_counts_those_who_started_low_from_their_own_networks_start():
    other_network = lives("before", [0.1, 0.1, 0.1], network="ds-cnn-l")
    rows = lives("before", [0.5, 0.6, 0.95]) + other_network + hybrid([0.7, 0.8, 0.95])

    measured, met = claim(rows, "recall gained where the start is below 0.8, room")
    assert measured.startswith("+20.0 points") and "2 users" in measured and met == "met"


def test_whom_enrolment_alone_leaves_nothing_to_gain_is_told_apart():
    rows = hybrid([1.0, 1.0, 0.9]) + lives("enrol-only", [1.0, 1.0, 0.7])

    measured, _ = claim(rows, "recall gained by pseudo-labels against enrolment-only, room")
    assert measured.startswith("+6.7 points") and "below 0.95 +20.0 points" in measured and measured.endswith("1 users")


def test_recall_at_half_a_false_accept_an_hour_lies_between_none_and_one_where_every_row_can_tell():
    none, one = (
        {"hours": 1.0, "recall_by_false_accepts": [0.2, 0.6, 0.9, 1.0]},
        {"hours": 1.0, "recall_by_false_accepts": [0.4, 0.6, 1.0, 1.0]},
    )
    rows = lives("weights-only", [0.4], network="ds-cnn-l", parameters=400_000, **one) + hybrid([0.2], 10.0, **none)

    measured, _ = claim(rows, "parameters against weights-only ds-cnn-l at equal recall, room")
    assert "recall -10.0 points" in measured and "at the whole number of false accepts below -20.0 points" in measured
    older = lives("before", [0.1])  # its run kept no counts: then nobody's are used
    assert "recall -20.0 points" in claim(rows + older, "parameters against weights-only ds-cnn-l at equal recall, room")[0]


def test_what_the_gate_refused_gains_nothing():
    rows = lives("before", [0.5, 0.5]) + hybrid([0.7, 0.7], gate="of 9 recordings to test on it loses 1")

    assert "refused left as it was +0.0" in claim(rows, "recall gained where the start is below 0.8, room")[0]


def test_a_ratio_of_time_is_the_weights_only_versions_over_the_hybrids():
    rows = lives("weights-only", [0.9, 0.9]) + hybrid([0.9, 0.9], round_cpu_s=20.0)

    assert claim(rows, "training time per step")[0].startswith("2.50x")
    assert claim(rows, "network time per hop")[0].startswith("3.00x")
    assert claim(rows, "whole round, weights-only edge") == ("0.75x (0.75 to 0.75), 2 users", "**falls short**: 0.75x")


def test_users_worse_after_promotion_are_named_and_refused_ones_are_not():
    rows = lives("before", [0.9, 0.9, 0.2]) + hybrid([0.2, 0.85, 0.2])
    measured, met = claim(rows, "lives worse after promotion, room")
    assert measured == (
        "1 of 3 promoted lives (0 refused): u0 0.90 → 0.20 of 20; chance alone makes one of the 2 that can look as bad do so"
        " in 0 % of cases; 1 of 3 heard fewer than 5 takes before, too few to tell"
    )
    assert met == "**falls short**: 1"

    rows = lives("before", [0.9]) + hybrid([0.2], gate="refused")
    assert claim(rows, "lives worse after promotion, room")[0].startswith("0 of 0 promoted lives (1 refused)")


def test_false_accepts_are_those_of_what_listens_after_the_gate():
    rows = lives("before", [0.9, 0.9], fa_per_hour=0.1)
    rows += hybrid([0.9], fa_per_hour=0.2) + [{**one, "user": "u1", "gate": "refused"} for one in hybrid([0.9], fa_per_hour=9.0)]

    measured, met = claim(rows, "false accepts an hour, deployed threshold, as before where refused")
    assert measured.startswith("0.15 ") and "0 of 2 users above 2" in measured and met == "met"


def test_one_user_above_two_an_hour_falls_short_whatever_the_mean_is():
    rows = lives("before", [0.9] * 10) + hybrid([0.9] * 9)
    rows += [{**one, "user": "u9"} for one in hybrid([0.9], fa_per_hour=2.5)]

    assert claim(rows, "false accepts an hour, deployed threshold, promoted")[1] == "**falls short**: 0.25, 1 above 2"


def test_the_interval_is_over_users_not_over_their_seeds():
    """Two users who differ: whatever the number of seeds, a bootstrap draws one of them twice in half of all cases."""
    rows = [{**one, "seed": seed} for seed in range(50) for one in lives("before", [0.0, 1.0])]
    values = onda.by_user([(row, row) for row in rows], lambda a, b: a["recall_at_0.5"])

    assert values.tolist() == [0.0, 1.0] and onda.interval(values) == (0.0, 1.0)
    assert onda.interval(np.full(5, 0.3)) == pytest.approx((0.3, 0.3))


def test_a_life_under_other_noise_is_another_life():
    """Whoever lives in a run with other users has another place in it, and so another room."""
    whole = lives("weights-only", [0.9, 0.8], network="ds-cnn-l", parameters=400_000)
    louder = [{**one, "snr_db": 0.0} for one in whole]
    words = "parameters against weights-only ds-cnn-l at equal recall, room"

    assert claim(whole + hybrid([0.9, 0.8]), words)[1] == "met"
    assert claim(louder + hybrid([0.9, 0.8]), words)[1] == "not measured"


def test_the_report_and_the_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"user": "x", "keyword": "alexa", "seed": 0, "snr_db": 5.0, "network": "edge", "arm": "before", "refused": "too quiet"}]
    for condition in onda.CONDITIONS:
        rows += lives("before", [0.5, 0.9], condition=condition) + hybrid([0.7, 0.9], condition=condition)
    text = onda.report(rows)
    onda.plot(rows, [tmp_path / "a.svg", tmp_path / "a.png"])

    assert "2 lives (user, room, network) of 2 users" in text and "1 lives ended at enrolment" in text
    assert "| edge | onda1-hap | 10 | 2 | 2 | 40 000 |" in text
    assert (tmp_path / "a.svg").stat().st_size > 10_000 and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_user_is_left_with_the_pruned_version_else_the_whole_one_else_what_there_was():
    before = lives("before", [0.5, 0.5, 0.5])
    pruned = hybrid([0.9, 0.1, 0.1])
    whole = lives("weights-only", [0.8, 0.8, 0.1])
    for row in (pruned[1], pruned[2], whole[2]):
        row["gate"] = "it is worse"

    (_, line) = onda.outcomes(before + pruned + whole)
    assert line[2:6] == ["3", "2", "0", "0.500 → 0.733"]
    pruned[0]["deployed_recall"] = 0.0
    assert onda.outcomes(before + pruned + whole)[1][4] == "1"

    for row, now in [(row, 2) for row in before] + [(row, 1) for row in pruned + whole]:
        row |= {"false_accepts": now, "false_accepts_by_offset": {"-0.3": 4 * now, "+0.3": 0}}
    (_, line) = onda.outcomes(before + pruned + whole)
    assert line[-1] == "24, 6, 0 → 16, 4, 0"


def test_after_each_round_it_is_told_what_listens_then():
    """A round that is refused leaves the version of the week before, and the rows of weeks are no candidates."""
    before = lives("before", [0.5, 0.5])
    first, second = hybrid([0.9, 0.5]), hybrid([0.9, 0.7])
    for week, rows in enumerate((first, second), 1):
        for row in rows:
            row |= {"arm": "weeks", "week": week, "pseudo_positives": 4 * week, "pseudo_true": 3 * week}
    first[1] |= {"gate": "it is worse", "parameters": before[1]["parameters"]}
    second[0]["gate"] = "it is worse"

    (_, after_one, after_two) = onda.weeks(before + first + second)
    assert after_one[1:6] == ["1", "2", "1 (1)", "0", "0.500 → 0.700"] and after_one[-2:] == ["8 (6)", "-"]
    assert after_two[1:6] == ["2", "2", "2 (2)", "0", "0.500 → 0.800"] and after_two[-2:] == ["16 (12)", "-"]
    alone = lives("enrol-only", [0.7, 0.5])
    assert [line[-1].split(" points")[0] for line in onda.weeks(before + alone + first + second)[1:]] == ["+10.0", "+20.0"]
    assert onda.measured(before + first) == onda.measured(before)


def test_a_household_is_told_person_by_person_and_its_guests_by_themselves():
    """Bob is the one who loses, whom the household's sum hides; the speaker's own brackets make nobody a guest."""
    here = {"takes": 60, "takes_of": {"ann (uk)": 30, "bob": 10, "cy": 20}, "user": "ann (uk)+bob (cy)", "compression": 1.0}
    before = [{**row, **here, "heard": "0" * 30 + "1" * 10 + "1" * 20} for row in lives("before", [0.5])]
    after = [{**row, **here, "heard": "1" * 30 + "0" * 10 + "1" * 20, "compression": 8.0} for row in hybrid([0.83])]

    (_, all_three, guest) = onda.households(before + after)
    assert all_three[1:7] == ["with a guest", "1", "1 (1)", "3", "1", "0.667 → 0.667"]
    assert guest[1:7] == ["the guests of these", "1", "1 (1)", "1", "0", "1.000 → 1.000"]
    measured, met = claim(before + after, "lives worse after promotion, room")
    assert measured.startswith("1 of 1 promoted lives, 3 people") and "bob 1.00 → 0.00 of 10" in measured and met != "met"


def test_in_int8_a_candidate_stands_beside_its_own_network_in_float32():
    mine = hybrid([0.8, 0.8], 8.0) + lives("onda1-hap-int8", [0.8, 0.7], compression=8.0)
    rows = mine + hybrid([0.1, 0.1], 8.0, network="ds-cnn-l") + lives("weights-only", [0.8, 0.7], network="ds-cnn-l")

    assert "against itself in float32 -5.0 points" in claim(rows, "bytes in INT8")[0]


def test_what_adapt_leaves_is_told_of_the_size_that_it_prunes_to():
    before, whole = lives("before", [0.5]), lives("weights-only", [0.5])
    (_, line) = onda.outcomes(before + whole + hybrid([0.6], 2.0) + hybrid([0.9], 8.0))
    assert line[5] == "0.500 → 0.900"


def test_a_network_that_is_pruned_in_the_round_itself_stands_beside_itself_and_beside_ours():
    whole = lives("weights-only", [0.9, 0.8], network="ds-cnn-l", parameters=400_000)
    rows = whole + hybrid([0.8, 0.7], 8.0, network="ds-cnn-l") + hybrid([0.9, 0.9], 8.0)

    rows += hybrid([0.95, 0.95], 4.0)
    itself, _ = claim(rows, "recall of ds-cnn-l 8x against itself")
    assert claim(rows, "recall of edge 8x against ds-cnn-l by weights only")[0].startswith("8.0x fewer parameters, +5.0 points")
    assert claim(rows, "recall of edge 8x against edge 4x")[0].startswith("-5.0 points")
    ours, _ = claim(rows, "recall of edge 8x against ds-cnn-l 8x, both")
    assert itself.startswith("8.0x fewer parameters, -10.0 points") and ours.startswith("+15.0 points")
