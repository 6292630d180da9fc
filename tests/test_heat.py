"""Weights drawn: where a block lies, how many tokens are special, and that nothing is drawn of nothing."""

import numpy as np
import PIL.Image
import pytest

from xblip import heat

WHITE = PIL.Image.new("RGB", (320, 320), "white")


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (257, (224, 224), (1, 16, 16)),  # CLIP, EVA-CLIP-g
        (256, (224, 224), (0, 16, 16)),  # SigLIP
        (197, (224, 224), (1, 14, 14)),  # ViT
        (198, (224, 224), (2, 14, 14)),  # DeiT, distilled
        (201, (224, 224), (5, 14, 14)),  # DINOv3
        (261, (224, 224), (5, 16, 16)),  # DINOv2 with registers
        (49, (224, 224), (0, 7, 7)),  # Swin, ResNet
        (729, (384, 384), (0, 27, 27)),  # SigLIP of 384
        (577, (336, 336), (1, 24, 24)),  # CLIP of 336
        (385, (336, 224), (1, 16, 24)),
        (384, (224, 336), (0, 24, 16)),
        (40, (320, 128), (0, 4, 10)),
        (1, (224, 224), None),
        (3, (224, 224), None),
    ],
)
def test_a_grid_has_the_shape_of_the_picture(count, size, expected):
    assert heat.grid_of(count, *size) == expected


def test_a_block_is_on_its_row_and_column_and_nowhere_else():
    shares = np.zeros((2, 4))
    shares[1, 2] = 1
    drawn = np.asarray(heat.lay_over(WHITE, shares)).astype(int)
    hot = (drawn != 255).any(-1)
    assert hot[160:, 160:240].all() and hot.sum() == 160 * 80


def test_more_weight_is_more_colour_and_none_is_none():
    drawn = np.asarray(heat.lay_over(WHITE, np.array([[0.0, 0.25, 0.5, 1.0]]))).astype(int)
    distance = np.abs(drawn[0, [40, 120, 200, 280]] - 255).sum(-1)
    assert distance[0] == 0 and (np.diff(distance) > 20).all()
    assert (heat.scaled(np.zeros((2, 3))) == 0).all() and heat.scaled(np.array([[1.0, 4.0]])).tolist() == [[0.25, 1.0]]


def test_special_tokens_do_not_dim_the_others():
    weights = np.zeros((1, 17))
    weights[0, 0], weights[0, 5] = 0.99, 0.01
    alone = np.zeros((1, 17))
    alone[0, 5] = 1.0
    both, one = (np.asarray(heat.over_pictures([WHITE], part).files[".png"]) for part in (weights, alone))
    assert (both == one).all() and heat.over_pictures([WHITE], weights).placeless == {0: "[CLS]"}


def test_a_sheet_keeps_order_and_labels_above():
    tones = [PIL.Image.new("RGB", (10, 10), (tone,) * 3) for tone in (10, 60, 110)]
    page = np.asarray(heat.sheet(tones, ["one", "two", "three"], columns=2).convert("L"))
    assert page.shape == (2 * (10 + 16 + 8) - 8, 2 * 18 - 8)
    assert (page[20, 5], page[20, 23], page[54, 5]) == (10, 60, 110)


def test_bars_grow_with_weights_by_segment():
    weights = np.zeros((2, 20))
    weights[0, 3], weights[1, 15] = 1.0, 0.5
    drawing = heat.bars(weights)
    plain, drawn = (np.asarray(heat.bars(part).files[".png"]).astype(int) for part in (0 * weights, weights))
    rows, columns = np.nonzero((drawn != plain).any(-1))
    assert set(columns // 16) == {
        (12 + 3 * 16) // 16,
        (12 + 15 * 16) // 16,
        (12 + 15 * 16 + 14) // 16,
        (12 + 3 * 16 + 14) // 16,
    }
    assert "A bar for each token" in drawing.caption and rows.max() < drawn.shape[0]
    assert heat.bars(np.ones((1, 1200))).files[".png"].width > 2400
