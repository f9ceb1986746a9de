"""What every source of audio is, and how its URI is read."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

from edgekws.errors import UsageError
from edgekws.values import AudioChunk


class Source(ABC):
    """A stream of samples, open from the start: `with open_source(uri) as source: for chunk in source.chunks(): ...`"""

    uri: str
    live: bool
    """True: the samples come as they are spoken (a microphone, a pipe on standard input, a paced file). False: as fast as they are read."""
    on_deaf: Callable[[str], object] = staticmethod(lambda why: None)
    """Called within `chunks()` when the samples stopped coming and are waited for. A chunk behind a gap says that they come again."""

    @abstractmethod
    def chunks(self) -> Iterator[AudioChunk]:
        """What is left of the stream, once. It ends with the stream or after `close()`.

        Raises:
            AudioError: it cannot be read any further.
        """

    @abstractmethod
    def close(self) -> None:
        """End `chunks()` and let go of the device or file. May be called twice, from a signal handler or another thread."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Option(NamedTuple):
    parse: Callable[[str], int | str]
    """Raises ValueError for what it does not accept."""
    accepted: str
    """In words, for the error."""


def whole_number(low: int, high: int) -> Option:
    def parse(text: str) -> int:
        if not (re.fullmatch(r"\d+", text) and low <= int(text) <= high):
            raise ValueError
        return int(text)

    return Option(parse, f"a whole number from {low} to {high}")


SWITCH = Option({"0": 0, "1": 1}.__getitem__, "0 or 1")
RATE = whole_number(4_000, 384_000)  # Hz


def split_options(uri: str, rest: str, options: Mapping[str, Option]) -> tuple[str, dict[str, int | str]]:
    """`NAME?key=value&key=value` → (NAME, the values). A "?" that no "key=" follows belongs to the name.

    Raises:
        UsageError: an unknown option, or a value that it does not accept.
    """
    found = re.fullmatch(r"(.*)\?(\w+=[^?]*)", rest, re.DOTALL)
    if not found:
        return rest, {}
    values: dict[str, int | str] = {}
    for pair in found[2].split("&"):
        key, _, text = pair.partition("=")
        if key not in options:
            raise UsageError(f'cannot open {uri}: unknown option "{key}"{did_you_mean(key, options)}. Accepted here: {", ".join(options)}')
        try:
            values[key] = options[key].parse(text)
        except (KeyError, ValueError):
            raise UsageError(f'cannot open {uri}: {key}="{text}" is not accepted; it takes {options[key].accepted}') from None
    return found[1], values


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean "…"?)' where something known is close, else ''."""
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f' (did you mean "{by_lower[close[0]]}"?)' if close else ""
