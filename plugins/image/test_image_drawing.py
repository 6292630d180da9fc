"""Heat lies where the encoder looked: on the very block of the picture that changes the token it is drawn for."""

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from test_image import SQUARE, noise
from test_image_encoders import DEEP, DROPPED, MODELS
from xblip_image import Image

from xblip.testing import save_random

SIDE = 32  # pixels of what these encoders see, 4 x 4 patches
PLAIN = {name: special for name, special in DROPPED.items() if name != "dinov3_convnext"} | {"siglip": 0}
MORE = {
    "wide": lambda: (
        hf.ViTModel(hf.ViTConfig(**DEEP | {"image_size": [24, 40]})),
        hf.ViTImageProcessor(size={"height": 24, "width": 40}),
    ),
    "resnet": lambda: (
        hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        hf.ViTImageProcessor(**SQUARE),
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    torch.manual_seed(0)
    for name, build in {**MODELS, **MORE}.items():
        save_random(root / name, *build())
    return root


def heated(modality, tensors, weights) -> np.ndarray:
    """Which pixels (H, W) of a drawing differ from the picture without heat."""
    with_heat, plain = (modality.draw(tensors, each).files[".png"] for each in (weights, 0 * weights))
    return (np.asarray(with_heat).astype(int) != np.asarray(plain)).any(-1)


def shares_of_blocks(where: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """What share of each block's pixels is heated."""
    high, wide = (length // count for length, count in zip(where.shape, (rows, columns), strict=True))
    return where[: rows * high, : columns * wide].reshape(rows, high, columns, wide).mean((1, 3))


@pytest.mark.parametrize("name", [*PLAIN, "wide"])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 3), (2, 1)])
@torch.no_grad()
def test_the_block_that_changes_a_token_is_the_one_that_is_heated(saved, name, row, column):
    """At layer 0 a token hears of its own patch alone."""
    modality = Image(Image.Config(encoder=str(saved / name), layer=0))
    encoder, tensors = modality.build_encoder().eval(), modality.load(PIL.Image.fromarray(noise(45, 60)))
    before = encoder(**tensors)
    values = tensors["pixel_values"].clone()
    values[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    tokens = ((encoder(pixel_values=values) - before).abs().amax(-1) > 1e-4).float().numpy()
    assert tokens.sum() == 1
    rows, columns = (length // 8 for length in values.shape[2:])
    shares = shares_of_blocks(heated(modality, tensors, tokens), rows, columns)
    assert shares[row, column] > 0.95 and np.delete(shares.flatten(), row * columns + column).max() < 0.05
    placeless = modality.draw(tensors, tokens).placeless
    assert len(placeless) == PLAIN.get(name, 1) and (not placeless or placeless[0] == "[CLS]")


@torch.no_grad()
def test_a_convolution_s_grid_is_the_picture_s(saved):
    modality = Image(Image.Config(encoder=str(saved / "resnet")))
    encoder, tensors = modality.build_encoder().eval(), modality.load(PIL.Image.fromarray(noise(45, 60)))
    values = tensors["pixel_values"].clone()
    values[..., 24:, :8] += 1
    changes = (encoder(pixel_values=values) - encoder(**tensors)).abs().sum(-1).numpy()
    count = round(changes.shape[1] ** 0.5)
    assert changes.shape[1] == count**2 > 1
    shares = shares_of_blocks(heated(modality, tensors, changes * (changes == changes.max())), 4, 4)
    assert shares[3, 0] > 0 and shares[:2].max() == 0 and shares[:, 2:].max() == 0


def test_what_is_drawn_is_what_the_encoder_sees(saved):
    """CLIP's processor crops the middle; the colours come back as they were."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :16] = 255  # cropped away
    picture[:, 16:32] = (200, 30, 90)
    picture[:, 32:48] = (20, 140, 60)
    for name in ("clip", "dinov2"):
        modality = Image(Image.Config(encoder=str(saved / name)))
        tensors = modality.load(picture)
        drawn = np.asarray(modality.draw(tensors, np.zeros((1, 17))).files[".png"]).astype(int)
        assert np.abs(drawn[200, 60] - (200, 30, 90)).max() <= 3 and np.abs(drawn[200, -60] - (20, 140, 60)).max() <= 3


@torch.no_grad()
def test_of_an_encoder_for_any_size_only_the_picture_s_own_patches_are_drawn(saved):
    modality = Image(Image.Config(encoder=str(saved / "siglip2_naflex"), layer=0))
    source = noise(30, 70, seed=1)
    tensors = modality.load(source)
    rows, columns = tensors["spatial_shapes"][0].tolist()
    assert rows * columns < 16 == tensors["pixel_values"].shape[1]
    drawn = modality.draw(tensors, np.zeros((1, 16))).files[".png"]
    smaller = PIL.Image.fromarray(source).resize((8 * columns, 8 * rows)).resize(drawn.size)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(smaller)).mean() < 12
    for token in (0, columns + 1, rows * columns - 1):
        weights = np.zeros((1, 16))
        weights[0, token] = 1
        shares = shares_of_blocks(heated(modality, tensors, weights), rows, columns)
        assert shares.argmax() == token and shares.max() > 0.9 and np.delete(shares.flatten(), token).max() < 0.05


def test_one_pooled_token_lies_nowhere(saved):
    modality = Image(Image.Config(encoder=str(saved / "vit")))
    drawing = modality.draw(modality.load(noise(32, 32)), np.ones((1, 1)))
    assert drawing.placeless == {0: "one token that all of it was pooled to"} and drawing.files[".png"].size == (
        384,
        384,
    )


def test_tokens_that_are_no_grid_are_bars(saved):
    modality = Image(Image.Config(encoder=str(saved / "vit")))
    drawing = modality.draw(modality.load(noise(32, 32)), np.ones((1, 3)))
    assert drawing.caption.startswith("A bar for each token")
