"""SpecAugment: what is hidden of a sound, in what every encoder hears, and what is left alone."""

import numpy as np
import pytest
import soundfile
import torch
from sounds import noise
from test_audio_encoders import KINDS, folders, opened  # noqa: F401  a fixture
from xblip_audio import Audio
from xblip_audio_masks import Masks, span

import xblip

VALUES = {"clap": "input_features", "clap_fused": "input_features", "clap_audio": "input_features"}
VALUES |= {"whisper": "input_features"}


def hidden(modality, source, seed):
    """Which frames (S, frames) and which bins (S, bins) of a spectrogram are hidden as a whole, and both spectrograms."""
    plain, changed = modality.load(source), modality.augmented(source, np.random.default_rng(seed))
    name = next(name for name in plain if name.startswith("input"))
    assert all(torch.equal(plain[other], changed[other]) for other in plain if other != name)
    return plain[name], changed[name]


def test_spans_have_all_lengths_and_places_alike():
    draw = np.random.default_rng(0)
    spans = [span(20, 0.25, draw) for _ in range(4000)]
    lengths = np.bincount([end - start for start, end in spans], minlength=6)
    assert len(lengths) == 6 and lengths.min() > 500
    assert {start for start, end in spans if end - start == 5} == set(range(16))
    assert all(start == end for start, end in [span(3, 0.2, draw) for _ in range(50)])


def test_bands_and_moments_of_a_file_become_the_mean_of_its_clip(modality, tmp_path):
    soundfile.write(tmp_path / "sound.wav", noise(160 * 90 + 240), 16000)
    audio = modality(augment=Masks(times=1, time_share=0.5, bands=1, band_share=0.5))
    seen = set()
    for seed in range(12):
        plain, changed = hidden(audio, tmp_path / "sound.wav", seed)
        moved = (plain != changed)[0]
        frames, bins = moved[:90].all(1), moved[:90].all(0)
        assert torch.equal(moved[:90], frames[:, None] | bins[None]), "whole moments and whole bands"
        assert not moved[90:].any(), "padding stays padding"
        assert frames.sum() <= 45 and bins.sum() <= 32
        assert all(
            len(place) == 0 or (place.diff() == 1).all() for place in (frames.nonzero()[:, 0], bins.nonzero()[:, 0])
        )
        if moved.any():
            values = changed[0][moved]
            assert (values == values[0]).all() and torch.isclose(values[0], plain[0, :90].mean(), atol=1e-6)
        seen.add((int(frames.sum()), int(bins.sum())))
    assert len(seen) > 8


def test_each_clip_of_a_long_sound_has_masks_of_its_own(modality):
    plain, changed = hidden(modality(), (noise(160 * 128 * 4), 16000), 1)
    moved = plain != changed
    assert len(moved) == 4
    assert len({tuple(clip.all(1).nonzero()[:, 0].tolist()) for clip in moved}) > 2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_encoder_hears_less_but_nothing_strange(folders, kind):  # noqa: F811
    modality, encoder, rate_hz, window = opened(folders, kind)
    sound = noise(window + window // 3)
    plain = modality.load((sound, rate_hz))
    changed = modality.augmented((sound, rate_hz), np.random.default_rng(3))
    name = VALUES.get(kind, "input_values")
    assert set(plain) == set(changed)
    for other in set(plain) - {name}:
        assert torch.equal(plain[other], changed[other])
    moved = plain[name] != changed[name]
    assert 0 < moved.float().mean() < 0.6
    assert changed[name].min() >= plain[name].min() and changed[name].max() <= plain[name].max()
    tokens, mask = encoder(**changed)
    before, mask_before = encoder(**plain)
    assert torch.equal(mask, mask_before) and tokens.isfinite().all() and not torch.equal(tokens, before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_sound_stays_as_it_is(folders, kind):  # noqa: F811
    modality, _, rate_hz, window = opened(folders, kind, augment=Masks(times=9, time_share=1.0, bands=0))
    tensors = modality.load((noise(window // 3), rate_hz))
    name = VALUES.get(kind, "input_values")
    values, real = modality._family.sound(tensors)
    assert values.data_ptr() == tensors[name].data_ptr() and values.dim() >= 3 and len(real) == len(values)
    changed = modality.augmented((noise(window // 3), rate_hz), np.random.default_rng(0))
    after, _ = modality._family.sound(changed)
    count = int(real[0])
    assert 0 < count <= values.shape[-2]
    assert torch.equal(values[..., count:, :], after[..., count:, :])
    assert not torch.equal(values[..., :count, :], after[..., :count, :])
    share = 1.0 if kind.startswith("clap") else 1 / 3  # CLAP repeats short sound
    assert abs(count / values.shape[-2] - share) < 0.1


def test_samples_have_no_bands(folders):  # noqa: F811
    modality, _, rate_hz, window = opened(folders, "hubert", augment=Masks(times=0, bands=5, band_share=1.0))
    plain = modality.load((noise(window // 3), rate_hz))
    changed = modality.augmented((noise(window // 3), rate_hz), np.random.default_rng(0))
    assert torch.equal(plain["input_values"], changed["input_values"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": -1}, "augment.times of a sound must be 0 or more, not -1"),
        ({"bands": -2}, "augment.bands of a sound must be 0 or more, not -2"),
        ({"time_share": 1.5}, "augment.time_share of a sound must be a share from 0 to 1, not 1.5"),
        ({"band_share": -0.1}, "augment.band_share of a sound must be a share from 0 to 1, not -0.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(xblip.ConfigError, match=message):
        Audio.Config(encoder="nowhere", augment=Masks(**settings))
