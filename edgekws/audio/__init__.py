"""Where samples come from: a microphone, a file, standard input. Whatever it is, int16 mono at 16 kHz comes out."""

from edgekws.audio.files import FileSource, duration_s, read_recording
from edgekws.audio.microphone import InputDevice, MicSource, find_input, input_devices, play
from edgekws.audio.opening import open_source, record
from edgekws.audio.source import Source
from edgekws.audio.stdin import StdinSource

__all__ = [
    "FileSource",
    "InputDevice",
    "MicSource",
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
