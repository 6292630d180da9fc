"""Pictures of the numerals world: handwriting in coloured ink on paper, and photographed hands on coloured pages.

What lies at a place lies clearly off the middle, and a small thing is six tenths of a large one: no value of a fact is next
to another one, and even the smallest digit is larger than MNIST's own 20 pixels of 64.
"""

import numpy as np
from PIL import Image, ImageFilter

from xblip_numerals.inks import (
    contrast,
    ink_and_paper,
    read_handwriting,
    shade,
    stain,
    straightened,
    textured,
    to_bytes,
    trimmed,
)
from xblip_numerals.sources import Source

PLACES = ("left", "right", "top", "bottom", "center")
# Longer side as a share of the canvas's shorter one.
SIZES = {"small": (0.36, 0.42), "large": (0.58, 0.66)}
SIGN_SIZES = {"small": (0.46, 0.51), "large": (0.68, 0.74)}
# How far a stroke goes to the right for each pixel up.
LEANS = {"upright": (-0.05, 0.05), "slanted": (0.42, 0.6)}
FRAMES = ("framed", "bare")

_TOWARDS = {"left": -1, "right": 1, "top": -1, "bottom": 1}
_CENTER_JITTER = 0.025
_CLEAR_OFFSET = 0.11
_EDGE = 0.055  # free of ink, since a frame lies there


def render_handwriting(source: Source, facts: dict[str, str], rng: np.random.Generator) -> Image.Image:
    """Handwriting in coloured ink at a place on paper.

    Args:
        source: A handwritten digit.
        facts: `color` of the ink; `paper` "light" or "dark"; `place` on the canvas; `size`; `lean` "upright" or
            "slanted" (to the right, as italics are); `frame` "framed" (a line around the picture) or "bare".
        rng: Chooses everything the facts leave open.

    Returns:
        RGB image, 64 to 160 pixels a side.
    """
    size = _canvas(rng)
    scale = rng.uniform(*SIZES[facts["size"]])
    ink = _ink_mask(source, scale * min(size), rng.uniform(*LEANS[facts["lean"]]), rng)
    color, paper = ink_and_paper(facts["color"], facts["paper"], size, rng)
    center = _center(facts["place"], np.array(ink.shape[::-1]) / size, rng)
    if facts["frame"] == "framed":
        _add_frame(paper, rng)
    return Image.fromarray(stain(paper, ink, color, center * size))


def render_sign(source: Source, facts: dict[str, str], rng: np.random.Generator) -> Image.Image:
    """A photograph of a hand, laid on a coloured page.

    Args:
        source: A photograph of a hand.
        facts: `color` of the page; `place` and `size` of the photograph on it; `frame` of the page.
        rng: Chooses crop, turn, brightness and shade.

    Returns:
        RGB image, 64 to 160 pixels a side.
    """
    size = _canvas(rng)
    with Image.open(source.path) as opened:
        photo = opened.convert("RGB")
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    corner = photo.getpixel((1, 1))
    assert isinstance(corner, tuple)
    photo = photo.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=corner)
    crop = rng.uniform(0, 6, 4)
    photo = photo.crop((crop[0], crop[1], 100 - crop[2], 100 - crop[3]))
    sides = np.round(min(size) * rng.uniform(*SIGN_SIZES[facts["size"]]) * rng.uniform(0.94, 1.0, 2)).astype(int)
    lit = np.asarray(photo.resize(tuple(sides.tolist()), Image.Resampling.LANCZOS)) / 255 * rng.uniform(0.8, 1.1)
    page = textured(size, shade(facts["color"], rng), rng)
    center = _center(facts["place"], sides / size, rng)
    if facts["frame"] == "framed":
        _add_frame(page, rng)
    left, top = np.round(center * size - sides / 2).astype(int)
    page[top : top + sides[1], left : left + sides[0]] = lit
    return Image.fromarray(to_bytes(page))


def _canvas(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels."""
    width, height = (max(64, int(side)) for side in rng.integers(64, 161) * rng.uniform(0.8, 1.0, 2))
    return width, height


def _center(place: str, extent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where the middle (x, y) of something of an extent (x, y) lies, all as shares of the canvas."""
    offset = rng.uniform(-_CENTER_JITTER, _CENTER_JITTER, 2)
    if place != "center":
        axis = 0 if place in ("left", "right") else 1
        room = max(0.5 - _EDGE - extent[axis] / 2, 0.01)
        offset[axis] = _TOWARDS[place] * rng.uniform(min(_CLEAR_OFFSET, 0.8 * room), min(room, 0.32))
    return 0.5 + offset


def _add_frame(paper: np.ndarray, rng: np.random.Generator) -> None:
    """Draws a grey line along the edges of paper (height, width, 3), dark on light paper and light on dark."""
    ground = paper.mean(axis=(0, 1)).clip(0, 1)
    greys = [np.full(3, rng.uniform(*bounds)) for bounds in ((0.0, 0.25), (0.75, 1.0))]
    grey = max(greys, key=lambda grey: contrast(grey, ground))
    side = min(paper.shape[:2])
    inset, width = round(rng.uniform(0.0, 0.015) * side), max(2, round(rng.uniform(0.03, 0.04) * side))
    inner = inset + width
    bottom, right = paper.shape[0] - inset, paper.shape[1] - inset
    for rows, columns in (
        (slice(inset, inner), slice(inset, right)),
        (slice(bottom - width, bottom), slice(inset, right)),
        (slice(inset, bottom), slice(inset, inner)),
        (slice(inset, bottom), slice(right - width, right)),
    ):
        paper[rows, columns] = grey


def _ink_mask(source: Source, longer_side: float, lean: float, rng: np.random.Generator) -> np.ndarray:
    """How much ink lies where: (h, w) in 0 to 1, cropped to the digit."""
    digit = straightened(read_handwriting(source), lean).rotate(
        rng.uniform(-4, 4), Image.Resampling.BICUBIC, expand=True
    )
    digit = trimmed(digit)
    factor = longer_side / max(digit.size)
    size = (max(1, round(factor * digit.width)), max(1, round(factor * digit.height)))
    digit = digit.resize(size, Image.Resampling.LANCZOS)
    if rng.random() < 0.25:
        digit = digit.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6)))
    return (np.asarray(digit) / 255.0) ** rng.uniform(0.6, 1.1)
