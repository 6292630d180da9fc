"""The media say what their facts say, splits share nobody, and encoders train on what the plugins load."""

import colorsys
import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from xblip_numerals import augment
from xblip_numerals.media import FACTS, MODALITIES, build
from xblip_numerals.pictures import (
    COLORS,
    DIRECTIONS,
    PLACES,
    render_handwriting,
    render_sign,
    render_video,
    write_video,
)
from xblip_numerals.solids import glyph, render_solid, write_points
from xblip_numerals.sounds import raw_facts, read_take, render_speech, synthesize
from xblip_numerals.sources import NUMBERS, SPLITS, TEST_SPEAKER, Source, SourcesError, read_sources

import xblip

HUES = {"red": 0, "green": 120, "blue": 220, "yellow": 53, "purple": 282}


def of_number(sources: list[Source], number: str) -> Source:
    return next(source for source in sources if source.number == number)


def ink_of(picture: np.ndarray) -> np.ndarray:
    """Boolean (H, W): pixels far from the paper, which is what most pixels are."""
    distance = np.abs(picture.astype(float) - np.median(picture, axis=(0, 1))).max(axis=2)
    return distance > 0.6 * distance.max()


def named_color(picture: np.ndarray, where: np.ndarray) -> str:
    red, green, blue = np.median(picture[where], axis=0) / 255
    hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < 0.2:
        return "white"
    return min(HUES, key=lambda color: abs((360 * hue - HUES[color] + 180) % 360 - 180))


# sources


def test_splits_share_no_file_student_or_test_speaker(data):
    kept = {split: read_sources(data, split) for split in SPLITS}
    files = [source.path for split in SPLITS for kind in kept[split].values() for source in kind]
    assert len(files) == len(set(files)) == 400 + 100 + 90
    students = [{(source.index - 1000) // 10 for source in kept[split]["sign"]} for split in SPLITS]
    assert sum(map(len, students)) == 10 and all(students)
    assert {source.speaker for source in kept["test"]["speech"]} == {TEST_SPEAKER}
    assert {source.index for source in kept["val"]["speech"]} == {46}
    assert TEST_SPEAKER not in {source.speaker for source in kept["train"]["speech"]}


def test_missing_sets_are_named(tmp_path):
    with pytest.raises(SourcesError, match=r"MNIST.*Free Spoken Digit.*Sign Language Digits.*pass that folder"):
        read_sources(tmp_path, "train")
    assert issubclass(SourcesError, xblip.XBlipError)


def test_other_bad_sources_are_told(data, tmp_path):
    with pytest.raises(SourcesError, match="No split is called 'dev'; choose one of train, val, test"):
        read_sources(data, "dev")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"file": "handwriting/00001.png", "number": 12, "source": "mnist-t10k"}\n')
    with pytest.raises(SourcesError, match=r"line 1: cannot be read \(IndexError"):
        read_sources(tmp_path, "train")
    manifest.write_text('{"file": "handwriting/00001.png", "number": 1, "source": "mnist-t10k"}\n')
    with pytest.raises(SourcesError, match="has no handwriting file of zero"):
        read_sources(tmp_path, "train")


# pictures


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("place", PLACES)
def test_handwriting_has_its_color_and_place(sources, color, place):
    for seed in range(3):
        facts = {"color": color, "place": place}
        picture = render_handwriting(sources["handwriting"][seed], facts, np.random.default_rng(seed))
        pixels = np.asarray(picture)
        ink = ink_of(pixels)
        assert named_color(pixels, ink) == color
        y, x = (np.array(ndimage.center_of_mass(ink)) / ink.shape) - 0.5
        inward = {"left": -x, "right": x, "top": -y, "bottom": y, "center": 0.2 - max(abs(x), abs(y))}
        assert inward[place] > 0.08, (place, x, y)
        assert min(picture.size) >= 64 and max(picture.size) <= 160


def test_ink_can_be_read_on_its_paper(sources):
    for seed in range(40):
        facts = {"color": COLORS[seed % 6], "place": "center"}
        pixels = np.asarray(render_handwriting(sources["handwriting"][seed], facts, np.random.default_rng(seed)))
        paper, ink = np.median(pixels, axis=(0, 1)) / 255, np.median(pixels[ink_of(pixels)], axis=0) / 255
        bright, dark = sorted(((color**2.2) @ (0.2126, 0.7152, 0.0722) for color in (paper, ink)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) > 1.5


@pytest.mark.parametrize("color", COLORS)
def test_sign_lies_on_a_page_of_its_color(sources, color):
    pixels = np.asarray(render_sign(sources["sign"][0], {"color": color}, np.random.default_rng(1)))
    edge = np.ones(pixels.shape[:2], bool)
    edge[3:-3, 3:-3] = False
    assert named_color(pixels, edge) == color


def test_bare_sign_fills_the_picture(sources):
    pixels = np.asarray(render_sign(sources["sign"][0], {}, np.random.default_rng(1)))
    assert np.ptp(pixels.astype(int), axis=2).max() < 30, "only greys, as the photograph has"
    assert pixels[0].std() > 5, "stripes up to the edge"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_video_file_shows_the_digit_moving(sources, direction, tmp_path):
    for seed in range(3):
        facts = {"color": "red", "direction": direction}
        rendered, rate = render_video(sources["handwriting"][seed], facts, np.random.default_rng(seed))
        path = tmp_path / f"{seed}.mp4"
        write_video(path, rendered, rate)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", rate)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(frames) == len(rendered) and 12 <= len(frames) <= 30
        start, end = (np.array(ndimage.center_of_mass(ink_of(frames[at]))) / frames[0].shape[:2] for at in (0, -1))
        (down, right), sideways = end - start, {"left": 0, "right": 0, "up": 1, "down": 1}[direction]
        assert {"left": -right, "right": right, "up": -down, "down": down}[direction] > 0.25
        assert abs((down, right)[sideways]) < 0.15


# sounds


def level_dbfs(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(samples.astype(float) ** 2))


@pytest.mark.parametrize("sound", ("clean", "noisy"))
@pytest.mark.parametrize(("loudness", "low", "high"), (("loud", -23, -12), ("quiet", -45, -32)))
def test_speech_is_as_loud_and_clean_as_said(sources, loudness, low, high, sound):
    for seed in range(6):
        voice = read_take(sources["speech"][seed])
        facts = {"loudness": loudness, "sound": sound}
        samples, rate_hz = render_speech(voice, facts, sources["speech"], np.random.default_rng(seed))
        assert rate_hz in (8000, 16000) and np.abs(samples).max() <= 1
        assert low < level_dbfs(samples) < high
        spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) ** 2
        hertz = np.fft.rfftfreq(len(samples), 1 / rate_hz)
        hummed = np.abs(hertz - hertz[spectrum.argmax()]) < 40
        noise_db = 10 * np.log10(spectrum[~hummed].sum() / spectrum[hummed].sum())
        assert (noise_db > -18) == (sound == "noisy"), noise_db


def test_raw_recordings_are_loud_or_quiet_only_without_doubt():
    hum = np.sin(np.arange(4000) / 5)
    assert raw_facts(0.4 * hum) == {"sound": "clean", "loudness": "loud"}
    assert raw_facts(0.05 * hum) == {"sound": "clean"}
    assert raw_facts(0.01 * hum) == {"sound": "clean", "loudness": "quiet"}


def test_synthetic_voices_are_heard_and_differ():
    pytest.importorskip("espeakng_loader")
    voices = [synthesize("seven", np.random.default_rng(seed)) for seed in range(5)]
    assert len({name for *_, name in voices}) == len({len(samples) for samples, *_ in voices}) == 5
    for samples, rate_hz, _ in voices:
        assert 0.2 < len(samples) / rate_hz < 1.6 and np.abs(samples).max() > 0.05


# solids


def shadow_from_above(points: np.ndarray, cells: int = 40) -> np.ndarray:
    """Boolean (cells, cells), x to the right and y upwards (row 0 is the lowest y)."""
    flat = points[:, :2] - points[:, :2].mean(axis=0)
    edges = np.linspace(-1, 1, cells + 1) * np.abs(flat).max()
    return np.histogram2d(flat[:, 1], flat[:, 0], bins=[edges, edges])[0] > 0


@pytest.mark.parametrize("number", ("two", "six", "seven"))
@pytest.mark.parametrize("pose", ("standing", "lying"))
def test_solids_stand_or_lie_thin_or_thick(number, pose):
    for seed in range(4):
        for thickness, low, high in (("thin", 0.0, 0.22), ("thick", 0.22, 0.7)):
            facts = {"number": number, "pose": pose, "thickness": thickness}
            points = render_solid(glyph(number, "DejaVuSans"), facts, 0.7 * seed, np.random.default_rng(seed))
            assert points.dtype == np.float32 and 1024 <= len(points) <= 2048
            flat, tall = points[:, :2] - points[:, :2].mean(axis=0), np.ptp(points[:, 2])
            across = [np.ptp(flat @ axis) for axis in np.linalg.svd(flat, full_matrices=False)[2]]
            depth, height = (min(across), tall) if pose == "standing" else (tall, max(across))
            assert low < depth / height < high, (depth, height)


def test_lying_digits_are_not_mirrored():
    drawn = np.asarray(glyph("seven", "DejaVuSans")) > 127
    y, x = np.nonzero(drawn)
    template = np.stack([x, -y], axis=1).astype(float)
    right, mirrored = 0, 0
    for seed in range(6):
        facts = {"number": "seven", "pose": "lying", "thickness": "thin"}
        shadow = shadow_from_above(
            render_solid(glyph("seven", "DejaVuSans"), facts, 0.7 * seed, np.random.default_rng(seed))
        )
        best = []
        for face in (template, template * (-1, 1)):
            angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
            turns = [np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) for a in angles]
            best.append(max((shadow & shadow_from_above(face @ turn)).sum() for turn in turns))
        right, mirrored = right + (best[0] > best[1]), mirrored + (best[1] > best[0])
    assert right >= 5 and mirrored == 0


def test_a_turned_solid_turned_back_faces_the_reader():
    facts = {"number": "seven", "pose": "standing", "thickness": "thin"}
    facing, turned = (
        torch.from_numpy(render_solid(glyph("seven", "DejaVuSans"), facts, turn, np.random.default_rng(0)))
        for turn in (0.0, 1.3)
    )
    back = augment.turn_points(turned[None], torch.tensor([-1.3]))[0]
    assert not torch.allclose(facing, turned, atol=0.1)
    # The noise on the points is drawn after the turn, so that it is another one now.
    assert (back - facing).abs().median() < 0.03 * facing.abs().max()


def test_lying_six_and_nine_always_carry_a_bar_and_others_at_times():
    def has_bar(number: str, pose: str, seed: int) -> bool:
        facts = {"number": number, "pose": pose, "thickness": "thin"}
        points = render_solid(glyph(number, "DejaVuSans-Bold"), facts, 0.7 * seed, np.random.default_rng(seed))
        near = cKDTree(points).query_pairs(0.05 * np.ptp(points[:, :2], axis=0).max(), output_type="ndarray")
        graph = csr_array((np.ones(len(near)), near.T), shape=(len(points), len(points)))
        return connected_components(graph)[0] > 1

    assert all(has_bar(number, "lying", seed) for number in ("six", "nine") for seed in range(10))
    assert 0 < sum(has_bar("zero", "lying", seed) for seed in range(40)) < 20


def test_point_files_hold_the_same_points(tmp_path):
    points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for suffix in (".npy", ".xyz", ".ply"):
        write_points(tmp_path / f"cloud{suffix}", points)
    assert np.array_equal(np.load(tmp_path / "cloud.npy"), points)
    assert np.allclose(np.loadtxt(tmp_path / "cloud.xyz"), points, atol=1e-3)
    header, body = (tmp_path / "cloud.ply").read_bytes().split(b"end_header\n", 1)
    assert b"element vertex 50" in header and np.array_equal(np.frombuffer(body, "<f4").reshape(-1, 3), points)


# the built world


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_world_is_balanced_and_its_files_exist(world):
    for split in SPLITS:
        rows = rows_of(world / split / "manifest.jsonl")
        for modality in MODALITIES:
            mine = [row for row in rows if row["modality"] == modality]
            assert len(mine) == 20 and all((world / split / row["path"]).stat().st_size for row in mine)
            numbers = [row["facts"]["number"] for row in mine]
            assert {number: numbers.count(number) for number in NUMBERS} == dict.fromkeys(NUMBERS, 2)
            for row in mine:
                assert all(value in FACTS[modality][fact] for fact, value in row["facts"].items())


def test_what_is_held_out_is_made_by_people(world):
    for split in SPLITS:
        rows = rows_of(world / split / "manifest.jsonl")
        made = {(row["modality"], row["source"].split(":")[0]) for row in rows}
        people = {(name, "handwriting") for name in ("image", "video", "point_cloud")}
        people |= {("image", "sign"), ("audio", "speech")}
        assert made == (people | {("audio", "espeak"), ("point_cloud", "glyph")} if split == "train" else people)


def test_signs_have_no_place_and_raw_handwriting_is_white(world, data):
    rows = [row for row in rows_of(world / "train" / "manifest.jsonl") if row["modality"] == "image"]
    signs = [row["facts"] for row in rows if row["facts"]["kind"] == "sign"]
    assert signs and not any("place" in facts for facts in signs)
    assert {"color" in facts for facts in signs} == {True, False}
    raw = [row for row in rows if Image.open(world / "train" / row["path"]).size == (28, 28)]
    assert raw and all((row["facts"]["color"], row["facts"]["place"]) == ("white", "center") for row in raw)


def test_same_seed_same_files_other_seed_others(data, tmp_path):
    counts = dict.fromkeys(MODALITIES, 3)
    built = [build(data, tmp_path / str(run), "test", counts, seed).parent for run, seed in enumerate((0, 0, 1))]
    # Videos are left out here: on a busy machine the encoder was once seen to write a few bytes otherwise.
    first, again, other = (
        {path.name: path.read_bytes() for path in out.rglob("*.*") if path.suffix != ".mp4"} for out in built
    )
    assert first == again
    assert first["manifest.jsonl"] != other["manifest.jsonl"]


# encoders


def test_variation_keeps_what_facts_say():
    torch.manual_seed(0)
    points = torch.randn(4, 64, 3)
    points = points / points.norm(dim=2, keepdim=True)
    points[..., 2] *= 3
    varied = augment.vary_points(points, math.pi)
    assert varied.norm(dim=2).amax(1).allclose(torch.ones(4))
    assert (varied.std(1)[:, 2] > 1.5 * varied.std(1)[:, :2].amax(1)).all(), "what stands goes on standing"
    picture = torch.full((8, 3, 64, 64), -1.0)
    picture[:, :, :, :20] = 1.0
    kept = augment.vary_images(picture, torch.zeros(8, dtype=torch.bool))
    assert (kept[..., :32].mean((1, 2, 3)) > kept[..., 32:].mean((1, 2, 3))).all(), "writing is not mirrored"
    mirrored = augment.vary_images(picture, torch.ones(8, dtype=torch.bool))
    assert 0 < (mirrored[..., :32].mean((1, 2, 3)) < mirrored[..., 32:].mean((1, 2, 3))).sum() < 8


def test_varied_spectrograms_stay_padded_and_as_loud():
    torch.manual_seed(0)
    pad = -augment.AUDIO_MEAN / (2 * augment.AUDIO_STD)
    loud, quiet = torch.full((16, 100, 32), 0.5), torch.full((16, 100, 32), 0.5 - 0.31)
    for clips in (loud, quiet):
        clips[:, 60:] = pad
    (first, frames), (second, _) = (augment.vary_spectrograms(clips, torch.full((16,), 60)) for clips in (loud, quiet))
    assert all((clip[count:] == pad).all() for clip, count in zip(first, frames, strict=True))
    assert frames.min() >= 40 and frames.max() <= 100
    assert first[:, 10:30].median() - second[:, 10:30].median() > 0.2
