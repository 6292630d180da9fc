"""Encoders train on what the plugins load, and come back in their plugins."""

import json

import pytest
import torch
from xblip_numerals import augment
from xblip_numerals.encoders import RECIPES, UNKNOWN, Readout
from xblip_numerals.examples import FRAMES_OF_A_VIDEO, read_examples
from xblip_numerals.media import FACTS, NO_SIGN_HAS
from xblip_numerals.pictures import PLACES
from xblip_numerals.sources import SourcesError
from xblip_numerals.train_encoders import train

import xblip


def test_readout_sees_neither_order_nor_masked_tokens():
    torch.manual_seed(0)
    readout = Readout(16, FACTS["audio"]).eval()
    tokens, mask = torch.randn(2, 6, 16), torch.tensor([[True] * 4 + [False] * 2] * 2)
    told = readout(tokens, mask)
    shuffled = tokens[:, [3, 1, 0, 2, 5, 4]]
    shuffled[:, 4:] += 7
    for fact, logits in readout(shuffled, mask).items():
        assert logits.allclose(told[fact], atol=1e-5)
    changed = readout(tokens + torch.eye(6, 16), mask)
    assert not changed["number"].allclose(told["number"], atol=1e-3)


def test_readout_of_a_video_sees_the_order_of_its_frames_alone():
    torch.manual_seed(0)
    readout = Readout(16, FACTS["video"], segments=3).eval()
    tokens = torch.randn(6, 5, 16)
    told = readout(tokens)
    assert told["speed"].shape == (2, 2)
    assert readout(tokens[:, [4, 2, 0, 1, 3]])["speed"].allclose(told["speed"], atol=1e-5)
    assert not readout(tokens[[1, 0, 2, 3, 4, 5]])["speed"][0].allclose(told["speed"][0], atol=1e-4)


def test_pictures_and_all_frames_of_a_video_are_varied_alike():
    torch.manual_seed(0)
    frames = torch.rand(2, 1, 3, 64, 64).mul(2).sub(1).expand(2, 4, 3, 64, 64)
    varied = augment.vary_images(frames, *torch.zeros(2, 2, dtype=torch.bool))
    assert varied.shape == frames.shape and not varied.allclose(frames, atol=0.1)
    assert (varied[:, 0] - varied[:, 3]).abs().mean() < 0.05, "only grain differs"


def test_hands_may_be_mirrored_and_their_places_with_them():
    torch.manual_seed(0)
    pictures = torch.full((32, 1, 3, 64, 64), -1.0)
    pictures[..., :20] = 1.0
    kinds, left, right = torch.arange(32) % 2, PLACES.index("left"), PLACES.index("right")
    varied, labels = RECIPES["image"].vary(
        {"pixel_values": pictures}, {"kind": kinds, "place": torch.full((32,), left)}, 0
    )
    bright = varied["pixel_values"].mean((1, 2, 3)).unflatten(1, (2, 32)).mean(2)
    is_left = bright[:, 0] > bright[:, 1]
    assert labels["place"].equal(torch.where(is_left, left, right))
    assert is_left[kinds == 0].all() and 0 < is_left[kinds == 1].sum() < 16, "writing is not mirrored"


def test_varied_spectrograms_stay_padded_and_as_loud():
    torch.manual_seed(0)
    pad = -augment.AUDIO_MEAN / (2 * augment.AUDIO_STD)
    loud, quiet = torch.full((16, 100, 32), 0.5), torch.full((16, 100, 32), 0.5 - 0.31)
    for clips in (loud, quiet):
        clips[:, 60:] = pad
    (first, frames), (second, _) = (
        augment.vary_spectrograms(clips, torch.full((16,), 60), torch.ones(16).bool()) for clips in (loud, quiet)
    )
    assert all((clip[count:] == pad).all() for clip, count in zip(first, frames, strict=True))
    assert frames.min() >= 50 and frames.max() <= 100
    assert first[:, 25:50].median() - second[:, 25:50].median() > 0.2


def test_voices_made_strange_lose_their_names_and_robots_stay_robots():
    torch.manual_seed(0)
    speakers = torch.arange(6).repeat(20)
    clips = {"input_values": torch.zeros(120, 1, 60, 32), "num_frames": torch.full((120, 1), 60)}
    tensors, labels = RECIPES["audio"].vary(clips, {"speaker": speakers, "number": speakers}, 0.5)
    assert tensors["input_values"].shape == (120, 1, 60, 32) and labels["number"].equal(speakers)
    nameless = labels["speaker"] == UNKNOWN
    assert 20 < nameless.sum() < 50 and not nameless[speakers == 5].any()
    assert labels["speaker"][~nameless].equal(speakers[~nameless])


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTS)
def test_examples_are_what_the_plugin_loads(world, name, tmp_path):
    recipe = RECIPES["image" if name == "video" else name]
    recipe.save_fresh(tmp_path)
    examples = read_examples(world, "val", name, tmp_path)
    assert len(examples) == 20 and set(examples.labels) == set(FACTS[name])
    assert examples.segments == (FRAMES_OF_A_VIDEO if name == "video" else 1)
    for fact, labels in examples.labels.items():
        assert (labels.max() < len(FACTS[name][fact])) and (
            (labels < 0).any() == (fact in NO_SIGN_HAS and name == "image")
        )
    first = examples.first(3)
    assert len(first) == 3 and all(len(part) == 3 for part in (*first.tensors.values(), *first.labels.values()))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.slow
def test_encoder_trains_and_loads_in_its_plugin(world, name, tmp_path):
    accuracy = train(name, world=world, out=tmp_path, epochs=1)
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert report["val"] == accuracy and set(FACTS[name]) <= set(accuracy) <= set(report["train"])
    assert ("video speed" in accuracy) == (name == "image")
    assert 100_000 < report["parameters"] < 1_000_000
    kind = xblip.plugins.get("modality", name)
    modality = kind(kind.Config(encoder=str(tmp_path)))
    encoder = modality.build_encoder()
    assert {weights.dtype for weights in encoder.parameters()} == {torch.float16}
    rows = map(json.loads, (world / "test" / "manifest.jsonl").read_text().splitlines())
    row = next(row for row in rows if row["modality"] == name)
    tokens = encoder.float().eval()(**modality.load(world / "test" / row["path"]))
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    assert tokens.shape[0] == 1 and 16 <= tokens.shape[1] <= 64 and tokens.shape[2] == encoder.width
    assert tokens.isfinite().all()


def test_missing_world_says_how_to_build_it(tmp_path):
    with pytest.raises(SourcesError, match="Build the world first: python -m xblip_numerals.media"):
        train("image", world=tmp_path, out=tmp_path / "out")
