"""Where samples come from: a microphone, a file, standard input. Whatever it is, int16 mono at 16 kHz comes out."""

from edgekws.audio.files import duration_s, read_recording
from edgekws.audio.microphone import find_input, input_devices, play
from edgekws.audio.opening import open_source, record
from edgekws.audio.source import Source
from edgekws.audio.stdin import StdinSource

__all__ = [
    "Source",
    "StdinSource",
    "duration_s",
    "find_input",
    "input_devices",
    "open_source",
    "play",
    "read_recording",
    "record",
]
