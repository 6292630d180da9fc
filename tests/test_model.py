"""The model: a sample gets in a batch what it gets alone, and every input is heard in the light of its own question."""

import dataclasses

import pytest
import torch
from kit import BEADS, LONG, ONE, TWO, eight, make_model

from xblip.errors import ConfigError, InputError, MediaError, PluginError
from xblip.model import XBlip
from xblip.router import Bos, RouterConfig
from xblip.sample import Media, Sample, Turn


def logits(model: XBlip, samples: list[Sample]) -> list[torch.Tensor]:
    """Of each sample's real positions."""
    pieces = [model.router.pieces(sample) for sample in samples]
    answers = [sample.answer for sample in samples]
    batch = model.router.assemble(pieces, model.soft_prompts(samples), answers=answers)
    rows = model.llm.logits(batch)
    return [row[mask.bool()] for row, mask in zip(rows, batch.attention_mask, strict=True)]


class TestBatchEqualsSingle:
    @torch.no_grad()
    @pytest.mark.parametrize(
        "settings", [{}, {"cues": False, "bos": Bos.instruction, "prefix": "question", "earlier_turns": False}]
    )
    def test_logits(self, llm, settings):
        model = make_model(llm, **settings)
        together = logits(model, eight())
        for sample, row in zip(eight(), together, strict=True):
            alone = logits(model, [sample])[0]
            assert alone.shape == row.shape and torch.allclose(alone, row, atol=1e-4)
        assert len({tuple(row[-1].round(decimals=3).tolist()) for row in together}) == 8

    def test_generated_texts(self, model):
        together = model.generate(eight(), max_new_tokens=8)
        assert together == [model.generate([sample], max_new_tokens=8)[0] for sample in eight()]
        assert len({answer.text for answer in together}) > 4 and len({a.num_prompt_tokens for a in together}) > 4

    def test_generated_texts_with_beams(self, model):
        together = model.generate(eight()[:4], max_new_tokens=4, num_beams=3)
        assert together == [model.generate([sample], max_new_tokens=4, num_beams=3)[0] for sample in eight()[:4]]

    @torch.no_grad()
    def test_loss(self, model):
        whole = model(eight())
        parts = [model([sample]) for sample in eight()]
        total = sum(part["loss"] * part["num_tokens"] for part in parts)
        assert whole["num_tokens"] == sum(part["num_tokens"] for part in parts)
        assert torch.allclose(whole["loss"], total / whole["num_tokens"], atol=1e-5)

    def test_scores(self, model):
        candidates = [["yes", "no red"], ["one", "two", "three four five"], ["this"]]
        together = model.score(eight()[:3], candidates)
        for sample, answers, scores in zip(eight(), candidates, together, strict=False):
            assert model.score([sample], [answers])[0] == pytest.approx(scores, abs=1e-4)
            assert [model.score([sample], [[answer]])[0][0] for answer in answers] == pytest.approx(scores, abs=1e-4)


class TestSoftPrompts:
    @torch.no_grad()
    def test_of_a_sample_depend_on_its_own_instruction_only(self, model):
        """With several segments and several inputs per sample, where the reference mixes rows up."""
        samples = eight()
        before = model.soft_prompts(samples)
        assert [len(prompts) for prompts in before] == [len(sample.all_media) for sample in samples]
        for changed in range(len(samples)):
            other = list(samples)
            other[changed] = dataclasses.replace(samples[changed], instruction="show the blue input")
            for index, prompts in enumerate(model.soft_prompts(other)):
                for old, new in zip(before[index], prompts, strict=True):
                    if index == changed:
                        assert (old - new).abs().max() > 1e-3
                    else:
                        assert torch.allclose(old, new, atol=1e-5)

    @torch.no_grad()
    def test_equal_inputs_of_one_sample_are_equal_and_lengths_follow_segments(self, model):
        _, prompts = model.soft_prompts([eight()[2], eight()[6]])
        assert torch.allclose(prompts[0], prompts[1], atol=1e-6) and not torch.allclose(
            prompts[0], prompts[2], atol=1e-3
        )
        (long, beads), _ = model.soft_prompts([eight()[2], eight()[6]])
        assert (long.shape[0], beads.shape[0]) == (3 * 4, 1 * 4)

    @torch.no_grad()
    def test_what_is_read_or_encoded_already_is_taken_as_it_is(self, model):
        branch = model.branches["toy"]
        sources = [LONG, branch.read(TWO), branch.encode([LONG]), branch.encode([branch.read(ONE)])]
        expected = model.soft_prompts([Sample("what ?", [("toy", source)]) for source in (LONG, TWO, LONG, ONE)])
        for source, (prompt,) in zip(sources, expected, strict=True):
            assert torch.allclose(model.soft_prompts([Sample("what ?", [("toy", source)])])[0][0], prompt, atol=1e-5)
        mixed = model.soft_prompts([Sample("what ?", [("toy", source) for source in sources])])[0]
        assert all(torch.allclose(left, right, atol=1e-5) for left, (right,) in zip(mixed, expected, strict=True))


class TestAsk:
    def test_inputs_by_name_or_as_media_are_one(self, model):
        asked = model.ask("which one ?", toy=ONE, beads=BEADS, max_new_tokens=5)
        assert asked == model.ask("which one ?", media=[("toy", ONE), ("beads", BEADS)], max_new_tokens=5)
        assert (
            asked == model.generate([{"toy": ONE, "beads": BEADS, "instruction": "which one ?"}], max_new_tokens=5)[0]
        )
        assert str(asked) == asked.text and 0 < asked.num_new_tokens <= 5

    def test_order_and_every_input_matter(self, llm):
        model = make_model(llm)
        inputs = [("toy", ONE), ("beads", BEADS)]
        asked = [inputs, inputs[::-1], inputs[:1], [("toy", TWO), inputs[1]]]
        seen = [logits(model, [Sample("which one ?", media, "red")])[0][-1] for media in asked]
        assert all((seen[0] - other).abs().max() > 1e-3 for other in seen[1:])

    def test_media_come_before_inputs_by_name(self, model):
        asked = model.ask("which one ?", media=[("beads", BEADS), "and"], toy=ONE, max_new_tokens=5)
        assert asked == model.ask("which one ?", media=[("beads", BEADS), "and", ("toy", ONE)], max_new_tokens=5)

    def test_text_alone_works(self, model):
        answer = model.ask("is one larger ?", max_new_tokens=3)
        assert answer.num_prompt_tokens == 5 and answer.num_new_tokens <= 3

    def test_prompt_positions_are_counted(self, model):
        assert model.ask("what ?", toy=LONG, max_new_tokens=1).num_prompt_tokens == 1 + 2 + 12 + 2

    def test_no_samples_no_answers(self, model):
        assert model.generate([]) == []

    def test_default_generation_is_the_model_s(self, llm):
        model = make_model(llm, generation={"max_new_tokens": 2})
        assert model.ask("what ?", toy=ONE).num_new_tokens <= 2
        assert model.ask("what ?", toy=ONE, max_new_tokens=4, min_new_tokens=4).num_new_tokens == 4

    @pytest.mark.parametrize("media", ["toy", {"toy": ONE}, 5, torch.zeros(2, 2), 0, ("toy", ONE)])
    def test_media_that_are_no_list_are_an_error(self, model, media):
        with pytest.raises(InputError, match=r"media must be a list such as|An entry of media must be"):
            model.ask("what ?", media=media)

    @pytest.mark.parametrize("options", [{"num_return_sequences": 2, "num_beams": 2}, {"num_return_sequences": 0}])
    def test_several_answers_are_not_for_one_question(self, model, options):
        message = "num_return_sequences: one question has one answer here; for several use `generate`"
        with pytest.raises(ConfigError, match=message):
            model.ask("what ?", toy=ONE, **options)
        with pytest.raises(ConfigError, match=message):
            model.chat([{"role": "user", "content": "what ?"}], **options)

    def test_an_option_called_like_an_argument_is_unknown(self, model):
        with pytest.raises(ConfigError, match='Unknown generation option "samples"'):
            model.ask("what ?", samples=3)

    def test_a_sample_changed_after_it_was_made_is_checked_again(self, model):
        sample = Sample("what ?")
        sample.media.append(("toy", ONE))
        assert model.generate([sample], max_new_tokens=3)[0] == model.ask("what ?", toy=ONE, max_new_tokens=3)
        sample.media.append(3)
        with pytest.raises(InputError, match="An entry of media must be"):
            model.generate([sample])

    def test_several_answers_to_one_sample_come_in_a_row(self, model):
        answers = model.generate(eight()[:2], max_new_tokens=4, num_beams=3, num_return_sequences=2)
        assert [answer.num_prompt_tokens for answer in answers] == [11, 11, 18, 18]
        best = model.generate(eight()[:2], max_new_tokens=4, num_beams=3)
        assert answers[::2] == best and answers[0] != answers[1]

    def test_a_streamer_is_passed_on(self, model):
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(model.llm.tokenizer, skip_special_tokens=True)
        answer = model.ask("what ?", toy=ONE, max_new_tokens=5, streamer=streamer)
        assert "".join(streamer).strip() == answer.text

    @pytest.mark.parametrize("instruction", ["", " "])
    def test_an_empty_instruction_is_an_error(self, model, instruction):
        with pytest.raises(InputError, match="The instruction is empty"):
            model.ask(instruction, toy=ONE)

    def test_an_unknown_modality_suggests_the_nearest_and_what_to_install(self, model):
        for call in (
            lambda: model.ask("what ?", tyo=ONE),
            lambda: model.ask("what ?", media=[("tyo", ONE)]),
            lambda: model.generate([Sample("what ?", [("tyo", ONE)])]),
        ):
            with pytest.raises(
                PluginError, match=r'Unknown modality "tyo". Did you mean "toy"?.*pip install xblip-tyo'
            ):
                call()
        with pytest.raises(InputError, match=r'Unknown key "tyo" in a sample. Did you mean "toy"'):
            model.generate([{"tyo": ONE, "instruction": "what ?"}])

    def test_an_installed_modality_without_a_branch_is_told_apart(self, model, site):
        site.install("thermal")
        with pytest.raises(PluginError, match='has no branch for "thermal", only for toy, beads: train one'):
            model.ask("what ?", thermal=ONE)

    @pytest.mark.parametrize(
        ("option", "right"),
        [("max_new_token", "max_new_tokens"), ("num_beam", "num_beams"), ("temprature", "temperature")],
    )
    def test_a_misspelt_option_suggests_the_right_one(self, model, option, right):
        with pytest.raises(ConfigError, match=f'Unknown generation option "{option}". Did you mean "{right}"'):
            model.ask("what ?", toy=ONE, **{option: 3})
        with pytest.raises(ConfigError, match=f'Unknown generation option "{option}". Did you mean "{right}"'):
            model.generate([Sample("what ?")], **{option: 3})

    @pytest.mark.parametrize("count", ["many", 0, 1.5, -3, None, True])
    @pytest.mark.parametrize("option", ["max_new_tokens", "num_beams", "num_return_sequences"])
    def test_a_refused_number_is_one_clear_error(self, model, option, count):
        with pytest.raises(ConfigError, match=f"{option} must be a whole number of at least 1"):
            model.generate([Sample("what ?")], **{option: count})

    def test_a_bad_default_is_refused_when_the_model_is_made(self, llm):
        with pytest.raises(ConfigError, match='"num_beam"'):
            XBlip(llm=llm, branches={}, generation={"num_beam": 3})
        with pytest.raises(ConfigError, match=r"Generation options must be names with values, .* not \[1\]"):
            XBlip(llm=llm, branches={}, generation=[1])

    @pytest.mark.parametrize(
        ("router", "message"),
        [
            ({"bos": "strat"}, '"router": .*strat'),
            ({"postfx": "?"}, 'Unknown key "router.postfx". Did you mean "postfix"'),
            (RouterConfig(bos="strat"), '"router": .*strat'),
            (RouterConfig(prefix=None), '"router.prefix" is null: give it a value'),
            (5, '"router" must hold keys with values, not 5'),
        ],
    )
    def test_a_bad_router_is_refused_when_the_model_is_made(self, llm, router, message):
        with pytest.raises(ConfigError, match=message):
            XBlip(llm=llm, branches={}, router=router)

    @pytest.mark.parametrize("router", [RouterConfig(bos="instruction"), {"bos": "instruction"}])
    def test_a_router_s_words_become_settings(self, llm, router):
        assert XBlip(llm=llm, branches={}, router=router).router.config == RouterConfig(bos=Bos.instruction)

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ({"branches": ["a"]}, "branches must name each folder by its modality"),
            ({"branches": None}, "branches must name each folder by its modality"),
            ({"llm": 5, "branches": {}}, "llm must be a folder, a hub id, an LLMConfig or a FrozenLLM, not int"),
        ],
    )
    def test_parts_of_the_wrong_kind_are_refused(self, llm, parts, message):
        with pytest.raises(InputError, match=message):
            XBlip.compose(**{"llm": llm, **parts})

    @pytest.mark.parametrize("words", ["a\udcff b", "\ud83d"])
    def test_words_that_are_no_unicode_are_an_error(self, model, words):
        message = "holds a character that is not valid Unicode"
        for call in (
            lambda: model.ask(words, toy=ONE),
            lambda: model.ask("what ?", media=[words, ("toy", ONE)]),
            lambda: model.chat([{"role": "user", "content": words}]),
        ):
            with pytest.raises(InputError, match=message):
                call()

    def test_bad_media_are_the_modality_s_own_error(self, model):
        with pytest.raises(MediaError, match="A toy input must be rows of four numbers"):
            model.ask("what ?", toy=[1.0])

    def test_more_than_the_context_holds_is_an_error_with_numbers(self, model):
        """Sixteen segments of four tokens each, three times, and the room for the answer."""
        with pytest.raises(
            InputError, match="192 soft-prompt and 9 text positions with 64 new tokens exceed its context of 256"
        ):
            model.ask("what ?", media=[("toy", ONE * 16)] * 3)
        assert model.ask("what ?", media=[("toy", ONE * 16)] * 3, max_new_tokens=2)

    @pytest.mark.parametrize("samples", [Sample("what ?"), {"instruction": "what ?"}, "what ?", ["what ?"], [3], 3])
    def test_what_is_no_list_of_samples_is_an_error(self, model, samples):
        with pytest.raises(InputError, match=r"Expected a list of samples"):
            model.generate(samples)


class TestChat:
    def message(self, words: str, **inputs) -> dict:
        parts = [{"type": name, "source": source} for name, source in inputs.items()]
        return {"role": "user", "content": [*parts, {"type": "text", "text": words}]}

    def test_one_message_is_a_question(self, model):
        chatted = model.chat([self.message("which one ?", toy=ONE, beads=BEADS)], max_new_tokens=5)
        assert chatted == model.ask("which one ?", toy=ONE, beads=BEADS, max_new_tokens=5)

    def test_earlier_inputs_are_read_in_the_light_of_the_last_question(self, model):
        said = {"role": "assistant", "content": "red"}
        chatted = model.chat(
            [self.message("what is this ?", toy=ONE), said, self.message("describe it")], max_new_tokens=5
        )
        history = [Turn((Media("toy", ONE), "what is this ?"), "red")]
        sample = Sample("describe it", history=history)
        assert chatted == model.generate([sample], max_new_tokens=5)[0]
        alone = model.soft_prompts([Sample("describe it", [("toy", ONE)])])[0][0]
        assert torch.allclose(model.soft_prompts([sample])[0][0], alone, atol=1e-6)

    def test_it_ends_with_the_user(self, model):
        with pytest.raises(InputError, match="The last message is the assistant's"):
            model.chat([self.message("what ?"), {"role": "assistant", "content": "red"}])

    def test_an_unknown_modality_is_named(self, model):
        with pytest.raises(InputError, match=r'Unknown part of type "tyo" in a message. Did you mean "toy"'):
            model.chat([self.message("what ?", tyo=ONE)])


class TestScore:
    @torch.no_grad()
    def test_it_is_the_log_likelihood_by_hand(self, model):
        llm, sample, answer = model.llm, eight()[2], "one two"
        prompt = model.router.assemble([model.router.pieces(sample)], model.soft_prompts([sample])).inputs_embeds[0]
        ids = [*llm.tokenize(answer), llm.tokenizer.eos_token_id]
        embeds = torch.cat([prompt, llm.embed(ids)])[None]
        logs = llm.model(inputs_embeds=embeds).logits[0].log_softmax(-1)
        expected = sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(ids))
        assert model.score([sample], [answer])[0] == pytest.approx([expected], abs=1e-3)
        assert model.score([sample], [answer], length_normalised=True)[0] == pytest.approx([expected / 3], abs=1e-3)

    def test_normalising_by_length_changes_who_wins(self, model):
        """The LLM's own long answer has many likely tokens, whose sum falls below that of one unlikely token."""
        sample = Sample("what ?", [("toy", ONE)])
        own = model.generate([sample], max_new_tokens=12, min_new_tokens=12)[0].text
        words = ["red", "blue", "zero", "yes", "the", "nine", "number", "input"]
        total = model.score([sample], [own, *words])[0]
        mean = model.score([sample], [own, *words], length_normalised=True)[0]
        length = len(model.llm.tokenize(own)) + 1
        assert mean == pytest.approx([total[0] / length, *(score / 2 for score in total[1:])], rel=1e-4)
        assert max(range(9), key=total.__getitem__) != 0 and max(range(9), key=mean.__getitem__) == 0

    def test_its_mean_is_the_loss(self, model):
        sample = eight()[1]
        score = model.score([sample], [sample.answer], length_normalised=True)[0][0]
        assert model([sample])["loss"].item() == pytest.approx(-score, abs=1e-4)

    def test_all_samples_may_share_their_candidates(self, model):
        shared = model.score(eight()[:2], ["yes", "no"])
        assert shared == model.score(eight()[:2], [["yes", "no"], ["yes", "no"]])

    def test_dictionaries_are_samples_too(self, model):
        assert model.score([{"toy": ONE, "instruction": "what ?"}], ["red"]) == model.score(
            [Sample("what ?", [("toy", ONE)])], ["red"]
        )

    @pytest.mark.parametrize(
        ("candidates", "message"),
        [
            ([["yes"], ["no"], ["red"]], "There are 2 samples but 3 lists of candidates: give one each"),
            ([["yes"]], "There are 2 samples but 1 lists of candidates"),
            ([], "There are 2 samples but 0 lists of candidates|no candidate"),
            ([["yes"], []], "A sample has no candidate answers"),
            ("yes", "Candidates must be a list of texts, or one such list per sample"),
            ([["yes"], "no"], "Candidates must be a list of texts, or one such list per sample"),
            (None, "Candidates must be a list of texts, or one such list per sample"),
            (5, "Candidates must be a list of texts, or one such list per sample"),
            (["a\udcff b"], "A candidate holds a character that is not valid Unicode"),
            (["yes", ["no"]], "Candidates must be a list of texts, or one such list per sample"),
            ([[1], [2]], "Candidates must be a list of texts, or one such list per sample"),
        ],
    )
    def test_lists_that_do_not_fit_are_an_error(self, model, candidates, message):
        with pytest.raises(InputError, match=message):
            model.score(eight()[:2], candidates)

    def test_a_candidate_that_does_not_fit_is_an_error(self, model):
        with pytest.raises(InputError, match="exceed its context of 256"):
            model.score([Sample("what ?")], ["red " * 300])
