"""Small plots of shares as SVG, to stand within a page; written by hand, for they are a few lines and marks each."""

from collections.abc import Mapping
from html import escape
from typing import Any

COLORS = {
    "true descriptions": "#8a8f9a",
    "soft prompts": "#1f6fb5",
    "product of the parts": "#e08a1e",
    "people's captions": "#3a9a5b",
    "own captions": "#8fc49f",
    "one input alone": "#a878b8",
    "question alone": "#c7566b",
    "chance": "#b9bdc6",
}
OTHER = "#1f6fb5"
"""Of rows that are none of these."""
LEFT, WIDTH, ROW = 210, 620, 26
INK, GRID = "#23262d", "#e6e8ed"


def dots(rows: Mapping[str, Mapping[str, float]], *, chance: float | None = None) -> str:
    """Draws a row for each name: its share as a dot on its interval, and chance as a dashed line through all."""
    height = ROW * len(rows) + 34
    marks = _axis(height)
    if chance is not None:
        x = _x(chance)
        marks += (
            f'<line x1="{x}" x2="{x}" y1="8" y2="{height - 26}" stroke="{INK}" stroke-dasharray="3 4" opacity=".55"/>'
        )
        marks += _text(x, height - 12 + 10, "chance", anchor="middle", size=11)
    for number, (name, got) in enumerate(rows.items()):
        y = 8 + ROW * (number + 0.5)
        marks += _text(LEFT - 12, y + 4, name, anchor="end", bold=name == "soft prompts")
        marks += _dot(name, got, y) + _text(LEFT + WIDTH + 14, y + 4, f"{100 * got['value']:.1f}", size=12)
    return _svg(marks, height + 8)


def grouped(cuts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Draws a row for each cut with a dot of each name in it; a legend stands above."""
    names = list(dict.fromkeys(name for found in cuts.values() for name in found))
    top = 26
    height = top + ROW * len(cuts) + 34
    marks = _axis(height, top)
    x = LEFT - 150
    for name in names:
        marks += f'<circle cx="{x + 5}" cy="12" r="4.5" fill="{COLORS[name]}"/>' + _text(x + 14, 16, name, size=12)
        x += 34 + 6.6 * len(name)
    for number, (cut, found) in enumerate(cuts.items()):
        y = top + ROW * (number + 0.5)
        marks += _text(LEFT - 12, y + 4, cut, anchor="end")
        for name in sorted(found, key=lambda name: name == "soft prompts"):
            marks += _dot(name, found[name], y, slim=True)
    return _svg(marks, height)


def heat(cells: Mapping[str, Mapping[str, Mapping[str, float]]], way: str) -> str:
    """Draws the share of each column and row, in this order, as a coloured field with its number."""
    rows = sorted({row for found in cells.values() for row in found})
    wide, high, top = 58, 28, 40 + 5 * max(map(len, cells), default=0)
    marks = ""
    for number, column in enumerate(cells):
        x = LEFT + wide * (number + 0.5)
        turned = f'transform="translate({x + 4},{top - 8}) rotate(-40)"'
        marks += f'<text {turned} font-size="12" fill="{INK}">{escape(column)}</text>'
    for place, row in enumerate(rows):
        y = top + high * place
        marks += _text(LEFT - 12, y + high / 2 + 4, row, anchor="end")
        for number, found in enumerate(cells.values()):
            if row in found:
                marks += _field(LEFT + wide * number, y, wide - 2, high - 2, found[row], way)
    return _svg(marks, top + high * len(rows) + 8, width=LEFT + wide * len(cells) + 160)


def _field(x: float, y: float, wide: float, high: float, got: Mapping[str, Any], way: str) -> str:
    share = got[way]
    light = 95 - 52 * share
    color = "#fff" if light < 62 else INK
    return (
        f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="3" fill="hsl(208 62% {light:.0f}%)">'
        f"<title>{100 * share:.1f} % of {got['rows']}</title></rect>"
        f'<text x="{x + wide / 2}" y="{y + high / 2 + 4}" font-size="12" text-anchor="middle" fill="{color}" '
        f'pointer-events="none">{100 * share:.0f}</text>'
    )


def _x(share: float) -> float:
    return round(LEFT + WIDTH * min(max(share, 0.0), 1.0), 1)


def _dot(name: str, got: Mapping[str, float], y: float, *, slim: bool = False) -> str:
    color, low, high = COLORS.get(name, OTHER), _x(got["low"]), _x(got["high"])
    told = f"{name}: {100 * got['value']:.1f} % ({100 * got['low']:.1f} to {100 * got['high']:.1f}), n = {got['n']}"
    thick = 3 if slim else 5
    line = f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="{thick}" opacity=".4"/>'
    dot = f'<circle cx="{_x(got["value"])}" cy="{y}" r="{4.5 if slim else 5.5}" fill="{color}"/>'
    return f"<g><title>{escape(told)}</title>{line}{dot}</g>"


def _axis(height: float, top: float = 8) -> str:
    marks = ""
    for percent in range(0, 101, 20):
        x = _x(percent / 100)
        marks += f'<line x1="{x}" x2="{x}" y1="{top}" y2="{height - 26}" stroke="{GRID}"/>'
        marks += _text(x, height - 12, f"{percent} %" if percent == 100 else str(percent), anchor="middle", size=11)
    return marks


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{INK}"{weight}>{escape(text)}</text>'


def _svg(marks: str, height: float, *, width: float = LEFT + WIDTH + 70) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif">{marks}</svg>\n'
    )
