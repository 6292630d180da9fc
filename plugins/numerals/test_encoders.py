"""Encoders train on what the plugins load, and come back in their plugins."""

import json

import pytest
import torch
from xblip_numerals.media import FACTS
from xblip_numerals.sources import SourcesError
from xblip_numerals.train_encoders import RECIPES, Readout, train

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


@pytest.mark.parametrize("name", RECIPES)
def test_encoder_trains_and_loads_in_its_plugin(world, name, tmp_path):
    accuracy = train(name, world=world, out=tmp_path, epochs=1)
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert report["val"] == accuracy and set(FACTS[name]) <= set(accuracy)
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
