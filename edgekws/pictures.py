"""Pictures for people, by matplotlib, which only this module knows: as a file, or as SVG that stands in a page and takes its colours."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekws.errors import EdgekwsError, NotInstalled

SUFFIXES = (".png", ".svg", ".pdf")  # of the files that `save` is asked for


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches, laid out so that nothing overlaps.

    Raises:
        NotInstalled: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotInstalled("pictures need matplotlib, which", "plot") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Raises EdgekwsError when the file cannot be written."""
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise EdgekwsError(f"{path}: the picture cannot be written ({error}). PNG, SVG and PDF can be, in a folder that exists") from error


def time_axis(panel: Any, ticks: int) -> None:
    """At most so many ticks, 5 or more, on the x axis of a panel of datetimes, with no more of a date than tells them apart."""
    from matplotlib import dates

    vendor: Any = dates  # its types differ from version to version
    locator = vendor.AutoDateLocator(minticks=2, maxticks=ticks)
    panel.xaxis.set_major_locator(locator)
    panel.xaxis.set_major_formatter(vendor.ConciseDateFormatter(locator))


def svg(name: str, text: str, size: tuple[float, float], colours: Mapping[str, str], draw: Callable[[Any], None]) -> str:
    """One <svg> element that may stand beside others in a page.

    Args:
        name: of this picture alone; its ids begin with it.
        text: what it shows, for whoever does not see it.
        size: pixels of the page.
        colours: name of a property of the page's style → #rrggbb, which stands for it while drawing. "ink" is for text, "faint" for lines.
        draw: gets the Figure.

    Raises:
        NotInstalled: matplotlib is not installed.
    """
    new_figure(1, 1)  # says what is missing
    import matplotlib

    ink, faint = colours["ink"], colours["faint"]
    chosen: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), ink),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), faint),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "font.size": 12,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
    }
    out = io.StringIO()
    with matplotlib.rc_context(chosen):
        figure = new_figure(size[0] / 72, size[1] / 72)  # at 72 to the inch a point is a pixel
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    markup = out.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", markup, flags=re.DOTALL)
    markup = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", markup)
    for property, colour in colours.items():
        markup = markup.replace(colour, f"var(--{property})")
    # The letters of whoever reads it: matplotlib's may be missing there.
    markup = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", markup)
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(text)}">', markup, count=1)
