"""The operator's choices: one TOML file → frozen `Settings`. Whatever the file holds, the result is Settings or a ConfigError.

What a model or a keyword *is* lives in its manifest and in the store; here is only what somebody may want otherwise.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import errno
import json
import math
import os
import sys
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from edgekws.errors import ConfigError, printable

SYSTEM_FILE = Path("/etc/edgekws/edgekws.toml")

_T = TypeVar("_T")


def default_root() -> Path:
    """Where state is kept: $STATE_DIRECTORY (systemd sets it), else ~/.local/state/edgekws."""
    from_systemd = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(from_systemd) if from_systemd else Path(os.path.expanduser("~")) / ".local" / "state" / "edgekws"


def _number(default: _T, low: float, high: float) -> _T:
    return field(default=default, metadata={"range": (low, high)})


def _text(default: str) -> str:
    """Text that may be empty."""
    return field(default=default, metadata={"empty": True})


# What follows is said once: `python -m edgekws.config` makes docs/configuration.md and deploy/edgekws.toml of these strings.


@dataclass(frozen=True)
class AudioSettings:
    """What is listened to."""

    source: str = "mic:default"
    """mic:default, mic:NAME (any part of a name that `edgekws devices` prints), file:PATH, or stdin: (raw 16-bit mono at 16 kHz)."""


@dataclass(frozen=True)
class ModelSettings:
    """The network, and what runs it. A version that was promoted (`edgekws adapt`, `edgekws models promote`) goes before `id`."""

    id: str = "edge"
    """A built-in model (`edgekws models list`), or the path of a model directory."""
    engine: str = "auto"
    """auto: the engine that `edgekws bench --all` found to cost least here, else the first that runs and reproduces the model's golden
    embeddings. `edgekws doctor` says which ones run."""


@dataclass(frozen=True)
class DetectorSettings:
    """When a keyword wakes."""

    refractory_s: float = _number(2.0, 0.0, 60.0)
    """Seconds in which a keyword that woke does not wake again."""
    threshold_offset: float = _number(0.0, -3.0, 3.0)
    """Added to every keyword's threshold. A score is -log10 of false wakes an hour: 0.3 halves the false wakes that one expects and misses
    more, 1 makes them a tenth; -0.3 doubles them. The scores of a version that a round made are steeper: its threshold moves by half of
    this. `edgekws watch` shows each score beside its threshold."""


@dataclass(frozen=True)
class KeywordSettings:
    """Options of one keyword, by its name; all may be left out."""

    enabled: bool = True
    """Whether it is listened for. While it is not, a round neither learns it nor tests on it."""
    only_enrolled: bool | None = None
    """Whether only the enrolled speakers are meant: a higher threshold, voices are not told apart. Left out: as chosen at enrolment."""
    threshold_offset: float = _number(0.0, -3.0, 3.0)
    """Added to this keyword's threshold, on top of that of [detector]."""

    def for_enrolled(self, as_enrolled: bool) -> bool:
        """`only_enrolled`, of a keyword for which that was chosen at its enrolment."""
        return as_enrolled if self.only_enrolled is None else self.only_enrolled


@dataclass(frozen=True)
class StoreSettings:
    """What is kept: events, enrolled recordings, clips and model versions."""

    root: Path = field(default_factory=default_root)
    """State directory, absolute. "" = $STATE_DIRECTORY (systemd sets it), else ~/.local/state/edgekws."""
    events_max: int = _number(100_000, 1, 10_000_000)
    """Older events are deleted."""


@dataclass(frozen=True)
class SinkSettings:
    """Who is told of a wake, beside the journal and the database."""

    command: tuple[str, ...] = ()
    """A program and its arguments, run without a shell at each wake, with the event as one line of JSON on its stdin. [] = none."""
    command_timeout_s: float = _number(10.0, 0.1, 3600.0)
    """It is killed after this many seconds."""
    socket: bool = False
    """Every event goes out as a line of JSON on a Unix socket, which also answers {"command": "status"} and {"command": "reject"} (that
    last wake was wrong). It is control.sock in $RUNTIME_DIRECTORY (systemd: /run/edgekws), else in the state directory; only the user and
    the group may use it."""


@dataclass(frozen=True)
class MqttSettings:
    """Wakes to an MQTT broker: Hermes messages for Rhasspy, and an event entity for each keyword in Home Assistant
    (docs/home-assistant.md). User name and password are never in this file: systemd's credentials mqtt-username and mqtt-password, else
    EDGEKWS_MQTT_USERNAME and EDGEKWS_MQTT_PASSWORD."""

    url: str = _text("")
    """mqtt://HOST or mqtts://HOST (TLS), with :PORT where it is another than 1883 or 8883. "" = no MQTT."""
    site: str = _text("")
    """The name of this device in topics: letters, digits, dots, - and _. "" = the host's name."""
    ca_file: str = _text("")
    """With mqtts: the certificates to trust, in a file. "" = the system's."""
    discovery: bool = True
    """Whether Home Assistant is told of the keywords (homeassistant/event/...)."""


@dataclass(frozen=True)
class MetricsSettings:
    """Figures for Prometheus, at http://HOST:PORT/metrics."""

    port: int = _number(0, 0, 65535)
    """0 = none."""
    host: str = "127.0.0.1"
    """The address to listen on. Loopback: nobody else may ask."""


@dataclass(frozen=True)
class WebSettings:
    """A page at http://HOST:PORT/ that shows what the listener does just now, and where a wake can be marked as wrong."""

    port: int = _number(0, 0, 65535)
    """0 = none. Whoever has an account on this machine can open it."""
    host: str = "127.0.0.1"
    """The address to listen on. Beyond loopback everybody on that network sees, without a password, what woke and when, and nothing can be
    marked. To look from another machine rather use `ssh -L 8080:127.0.0.1:PORT`."""


@dataclass(frozen=True)
class LearningSettings:
    """What the listener keeps to learn from. It stays on this device, below the state directory, which only its owner may read."""

    keep_audio: bool = True
    """Whether short clips are kept: 3.5 s around each wake and near miss, and now and then 10 s of the room. `edgekws clips` lists, plays
    and deletes them. false: none, and nothing is learned beyond the enrolled recordings."""
    audio_max_mb: int = _number(200, 1, 1_000_000)
    """What is more is deleted, what you confirmed last."""
    audio_max_days: int = _number(30, 1, 3650)
    """What is older is deleted, by a listener that has run for an hour."""
    training_max_w: float = _number(0.0, 0.0, 1000.0)
    """Watts that may be drawn on average while a round trains, of what the meter covers: on a Jetson the module, on x86 the processor.
    Between its steps it rests as long as that takes, and one that it does not get below in a quarter of an hour ends the round. Needs a
    power meter. 0 = as many as it takes."""


@dataclass(frozen=True)
class Settings:
    """Everything that edgekws.toml can say. Only the command line and the daemon see this; parts take plain values."""

    audio: AudioSettings = AudioSettings()
    model: ModelSettings = ModelSettings()
    detector: DetectorSettings = DetectorSettings()
    store: StoreSettings = field(default_factory=StoreSettings)
    sinks: SinkSettings = SinkSettings()
    mqtt: MqttSettings = MqttSettings()
    metrics: MetricsSettings = MetricsSettings()
    web: WebSettings = WebSettings()
    learning: LearningSettings = LearningSettings()
    keyword: Mapping[str, KeywordSettings] = field(default_factory=lambda: MappingProxyType({}))
    """Options by keyword; a keyword that is not here has the defaults."""


def load_settings(path: Path | None = None) -> Settings:
    """Settings from `path`; without one from /etc/edgekws/edgekws.toml; without that the defaults.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds an unknown key or a bad value. Where a disk failed, its exit code is 1:
            another start may read it, and after 2 the unit does not try.
    """
    file = SYSTEM_FILE if path is None else path
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        if path is None:
            return Settings()
        raise ConfigError(f"{file}: no such file. Write one (deploy/edgekws.toml shows every key) or leave --config out") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}, so not TOML") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        refusal = ConfigError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})")
        if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO):
            refusal.exit_code = 1
        raise refusal from error
    return parse_settings(text, str(file))


def parse_settings(text: str, name: str = "edgekws.toml") -> Settings:
    """Settings from TOML text; `name` begins each error message.

    Raises:
        ConfigError: as `load_settings`.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError; so is an integer of 5000 digits
        raise ConfigError(f"{name}: not TOML: {str(error) or 'nested too deep'}") from None
    return _Reader(name).settings(document)


class _Reader:
    """Knows the file's name and the dotted key it is at, so that each error says both."""

    def __init__(self, name: str) -> None:
        self.name = name

    def settings(self, document: Mapping[str, Any]) -> Settings:
        hints = typing.get_type_hints(Settings)
        sections: dict[str, Any] = {}
        for key, value in document.items():
            if key not in hints:
                raise self.unknown(key, hints)
            if not isinstance(value, dict):
                raise self.bad(key, value, f"a table: [{key}]")
            if key == "keyword":
                sections[key] = MappingProxyType({word: self.keyword(word, options) for word, options in value.items()})
            else:
                sections[key] = self.table(key, hints[key], value)
        return Settings(**sections)

    def keyword(self, word: str, options: object) -> KeywordSettings:
        where = f'keyword."{word}"'
        if not word.strip() or not word.isprintable():
            raise self.bad("keyword", word, "a keyword's name: at least one letter, nothing unprintable")
        if not isinstance(options, dict):
            raise self.bad(where, options, f"a table: [{where}]")
        return self.table(where, KeywordSettings, options)

    def table(self, where: str, kind: type[_T], values: Mapping[str, Any]) -> _T:
        """One section: every key known, every value in range; what is not given has its default."""
        hints = typing.get_type_hints(kind)
        known = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
        given: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise self.unknown(key, known, f"{where}.")
            if (read := self.value(f"{where}.{key}", hints[key], known[key].metadata, value)) is not None:
                given[key] = read
        return kind(**given)

    def value(self, where: str, kind: object, metadata: Mapping[str, Any], value: object) -> object:
        """The value as the field's type; None = take the default."""
        accepted = _accepted(kind, metadata)
        if kind in (int, float):
            low, high = metadata["range"]
            number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
            # Compared as it is: an integer of 400 digits has no float.
            if not number or not low <= typing.cast(float, value) <= high:
                raise self.bad(where, value, accepted)
            return value if kind is int else float(typing.cast(float, value))
        if kind is str:
            return self.text(where, value, empty=metadata.get("empty", False))
        if kind is Path:
            return self.directory(where, value)
        if kind == tuple[str, ...]:
            if not isinstance(value, list):
                raise self.bad(where, value, accepted)
            return tuple(self.text(f"{where}[{i}]", one, empty=i > 0) for i, one in enumerate(value))
        if not isinstance(value, bool):  # bool, bool | None
            raise self.bad(where, value, accepted)
        return value

    def text(self, where: str, value: object, *, empty: bool) -> str:
        if not isinstance(value, str) or "\0" in value or not (value or empty):
            raise self.bad(where, value, _accepted(str, {"empty": empty}))
        return value

    def directory(self, where: str, value: object) -> Path | None:
        text = self.text(where, value, empty=True)
        if not text:
            return None
        path = Path(os.path.expanduser(text))
        if not path.is_absolute():
            raise self.bad(where, value, _accepted(Path, {}))
        return path

    def unknown(self, key: str, known: typing.Iterable[str], prefix: str = "") -> ConfigError:
        near = difflib.get_close_matches(key, list(known), 1, 0.5)
        hint = f' (did you mean "{near[0]}"?)' if near else ""
        return ConfigError(f'{self.name}: unknown key "{prefix}{_short(key)}"{hint}. Accepted here: {", ".join(known)}')

    def bad(self, where: str, value: object, accepted: str) -> ConfigError:
        return ConfigError(f"{self.name}: {_short(where)} = {_short(_toml(value))}. Accepted: {accepted}")


def _accepted(kind: object, metadata: Mapping[str, Any]) -> str:
    """What a key of this type may be, in words."""
    if kind is int:
        return "a whole number from {} to {}".format(*metadata["range"])
    if kind is float:
        return "a number from {:g} to {:g}".format(*metadata["range"])
    if kind is str:
        return "text" if metadata.get("empty") else "text, not empty"
    if kind is Path:
        return 'an absolute path, or "" for the default'
    return 'a list of strings, such as ["notify-send", "wake"]' if kind == tuple[str, ...] else "true or false"


def _toml(value: object) -> str:
    """Roughly as it stands in the file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "an integer of more than 40 digits"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return "a table"
    return f'"{value}"' if isinstance(value, str) else repr(value) if not isinstance(value, list) else "a list"


def _short(text: str) -> str:
    """One printable line of at most 80 characters."""
    line = printable(text[:200])
    return line if len(line) <= 80 and len(text) <= 200 else line[:77] + "…"


# The page and the file that are made of what stands above.

PAGE = "docs/configuration.md"
FILE = "deploy/edgekws.toml"
EXAMPLE = 'keyword."hey snips"'
INTRODUCTION = """\
# Configuration

Made from edgekws/config.py by `python -m edgekws.config`, as deploy/edgekws.toml is; do not edit it here.

The file is `--config FILE`, else /etc/edgekws/edgekws.toml; without one the defaults hold. An unknown key, a wrong type or a value out of
range is an error with exit code 2 that names the key, the value and what is accepted. `sudo systemctl reload edgekws` takes up [model],
[detector] and [keyword] while it listens; what changed elsewhere takes effect at the next start, and the journal says so."""


def _sections() -> list[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Name and meaning of each section with its keys: name, default as TOML ("" = none), what is accepted, meaning."""
    meanings: dict[str, str] = {}
    for one in ast.parse(Path(__file__).read_text("utf-8")).body:
        if isinstance(one, ast.ClassDef):
            for at, text in zip(one.body, one.body[1:], strict=False):
                if isinstance(at, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    meanings[f"{one.name}.{ast.unparse(at.target)}"] = " ".join(str(text.value.value).split())
    found = []
    for name, kind in typing.get_type_hints(Settings).items():
        kind = KeywordSettings if name == "keyword" else kind
        hints, keys = typing.get_type_hints(kind), []
        for key in dataclasses.fields(kind):
            default = "" if key.default is dataclasses.MISSING else key.default  # [store] root has a factory
            written = "" if default is None else json.dumps(default, ensure_ascii=False)
            keys.append((key.name, written, _accepted(hints[key.name], key.metadata), meanings[f"{kind.__name__}.{key.name}"]))
        found.append((EXAMPLE if name == "keyword" else name, " ".join((kind.__doc__ or "").split()), keys))
    return found


def page() -> str:
    """The configuration reference, Markdown."""
    lines = [INTRODUCTION]
    for name, meaning, keys in _sections():
        lines += ["", f"## [{name}]", "", meaning, "", "| key | default | accepted | meaning |", "|---|---|---|---|"]
        for key, default, accepted, text in keys:
            cells = (f"`{key}`", f"`{default}`" if default else "left out", accepted, text)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def example() -> str:
    """edgekws.toml with every key at its default, and its meaning above it."""

    def comment(text: str) -> list[str]:
        return textwrap.wrap(text, 150, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False)

    lines = [
        "# edgekws: every key with its default. Copy to /etc/edgekws/edgekws.toml, or pass it with --config.",
        "# An unknown key, a wrong type or a value out of range is an error that says what is accepted.",
    ]
    for name, meaning, keys in _sections():
        example = "# " if name == EXAMPLE else ""
        lines += ["", *comment(meaning), f"{example}[{name}]"]
        for key, default, accepted, text in keys:
            span = f" ({accepted.split(' from ')[1]})" if " from " in accepted else ""
            if example:
                lines.append(f"# {key} = {default or 'true'}  # {text}{span}")
            else:
                lines += [*comment(text + span), f"{key} = {default}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path, text in ((PAGE, page()), (FILE, example())):
        (Path(__file__).parent.parent / path).write_text(text, "utf-8")
