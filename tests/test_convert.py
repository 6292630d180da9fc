"""Converting checkpoints: every weight comes across or is named, and what does not fit is refused."""

import pytest
import torch
from kit import ONE, make_branch, registered
from safetensors.torch import load_file

from xblip.branch import Branch
from xblip.convert import convert
from xblip.convert_qformer import Wanted
from xblip.errors import BundleError, PluginError
from xblip.testing import ToyModality, toy_tokenizer

SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, intermediate_size=96, num_query_tokens=4)


def lavis_names(weights: dict, prefix: str) -> dict:
    """Our names of a bridge's weights as LAVIS has them."""
    start = f"{prefix}_" if prefix else ""
    result = {}
    for name, value in weights.items():
        name = name.replace(".attention.attention.", ".attention.self.")
        name = name.replace(".crossattention.attention.", ".crossattention.self.")
        name = name.replace("embeddings.layernorm", "embeddings.LayerNorm")
        for ours, theirs in (
            ("qformer.", "Qformer.bert."),
            ("layer_norm.", "ln." if prefix else "ln_vision."),
            ("projector.", "llm_proj."),
        ):
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        result[start + name] = value
    return result


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A Q-Former's tokenizer before BLIP-2 adds its token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def branch(llm, tokenizer, tmp_path):
    """A branch as X-InstructBLIP trains one: 64-wide heads, `[DEC]` in the tokenizer."""
    known = toy_tokenizer()
    known.add_special_tokens({"bos_token": "[DEC]"})
    known.save_pretrained(tmp_path / "dec")
    with registered(ToyModality):
        yield make_branch(
            ToyModality, llm, bridge=dict(SIZES, max_segments=0, tokenizer=str(tmp_path / "dec")), cue=" toy: "
        )


@pytest.fixture
def wanted(llm_folder, tokenizer):
    return Wanted(llm=str(llm_folder), tokenizer=tokenizer)


def saved(path, weights: dict, **beside):
    torch.save({"model": weights, "iters": 5, **beside}, path)
    return path


EXTRA = {
    "toy_Qformer.bert.embeddings.position_ids": torch.arange(512)[None],
    "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "toy_encoder.point_encoder.encoder.first_conv.1.running_mean": torch.ones(4),
}


def test_a_branch_of_x_instructblip(branch, llm, wanted, tmp_path):
    weights = lavis_names(branch.bridge.state_dict(), "toy")
    report = convert(saved(tmp_path / "toy.pth", weights | EXTRA), tmp_path / "out", wanted)
    assert report.made == "branch: toy" and report.loaded == len(weights) and set(report.left_out) == set(EXTRA)
    converted = Branch.load(tmp_path / "out", llm=llm).eval()
    assert converted.cue == " toy: "
    for instruction in ("what is this ?", "describe it"):
        left, right = (one([ONE], [instruction])[0] for one in (branch, converted))
        assert torch.equal(left, right)


def test_only_chooses_among_modalities(branch, wanted, tmp_path):
    weights = lavis_names(branch.bridge.state_dict(), "toy")
    both = weights | {name.replace("toy_", "other_"): value for name, value in weights.items()}
    path = saved(tmp_path / "both.pth", both)
    with pytest.raises(BundleError, match="holds other, toy: say which modality it is for by --only NAME"):
        convert(path, tmp_path / "out", wanted)
    wanted.only = "toy"
    assert len(convert(path, tmp_path / "out", wanted).left_out) == len(weights)
    wanted.only = "toi"
    with pytest.raises(PluginError, match='Did you mean "toy"'):
        convert(path, tmp_path / "other", wanted)


def test_initial_weights_of_blip2(branch, tmp_path):
    weights = lavis_names({name: value for name, value in branch.bridge.state_dict().items() if "proj" not in name}, "")
    extra = {"Qformer.cls.predictions.bias": torch.ones(3), "temp": torch.ones(()), "vision_proj.weight": torch.ones(2)}
    extra |= {
        "text_proj.bias": torch.ones(2),
        "itm_head.weight": torch.ones(2),
        "visual_encoder.cls_token": torch.ones(1),
    }
    report = convert(saved(tmp_path / "blip2.pth", weights | extra), tmp_path / "out")
    assert report.made == "initial weights" and set(report.left_out) == set(extra)
    assert report.families()["visual_encoder"] == (1, "of the encoder, which is given as its own folder")
    written = load_file(tmp_path / "out" / "bridge.safetensors")
    assert set(written) == {name for name in branch.bridge.state_dict() if "proj" not in name}


def test_initial_weights_of_bert(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96)
    for model, name in ((BertModel(config), "bare"), (BertForMaskedLM(config), "lm")):
        model.save_pretrained(tmp_path / name)
        report = convert(tmp_path / name, tmp_path / f"{name}-out")
        written = load_file(tmp_path / f"{name}-out" / "bridge.safetensors")
        bert = getattr(model, "bert", model)
        layer = bert.encoder.layer[1]
        assert torch.equal(written["qformer.encoder.layer.1.attention.attention.query.weight"],
                           layer.attention.self.query.weight)  # fmt: skip
        for ours in ("intermediate", "intermediate_query"):
            assert torch.equal(written[f"qformer.encoder.layer.1.{ours}.dense.weight"], layer.intermediate.dense.weight)
        assert not any("crossattention" in name for name in written)
        assert any("token_type" in name for name in report.left_out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("toy_ln.bias"), r"not a whole bridge: layer_norm\.bias is missing"),
        (lambda weights: weights.pop("toy_query_tokens"), "query_tokens is missing"),
        (
            lambda weights: weights.pop("toy_Qformer.bert.encoder.layer.0.attention.self.query.weight"),
            "no Q-Former's: its first layer is missing",
        ),
        (lambda weights: weights.update(toy_speed=torch.ones(1)), "holds 1 weights that have no place here, .* toy_speed"),
        (
            lambda weights: weights.update({"toy_llm_proj.weight": torch.ones(51, 64), "toy_llm_proj.bias": torch.ones(51)}),
            r"was made for a width of 51, and the LLM .* has 32: give the one that it was trained with",
        ),
        (lambda weights: weights.update({"toy_ln.weight": torch.ones(9)}), "was made for a width of 9, and the encoder"),
        (
            lambda weights: weights.update({"toy_Qformer.bert.embeddings.word_embeddings.weight": torch.ones(7, 64)}),
            r"word_embeddings\.weight has shape \(7, 64\) instead of \(\d+, 64\)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_written(branch, wanted, tmp_path, change, message):
    weights = lavis_names(branch.bridge.state_dict(), "toy")
    change(weights)
    with pytest.raises(BundleError, match=message):
        convert(saved(tmp_path / "toy.pth", weights), tmp_path / "out", wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dec", "toy.pth"]


def test_a_bridge_that_names_no_modality_asks_for_it(branch, wanted, tmp_path):
    weights = lavis_names(branch.bridge.state_dict(), "")
    with pytest.raises(BundleError, match="one bridge that names no modality: say which modality it is for by --only"):
        convert(saved(tmp_path / "x.pth", weights), tmp_path / "out", wanted)
    wanted.only = "toy"
    assert convert(tmp_path / "x.pth", tmp_path / "out", wanted).made == "branch: toy"


@pytest.mark.parametrize(
    ("names", "guess"),
    [
        (["model.embed_tokens.weight", "lm_head.weight"], "an LLM; llm.source takes the folder"),
        (["visual.proj", "text.proj"], "a model of pictures and texts"),
        (["bert.pooler.dense.weight"], "a BERT"),
        (["query_tokens", "projector.weight"], "a bridge of xblip"),
        (["x.y"], "nothing that is known"),
    ],
)
def test_another_architecture_is_said_to_be_what_it_looks_like(site, toy, tmp_path, names, guess):
    path = saved(tmp_path / "x.pth", {name: torch.ones(1) for name in names})
    with pytest.raises(
        BundleError, match=f"no checkpoint that toy can convert: its weights begin with .* It looks like {guess}"
    ):
        convert(path, tmp_path / "out")


def test_a_class_that_nobody_knows_is_named(tmp_path, llm_folder):
    with pytest.raises(BundleError, match='Models of the class "LlamaForCausalLM" cannot be converted'):
        convert(llm_folder, tmp_path / "out")


def test_what_is_there_is_never_overwritten(tmp_path, llm_folder):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(BundleError, match="is there already: give a folder that is empty or new"):
            convert(llm_folder, target)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
