"""What an answer came from: each figure is what the model gives for the prompt without that input or segment."""

import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch
from kit import BEADS, LONG, MORE_BEADS, ONE, TWO, FileToy, make_branch, make_model, registered

from xblip.errors import InputError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.model import XBlip
from xblip.sample import Media, Sample, Turn

EXACT = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def likelihoods(model, sample, token_ids):
    """The answer's tokens' log-likelihoods, from all logits of one prompt alone."""
    with torch.no_grad():
        pieces, prompts = model.router.pieces(sample), model.soft_prompts([sample])[0]
        batch = model.router.assemble([pieces], [prompts], answers=[list(token_ids)])
        logits = model.llm.logits(batch)[0].log_softmax(-1)
    apart = model.llm.is_encoder_decoder
    logits = logits if apart else logits[-len(token_ids) - 1 : -1]
    return logits[torch.arange(len(token_ids)), torch.tensor(token_ids)]


class TestInputs:
    inputs = [("toy", ONE), "and", ("beads", MORE_BEADS), ("toy", LONG)]

    @pytest.fixture(scope="class")
    def answer(self, model):
        return model.ask("which one ?", media=self.inputs, **EXACT)

    def test_the_answer_is_as_likely_as_its_tokens(self, model, answer):
        explanation = answer.explain()
        expected = likelihoods(model, Sample("which one ?", self.inputs), answer.token_ids)
        assert explanation.log_likelihood == pytest.approx(float(expected.sum()), abs=1e-4)
        assert explanation.answer == answer.text and explanation.question == "which one ?"
        assert len(explanation.tokens) == answer.num_new_tokens == 4

    def test_an_effect_is_what_the_answer_loses_without_the_input_and_its_cue(self, model, answer):
        explanation = answer.explain()
        whole = likelihoods(model, Sample("which one ?", self.inputs), answer.token_ids)
        for part, place in zip(explanation.inputs, (0, 2, 3), strict=True):
            rest = [other for index, other in enumerate(self.inputs) if index != place]
            expected = whole - likelihoods(model, Sample("which one ?", rest), answer.token_ids)
            assert part.token_effects == pytest.approx(expected.tolist(), abs=1e-4)
            assert part.effect == pytest.approx(sum(part.token_effects), abs=1e-4)
            assert part.per_token == pytest.approx(part.effect / 4)
        assert [part.cue for part in explanation.inputs] == ["toy: ", "red beads : ", "toy: "]

    def test_without_any_input_the_words_stay(self, model, answer):
        expected = likelihoods(model, Sample("which one ?", ["and"]), answer.token_ids)
        assert answer.explain().without_inputs == pytest.approx(float(expected.sum()), abs=1e-4)

    def test_names_tell_inputs_of_one_kind_apart_and_shares_add_up(self, answer):
        explanation = answer.explain()
        assert [part.name for part in explanation.inputs] == ["toy 1", "beads", "toy 2"]
        assert sum(abs(part.share) for part in explanation.inputs) == pytest.approx(1)
        assert all(part.share * part.effect >= 0 for part in explanation.inputs)
        assert explanation.strongest().effect == max(part.effect for part in explanation.inputs)

    def test_inputs_of_earlier_turns_count(self, model):
        messages = [
            {"role": "user", "content": [{"type": "toy", "source": LONG}, {"type": "text", "text": "what ?"}]},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": [{"type": "beads", "source": BEADS}, {"type": "text", "text": "and this ?"}]},
        ]
        answer = model.chat(messages, **EXACT)
        explanation = answer.explain()
        said = Turn((Media("toy", LONG), "what ?"), "two")
        whole, without = (
            likelihoods(model, Sample("and this ?", [("beads", BEADS)], history=[turn]), answer.token_ids)
            for turn in (said, Turn(("what ?",), "two"))
        )
        assert [part.name for part in explanation.inputs] == ["toy", "beads"] and len(explanation.segments) == 3
        assert explanation.inputs[0].effect == pytest.approx(float((whole - without).sum()), abs=1e-4)

    def test_an_input_with_an_instruction_of_its_own_is_read_in_its_light(self, model):
        own = [Media("toy", LONG, "describe it"), Media("beads", BEADS)]
        answer = model.ask("which one ?", media=own, **EXACT)
        explanation = answer.explain()
        whole = likelihoods(model, Sample("which one ?", own), answer.token_ids)
        shorter = Media("toy", LONG[4:], "describe it")
        without = [
            likelihoods(model, Sample("which one ?", rest), answer.token_ids) for rest in (own[:1], [shorter, own[1]])
        ]
        assert explanation.log_likelihood == pytest.approx(float(whole.sum()), abs=1e-4)
        assert explanation.inputs[1].effect == pytest.approx(float((whole - without[0]).sum()), abs=1e-4)
        assert explanation.segments[0].effect == pytest.approx(float((whole - without[1]).sum()), abs=1e-4)
        plain = model.ask("which one ?", media=[("toy", LONG), ("beads", BEADS)], **EXACT).explain()
        assert (explanation.attention["toy"] - plain.attention["toy"]).abs().max() > 1e-3
        assert torch.equal(explanation.attention["beads"], plain.attention["beads"])


class TestSegments:
    def test_an_effect_is_what_the_answer_loses_when_the_others_are_read_alone(self, model):
        answer = model.ask("which one ?", media=[("beads", BEADS), ("toy", LONG)], **EXACT)
        explanation = answer.explain()
        whole = likelihoods(model, Sample("which one ?", [("beads", BEADS), ("toy", LONG)]), answer.token_ids)
        assert [(part.name, part.segment) for part in explanation.segments] == [("toy", 0), ("toy", 1), ("toy", 2)]
        rows = torch.tensor(LONG).reshape(3, 4)
        for part in explanation.segments:
            rest = rows[[place for place in range(3) if place != part.segment]]
            sample = Sample("which one ?", [("beads", BEADS), ("toy", rest)])
            expected = whole - likelihoods(model, sample, answer.token_ids)
            assert part.token_effects == pytest.approx(expected.tolist(), abs=1e-4)
            assert part.per_token == pytest.approx(part.effect / 4)

    def test_a_single_segment_is_not_told_apart_from_its_input(self, model):
        assert model.ask("which one ?", toy=ONE, beads=BEADS, **EXACT).explain().segments == []


class TestAnswers:
    def test_it_needs_no_file_any_more(self, llm, tmp_path):
        file = tmp_path / "one.txt"
        file.write_text("1 2 3 4")
        with registered(FileToy):
            model = XBlip(llm=llm, branches={"file_toy": make_branch(FileToy, llm)}).eval()
        answer = model.ask("what ?", file_toy=file, **EXACT)
        before = answer.explain()
        file.unlink()
        assert answer.explain().to_dict() == before.to_dict() and before.inputs[0].source == str(file)

    def test_features_given_by_hand_are_explained_alike(self, model):
        branch = model.branches["toy"]
        inputs = ([("toy", LONG), ("beads", BEADS)], [("toy", branch.encode([LONG])), ("beads", BEADS)])
        one, other = (model.ask("what ?", media=media, **EXACT).explain() for media in inputs)
        assert [part.effect for part in one.inputs] == pytest.approx([part.effect for part in other.inputs], abs=1e-4)
        assert one.media[0][1] is not None and other.media[0][1] is None

    def test_beams_change_which_answer_is_explained_and_nothing_else(self, model):
        answer = model.ask("what ?", toy=ONE, max_new_tokens=5, num_beams=3)
        explanation = answer.explain()
        expected = likelihoods(model, Sample("what ?", [("toy", ONE)]), answer.token_ids)
        assert explanation.log_likelihood == pytest.approx(float(expected.sum()), abs=1e-4)

    def test_an_encoder_decoder_is_explained_alike(self, t5_folder, toys):
        model = make_model(FrozenLLM.from_pretrained(LLMConfig(source=str(t5_folder), dtype="float32")))
        answer = model.ask("which one ?", toy=LONG, beads=BEADS, **EXACT)
        explanation = answer.explain()
        whole = likelihoods(model, Sample("which one ?", [("toy", LONG), ("beads", BEADS)]), answer.token_ids)
        without = likelihoods(model, Sample("which one ?", [("beads", BEADS)]), answer.token_ids)
        assert explanation.log_likelihood == pytest.approx(float(whole.sum()), abs=1e-4)
        assert explanation.inputs[0].effect == pytest.approx(float((whole - without).sum()), abs=1e-4)

    @pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda answer: pickle.loads(pickle.dumps(answer))])
    def test_a_copy_is_small_and_says_that_it_cannot_be_explained(self, model, make):
        answer = model.ask("what ?", toy=ONE, max_new_tokens=3)
        assert make(answer) == answer and set(dataclasses.asdict(answer)) == set(vars(make(answer)))
        with pytest.raises(InputError, match="does not hold what it came from.*ask again by `ask` or `chat`"):
            make(answer).explain()

    def test_an_answer_of_generate_says_that_it_cannot_be_explained(self, model):
        with pytest.raises(InputError, match="does not hold what it came from.*nor an answer of `generate`"):
            model.generate([Sample("what ?", [("toy", ONE)])], max_new_tokens=3)[0].explain()

    def test_an_empty_answer_has_no_explanation(self, model):
        ends = list(range(len(model.llm.tokenizer)))
        answer = model.ask("what ?", toy=ONE, max_new_tokens=3, eos_token_id=ends)
        assert answer.text == ""
        with pytest.raises(InputError, match="The answer is empty, so there is nothing to explain"):
            answer.explain()

    def test_an_answer_to_words_alone_came_from_no_input(self, model):
        with pytest.raises(InputError, match="The question came without inputs.*give it at least one"):
            model.ask("is one larger ?", **EXACT).explain()

    def test_what_was_read_goes_with_the_answer(self, model):
        answer = model.ask("what ?", toy=TWO, max_new_tokens=2)
        tensor = weakref.ref(answer._asked().sample.media[0].source["values"])
        assert tensor() is not None
        del answer
        gc.collect()
        assert tensor() is None


def test_figures_are_plain_data(model):
    explanation = model.ask("which one ?", toy=LONG, beads=BEADS, **EXACT).explain()
    figures = explanation.to_dict()
    assert figures["inputs"][0]["per_token"] == pytest.approx(figures["inputs"][0]["effect"] / 4)
    attention = torch.tensor(figures["attention"]["toy"])
    assert attention.shape == (4, 3, 4) and torch.allclose(attention.sum(-1), torch.ones(4, 3), atol=1e-5)
