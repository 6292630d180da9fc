"""Point clouds of the numerals world: the surface of digits cut from a slab, standing on the ground or lying on it.

A six that lies and is turned half way round is a nine. So a lying six or nine carries a bar under its foot, as billiard
balls do; any other digit carries one now and then, so that the bar alone tells nothing.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xblip_numerals.sources import NUMBERS, Source

POSES = ("standing", "lying")
# Depth of the slab as a share of the digit's height.
THICKNESSES = {"thin": (0.05, 0.12), "thick": (0.3, 0.5)}

_PIXELS = 96
_MARGIN = 12
_BAR_SHARE = 0.15
# Digits on the line, in faces that matplotlib carries (DejaVu, STIX, Computer Modern); Pillow's own comes beside them.
_FACES = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif"
    " DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic STIXGeneralBol STIXGeneralBolIta cmb10 cmss10 cmtt10"
).split()


def glyph_names() -> list[str]:
    """Names of the font faces that `glyph` draws."""
    return ["Aileron", *_FACES]


def glyph(number: str, face: str) -> Image.Image:
    """Draws a number in a font face: white on black, mode L, cropped to the digit."""
    canvas = Image.new("L", (160, 160))
    ImageDraw.Draw(canvas).text((80, 80), str(NUMBERS.index(number)), fill=255, font=_font(face), anchor="mm")
    return canvas.crop(canvas.getbbox())


def read_handwriting(source: Source) -> Image.Image:
    """Reads a handwritten digit: white on black, mode L, cropped to the digit."""
    with Image.open(source.path) as opened:
        digit = opened.convert("L")
    return digit.crop(digit.getbbox())


def render_solid(digit: Image.Image, facts: dict[str, str], turn: float, rng: np.random.Generator) -> np.ndarray:
    """Samples the surface of a digit cut from a slab.

    Args:
        digit: White on black, mode L, cropped to the digit.
        facts: `number`; `pose` "standing" (upright) or "lying" (face up); `thickness`.
        turn: About the vertical axis, in radians, counter-clockwise seen from above.
        rng: Chooses depth, size, bar and noise.

    Returns:
        float32 (P, 3), P from 1,024 to 2,048, z up, any unit of length.
    """
    level = _upscale(digit, rng)
    needs_bar = facts["pose"] == "lying" and facts["number"] in ("six", "nine")
    if needs_bar or rng.random() < _BAR_SHARE:
        level = _underline(level, rng)
    rows = np.flatnonzero(level.max(axis=1) > 0.5)
    depth = rng.uniform(*THICKNESSES[facts["thickness"]]) * (rows[-1] - rows[0] + 1)
    across, up, deep = _sample_surface(level, depth, int(rng.integers(1024, 2049)), rng)
    # Seen from above, a lying digit reads the right way round: its face looks up.
    upright = (across, deep, up) if facts["pose"] == "standing" else (across, up, -deep)
    points = np.stack(upright, axis=1)
    points -= points.mean(axis=0)
    points *= rng.uniform(0.9, 1.1, 3)
    cosine, sine = np.cos(turn), np.sin(turn)
    points = points @ np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    points += rng.normal(0, rng.uniform(0.0, 0.8), points.shape)
    return (points * rng.uniform(0.005, 0.05)).astype(np.float32)


def write_points(path: Path, points: np.ndarray) -> None:
    """Writes points (P, 3) as .npy, .xyz, .obj or binary .ply, by the path's suffix.

    Readers of .obj want a mesh, so there each point becomes a triangle a hundredth of the cloud's size.
    """
    if path.suffix == ".npy":
        np.save(path, points)
    elif path.suffix == ".ply":
        header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
        header += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
        path.write_bytes(header.encode() + points.astype("<f4").tobytes())
    elif path.suffix == ".obj":
        corners = points[:, None] + 0.005 * np.ptp(points, axis=0).max() * np.eye(3)
        vertices = "".join(f"v {x:.5g} {y:.5g} {z:.5g}\n" for x, y, z in corners.reshape(-1, 3).tolist())
        path.write_text(vertices + "".join(f"f {3 * n + 1} {3 * n + 2} {3 * n + 3}\n" for n in range(len(points))))
    else:
        path.write_text("".join(f"{x:.5g} {y:.5g} {z:.5g}\n" for x, y, z in points.tolist()))


@cache
def _font(face: str):
    """Loads a face, 96 pixels high."""
    if face == "Aileron":
        return ImageFont.load_default(96)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf", 96)


def _upscale(digit: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The digit's grey levels (h, w) in 0 to 1, its longer side `_PIXELS`, slightly sheared, with an empty margin."""
    factor = _PIXELS / max(digit.size)
    size = (max(8, round(digit.width * factor)), max(8, round(digit.height * factor)))
    digit = digit.resize(size, Image.Resampling.BICUBIC)
    margin = _MARGIN + size[1] // 8
    padded = Image.new("L", (size[0] + 2 * margin, size[1] + 2 * _MARGIN))
    padded.paste(digit, (margin, _MARGIN))
    shear = rng.uniform(-0.15, 0.15)
    sheared = padded.transform(
        padded.size,
        Image.Transform.AFFINE,
        (1, shear, -shear * padded.height / 2, 0, 1, 0),
        Image.Resampling.BICUBIC,
    )
    return np.asarray(sheared) / 255.0


def _underline(level: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds a bar under the digit's foot."""
    inked = level > 0.5
    bottom = np.flatnonzero(inked.any(axis=1))[-1]
    columns = np.flatnonzero(inked.any(axis=0))
    gap, height = int(rng.integers(10, 17)), int(rng.integers(8, 14))
    bar = np.zeros((bottom + gap + height + _MARGIN, level.shape[1]))
    bar[: min(len(level), len(bar))] = level[: len(bar)]
    bar[bottom + gap : bottom + gap + height, columns[0] : columns[-1] + 1] = 1.0
    return bar


def _sample_surface(
    level: np.ndarray, depth: float, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples points evenly over both faces and the wall of the region where `level` exceeds one half.

    Args:
        level: (h, w) in 0 to 1.
        depth: Of the slab, in pixels.
        count: How many points.
        rng: Random numbers.

    Returns:
        Across (right), up and deep (away from who reads the digit), each (count,), in pixels.
    """
    inside = level > 0.5
    faces = np.argwhere(inside)
    slope = np.stack(np.gradient(level), axis=-1)
    steepness = np.linalg.norm(slope, axis=-1)
    # The rim: pixels within half a pixel of the level set, by its distance to first order.
    rim = np.argwhere(np.abs(level - 0.5) < 0.5 * np.maximum(steepness, 1e-6))
    area, wall = 2.0 * len(faces), len(rim) * depth
    on_wall = rng.random(count) < wall / (area + wall)
    at_face = faces[rng.integers(len(faces), size=count)] + rng.uniform(-0.5, 0.5, (count, 2))
    pixel = rim[rng.integers(len(rim), size=count)]
    normal = slope[pixel[:, 0], pixel[:, 1]]
    distance = (0.5 - level[pixel[:, 0], pixel[:, 1]]) / (normal**2).sum(axis=1)
    at_rim = pixel + normal * distance[:, None] + rng.uniform(-0.5, 0.5, (count, 2))
    flat = np.where(on_wall[:, None], at_rim, at_face)
    deep = np.where(on_wall, rng.uniform(0, depth, count), depth * rng.integers(0, 2, count))
    return flat[:, 1], -flat[:, 0], deep
