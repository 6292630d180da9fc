"""Prompts as embeddings: another runner of the LLM says from them what the model says."""

import pytest
import torch
from kit import BEADS, ONE, TWO, make_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from xblip import BundleError, InputError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.sample import Media, Sample, Turn

SAMPLES = [
    Sample("what is this ?", [("toy", ONE)]),
    {"toy": TWO, "beads": BEADS, "instruction": "which one is larger ?"},
    Sample("and now ?", [], None, [Turn((Media("toy", ONE), "what is this ?"), "red")]),
]


@pytest.fixture
def model(llm):
    return make_model(llm)


def test_another_runner_of_the_llm_says_the_same_from_a_file(model, llm_folder, tmp_path):
    embeds = model.to_prompt_embeds(SAMPLES, tmp_path / "prompts.safetensors")
    other, tokenizer = AutoModelForCausalLM.from_pretrained(llm_folder), AutoTokenizer.from_pretrained(llm_folder)
    answers = model.generate(SAMPLES, max_new_tokens=8, do_sample=False)
    with safe_open(tmp_path / "prompts.safetensors", "pt") as file:
        assert len(file.keys()) == len(SAMPLES)
        assert file.metadata() == {"llm": str(llm_folder), "llm_fingerprint": model.llm.fingerprint}
        for index, answer in enumerate(answers):
            prompt = file.get_tensor(f"prompt_embeds.{index}")
            assert torch.equal(prompt, embeds[index]) and prompt.shape == (answer.num_prompt_tokens, model.llm.width)
            ids = other.generate(inputs_embeds=prompt[None], max_new_tokens=8, do_sample=False)
            assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == answer.text


def test_embeddings_have_the_llm_s_dtype(llm_folder):
    llm = FrozenLLM.from_pretrained(LLMConfig(source=str(llm_folder), dtype="bfloat16"))
    assert [prompt.dtype for prompt in make_model(llm).to_prompt_embeds(SAMPLES[:1])] == [torch.bfloat16]


def test_no_samples_have_no_prompts(model):
    assert model.to_prompt_embeds([]) == []


def test_an_encoder_decoder_has_no_such_prompts(t5_folder):
    model = make_model(FrozenLLM.from_pretrained(LLMConfig(source=str(t5_folder))))
    with pytest.raises(InputError, match="Prompt embeddings are for decoder-only LLMs"):
        model.to_prompt_embeds(SAMPLES)


@pytest.mark.parametrize(
    "samples, message",
    [("what is this ?", "Expected a list of samples"), ([Sample("so " * 300)], "too long for the LLM")],
)
def test_what_cannot_be_asked_is_refused(model, samples, message):
    with pytest.raises(InputError, match=message):
        model.to_prompt_embeds(samples)


def test_a_file_that_cannot_be_written_is_said(model, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(BundleError, match="Cannot write .*taken: Is a directory. Make room, or give another file."):
        model.to_prompt_embeds(SAMPLES, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
