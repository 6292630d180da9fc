"""Pictures and videos say what their facts say: colours, papers, places, sizes, leans, frames, and how things move."""

import colorsys

import av
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from xblip_numerals.inks import COLORS, PAPERS, contrast, straightened
from xblip_numerals.media import FACTS
from xblip_numerals.pictures import PLACES, SIZES, render_handwriting, render_sign
from xblip_numerals.videos import DIRECTIONS, GROWTHS, SPEEDS, TURNINGS, render_video, write_video

HUES = {"red": 0, "green": 120, "blue": 220, "yellow": 53, "purple": 282}
PLAIN = {"color": "red", "paper": "light", "place": "center", "size": "large", "lean": "upright", "frame": "bare"}
STILL = {"color": "red", "paper": "light", "direction": "left", "speed": "fast", "growth": "steady", "turning": "level"}


def ink_of(picture: np.ndarray) -> np.ndarray:
    """Boolean (H, W): pixels far from the paper, which is what most pixels are, a frame left out."""
    distance = np.abs(picture.astype(float) - np.median(picture, axis=(0, 1))).max(axis=2)
    edge = max(4, round(0.06 * min(distance.shape)))
    inside = np.zeros_like(distance)
    inside[edge:-edge, edge:-edge] = distance[edge:-edge, edge:-edge]
    return inside > 0.6 * inside.max()


def named_color(picture: np.ndarray, where: np.ndarray) -> str:
    red, green, blue = np.median(picture[where], axis=0) / 255
    hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < 0.2:
        return "white"
    return min(HUES, key=lambda color: abs((360 * hue - HUES[color] + 180) % 360 - 180))


def written(sources, seed: int, **facts: str) -> np.ndarray:
    return np.asarray(render_handwriting(sources["handwriting"][seed], {**PLAIN, **facts}, np.random.default_rng(seed)))


def offset_of(where: np.ndarray) -> dict[str, float]:
    """How far off the middle, as shares of the picture, towards each place."""
    y, x = (
        np.array([box.start + box.stop for box in ndimage.find_objects(where.astype(int))[0]]) / 2 / where.shape
    ) - 0.5
    return {"left": -x, "right": x, "top": -y, "bottom": y, "center": 0.12 - max(abs(x), abs(y))}


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("paper", PAPERS)
def test_ink_of_every_color_can_be_read_on_every_paper(sources, color, paper):
    for seed in range(6):
        pixels = written(sources, seed, color=color, paper=paper, frame=("framed", "bare")[seed % 2])
        ink = ink_of(pixels)
        assert named_color(pixels, ink) == color
        ground, inked = np.median(pixels, axis=(0, 1)) / 255, np.median(pixels[ink], axis=0) / 255
        assert (ground.max() > 0.5) == (paper == "light") and contrast(ground, inked) > 1.7


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
def test_handwriting_has_its_place_and_size(sources, place, size):
    for seed in range(4):
        pixels = written(sources, seed, place=place, size=size)
        ink = ink_of(pixels)
        assert offset_of(ink)[place] > 0.06
        tall = max(part.stop - part.start for part in ndimage.find_objects(ink.astype(int))[0]) / min(ink.shape)
        assert (tall > 0.5) == (size == "large")
        assert min(ink.shape) >= 64 and max(ink.shape) <= 160


@pytest.mark.parametrize("lean", ("upright", "slanted"))
def test_handwriting_leans_as_said(sources, lean):
    for seed in range(12):
        y, x = np.nonzero(ink_of(written(sources, seed, lean=lean)))
        slant = -np.cov(x, y)[0, 1] / np.var(y)
        assert (slant > 0.25) == (lean == "slanted"), slant


def test_straightened_digits_keep_nothing_of_their_own_slant():
    bar = np.zeros((28, 28), np.uint8)
    for row in range(4, 24):
        bar[row, 18 - row // 3 : 21 - row // 3] = 255
    y, x = np.nonzero(np.asarray(straightened(Image.fromarray(bar), 0.0)) > 127)
    assert abs(np.cov(x, y)[0, 1] / np.var(y)) < 0.05


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("kind", ("handwriting", "sign"))
def test_a_frame_goes_round_the_whole_picture(sources, kind, color):
    render = render_sign if kind == "sign" else render_handwriting
    pictures = [
        np.asarray(render(sources[kind][0], {**PLAIN, "color": color, "frame": frame}, np.random.default_rng(0)))
        for frame in ("framed", "bare")
    ]
    changed = np.abs(pictures[0].astype(int) - pictures[1]).max(axis=2) > 60
    assert changed.any(axis=0)[4:-4].all() and changed.any(axis=1)[4:-4].all()
    assert not changed[12:-12, 12:-12].any()


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("place", PLACES)
def test_a_sign_lies_on_a_page_of_its_color_at_its_place(sources, color, place):
    for size, low, high in (("small", 0.4, 0.55), ("large", 0.6, 0.78)):
        facts = {"color": color, "place": place, "size": size, "frame": "bare"}
        pixels = np.asarray(render_sign(sources["sign"][0], facts, np.random.default_rng(1)))
        edge = np.ones(pixels.shape[:2], bool)
        edge[2:-2, 2:-2] = False
        assert named_color(pixels, edge) == color
        photo = np.abs(pixels.astype(float) - np.median(pixels[edge], axis=0)).max(axis=2) > 40
        photo = ndimage.binary_opening(photo, np.ones((3, 3)))
        assert offset_of(photo)[place] > 0.03
        assert (
            low
            < max(part.stop - part.start for part in ndimage.find_objects(photo.astype(int))[0]) / min(photo.shape)
            < high
        )


# videos


def places_of(frames: np.ndarray) -> np.ndarray:
    """Where the ink is in each frame, and the longer side of it: (T, 3), as shares of the picture."""
    found = []
    for frame in frames:
        box = ndimage.find_objects(ink_of(frame).astype(int))[0]
        middle = [(part.start + part.stop) / 2 / side for part, side in zip(box, frame.shape, strict=False)]
        found.append([*middle, max(part.stop - part.start for part in box) / min(frame.shape[:2])])
    return np.array(found)


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_video_moves_as_said(sources, direction, speed):
    for seed in range(3):
        facts = {**STILL, "direction": direction, "speed": speed}
        frames, rate = render_video(sources["handwriting"][seed], facts, np.random.default_rng(seed))
        assert 1.3 < len(frames) / rate < 1.9
        down, right = (places_of(frames[[0, -1]])[:, :2] @ (1.0, 0)), (places_of(frames[[0, -1]])[:, :2] @ (0, 1.0))
        down, right = np.diff(down)[0], np.diff(right)[0]
        gone = {"left": -right, "right": right, "up": -down, "down": down}[direction]
        assert (0.1 < gone < 0.3) if speed == "slow" else (gone > 0.38)
        assert abs(right if direction in ("up", "down") else down) < 0.06


@pytest.mark.parametrize("growth", GROWTHS)
def test_video_grows_as_said(sources, growth):
    for seed in range(3):
        facts = {**STILL, "growth": growth, "speed": "slow"}
        frames, _ = render_video(sources["handwriting"][seed], facts, np.random.default_rng(seed))
        first, last = places_of(frames[[0, -1]])[:, 2]
        assert {"growing": last / first > 1.5, "shrinking": first / last > 1.5, "steady": 0.9 < last / first < 1.1}[
            growth
        ]


@pytest.mark.parametrize("turning", TURNINGS)
def test_video_turns_as_said(sources, turning):
    one = next(source for source in sources["handwriting"] if source.number == "one")
    for seed in range(4):
        frames, _ = render_video(one, {**STILL, "turning": turning, "speed": "slow"}, np.random.default_rng(seed))
        axes = []
        for frame in frames[[0, -1]]:
            y, x = np.nonzero(ink_of(frame))
            axes.append(np.degrees(0.5 * np.arctan2(2 * np.cov(x, y)[0, 1], np.var(y) - np.var(x))))
        assert (35 < abs(axes[1] - axes[0]) < 75) if turning == "turning" else (abs(axes[1] - axes[0]) < 6)


def test_video_files_are_h264(sources, tmp_path):
    facts = {fact: values[0] for fact, values in FACTS["video"].items()}
    frames, rate = render_video(sources["handwriting"][0], facts, np.random.default_rng(0))
    write_video(tmp_path / "digit.mp4", frames, rate)
    with av.open(str(tmp_path / "digit.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", rate)
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(read) == len(frames) and np.abs(read[0].astype(int) - frames[0]).mean() < 12
