"""What is wrong with a config is told before anything is downloaded or read."""

import shutil

import pytest
import torch
import yaml
from far import ARCHITECTURES, TOKENIZER, far, pictures
from kit import make_model
from safetensors.torch import save_file

import xblip
from xblip.doctor import examine
from xblip.errors import XBlipError
from xblip.testing import small_qformer

pytestmark = pytest.mark.filterwarnings("ignore::xblip.errors.UnknownWordsWarning")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (pictures(image=far(kind="qfromer")), 'No bridge is called "qfromer". Did you mean "qformer"?'),
        (
            pictures(image={**far(), "encodr_dtype": "float16"}),
            'Unknown key "branches.image.encodr_dtype". Did you mean',
        ),
        (pictures(image=far(kind="mlp", hidden=3)), 'Unknown key "image.bridge.hidden". Did you mean "hidden_size"?'),
        (pictures(imagee=far()), 'No modality is called "imagee". Did you mean "image"?'),
        (pictures(image={**far(), "modality": "video"}), 'branches.image describes a branch of "video"'),
        (pictures(image=3), '"branches.image" must hold keys with values, not 3'),
        ({**pictures(), "branches": 3}, "branches must be a list of folders, or name each modality's folder"),
        (
            pictures(image=far("far/unknown")),
            'There is nothing of "far/unknown", the image encoder, on this machine, and the config does not say what it '
            'holds: get it, or describe it in the config under architectures."far/unknown"',
        ),
        (pictures("far/unknown"), 'There is nothing of "far/unknown", the LLM, on this machine'),
        (
            pictures(image=far(**small_qformer("nowhere"))),
            'There is nothing of "nowhere", the image tokenizer, on this machine',
        ),
        (
            {**pictures(), "architectures": {"far/llama": {"confg": {}}}},
            'Unknown key "architectures."far/llama".confg". Did you mean "config"?',
        ),
        (
            {**pictures(), "architectures": {"far/llama": {"tokenizer": {"eos_token": "</s>"}}}},
            'architectures."far/llama".tokenizer.size must be the number of tokens it knows, at least 2, not 0',
        ),
        (
            {**pictures(), "architectures": {"far/llama": {"tokenizer": {"size": 9, "ends_texts": True}}}},
            'architectures."far/llama".tokenizer.ends_texts needs an eos_token',
        ),
        (
            {**pictures(), "architectures": {"far/llama": {"tokenizer": {"size": 9, "eos_tokn": "</s>"}}}},
            'Unknown key "architectures."far/llama".tokenizer.eos_tokn". Did you mean "eos_token"?',
        ),
        (
            {**pictures(), "architectures": {**ARCHITECTURES, "far/llama": {"tokenizer": TOKENIZER}}},
            'Cannot load the LLM "far/llama": ',
        ),
        (
            {
                **pictures(),
                "architectures": {**ARCHITECTURES, "far/vit": {"config": ARCHITECTURES["far/vit"]["config"]}},
            },
            'Cannot load the image processor of "far/vit"',
        ),
        ({"router": {"cues": False}}, "is no config of a model: it names no llm. Expected a model config"),
        ({**pictures(), "routr": {}}, 'Unknown key "model.yaml.routr". Did you mean "router"?'),
        (pictures(image="nowhere"), "There is no branch in"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_config_is_told(write, changes, message):
    with pytest.raises(XBlipError) as caught:
        examine(write(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "fp16"}, 'Unknown dtype "fp16". Known'), ({"batch_size": 0}, "batch_size must be at least 1, not 0")],
)
def test_wrong_options_are_told(write, options, message):
    with pytest.raises(XBlipError, match=message):
        examine(write(**pictures()), **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", 'No config file at "nowhere.yaml"'),
        ("nowhere", 'No model is called "nowhere"'),
        ("nobody/nothing", 'There is no "nobody/nothing" on this machine'),
    ],
)
def test_what_is_not_here_is_not_downloaded(name, message):
    with pytest.raises(XBlipError, match=message):
        examine(name)


def test_a_qformer_for_an_encoder_of_another_width_is_refused(write, tmp_path):
    folder = tmp_path / "qformer"
    folder.mkdir()
    save_file({"layer_norm.weight": torch.zeros(99)}, folder / "bridge.safetensors")
    bridge = {"kind": "frozen_qformer", "qformer": str(folder), "num_hidden_layers": 1}
    with pytest.raises(XBlipError, match="does not fit the settings of this bridge"):
        examine(write(**pictures(image=far(**bridge))))


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("encoder", "trained for an encoder of width 99; the one named has 16"),
        ("llm", "for an LLM of width 99"),
    ],
)
def test_a_saved_branch_for_other_widths_is_refused(llm, tmp_path, part, message):
    make_model(llm).save_pretrained(tmp_path / "bundle")
    file = tmp_path / "bundle" / "toy" / "branch.yaml"
    saved = yaml.safe_load(file.read_text())
    saved[part]["width"] = 99
    file.write_text(yaml.safe_dump(saved))
    with pytest.raises(XBlipError, match=message):
        examine(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle")


@pytest.mark.usefixtures("toys")
def test_weights_of_another_shape_are_refused_unread(llm, tmp_path):
    make_model(llm).save_pretrained(tmp_path / "bundle")
    save_file({"query_tokens": torch.zeros(1)}, tmp_path / "bundle" / "toy" / "bridge.safetensors")
    with pytest.raises(XBlipError, match=r"does not fit its branch\.yaml"):
        examine(tmp_path / "bundle")


def test_a_described_branch_is_not_loaded(write):
    with pytest.raises(
        XBlipError, match='only describes its branch "image".*xblip train.*branches.image.*xblip convert'
    ):
        xblip.load(write(**pictures()))
