"""Heat lies on the points of the very group that a token stands for, in the picture and in the .ply."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from point_shapes import loaded, noise
from xblip_point_drawing import FRAMES, SIDE

GREY = (190, 190, 198)


def vertices(ply: bytes) -> np.ndarray:
    """The rows of a .ply as drawn: x, y, z, red, green, blue, heat."""
    header, rows = ply.split(b"end_header\n", 1)
    kinds = {"float": "<f4", "uchar": "u1"}
    columns = [line.split()[1:] for line in header.decode().splitlines() if line.startswith("property")]
    return np.frombuffer(rows, [(name, kinds[kind]) for kind, name in columns])


def weights(*tokens: int, count: int = 9) -> np.ndarray:
    found = np.zeros((1, count))
    found[0, list(tokens)] = 1
    return found


@pytest.mark.parametrize("group", [0, 3, 7])
@pytest.mark.parametrize("channels", [3, 6])
@torch.no_grad()
def test_the_points_of_a_token_s_group_are_heated(modality, group, channels):
    cloud = modality(in_channels=channels)
    tensors, encoder = cloud.load(noise(200)), cloud.build_encoder()
    groups, centres = encoder.model.group(tensors["points"])
    expected = {tuple(point) for point in (groups[..., :3] + centres[:, :, None])[0, group].numpy().round(4).tolist()}
    rows = vertices(cloud.draw(tensors, weights(1 + group)).files[".ply"])
    hot = rows[rows["heat"] > 0]
    assert {tuple(np.round([row[axis] for axis in "xyz"], 4).tolist()) for row in hot} == expected
    assert all(tuple(row)[3:6] == GREY for row in rows[rows["heat"] == 0]) and len(rows) == 64


def test_a_point_of_two_groups_takes_their_mean(modality):
    cloud = modality()
    tensors = cloud.load(noise(200))
    both = vertices(cloud.draw(tensors, np.ones((1, 9))).files[".ply"])["heat"]
    alone = vertices(cloud.draw(tensors, weights(3)).files[".ply"])["heat"]
    assert set(np.unique(both)) <= {0.0, 1.0} and 0 < both.sum() <= 64
    assert alone.max() == 1 and 0 < (alone > 0).sum() <= 4


def test_the_ply_is_read_by_the_modality_itself(modality):
    cloud = modality(in_channels=6)
    tensors = cloud.load(noise(64))
    ply = cloud.draw(tensors, weights(2)).files[".ply"]
    again = loaded(cloud, ply)
    assert np.abs(again[:, :3] - tensors["points"][0, :, :3].numpy()).max() < 1e-4
    hot = vertices(ply)["heat"] > 0
    assert (again[~hot, 3] == pytest.approx(190 / 255)) and (again[hot, 3] > again[hot, 5] + 0.3).all()


def test_x_is_to_the_right_and_y_is_up(modality):
    cloud = modality()
    points = np.zeros((64, 3))
    points[:32] = [1, 1, 0]
    points[32:] = [-1, -1, 0]
    points += noise(64) * 0.05
    tensors = cloud.load(points)
    drawn = np.asarray(cloud.draw(tensors, np.zeros((1, 9))).files[".png"].convert("L"))[16:, :SIDE] < 250
    middle = len(drawn) // 2
    assert drawn[:middle, SIDE // 2 :].any() and drawn[middle:, : SIDE // 2].any()
    assert not drawn[:middle, : SIDE // 2].any() and not drawn[middle:, SIDE // 2 :].any()


def test_cls_and_pooled_tokens_lie_nowhere(modality):
    cloud, pooled = modality(), modality(output="pooled")
    for modal, count, name in ((cloud, 9, "[CLS]"), (pooled, 1, "one token that all of it was pooled to")):
        drawing = modal.draw(modal.load(noise(64)), weights(0, count=count))
        assert drawing.placeless == {0: name} and not vertices(drawing.files[".ply"])["heat"].any()


@pytest.mark.parametrize("channels, color", [(3, GREY), (6, (255, 0, 0))])
def test_the_preview_turns_in_the_cloud_s_own_colours(modality, channels, color):
    cloud = modality(in_channels=channels)
    red = np.concatenate([noise(200), np.tile([1.0, 0, 0], (200, 1))], 1)
    ending, content = cloud.preview(cloud.load(red))
    with PIL.Image.open(io.BytesIO(content)) as film:
        assert ending == ".webp" and film.format == "WEBP" and film.n_frames == FRAMES and film.info["loop"] == 0
        frames = []
        for number in (0, FRAMES // 4):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert (frames[0] != frames[1]).any(-1).mean() > 0.05, "another side is seen"
    inked = frames[0][frames[0].min(-1) < 200]
    darkest = inked[inked.sum(-1).argsort()[: len(inked) // 4]].mean(0)
    assert np.abs(darkest - color).max() < 90
