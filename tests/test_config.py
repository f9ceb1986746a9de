"""One TOML file → Settings, or one clear ConfigError."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edgekws import config
from edgekws.config import Settings, load_settings, parse_settings
from edgekws.errors import ConfigError
from edgekws.model import DEFAULT_MODEL

SHIPPED = Path(__file__).parent.parent / "deploy" / "edgekws.toml"


def refusal(toml: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_settings(toml)
    return str(caught.value)


def test_the_shipped_file_is_the_defaults():
    assert load_settings(SHIPPED) == Settings()


def test_the_shipped_file_names_every_key_and_no_other():
    lines = SHIPPED.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("# [keyword."))
    uncommented = [re.sub(r"^# ", "", line) if i >= start else line for i, line in enumerate(lines)]
    settings = parse_settings("\n".join(uncommented))
    written = {match[1] for line in uncommented if (match := re.match(r"(\w+) = ", line))}
    sections = (
        settings.audio,
        settings.model,
        settings.detector,
        settings.store,
        settings.sinks,
        settings.mqtt,
        settings.metrics,
        settings.learning,
        settings.keyword["hey snips"],
    )

    assert written == {key for section in sections for key in vars(section)}


@pytest.mark.parametrize(("made", "path"), [(config.page(), config.PAGE), (config.example(), config.FILE)])
def test_the_reference_and_the_shipped_file_are_what_the_code_says(made, path):
    assert made == (SHIPPED.parent.parent / path).read_text(), "edgekws/config.py has changed. Run: python -m edgekws.config"


def test_the_reference_tells_of_each_key_its_default_what_is_accepted_and_what_it_means():
    page = config.page()

    assert "| `refractory_s` | `2.0` | a number from 0 to 60 | Seconds in which a keyword that woke does not wake again. |" in page
    assert re.findall(r"\|  +\|", page) == []
    assert all(f"| `{key}` | `" in page for key in re.findall(r"^(\w+) = ", SHIPPED.read_text(), re.M))


def test_the_default_model_is_the_one_that_ships():
    assert Settings().model.id == DEFAULT_MODEL


def test_values_reach_their_fields(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text(
        f"""
        [audio]
        source = "stdin:"
        [detector]
        refractory_s = 1
        [keyword."hey snips"]
        only_enrolled = true
        threshold_offset = -0.05
        [store]
        root = "{tmp_path}/state"
        [sinks]
        command = ["logger", "-t", "edgekws"]
        """
    )
    settings = load_settings(file)

    assert settings.audio.source == "stdin:"
    assert settings.detector.refractory_s == 1.0
    assert settings.keyword["hey snips"].only_enrolled is True
    assert settings.keyword["hey snips"].threshold_offset == -0.05
    assert settings.store.root == tmp_path / "state"
    assert settings.sinks.command == ("logger", "-t", "edgekws")
    assert settings.model == Settings().model


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[detector]\nrefractory = 2.0", 'unknown key "detector.refractory" (did you mean "refractory_s"?)'),
        ("[detecter]\nrefractory_s = 2.0", 'unknown key "detecter" (did you mean "detector"?)'),
        ('[keyword."hey snips"]\nonly_enroled = true', 'unknown key "keyword."hey snips".only_enroled" (did you mean "only_enrolled"?)'),
        ("[detector]\nrefractory_s = 61", "detector.refractory_s = 61. Accepted: a number from 0 to 60"),
        ("[detector]\nrefractory_s = nan", "detector.refractory_s = nan. Accepted: a number from 0 to 60"),
        ("[detector]\nrefractory_s = true", "detector.refractory_s = true. Accepted: a number"),
        ('[detector]\nrefractory_s = "2"', 'detector.refractory_s = "2". Accepted: a number'),
        ("[store]\nevents_max = 1.5", "store.events_max = 1.5. Accepted: a whole number from 1 to 10000000"),
        (f"[store]\nevents_max = {'9' * 400}", "store.events_max = an integer of more than 40 digits. Accepted: a whole number"),
        ('[store]\nroot = "state"', 'store.root = "state". Accepted: an absolute path'),
        ('[sinks]\ncommand = "reboot"', 'sinks.command = "reboot". Accepted: a list of strings'),
        ("[sinks]\ncommand = [1]", "sinks.command[0] = 1. Accepted: text"),
        ('[audio]\nsource = ""', 'audio.source = "". Accepted: text, not empty'),
        ("[sinks]\nsocket = 1", "sinks.socket = 1. Accepted: true or false"),
        ("[mqtt]\nurl = 1883", "mqtt.url = 1883. Accepted: text"),
        ('[mqtt]\npassword = "x"', 'unknown key "mqtt.password"'),
        ("[metrics]\nport = 65536", "metrics.port = 65536. Accepted: a whole number from 0 to 65535"),
        ("keyword = 3", "keyword = 3. Accepted: a table: [keyword]"),
        ("[keyword]\nalexa = true", 'keyword."alexa" = true. Accepted: a table'),
        ('[keyword."alexa"]\nonly_enrolled = "yes"', 'only_enrolled = "yes". Accepted: true or false'),
        ("[audio\n", "not TOML: "),
        (f"a = {'[' * 5000}", "not TOML: "),
        (f"a = {'9' * 5000}", "edgekws.toml: "),
    ],
)
def test_a_bad_file_is_refused_with_the_value_and_what_is_accepted(toml, says):
    assert says in refusal(toml)


def test_without_a_file_the_defaults_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "SYSTEM_FILE", tmp_path / "none.toml")

    assert load_settings() == Settings()


def test_the_system_file_is_read_when_no_other_is_named(tmp_path, monkeypatch):
    system = tmp_path / "edgekws.toml"
    system.write_text('[audio]\nsource = "mic:ReSpeaker"')
    monkeypatch.setattr(config, "SYSTEM_FILE", system)

    assert load_settings().audio.source == "mic:ReSpeaker"


def test_a_file_that_was_named_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file.*deploy/edgekws.toml"):
        load_settings(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 5"):
        load_settings(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("path", "code"), [("/proc/self/mem", 1), ("/no/such.toml", 2), ("/proc", 2)]
)  # the first cannot be read: input/output error
def test_what_another_start_may_read_is_no_reason_to_stay_down(path, code):
    """The unit does not start again what ended with 2."""
    with pytest.raises(ConfigError) as refused:
        load_settings(Path(path))

    assert refused.value.exit_code == code


def test_the_state_directory_follows_systemd_then_the_home(monkeypatch):
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/edgekws:/var/lib/other")
    assert Settings().store.root == Path("/var/lib/edgekws")

    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setenv("HOME", "/home/someone")
    assert Settings().store.root == Path("/home/someone/.local/state/edgekws")


_SCALARS = st.one_of(
    st.booleans().map(lambda b: str(b).lower()),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters='"\\'), max_size=20).map(lambda s: f'"{s}"'),
    st.sampled_from(
        ['"\\u0000"', '"~nobody-of-that-name/x"', "1979-05-27", "07:32:00", "[]", "[[]]", "{}", "{ a = 1 }", '["", 1]', "0x" + "f" * 300]
    ),
)
_TABLES = st.sampled_from(
    ["audio", "model", "detector", "store", "sinks", "mqtt", "metrics", 'keyword."hey snips"', 'keyword.""', "keyword", "elsewhere"]
)
_KEYS = st.sampled_from(
    [
        "source",
        "id",
        "engine",
        "refractory_s",
        "threshold_offset",
        "only_enrolled",
        "root",
        "events_max",
        "command",
        "command_timeout_s",
        "socket",
        "url",
        "site",
        "ca_file",
        "discovery",
        "port",
        "host",
    ]
)


@hypothesis_settings(deadline=None)  # a busy machine is no defect
@given(_TABLES, _KEYS, _SCALARS)
def test_any_value_anywhere_gives_settings_or_one_line(table, key, value):
    try:
        parse_settings(f"[{table}]\n{key} = {value}\n")
    except ConfigError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 400


@hypothesis_settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_settings_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        parse_settings(text)
