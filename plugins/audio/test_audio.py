"""The audio modality: what sounds become, clip by clip, and what the encoder makes of them."""

import pickle

import numpy as np
import pytest
import soundfile
import torch
from sounds import noise, tone
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ASTModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)
from xblip_audio import Audio, resample

import xblip
import xblip.testing

SHIFT, FRAME = 160, 400  # samples at 16 kHz


def test_features_are_those_of_the_encoders_own_extractor(modality, ast):
    sound = noise(15000)
    expected = ASTFeatureExtractor.from_pretrained(ast)(sound, sampling_rate=16000, return_tensors="pt")
    loaded = modality().load((sound, 16000))
    assert torch.equal(loaded["input_values"], expected["input_values"])
    assert loaded["num_frames"].tolist() == [1 + (15000 - FRAME) // SHIFT]


def test_clips_together_are_the_whole_sound(modality, ast):
    sound = noise(16000 * 5)
    frames = 1 + (len(sound) - FRAME) // SHIFT
    long = ASTFeatureExtractor.from_pretrained(ast, max_length=frames)
    whole = long(sound, sampling_rate=16000, return_tensors="pt")["input_values"][0]
    loaded = modality().load((sound, 16000))
    assert loaded["num_frames"].tolist() == [128, 128, 128, frames - 3 * 128]
    parts = [clip[:count] for clip, count in zip(loaded["input_values"], loaded["num_frames"], strict=True)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "kept", "places"), [(9, 3, [1, 4, 7]), (10, 1, [5]), (4, 3, [0, 2, 3]), (3, 8, [0, 1, 2])]
)
def test_clips_of_long_sound_spread_evenly(modality, count, kept, places):
    sound = noise(128 * SHIFT * count)
    every = modality(max_clips=99).load((sound, 16000))
    some = modality(max_clips=kept).load((sound, 16000))
    assert len(every["num_frames"]) == count
    assert torch.equal(some["input_values"], every["input_values"][places])
    assert torch.equal(some["num_frames"], every["num_frames"][places])


@pytest.mark.parametrize("samples", [1, 399, 400])
def test_the_shortest_sounds_are_one_frame(modality, samples):
    loaded = modality().load((noise(samples), 16000))
    assert loaded["num_frames"].tolist() == [1] and loaded["input_values"].isfinite().all()


@pytest.fixture
def resnet(tmp_path):
    """A folder with a tiny convolutional network over spectrograms of 32 frames, 16 mel bins."""
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    ASTFeatureExtractor(num_mel_bins=16, max_length=32).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def test_a_convolutional_network_gives_its_grid_moment_by_moment(resnet):
    modality = Audio(Audio.Config(encoder=str(resnet)))
    encoder = modality.build_encoder().eval()
    loaded = modality.load((noise(SHIFT * 40), 16000))
    tokens, mask = encoder(**loaded)
    hidden = encoder.model(pixel_values=loaded["input_values"][:, None]).last_hidden_state
    moments, bands = hidden.shape[2:]
    assert tokens.shape == (2, moments * bands, encoder.width) and encoder.width == 12
    assert torch.equal(tokens[0, bands + 1], hidden[0, :, 1, 1])
    assert loaded["num_frames"].tolist() == [32, 6]
    assert mask[0].all() and mask[1].tolist() == [
        place * 32 / moments < 6 for place in range(moments) for _ in range(bands)
    ]


def test_a_convolutional_network_carries_a_branch(resnet):
    config = xblip.testing.BranchConfig("audio", {"encoder": str(resnet)}, {"kind": "linear"})
    branch = xblip.testing.Branch.build(config, llm_width=8)
    long, short = branch([(noise(9000), 16000), (noise(900), 16000)], ["a", "b"])
    assert long.shape[1] == short.shape[1] == 8
    assert len(short) < len(long), "what is padding alone is left out"


def test_silence_is_finite(modality):
    assert modality().load((np.zeros(20000, np.float32), 16000))["input_values"].isfinite().all()


def test_channels_are_averaged(modality, tmp_path):
    left, right = noise(16000), noise(16000, seed=1)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    expected = modality().load(((left + right) / 2, 16000))["input_values"]
    for source in (tmp_path / "stereo.wav", (np.stack([left, right]), 16000)):
        assert torch.allclose(modality().load(source)["input_values"], expected, atol=1e-4)


def test_all_kinds_of_arrays_agree(modality):
    pcm = (noise(16000) * 2**15).astype(np.int16)
    floats = pcm / np.float32(2**15)
    expected = modality().load((floats, 16000))["input_values"]
    for samples in (
        pcm,
        pcm.astype(">i2"),
        floats.astype(float),
        torch.from_numpy(pcm),
        torch.from_numpy(floats)[None],
    ):
        assert torch.allclose(modality().load((samples, np.int64(16000)))["input_values"], expected, atol=1e-4)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 44100, 48000, 96000])
def test_the_sampling_rate_becomes_the_encoders(rate_hz):
    changed = resample(tone(440, 1, rate_hz), rate_hz, 16000, "it")
    assert len(changed) == 16000
    assert np.abs(changed - tone(440, 1))[100:-100].max() < 0.01


def test_the_mask_tells_which_patches_hear_something(modality):
    encoder = modality().build_encoder()
    loaded = modality().load((noise(FRAME + 40 * SHIFT), 16000))
    tokens, mask = encoder(**loaded)
    assert tokens.shape == (1, 62, 16) and encoder.width == 16
    expected = [True, True]
    for _band in range(4):
        expected += [start < 41 for start in range(0, 113, 8)]
    assert mask[0].tolist() == expected


def test_patches_are_masked_unless_they_depend_on_real_frames(modality):
    encoder = modality().build_encoder()
    loaded = modality().load((noise(FRAME + 40 * SHIFT), 16000))
    changed = loaded["input_values"].clone()
    changed[:, :41] += 1
    with torch.no_grad():
        before, after = (encoder.model.embeddings(values)[0] for values in (loaded["input_values"], changed))
    _, mask = encoder(**loaded)
    assert torch.equal((before - after).abs().amax(1)[2:] > 1e-6, mask[0, 2:])


def test_a_classifier_serves_as_encoder(ast, tmp_path):
    config = ASTConfig.from_pretrained(ast)
    ASTForAudioClassification(config).save_pretrained(tmp_path)
    ASTFeatureExtractor.from_pretrained(ast).save_pretrained(tmp_path)
    encoder = Audio(Audio.Config(encoder=str(tmp_path))).build_encoder()
    assert isinstance(encoder.model, ASTModel)


def test_it_travels_to_the_workers_of_a_data_loader(modality):
    original = modality()
    source = (noise(3000), 16000)
    expected = original.load(source)["input_values"]
    assert torch.equal(pickle.loads(pickle.dumps(original)).load(source)["input_values"], expected)


def test_foreign_encoders_are_named(ast, tmp_path):
    extractor = ASTFeatureExtractor.from_pretrained(ast)
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    folders = {name: tmp_path / name for name in ("nowhere", "bare", "other", "vit", "whisper")}
    ASTModel.from_pretrained(ast).save_pretrained(folders["bare"])
    ASTModel.from_pretrained(ast).save_pretrained(folders["other"])
    ASTFeatureExtractor(num_mel_bins=64, max_length=256).save_pretrained(folders["other"])
    ViTModel(vit).save_pretrained(folders["vit"])
    extractor.save_pretrained(folders["vit"])
    ASTModel.from_pretrained(ast).save_pretrained(folders["whisper"])
    (folders["whisper"] / "preprocessor_config.json").write_text(
        '{"feature_extractor_type": "WhisperFeatureExtractor"}'
    )
    for name, message in {
        "nowhere": "Cannot load an encoder from .* no such folder",
        "bare": "Cannot load the feature extractor .*put it there by save_pretrained",
        "other": "takes 128 frames of 64 mel bins, but the feature extractor beside it makes 256 frames of 64 mel bins",
        "vit": "is a vit model. Expected audio-spectrogram-transformer",
        "whisper": "is a WhisperFeatureExtractor. Expected ASTFeatureExtractor, the one of audio-spec",
    }.items():
        with pytest.raises(xblip.BundleError, match=message):
            Audio(Audio.Config(encoder=str(folders[name]))).build_encoder()


class TestAudioContract(xblip.testing.ModalityContract):
    name = "audio"
