"""Images and videos of the numerals world: handwriting in coloured ink on paper, hands on coloured pages.

Ink and paper are drawn together until their luminances differ enough for a person to read, so colour never has to be
guessed and white ink only ever meets dark paper.
"""

import colorsys
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageFilter

from xblip_numerals.sources import Source

COLORS = ("red", "green", "blue", "yellow", "purple", "white")
PLACES = ("left", "right", "top", "bottom", "center")
DIRECTIONS = ("left", "right", "up", "down")

# Hue in degrees, saturation, value: ranges that a person calls by that one name.
_SHADES = {
    "red": ((-10, 8), (0.75, 1.0), (0.6, 1.0)),
    "green": ((95, 145), (0.6, 1.0), (0.4, 0.95)),
    "blue": ((205, 235), (0.65, 1.0), (0.5, 1.0)),
    "yellow": ((47, 60), (0.7, 1.0), (0.8, 1.0)),
    "purple": ((270, 295), (0.55, 1.0), (0.45, 0.95)),
    "white": ((0, 360), (0.0, 0.05), (0.92, 1.0)),
}
_MIN_CONTRAST = 1.9
_VECTORS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "up": (0, -1), "down": (0, 1)}
_LARGEST_OFF_CENTER = 0.7
_CENTER_JITTER = 0.05
_CLEAR_OFFSET = 0.13


def render_handwriting(source: Source, facts: dict[str, str], rng: np.random.Generator) -> Image.Image:
    """Handwriting in coloured ink at a place on paper.

    Args:
        source: A handwritten digit.
        facts: `color` of the ink; `place` on the canvas.
        rng: Chooses everything the facts leave open.

    Returns:
        RGB image, 64 to 160 pixels a side. The ink's longer side is .35 to .9 of the canvas's shorter one, at most .7
        unless the place is center.
    """
    width, height = (int(side) for side in rng.integers(64, 161) * rng.uniform(0.8, 1.0, 2))
    width, height = max(width, 64), max(height, 64)
    place = facts["place"]
    scale = rng.uniform(0.35, 0.9 if place == "center" else _LARGEST_OFF_CENTER)
    ink = _ink_mask(source, scale * min(width, height), rng)
    color, paper = _ink_and_paper(facts["color"], (width, height), rng)
    offset = rng.uniform(-_CENTER_JITTER, _CENTER_JITTER, 2)
    if place != "center":
        axis = 0 if place in ("left", "right") else 1
        room = (1 - ink.shape[1 - axis] / (width, height)[axis]) / 2
        offset[axis] = sum(_VECTORS[place]) * rng.uniform(_CLEAR_OFFSET, max(room, _CLEAR_OFFSET))
    return Image.fromarray(_stain(paper, ink, color, (0.5 + offset) * (width, height)))


def render_sign(source: Source, facts: dict[str, str], rng: np.random.Generator) -> Image.Image:
    """A photograph of a hand: bare, or laid on a page of the colour in `facts`.

    Args:
        source: A photograph of a hand.
        facts: `color` of the page; without it the photograph fills the image.
        rng: Chooses crop, turn, brightness and, for the page, shade and margins.

    Returns:
        RGB image, 64 to 160 pixels a side.
    """
    side = int(rng.integers(64, 161))
    with Image.open(source.path) as opened:
        photo = opened.convert("RGB")
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    photo = photo.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=_corner_color(photo))
    crop = rng.uniform(0, 5, 4)
    photo = photo.crop((crop[0], crop[1], 100 - crop[2], 100 - crop[3]))
    photo = Image.fromarray((np.asarray(photo) * rng.uniform(0.8, 1.1)).clip(0, 255).astype(np.uint8))
    if "color" not in facts:
        return photo.resize((side, side), Image.Resampling.BICUBIC)
    page = _paper((side, side), _shade(facts["color"], rng), rng)
    inner = (side * rng.uniform(0.62, 0.82, 2)).astype(int)
    photo = photo.resize((int(inner[0]), int(inner[1])), Image.Resampling.BICUBIC)
    left, top = ((side - inner) * rng.uniform(0.25, 0.75, 2)).astype(int)
    page[top : top + inner[1], left : left + inner[0]] = np.asarray(photo) / 255
    return Image.fromarray(_to_bytes(page))


def render_video(source: Source, facts: dict[str, str], rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A handwritten digit in coloured ink that moves across paper.

    Args:
        source: A handwritten digit.
        facts: `color` of the ink; `direction` of the movement, at least .4 of the canvas long.
        rng: Chooses everything the facts leave open.

    Returns:
        Frames, uint8 (12 to 30, height, width, 3), sides even and 80 to 128 pixels; frames per second, 10 to 25.
    """
    width, height = (2 * int(side) for side in rng.integers(40, 65, 2))
    ink = _ink_mask(source, rng.uniform(0.35, 0.6) * min(width, height), rng)
    color, paper = _ink_and_paper(facts["color"], (width, height), rng)
    axis = 0 if facts["direction"] in ("left", "right") else 1
    travel = rng.uniform(0.4, 0.75)
    start, end = np.full(2, 0.5), np.full(2, 0.5)
    start += rng.uniform(-0.15, 0.15, 2)
    end[1 - axis] = start[1 - axis] + rng.uniform(-0.05, 0.05)
    middle = 0.5 + rng.uniform(-0.08, 0.08)
    step = sum(_VECTORS[facts["direction"]]) * travel / 2
    start[axis], end[axis] = middle - step, middle + step
    frames = [
        _stain(paper, ink, color, (start + (end - start) * progress) * (width, height))
        for progress in np.linspace(0, 1, int(rng.integers(12, 31)))
    ]
    return np.stack(frames), int(rng.integers(10, 26))


def write_video(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    """Writes uint8 frames (T, height, width, 3), even sides, as an H.264 MP4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "20", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _shade(color: str, rng: np.random.Generator) -> np.ndarray:
    """One shade of a colour: RGB in 0 to 1."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in _SHADES[color])
    return np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def _ink_and_paper(color: str, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ink (3,) and paper (height, width, 3) in 0 to 1, that differ in luminance by at least `_MIN_CONTRAST`."""
    while True:
        ink = _shade(color, rng)
        value = rng.uniform(0.0, 0.2) if rng.random() < 0.5 else rng.uniform(0.82, 1.0)
        paper = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.12), value))
        bright, dark = sorted((_luminance(ink), _luminance(paper)), reverse=True)
        if (bright + 0.05) / (dark + 0.05) >= _MIN_CONTRAST:
            return ink, _paper(size, paper, rng)


def _luminance(color: np.ndarray) -> float:
    """Relative luminance of an RGB colour in 0 to 1 (WCAG 2, with a plain 2.2 gamma)."""
    return float((color**2.2) @ (0.2126, 0.7152, 0.0722))


def _paper(size: tuple[int, int], color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paper (height, width, 3) in 0 to 1: plain, with a shadow, grained or ruled."""
    width, height = size
    shape = (height, width, 1)
    paper = np.broadcast_to(color, (height, width, 3)).copy()
    texture = rng.choice(("plain", "shadow", "grain", "ruled"))
    if texture == "shadow":
        x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
        angle = rng.uniform(0, 2 * np.pi)
        paper += 0.06 * (x * np.cos(angle) + y * np.sin(angle))[..., None]
    elif texture == "grain":
        paper += rng.normal(0, 0.03, shape)
    elif texture == "ruled":
        pitch, shift = int(rng.integers(8, 20)), int(rng.integers(0, 8))
        paper[shift::pitch] += -0.1 if color.mean() > 0.5 else 0.1
    return paper


def _ink_mask(source: Source, longer_side: float, rng: np.random.Generator) -> np.ndarray:
    """How much ink lies where: (h, w) in 0 to 1, cropped to the digit, slightly turned and sheared."""
    with Image.open(source.path) as opened:
        digit = opened.convert("L")
    box = digit.getbbox()
    assert box is not None, source.path
    digit = digit.crop(box)
    # Turned and sheared at twice the digit's size, since doing so at 20 pixels would fray the strokes.
    digit = digit.resize((2 * digit.width, 2 * digit.height), Image.Resampling.BICUBIC)
    shear = rng.uniform(-0.15, 0.15)
    margin = int(0.2 * digit.height) + 2
    padded = Image.new("L", (digit.width + 2 * margin, digit.height + 2 * margin))
    padded.paste(digit, (margin, margin))
    padded = padded.transform(
        padded.size,
        Image.Transform.AFFINE,
        (1, shear, -shear * padded.height / 2, 0, 1, 0),
        Image.Resampling.BICUBIC,
    ).rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    padded = padded.crop(padded.point(lambda level: 255 if level > 40 else 0).getbbox())
    factor = longer_side / max(padded.size)
    padded = padded.resize(
        (max(1, round(factor * padded.width)), max(1, round(factor * padded.height))), Image.Resampling.LANCZOS
    )
    if rng.random() < 0.3:
        padded = padded.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    return (np.asarray(padded) / 255.0) ** rng.uniform(0.6, 1.2)


def _stain(paper: np.ndarray, ink: np.ndarray, color: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Lays ink on paper around a centre (x, y) in pixels, cut off at the edges; uint8 (height, width, 3)."""
    stained = paper.copy()
    left, top = np.round(center - np.array(ink.shape[::-1]) / 2).astype(int)
    rows = slice(max(top, 0), min(top + ink.shape[0], paper.shape[0]))
    columns = slice(max(left, 0), min(left + ink.shape[1], paper.shape[1]))
    alpha = ink[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    stained[rows, columns] = (1 - alpha) * stained[rows, columns] + alpha * color
    return _to_bytes(stained)


def _corner_color(photo: Image.Image) -> tuple[int, ...]:
    """The colour of the photograph's upper left corner, which fills what a turn uncovers."""
    corner = photo.getpixel((1, 1))
    assert isinstance(corner, tuple)
    return corner


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    """0 to 1 -> uint8."""
    return np.round(255 * picture.clip(0, 1)).astype(np.uint8)
