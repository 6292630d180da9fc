"""BLIP-2's retrieval model of transformers, converted: the same scores as its original."""

import shutil

import numpy as np
import pytest
import torch
from families import build_retrieval

from xblip.convert import convert
from xblip.convert_qformer import Wanted
from xblip.errors import XBlipError
from xblip.retrieval import Retriever

TEXTS = ["red", "which one is the larger number , the input or this ?", "describe it"]
PICTURES = [np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8) for seed in range(3)]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "prefixed"])
def pair(request, tmp_path_factory):
    """Their model with what it takes of a batch of three, and ours, converted from the folder it was saved in."""
    root = tmp_path_factory.mktemp("retrieval")
    model, processor = build_retrieval(root / "theirs", prefixed=request.param)
    report = convert(root / "theirs", root / "ours")
    assert report.made == "retriever: image" and report.loaded > 100 and not report.left_out
    given = processor(images=PICTURES, text=TEXTS, padding=True, padding_side="right", return_tensors="pt")
    return model, given, Retriever.from_pretrained(root / "ours")


@torch.no_grad()
def test_similarities(pair, measure):
    theirs, given, ours = pair
    expected = theirs(**given, use_image_text_matching_head=False).logits_per_image
    actual = ours.similarity(PICTURES, TEXTS)
    assert expected.shape == actual.shape == (3, 3) and expected.std() > 0.01
    assert measure("blip2-retrieval", "ITC", (actual - expected).abs().max().item()) <= 1e-4


@torch.no_grad()
def test_matches(pair, measure):
    theirs, given, ours = pair
    expected = theirs(**given, use_image_text_matching_head=True).logits_per_image
    actual = ours.branch.bridge(ours.branch.encode(PICTURES), TEXTS)
    assert expected.shape == actual.shape == (3, 2) and expected.std(0).min() > 0.01
    assert measure("blip2-retrieval", "ITM", (actual - expected).abs().max().item()) <= 1e-4
    assert (ours.match(PICTURES, TEXTS) - expected.softmax(-1)[:, 1]).abs().max() <= 1e-4


@pytest.mark.parametrize("qformer", [{"max_position_embeddings": 20}, {"vocab_size": 64}], ids=str)
@torch.no_grad()
def test_other_numbers_of_embeddings(qformer, tmp_path):
    theirs, processor = build_retrieval(tmp_path / "theirs", prefixed=False, **qformer)
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = Retriever.from_pretrained(tmp_path / "ours")
    given = processor(images=PICTURES, text=TEXTS, padding=True, padding_side="right", return_tensors="pt")
    expected = theirs(**given, use_image_text_matching_head=False).logits_per_image
    assert (ours.similarity(PICTURES, TEXTS) - expected).abs().max() <= 1e-4
    long = [*TEXTS[:2], "red " * 600 + "<image>"]
    assert ours.similarity(PICTURES, long).isfinite().all() and ours.match(PICTURES, long).isfinite().all()


def test_a_converted_folder_is_whole(tmp_path):
    build_retrieval(tmp_path / "theirs", prefixed=True)
    convert(tmp_path / "theirs", tmp_path / "ours")
    expected = Retriever.from_pretrained(tmp_path / "ours").similarity(PICTURES, TEXTS)
    shutil.rmtree(tmp_path / "theirs")
    (tmp_path / "ours").rename(tmp_path / "away")
    assert torch.equal(Retriever.from_pretrained(tmp_path / "away").similarity(PICTURES, TEXTS), expected)
    assert {path.name for path in (tmp_path / "away").iterdir()} == {
        "README.md", "bridge.safetensors", "encoder", "retriever.yaml", "tokenizer",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "qformer", "message"),
    [
        (Wanted(only="video"), {}, "reads the modality image alone, not video"),
        (Wanted(llm="somewhere"), {}, "has no use for --llm: leave them out"),
        (Wanted(), {"use_qformer_text_input": False}, "reads no texts: use_qformer_text_input is false"),
        (Wanted(), {"vocab_size": 30}, "knows 30 tokens, and the tokenizer beside it 43, one of them for media"),
    ],
    ids=["only", "llm", "no text", "tokenizer"],
)
def test_what_cannot_be_converted(wanted, qformer, message, tmp_path):
    build_retrieval(tmp_path / "theirs", prefixed=False, **qformer)
    with pytest.raises(XBlipError, match=message):
        convert(tmp_path / "theirs", tmp_path / "ours", wanted)
    assert not (tmp_path / "ours").exists()
