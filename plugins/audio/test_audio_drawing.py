"""Heat lies at the moments and pitches that change the token it is drawn for, whatever the encoder."""

import numpy as np
import pytest
import torch
from sounds import noise, tone
from test_audio_encoders import KINDS, WINDOW, make
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel, ResNetConfig, ResNetModel
from xblip_audio import Audio
from xblip_audio_drawing import HIGH, WIDE

pytestmark = pytest.mark.slow  # encoders of every kind, each gone through token by token

SIZES = {"num_mel_bins": 32, "max_length": 128}
SPECTROGRAMS = {
    "ast": lambda: ASTModel(
        ASTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, **SIZES)
    ),
    "resnet": lambda: ResNetModel(
        ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}
SPECIAL = {"ast": 2}
ONE_BAND = ("whisper", "wav2vec2", "wav2vec2_group", "hubert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    for kind in KINDS:
        for part in make(kind):
            part.save_pretrained(root / kind)
    torch.manual_seed(0)
    for kind, build in SPECTROGRAMS.items():
        build().save_pretrained(root / kind)
        ASTFeatureExtractor(**SIZES).save_pretrained(root / kind)
    return root


def opened(folders, kind, seconds=None):
    """The modality, its encoder, and what it loads of noise as long as its window, or of so many seconds."""
    modality = Audio(Audio.Config(encoder=str(folders / kind)))
    rate_hz = 8000 if kind.startswith("clap") else 16000
    samples = round(seconds * rate_hz) if seconds else WINDOW.get(kind, 127 * 160 + 400)
    return modality, modality.build_encoder().eval(), modality.load((noise(samples), rate_hz))


def heat_of(modality, tensors, weights) -> np.ndarray:
    """How much each pixel (H, W) of a drawing differs from the sound without heat."""
    with_heat, plain = (modality.draw(tensors, each).files[".png"] for each in (weights, 0 * weights))
    return np.abs(np.asarray(with_heat).astype(int) - np.asarray(plain)).sum(-1)


@pytest.mark.parametrize("kind", [*KINDS, *SPECTROGRAMS])
@pytest.mark.parametrize(("moment", "pitch"), [(0.15, 0.75), (0.5, 0.3), (0.9, 0.6)])
@torch.no_grad()
def test_what_changes_a_token_is_heated(folders, kind, moment, pitch):
    modality, encoder, tensors = opened(folders, kind)
    before, _ = encoder(**tensors)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    values, _ = modality._family.sound(changed)
    frames, bins = values.shape[-2:]
    first, low = round(moment * frames), int(pitch * bins)
    values[..., first : first + max(2, frames // 50), low : low + max(1, bins // 16)] += 3
    changes = (encoder(**changed)[0] - before).norm(dim=-1).numpy()
    heat = heat_of(modality, tensors, (changes == changes.max()).astype(float))
    assert heat.shape == (HIGH + 14 + 18, WIDE)
    rows, columns = np.nonzero(heat[:HIGH])
    middle_s, middle_hz = columns.mean() / WIDE, 1 - rows.mean() / HIGH
    block_s, block_hz = np.ptp(columns) / WIDE, np.ptp(rows) / HIGH
    assert abs(middle_s - moment - 0.01) <= block_s / 2 + 0.05 and block_s < 0.25, (middle_s, block_s)
    if kind in ONE_BAND:
        assert block_hz > 0.97
    else:
        assert abs(middle_hz - pitch - 0.03) <= block_hz / 2 + 0.15 and block_hz < 0.6, (middle_hz, block_hz)
    band = np.nonzero(heat[HIGH + 7])[0]
    assert abs(band.mean() / WIDE - middle_s) < 0.01, "the timeline sums the bands"


@pytest.mark.parametrize("kind", [*KINDS, *SPECTROGRAMS])
@torch.no_grad()
def test_every_token_but_special_ones_has_a_place_of_its_own(folders, kind):
    modality, encoder, tensors = opened(folders, kind)
    count = encoder(**tensors)[0].shape[1]
    drawing = modality.draw(tensors, np.ones((1, count)))
    assert len(drawing.placeless) == SPECIAL.get(kind, 0)
    seen = set()
    for token in np.linspace(len(drawing.placeless), count - 1, min(count, 12)).astype(int):
        weights = np.zeros((1, count))
        weights[0, token] = 1
        seen.add(heat_of(modality, tensors, weights).tobytes())
    assert len(seen) == min(count, 12)


def test_padding_is_left_out_and_clips_lie_below_each_other(folders):
    modality, _, tensors = opened(folders, "whisper", seconds=0.25)
    assert modality.draw(tensors, np.ones((1, 50))).files[".png"].size == (WIDE, HIGH + 32)
    half = np.zeros((1, 50))
    half[0, 12] = 1  # the last moment of a quarter of the window's second
    assert np.nonzero(heat_of(modality, tensors, half)[:HIGH])[1].min() > 0.9 * WIDE
    modality, _, tensors = opened(folders, "ast", seconds=2.0)
    count = 2 + 2 * 12
    drawing = modality.draw(tensors, np.ones((2, count)))
    assert drawing.files[".png"].size == (WIDE, 2 * (HIGH + 32 + 16 + 8) - 8)


def test_loud_is_dark_and_high_is_above(folders):
    modality = Audio(Audio.Config(encoder=str(folders / "ast")))
    sound = np.concatenate([tone(300, 0.6), tone(5000, 0.6)])
    picture = np.asarray(modality.draw(modality.load((sound, 16000)), np.zeros((1, 26))).files[".png"].convert("L"))
    early, late = picture[:HIGH, WIDE // 4], picture[:HIGH, 3 * WIDE // 4]
    assert early.argmin() > 90 and late.argmin() < 50


def test_tokens_of_an_unknown_order_are_bars(folders):
    modality, _, tensors = opened(folders, "ast")
    assert modality.draw(tensors, np.ones((1, 3))).caption.startswith("A bar for each token")
