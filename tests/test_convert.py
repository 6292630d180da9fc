"""Converting checkpoints: which road each takes, what is reported, and what is refused, in exact words."""

import sys

import lavis
import pytest
import torch
from safetensors.torch import load_file, save_file

from xblip import cli
from xblip.branch import Branch
from xblip.convert import Report, convert
from xblip.errors import BundleError, ConfigError, PluginError

LEFT_OVER = {
    "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq": "of the LLM, which is given as its own folder",
    "toy_encoder.point_encoder.encoder.first_conv.1.running_mean": "of the encoder, which is given as its own folder",
}

AGAIN = "Copy it again, or choose a published one."


@pytest.fixture
def weights():
    """A bridge of X-InstructBLIP for the toy modality."""
    return lavis.values(lavis.bridge(**lavis.TOY, **lavis.SMALL))


def test_buffers_that_training_leaves_in_a_checkpoint_are_left_out(weights, wanted, tmp_path):
    buffers = {name: torch.ones(4) for name in LEFT_OVER}
    report = convert(lavis.saved(tmp_path / "toy.pth", weights | buffers), tmp_path / "out", wanted)
    assert report.left_out == LEFT_OVER | {"toy_Qformer.bert.embeddings.position_ids": "a constant that is computed"}


def test_only_chooses_among_modalities(weights, wanted, tmp_path):
    both = weights | {name.replace("toy_", "other_"): value for name, value in weights.items()}
    path = lavis.saved(tmp_path / "both.pth", both)
    wanted.only = "toy"
    report = convert(path, tmp_path / "out", wanted)
    others = [name for name, why in report.left_out.items() if why == "of other, which is converted by --only"]
    assert len(others) == len(weights)
    wanted.only = "toi"
    with pytest.raises(PluginError, match='Did you mean "toy"'):
        convert(path, tmp_path / "other", wanted)


def test_without_an_llm_a_bridge_becomes_initial_weights(weights, wanted, tmp_path):
    wanted.llm = ""
    path = lavis.saved(tmp_path / "toy.pth", weights)
    assert convert(path, tmp_path / "out", wanted).made == "initial weights"
    assert torch.equal(load_file(tmp_path / "out" / "bridge.safetensors")["layer_norm.bias"], weights["toy_ln.bias"])


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
        head = {name for name in written if name.startswith("language_head.")}
        assert len(head) == (5 if name == "lm" else 0), "of masked language modelling, as BLIP-2 starts from"
        assert not head or torch.equal(written["language_head.bias"], model.cls.predictions.bias)
        others = {name for name in report.fresh if ".crossattention." not in name}
        assert others == {"query_tokens", "layer_norm", "projector"} and len(report.fresh) == 10 + len(others)


def test_a_bert_that_is_not_whole_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96)
    BertModel(config).save_pretrained(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    whole = load_file(file)
    for name, missing in (
        ("encoder.layer.1.attention.self.key.bias", "encoder.layer.1.attention.attention.key.bias"),
        ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    ):
        save_file({key: value for key, value in whole.items() if key != name}, file, metadata={"format": "pt"})
        with pytest.raises(BundleError) as raised:
            convert(tmp_path / "bert", tmp_path / "out")
        assert str(raised.value) == (
            f"The BERT in {tmp_path}/bert is not whole, or another version's: qformer.{missing} is missing. {AGAIN}"
        )


def test_the_report_counts_what_begins_alike():
    report = Report("branch: toy", 7, {}, {"a.x": "no use", "a.y": "no use", "a.z": "a constant", "b": "no use"})
    assert str(report).splitlines() == [
        "branch: toy", "loaded: 7 weights", "fresh: nothing", "left out: 2 weights of a, no use",
        "left out: 1 weights of a, a constant", "left out: 1 weights of b, no use",
    ]  # fmt: skip


@pytest.fixture
def command(monkeypatch):
    """Runs `xblip convert` with these arguments."""

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["xblip", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code

    return run


def test_the_command_prints_what_was_loaded_fresh_and_left_out(command, tmp_path, capsys):
    shapes = lavis.bridge(width=16, llm_width=32, **lavis.SMALL, text=False)
    shapes |= {"itm_head.bias": (2,), "visual_encoder.cls_token": (1, 1, 16)}
    weights = {name: value for name, value in lavis.values(shapes).items() if "llm_proj" not in name}
    command(lavis.saved(tmp_path / "blip2.pth", weights), tmp_path / "out")
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {tmp_path}/out: initial weights", f"loaded: {len(weights) - 2} weights",
        "fresh: 2 weights of projector, random until trained",
        "left out: 1 weights of visual_encoder, of the encoder, which is given as its own folder",
        "left out: 1 weights of Qformer, a constant that is computed",
    ]  # fmt: skip


def test_the_command_goes_to_transformers_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["xblip", "convert", str(tmp_path), str(tmp_path / "out"), "--to", "jax"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == 'error: Bundles are converted to "transformers", not to "jax".\n'


def test_the_command_takes_a_cue_that_is_empty(command, toy, llm, llm_folder, tmp_path):
    path = lavis.saved(tmp_path / "toy.pth", lavis.values(lavis.linear(**lavis.TOY)))
    command(path, tmp_path / "out", "--llm", llm_folder, "--cue", "")
    assert Branch.load(tmp_path / "out", llm=llm).cue == ""


def without(weights: dict, *ends: str) -> None:
    for name in [name for name in weights if name.endswith(ends)]:
        del weights[name]


REFUSED = {
    "a layer norm is missing": (
        lambda weights: without(weights, "toy_ln.weight", "toy_ln.bias"),
        "The bridge in {path} is not whole, or another version's: layer_norm.weight is missing. {again}",
    ),
    "a part of the layer norm is missing": (
        lambda weights: without(weights, "toy_ln.bias"),
        "The bridge in {path} is not whole, or another version's: layer_norm.bias is missing. {again}",
    ),
    "the projector is missing": (
        lambda weights: without(weights, "llm_proj.weight", "llm_proj.bias"),
        "The bridge in {path} is not whole, or another version's: projector.weight is missing; projector.bias is missing. "
        "{again}",
    ),
    "the queries are missing": (
        lambda weights: without(weights, "query_tokens"),
        "The bridge in {path} is not whole, or another version's: query_tokens is missing. {again}",
    ),
    "the first layer is missing": (
        lambda weights: without(weights, "layer.0.attention.self.query.weight"),
        "The bridge in {path} is not whole, or another version's: "
        "qformer.encoder.layer.0.attention.attention.query.weight is missing. {again}",
    ),
    "a middle layer is missing": (
        lambda weights: [weights.pop(name) for name in list(weights) if ".layer.1." in name],
        "The bridge in {path} is not whole, or another version's: "
        "qformer.encoder.layer.1.attention.attention.query.weight is missing; "
        "qformer.encoder.layer.1.attention.attention.query.bias is missing; "
        "qformer.encoder.layer.1.attention.attention.key.weight is missing; and 19 more. {again}",
    ),
    "a layer has a weight too many": (
        lambda weights: weights.update({"toy_Qformer.bert.encoder.layer.1.speed": torch.ones(1)}),
        "The bridge in {path} is not whole, or another version's: qformer.encoder.layer.1.speed has no place. {again}",
    ),
    "a weight is of another part": (
        lambda weights: weights.update(toy_speed=torch.ones(1)),
        "{path} holds 1 weights that have no place here, among them toy_speed: it is not what it was taken for, or another "
        "version of it.",
    ),
    "a vocabulary of another tokenizer": (
        lambda weights: weights.update({"toy_Qformer.bert.embeddings.word_embeddings.weight": torch.ones(7, 64)}),
        'The Q-Former knows 7 tokens, and "{llm}" has 43 with [DEC]: give the tokenizer that it was trained with by '
        "--tokenizer.",
    ),
    "a weight of another shape": (
        lambda weights: weights.update({"toy_Qformer.bert.embeddings.position_embeddings.weight": torch.ones(7, 64)}),
        "The bridge in {path} is not whole, or another version's: qformer.embeddings.position_embeddings.weight has shape "
        "(7, 64) instead of (512, 64). {again}",
    ),
    "a projector of 13B on an LLM of 7B": (
        lambda weights: weights.update(lavis.values({"toy_llm_proj.weight": (51, 64), "toy_llm_proj.bias": (51,)})),
        'The bridge in {path} was made for an LLM of width 51, and "{llm}" has 32: give the LLM that it was trained with.',
    ),
    "an encoder of another width": (
        lambda weights: weights.update(lavis.values(lavis.bridge("toy", width=9, llm_width=32, **lavis.SMALL))),
        "The bridge in {path} was made for an encoder of width 9, and the one of toy has 16: give the encoder that it was "
        "trained with.",
    ),
    "an LLM that was trained too": (
        lambda weights: weights.update({"llm_model.layers.0.q_proj.lora_A.weight": torch.ones(1)}),
        "{path} holds LoRA weights of its LLM, among them llm_model.layers.0.q_proj.lora_A.weight: its bridge speaks to an "
        "LLM that was trained with it, and would be read wrongly by a frozen one. Choose a checkpoint without LoRA.",
    ),
    "several modalities": (
        lambda weights: weights.update({name.replace("toy_", "beads_"): value for name, value in weights.items()}),
        "{path} holds beads, toy: say which modality to convert by --only NAME.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(weights, wanted, toys, tmp_path, case):
    change, message = REFUSED[case]
    change(weights)
    path = lavis.saved(tmp_path / "toy.pth", weights)
    with pytest.raises(BundleError) as raised:
        convert(path, tmp_path / "out", wanted)
    assert str(raised.value) == message.format(path=path, llm=wanted.llm, again=AGAIN)
    assert [left.name for left in tmp_path.iterdir()] == ["toy.pth"]


TOLD = {
    "another modality": (
        dict(only="beads"), "{path} holds toy, and nothing of beads: choose its own checkpoint."
    ),
    "no tokenizer": (
        dict(tokenizer="./none"),
        'Cannot load the Q-Former\'s tokenizer from "./none": no such folder; relative ones start at {here}. Give the '
        "folder of bert-base-uncased (tokenizer.json, tokenizer_config.json, vocab.txt) by --tokenizer.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_what_is_told_must_fit(weights, wanted, toys, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    change, message = TOLD[case]
    for name, value in change.items():
        setattr(wanted, name, value)
    path = lavis.saved(tmp_path / "toy.pth", weights)
    with pytest.raises(BundleError) as raised:
        convert(path, tmp_path / "out", wanted)
    assert str(raised.value) == message.format(path=path, here=tmp_path)


def test_what_a_source_has_no_use_for_is_refused(weights, wanted, tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path / "bert")
    path = lavis.saved(tmp_path / "toy.pth", weights)
    said = {}
    wanted.qformer = "anything"
    for source in (tmp_path / "bert", path):
        with pytest.raises(ConfigError) as raised:
            convert(source, tmp_path / "out", wanted)
        said[source.name] = str(raised.value)
    assert said == {
        "bert": f"{tmp_path}/bert is converted as it is, and has no use for --llm, --qformer, --tokenizer: leave them out.",
        "toy.pth": f"{path} holds the Q-Former of its own bridge: leave --qformer out.",
    }
    wanted.qformer, wanted.llm, wanted.cue = "", "", ""
    with pytest.raises(ConfigError) as raised:
        convert(path, tmp_path / "out", wanted)
    assert str(raised.value) == (
        f"{path} becomes a branch for an LLM: give it by --llm, or leave --encoder and --cue out for initial weights."
    )


def test_a_hub_id_that_cannot_be_reached_says_what_to_give(weights, wanted, tmp_path):
    path = lavis.saved(tmp_path / "toy.pth", weights)
    wanted.tokenizer = "bert-base-uncased"
    message = 'Cannot load the Q-Former\'s tokenizer from "bert-base-uncased": .* Give the folder of .* by --tokenizer'
    with pytest.raises(BundleError, match=message):
        convert(path, tmp_path / "out", wanted)
    wanted.tokenizer = wanted.llm
    wanted.llm = "lmsys/vicuna-7b-v1.1"
    with pytest.raises(BundleError, match=r'LLM .*"lmsys/vicuna-7b-v1\.1".*'):
        convert(path, tmp_path / "out", wanted)


def test_a_modality_that_is_not_installed_is_named(weights, wanted, tmp_path):
    path = lavis.saved(tmp_path / "x.pth", {name.replace("toy_", "touch_"): value for name, value in weights.items()})
    with pytest.raises(BundleError) as raised:
        convert(path, tmp_path / "out", wanted)
    assert (
        str(raised.value) == f"{path} holds touch, which no installed modality is called: install the plugin that is."
    )


def test_a_bridge_that_names_no_modality_asks_for_it(wanted, tmp_path):
    path = lavis.saved(tmp_path / "x.pth", lavis.values(lavis.bridge(width=16, llm_width=32, **lavis.SMALL)))
    with pytest.raises(BundleError) as raised:
        convert(path, tmp_path / "out", wanted)
    assert str(raised.value) == f"{path} holds one bridge that names no modality: say which it is for by --only NAME."


@pytest.mark.parametrize(
    ("prefix", "modality"), [("image", "image"), ("video", "video"), ("audio", "audio"), ("pc", "point_cloud")]
)
def test_an_encoder_is_asked_for_where_the_modality_has_one(wanted, tmp_path, prefix, modality):
    pytest.importorskip(f"xblip_{modality}")
    weights = lavis.values(lavis.bridge(prefix, width=16, llm_width=32, **lavis.SMALL))
    with pytest.raises(BundleError) as raised:
        convert(lavis.saved(tmp_path / "x.pth", weights), tmp_path / "out", wanted)
    assert str(raised.value) == f"A branch names its encoder: give the folder of the {modality} encoder by --encoder."


@pytest.mark.parametrize(
    ("names", "guess"),
    [
        (
            ["model.embed_tokens.weight", "lm_head.weight"],
            "an LLM; llm.source takes its folder as transformers saves it",
        ),
        (["visual.proj", "text.proj"], "a model of pictures and texts; give its folder as transformers saves it"),
        (["bert.pooler.dense.weight"], "a BERT; give its folder as transformers saves it"),
        (["query_tokens", "projector.weight"], "a bridge of xblip; compose takes the branch's folder"),
        (
            ["qformer.encoder.layer.0.x", "vision_model.y", "language_model.model.embed_tokens.weight"],
            "a model of transformers; give its whole folder, with config.json",
        ),
        (["model.mm_projector.0.weight"], "a projector of LLaVA; give the folder of the whole model from transformers"),
        (["x.y"], "nothing that is known"),
    ],
)
def test_another_architecture_is_said_to_be_what_it_looks_like(site, toy, tmp_path, names, guess):
    path = lavis.saved(tmp_path / "x.pth", {name: torch.ones(1) for name in names})
    with pytest.raises(BundleError) as raised:
        convert(path, tmp_path / "out")
    families = ", ".join(sorted({name.split(".")[0] for name in names}))
    assert str(raised.value) == (
        f"{path} is no checkpoint that toy can convert: its weights begin with {families}. It looks like {guess}."
    )


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
