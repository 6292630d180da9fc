"""Models of transformers that do not become bundles, each with one clear error, and nothing written."""

import json
import shutil

import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file
from test_transformers_families import samples
from transformers import AutoTokenizer

from xblip.convert import convert
from xblip.convert_qformer import Wanted
from xblip.errors import BundleError
from xblip.model import XBlip


@pytest.fixture
def theirs(bundle, tmp_path):
    """A copy of their folder, to be spoilt."""
    return shutil.copytree(bundle.parent / "theirs", tmp_path / "theirs")


def settings(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, change in changes.items():
        config[name] = {**config[name], **change} if isinstance(change, dict) else change
    (folder / "config.json").write_text(json.dumps(config))


def weights(folder, *, without: str = "", more: str = "") -> None:
    found = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in found.items() if not without or not name.startswith(without)}
    save_file(kept | ({more: torch.ones(1)} if more else {}), folder / "model.safetensors", {"format": "pt"})


def cut(folder) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: weights(folder, without="query_tokens"), "it lacks 1 weights, among them query_tokens"),
        (lambda folder: weights(folder, without="qformer.encoder.layer.1"), r"lacks \d+ weights, among them qformer"),
        (lambda folder: weights(folder, more="qformer.lora"), "it holds 1 weights too many, among them qformer.lora"),
        (
            lambda folder: settings(folder, num_query_tokens=5),
            r"query_tokens has the shape \(1, 4, 32\), and config.json says \(1, 5, 32\)",
        ),
        (lambda folder: settings(folder, qformer_config={"hidden_act": "relu"}), "Its Q-Former has relu and"),
        (lambda folder: settings(folder, qformer_config={"layer_norm_eps": 1e-5}), "layer_norm_eps 1e-05"),
        (lambda folder: settings(folder, architectures=["NoSuchModel"]), 'class "NoSuchModel" cannot be converted'),
        (cut, r"model\.safetensors is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").unlink(), r"lacks config\.json"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            r"lacks 1 of its 1 files of weights, among them model",
        ),
        (lambda folder: shutil.rmtree(folder / "qformer_tokenizer"), "Its Q-Former knows 42 tokens, and the tokenizer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "Cannot load .*theirs by transformers"),
    ],
)
def test_a_spoilt_folder(theirs, tmp_path, spoil, message):
    spoil(theirs)
    with pytest.raises(BundleError, match=message) as error:
        convert(theirs, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_projector_that_is_not_llavas(tmp_path):
    build("llava-llama", tmp_path / "theirs")
    settings(tmp_path / "theirs", vision_feature_layer=[-2, -1])
    with pytest.raises(BundleError, match="Its projector reads the layers|has the shape"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    settings(tmp_path / "theirs", vision_feature_layer=-2, projector_hidden_act="relu")
    with pytest.raises(BundleError, match="Its projector reads the layers -2 with relu; expected one layer and gelu"):
        convert(tmp_path / "theirs", tmp_path / "ours")


def test_the_same_llm_may_be_taken_from_elsewhere(bundle, tmp_path):
    theirs = bundle.parent / "theirs"
    convert(theirs, tmp_path / "ours", Wanted(only="image", llm=str(bundle / "llm")))
    ours, copied = XBlip.from_pretrained(tmp_path / "ours"), XBlip.from_pretrained(bundle)
    assert ours.llm.fingerprint == copied.llm.fingerprint
    assert ours.generate(samples(ours)) == copied.generate(samples(copied))


def test_another_llm_or_modality_than_the_models_own_is_refused(bundle, llm_folder, tmp_path):
    theirs = bundle.parent / "theirs"
    with pytest.raises(BundleError, match="is not the one of this model: its weights differ. Leave --llm out"):
        convert(theirs, tmp_path / "ours", Wanted(llm=str(llm_folder)))
    with pytest.raises(BundleError, match="reads the modality image alone, not audio"):
        convert(theirs, tmp_path / "ours", Wanted(only="audio"))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_size_than_the_q_former_is_refused(bundle, tmp_path):
    theirs = shutil.copytree(bundle.parent / "theirs", tmp_path / "theirs")
    tokenizer = AutoTokenizer.from_pretrained(theirs / "qformer_tokenizer")
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(theirs / "qformer_tokenizer")
    with pytest.raises(BundleError, match=r"Its Q-Former knows 42 tokens, and the tokenizer beside it 43: save"):
        convert(theirs, tmp_path / "ours")
