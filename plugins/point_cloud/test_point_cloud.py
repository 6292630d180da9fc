"""The point_cloud modality: what each kind of source becomes."""

import io
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from point_shapes import CORNERS, FACES, glb, loaded, noise, obj, off, pcd, ply, stl, unit
from xblip_point_cloud import TETRAHEDRON
from xblip_point_files import _read_ply

import xblip.testing
from xblip.frozen import FrozenEncoder


class TestClouds:
    @pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
    @pytest.mark.parametrize("kind", ["float", "double"])
    def test_ply(self, modality, tmp_path, encoding, kind):
        path = tmp_path / "cloud.ply"
        path.write_bytes(ply(noise(64), encoding=encoding, kind=kind))
        assert np.allclose(loaded(modality(), path), unit(noise(64)), atol=1e-6)

    @pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian"])
    def test_ply_with_colour_between_other_columns(self, modality, tmp_path, encoding):
        path = tmp_path / "cloud.PLY"
        rows = np.concatenate([noise(64), np.arange(64 * 4).reshape(64, 4)[:, [3, 0, 1, 2]] % 256], 1)
        path.write_bytes(ply(rows, encoding=encoding, columns="x y z confidence red green blue"))
        points = loaded(modality(in_channels=6), path)
        assert np.allclose(points[:, :3], unit(noise(64)), atol=1e-6)
        assert np.allclose(points[:, 3:], rows[:, 4:] / 255, atol=1e-6)

    @pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
    def test_pcd(self, modality, tmp_path, data):
        path = tmp_path / "cloud.pcd"
        points = np.tile(noise(16), (4, 1))
        path.write_bytes(pcd(points, data))
        assert np.allclose(loaded(modality(), path), unit(points), atol=1e-5)

    @pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
    @pytest.mark.parametrize("kind", ["F", "U"])
    def test_packed_colours_of_a_pcd(self, modality, data, kind):
        packed = [number % 256 << 16 | number % 7 << 8 | 255 - number for number in range(64)]
        colors = loaded(modality(in_channels=6), pcd(noise(64), data, rgb=packed, kind=kind))[:, 3:] * 255
        assert np.allclose(colors, [[number % 256, number % 7, 255 - number] for number in range(64)], atol=1e-3)

    def test_colours_of_an_ascii_pcd_may_be_whole_numbers_called_floats(self, modality):
        rows = "".join(f"{x} {y} {z} {0xFF8040FF}\n" for x, y, z in noise(5))
        header = pcd(noise(5), rgb=[0] * 5).partition(b"DATA ascii\n")
        colors = loaded(modality(in_channels=6), b"".join(header[:2]) + rows.encode())[:, 3:] * 255
        assert np.allclose(colors, [[0x80, 0x40, 0xFF]])

    def test_padding_and_vectors_in_a_pcd_are_passed_over(self, modality):
        fields = {"FIELDS": "_ x y z normal _", "SIZE": "1 4 4 4 8 1", "TYPE": "U F F F F U", "COUNT": "4 1 1 1 3 2"}
        header = pcd(np.empty((0, 3)), "binary", **fields, WIDTH=64, POINTS=64)
        rows = b"".join(struct.pack("<4B3f3d2B", 1, 2, 3, 4, *row, 5, 6, 7, 8, 9) for row in noise(64))
        assert np.allclose(loaded(modality(), header + rows), unit(noise(64)), atol=1e-5)

    def test_xyz_npy_npz_and_arrays_agree(self, modality, tmp_path):
        points = noise(64)
        np.savetxt(tmp_path / "cloud.xyz", points, header="made by a test")
        np.save(tmp_path / "cloud.npy", points)
        np.savez_compressed(tmp_path / "one.npz", mine=points)
        np.savez(tmp_path / "unnamed.npz", points, np.zeros(3))
        np.savez(tmp_path / "named.npz", other=np.zeros(3), points=points)
        files = [tmp_path / name for name in ("cloud.xyz", "cloud.npy", "one.npz", "unnamed.npz", "named.npz")]
        for source in [*files, points, torch.from_numpy(points), torch.from_numpy(points).requires_grad_()]:
            assert np.allclose(loaded(modality(), source), unit(points), atol=1e-6)

    def test_bytes_and_open_files_are_recognised_by_their_start(self, modality, tmp_path):
        np.save(tmp_path / "cloud", noise(64))
        np.savez(tmp_path / "cloud", noise(64))
        npy, npz = (tmp_path / f"cloud.{suffix}" for suffix in ("npy", "npz"))
        (tmp_path / "cloud.dat").write_bytes(npy.read_bytes())
        for source in [
            npy.read_bytes(),
            io.BytesIO(npz.read_bytes()),
            tmp_path / "cloud.dat",
            pcd(noise(64)),
        ]:
            assert np.allclose(loaded(modality(), source), unit(noise(64)), atol=1e-5)

    def test_colour_goes_to_encoders_that_take_it(self, modality):
        cloud = np.concatenate([noise(64), np.random.default_rng(1).random((64, 3))], 1)
        assert np.allclose(loaded(modality(in_channels=6), cloud)[:, 3:], cloud[:, 3:], atol=1e-6)
        assert loaded(modality(in_channels=3), cloud).shape == (64, 3)

    def test_a_cloud_without_colour_is_grey(self, modality):
        assert np.allclose(loaded(modality(in_channels=6), noise(64))[:, 3:], 0.4)

    def test_position_and_size_do_not_matter(self, modality):
        expected = loaded(modality(), noise(64))
        for moved in (noise(64) * 1e-3 + 5, noise(64) * 1e200, noise(64) * 1e-200):
            assert np.allclose(loaded(modality(), moved), expected, atol=1e-5)

    def test_fewer_points_are_repeated_in_turn(self, modality):
        assert np.allclose(loaded(modality(), noise(5)), unit(noise(5))[np.arange(64) % 5], atol=1e-6)

    @pytest.mark.parametrize("cloud", [np.ones((1, 3)), np.full((50, 3), 0.1), np.zeros((3, 3))])
    def test_a_single_place_is_the_centre(self, modality, cloud):
        assert not loaded(modality(), cloud).any()

    def test_more_points_are_thinned_evenly_whatever_their_order(self, modality):
        dense, sparse = (
            np.random.default_rng(0).random((2000, 3)) * 0.1,
            np.random.default_rng(1).random((100, 3)),
        )
        cloud = np.concatenate([dense, sparse])
        points = loaded(modality(), cloud)
        everything = unit(cloud)
        farthest = np.linalg.norm(everything[:, None] - points[None], axis=2).min(1).max()
        taken_in_turn = np.linalg.norm(everything[:, None] - everything[None, :64], axis=2).min(1).max()
        assert len({tuple(point) for point in points}) == 64
        assert farthest < taken_in_turn / 3
        assert np.allclose(loaded(modality(), cloud[::-1]), points, atol=1e-6)

    def test_very_many_points_are_first_drawn_by_a_fixed_seed(self, modality, monkeypatch):
        monkeypatch.setattr("xblip_point_cloud.MAX_SAMPLING_STEPS", 64 * 500)
        points = loaded(modality(), noise(5000))
        assert points.shape == (64, 3) and np.array_equal(points, loaded(modality(), noise(5000)))
        distances = np.linalg.norm(points[:, None] - unit(noise(5000))[None], axis=2)
        assert distances.min(1).max() < 1e-6 and len(np.unique(distances.argmin(1))) == 64


@pytest.mark.slow
class TestMeshes:
    MESHES = {
        "mesh.ply": TETRAHEDRON.encode(),
        "binary.ply": ply(CORNERS, encoding="binary_little_endian", faces=FACES.tolist()),
        "mesh.obj": obj(*FACES),
        "mesh.off": off(),
        "mesh.stl": stl(),
        "mesh.glb": glb([{}]),
    }

    @pytest.mark.parametrize("name", MESHES)
    def test_points_lie_all_over_the_surface(self, modality, tmp_path, name):
        path = tmp_path / name
        path.write_bytes(self.MESHES[name])
        points = loaded(modality(num_points=512), path).astype(float)
        assert np.isclose(np.linalg.norm(points, axis=1).max(), 1) and len(np.unique(points, axis=0)) == 512
        apex, scale = points.min(0), (points.max(0) - points.min(0)).mean()
        points = (points - apex) / scale  # back to the corner at the origin, up to the sampling
        on_a_side = np.abs(points).min(1) < 0.02
        on_the_slope = np.abs(points.sum(1) - 1) < 0.06
        assert (on_a_side | on_the_slope).all()
        share = np.count_nonzero(on_the_slope & ~on_a_side) / 512
        assert 0.25 < share < 0.5, "the slope is sqrt(3) times as large as each of the three sides"

    def test_drawing_is_the_same_every_time(self, modality, tmp_path):
        path = tmp_path / "mesh.ply"
        path.write_text(TETRAHEDRON)
        assert np.array_equal(loaded(modality(), path), loaded(modality(), path))
        assert np.array_equal(loaded(modality(), path), loaded(modality(), path.read_bytes()))

    @pytest.mark.parametrize("suffix", [".obj", ".glb"])
    def test_colours_of_vertices_are_blended(self, modality, tmp_path, suffix):
        path = tmp_path / f"mesh{suffix}"
        path.write_bytes(obj(*FACES) if suffix == ".obj" else glb([{}]))
        colors = loaded(modality(in_channels=6), path)[:, 3:]
        assert np.allclose(colors[:, 0] + colors[:, 2], 1, atol=1e-5) and not colors[:, 1].any()
        assert colors[:, 0].min() < 0.2 and colors[:, 0].max() > 0.8

    def test_polygons_become_triangles(self):
        square = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 2, 0]]
        for encoding in ("ascii", "binary_little_endian", "binary_big_endian"):
            for faces, expected in (
                ([[0, 1, 2, 3], [1, 2, 4, 3]], [[0, 1, 2], [1, 2, 4], [0, 2, 3], [1, 4, 3]]),
                ([[0, 1, 2, 3], [3, 2, 4], [2, 4]], [[0, 1, 2], [0, 2, 3], [3, 2, 4]]),
            ):
                shape = _read_ply(ply(square, encoding=encoding, faces=faces), lambda count: None)
                assert sorted(shape.triangles.tolist()) == sorted(expected)

    def test_polygons_of_an_obj_are_kept(self, modality, tmp_path):
        path = tmp_path / "square.obj"
        path.write_text("v 0 0 0\nv 2 0 0\nv 2 1 0\nv 0 1 0\nf 1 2 3 4\n")
        points = loaded(modality(num_points=256), path)
        assert not points[:, 2].any()
        assert (np.sign(points[:, :2]) == [[1, 1]]).all(1).mean() == pytest.approx(0.25, abs=0.08)

    def test_all_parts_of_a_glb_stand_where_its_scene_puts_them(self, modality, tmp_path):
        path = tmp_path / "two.glb"
        path.write_bytes(glb([{}, {"translation": [9, 0, 0], "scale": [2, 2, 2]}]))
        x = np.sort(loaded(modality(num_points=256), path)[:, 0].astype(float))
        x = (x - x[0]) / (x[-1] - x[0]) * 11
        assert (x <= 1.1).any() and (x >= 8.9).any() and not ((x > 1.1) & (x < 8.9)).any()

    def test_faces_without_area_leave_the_vertices(self, modality, tmp_path):
        path = tmp_path / "line.ply"
        path.write_bytes(ply([[0, 0, 0], [1, 0, 0], [2, 0, 0]], faces=[[0, 1, 2]]))
        assert np.allclose(np.unique(loaded(modality(), path), axis=0), [[-1, 0, 0], [0, 0, 0], [1, 0, 0]])


def test_the_encoder_gives_a_token_for_each_group(modality):
    encoder = modality().build_encoder()
    assert encoder.width == 16
    assert encoder(**modality().load(noise(100))).shape == (1, 9, 16)


@pytest.mark.parametrize(("projection_size", "width"), [(None, 32), (10, 10)])
def test_a_pooling_encoder_gives_one_token(modality, projection_size, width):
    made = modality(output="pooled", projection_size=projection_size)
    encoder = FrozenEncoder(made.build_encoder(), name="point_cloud")
    assert encoder.width == width
    assert encoder(**made.load(noise(100)))[0].shape == (1, 1, width)


def test_points_reach_a_half_precision_encoder_unrounded(modality):
    encoder = FrozenEncoder(modality().build_encoder().bfloat16(), name="point_cloud")
    points = modality().load(noise(100))["points"]
    seen = []
    encoder.module.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["points"]), with_kwargs=True
    )
    values, _ = encoder(points=points)
    assert values.dtype == torch.bfloat16 and torch.equal(seen[0], points)


def test_it_travels_to_the_workers_of_a_data_loader(modality):
    original = modality()
    original.load(noise(5))
    copy = pickle.loads(pickle.dumps(original))
    assert np.array_equal(loaded(copy, noise(5)), loaded(original, noise(5)))


@pytest.mark.slow
def test_open3d_stays_out_of_this_process(modality, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "open3d", raising=False)  # another test may have imported it
    path = tmp_path / "mesh.off"
    path.write_bytes(off())
    modality().load(path)
    assert "open3d" not in sys.modules


class TestPointCloudContract(xblip.testing.ModalityContract):
    name = "point_cloud"
