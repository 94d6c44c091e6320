"""matplotlib figures as inline SVG that takes its colours and its font from the page, light or dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from trimtab.errors import UsageError

# Stand-ins that no plot would choose; each becomes a CSS variable of the page.
INK = "#010101"
MUTED = "#020202"
GRID = "#030303"
ACCENT = "#040404"
SECOND = "#050505"
BEFORE = "#060606"
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    BEFORE: "var(--before)",
}
# Inches; at the page's full width one point of text is 1.4 CSS pixels.
WIDTH = 9.4
STYLE = {
    "svg.fonttype": "none",
    # Without a salt the ids are random, and two reports of one run would differ.
    "svg.hashsalt": "trimtab",
    # A module or file name may hold a dollar sign.
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titleweight": "bold",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def draw(height: float, paint: Callable[[Any], None], *, name: str, alt: str, tips: Mapping[str, str]) -> str:
    """One `<svg>` element of WIDTH x `height` inches, painted by `paint(figure)`.

    name: letters that make its ids its own among the figures of the page. alt: what a screen reader says.
    tips: text shown on hovering, by the gid that `paint` gave an artist.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('the report needs matplotlib and jinja2; run: pip install "trimtab[plots]"') from error
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        # Without these the file would hold the time of day and the version of matplotlib.
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), name, alt, tips)


def _inline(document: str, name: str, alt: str, tips: Mapping[str, str]) -> str:
    svg = document[document.index("<svg") :]
    # The page's own style sheet says this; a style element here would reach the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(f": {colour}", f": {variable}")
    for gid, tip in tips.items():
        svg = svg.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{html.escape(tip)}</title>', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    body = svg[svg.index(">") + 1 :]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view_box[0]}'
    return f'{head} role="img" aria-label="{html.escape(alt)}">{body}'
