"""Solids stand or lie, are thick or thin, stretched, hollow, drilled and painted as their facts say."""

import colorsys
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from xblip_numerals import augment
from xblip_numerals.inks import COLORS
from xblip_numerals.solids import BODIES, STRETCHES, THICKNESSES, WIDEST_TURN, glyph, render_solid, write_points

import xblip

PLAIN = {"number": "two", "color": "red", "pose": "standing", "thickness": "thin", "stretch": "even"}
PLAIN |= {"body": "solid", "holes": "whole"}


def cut(seed: int, turn: float = 0.0, **facts: str) -> np.ndarray:
    facts = {**PLAIN, **facts}
    return render_solid(glyph(facts["number"], "DejaVuSans"), facts, turn, np.random.default_rng(seed))


def loops_of(points: np.ndarray, cells: int = 24) -> int:
    """How many holes an unturned standing digit has, its foot left out, seen from the front."""
    across, up = points[:, 0] - points[:, 0].min(), points[:, 2] - points[:, 2].min()
    digit = up > 0.24 * up.max()
    edges = np.linspace(0, up.max() * 1.001, cells + 1)
    seen = np.pad(np.histogram2d(up[digit], across[digit], bins=[edges, edges])[0] > 0, 1)
    regions, count = ndimage.label(~seen)
    return sum((regions == region).sum() >= 4 for region in range(2, count + 1))  # fewer cells are gaps of chance


@pytest.mark.parametrize("number", ("two", "six", "one"))
@pytest.mark.parametrize("pose", ("standing", "lying"))
@pytest.mark.parametrize("thickness", THICKNESSES)
def test_solids_stand_or_lie_thin_or_thick(number, pose, thickness):
    for seed in range(4):
        points = cut(seed, number=number, pose=pose, thickness=thickness)
        assert points.dtype == np.float32 and 1024 <= len(points) <= 2048 and points.shape[1] == 6
        across, deep, tall = np.ptp(points[:, :3], axis=0)
        if pose == "lying":
            deep, tall = tall, deep
        assert (deep / tall > 0.17) == (thickness == "thick"), deep / tall
        assert tall > 0.7 * across


@pytest.mark.parametrize("number", ("zero", "one", "eight"))
def test_stretched_solids_differ_in_form(number):
    forms = [np.median([np.divide(*np.ptp(cut(seed, number=number, stretch=stretch)[:, :3], axis=0)[[0, 2]])
                        for seed in range(4)]) for stretch in ("tall", "even", "wide")]  # fmt: skip
    assert forms[1] > 1.25 * forms[0] and forms[2] > 1.25 * forms[1], forms
    assert set(STRETCHES) == {"tall", "even", "wide"}


@pytest.mark.parametrize("body", BODIES)
def test_hollow_solids_are_open_at_the_front_alone(body):
    for seed in range(4):
        deep = cut(seed, body=body, thickness="thick")[:, 1]
        shares = np.histogram(deep, bins=10)[0] / len(deep)
        assert (shares[0] < 0.15) == (body == "hollow") and shares[-1] > 0.2


@pytest.mark.parametrize("number", ("zero", "four", "six", "eight", "nine"))
def test_thick_solids_keep_their_loops(number):
    for seed in range(3):
        assert loops_of(cut(seed, number=number, thickness="thick")) == (2 if number == "eight" else 1)


def test_drilled_solids_have_three_holes_in_the_foot():
    for stretch in STRETCHES:
        for holes in ("drilled", "whole"):
            clouds = [cut(seed, stretch=stretch, holes=holes)[:, [0, 2]] for seed in range(8)]
            foot = np.concatenate([(cloud - cloud.min(axis=0)) / np.ptp(cloud[:, 1]) for cloud in clouds])
            foot = foot[foot[:, 1] < 0.16]
            # At the height of the holes' middles, points lie everywhere along a whole foot, and beside the holes else.
            row = foot[np.abs(foot[:, 1] - 0.085) < 0.02, 0]
            empty = np.histogram(row, bins=36, range=(foot[:, 0].min(), foot[:, 0].max()))[0] < 0.2 * len(row) / 36
            assert (ndimage.label(empty)[1] == 3) == (holes == "drilled"), (stretch, holes)


@pytest.mark.parametrize("color", COLORS)
def test_solids_are_painted(color):
    hues = {"red": 0, "green": 120, "blue": 220, "yellow": 53, "purple": 282}
    paint = cut(0, color=color)[:, 3:]
    assert paint.min() >= 0 and paint.max() <= 1 and paint.std(axis=0).max() < 0.05
    hue, saturation, _ = colorsys.rgb_to_hsv(*np.median(paint, axis=0))
    named = min(hues, key=lambda name: abs((360 * hue - hues[name] + 180) % 360 - 180))
    assert ("white" if saturation < 0.2 else named) == color


def test_lying_digits_are_not_mirrored():
    """A lying seven's bar is at the top, as who stands at its foot reads it, and its stem comes down from the right."""
    for seed in range(4):
        across, up = cut(seed, number="seven", pose="lying")[:, :2].T
        rows = (up - up.min()) / np.ptp(up)
        assert across[(rows > 0.8) & (rows < 0.88)].mean() > across[(rows > 0.28) & (rows < 0.36)].mean()


def test_a_turned_solid_turned_back_faces_the_reader():
    facing, turned = (torch.from_numpy(cut(0, turn)) for turn in (0.0, WIDEST_TURN))
    back = augment.turn_points(turned[None], torch.tensor([-WIDEST_TURN]))[0]
    assert not torch.allclose(facing, turned, atol=0.1)
    # The noise on the points is drawn after the turn, so that it is another one now.
    assert (back[:, :3] - facing[:, :3]).abs().median() < 0.03 * facing[:, :3].abs().max()
    assert back[:, 3:].equal(turned[:, 3:])


def test_point_files_hold_the_same_painted_points(tmp_path):
    points = np.random.default_rng(0).random((50, 6)).astype(np.float32)
    for suffix in (".npy", ".xyz", ".ply"):
        write_points(tmp_path / f"cloud{suffix}", points)
    assert np.array_equal(np.load(tmp_path / "cloud.npy"), points)
    assert np.allclose(np.loadtxt(tmp_path / "cloud.xyz"), points, atol=1e-3)
    header, body = (tmp_path / "cloud.ply").read_bytes().split(b"end_header\n", 1)
    read = np.frombuffer(body, [("places", "<f4", 3), ("paint", "u1", 3)])
    assert b"element vertex 50" in header and np.array_equal(read["places"], points[:, :3])
    assert np.abs(read["paint"] / 255 - points[:, 3:]).max() < 0.003


@pytest.mark.parametrize("suffix", (".npy", ".xyz", ".ply"))
def test_the_plugin_reads_the_paint(tmp_path, suffix):
    from xblip_point_bert import PointBertConfig, PointBertModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    small |= {"num_groups": 4, "group_size": 4, "num_points": 64, "pointnet_sizes": (4, 4, 4), "in_channels": 6}
    PointBertModel(PointBertConfig(**small)).save_pretrained(tmp_path / "encoder")
    write_points(tmp_path / f"solid{suffix}", cut(0, color="blue"))
    kind = xblip.plugins.get("modality", "point_cloud")
    paint = kind(kind.Config(encoder=str(tmp_path / "encoder"))).load(tmp_path / f"solid{suffix}")["points"][0, :, 3:]
    assert (paint[:, 2] > paint[:, 0]).all() and paint.max() <= 1


def test_variation_keeps_what_facts_say():
    torch.manual_seed(0)
    points = torch.rand(4, 64, 6)
    points[..., :3] = torch.nn.functional.normalize(torch.randn(4, 64, 3), dim=2)
    points[..., 2] *= 3
    varied = augment.vary_points(points, math.pi)
    assert varied[..., :3].norm(dim=2).amax(1).allclose(torch.ones(4))
    assert (varied.std(1)[:, 2] > 1.5 * varied.std(1)[:, :2].amax(1)).all(), "what stands goes on standing"
    assert (varied[..., 3:] - points[..., 3:]).abs().max() < 0.25
