"""Weights of an encoder's tokens drawn over what it read: blocks of heat on pictures, sheets of pictures, bars.

A block is exactly the part of a picture that a token stands for, never smoothed into its neighbours: what looks like a sharp
outline on a 4 x 4 grid would be drawing, not measuring.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import PIL.Image

CLS = "[CLS]"
SPECIAL = "a register, distillation or like token"
POOLED = "one token that all of it was pooled to"
STOPS = np.array([[255, 221, 100], [255, 140, 30], [225, 15, 55]], np.float32)
"""Colours from little to much, which show on dark pictures and on light ones."""
OPAQUE = 0.8
SIDE, SMALL_SIDE, COLUMNS = 384, 176, 4
MOST_SPECIAL = 32
INK, PAPER, GREY = (40, 40, 46), (255, 255, 255), (226, 226, 230)


@dataclass
class Drawing:
    """What `Modality.draw` makes: one medium with heat where its tokens lie.

    Attributes:
      files: by ending, such as ".png": a picture (PIL), which there must be, and bytes of other kinds (".ply").
      caption: a line that says how to read the picture; "" if it needs none.
      placeless: tokens that lie nowhere in the medium, by their number in a segment: what each is.
    """

    files: dict[str, "PIL.Image.Image | bytes"] = field(repr=False)
    caption: str = ""
    placeless: Mapping[int, str] = field(default_factory=dict)


def scaled(weights: np.ndarray) -> np.ndarray:
    """Weights as shares of the largest of them, in [0, 1]; nothing stays nothing."""
    largest = weights.max(initial=0)
    return weights / largest if largest > 0 else np.zeros_like(weights)


def colors(shares: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 of shares in [0, 1]."""
    places = np.linspace(0, 1, len(STOPS))
    return np.stack([np.interp(shares, places, STOPS[:, channel]) for channel in range(3)], -1).round().astype(np.uint8)


def lay_over(picture: "PIL.Image.Image", shares: np.ndarray) -> "PIL.Image.Image":
    """Lays shares (rows, columns) in [0, 1] over a picture as blocks of colour, the more opaque, the larger they are."""
    import PIL.Image

    def grown(values: np.ndarray) -> "PIL.Image.Image":
        return PIL.Image.fromarray(values).resize(picture.size, PIL.Image.Resampling.NEAREST)

    alpha = grown((shares.clip(0, 1) ** 0.7 * 255 * OPAQUE).round().astype(np.uint8))
    return PIL.Image.composite(grown(colors(shares)), picture.convert("RGB"), alpha)


def fitted(picture: "PIL.Image.Image", side: int) -> "PIL.Image.Image":
    """Brings the long side of a picture to so many pixels."""
    import PIL.Image

    factor = side / max(picture.size)
    size = [max(1, round(length * factor)) for length in picture.size]
    return picture.resize(size, PIL.Image.Resampling.BICUBIC)


def sheet(
    pictures: Sequence["PIL.Image.Image"], labels: Sequence[str] | None = None, *, columns: int = COLUMNS
) -> "PIL.Image.Image":
    """Lays pictures in rows on white, each under its label."""
    import PIL.Image
    import PIL.ImageDraw

    gap, line = 8, 16 if labels else 0
    columns = min(columns, len(pictures))
    wide, high = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    page = PIL.Image.new("RGB", (columns * (wide + gap) - gap, rows * (high + line + gap) - gap), PAPER)
    pen = PIL.ImageDraw.Draw(page)
    for index, picture in enumerate(pictures):
        left, top = index % columns * (wide + gap), index // columns * (high + line + gap)
        if labels:
            write(pen, (left, top), labels[index])
        page.paste(picture, (left, top + line))
    return page


def write(pen, place: tuple[float, float], text: str, *, anchor: str = "la", size: int = 12) -> None:
    """Writes a text with a pen of PIL's, in the font that comes with it."""
    import PIL.ImageFont

    pen.text(place, text, INK, PIL.ImageFont.load_default(size=size), anchor=anchor)


def grid_of(count: int, width: int, height: int) -> tuple[int, int, int] | None:
    """Tells how N tokens of a picture of that size lie: special tokens first, then rows of equal patches.

    Returns:
      How many are special, rows and columns; None if no grid has the picture's shape. A single token is no grid of one
      patch, since encoders that give one have pooled it.
    """
    for special in range(min(count, MOST_SPECIAL + 1)):
        patches = count - special
        rows = max(1, round(math.sqrt(patches * height / width)))
        for lines in {rows, max(1, rows - 1), rows + 1}:
            across = patches // lines
            if lines * across == patches and abs(across - lines * width / height) < 1 and patches > 1:
                return special, lines, across
    return None


def named(special: int) -> dict[int, str]:
    """What special tokens before the patches are."""
    return {index: SPECIAL if index else CLS for index in range(special)}


def over_pictures(
    pictures: Sequence["PIL.Image.Image"],
    weights: np.ndarray,
    *,
    labels: Sequence[str] | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Drawing:
    """Draws the weights of patches over pictures of one size.

    Args:
      pictures: S of them, what the encoder saw.
      weights: (S, N), tokens as `grid_of` finds them: special ones, then patches row by row.
      labels: S, where there are several.
      grid: as `grid_of` gives it, where that is known better.

    Returns:
      A drawing with one picture; plain bars where the tokens are no grid.
    """
    grid = grid or grid_of(weights.shape[1], *pictures[0].size)
    if weights.shape[1] == 1:
        grid = (1, 0, 0)
    elif grid is None:
        return bars(weights)
    special, rows, columns = grid
    placeless = {0: POOLED} if weights.shape[1] == 1 else named(special)
    patches = scaled(weights[:, special : special + rows * columns])
    side = SIDE if len(pictures) == 1 else SMALL_SIDE
    drawn = [fitted(picture, side) for picture in pictures]
    if patches.size:
        shaped = patches.reshape(len(patches), rows, columns)
        drawn = [lay_over(picture, shares) for picture, shares in zip(drawn, shaped, strict=True)]
    many = len(drawn) > 1
    caption = f"A block is one of {rows} x {columns} patches." if patches.size else ""
    return Drawing({".png": sheet(drawn, labels if many else None)}, caption, placeless)


def bars(weights: np.ndarray) -> Drawing:
    """Draws the weights (S, N) of tokens whose place is not known, a row of bars for each segment."""
    import PIL.Image
    import PIL.ImageDraw

    segments, tokens = weights.shape
    step = max(2, min(16, 640 // tokens))
    high, gap, left = 72, 20, 12
    page = PIL.Image.new("RGB", (max(240, tokens * step + 2 * left), segments * (high + gap) + 4), PAPER)
    pen = PIL.ImageDraw.Draw(page)
    shares = scaled(weights)
    for segment in range(segments):
        top = segment * (high + gap) + gap
        write(pen, (left, top - 16), f"segment {segment + 1}, {tokens} tokens" if segments > 1 else f"{tokens} tokens")
        pen.line([(left, top + high), (left + tokens * step, top + high)], GREY)
        for token, share in enumerate(shares[segment]):
            if share > 0:
                corner = (left + token * step, top + high - max(1, round(share * (high - 4))))
                color = tuple(int(part) for part in colors(share))
                pen.rectangle([corner, (corner[0] + step - 2, top + high)], color)
    return Drawing({".png": page}, "A bar for each token of the encoder, in its order.")
