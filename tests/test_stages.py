"""The stages of training: align without an LLM, generate from captions, instruct; each goes on from the one before."""

import json
from pathlib import Path

import pytest
import torch
from kit import train_whole_and_broken
from safetensors.torch import load_file

from xblip.align import AlignConfig
from xblip.contrast import MomentumConfig
from xblip.errors import ConfigError, InputError
from xblip.initial import InitConfig
from xblip.llm import LLMConfig
from xblip.model import XBlip
from xblip.retrieval import Retriever
from xblip.sample import Sample
from xblip.train import train

SIGNS = {(1, 1): "red one", (1, -1): "red two", (-1, 1): "green one", (-1, -1): "green two"}


@pytest.fixture
def captions(config, manifest):
    """A config that learns from captions, which tell the signs of two numbers."""
    draw = torch.Generator().manual_seed(1)
    with manifest.open("w") as file:
        for values in torch.randn(64, 4, generator=draw).sign() * 1.5:
            sign = (int(values[0].sign()), int(values[1].sign()))
            file.write(json.dumps({"toy": values.tolist(), "caption": SIGNS[sign]}) + "\n")
    config.branch.bridge["max_segments"] = 0
    config.training |= {"save_strategy": "no", "logging_steps": 20}
    return config


def folder_of(config) -> Path:
    return Path(config.training["output_dir"])


@pytest.mark.slow
def test_align_then_generate_then_instruct(captions, manifest, tmp_path, llm_folder, capsys):
    captions.stage = "align"
    captions.training |= {"output_dir": str(tmp_path / "align"), "max_steps": 100, "learning_rate": 2e-3}
    metrics = train(captions)
    assert metrics["eval_text_recall_at_1"] > 0.9 and metrics["eval_media_recall_at_1"] > 0.6
    shown = " ".join(capsys.readouterr().out.split())
    assert "LlamaForCausalLM" not in shown and "toy from nothing" in shown
    log = json.loads((tmp_path / "align" / "trainer_state.json").read_text())["log_history"]
    assert {"itc", "itm", "itg", "temperature"} <= {name for entry in log for name in entry}
    retriever = Retriever.from_pretrained(tmp_path / "align")
    (ranked,) = retriever.rank_texts([[1.5, -1.5, 1.5, 1.5]], list(SIGNS.values()), top_k=1)
    assert list(SIGNS.values())[ranked[0].index] == "red two"

    captions.stage, captions.init = "generate", InitConfig(str(tmp_path / "align"))
    captions.training |= {"output_dir": str(tmp_path / "generate"), "max_steps": 80, "learning_rate": 5e-3}
    metrics = train(captions)
    assert metrics["eval_accuracy"] > 0.9
    shown = " ".join(capsys.readouterr().out.split())
    assert "fresh: projector (2); left out:" in shown and "language_head" in shown and "matching_head" in shown

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    with manifest.open("w") as file:
        for row in rows:
            asked = {"toy": row["toy"], "question": "what number is this ?", "answer": row["caption"].split()[1]}
            file.write(json.dumps(asked) + "\n")
    captions.stage, captions.init = "instruct", InitConfig(str(tmp_path / "generate"))
    captions.training |= {"output_dir": str(tmp_path / "instruct"), "max_steps": 30}
    assert train(captions)["eval_accuracy"] > 0.9
    assert "fresh" not in capsys.readouterr().out
    model = XBlip.compose(llm=llm_folder, branches={"toy": tmp_path / "instruct"})
    assert model.ask("what number is this ?", toy=[1.5, -1.5, 1, 1], max_new_tokens=1).text == "two"


def test_captions_ask_for_templates_where_instructions_are_learnt(captions, tmp_path):
    with pytest.raises(ConfigError, match="stage instruct needs one"):
        train(captions)
    (tmp_path / "toy.yaml").write_text("caption: [describe it, what is this ?]\n")
    captions.data.templates = {"toy": str(tmp_path / "toy.yaml")}
    captions.training["max_steps"] = 2
    train(captions)


@pytest.mark.slow
def test_an_encoder_decoder_is_given_the_beginning_of_captions(captions, t5_folder, tmp_path, monkeypatch):
    seen: list[Sample] = []
    forward = XBlip.forward

    def noted(self, samples):
        seen.extend(samples)
        return forward(self, samples)

    monkeypatch.setattr(XBlip, "forward", noted)
    captions.stage, captions.llm = "generate", LLMConfig(source=str(t5_folder), dtype="float32")
    captions.training["max_steps"] = 2
    train(captions)
    assert {tuple(sample.media[1:]) for sample in seen} == {("red",), ("green",)}
    assert {sample.answer for sample in seen} == {"one", "two"}


@pytest.mark.slow
def test_momentum_distillation_is_resumed_exactly(captions):
    captions.stage = "align"
    captions.align = AlignConfig(momentum=MomentumConfig(queue_size=32))
    captions.data.eval = None
    folders = train_whole_and_broken(captions, steps=6)
    for file in ("bridge.safetensors", "task.safetensors"):
        whole, resumed = (load_file(folder / "checkpoint-6" / file) for folder in folders)
        assert whole and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (folders[0] / "task.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "aling"}, 'Unknown stage "aling". Did you mean "align"'),
        ({"llm": None, "stage": "generate"}, "The stage generate learns through an LLM: name its folder"),
        ({"stage": "align", "shard_llm": True}, "align has no LLM that shard_llm could spread"),
        (
            {"shard_llm": True, "stage": "generate"},
            "shard_llm spreads the LLM over several processes, and this run has one",
        ),
        ({"stage": "align", "training": {"gradient_checkpointing": True}}, "gradient_checkpointing is for the LLM"),
        ({"stage": "align", "align": AlignConfig(itc=0, itm=0, itg=0)}, "The weights of the losses"),
    ],
)
def test_stages_that_cannot_be_are_one_clear_error(captions, change, message):
    for name, value in change.items():
        setattr(captions, name, captions.training | value if name == "training" else value)
    with pytest.raises(ConfigError, match=message):
        train(captions)


def test_rows_with_two_inputs_cannot_be_aligned(captions, manifest):
    row = json.loads(manifest.read_text().splitlines()[0])
    manifest.write_text(json.dumps({"media": [["toy", row["toy"]]] * 2, "caption": "red one"}) + "\n")
    captions.stage = "align"
    with pytest.raises(InputError, match=r"train\.jsonl, line 1: the stage align takes one input"):
        train(captions)


@pytest.mark.slow
def test_a_stream_trains_and_goes_on_where_it_was(captions):
    captions.stage = "generate"
    captions.data.streaming = True
    captions.data.eval = None
    folders = train_whole_and_broken(captions, steps=6)
    whole, resumed = (load_file(folder / "bridge.safetensors") for folder in folders)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stream_goes_on_in_as_many_readers_alone(captions):
    captions.stage, captions.data.streaming, captions.data.eval = "generate", True, None
    captions.training |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    train(captions)
    captions.training |= {"max_steps": 4, "dataloader_num_workers": 2}
    with pytest.raises(ConfigError, match="dataloader_num_workers was 0, is 2"):
        train(captions, resume=True)


def test_a_stream_without_an_end_is_refused(captions):
    captions.data.streaming, captions.stage = True, "generate"
    del captions.training["max_steps"]
    with pytest.raises(ConfigError, match="data.streaming: a stream has no end that is known: say training.max_steps"):
        train(captions)
