"""The kernel's one-value files."""

from __future__ import annotations

from pathlib import Path

from edgekws.errors import PowerError


def text(file: Path) -> str:
    """What it holds, printable. Raises PowerError."""
    try:
        return "".join(c if c.isprintable() else "?" for c in file.read_text(errors="replace").strip())
    except PermissionError:
        raise PowerError(f"{file} may be read by root only (sudo chmod a+r {file.parent.parent}/*/{file.name})") from None
    except OSError as error:  # the bus was busy, the driver was unbound
        raise PowerError(f"{file}: {error.strerror}") from None


def number(file: Path) -> int:
    """Its whole number. Raises PowerError."""
    held = text(file)
    try:
        return int(held)
    except ValueError:
        raise PowerError(f'{file} holds "{held[:40]}", which is no whole number') from None
