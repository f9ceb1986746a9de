"""The operator's choices: one TOML file → frozen `Settings`. Whatever the file holds, the result is Settings or a ConfigError.

What a model or a keyword *is* lives in its manifest and in the store; here is only what somebody may want otherwise.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from edgekws.errors import ConfigError

SYSTEM_FILE = Path("/etc/edgekws/edgekws.toml")

_T = TypeVar("_T")


def default_root() -> Path:
    """Where state is kept: $STATE_DIRECTORY (systemd sets it), else ~/.local/state/edgekws."""
    from_systemd = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(from_systemd) if from_systemd else Path(os.path.expanduser("~")) / ".local" / "state" / "edgekws"


def _number(default: _T, low: float, high: float) -> _T:
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class AudioSettings:
    source: str = "mic:default"
    """mic:NAME, file:PATH or stdin:"""


@dataclass(frozen=True)
class ModelSettings:
    id: str = "edge"
    """A built-in model's name, or the path of a model directory."""
    engine: str = "auto"
    """auto: what `bench --all` found to cost least here, else the first that runs and reproduces the model's golden embeddings."""


@dataclass(frozen=True)
class DetectorSettings:
    refractory_s: float = _number(2.0, 0.0, 60.0)
    """Quiet time of a keyword after it woke."""
    threshold_offset: float = _number(0.0, -3.0, 3.0)
    """Added to every keyword's threshold. A score is -log10 of false wakes an hour: 0.3 halves the expected ones, -0.3 doubles them."""


@dataclass(frozen=True)
class KeywordSettings:
    enabled: bool = True
    only_enrolled: bool | None = None
    """Whether only enrolled speakers may wake it. None: as chosen at enrolment."""
    threshold_offset: float = _number(0.0, -3.0, 3.0)
    """Added to this keyword's threshold, on top of [detector] threshold_offset."""


@dataclass(frozen=True)
class StoreSettings:
    root: Path = field(default_factory=default_root)
    """State directory, absolute; "" in the file is the default."""
    events_max: int = _number(100_000, 1, 10_000_000)
    """Older events are deleted."""


@dataclass(frozen=True)
class SinkSettings:
    command: tuple[str, ...] = ()
    """Program and arguments, run without a shell at each event with the event as JSON on its stdin. () = none."""
    command_timeout_s: float = _number(10.0, 0.1, 3600.0)
    socket: bool = False
    """Events as JSON lines, and commands, on a Unix socket."""


@dataclass(frozen=True)
class LearningSettings:
    keep_audio: bool = True
    """Short clips of wakes, near misses and the room, to learn from. False keeps none."""
    audio_max_mb: int = _number(200, 1, 1_000_000)
    audio_max_days: int = _number(30, 1, 3650)
    """What is older, or too much, is deleted: what a person confirmed last."""


def _text(default: str) -> str:
    """Text that may be empty."""
    return field(default=default, metadata={"empty": True})


@dataclass(frozen=True)
class MqttSettings:
    url: str = _text("")
    """mqtt://HOST or mqtts://HOST, with :PORT where it is another. "" = no MQTT."""
    site: str = _text("")
    """Name of this device in topics. "" = the host's name."""
    ca_file: str = _text("")
    """Certificates to trust with mqtts. "" = the system's."""
    discovery: bool = True
    """Whether Home Assistant is told of the keywords."""


@dataclass(frozen=True)
class MetricsSettings:
    port: int = _number(0, 0, 65535)
    """Where Prometheus may ask. 0 = nowhere."""
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class Settings:
    """Everything that edgekws.toml can say. Only the command line and the daemon see this; parts take plain values."""

    audio: AudioSettings = AudioSettings()
    model: ModelSettings = ModelSettings()
    detector: DetectorSettings = DetectorSettings()
    keyword: Mapping[str, KeywordSettings] = field(default_factory=lambda: MappingProxyType({}))
    """Options by keyword; a keyword that is not here has the defaults."""
    store: StoreSettings = field(default_factory=StoreSettings)
    sinks: SinkSettings = SinkSettings()
    mqtt: MqttSettings = MqttSettings()
    metrics: MetricsSettings = MetricsSettings()
    learning: LearningSettings = LearningSettings()


def load_settings(path: Path | None = None) -> Settings:
    """Settings from `path`; without one from /etc/edgekws/edgekws.toml; without that the defaults.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds an unknown key or a bad value.
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
        raise ConfigError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
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
        if kind in (int, float):
            low, high = metadata["range"]
            number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
            accepted = f"{'a whole number' if kind is int else 'a number'} from {low:g} to {high:g}"
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
                raise self.bad(where, value, 'a list of strings, such as ["notify-send", "wake"]')
            return tuple(self.text(f"{where}[{i}]", one, empty=i > 0) for i, one in enumerate(value))
        if not isinstance(value, bool):  # bool, bool | None
            raise self.bad(where, value, "true or false")
        return value

    def text(self, where: str, value: object, *, empty: bool) -> str:
        if not isinstance(value, str) or "\0" in value or not (value or empty):
            raise self.bad(where, value, "text" if empty else "text, not empty")
        return value

    def directory(self, where: str, value: object) -> Path | None:
        text = self.text(where, value, empty=True)
        if not text:
            return None
        path = Path(os.path.expanduser(text))
        if not path.is_absolute():
            raise self.bad(where, value, 'an absolute path, or "" for the default')
        return path

    def unknown(self, key: str, known: typing.Iterable[str], prefix: str = "") -> ConfigError:
        near = difflib.get_close_matches(key, list(known), 1, 0.5)
        hint = f' (did you mean "{near[0]}"?)' if near else ""
        return ConfigError(f'{self.name}: unknown key "{prefix}{_short(key)}"{hint}. Accepted here: {", ".join(known)}')

    def bad(self, where: str, value: object, accepted: str) -> ConfigError:
        return ConfigError(f"{self.name}: {_short(where)} = {_short(_toml(value))}. Accepted: {accepted}")


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
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])
    return line if len(line) <= 80 and len(text) <= 200 else line[:77] + "…"
