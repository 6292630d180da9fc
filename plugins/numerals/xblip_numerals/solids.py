"""Point clouds of the numerals world: painted digits cut from a slab, over a foot, standing on the ground or lying on it.

Every digit has a foot, a bar below it. It says which way is up, so that a lying six is no nine, it shows how a one is
stretched, and it carries the drilled holes, which would cut a digit's strokes or give it a loop. A hollow solid is open at
its front, as a mould is: its back and its walls stay, so that the digit is as plain as a solid one's.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from xblip_numerals.inks import shade, straightened
from xblip_numerals.sources import NUMBERS

POSES = ("standing", "lying")
# Depth of the slab as a share of the digit's height.
THICKNESSES = {"thick": (0.26, 0.36), "thin": (0.07, 0.11)}
# Width and height are multiplied by these.
STRETCHES = {"tall": (0.83, 1.2), "wide": (1.2, 0.83), "even": (1.0, 1.0)}
BODIES = ("solid", "hollow")
HOLES = ("drilled", "whole")
WIDEST_TURN = np.pi / 4
"""About the vertical axis, either way: nearer to a half turn, the front of a standing two is the back of a five."""

_PIXELS = 96
_MARGIN = 8
_FOOT = {"gap": 7, "height": 21, "width": 72}
_HOLE_RADIUS = 6.5
# What a person's digit is as wide as, in its height; narrower and wider ones are brought half way there.
_USUAL_WIDTHS = dict(zip(NUMBERS, (0.75, 0.3, 0.8, 0.7, 0.75, 0.75, 0.65, 0.7, 0.65, 0.65), strict=True))
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
    digit = canvas.crop(canvas.getbbox())
    return digit.resize((max(1, digit.width // 3), max(1, digit.height // 3)), Image.Resampling.LANCZOS)


def render_solid(digit: Image.Image, facts: dict[str, str], turn: float, rng: np.random.Generator) -> np.ndarray:
    """Samples the painted surface of a digit and its foot, cut from a slab.

    Args:
        digit: White on black, mode L, cropped to the digit, some 20 pixels high.
        facts: `number`; `color` of the paint; `pose` "standing" (upright) or "lying" (face up); `thickness`; `stretch`;
            `body` "solid" or "hollow" (open at the front); `holes` "drilled" or "whole".
        turn: About the vertical axis, in radians, counter-clockwise seen from above.
        rng: Chooses depth, size, paint and noise.

    Returns:
        float32 (P, 6), P from 1,024 to 2,048: coordinates, z up, in any unit of length, and red, green, blue in 0 to 1.
    """
    wide, high = STRETCHES[facts["stretch"]]
    level = _outline(digit, facts["number"], (wide, high), rng)
    if facts["thickness"] == "thick":
        level = _thickened(level)
    level = _on_foot(level, facts["holes"] == "drilled", wide)
    depth = rng.uniform(*THICKNESSES[facts["thickness"]]) * _PIXELS
    count = int(rng.integers(1024, 2049))
    across, up, deep = _sample_surface(level, depth, count, facts["body"] == "hollow", rng)
    # Seen from above, a lying digit reads the right way round: its face looks up.
    upright = (across, deep, up) if facts["pose"] == "standing" else (across, up, -deep)
    points = np.stack(upright, axis=1)
    points -= points.mean(axis=0)
    points *= rng.uniform(0.97, 1.03, 3)
    cosine, sine = np.cos(turn), np.sin(turn)
    points = points @ np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    points += rng.normal(0, rng.uniform(0.0, 0.5), points.shape)
    paint = shade(facts["color"], rng) + rng.normal(0, rng.uniform(0.005, 0.03), (count, 3))
    return np.concatenate([points * rng.uniform(0.005, 0.05), paint.clip(0, 1)], axis=1).astype(np.float32)


def write_points(path: Path, points: np.ndarray) -> None:
    """Writes painted points (P, 6) as .npy, .xyz, .obj or binary .ply, by the path's suffix.

    Readers of .obj want a mesh, so there each point becomes a triangle a hundredth of the cloud's size.
    """
    places, paint = points[:, :3], points[:, 3:]
    if path.suffix == ".npy":
        np.save(path, points)
    elif path.suffix == ".ply":
        header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
        header += "".join(f"property float {axis}\n" for axis in "xyz")
        header += "".join(f"property uchar {color}\n" for color in ("red", "green", "blue")) + "end_header\n"
        rows = np.empty(len(points), dtype=[("places", "<f4", 3), ("paint", "u1", 3)])
        rows["places"], rows["paint"] = places, np.round(255 * paint)
        path.write_bytes(header.encode() + rows.tobytes())
    elif path.suffix == ".obj":
        corners = places[:, None] + 0.005 * np.ptp(places, axis=0).max() * np.eye(3)
        painted = np.concatenate([corners, np.broadcast_to(paint[:, None], corners.shape)], axis=2).reshape(-1, 6)
        vertices = "".join("v " + " ".join(f"{value:.4g}" for value in row) + "\n" for row in painted.tolist())
        path.write_text(vertices + "".join(f"f {3 * n + 1} {3 * n + 2} {3 * n + 3}\n" for n in range(len(points))))
    else:
        path.write_text("".join(" ".join(f"{value:.5g}" for value in row) + "\n" for row in points.tolist()))


@cache
def _font(face: str):
    """Loads a face, 96 pixels high."""
    if face == "Aileron":
        return ImageFont.load_default(96)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf", 96)


def _outline(digit: Image.Image, number: str, stretch: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """The digit's grey levels (h, w) in 0 to 1: set upright, stretched, with an empty margin."""
    digit = straightened(digit, rng.uniform(-0.1, 0.15))
    width = (digit.width / digit.height * _USUAL_WIDTHS[number]) ** 0.5
    size = (max(8, round(width * stretch[0] * _PIXELS)), round(stretch[1] * _PIXELS))
    level = np.pad(_evened(np.asarray(digit.resize(size, Image.Resampling.BICUBIC)) / 255.0), _MARGIN)
    # Soft enough for each pixel of the rim to know how far the level set is.
    return ndimage.gaussian_filter(level, 1.0)


def _evened(level: np.ndarray) -> np.ndarray:
    """Grey levels moved so that one half is between the lightest and the darkest nearby.

    At one threshold for all, faint strokes would break and loops of a few grey pixels would close.
    """
    window = _PIXELS // 6
    middle = (ndimage.maximum_filter(level, window) + ndimage.minimum_filter(level, window)) / 2
    return level - ndimage.gaussian_filter(middle, window / 6).clip(0.22, 0.86) + 0.5


def _thickened(level: np.ndarray) -> np.ndarray:
    """Strokes wider by up to 5 pixels, as far as every loop keeps two thirds of its width."""
    from_ink = ndimage.distance_transform_edt(level < 0.5)
    regions, count = ndimage.label(level < 0.5)
    holes = [from_ink[regions == region].max() for region in range(1, count + 1) if region != regions[0, 0]]
    by = min(2.5, 0.33 * min([hole for hole in holes if hole > 1.5], default=np.inf))
    distance = from_ink - ndimage.distance_transform_edt(level >= 0.5)
    return ndimage.gaussian_filter(0.5 - 0.5 * np.tanh((distance - by) / 1.5), 0.7)


def _on_foot(level: np.ndarray, drilled: bool, wide: float) -> np.ndarray:
    """Adds the foot, a bar below the digit, drilled through at three places or whole."""
    inked = level > 0.5
    bottom = np.flatnonzero(inked.any(axis=1))[-1]
    columns = np.flatnonzero(inked.any(axis=0))
    length = max(columns[-1] - columns[0] + 1, round(wide * _FOOT["width"]))
    side = max(0, length - (columns[-1] - columns[0] + 1)) // 2 + 1
    level, first = np.pad(level, ((0, 0), (side, side))), columns[0]
    top = bottom + _FOOT["gap"]
    whole = np.zeros((top + _FOOT["height"] + _MARGIN, level.shape[1]))
    whole[: min(len(level), len(whole))] = level[: len(whole)]
    middle = first + side + (columns[-1] - columns[0]) / 2
    down, right = np.mgrid[: whole.shape[0], : whole.shape[1]]
    half = _FOOT["height"] / 2
    inside = np.minimum(half - np.abs(down - top - half), length / 2 - np.abs(right - middle))
    if drilled:
        for place in (-0.31, 0.0, 0.31):
            away = np.hypot(down - top - half, right - middle - place * length)
            inside = np.minimum(inside, away - _HOLE_RADIUS)
    return np.maximum(whole, (0.5 + inside / 2).clip(0, 1))


def _sample_surface(
    level: np.ndarray, depth: float, count: int, open_front: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples points evenly over the faces and the wall of the region where `level` exceeds one half.

    Args:
        level: (h, w) in 0 to 1.
        depth: Of the slab, in pixels.
        count: How many points.
        open_front: Whether there is only a back.
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
    area, wall = (1.0 if open_front else 2.0) * len(faces), len(rim) * depth
    on_wall = rng.random(count) < wall / (area + wall)
    at_face = faces[rng.integers(len(faces), size=count)] + rng.uniform(-0.5, 0.5, (count, 2))
    pixel = rim[rng.integers(len(rim), size=count)]
    normal = slope[pixel[:, 0], pixel[:, 1]]
    distance = (0.5 - level[pixel[:, 0], pixel[:, 1]]) / (normal**2).sum(axis=1)
    at_rim = pixel + normal * distance[:, None] + rng.uniform(-0.5, 0.5, (count, 2))
    flat = np.where(on_wall[:, None], at_rim, at_face)
    back = 1 if open_front else rng.integers(0, 2, count)
    deep = np.where(on_wall, rng.uniform(0, depth, count), depth * back)
    return flat[:, 1], -flat[:, 0], deep
