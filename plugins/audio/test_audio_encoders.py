"""The encoders of published systems: each hears what its own extractor makes, and its mask tells sound from padding."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from sounds import noise
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from xblip_audio import Audio
from xblip_beats import BeatsConfig, BeatsFeatureExtractor, BeatsModel

import xblip
import xblip.testing

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CONV = {"conv_dim": (8, 8), "conv_kernel": (20, 20), "conv_stride": (16, 20), "num_conv_pos_embeddings": 16}
WAVES = {**SMALL, **CONV, "num_conv_pos_embedding_groups": 4, "vocab_size": 20}
TEXT = {**SMALL, "vocab_size": 20}
CLAP = {"patch_embeds_hidden_size": 8, "depths": (1, 1), "num_attention_heads": (1, 2), "spec_size": 64}
MELS = {"feature_size": 16, "sampling_rate": 8000, "hop_length": 80, "max_length_s": 2, "fft_window_size": 256}
WINDOW = {  # samples of a whole clip
    "clap": 16000,
    "clap_fused": 16000,
    "clap_audio": 16000,
    "whisper": 16000,
    "wav2vec2": 499 * 320 + 324,
    "wav2vec2_group": 499 * 320 + 324,
    "hubert": 499 * 320 + 324,
    "beats": 63 * 160 + 400,
}
KINDS = list(WINDOW)


def clap(fused=False):
    audio = {**CLAP, "window_size": 4, "num_mel_bins": 16, "enable_fusion": fused}
    extractor = ClapFeatureExtractor(frequency_max=4000, truncation="fusion" if fused else "rand_trunc", **MELS)
    return ClapModel(ClapConfig(text_config=TEXT, audio_config=audio)), extractor


def make(kind):
    """A tiny random model and its extractor."""
    torch.manual_seed(0)
    if kind.startswith("clap"):
        model, extractor = clap(fused=kind == "clap_fused")
        return (model.audio_model if kind == "clap_audio" else model), extractor
    if kind == "whisper":
        layers = {f"{part}_{what}": count for part in ("encoder", "decoder") for what, count in (
            ("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = WhisperConfig(d_model=16, vocab_size=20, max_source_positions=50, num_mel_bins=16, **layers, **ids)
        return WhisperForConditionalGeneration(config), WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    if kind == "beats":
        sizes = {"num_mel_bins": 32, "max_length": 64}
        config = BeatsConfig(**SMALL, **sizes, patch_embedding_size=8, num_conv_pos_embeddings=8,
                             num_conv_pos_embedding_groups=4, num_buckets=16, max_distance=20)  # fmt: skip
        return BeatsModel(config), BeatsFeatureExtractor(**sizes)
    if kind == "wav2vec2_group":
        return Wav2Vec2ForCTC(Wav2Vec2Config(**WAVES)), Wav2Vec2FeatureExtractor()
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    if kind == "hubert":
        return HubertModel(HubertConfig(feat_extract_norm="layer", **WAVES)), extractor
    return Wav2Vec2Model(Wav2Vec2Config(feat_extract_norm="layer", do_stable_layer_norm=True, **WAVES)), extractor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of an encoder of each kind."""
    root = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        model, extractor = make(kind)
        model.save_pretrained(root / kind)
        extractor.save_pretrained(root / kind)
    return root


def opened(folders, kind, **settings):
    """The modality with that encoder, the encoder, its sampling rate, and the length of its window."""
    modality = Audio(Audio.Config(encoder=str(folders / kind), **settings))
    return modality, modality.build_encoder().eval(), 8000 if kind.startswith("clap") else 16000, WINDOW[kind]


def by_transformers(folders, kind, sound, rate_hz):
    """Tokens (N, D) of transformers' own model on what its own extractor makes."""
    _, extractor = make(kind)
    classes = {"whisper": WhisperModel, "wav2vec2_group": Wav2Vec2Model}
    model = classes.get(kind, type(make(kind)[0])).from_pretrained(folders / kind).eval()
    model = model.encoder if kind == "whisper" else getattr(model, "audio_model", model)
    sound = [sound] if kind == "beats" else sound
    hidden = model(**extractor(sound, sampling_rate=rate_hz, return_tensors="pt")).last_hidden_state[0]
    return hidden.flatten(1).T if kind.startswith("clap") else hidden


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_full_clip_is_what_transformers_makes_of_it(folders, kind):
    modality, encoder, rate_hz, window = opened(folders, kind)
    sound = noise(window)
    tokens, mask = encoder(**modality.load((sound, rate_hz)))
    expected = by_transformers(folders, kind, sound, rate_hz)
    assert tokens.shape == (1, *expected.shape) and expected.shape[1] == encoder.width
    assert (tokens[0] - expected).abs().max() < 1e-5
    assert mask.all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_long_sound_is_heard_clip_by_clip_and_to_its_end(folders, kind):
    modality, encoder, rate_hz, window = opened(folders, kind)
    sound = noise(2 * window + window // 4)
    tokens, mask = encoder(**modality.load((sound, rate_hz)))
    assert len(tokens) == 3 and mask[:2].all() and mask[2].any()
    assert (tokens[0] - by_transformers(folders, kind, sound[:window], rate_hz)).abs().max() < 1e-5
    changed = sound.copy()
    changed[-1] += 0.4
    assert not torch.equal(encoder(**modality.load((changed, rate_hz)))[0], tokens), "the last sample is dropped"
    alone, alone_mask = encoder(**opened(folders, kind, max_clips=1)[0].load((sound, rate_hz)))
    assert torch.allclose(alone[0], tokens[1], atol=1e-5) and torch.equal(alone_mask[0], mask[1])


@pytest.mark.parametrize(
    ("kind", "samples", "heard", "bands"),
    [
        ("whisper", 1, 1, 1),
        ("whisper", 320 * 20, 20, 1),
        ("whisper", 320 * 20 + 1, 21, 1),
        ("clap", 500, 32, 2),  # 32 times to the window's end
        ("clap", 9000, 18, 2),
        ("clap", 9001, 19, 2),
        ("clap_fused", 7000, 28, 2),
        ("wav2vec2", 1, 1, 1),
        ("wav2vec2", 324, 1, 1),
        ("wav2vec2", 325, 2, 1),
        ("wav2vec2_group", 324 + 99 * 320, 100, 1),
        ("hubert", 324 + 99 * 320 + 1, 101, 1),
    ],
)
@torch.no_grad()
def test_the_mask_is_true_where_there_is_sound(folders, kind, samples, heard, bands):
    modality, encoder, rate_hz, _ = opened(folders, kind)
    tokens, mask = encoder(**modality.load((noise(samples), rate_hz)))
    moments = tokens.shape[1] // bands
    assert mask[0].tolist() == ([True] * heard + [False] * (moments - heard)) * bands
    assert tokens.isfinite().all()


def test_a_clap_that_pads_in_another_way(folders, tmp_path):
    for padding, heard in (("repeat", 16000), ("repeatpad", 15000), ("pad", 5000)):
        make("clap")[0].save_pretrained(tmp_path)
        ClapFeatureExtractor(truncation="rand_trunc", padding=padding, **MELS).save_pretrained(tmp_path)
        loaded = Audio(Audio.Config(encoder=str(tmp_path))).load((noise(5000), 8000))
        assert loaded["num_samples"].tolist() == [heard]


@pytest.mark.parametrize("kind", KINDS)
def test_it_travels_to_the_workers_of_a_data_loader(folders, kind):
    modality = Audio(Audio.Config(encoder=str(folders / kind)))
    source = (noise(3000), 16000)
    expected = modality.load(source)
    again = pickle.loads(pickle.dumps(modality)).load(source)
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_silence_and_one_sample_are_finite(folders, kind):
    modality, encoder, rate_hz, window = opened(folders, kind)
    for sound in (0 * noise(window), noise(1), 0 * noise(1)):
        tokens, mask = encoder(**modality.load((sound, rate_hz)))
        assert tokens.isfinite().all() and mask.any(1).all()


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
@torch.no_grad()
def test_padding_does_not_reach_a_masked_waveform(folders, kind):
    modality, encoder, rate_hz, _ = opened(folders, kind)
    sound = noise(324 + 320 * 30)
    tokens, mask = encoder(**modality.load((sound, rate_hz)))
    expected = by_transformers(folders, kind, sound, rate_hz)
    assert len(expected) == 31 and (tokens[mask] - expected).abs().max() < 1e-5


@torch.no_grad()
def test_a_group_norm_gets_zeros_and_no_mask(folders):
    modality, encoder, rate_hz, window = opened(folders, "wav2vec2_group")
    sound = noise(40000)
    values = Wav2Vec2FeatureExtractor()(sound, sampling_rate=rate_hz, return_tensors="pt")["input_values"]
    padded = torch.nn.functional.pad(values, (0, window - len(sound)))
    model = Wav2Vec2Model.from_pretrained(folders / "wav2vec2_group").eval()
    tokens, mask = encoder(**modality.load((sound, rate_hz)))
    assert (tokens - model(padded).last_hidden_state).abs().max() < 1e-5 and not mask.all()


@pytest.mark.parametrize("kind", ["clap", "whisper", "wav2vec2", "beats"])
def test_an_encoder_of_half_precision_hears_the_same(folders, kind):
    sources = [(noise(WINDOW[kind] + 999), 8000 if kind == "clap" else 16000), (noise(900), 16000)]
    features = {}
    for dtype in ("float32", "bfloat16"):
        config = xblip.testing.BranchConfig(
            "audio", {"encoder": str(folders / kind)}, {"kind": "linear"}, encoder_dtype=dtype
        )
        branch = xblip.testing.Branch.build(config, llm_width=8)
        assert {weight.dtype for weight in branch.encoder.parameters()} == {getattr(torch, dtype)}
        assert all(
            not part.is_floating_point() or part.dtype == torch.float32 for part in branch.read(sources[0]).values()
        )
        features[dtype] = branch.encode(sources)
    exact, rough = features.values()
    assert torch.equal(exact.mask, rough.mask) and rough.values.isfinite().all()
    near = torch.nn.functional.cosine_similarity(exact.values, rough.values.float(), dim=2)
    assert near[exact.mask].min() > 0.98


def test_a_mask_for_training_alone_may_be_missing(folders, tmp_path):
    """Published wav2vec 2.0 models that were tuned for speech recognition lack it."""
    for file in (folders / "wav2vec2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["masked_spec_embed"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    states = [Audio(Audio.Config(encoder=str(tmp_path))).build_encoder().state_dict() for _ in range(2)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_extractors_of_another_encoder_are_named(folders, tmp_path):
    wrong = {
        "clap": (clap(fused=True)[1], "takes 16 mel bins without fusion, .* makes 16 mel bins with fusion"),
        "whisper": (WhisperFeatureExtractor(), "takes 100 frames of 16 mel bins, .* makes 3000 frames of 80 mel bins"),
        "beats": (BeatsFeatureExtractor(), "takes 64 frames of 32 mel bins, .* makes 512 frames of 128 mel bins"),
        "hubert": (BeatsFeatureExtractor(), "BeatsFeatureExtractor. Expected Wav2Vec2FeatureExtractor, the"),
    }
    for kind, (extractor, message) in wrong.items():
        make(kind)[0].save_pretrained(tmp_path / kind)
        extractor.save_pretrained(tmp_path / kind)
        with pytest.raises(xblip.BundleError, match=message):
            Audio(Audio.Config(encoder=str(tmp_path / kind))).build_encoder()
