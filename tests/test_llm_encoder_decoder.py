"""An encoder-decoder LLM: prompts go to its encoder, answers come from its decoder, as transformers' own T5 and BART do."""

import pytest
import torch
from kit import BEADS, LONG, ONE, assert_alike, eight, make_model
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from xblip.errors import InputError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.model import XBlip
from xblip.sample import Sample
from xblip.testing import toy_tokenizer

SIZES = {
    "t5": lambda vocabulary: T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, initializer_factor=2.0,
        )
    ),
    "bart": lambda vocabulary: BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocabulary, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, init_std=0.2,
            max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
            forced_eos_token_id=None, scale_embedding=True,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=SIZES)
def llm(request, tmp_path_factory) -> FrozenLLM:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    torch.manual_seed(0)
    SIZES[request.param](len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return FrozenLLM.from_pretrained(LLMConfig(source=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def model(llm) -> XBlip:
    return make_model(llm, bos="none")


def test_the_text_alone_is_asked_as_transformers_asks_it(llm, model):
    for words in ("what is this ?", "which one is the larger number , the input or this ?"):
        inputs = llm.tokenizer(words, return_tensors="pt").input_ids
        theirs = llm.model.generate(inputs, max_new_tokens=7, num_beams=3)[0, 1:]
        answer = model.ask(words, max_new_tokens=7, num_beams=3)
        assert answer.text == llm.tokenizer.decode(theirs, skip_special_tokens=True).strip()
        assert answer.num_prompt_tokens == inputs.shape[1]


def test_the_loss_is_transformers_own(llm, model):
    words, answer = "what is this ?", "the red one"
    theirs = llm.model(
        input_ids=llm.tokenizer(words, return_tensors="pt").input_ids,
        labels=llm.tokenizer(answer, return_tensors="pt").input_ids,
    ).loss
    ours = model([Sample(words, answer=answer)])
    assert torch.allclose(ours["loss"], theirs, atol=1e-5) and ours["num_tokens"] == 4
    score = model.score([Sample(words)], [answer], length_normalised=True)[0][0]
    assert score == pytest.approx(-theirs.item(), abs=1e-5)


def test_a_batch_gives_what_each_sample_gives_alone(model):
    samples = eight()
    with torch.no_grad():
        total = sum(model([sample])["loss"] * model([sample])["num_tokens"] for sample in samples)
        batch = model(samples)
    assert torch.allclose(batch["loss"] * batch["num_tokens"], total, atol=1e-3)
    together = [answer.text for answer in model.generate(samples, max_new_tokens=6)]
    assert together == [model.generate([sample], max_new_tokens=6)[0].text for sample in samples]


def test_inputs_matter_and_gradients_reach_the_bridges_alone(model):
    one, other = (model([Sample("what ?", [("toy", source)], "red")])["loss"] for source in (ONE, LONG))
    assert abs(one - other) > 1e-6
    model([Sample("what ?", [("toy", ONE), ("beads", BEADS)], "red")])["loss"].backward()
    for branch in model.branches.values():
        assert branch.bridge.query_tokens.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in model.llm.parameters())


def test_a_bundle_comes_back_as_it_was(toys, model, tmp_path):
    model.save_pretrained(tmp_path / "bundle")
    assert_alike(model, XBlip.from_pretrained(tmp_path / "bundle"), eight())


def test_a_prompt_beyond_the_context_is_an_error(llm, model):
    if llm.context_length is None:  # relative positions know no limit
        assert model.ask("one " * 100, max_new_tokens=1).num_prompt_tokens > 100
        return
    with pytest.raises(InputError, match="exceed its context of 96"):
        model.ask("one " * 100)
