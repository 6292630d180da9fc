"""The engine: what a request gets is what `generate` gives it alone, whoever else asks, joins, leaves or fails."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kit import BEADS, LONG, eight, make_model
from waiting import ASK, NEW

from xblip.engine import Engine, EngineConfig
from xblip.errors import XBlipError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.requests import Finished, Request, Said
from xblip.sample import Sample

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 0.95}


@pytest.fixture
def model(llm):
    return make_model(llm)


def requests_of(count, seed=0):
    draw = random.Random(seed)
    for number in range(count):
        sample = eight()[number % 8]
        options = {"max_new_tokens": draw.randrange(1, 14), **draw.choice([{}, SAMPLED, {"repetition_penalty": 1.5}])}
        yield Request(sample, options, seed=number, caller=str(number % 3))


class TestParity:
    def test_answers_are_those_of_generate(self, model, engine):
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda sample: engine.ask(Request(sample, NEW)), eight()))
        assert [finished.answer for finished in found] == model.generate(eight(), **NEW)
        assert engine.counts["tokens"] >= sum(finished.answer.num_new_tokens for finished in found)

    def test_a_seed_draws_what_it_draws_in_generate(self, model, engine):
        for seed in range(3):
            torch.manual_seed(seed)
            [expected] = model.generate([ASK], **NEW, **SAMPLED)
            assert engine.ask(Request(ASK, {**NEW, **SAMPLED}, seed=seed)).answer == expected

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
            {"no_repeat_ngram_size": 2},
            {"min_new_tokens": 10, "repetition_penalty": 1.2},
            {"do_sample": True, "temperature": 0.7, "top_k": 3},
        ],
    )
    def test_options_do_what_they_do_in_generate(self, model, engine, options):
        torch.manual_seed(5)
        [expected] = model.generate([ASK], **NEW, **options)
        assert engine.ask(Request(ASK, {**NEW, **options}, seed=5)).answer == expected

    def test_what_one_gets_does_not_depend_on_its_neighbours(self, model):
        """Forty requests that come at random times, of all lengths, greedy and drawn; each as it is when it asks alone."""
        requests, draw = list(requests_of(40)), random.Random(1)
        with Engine(model, EngineConfig(max_rows=5)) as alone:
            expected = [alone.ask(request) for request in requests]
        assert alone.counts["steps"] + alone.counts["finished"] >= alone.counts["tokens"], "one at a time"
        with Engine(model, EngineConfig(max_rows=6)) as engine, ThreadPoolExecutor(20) as threads:

            def ask(request):
                time.sleep(draw.random() * 0.2)
                return engine.ask(request)

            found = list(threads.map(ask, requests))
        for one, other in zip(found, expected, strict=True):
            assert (one.answer, one.reason) == (other.answer, other.reason)
            likelihoods = [[drawn.log_probability for drawn in part.drawn] for part in (one, other)]
            assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)
        assert engine.counts["steps"] < alone.counts["steps"] / 2, "steps are shared"

    @pytest.mark.parametrize(
        "options", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"penalty_alpha": None}]
    )
    def test_what_no_sampler_knows_is_left_to_transformers(self, model, engine, options):
        torch.manual_seed(2)
        [expected] = model.generate([ASK], **NEW, **options)
        finished = engine.ask(Request(ASK, {**NEW, **options}, seed=2))
        assert finished.answer == expected and finished.reason in ("stop", "length")

    def test_an_encoder_decoder_answers_too(self, t5_folder):
        model = make_model(FrozenLLM.from_pretrained(LLMConfig(source=str(t5_folder), dtype="float32")))
        with Engine(model) as engine, ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda sample: engine.ask(Request(sample, NEW)).answer, eight()[:4]))
        assert found == model.generate(eight()[:4], **NEW)

    def test_static_bridges_share_what_the_llm_has_read(self, model):
        for branch in model.branches.values():
            branch.bridge.tokenizer = None
        questions = ["what is this ?", "is one larger ?", "show the red"]
        samples = [Sample(question, [("toy", LONG), ("beads", BEADS)]) for question in questions]
        with Engine(model) as engine, ThreadPoolExecutor(3) as threads:
            found = list(threads.map(lambda sample: engine.ask(Request(sample, NEW)).answer, samples))
        assert found == model.generate(samples, **NEW)
        assert model.caches.counters["prefixes"].misses == 1


class TestStreams:
    def test_pieces_make_the_answer(self, engine):
        *said, last = engine.stream(Request(ASK, NEW))
        assert all(isinstance(piece, Said) for piece in said) and isinstance(last, Finished)
        assert "".join(piece.text for piece in said) == last.answer.text
        assert [drawn.token for piece in said for drawn in piece.drawn] == list(last.answer.token_ids)

    def test_log_probabilities_are_the_llm_s(self, model, engine):
        finished = engine.ask(Request(ASK, {**NEW, **SAMPLED}, seed=3, top_log_probabilities=2))
        prompt = model.router.assemble([model.router.pieces(ASK)], model.soft_prompts([ASK]))
        said = torch.tensor([finished.answer.token_ids])
        inputs = torch.cat([prompt.inputs_embeds, model.llm.model.get_input_embeddings()(said)], dim=1)
        with torch.no_grad():
            scores = model.llm.model(inputs_embeds=inputs).logits[0, -1 - said.shape[1] : -1].log_softmax(-1)
        expected = scores.gather(1, said.T)[:, 0].tolist()
        assert [drawn.log_probability for drawn in finished.drawn] == pytest.approx(expected, abs=1e-4)
        best = scores.topk(2)
        assert [token for drawn in finished.drawn for token, _ in drawn.top] == best.indices.flatten().tolist()
        told = [value for drawn in finished.drawn for _, value in drawn.top]
        assert told == pytest.approx(best.values.flatten().tolist(), abs=1e-4)
        for drawn in finished.drawn:
            assert (
                len(drawn.top) == 2 and drawn.top[0][1] >= drawn.top[1][1] and drawn.top[0][1] >= drawn.log_probability
            )

    def test_a_stop_string_ends_an_answer_before_it(self, engine):
        whole = engine.ask(Request(ASK, {**NEW, "min_new_tokens": 12})).answer.text
        word = whole.split()[3]
        before = whole.split(word)[0].strip()
        *said, last = engine.stream(Request(ASK, {**NEW, "min_new_tokens": 12}, stop=[word]))
        assert last.answer.text == before and last.reason == "stop"
        assert "".join(piece.text for piece in said) == before
        assert engine.ask(Request(ASK, {**NEW, "min_new_tokens": 12, "stop_strings": word})).answer.text == before

    def test_the_reason_says_how_it_ended(self, engine):
        assert engine.ask(Request(ASK, {"max_new_tokens": 1})).reason == "length"
        free = engine.ask(Request(ASK, {**NEW, "min_new_tokens": 12})).answer.token_ids
        assert engine.ask(Request(ASK, {**NEW, "eos_token_id": free[2]})).reason == "stop"

    def test_an_event_loop_streams_too(self, engine):
        async def both():
            async def one(seed):
                return [event async for event in engine.astream(Request(ASK, {**NEW, **SAMPLED}, seed=seed))]

            return await asyncio.gather(one(1), one(2))

        for seed, (*said, last) in enumerate(asyncio.run(both()), start=1):
            assert last.answer == engine.ask(Request(ASK, {**NEW, **SAMPLED}, seed=seed)).answer
            assert "".join(piece.text for piece in said) == last.answer.text

        async def refused():
            return [event async for event in engine.astream(Request(Sample("x", [("toy", "none")]), NEW))]

        with pytest.raises(XBlipError):
            asyncio.run(refused())
