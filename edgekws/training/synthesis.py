"""Speech from text: espeak-ng, flite and festival, many voices, rates and pitches.

The programs, festival's voices and the words are Debian packages (`PACKAGES`).
Nothing is downloaded at run time.
"""

from __future__ import annotations

import functools
import pydoc_data.topics
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from edgekws.errors import EdgekwsError
from edgekws.values import SAMPLE_RATE_HZ

# Words whose real recordings measure us are never synthesised for training nor heard from --data, nor anything that holds them.
HELD_OUT = re.compile(r"alex|comput|jarvi|ameli|ordenad|seven|zero|snip|snapdrag|nabu|mycroft|porcupin|bumbleb", re.I)

ESPEAK_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
ESPEAK_FOREIGN = ("nl", "de", "fr", "es", "it", "pt-br", "pl", "sv", "da", "tr", "fi", "ro", "cs", "hu", "sk", "id")
ESPEAK_VARIANTS = tuple(f"m{i}" for i in range(1, 9)) + tuple(f"f{i}" for i in range(1, 6)) + (
    "Alex", "Alicia", "Andrea", "Andy", "Annie", "antonio", "belinda", "benjamin", "boris", "caleb", "david", "ed", "edward", "edward2",
    "Gene", "Gene2", "grandma", "grandpa", "Henrique", "Hugo", "iven", "iven2", "iven3", "iven4", "Jacky", "john", "kaukovalta",
    "klatt2", "klatt3", "Lee", "linda", "marcelo", "Marco", "Mario", "max", "Michael", "michel", "Mike", "Mr serious", "Nguyen", "norbert",
    "pablo", "paul", "pedro", "quincy", "rob", "robert", "Storm", "steph", "steph2", "steph3", "Tweaky", "victor", "zac",
)  # fmt: skip
FLITE_VOICES = ("awb", "kal16", "rms", "slt")
FESTIVAL_VOICES = ("cmu_us_slt_arctic_hts", "kal_diphone", "ked_diphone")
PROGRAMS = ("espeak-ng", "flite", "text2wave")
PACKAGES = "espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts wamerican"


class Missing(EdgekwsError):
    """What speech is made with is not installed: no other voice or text helps, as it does where a program refuses one."""


@dataclass(frozen=True)
class Voice:
    """One way of speaking."""

    program: str
    """espeak-ng, flite or festival."""
    name: str
    speed: float = 1.0
    """1 = the voice's own pace; 1.2 is a fifth faster."""
    pitch: float = 1.0
    """1 = the voice's own pitch."""

    @property
    def speaker(self) -> str:
        """The same for all rates and pitches of one voice."""
        return f"{self.program}:{self.name}"


def random_voice(rng: np.random.Generator, *, english: bool = True) -> Voice:
    """A voice at a random rate and pitch; espeak-ng, with its hundreds of variants, is drawn most."""
    kind = rng.choice(["espeak-ng", "flite", "festival"], p=[0.62, 0.26, 0.12]) if english else "espeak-ng"
    speed, pitch = rng.uniform(0.75, 1.3), rng.uniform(0.75, 1.35)
    if kind == "flite":
        return Voice("flite", str(rng.choice(FLITE_VOICES)), speed, pitch)
    if kind == "festival":
        return Voice("festival", str(rng.choice(FESTIVAL_VOICES)), speed)  # the HTS voice has one pace only
    accent = rng.choice(ESPEAK_ACCENTS if english else ESPEAK_FOREIGN)
    return Voice("espeak-ng", f"{accent}+{rng.choice(ESPEAK_VARIANTS)}", speed, pitch)


def say(text: str, voice: Voice) -> np.ndarray:
    """`text` in `voice`.

    Returns:
        int16, shape (n,), mono at 16 kHz, as loud as the program made it.

    Raises:
        Missing: the program is not installed.
        EdgekwsError: it refused.
    """
    if voice.program == "espeak-ng":
        pitch = int(np.clip(50 * voice.pitch, 0, 99))
        raw = _run(["espeak-ng", "--stdout", "-v", voice.name, "-s", str(int(165 * voice.speed)), "-p", str(pitch), text])
        # espeak-ng writes a header whose length field is bogus on a pipe: the samples start at byte 44, at 22.05 kHz.
        return _resample(np.frombuffer(raw[44 : 44 + (len(raw) - 44) // 2 * 2], "<i2"), 22_050)
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "said.wav"
        if voice.program == "flite":
            if voice.name not in FLITE_VOICES:  # flite would silently speak its default
                raise EdgekwsError(f'flite has no voice "{voice.name}". Accepted: {", ".join(FLITE_VOICES)}')
            base = {"awb": 120, "kal16": 100, "rms": 95, "slt": 175}.get(voice.name, 110)
            _run(
                ["flite", "-voice", voice.name, "--setf", f"duration_stretch={1 / voice.speed:.3f}"]
                + ["--setf", f"int_f0_target_mean={base * voice.pitch:.0f}", "-t", text, "-o", str(wav)]
            )
        else:
            stretch = f"(begin (voice_{voice.name}) (Parameter.set 'Duration_Stretch {1 / voice.speed:.3f}))"
            _run(["text2wave", "-eval", stretch, "-o", str(wav)], text.encode("ascii", "ignore"))
        import soundfile

        try:
            samples, rate_hz = soundfile.read(wav, dtype="int16")
        except soundfile.LibsndfileError as error:
            raise EdgekwsError(f'{voice.program} wrote no sound for "{text[:60]}" in voice {voice.name}') from error
    return _resample(samples, rate_hz)


def check() -> None:
    """Raises Missing: one of the programs, or the words, are not there, or a voice of flite or festival says nothing."""
    for program in PROGRAMS:
        _find(program)
    words()
    for program, names in (("flite", FLITE_VOICES), ("festival", FESTIVAL_VOICES)):
        for name in names:
            try:
                say("yes", Voice(program, name))
            except EdgekwsError as error:
                raise Missing(f"{error}. Try: apt-get install {PACKAGES}") from error


def _find(program: str) -> None:
    if shutil.which(program) is None:
        raise Missing(f"{program} is not installed. Try: apt-get install {PACKAGES}")


def _run(command: list[str], text: bytes | None = None) -> bytes:
    _find(command[0])
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    if done.returncode != 0:
        raise EdgekwsError(f"{command[0]} failed with {done.returncode}: {done.stderr.decode(errors='replace').strip()[:200]}")
    return done.stdout


def _resample(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    return samples.copy() if rate_hz == SAMPLE_RATE_HZ else soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ)


@functools.cache
def sentences() -> tuple[str, ...]:
    """Sentences of the Python reference and of common licences, held-out words taken out."""
    texts = list(pydoc_data.topics.topics.values())
    texts += [path.read_text(errors="ignore") for path in sorted(Path("/usr/share/common-licenses").glob("*")) if path.is_file()]
    found = []
    for text in texts:
        for sentence in re.split(r"(?<=[.!?;:])\s+|\n\n", text):
            plain = re.sub(r"\s+", " ", re.sub(r"[^A-Za-z' ]", " ", sentence)).strip()
            kept = [word for word in plain.split() if not HELD_OUT.search(word)]
            if 4 <= len(kept) <= 30:
                found.append(" ".join(kept))
    return tuple(dict.fromkeys(found))


@functools.cache
def words() -> tuple[str, ...]:
    """Plain English words of 4 to 12 letters, held-out ones taken out. Raises Missing."""
    path = Path("/usr/share/dict/words")
    if not path.exists():
        raise Missing(f"{path} is missing. Try: apt-get install wamerican")
    return tuple(w for w in path.read_text().split() if re.fullmatch(r"[a-z]{4,12}", w) and not HELD_OUT.search(w))
