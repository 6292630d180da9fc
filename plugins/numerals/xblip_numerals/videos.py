"""Videos of the numerals world: a handwritten digit that crosses paper, may grow or shrink, and may turn as it goes.

All clips last about as long, so that a fast digit goes two to three times as far as a slow one: speed can be told from a
few frames taken evenly, which is all that a video's encoder sees.
"""

from pathlib import Path

import av
import numpy as np
from PIL import Image

from xblip_numerals.inks import ink_and_paper, read_handwriting, stain, straightened, trimmed
from xblip_numerals.sources import Source

DIRECTIONS = ("left", "right", "up", "down")
# How far the digit goes, as a share of the canvas.
SPEEDS = {"slow": (0.17, 0.23), "fast": (0.5, 0.6)}
# Longer side at the start and at the end, as shares of the canvas's shorter one.
GROWTHS = {"growing": (0.34, 0.6), "shrinking": (0.6, 0.34), "steady": (0.46, 0.46)}
TURNINGS = ("turning", "level")
TURN_DEGREES = (48.0, 62.0)
"""From one side of upright to the other, so that a six is never a nine."""

_SECONDS = (1.4, 1.8)


def render_video(source: Source, facts: dict[str, str], rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A handwritten digit in coloured ink that moves across paper.

    Args:
        source: A handwritten digit.
        facts: `color` of the ink; `paper`; `direction` of the movement; `speed`; `growth`; `turning`.
        rng: Chooses everything the facts leave open.

    Returns:
        Frames, uint8 (14 to 32, height, width, 3), sides even and 88 to 120 pixels; frames per second, 10 to 18.
    """
    width, height = (2 * int(side) for side in rng.integers(44, 61, 2))
    rate = int(rng.integers(10, 19))
    progress = np.linspace(0, 1, round(rng.uniform(*_SECONDS) * rate))
    digit = straightened(read_handwriting(source), rng.uniform(-0.05, 0.15))
    color, paper = ink_and_paper(facts["color"], facts["paper"], (width, height), rng)
    axis = 0 if facts["direction"] in ("left", "right") else 1
    way = -1 if facts["direction"] in ("left", "up") else 1
    center = 0.5 + rng.uniform(-0.06, 0.06, 2) * np.ones((len(progress), 2))
    center[:, axis] += way * rng.uniform(*SPEEDS[facts["speed"]]) * (progress - 0.5)
    center[:, 1 - axis] += rng.uniform(-0.03, 0.03) * (progress - 0.5)
    start, end = np.array(GROWTHS[facts["growth"]]) * rng.uniform(0.94, 1.06)
    longer_side = start * (end / start) ** progress * min(width, height)
    angle = np.full(len(progress), rng.uniform(-4, 4))
    if facts["turning"] == "turning":
        angle += rng.choice((-1, 1)) * rng.uniform(*TURN_DEGREES) * (progress - 0.5)
    frames = [
        stain(paper, _turned(digit, side, degrees), color, middle * (width, height))
        for side, degrees, middle in zip(longer_side, angle, center, strict=True)
    ]
    return np.stack(frames), rate


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


def _turned(digit: Image.Image, longer_side: float, degrees: float) -> np.ndarray:
    """How much ink lies where: (h, w) in 0 to 1. A turned digit is as large as it was before the turn."""
    factor = longer_side / max(digit.size)
    turned = trimmed(digit.rotate(degrees, Image.Resampling.BICUBIC, expand=True))
    size = (max(1, round(factor * turned.width)), max(1, round(factor * turned.height)))
    return (np.asarray(turned.resize(size, Image.Resampling.LANCZOS)) / 255.0) ** 0.8
