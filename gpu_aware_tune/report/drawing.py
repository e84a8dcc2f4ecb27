"""Drawings made with matplotlib, as themed SVG for the page and as PNG files."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import SetupError

Colors = Mapping[str, str]

LIGHT: Colors = {
    "ink": "#1d2430",
    "muted": "#5d6675",
    "grid": "#e3e6eb",
    "surface": "#ffffff",
    "idle": "#c9ced6",
    "s1": "#1f66d0",
    "s2": "#d0550a",
    "s3": "#0b8463",
    "s4": "#8348cf",
    "s5": "#a87400",
    "s6": "#c2306e",
}
DARK: Colors = {
    "ink": "#e8eaee",
    "muted": "#a3abb8",
    "grid": "#2f3642",
    "surface": "#171b22",
    "idle": "#48505d",
    "s1": "#63a4ff",
    "s2": "#ff9550",
    "s3": "#3fc79a",
    "s4": "#ba95ff",
    "s5": "#e2b23c",
    "s6": "#ff7cae",
}
SERIES = ("s1", "s2", "s3", "s4", "s5", "s6")

# Drawn with colors that occur nowhere else, which the page's variables then take the place of.
_MARKS: Colors = {role: f"#fe{number:02x}d7" for number, role in enumerate(LIGHT)}

_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.h_pad": 0.09,
    "svg.fonttype": "none",
    "svg.hashsalt": "tune",
}


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn more than once.

    Args:
        name: what its file is called.
        title: what it shows, in a few words.
        width_in: inches.
        height_in: inches.
        draw: puts it into a matplotlib figure, with the given colors.
    """

    name: str
    title: str
    width_in: float
    height_in: float
    draw: Callable[[Any, Colors], None]


def to_svg(drawing: Drawing) -> str:
    """Return a drawing as an SVG element whose colors are the page's variables."""
    text = io.StringIO()
    with _styled(_MARKS):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(drawing.width_in, drawing.height_in), layout="constrained")
        drawing.draw(figure, _MARKS)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _themed(text.getvalue(), drawing)


def to_png(drawings: Sequence[Drawing], path: Path, dpi: int = 150) -> None:
    """Write drawings, one above the other, as one light PNG file."""
    with _styled(LIGHT):
        from matplotlib.figure import Figure

        width = max(drawing.width_in for drawing in drawings)
        heights = [drawing.height_in + 0.35 for drawing in drawings]
        figure = Figure(figsize=(width, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(drawings), 1, height_ratios=heights, squeeze=False)
        for part, drawing in zip(parts[:, 0], drawings, strict=True):
            part.suptitle(drawing.title, fontsize=11, fontweight="bold", color=LIGHT["ink"])
            drawing.draw(part, LIGHT)
        figure.savefig(path, dpi=dpi)


def _themed(svg: str, drawing: Drawing) -> str:
    """Make matplotlib's SVG part of the page: its colors, its fonts, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    # Texts inherit the page's font.
    svg = re.sub(r"font-family:[^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: (?:[a-z]+ )*(\d+ )?([\d.]+px) [^;\"]*", _font, svg)
    prefix = f"{drawing.name}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    for role, mark in _MARKS.items():
        svg = svg.replace(mark, f"var(--{role})")
    start = svg.index(">")
    opening = re.sub(r' (width|height|version)="[^"]*"', "", svg[:start])
    return f'{opening} role="img" aria-label="{drawing.title}"{svg[start:]}'.strip()


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1].strip()}" if match[1] else ""
    return f"font-size: {match[2]}{weight}"


@contextmanager
def _styled(colors: Colors) -> Iterator[None]:
    # It logs every font that a machine does not have, and the building of its cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        import matplotlib
    except ImportError as error:
        raise SetupError(
            f"figures need matplotlib ({error}): pip install 'gpu-aware-tune[report]'"
        ) from error

    colored = {
        "text.color": colors["ink"],
        "axes.labelcolor": colors["muted"],
        "axes.edgecolor": colors["muted"],
        "axes.titlecolor": colors["ink"],
        "xtick.color": colors["muted"],
        "ytick.color": colors["muted"],
        "grid.color": colors["grid"],
        "figure.facecolor": colors["surface"],
        "axes.facecolor": colors["surface"],
    }
    with matplotlib.rc_context({**_STYLE, **colored}):
        yield
