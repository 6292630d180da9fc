"""BEATs: its sizes, its features, its masks, and what becomes of published checkpoints."""

import math

import numpy as np
import pytest
import torch
from sounds import noise
from torch.nn import functional as F
from torchaudio.compliance import kaldi
from transformers import AutoModel
from xblip_audio import Audio
from xblip_beats import BeatsConfig, BeatsFeatureExtractor, BeatsModel, relative_buckets

import xblip
from xblip.checkpoint import read

CLIP = 511 * 160 + 400  # samples of 512 frames
CFG = {  # the published settings, at small widths
    "input_patch_size": 16, "embed_dim": 24, "conv_bias": False, "encoder_layers": 3, "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48, "encoder_attention_heads": 2, "activation_fn": "gelu", "layer_norm_first": False,
    "deep_norm": True, "dropout": 0.0, "conv_pos": 8, "conv_pos_groups": 4, "relative_position_embedding": True,
    "num_buckets": 32, "max_distance": 80, "gru_rel_pos": True, "finetuned_model": False,
}  # fmt: skip


def published_tensors():
    """Random weights under all the names of a published file."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    def linear(name, width, to):
        return {f"{name}.weight": some(to, width), f"{name}.bias": some(to)}

    def norm(name, width):
        return {f"{name}.weight": 1 + some(width), f"{name}.bias": some(width)}

    tensors = {"patch_embedding.weight": some(24, 1, 16, 16), **norm("layer_norm", 24)}
    tensors |= {**linear("post_extract_proj", 24, 32), **norm("encoder.layer_norm", 32)}
    tensors |= {"encoder.pos_conv.0.weight_g": 1 + some(1, 1, 8), "encoder.pos_conv.0.weight_v": some(32, 8, 8)}
    tensors["encoder.pos_conv.0.bias"] = some(32)
    shared = some(32, 2)
    for place in range(3):
        layer = f"encoder.layers.{place}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            tensors |= linear(f"{layer}.self_attn.{name}", 32, 32)
        tensors |= linear(f"{layer}.self_attn.grep_linear", 16, 8)
        tensors[f"{layer}.self_attn.grep_a"] = 1 + some(1, 2, 1, 1)
        tensors[f"{layer}.self_attn.relative_attention_bias.weight"] = shared
        tensors |= {**linear(f"{layer}.fc1", 32, 48), **linear(f"{layer}.fc2", 48, 32)}
        tensors |= {**norm(f"{layer}.self_attn_layer_norm", 32), **norm(f"{layer}.final_layer_norm", 32)}
    return tensors


def reference(tensors, bank):
    """BEATs written down plainly from its paper's formulas: one clip's spectrogram (L, mel bins) to tokens (N, D)."""

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def bucket(offset):
        distance, side = abs(offset), 16 * (offset > 0)
        if distance < 8:
            return side + distance
        far = torch.log(torch.tensor(float(distance)) / 8) / math.log(80 / 8) * 8
        return side + min(15, 8 + int(far))

    patches = [
        bank[16 * moment : 16 * moment + 16, 16 * band : 16 * band + 16]
        for moment in range(len(bank) // 16) for band in range(bank.shape[1] // 16)
    ]  # fmt: skip
    x = torch.stack([(tensors["patch_embedding.weight"][:, 0] * patch).sum((1, 2)) for patch in patches])
    x = linear("post_extract_proj", norm("layer_norm", x))
    direction = tensors["encoder.pos_conv.0.weight_v"]
    kernel = tensors["encoder.pos_conv.0.weight_g"] * direction / direction.pow(2).sum((0, 1), keepdim=True).sqrt()
    places = F.conv1d(F.pad(x.T, (4, 3)), kernel, tensors["encoder.pos_conv.0.bias"], groups=4).T
    x = norm("encoder.layer_norm", x + F.gelu(places))
    buckets = torch.tensor([[bucket(key - query) for key in range(len(x))] for query in range(len(x))])
    bias = tensors["encoder.layers.0.self_attn.relative_attention_bias.weight"][buckets]
    for place in range(3):
        layer = f"encoder.layers.{place}"
        query, key, value = (linear(f"{layer}.self_attn.{name}_proj", x) for name in "qkv")
        heads = []
        for head in range(2):
            part = slice(16 * head, 16 * head + 16)
            gates = linear(f"{layer}.self_attn.grep_linear", query[:, part])
            first, second = gates[:, :4].sum(1).sigmoid(), gates[:, 4:].sum(1).sigmoid()
            gate = first * (second * tensors[f"{layer}.self_attn.grep_a"][0, head, 0, 0] - 1) + 2
            scores = query[:, part] @ key[:, part].T / 4 + gate[:, None] * bias[:, :, head]
            heads.append(scores.softmax(1) @ value[:, part])
        alpha = 6**0.25
        x = norm(
            f"{layer}.self_attn_layer_norm", alpha * x + linear(f"{layer}.self_attn.out_proj", torch.cat(heads, 1))
        )
        x = norm(f"{layer}.final_layer_norm", alpha * x + linear(f"{layer}.fc2", F.gelu(linear(f"{layer}.fc1", x))))
    return x


@pytest.fixture
def saved(tmp_path):
    """Writes a checkpoint with changes, and reads it."""

    def save(*, cfg=CFG, drop=(), **more):
        tensors = {name: tensor for name, tensor in {**published_tensors(), **more}.items() if name not in drop}
        torch.save({"model": tensors} | ({} if cfg is None else {"cfg": cfg}), tmp_path / "beats.pt")
        return read(tmp_path / "beats.pt")

    return save


@pytest.fixture
def converted(saved, tmp_path):
    """The folder of a converted checkpoint."""
    assert Audio.convert_encoder(saved(), tmp_path / "beats")
    return tmp_path / "beats"


def test_the_published_size():
    with torch.device("meta"):
        model = BeatsModel(BeatsConfig()).eval()
        values = torch.empty(2, 512, 128)
    assert model(values).last_hidden_state.shape == (2, 256, 768)
    assert sum(weight.numel() for weight in model.parameters()) == 90_311_792


def test_features_are_those_of_the_paper():
    sound = noise(CLIP)
    bank = kaldi.fbank(
        torch.from_numpy(sound)[None] * 2**15,
        num_mel_bins=128, sample_frequency=16000, frame_length=25, frame_shift=10,
    )  # fmt: skip
    made = BeatsFeatureExtractor()([sound, sound[:4000]], sampling_rate=16000)
    assert torch.allclose(made["input_values"][0], (bank - 15.41663) / (2 * 6.55582), atol=1e-6)
    assert made["attention_mask"].sum(1).tolist() == [512, 23]
    assert not made["input_values"][1, 23:].any() and made["input_values"].dtype == torch.float32
    with pytest.raises(ValueError, match="sampled at 8000 Hz; expected 16000 Hz"):
        BeatsFeatureExtractor()([sound], sampling_rate=8000)


@pytest.mark.slow
@torch.no_grad()
def test_a_converted_checkpoint_computes_what_the_paper_says(converted):
    modality = Audio(Audio.Config(encoder=str(converted)))
    encoder = modality.build_encoder().eval()
    loaded = modality.load((noise(CLIP), 16000))
    tokens, mask = encoder(**loaded)
    assert tokens.shape == (1, 256, 32) and encoder.width == 32 and mask.all()
    assert (tokens[0] - reference(published_tensors(), loaded["input_values"][0])).abs().max() < 1e-4


@torch.no_grad()
def test_padding_is_neither_attended_to_nor_real(converted):
    modality = Audio(Audio.Config(encoder=str(converted)))
    encoder = modality.build_encoder().eval()
    for frames, moments in ((1, 1), (16, 1), (17, 2), (40, 3)):
        loaded = modality.load((noise(240 + 160 * frames), 16000))
        tokens, mask = encoder(**loaded)
        assert mask[0].tolist() == [True] * 8 * moments + [False] * 8 * (32 - moments)
        expected = reference(published_tensors(), loaded["input_values"][0, : 16 * moments])
        assert (tokens[mask] - expected).abs().max() < 1e-4


def test_a_rest_of_a_frame_is_heard(converted):
    modality = Audio(Audio.Config(encoder=str(converted)))
    for samples, frames in ((1, [1]), (400, [1]), (401, [2]), (CLIP, [512]), (CLIP + 1, [512, 1])):
        assert modality.load((noise(samples), 16000))["attention_mask"].sum(1).tolist() == frames
    assert modality.load((np.zeros(CLIP, np.float32), 16000))["input_values"].isfinite().all()


def test_a_folder_comes_back(converted, tmp_path):
    model = AutoModel.from_pretrained(converted)
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again").state_dict()
    assert isinstance(model, BeatsModel) and set(again) == set(model.state_dict())
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_distances_are_sorted_finely_near_and_roughly_far():
    buckets = relative_buckets(900, num_buckets=320, max_distance=800)
    assert buckets[0, :4].tolist() == [0, 161, 162, 163] and buckets[:4, 0].tolist() == [0, 1, 2, 3]
    assert buckets[0, 79] == 239 and buckets[0, 80] == 240 and buckets[0, 800] == buckets[0, 899] == 319
    assert buckets[800:, 0].unique().tolist() == [159]


@pytest.mark.parametrize(("sizes", "message"), [
    ({"num_attention_heads": 5}, "hidden_size 768 is not a multiple of num_attention_heads 5"),
    ({"max_length": 100}, "max_length 100 is not a multiple of patch_size 16"),
])  # fmt: skip
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        BeatsConfig(**sizes)


def test_a_classifier_is_left_out(saved, tmp_path):
    checkpoint = saved(**{"predictor.weight": torch.zeros(527, 32), "predictor.bias": torch.zeros(527)})
    assert Audio.convert_encoder(checkpoint, tmp_path / "beats")
    checkpoint.check_all_used()
    assert "classifies" in checkpoint.left_out["predictor.weight"]
    assert "encoder.layers.2.self_attn.relative_attention_bias.weight" in checkpoint.left_out


def test_another_architecture_is_not_touched(tmp_path):
    torch.save({"cfg": {"width": 3}, "model": {"head.weight": torch.zeros(2)}}, tmp_path / "x.pt")
    checkpoint = read(tmp_path / "x.pt")
    assert not Audio.convert_encoder(checkpoint, tmp_path / "beats")
    assert not checkpoint.taken and not (tmp_path / "beats").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["encoder.layers.1.fc1.bias"]}, r"encoder\.layers\.1\.fc1\.bias is missing"),
        ({"drop": ["patch_embedding.weight"]}, r"patch_embedding\.weight is missing"),
        ({"quantize.embedding.weight": torch.zeros(3)}, r"quantize\.embedding\.weight has no place"),
        ({"layer_norm.bias": torch.zeros(3)}, r"layer_norm\.bias has shape \(3,\) instead of \(24,\)"),
        ({"cfg": None}, "lacks 16 settings of a BEATs in its cfg, among them activation_fn"),
        ({"cfg": {**CFG, "deep_norm": False}}, "is a BEATs with deep_norm False, of which only True is known"),
        ({"cfg": {**CFG, "encoder_attention_heads": 5}}, "settings that cannot be: .*not a multiple of num_attention"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_whole_or_not_known_is_refused(saved, tmp_path, change, message):
    with pytest.raises(xblip.BundleError, match=f"beats.pt .*{message}.*Expected a published BEATs"):
        Audio.convert_encoder(saved(**change), tmp_path / "beats")
    assert not (tmp_path / "beats").exists()


class Runs:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_cut_files_and_files_with_code_are_refused(saved, tmp_path, capsys):
    saved()
    path = tmp_path / "beats.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(xblip.BundleError, match="is damaged"):
        read(path)
    torch.save({"cfg": CFG, "model": published_tensors(), "x": Runs()}, path)
    with pytest.raises(xblip.BundleError, match="run its code"):
        read(path)
    assert "never" not in capsys.readouterr().out
