import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from edgekws import bench
from edgekws.cli import _flat, main
from edgekws.config import KeywordSettings
from edgekws.errors import EdgekwsError, PowerError, StoreError
from edgekws.model import builtin_models, find_model, load_model, rewrite_manifest
from edgekws.power import NoMeter, load_meter
from edgekws.promotion import WATCHED_S
from edgekws.store import ADAPTED, Store, load_enrolled, save_enrolled
from edgekws.values import Clip, Event

torch = pytest.importorskip("torch")
pytest.importorskip("torch_pruning")
from test_power import ORIN_NANO, jetson  # noqa: E402
from test_round import DEMO, KEYWORD, OTHER_S, SPEAKER, TAKES, ambience, moments  # noqa: E402
from test_round import ENDS_S as SPOKEN_S  # noqa: E402

from edgekws.training import adaptation, quantise  # noqa: E402
from edgekws.training import round as rounds  # noqa: E402
from edgekws.training.adaptation import Board, snapshot, why_not  # noqa: E402

torch.set_num_threads(1)
IDLE = Board(0.1, 50.0, 8000.0)
DAY_S = 86_400.0
# A real `edgekws adapt` but for little of everything that takes time, as in `quick`, and a gate that lets everything pass: what comes after
# it is what dies here.
CHILD = """
import sys
from edgekws.training import quantise
from edgekws.training import round as rounds
few = rounds.replay()[:2]
rounds.replay = lambda: few
rounds.verdict = lambda *heard: []
rounds.STEPS.update({"weights-only": 2})
rounds.FOREIGN = quantise.CALIBRATION_HOPS = 4
rounds.step_cpu_s.__defaults__ = (20, 3)
from edgekws.cli import main
sys.exit(main(["adapt", "--recipe", "weights-only", "--json", "--config", sys.argv[1]]))
"""


def make_state(folder, positives=8):
    """Settings and a state directory in which the demo's speaker has enrolled, woken it, and lived in a room. The settings' path."""
    root = folder / "state"
    config = folder / "edgekws.toml"
    config.write_text(f'[store]\nroot = "{root}"\n[model]\nid = "edge-small"\n')
    store = Store(root)
    store.save_enrolment(KEYWORD, SPEAKER, TAKES)
    now_s = time.time() - 3600
    for i, one in enumerate(moments(SPOKEN_S, positives)):
        clip = Clip("positive", KEYWORD, SPEAKER, 1.0, one.decided_sample, 0.0, "woke", model="edge-small", time_s=now_s + i)
        store.add_clip(clip, one.samples)
    for i, piece in enumerate(ambience(4)):
        store.add_clip(Clip("negative", "", "", -3.0, len(piece), 0.0, "the room", time_s=now_s + i), piece)
    store.close()
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_state(tmp_path_factory.mktemp("made"))


@pytest.fixture
def config(made, tmp_path):
    """Each test its own copy."""
    shutil.copytree(made.parent / "state", tmp_path / "state")
    path = tmp_path / "edgekws.toml"
    path.write_text(made.read_text().replace(str(made.parent), str(tmp_path)))
    return path


@pytest.fixture
def store(config):
    with contextlib.closing(Store(config.parent / "state")) as one:
        yield one


@pytest.fixture
def quick(monkeypatch):
    """Little of everything that takes time, and a gate that says what it is told: what follows it is tested here."""
    few = rounds.replay()[:2]
    monkeypatch.setattr(rounds, "replay", lambda: few)
    monkeypatch.setattr(rounds, "FOREIGN", 4)
    monkeypatch.setattr(quantise, "CALIBRATION_HOPS", 4)
    monkeypatch.setattr(rounds.step_cpu_s, "__defaults__", (20, 3))  # hops and repeats
    monkeypatch.setitem(rounds.STEPS, "weights-only", 2)
    reasons = []
    monkeypatch.setattr(rounds, "verdict", lambda *heard: list(reasons))
    return reasons


def said(store):
    return [event.extra["what"] for event in store.events(limit=10**6) if event.kind == "round"]


def everything(root):
    """All that listening reads, and the clips' rows."""
    with contextlib.closing(Store(root)) as store:
        files = {p: p.read_bytes() for p in sorted((root / "models").rglob("*")) if p.is_file()} if (root / "models").exists() else {}
        return files, store.current_model(), store.previous_model(), store.clips(), store.enrolments()


def test_what_the_gate_lets_pass_goes_live(config, store, quick, capsys, monkeypatch):
    monkeypatch.setattr("edgekws.power.load_meter", lambda: NoMeter("no power meter can be read here (rapl: none)"))
    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 0
    shown = capsys.readouterr()
    live = load_model(store.current_model())

    assert live.id.startswith("0001-") and live.raw["parent"] == load_model(find_model("edge-small")).id
    assert said(store) == ["started", "promoted"]
    assert [clip.state for clip in store.clips(label="positive")].count("admitted") >= 6
    assert [line.split()[0] for line in shown.out.splitlines()] == ["before", "after", f"{live.id}:", "the", "live:"]
    assert "s, energy not known: no power meter can be read here (edgekws doctor)\n" in shown.out
    cost = live.raw["cost"]
    assert (cost["energy_j"], cost["why_no_energy"]) == (None, "no power meter can be read here (rapl: none)")
    assert "step 2 of 2" in shown.err
    assert not (store.root / "round").exists()


@pytest.mark.parametrize("days", [1, 29])
def test_a_version_that_takes_the_place_of_one_on_trial_is_on_trial_against_the_one_before_it(store, quick, days):
    first = promoted(store, "0001-first", 0.0)
    os.utime(store.root / "models" / "current", (time.time() - days * 86_400,) * 2, follow_symlinks=False)
    _, live = adaptation.run(store, "edge-small", recipe="weights-only")

    assert live is not None and store.current_model() == live.path
    assert store.previous_model() == (None if days == 1 else first)


def test_after_going_back_a_new_version_is_on_trial_against_the_one_that_was_gone_back_to(config, store, quick):
    first = promoted(store, "0001-first", 0.0)
    os.utime(store.root / "models" / "current", (time.time() - 29 * 86_400,) * 2, follow_symlinks=False)
    adaptation.run(store, "edge-small", recipe="weights-only")
    assert main(["models", "rollback", "--config", str(config)]) == 0 and store.current_model() == first
    adaptation.run(store, "edge-small", recipe="weights-only")

    assert store.current_model() != first and store.previous_model() == first


def test_the_energy_of_a_round_is_in_the_versions_lineage_the_log_and_the_report(config, store, quick, capsys, tmp_path, monkeypatch):
    """By the meter of an Orin Nano as recorded: 4.775 W at its input, whatever this machine does."""
    tree = jetson(tmp_path / "sys", ORIN_NANO)
    monkeypatch.setattr("edgekws.power.load_meter", functools.partial(load_meter, "ina3221", sysfs=tree))
    monkeypatch.setattr(rounds, "GAP_S", 600.0)  # a machine that is busy with other tests
    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    cost = load_model(store.current_model()).raw["cost"]

    assert cost["energy_j"] == pytest.approx(4.775 * cost["round_s"], rel=0.02, abs=0.3)
    assert cost["meter"] == "ina3221, VDD_IN" and "why_no_energy" not in cost
    assert f"the round took {cost['round_s']} s, {cost['energy_j']} J by ina3221, VDD_IN" in shown
    assert main(["models", "show", "--config", str(config)]) == 0
    assert f"energy_j {_flat(cost['energy_j'])}, meter ina3221, VDD_IN" in capsys.readouterr().out
    assert main(["report", "--json", "--config", str(config)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [one["energy_j"] for one in facts["models"] if one["listens"]] == [cost["energy_j"]]
    assert f"parameters in {cost['round_s']} s and {cost['energy_j']} J" in facts["rounds"][-1]["words"]


def test_what_the_gate_refuses_leaves_all_versions_as_they_were_and_a_dry_run_everything(config, store, quick, capsys):
    before = everything(store.root)
    assert main(["adapt", "--recipe", "weights-only", "--dry-run", "--json", "--config", str(config)]) == 0
    facts = json.loads(capsys.readouterr().out)

    assert (facts["promoted"], facts["passed"]) == (False, True)
    assert {"reason", "model", "parameters", "admitted", "rejected", "held_out", "round_s", "cpu_us_per_hop"} <= set(facts)
    assert everything(store.root) == before

    quick.append("it is worse")
    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "not live: it is worse"
    assert everything(store.root)[:3] == before[:3]
    assert main(["adapt", "--recipe", "weights-only", "--dry-run", "--config", str(config)]) == 0
    assert said(store) == ["started", "tried", "started", "refused", "started", "refused"]
    assert [event.extra.get("dry_run") for event in store.events() if event.kind == "round"] == [None, True, None, None, None, True]


def test_where_the_pruned_version_is_refused_one_without_pruning_is_tried(config, store, quick, monkeypatch, capsys):
    monkeypatch.setitem(rounds.STEPS, "onda1", 2)
    verdicts = iter([["it is worse"]])
    monkeypatch.setattr(rounds, "verdict", lambda *heard: next(verdicts, []))
    assert main(["adapt", "--config", str(config)]) == 0

    assert "the gate refuses it: it is worse. Once more without pruning" in capsys.readouterr().err
    assert load_model(store.current_model()).raw["recipe"]["name"] == "weights-only"
    assert said(store) == ["started", "refused", "started", "promoted"]


def test_where_that_is_refused_too_prototypes_move_without_training_and_that_listens(config, store, quick, monkeypatch, capsys):
    monkeypatch.setitem(rounds.STEPS, "onda1", 2)
    verdicts = iter([["it is worse"], ["it is worse"]])
    monkeypatch.setattr(rounds, "verdict", lambda *heard: next(verdicts, []))
    assert main(["adapt", "--config", str(config)]) == 0
    live = load_model(store.current_model())

    assert "Once more without training" in capsys.readouterr().err
    assert live.raw["recipe"]["name"] == "prototypes"
    assert live.raw["files"]["model.onnx"] == load_model(find_model("edge-small")).raw["files"]["model.onnx"]
    assert said(store) == ["started", "refused", "started", "refused", "started", "promoted"]
    assert main(["run", "--config", str(config), "--source", str(DEMO / "stream.flac")]) == 0
    assert {event.model for event in store.events() if event.kind == "wake"} == {live.id}


def test_beside_a_pruned_version_one_without_pruning_is_not_tried(config, store, quick, monkeypatch):
    monkeypatch.setitem(rounds.STEPS, "onda1", 2)
    assert main(["adapt", "--recipe", "onda1", "--config", str(config)]) == 0
    quick.append("it is worse")
    assert main(["adapt", "--config", str(config)]) == 0

    assert said(store) == ["started", "promoted", "started", "refused"]


def test_a_network_that_does_not_ship_is_adapted_too(config, store, quick, tmp_path):
    own = shutil.copytree(find_model("edge-small"), tmp_path / "own")
    manifest = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**manifest, "network": "ds-cnn-s"}))
    config.write_text(config.read_text().replace('"edge-small"', f'"{own}"'))

    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 0
    assert load_model(store.current_model()).network == "ds-cnn-s"


@pytest.mark.parametrize("name", builtin_models())
def test_every_network_that_ships_has_another_one_that_gives_a_second_opinion(name):
    judge = adaptation._family(load_model(find_model(name)))

    assert judge in builtin_models() and judge != name


def test_with_the_smallest_network_too_other_words_are_rejected_and_a_version_is_looked_back_on(config, store, quick):
    for one in moments(OTHER_S, 4):
        store.add_clip(Clip("positive", KEYWORD, SPEAKER, 1.0, one.decided_sample, 0.0, "woke", time_s=time.time()), one.samples)
    adaptation.run(store, "edge-tiny", recipe="weights-only")

    states = [clip.state for clip in store.clips(label="positive")]
    assert states[:8].count("admitted") >= 6 and states[8:] == ["rejected"] * 4
    listening_since(store, 20.0, 8)
    assert "the version before alone hears 8, it alone 0" in adaptation.look_back(store, "edge-tiny")


@pytest.mark.parametrize("own", [True, False])
def test_that_there_is_no_second_opinion_is_said_once_a_round(store, quick, tmp_path, own):
    model = shutil.copytree(find_model("edge-small"), tmp_path / "own") if own else "edge-small"
    said = []
    adaptation.run(store, str(model), recipe="weights-only", say=said.append)

    assert [line for line in said if "no second opinion, and no looking back" in line] == (
        [f"no second opinion, and no looking back: {model} is not one of the networks that ship. All wakes that were kept are learned"]
        if own
        else []
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "onda3"], 'no recipe "onda3". Accepted: weights-only, onda1, onda2, prototypes'),
        (["--criterion", "size"], 'no criterion "size". Accepted: hap, taylor, fisher, l1, bn, random'),
        (["--target", "bytes=3"], 'no target "bytes=3". Accepted: params='),
        (["--recipe", "weights-only", "--target", "params=0.1"], "--target goes with a recipe that prunes, and weights-only does not"),
        (["--recipe", "weights-only", "--criterion", "l1"], "--criterion goes with a recipe that prunes, and weights-only does not"),
        (["--target", "energy_mj=0.1"], "no target in energy_mj here: no power meter. Give params=… or latency_ms=…"),
    ],
)
def test_wrong_usage_is_one_line_and_no_round(config, store, capsys, monkeypatch, options, words):
    for where in ("edgekws.power", "edgekws.training.adaptation"):
        monkeypatch.setattr(f"{where}.load_meter", lambda: NoMeter("no power meter"), raising=False)
    assert main(["adapt", *options, "--config", str(config)]) == 2
    shown = capsys.readouterr()

    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1 and words in shown.err
    assert said(store) == []


def test_a_second_round_at_the_same_time_says_so(config, store, capsys):
    with store.round_folder():
        assert main(["adapt", "--config", str(config)]) == 1

    assert "another round of adaptation is under way. Wait for its end" in capsys.readouterr().err
    assert said(store) == []


def test_nothing_enrolled_is_a_clear_error_that_the_log_keeps(tmp_path):
    with contextlib.closing(Store(tmp_path)) as store:
        with pytest.raises(EdgekwsError, match="nothing usable is enrolled"):
            adaptation.run(store, "edge-small")
        assert said(store) == ["started", "failed"]


def test_a_clip_that_is_cut_short_is_left_out_and_so_is_what_nobody_enrolled(store):
    broken = store.clips(label="positive")[2]
    path = store.root / "clips" / broken.file
    path.write_bytes(path.read_bytes()[:3000])
    store.add_clip(dataclasses.replace(broken, speaker="gone", event=0), TAKES[0])
    told = []
    found, known = snapshot(store, told.append)

    assert len(found.positives) == 7 and broken.id not in known
    assert len(told) == 1 and told[0].startswith("left out: ") and broken.file in told[0]
    assert len(found.ambience) == 4


def test_a_round_and_the_look_back_know_what_was_added_to_the_threshold(config, store, quick, monkeypatch):
    told = []
    monkeypatch.setattr(adaptation, "_voices", lambda *asked, real=adaptation._voices: told.append(real(*asked)) or told[-1])
    text = config.read_text()
    config.write_text(f'{text}[detector]\nthreshold_offset = 0.25\n[keyword."{KEYWORD}"]\nthreshold_offset = 0.5\n')
    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 0
    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 0

    assert [[voice.offset for voice in voices] for voices in told] == [[0.75], [0.75], [0.75]]  # the second looks back first


def test_a_damaged_version_in_use_is_named_and_nothing_is_changed(config, store, quick):
    live = store.promote(find_model("edge-small"), "0001-old")
    graph = live / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1000])
    before = everything(store.root)

    with pytest.raises(EdgekwsError, match="0001-old"):
        adaptation.run(store, "edge-small", recipe="weights-only")
    assert everything(store.root) == before
    assert said(store) == ["started", "failed"]


def test_a_round_that_is_interrupted_leaves_no_trace_but_a_row(store, quick):
    before = everything(store.root)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adaptation.run(store, "edge-small", recipe="weights-only", step_done=stop)
    assert everything(store.root) == before
    assert [event.extra.get("reason") for event in store.events()] == ["by hand", "interrupted"]
    assert not (store.root / "round").exists()


@pytest.mark.parametrize("cut", ["promote", "load_model"])
def test_a_round_that_is_interrupted_after_its_version_went_live_says_that_it_is_live(config, store, quick, capsys, monkeypatch, cut):
    """A fake: the moment between the exchange of the links and the row in the log cannot be met from outside."""
    promote, load = store.promote, adaptation.load_model

    def promoting(*args, **options):
        made = promote(*args, **options)
        if cut == "promote":
            raise KeyboardInterrupt
        return made

    def loading(path):
        if path == store.current_model():
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(store, "promote", promoting)
    monkeypatch.setattr(adaptation, "load_model", loading)
    with pytest.raises(KeyboardInterrupt):
        adaptation.run(store, "edge-small", recipe="weights-only")

    live = load(store.current_model())
    assert said(store) == ["started", "promoted"]
    row = store.events()[-1]
    assert (row.model, row.extra["recipe"], row.extra["parameters"]) == (live.id, "weights-only", live.parameters)
    assert main(["log", "--config", str(config)]) == 0
    assert "nothing was changed" not in capsys.readouterr().out


def test_a_round_that_runs_out_of_memory_is_one_line_and_changes_nothing(config, store):
    """A real round, whose address space ends 130 MB above what its modules take."""
    limit = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 130_000_000,) * 2)
from edgekws.cli import main
"""
    before = everything(store.root)
    child = "from edgekws.training import adaptation, export, finetune, prune\n" + CHILD.replace("from edgekws.cli import main\n", limit)
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as `edgekws` has it: with more, OpenBLAS itself may end the process
    ended = subprocess.run([sys.executable, "-c", child, str(config)], capture_output=True, text=True, env=env)

    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False), ended.stderr
    assert "nothing was changed: memory ran out" in ended.stderr.splitlines()[-1]
    assert said(store) == ["started", "failed"]
    assert "memory ran out" in store.events()[-1].extra["reason"] and everything(store.root) == before


def test_a_clip_that_the_listener_drops_meanwhile_stops_no_round(store, quick):
    """By its caps of number, size and age."""
    (clip,) = store.clips("positive")[:1]

    def step_done(done, total):
        with contextlib.closing(Store(store.root)) as listener:
            listener._delete_clips([clip])

    _, live = adaptation.run(store, "edge-small", recipe="weights-only", step_done=step_done)

    assert said(store) == ["started", "promoted"] and live.path == store.current_model()
    assert len(store.clips("positive")) == 7


@pytest.mark.parametrize("how", ["purged", "removed"])
def test_what_its_owner_deletes_during_a_round_does_not_go_live(store, quick, how):
    def step_done(done, total):
        with contextlib.closing(Store(store.root)) as owner:
            owner.purge_clips("positive") if how == "purged" else owner.remove_enrolment(KEYWORD)

    outcome, live = adaptation.run(store, "edge-small", recipe="weights-only", step_done=step_done)

    assert live is None is store.current_model()
    assert f" {how} " in outcome.reason
    assert said(store) == ["started", "refused"]


def test_a_purge_that_has_only_begun_counts_whole(store, quick, monkeypatch):
    """It goes by a few clips at a time, and a round may look in between; here it is killed there."""

    def killed(seconds):
        raise KeyboardInterrupt

    def step_done(done, total):
        if done == 1:
            with monkeypatch.context() as patched, contextlib.closing(Store(store.root)) as owner, pytest.raises(KeyboardInterrupt):
                patched.setattr("edgekws.store.BATCH", 1)
                patched.setattr("edgekws.store.time.sleep", killed)
                owner.purge_clips("positive")

    outcome, live = adaptation.run(store, "edge-small", recipe="weights-only", step_done=step_done)

    assert len(store.clips("positive")) == 7 and live is None is store.current_model()
    assert outcome.reason.startswith("8 of the 8 wakes that it learned from were purged")


@pytest.mark.parametrize("enabled", [True, False])
def test_who_is_enrolled_during_a_round_is_served_by_no_version_that_was_not_tried_on_them(store, quick, enabled):
    def step_done(done, total):
        with contextlib.closing(Store(store.root)) as owner:
            owner.save_enrolment("another", "bob", TAKES)

    keywords = {"another": KeywordSettings(enabled=enabled)}
    outcome, live = adaptation.run(store, "edge-small", recipe="weights-only", keywords=keywords, step_done=step_done)

    assert (live is None) == enabled == outcome.reason.startswith("another (bob) was enrolled since it was begun")
    assert said(store) == ["started", "refused" if enabled else "promoted"]
    assert [event.extra.get("overtaken") for event in store.events() if event.kind == "round"] == [None, True if enabled else None]


def test_a_voice_that_cannot_be_read_before_a_round_is_none_that_is_new_after_it(store, quick):
    bob = store.save_enrolment(KEYWORD, "bob", TAKES)
    bob.takes[0].write_bytes(b"damaged")

    assert adaptation.run(store, "edge-small", recipe="weights-only")[1] is not None


@pytest.mark.parametrize("how", ["removed", "purged", "called wrong", "went back"])
def test_what_happens_between_the_last_look_and_the_promotion_waits_for_that(store, quick, monkeypatch, how):
    """Else a version that knows a voice which is gone would go live unseen."""
    store.promote(find_model("edge-small"), "0000-old")
    owner = Store(store.root)
    (clip,) = owner.clips("positive")[:1]
    act = {
        "removed": lambda: owner.remove_enrolment(KEYWORD),
        "purged": lambda: owner.purge_clips("positive"),
        "called wrong": lambda: owner.reject_clip(clip.id),
        "went back": owner.rollback,
    }
    acting, promote = threading.Thread(target=act[how]), store.promote

    def promoting(*args, **options):
        acting.start()
        acting.join(0.5)
        assert acting.is_alive()
        return promote(*args, **options)

    monkeypatch.setattr(store, "promote", promoting)
    _, live = adaptation.run(store, "edge-small", recipe="weights-only")
    acting.join()
    owner.close()

    assert live is not None and said(store)[-1] == "promoted"


def test_a_damaged_recording_of_one_voice_stops_no_round_of_the_others(config, store, quick, capsys):
    bob = store.save_enrolment(KEYWORD, "bob", TAKES)
    take = next(store.root.glob(f"enrolments/*/bob*/{bob.takes[0].name}"))
    take.write_bytes(take.read_bytes()[:100])
    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 0

    assert "left out: " in capsys.readouterr().err and said(store) == ["started", "promoted"]


@pytest.mark.parametrize("say", ["confirm_clip", "reject_clip"])
def test_what_a_person_says_of_a_clip_during_a_round_holds(store, quick, say):
    (clip,) = store.clips("positive")[:1]

    def step_done(done, total):
        with contextlib.closing(Store(store.root)) as owner:
            getattr(owner, say)(clip.id)

    outcome, live = adaptation.run(store, "edge-small", recipe="weights-only", step_done=step_done)

    assert store.clip(clip.id).state == "confirmed"
    assert (live is not None) == (say == "confirm_clip")
    if live is None:
        assert outcome.reason == "1 of the wakes that it learned from were called wrong since it was begun"
        assert said(store) == ["started", "refused"]


def test_a_version_that_was_compared_with_one_that_listens_no_more_does_not_go_live(config, store, quick):
    def step_done(done, total):
        with contextlib.closing(Store(store.root)) as other:
            promoted(other, "0009-other", 0.0) if other.current_model() is None else None

    outcome, live = adaptation.run(store, "edge-small", recipe="weights-only", step_done=step_done)

    assert live is None and store.current_model().name == "0009-other" and store.previous_model() is None
    assert "another version listens since it was begun" in outcome.reason


def test_what_the_configuration_says_of_a_keyword_is_what_is_learned_and_gated(config, store, quick):
    """The listener asks for it by the enrolment and that choice; else it would enrol anew, past the gate."""
    text = config.read_text()
    config.write_text(f'{text}[keyword."{KEYWORD}"]\nonly_enrolled = true\n')
    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 0

    (enrolment,) = store.enrolments()
    ((key, learned),) = load_enrolled(store.current_model() / ADAPTED).items()
    assert key == f"{enrolment.id} True"
    assert len(learned.voice) and learned.word_samples  # as enrolment has it

    config.write_text(f'{text}[keyword."{KEYWORD}"]\nenabled = false\n')
    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 1  # nothing is left


def test_a_round_that_was_killed_is_told_by_the_next_also_after_one_that_was_skipped(store):
    store.add_event(round_event("started", 1000.0))
    (store.root / "round" / ".new-killed").mkdir(parents=True)
    (store.root / "round" / ".new-killed" / "half").write_text("of a model")
    store.add_event(round_event("skipped", 2000.0))
    store.remove_enrolment(KEYWORD)

    with pytest.raises(EdgekwsError, match="nothing usable"):
        adaptation.run(store, "edge-small")
    assert said(store) == ["started", "skipped", "cut short", "started", "failed"]
    assert "the configured model goes on listening" in store.events()[2].extra["reason"]
    assert not (store.root / "round").exists()


def test_a_full_disk_is_one_clear_error_and_costs_nothing_that_was_there(made, tmp_path, quick):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        root = shutil.copytree(made.parent / "state", disk / "state")
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(b"\0" * (free.f_bavail * free.f_frsize - 200_000))  # room for events, not for a model
        before = everything(root)
        with contextlib.closing(Store(root)) as store, pytest.raises(StoreError, match=r"No space left.*Free space"):
            adaptation.run(store, "edge-small", recipe="weights-only")
        (disk / "filler").unlink()

        assert everything(root) == before
        with contextlib.closing(Store(root)) as store:
            assert said(store) == ["started", "failed"]
    finally:
        subprocess.run(["umount", disk], check=True)


def killed_rounds(config, count, seed):
    """Kill so many rounds, each at a random moment after one of its lines; what is left of each, WRONG where that may not be.

    The first one is let run, so that it is known what it says and how long that takes: the machine may be much busier later.
    """
    rng = random.Random(seed)
    root = config.parent / "state"
    pauses_s = []  # behind each line of the first one
    for number in range(count + 1):
        with contextlib.closing(Store(root)) as store:
            before, events = store.current_model(), len(said(store))
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        start_s = time.monotonic()
        if number == 0:
            ends_s = [time.monotonic() for _ in child.stderr]
            code = child.wait()
            pauses_s = [b - a for a, b in itertools.pairwise([start_s, *ends_s, time.monotonic()])]
            if code:
                yield f"WRONG: a round that nobody killed ends with {code}"
            continue
        # The last stretch is the promotion's: as often as all others.
        wanted = rng.choice([rng.randrange(1, len(pauses_s)), len(pauses_s) - 1])
        for _ in range(wanted):
            child.stderr.readline()
        slower = (time.monotonic() - start_s) / sum(pauses_s[:wanted])
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(rng.uniform(0, 1.1) * pauses_s[wanted] * slower)
        child.kill()
        child.stderr.close()
        child.wait()
        with contextlib.closing(Store(root)) as store:
            now, log = store.current_model(), said(store)
            try:
                load_model(now)
            except EdgekwsError as error:
                yield f"WRONG: {error}"
                continue
        died = log[events:]
        if list(root.glob("*damaged*")):
            yield "WRONG: the database was damaged"
        elif "started" in log[:events][-1:] and died and died[0] != "cut short":
            yield "WRONG: nobody said that the round before was killed"
        elif now != before and not (died and died[-1] in ("started", "promoted")):
            yield "WRONG: another version without a round"
        else:
            yield f"{'the new version listens' if now != before else 'the version from before listens'}, the log ends with {log[-1]}"


def test_a_round_may_be_killed_at_any_moment(config):
    """Three here; `benchmarks/kill_round.py 200` does more."""
    found = list(killed_rounds(config, 3, seed=1))

    assert len(found) == 3
    assert [what for what in found if what.startswith("WRONG")] == []
    with contextlib.closing(Store(config.parent / "state")) as store, store.round_folder() as folder:
        assert list(folder.iterdir()) == []


# Knowing when.


def round_event(what, time_s, **facts):
    return Event("", "", 0.0, 0.0, time_s, 0.0, 0.0, "", "round", extra={"what": what, **facts})


class Kept:
    """Of a store what `why_not` reads, so that a thousand clips need no audio."""

    def __init__(self, positives=20, room=40, between=0, wrong=0, score=1.0, time_s=1000.0, events=(), older=(), enrolled=("k",)):
        self._enrolled = [SimpleNamespace(keyword=keyword) for keyword in enrolled]

        def clip(label, keyword, state="quarantined"):
            return Clip(label, keyword, "", score, 0, 1.0, "", state, time_s=time_s)

        self._clips = [*older, *(clip("positive", "k") for _ in range(positives)), *(clip("negative", "") for _ in range(room))]
        self._clips += [clip("between", "k") for _ in range(between)] + [clip("negative", "k", "confirmed") for _ in range(wrong)]
        self._events = [dataclasses.replace(event, id=i + 1) for i, event in enumerate(events)]

    def enrolments(self):
        return self._enrolled

    def clips(self):
        return self._clips

    def events(self, after=0):
        return [event for event in self._events if event.id > after]


LAST = [round_event("promoted", 500.0)]
OLDER = [Clip("positive", "k", "", 1.4, 0, 1.0, "", time_s=600.0)] * 9
LEARNED = [Clip("positive", "k", "", 1.0, 0, 1.0, "", time_s=400.0)] * 21


def wakes(count, score, keyword="k", speaker="", model="", time_s=1000.0):
    return [Clip("positive", keyword, speaker, score, 0, 1.0, "", model=model, time_s=time_s)] * count


@pytest.mark.parametrize(
    ("kept", "board", "now_s", "reason"),
    [
        (Kept(enrolled=()), IDLE, DAY_S, "nothing that is listened for is enrolled"),
        (Kept(events=LAST), IDLE, 500.0 + 3600, "the last round was 1.0 h ago, the next is due after 20 h"),
        (Kept(positives=11), IDLE, DAY_S, "11 wakes were kept since the last round, 12 are enough"),
        (Kept(time_s=400.0, events=LAST), IDLE, DAY_S, "0 wakes were kept since the last round"),
        (Kept(room=29), IDLE, DAY_S, "29 pieces of the room were kept, 30 are enough"),
        (Kept(events=LAST, older=LEARNED), IDLE, DAY_S, "nothing asks for it"),
        (Kept(), Board(0.9, 50.0, 8000.0), DAY_S, "the machine is busy (load 0.9 a core, accepted 0.7)"),
        (Kept(), Board(0.1, 80.0, 8000.0), DAY_S, "the machine is hot (80 °C, accepted 75)"),
        (Kept(), Board(0.1, 50.0, 500.0), DAY_S, "memory is short (500 MB free, wanted 1500)"),
        (Kept(), Board(0.1, 50.0, 8000.0, on_battery=True), DAY_S, "the machine runs on its battery"),
    ],
)
def test_there_is_no_round_without_data_need_and_an_idle_machine(kept, board, now_s, reason):
    assert why_not(kept, board, now_s)[0].startswith(reason)


def test_where_nothing_can_be_trained_a_round_needs_little_memory(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)

    assert why_not(Kept(), Board(0.1, 50.0, 500.0), DAY_S)[0] is None
    assert why_not(Kept(), Board(0.1, 50.0, 300.0), DAY_S)[0] == "memory is short (300 MB free, wanted 400)"


def test_a_keyword_that_is_switched_off_asks_for_no_round():
    off = {"k": KeywordSettings(enabled=False)}

    assert why_not(Kept(), IDLE, DAY_S, off)[0].startswith("nothing that is listened for is enrolled")
    assert why_not(Kept(enrolled=("k", "other")), IDLE, DAY_S, off)[0].startswith("0 wakes were kept since the last round")


@pytest.mark.parametrize(
    ("kept", "asked_by"),
    [
        (Kept(), "it was never adapted to this room"),
        (Kept(wrong=2, events=LAST), "2 wakes were called wrong"),
        (Kept(between=10, events=LAST), "10 moments nearly woke, beside 20 wakes"),
        (Kept(events=LAST, older=LEARNED[1:]), "20 wakes were kept since the last round, and 20 before it"),
        (Kept(events=LAST, older=OLDER), "the later half of the wakes of k scores 0.4 lower than the earlier half"),
        (Kept(events=[round_event("refused", 500.0)]), "it was never adapted to this room"),
        (Kept(events=[round_event("promoted", DAY_S - 1, dry_run=True)]), "it was never adapted to this room"),
        (Kept(events=[round_event("refused", DAY_S - 1, overtaken=True)]), "it was never adapted to this room"),
        (Kept(events=[round_event("promoted", 9 * DAY_S)]), "it was never adapted to this room"),  # the clock was set back
    ],
)
def test_a_round_has_a_reason(kept, asked_by):
    assert why_not(kept, IDLE, DAY_S) == (None, asked_by)
    assert why_not(kept, Board(None, None, None), DAY_S) == (None, asked_by)  # what cannot be read stops nothing


@pytest.mark.parametrize(
    "clips",
    [
        wakes(20, 3.5, speaker="ann", time_s=100.0) + wakes(6, 3.5, speaker="ann") + wakes(20, 1.2, speaker="bob"),
        wakes(20, 3.5, time_s=100.0) + wakes(6, 3.5) + wakes(20, 1.2, keyword="other"),
        wakes(20, 3.5, model="0001-before", time_s=100.0) + wakes(20, 1.2, model="0002-after"),
        wakes(11, 3.5, time_s=100.0) + wakes(12, 1.2),
    ],
    ids=["another speaker", "another keyword", "another version", "few"],
)
def test_wakes_that_score_lower_for_another_reason_than_the_voice_are_no_drift(clips):
    kept = Kept(positives=0, events=LAST, older=clips, enrolled=("k", "other"))

    assert "lower than the earlier half" not in "".join(map(str, why_not(kept, IDLE, DAY_S)))


def test_of_several_voices_one_loses_more_before_a_version_is_gone_back_from():
    assert adaptation.fell(5, 0) and not adaptation.fell(5, 0, 4) and adaptation.fell(7, 0, 4)


def test_if_needed_says_why_there_is_no_round(config, store, capsys):
    assert main(["adapt", "--if-needed", "--config", str(config)]) == 0
    assert capsys.readouterr().out == "no round: 8 wakes were kept since the last round, 12 are enough\n"
    assert main(["adapt", "--if-needed", "--json", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "promoted": False,
        "skipped": "8 wakes were kept since the last round, 12 are enough",
        "gone_back": None,
    }
    assert said(store) == ["skipped"]  # not the same line every night


def test_at_night_a_round_waits_for_the_mains_and_one_that_was_asked_for_does_not(config, store, quick, tmp_path, capsys, monkeypatch):
    battery = tmp_path / "sys" / "class" / "power_supply" / "BAT0"
    battery.mkdir(parents=True)
    (battery / "type").write_text("Battery\n")
    (battery / "status").write_text("Discharging\n")
    board = dataclasses.replace(IDLE, on_battery=Board.now(tmp_path / "sys").on_battery)
    monkeypatch.setattr(Board, "now", lambda: board)
    monkeypatch.setattr(adaptation, "NEW_POSITIVES", 8)
    monkeypatch.setattr(adaptation, "AMBIENCE_PIECES", 4)

    assert main(["adapt", "--if-needed", "--config", str(config)]) == 0
    assert capsys.readouterr().out == "no round: the machine runs on its battery\n"
    assert main(["adapt", "--recipe", "weights-only", "--config", str(config)]) == 0
    assert said(store) == ["skipped", "started", "promoted"]


def test_a_nightly_round_that_a_hot_board_gives_up_fails_no_unit(config, store, capsys, monkeypatch):
    def hot(*args, **options):
        raise PowerError("training was given up after 900 s of waiting: the board has 91 °C, accepted is 80")

    monkeypatch.setattr(adaptation, "why_not", lambda *args: (None, "a test"))
    monkeypatch.setattr(adaptation, "snapshot", hot)
    assert main(["adapt", "--if-needed", "--config", str(config)]) == 0
    assert capsys.readouterr().out.startswith("no round: training was given up after 900 s")
    assert said(store) == ["started", "failed"]
    assert main(["adapt", "--config", str(config)]) == 1


def promoted(store, name, threshold_above):
    """A version as a round leaves it, its threshold so far above the packaged one's."""
    voices = adaptation._voices(store)
    made = shutil.copytree(find_model("edge-small"), store.root.parent / name)
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps({**manifest, "id": name}))
    enrolled = rounds.listened_for(load_model(made), voices)
    changed = [dataclasses.replace(one, threshold=one.threshold + threshold_above) for one in enrolled]
    save_enrolled(made / ADAPTED, {f"{v.id} {v.only_enrolled}": one for v, one in zip(voices, changed, strict=True)})
    rewrite_manifest(made)
    return store.promote(made, name)


def heard(store, hours=30.0):
    """As the log says it: an hour of the packaged version, and then a day or so of the promoted one."""
    for model, first_s, last_s in (("edge-small", 0.0, 3600.0), (store.current_model().name, 4000.0, 4000.0 + hours * 3600)):
        for kind, at_s in (("start", first_s), ("stop", last_s)):
            store.add_event(Event("", "", 0.0, 0.0, time.time() + at_s, at_s - first_s, 0.0, model, kind))


def listening_since(store, threshold_above, words, others=0, after_s=0.0):
    """A promoted version, and clips that it kept of words and of other speech."""
    live = promoted(store, "0001-new", threshold_above)
    for i, one in enumerate([*moments(SPOKEN_S, words), *moments(OTHER_S, others)]):
        clip = Clip("between", KEYWORD, SPEAKER, 0.0, one.decided_sample, 0.0, "", model="0001-new", time_s=time.time() + i + after_s)
        store.add_clip(clip, one.samples)
    return live


def test_an_adapted_version_s_memory_is_measured_with_something_to_listen_for(store, tmp_path, null_sink, monkeypatch):
    monkeypatch.setenv("PULSE_SERVER", null_sink.env["PULSE_SERVER"])
    live = load_model(promoted(store, "0001-new", 0.0))
    (live.path / "prototypes.npz").unlink(missing_ok=True)
    rewrite_manifest(live.path)
    found = bench._at_a_microphone(load_model(live.path), "onnxruntime", tmp_path)

    assert found["why_no_microphone"] is None and 15 < found["rss_mb_microphone"] <= 80


def test_a_version_that_hears_less_of_its_owner_than_the_one_before_is_gone_back_from(config, store, capsys):
    listening_since(store, 20.0, 8)
    before = store.clips()
    assert main(["adapt", "--if-needed", "--json", "--config", str(config)]) == 0

    assert store.current_model() is None and store.clips() == before
    events = [event for event in store.events() if event.kind == "model"]
    assert [(event.model, event.extra["what"], event.extra["back_to"]) for event in events] == [
        ("0001-new", "rolled back", "the configured model")
    ]
    assert "the version before alone hears 8, it alone 0" in events[0].extra["reason"]
    shown = capsys.readouterr()
    assert "edgekws: the configured model listens again, since 0001-new hears less of its owner" in shown.err
    assert "hears 8, it alone 0" in json.loads(shown.out)["gone_back"]


@pytest.mark.parametrize(
    ("threshold_above", "words", "why"), [(20.0, 4, "four words may be chance"), (0.0, 8, "it hears what the one before hears")]
)
def test_a_version_stays_where_nothing_shows_that_it_hears_less(config, store, threshold_above, words, why):
    live = listening_since(store, threshold_above, words)

    assert adaptation.look_back(store, "edge-small") is None, why
    assert store.current_model() == live


@pytest.mark.parametrize(("words", "kept_after_s", "back"), [(3, 0.0, True), (2, 0.0, False), (3, WATCHED_S, False)])
def test_when_the_week_is_over_three_words_of_it_are_enough(config, store, words, kept_after_s, back):
    """What was kept later does not count: the version before did not listen along then, so its words are not all there."""
    live = listening_since(store, 20.0, words, after_s=kept_after_s)
    heard(store)

    assert adaptation.look_back(store, "edge-small") is None
    assert (adaptation.look_back(store, "edge-small", now=lambda: time.time() + WATCHED_S) is not None) == back
    assert store.current_model() == (None if back else live)


def test_a_week_in_which_the_board_was_off_is_not_over(config, store):
    """Kept now, three words that only the version before hears would not count once a day has been heard."""
    live = listening_since(store, 20.0, 3)
    heard(store, hours=3.0)

    assert adaptation.look_back(store, "edge-small", now=lambda: time.time() + 2 * WATCHED_S) is None
    assert store.current_model() == live and all(event.kind != "model" for event in store.events())
    assert adaptation.look_back(store, "edge-small", now=lambda: time.time() + 4 * WATCHED_S) is not None


def test_when_the_week_is_over_a_version_is_looked_at_once_and_then_stays(config, store, capsys):
    live = listening_since(store, 20.0, 2)
    heard(store)
    after = {"now": lambda: time.time() + WATCHED_S}
    assert adaptation.look_back(store, "edge-small", **after) is None
    for i, one in enumerate(moments(SPOKEN_S, 4)[2:]):
        clip = Clip("between", KEYWORD, SPEAKER, 0.0, one.decided_sample, 0.0, "", model="0001-new", time_s=time.time() + i)
        store.add_clip(clip, one.samples)
    assert adaptation.look_back(store, "edge-small", **after) is None

    assert store.current_model() == live
    assert main(["log", "--config", str(config)]) == 0
    told = f"and it stays: of {KEYWORD} ({SPEAKER}) since then the version before alone hears 2, it alone 0"
    assert capsys.readouterr().out.count(told) == 1


def test_a_wake_that_a_later_round_rejected_still_counts_for_the_version_that_woke(config, store):
    promoted(store, "0000-deaf", 20.0)
    live = promoted(store, "0001-new", 0.0)
    heard(store)
    for i, one in enumerate(moments(SPOKEN_S, 8)):
        clip = Clip("positive", KEYWORD, SPEAKER, 1.0, one.decided_sample, 0.0, "woke", model="0001-new", time_s=time.time() + i)
        store.add_clip(dataclasses.replace(clip, state="rejected"), one.samples)
    adaptation.look_back(store, "edge-small", now=lambda: time.time() + WATCHED_S)

    assert store.current_model() == live
    assert "alone hears 0, it alone 8" in store.events()[-1].extra["reason"]


def test_that_the_version_before_woke_at_other_speech_speaks_for_nobody(config, store):
    before = promoted(store, "0000-restless", -20.0)
    live = listening_since(store, 20.0, 4, others=8)
    assert adaptation.look_back(store, "edge-small") is None
    assert store.current_model() == live

    for clip in store.clips(label="between")[-8:]:
        store.confirm_clip(clip.id)  # unless their owner says that these are words
    assert adaptation.look_back(store, "edge-small") is not None
    assert store.current_model() == before


def test_nobody_looks_back_in_a_dry_run_or_at_a_version_that_cannot_be_read(config, store, quick):
    live = listening_since(store, 20.0, 8)
    assert main(["adapt", "--dry-run", "--recipe", "weights-only", "--config", str(config)]) == 0
    assert store.current_model() == live

    graph = live / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1000])
    told = []
    assert adaptation.look_back(store, "edge-small", say=told.append) is None
    assert "0001-new" in told[0] and store.current_model() == live
