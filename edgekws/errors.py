"""What can go wrong, in the user's words.

EdgekwsError              anything that edgekws reports in one line (exit code 1)
├── ConfigError           the TOML file: unknown key, wrong type, out of range (exit code 2)
├── UsageError            the command line (exit code 2)
├── AudioError            a source cannot be opened or read
├── EnrolmentError        recordings that no keyword can be made from
├── ModelError            a model directory is missing something, altered, or from a later version
├── EngineUnavailable     no inference engine can run here, with each one's reason
│   └── NotPrepared       one could, once what it needs is made, in minutes
├── PowerError            a power meter cannot be read, or a round outstayed its budget
└── StoreError            the state directory cannot be read or written

A message says what was wrong, with the value; what is accepted; what to do next.
"""


class EdgekwsError(Exception):
    """Anything that edgekws reports in one line."""

    exit_code = 1


class ConfigError(EdgekwsError):
    """The TOML file holds an unknown key, a wrong type or a value out of range."""

    exit_code = 2


class UsageError(EdgekwsError):
    """The command line asks for something that does not exist."""

    exit_code = 2


class AudioError(EdgekwsError):
    """A source cannot be opened or read."""


class EnrolmentError(EdgekwsError):
    """Recordings that no keyword can be made from."""


class ModelError(EdgekwsError):
    """A model directory misses a file, was altered, or comes from a later version."""


class EngineUnavailable(EdgekwsError):
    """No inference engine can run here."""


class NotPrepared(EngineUnavailable):
    """An engine could run here, once what takes minutes is done."""


class PowerError(EdgekwsError):
    """A power meter cannot be read here, or stopped; or a round waited for a cool board longer than it may."""


class StoreError(EdgekwsError):
    """The state directory cannot be read or written."""
