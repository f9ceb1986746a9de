"""What can go wrong, in the user's words.

EdgekwsError              anything that edgekws reports in one line (exit code 1)
├── ConfigError           the TOML file: unknown key, wrong type, out of range (exit code 2; 1 where the file could not be read)
│   └── Taken             another edgekws has what this one was told to have
├── UsageError            the command line, or a URI of audio in it or in the TOML file (exit code 2)
├── NotInstalled          an extra is wanted that this installation does not have
├── AudioError            a source cannot be opened or read
│   └── SoundLost         of a recording, which can be made again
├── EnrolmentError        recordings that no keyword can be made from
├── ModelError            a model directory is missing something, altered, or from a later version
│   └── ModelUnreadable   one may be whole: it cannot be read just now, or is from a later version
├── EngineUnavailable     no inference engine can run here, with each one's reason
│   └── NotPrepared       one could, once what it needs is made, in minutes
├── PowerError            a power meter cannot be read, or a round outstayed its budget
└── StoreError            the state directory cannot be read or written

A message says what was wrong, with the value; what is accepted; what to do next.
"""

import shlex
import sys
from importlib.metadata import requires
from pathlib import Path


class EdgekwsError(Exception):
    """Anything that edgekws reports in one line."""

    exit_code = 1


class ConfigError(EdgekwsError):
    """The TOML file holds an unknown key, a wrong type or a value out of range."""

    exit_code = 2


class Taken(ConfigError):
    """Another edgekws has what this one was told to have."""


class UsageError(EdgekwsError):
    """The command line, or a URI of audio, asks for something that does not exist."""

    exit_code = 2


class NotInstalled(EdgekwsError):
    """An extra is wanted that this installation does not have."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed. Try: {install_command(extra)}")


class AudioError(EdgekwsError):
    """A source cannot be opened or read."""


class SoundLost(AudioError):
    """Samples were lost within a recording, which can be made again."""


class EnrolmentError(EdgekwsError):
    """Recordings that no keyword can be made from."""


class ModelError(EdgekwsError):
    """A model directory misses a file, was altered, or comes from a later version."""


class ModelUnreadable(ModelError):
    """A model cannot be read just now, or comes from a later version: it may be whole, and listen after the next start or upgrade."""


class EngineUnavailable(EdgekwsError):
    """No inference engine can run here."""


class NotPrepared(EngineUnavailable):
    """An engine could run here, once what takes minutes is done."""


class PowerError(EdgekwsError):
    """A power meter cannot be read here, or stopped; or a round waited for a cool board longer than it may."""


class StoreError(EdgekwsError):
    """The state directory cannot be read or written."""


def printable(text: str, but: str = "") -> str:
    """For a terminal, which the name of a file could give orders: what shows nothing, `but` for some, as Python's escapes."""
    return "".join(c if c.isprintable() or c in but else ascii(c)[1:-1] for c in text)


def install_command(extra: str) -> str:
    """What adds an extra to the installation that runs: the Debian package, deploy/install.sh's, or one by pip."""
    if Path(__file__).is_relative_to("/usr/lib/edgekws"):  # what is in it is not pip's; /usr/bin/edgekws looks in this directory too
        marked = (one.split(";") for one in requires("edgekws") or () if ";" in one)
        wanted = [name.strip() for name, marker in marked if f'"{extra}"' in marker.replace("'", '"')]
        target = "--target /usr/local/lib/edgekws --constraint /usr/share/edgekws/constraints.txt"
        return f"sudo apt-get install python3-pip && sudo python3 -m pip install {target} {shlex.join(wanted)}"
    if sys.prefix == "/opt/edgekws/venv":
        if extra == "train":
            return "sudo bash deploy/install.sh --torch INDEX, where it was installed from"
        return f"sudo {sys.executable} -m pip install 'edgekws[{extra}]'"
    return f"{shlex.quote(sys.executable)} -m pip install 'edgekws[{extra}]'"
