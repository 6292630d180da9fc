"""Jitter, scale and rotation of points: what moves, by how much, and what stays."""

import numpy as np
import pytest
import torch
from point_shapes import noise, ply
from xblip_point_cloud import TETRAHEDRON, Changes, PointCloud, rotation

import xblip

STILL = {"jitter": 0.0, "scale": [1.0, 1.0]}


def both(modality, source, seed=0):
    """The points (P, 3 or 6) of a source as they are, and changed."""
    changed = modality.augmented(source, np.random.default_rng(seed))["points"]
    plain = modality.load(source)["points"]
    assert changed.dtype == plain.dtype and changed.shape == plain.shape
    return plain[0].double(), changed[0].double()


def test_nothing_moves_if_nothing_may(modality, tmp_path):
    (tmp_path / "cloud.ply").write_bytes(ply(noise(64)))
    plain, changed = both(modality(augment=Changes(**STILL)), tmp_path / "cloud.ply")
    assert torch.equal(plain, changed)


def test_jitter_is_noise_of_that_size_and_no_more_than_five_times_it(modality):
    cloud = noise(4096)
    plain, changed = both(modality(num_points=4096, augment=Changes(jitter=0.02, scale=[1.0, 1.0])), cloud)
    moved = changed - plain
    assert abs(moved.std() - 0.02) < 0.001 and moved.abs().max() <= 0.1 + 1e-6
    assert (moved.mean(0).abs() < 0.002).all()


def test_scale_lies_between_its_limits(modality):
    cloud = modality(augment=Changes(jitter=0.0, scale=[0.5, 2.0]))
    factors = []
    for seed in range(40):
        plain, changed = both(cloud, noise(64), seed)
        factor = (changed.norm() / plain.norm()).item()
        assert torch.allclose(changed, plain * factor, atol=1e-6)
        factors.append(factor)
    assert 0.5 <= min(factors) < 0.7 and 1.7 < max(factors) <= 2


@pytest.mark.parametrize("axis", "xyz")
def test_a_turn_about_an_axis_leaves_it_where_it_is(modality, axis):
    angles = []
    for seed in range(30):
        plain, changed = both(modality(augment=Changes(**STILL, rotate=axis)), noise(64), seed)
        place = "xyz".index(axis)
        others = [(place + 1) % 3, (place + 2) % 3]
        assert torch.allclose(changed[:, place], plain[:, place], atol=1e-6)
        before, after = (torch.complex(*points[:, others].T) for points in (plain, changed))
        angles.append((after / before).angle().median().item())
        assert torch.allclose(before * np.exp(1j * angles[-1]), after, atol=1e-5)
    assert min(angles) < -2 and max(angles) > 2


def test_all_rotations_are_alike_likely_and_none_mirrors():
    draw = np.random.default_rng(0)
    turns = np.stack([rotation("all", draw) for _ in range(4000)])
    assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(turns), 1)
    assert np.abs(turns.mean(0)).max() < 0.04
    assert abs(np.trace(turns, axis1=1, axis2=2).mean()) < 0.06, "the mean trace over all rotations is 0"


def test_meshes_turn_and_colours_stay(modality, tmp_path):
    (tmp_path / "mesh.ply").write_text(TETRAHEDRON)
    plain, changed = both(modality(augment=Changes(**STILL, rotate="all")), tmp_path / "mesh.ply")
    assert torch.allclose(torch.cdist(plain, plain), torch.cdist(changed, changed), atol=1e-5)
    assert not torch.allclose(plain, changed, atol=0.01)
    colored = np.concatenate([noise(64), np.random.default_rng(1).random((64, 3))], 1)
    plain, changed = both(modality(in_channels=6, augment=Changes(rotate="all")), colored)
    assert torch.equal(plain[:, 3:], changed[:, 3:]) and not torch.equal(plain[:, :3], changed[:, :3])


def test_the_encoder_reads_what_was_changed(modality):
    cloud = modality(augment=Changes(rotate="z"))
    with torch.no_grad():
        encoder = cloud.build_encoder().eval()
        assert encoder(**cloud.augmented(noise(200), np.random.default_rng(0))).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jitter": -0.1}, "augment.jitter of a point cloud must be 0 or more, not -0.1"),
        ({"scale": [2.0, 1.0]}, r"augment.scale of a point cloud must be the least and the most, .* not \[2.0, 1.0\]"),
        ({"scale": [0.0, 1.0]}, "augment.scale of a point cloud must be"),
        ({"rotate": "up"}, 'augment.rotate of a point cloud must be one of none, x, y, z, all, not "up"'),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(xblip.ConfigError, match=message):
        PointCloud.Config(encoder="nowhere", augment=Changes(**settings))
