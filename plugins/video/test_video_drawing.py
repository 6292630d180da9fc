"""Heat lies on the frames and patches that change the token it is drawn for."""

import numpy as np
import pytest
import torch
from numbered_videos import numbered
from test_video_encoders import MODELS, SIZES
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from xblip_video import Video

from xblip.testing import save_random

PATCHES, SIDE, LINE, GAP = (
    4,
    176,
    16,
    8,
)  # 4 x 4 patches a frame; pixels of a frame on the sheet, its label, between them


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "num_frames"}
    vit = lambda: (ViTModel(ViTConfig(**sizes)), ViTImageProcessor(size={"height": 32, "width": 32}))  # noqa: E731
    for name, build in {**MODELS, "vit": vit}.items():
        save_random(root / name, *build())
    return root


def heated(modality, tensors, weights, frames: int) -> set[tuple[int, int, int]]:
    """The frames and patches (frame, row, column) that differ from the frames without heat over most of their area."""
    with_heat, plain = (modality.draw(tensors, each).files[".png"] for each in (weights, 0 * weights))
    where = (np.asarray(with_heat).astype(int) != np.asarray(plain)).any(-1)
    found = set()
    for frame in range(frames):
        left, top = frame % 4 * (SIDE + GAP), frame // 4 * (SIDE + LINE + GAP) + LINE
        part = where[top : top + SIDE, left : left + SIDE].reshape(PATCHES, SIDE // PATCHES, PATCHES, SIDE // PATCHES)
        found |= {(frame, *map(int, place)) for place in np.argwhere(part.mean((1, 3)) > 0.9)}
    return found


@pytest.mark.parametrize(("name", "together"), [("videomae", 2), ("vivit", 2), ("timesformer", 1)])
@pytest.mark.parametrize(("frame", "row", "column"), [(0, 0, 0), (2, 1, 3), (3, 3, 2)])
@torch.no_grad()
def test_the_patches_that_change_a_token_of_a_whole_video_are_heated(saved, name, together, frame, row, column):
    modality = Video(Video.Config(encoder=str(saved / name), layer=0))
    encoder, tensors = modality.build_encoder().eval(), modality.load(numbered(4))
    values = tensors["pixel_values"].clone()
    values[0, frame, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    changes = (encoder(pixel_values=values) - encoder(**tensors)).abs().amax(-1)
    tokens = (changes > 1e-4).float().numpy()
    assert tokens.sum() == 1
    first = frame // together * together
    expected = {(place, row, column) for place in range(first, first + together)}
    assert heated(modality, tensors, tokens, 4) == expected
    assert modality.draw(tensors, tokens).placeless == ({} if name == "videomae" else {0: "[CLS]"})


@torch.no_grad()
def test_frames_read_one_by_one_have_their_own_heat(saved):
    modality = Video(Video.Config(encoder=str(saved / "vit"), num_frames=6, layer=0))
    encoder, tensors = modality.build_encoder().eval(), modality.load(numbered(12))
    values = tensors["pixel_values"].clone()
    values[4, :, 8:16, :8] += 1
    tokens = ((encoder(pixel_values=values) - encoder(**tensors)).abs().amax(-1) > 1e-4).float().numpy()
    assert tokens.shape == (6, 17) and heated(modality, tensors, tokens, 6) == {(4, 1, 0)}


@pytest.mark.parametrize("name", ["videomae", "vivit", "timesformer"])
def test_frames_are_drawn_as_the_encoder_sees_them(saved, name):
    count = 64 if name == "timesformer" else 32
    modality = Video(Video.Config(encoder=str(saved / name)))
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[2] = (10, 200, 60)
    drawn = np.asarray(modality.draw(modality.load(frames), np.zeros((1, count))).files[".png"])
    assert np.abs(drawn[LINE + 20, 2 * (SIDE + GAP) + 20].astype(int) - (10, 200, 60)).max() <= 3
    assert drawn[LINE + 20, 20].max() <= 3


def test_tokens_of_an_unknown_order_are_bars(saved):
    modality = Video(Video.Config(encoder=str(saved / "vivit")))
    drawing = modality.draw(modality.load(numbered(4)), np.ones((1, 7)))
    assert drawing.caption.startswith("A bar for each token")
