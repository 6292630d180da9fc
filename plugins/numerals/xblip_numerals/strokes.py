"""Handwriting of our own: digits drawn as smooth pen strokes, 28x28 grey like MNIST's.

The public sets are not ours to ship, so the demo's files and the tests are made of these. No part of the model is trained
on them.
"""

import numpy as np
from PIL import Image, ImageDraw

SIZE = 28
_SCALE = 8  # strokes are drawn large and shrunk, which gives them soft edges

# Control points (x right, y down, in the unit square) of each stroke; curves pass through all of them.
STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "zero": [[(0.55, 0.05), (0.25, 0.2), (0.18, 0.55), (0.35, 0.92), (0.68, 0.88), (0.82, 0.5), (0.72, 0.15), (0.52, 0.05)]],
    "one": [[(0.38, 0.2), (0.55, 0.05), (0.53, 0.5), (0.5, 0.95)]],
    "two": [[(0.22, 0.25), (0.4, 0.06), (0.7, 0.12), (0.72, 0.38), (0.45, 0.7), (0.2, 0.93), (0.5, 0.88), (0.82, 0.92)]],
    "three": [[(0.25, 0.14), (0.55, 0.04), (0.74, 0.22), (0.46, 0.46), (0.76, 0.68), (0.55, 0.94), (0.22, 0.86)]],
    "four": [[(0.34, 0.08), (0.22, 0.35), (0.2, 0.55), (0.5, 0.56), (0.8, 0.52)], [(0.68, 0.1), (0.64, 0.5), (0.62, 0.95)]],
    "five": [[(0.74, 0.07), (0.5, 0.08), (0.32, 0.1)], [(0.32, 0.1), (0.27, 0.42)],
             [(0.27, 0.42), (0.52, 0.37), (0.76, 0.6), (0.6, 0.9), (0.24, 0.9)]],
    "six": [[(0.64, 0.06), (0.38, 0.3), (0.24, 0.62), (0.36, 0.92), (0.66, 0.9), (0.72, 0.66), (0.52, 0.55), (0.28, 0.7)]],
    "seven": [[(0.2, 0.1), (0.5, 0.11), (0.78, 0.08)], [(0.78, 0.08), (0.6, 0.5), (0.46, 0.95)]],
    "eight": [[(0.66, 0.16), (0.4, 0.06), (0.3, 0.26), (0.52, 0.46), (0.72, 0.7), (0.52, 0.94), (0.28, 0.78), (0.48, 0.5),
               (0.7, 0.28), (0.66, 0.14)]],
    "nine": [[(0.7, 0.2), (0.46, 0.06), (0.26, 0.28), (0.42, 0.5), (0.68, 0.36), (0.72, 0.16)],
             [(0.72, 0.16), (0.7, 0.55), (0.58, 0.95)]],
}  # fmt: skip


def draw_digit(number: str, rng: np.random.Generator) -> Image.Image:
    """Draws a digit, white on black, a little different every time.

    Args:
      number: "zero" to "nine".
      rng: shape, slant, size and pen of this drawing.

    Returns:
      A grey picture, 28x28.
    """
    slant, turn = rng.uniform(-0.15, 0.25), rng.uniform(-0.12, 0.12)
    width, height = rng.uniform(14, 18), rng.uniform(18, 20)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    sheared = np.array([[width, -slant * height], [0, height]])
    canvas = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE))
    pen = ImageDraw.Draw(canvas)
    radius = rng.uniform(1.0, 1.6) * _SCALE
    for stroke in STROKES[number]:
        points = np.array(stroke) - 0.5 + rng.normal(0, 0.015, (len(stroke), 2))
        path = (_curve(points) @ (turned @ sheared).T + SIZE / 2) * _SCALE
        for x, y in path:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _curve(points: np.ndarray, steps: int = 40) -> np.ndarray:
    """A Catmull-Rom curve through all points; two points give a straight line."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    at = np.linspace(0, 1, steps)[:, None]
    pieces = []
    for before, start, end, after in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        pieces.append(
            0.5 * (2 * start + (end - before) * at + (2 * before - 5 * start + 4 * end - after) * at**2
                   + (3 * start - before - 3 * end + after) * at**3)
        )  # fmt: skip
    return np.concatenate(pieces)
