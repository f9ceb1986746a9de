"""NVIDIA's tegrastats as a child: one line each 100 ms. Of "VDD_IN 4761mW/4778mW" the first is now; the average after it is not used."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from edgekws.errors import PowerError
from edgekws.power import PowerMeter, whole

WAIT_S = 3.0  # for a line
RAIL = re.compile(r"\b([A-Z][A-Z0-9_]+) (\d+)mW/\d+mW")


def open_meter(sysfs: Path, command: Sequence[str] = ("tegrastats", "--interval", "100")) -> Tegrastats:
    """Raises PowerError where the program is not installed. `sysfs` is not looked at."""
    if shutil.which(command[0]) is None:
        raise PowerError(f"{command[0]} is not installed (it comes with JetPack)")
    return Tegrastats(command)


def rails_mw(line: str) -> dict[str, float]:
    """Label → mW now, of one line of JetPack 5 or 6. Channels that are not connected are left out."""
    return {label: float(now) for label, now in RAIL.findall(line) if label != "NC"}


class Tegrastats(PowerMeter):
    """The newest line of the child."""

    name = "tegrastats"
    interval_s = 0.1
    waits = True

    def __init__(self, command: Sequence[str]) -> None:
        try:
            self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        except OSError as error:
            raise PowerError(f"{command[0]}: {error.strerror}") from None
        self._buffer = b""
        try:
            self.rail, _ = whole(rails_mw(self._line()))
        except PowerError:
            self.close()
            raise

    def read(self) -> dict[str, float]:
        """Label → mW. Waits for the next line. Raises PowerError when the child died or says nothing for 3 s."""
        rails = rails_mw(self._line())
        return {**rails, self.rail: whole(rails)[1]}

    def _line(self) -> str:
        assert self._child.stdout is not None
        output, due = self._child.stdout.fileno(), time.monotonic() + WAIT_S
        while b"\n" not in self._buffer:
            if not select.select([output], [], [], max(0.0, due - time.monotonic()))[0]:
                raise PowerError(f"tegrastats has said nothing for {WAIT_S:g} s")
            got = os.read(output, 65536)
            if not got:
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(timeout=1.0)
                raise PowerError(f"tegrastats ended with exit code {self._child.poll()}")
            self._buffer += got
        # Only the newest whole line: older ones were said at a time that we did not see.
        *lines, self._buffer = self._buffer.split(b"\n")
        return lines[-1].decode(errors="replace")

    def close(self) -> None:
        """End the child."""
        self._child.terminate()
        try:
            self._child.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()
