import hashlib
import json
import shutil

import pytest

from edgekws.errors import ModelError
from edgekws.model import FORMAT, State, builtin_models, find_model, load_model, turns


@pytest.fixture
def copy(tmp_path):
    """A directory of our own to damage."""
    return shutil.copytree(find_model("edge-small"), tmp_path / "model")


def rewrite(path, **fields) -> None:
    """Change fields of the manifest; None takes one away."""
    raw = {**json.loads((path / "manifest.json").read_text()), **fields}
    (path / "manifest.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize("name", sorted(builtin_models()))
def test_a_shipped_model_is_whole(name):
    model = load_model(find_model(name))

    assert model.dim > 0
    assert model.parameters > 0


def test_a_shipped_model_that_changes_gets_an_id_of_its_own():
    """A version never changes: the copy that somebody promoted from an earlier package would stand in the new one's way for ever.

    Where this fails, raise the number of the model's id, and put its manifest here, which holds the hash of each other file.
    """
    found = {load_model(path).id: hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest() for path in builtin_models().values()}

    assert {id: sha256[:16] for id, sha256 in found.items()} == {
        "ds-cnn-l-3": "63728dbc09011855",
        "edge-3": "e75273e21da183b4",
        "edge-small-4": "ec412af6c163de71",
        "edge-tiny-3": "73c3f6b82326302d",
    }


def test_the_shipped_weights_together_stay_below_4_mb():
    assert {"edge", "edge-small", "edge-tiny", "ds-cnn-l"} <= set(builtin_models())
    assert sum((path / "model.onnx").stat().st_size for path in builtin_models().values()) <= 4e6


@pytest.mark.parametrize("name", ["model.onnx", "parity.npz"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()

    with pytest.raises(ModelError, match=rf"{name}: missing, but the manifest lists it\. Restore it"):
        load_model(copy)


@pytest.mark.parametrize("name", ["model.onnx", "parity.npz"])
def test_one_altered_byte_is_noticed(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)

    with pytest.raises(ModelError, match=rf"{name}: altered \(sha256 [0-9a-f]{{12}}…, manifest [0-9a-f]{{12}}…\)"):
        load_model(copy)


def test_a_later_format_says_to_upgrade(copy):
    rewrite(copy, format=FORMAT + 1)

    with pytest.raises(ModelError, match=f"format {FORMAT + 1}, this edgekws reads up to {FORMAT}. Upgrade edgekws"):
        load_model(copy)


def test_states_of_the_first_format_last_one_hop(copy):
    rewrite(copy, format=1, states=[["state_0", [2, 96]]])

    assert load_model(copy).states == (State("state_0", (2, 96), 1),)


def test_what_a_hop_leaves_is_read_at_the_next_hops_and_then_written_over():
    states = [State("one", (1,)), State("two", (1,), 2)]
    buffers: dict[tuple[int, int], int] = {}
    read = []
    for hop, turn in enumerate(2 * turns(states)):
        read.append([buffers.get(turn[name]) for name in ("one", "two", "two_2")])
        buffers[turn["one_next"]] = buffers[turn["two_next"]] = hop

    assert read[2:] == [[hop - 1, hop - 1, hop - 2] for hop in range(2, 12)]


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1,', b"\xff\xfe\x00"])
def test_a_manifest_that_is_no_json_says_what_to_do(copy, content):
    (copy / "manifest.json").write_bytes(content)

    with pytest.raises(ModelError, match=r"manifest\.json: not readable as JSON .* use another model: edgekws models list"):
        load_model(copy)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "1"}', "3"])
def test_json_that_is_no_manifest_of_ours_is_refused(copy, content):
    (copy / "manifest.json").write_text(content)

    with pytest.raises(ModelError, match='no "format" number, so not a manifest of edgekws'):
        load_model(copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": None}, "KeyError 'dim'"),
        ({"dim": "many"}, "ValueError .* where the model contract wants another value"),
        ({"states": [["state_0"]]}, "ValueError"),
        ({"states": 3}, "TypeError"),
        ({"files": []}, "does not list model.onnx"),
        ({"files": None}, "KeyError 'files'"),
        ({"hop_ms": 10}, r"made for rate 16000 Hz, hop 10 ms, 40 mel bins, 4 frames a hop; this edgekws has 16000, 80, 40, 4"),
    ],
)
def test_a_manifest_that_breaks_the_contract_is_refused(copy, fields, message):
    rewrite(copy, **fields)

    with pytest.raises(ModelError, match=message):
        load_model(copy)


def test_a_directory_without_a_manifest_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no manifest\.json"):
        load_model(tmp_path)


def test_an_unknown_model_lists_the_built_in_ones(tmp_path):
    with pytest.raises(ModelError, match=r'no model ".*nowhere"\. Built in: ds-cnn-l, edge, edge-small, edge-tiny; or give a directory'):
        find_model(tmp_path / "nowhere")
