"""Ink, paint and paper of the numerals world: shades that a person calls by one name, and digits laid on paper.

Ink and paper are drawn together until their luminances differ enough for a person to read. The facts stay independent by
that: white and yellow ink do lie on light paper, but on a greyer one (a value of .58 to .7), where blue may lie on any.
"""

import colorsys

import numpy as np
from PIL import Image

from xblip_numerals.sources import Source

COLORS = ("red", "green", "blue", "yellow", "purple", "white")
# Value (of hue, saturation, value) of what is called light and dark.
PAPERS = {"light": (0.58, 1.0), "dark": (0.0, 0.2)}

# Hue in degrees, saturation, value: ranges that a person calls by that one name.
_SHADES = {
    "red": ((-10, 8), (0.75, 1.0), (0.6, 1.0)),
    "green": ((95, 145), (0.6, 1.0), (0.4, 0.95)),
    "blue": ((205, 235), (0.65, 1.0), (0.5, 1.0)),
    "yellow": ((47, 60), (0.7, 1.0), (0.85, 1.0)),
    "purple": ((270, 295), (0.55, 1.0), (0.45, 0.95)),
    "white": ((0, 360), (0.0, 0.05), (0.94, 1.0)),
}
_MIN_CONTRAST = 2.1
_OVERSIZE = 4  # masks are turned and sheared at this multiple of MNIST's pixels, since 20 of them would fray
_STEEPEST = 0.8


def shade(color: str, rng: np.random.Generator) -> np.ndarray:
    """One shade of a colour: RGB in 0 to 1."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in _SHADES[color])
    return np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def ink_and_paper(
    color: str, tone: str, size: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Ink (3,) of a colour and light or dark paper (height, width, 3), in 0 to 1, far enough apart in luminance."""
    while True:
        ink = shade(color, rng)
        paper = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.12), rng.uniform(*PAPERS[tone])))
        if contrast(ink, paper) >= _MIN_CONTRAST:
            return ink, textured(size, paper, rng)


def contrast(first: np.ndarray, second: np.ndarray) -> float:
    """Contrast of two RGB colours in 0 to 1, from 1 to 21 (WCAG 2, with a plain 2.2 gamma)."""
    bright, dark = sorted((float(color**2.2 @ (0.2126, 0.7152, 0.0722)) for color in (first, second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def textured(size: tuple[int, int], color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paper (height, width, 3) in 0 to 1: plain, with a shadow, grained or ruled."""
    width, height = size
    paper = np.broadcast_to(color, (height, width, 3)).copy()
    texture = rng.choice(("plain", "shadow", "grain", "ruled"))
    if texture == "shadow":
        x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
        angle = rng.uniform(0, 2 * np.pi)
        paper += 0.05 * (x * np.cos(angle) + y * np.sin(angle))[..., None]
    elif texture == "grain":
        paper += rng.normal(0, 0.025, (height, width, 1))
    elif texture == "ruled":
        pitch, shift = int(rng.integers(10, 20)), int(rng.integers(0, 8))
        paper[shift::pitch] += -0.06 if color.mean() > 0.4 else 0.06
    return paper


def read_handwriting(source: Source) -> Image.Image:
    """Reads a handwritten digit: white on black, mode L, cropped to the digit."""
    with Image.open(source.path) as opened:
        digit = opened.convert("L")
    box = digit.getbbox()
    assert box is not None, source.path
    return digit.crop(box)


def straightened(digit: Image.Image, lean: float) -> Image.Image:
    """A digit of the size it has, enlarged by four, its own slant replaced by another, cropped to the digit.

    The slant is that of the line through the rows' middles, as the second moments give it.

    Args:
        digit: White on black, mode L.
        lean: How far a stroke goes to the right for each pixel up.

    Returns:
        White on black, mode L.
    """
    large = digit.resize((_OVERSIZE * digit.width, _OVERSIZE * digit.height), Image.Resampling.BICUBIC)
    level = np.asarray(large, dtype=float)
    down, right = np.mgrid[: large.height, : large.width]
    down, right = (axis - np.average(axis, weights=level) for axis in (down, right))
    slant = np.average(down * right, weights=level) / np.average(down**2, weights=level)
    shear = float(np.clip(slant, -_STEEPEST, _STEEPEST)) + lean
    margin = int(0.6 * large.height) + 4
    padded = Image.new("L", (large.width + 2 * margin, large.height + 8))
    padded.paste(large, (margin, 4))
    affine = (1, shear, -shear * padded.height / 2, 0, 1, 0)
    return trimmed(padded.transform(padded.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))


def trimmed(digit: Image.Image) -> Image.Image:
    """Crops a digit, white on black, to what is clearly ink."""
    return digit.crop(digit.point(lambda level: 255 if level > 40 else 0).getbbox())


def stain(paper: np.ndarray, ink: np.ndarray, color: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Lays ink (h, w) on paper around a centre (x, y) in pixels, cut off at the edges; uint8 (height, width, 3)."""
    stained = paper.copy()
    left, top = np.round(center - np.array(ink.shape[::-1]) / 2).astype(int)
    rows = slice(max(top, 0), min(top + ink.shape[0], paper.shape[0]))
    columns = slice(max(left, 0), min(left + ink.shape[1], paper.shape[1]))
    alpha = ink[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    stained[rows, columns] = (1 - alpha) * stained[rows, columns] + alpha * color
    return to_bytes(stained)


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """0 to 1 -> uint8."""
    return np.round(255 * picture.clip(0, 1)).astype(np.uint8)
