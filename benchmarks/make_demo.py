"""The room of `edgekws demo`: some minutes to live in and some to be tested in, of synthetic speech, noise and a synthetic room.

    python benchmarks/make_demo.py [--out edgekws/demo]

Needs the Debian packages `flite espeak-ng`. The voice that enrolled says the keyword at other rates and pitches; other voices read between.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile

from edgekws.evaluation import reverberate, room_response
from edgekws.training.material import LEVEL_DBFS, at_level, to_int16
from edgekws.training.synthesis import Voice, say
from edgekws.values import SAMPLE_RATE_HZ

SEED = 20
KEYWORD, SPEAKER = "open sesame", ("flite", "slt")
TAKES = {"live": 24, "test": 12}
SNR_DB = 3.0  # chosen so that the listener hears about two thirds before it has lived here
COMPRESSION = 0.93  # of Opus: about 24 kbit/s
READERS = (("flite", "rms"), ("flite", "awb"), ("flite", "kal16"), ("espeak-ng", "en-us+Andy"), ("espeak-ng", "en-gb+linda"))
READER_DB = (-12.0, -4.0)  # beside the speaker: they sit further away
TEXTS = (
    "The kettle is nearly empty, so somebody should fill it before the guests arrive.",
    "Open the window a little, the soup has made the whole kitchen warm.",
    "He wrote the number on the back of an envelope and lost it the same evening.",
    "We planted beans along the fence, and the neighbour planted sunflowers.",
    "A train went by every twenty minutes until late in the night.",
    "Sprinkle the sesame seeds over the bread just before it goes into the oven.",
    "The meeting has been moved to Thursday, half an hour later than usual.",
    "She repaired the old radio with a spoon and a piece of copper wire.",
    "If it rains tomorrow we will stay at home and finish the puzzle.",
    "The shop at the corner is open until seven, and on Saturdays until noon.",
    "Nobody remembered who had borrowed the long ladder last autumn.",
    "There were three boats in the harbour and not one of them had a name.",
    "Turn left after the bridge and follow the river for about a mile.",
    "The doctor said that a short walk each morning would be enough.",
    "My brother counts the stairs whenever he carries something heavy.",
    "They painted the door green twice, since the first green looked grey.",
)


def part(name: str, rng: np.random.Generator, response: np.ndarray) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Samples as a microphone in the room gets them, and where the keyword is."""
    pieces: list[np.ndarray] = []
    spoken, at = [], 0

    def add(samples: np.ndarray) -> None:
        nonlocal at
        pieces.append(samples.astype(np.float32))
        at += len(samples)

    def quiet(low_s: float, high_s: float) -> None:
        add(np.zeros(round(rng.uniform(low_s, high_s) * SAMPLE_RATE_HZ)))

    quiet(2, 3)
    for i in range(TAKES[name]):
        voice = Voice(*SPEAKER, float(np.exp(rng.normal(0, 0.1))), float(np.exp(rng.normal(0, 0.07))))
        said = say(KEYWORD, voice)
        loud = np.flatnonzero(np.abs(said.astype(np.int32)) > 300)
        said = at_level(said[loud[0] : loud[-1] + 1], LEVEL_DBFS + rng.uniform(-1.5, 1.5))
        spoken.append({"start_s": round(at / SAMPLE_RATE_HZ, 2), "end_s": round((at + len(said)) / SAMPLE_RATE_HZ, 2)})
        add(said)
        quiet(1.2, 2)
        for _ in range(3 if i % 3 == 2 else 1):
            voice = Voice(*READERS[int(rng.integers(len(READERS)))], float(rng.uniform(0.9, 1.15)))
            add(at_level(say(TEXTS[int(rng.integers(len(TEXTS)))], voice), LEVEL_DBFS + rng.uniform(*READER_DB)))
            quiet(0.8, 1.6)
        if i % 6 == 5:
            quiet(12, 14)  # the room alone
    return reverberate(np.concatenate(pieces), response), spoken


def noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """A fan that slows and quickens over a motor's hum: unit power."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    wind = np.fft.irfft(spectrum / np.maximum(1, np.fft.rfftfreq(count, 1 / SAMPLE_RATE_HZ) / 300) ** 0.6, count)
    wind /= wind.std()
    t = np.arange(count) / SAMPLE_RATE_HZ
    hum = sum(np.sin(2 * np.pi * 98 * k * t + k) / k for k in range(1, 7))
    both = wind * (1 + 0.2 * np.sin(2 * np.pi * t / 7)) + 0.5 * hum
    return (both / both.std()).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("edgekws/demo"))
    parser.add_argument("--snr-db", type=float, default=SNR_DB, help="of the keyword over the room's noise")
    options = parser.parse_args()
    rng = np.random.default_rng(SEED)
    response = room_response(rng)
    truth = {}
    for name in TAKES:
        heard, truth[name] = part(name, rng, response)
        level = 32768 * 10 ** ((LEVEL_DBFS - options.snr_db) / 20)
        samples = to_int16(heard + level * noise(len(heard), rng))
        path = options.out / f"room-{name}.opus"
        soundfile.write(path, samples, SAMPLE_RATE_HZ, format="OGG", subtype="OPUS", compression_level=COMPRESSION)
        print(f"{path}: {len(samples) / SAMPLE_RATE_HZ:.0f} s, {path.stat().st_size / 1000:.0f} kB, {len(truth[name])} takes")
    (options.out / "room.json").write_text(json.dumps(truth, indent=1) + "\n")


if __name__ == "__main__":
    main()
