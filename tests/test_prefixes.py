"""How prompts begin: what the LLM has read of one is used for another exactly where it would read the same."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from kit import BEADS, LONG, ONE, make_model, save_llm, static

from xblip.engine import Engine
from xblip.llm import FrozenLLM, LLMConfig
from xblip.requests import Request
from xblip.sample import Sample

QUESTION = "what is this ?"
NEW = {"max_new_tokens": 8}


@pytest.fixture(params=["llama", "opt"])
def model(request, llm_folder, tmp_path):
    """Static bridges before an LLM with rotary or with learned positions, which goes on from what it has read."""
    folder = llm_folder if request.param == "llama" else save_llm(request.param, tmp_path)
    model = static(make_model(FrozenLLM.from_pretrained(LLMConfig(source=str(folder), dtype="float32"))))
    assert model.prefixes.work
    return model


class TestAPromptThatEndsInItsSoftPrompt:
    """Were all of it read before, nothing would be left that the LLM could go on with."""

    SAMPLES = [Sample(None, [("toy", ONE)]), Sample(None, [("toy", LONG), ("beads", BEADS)])]

    def test_in_a_context(self, model):
        for sample, expected in zip(self.SAMPLES, model.generate(self.SAMPLES, **NEW), strict=True):
            context = model.encode(media=sample.media)
            assert context.ask(None, **NEW) == context.chat().ask(None, **NEW) == expected
            assert context.ask_many([None, QUESTION, None], **NEW)[::2] == [expected] * 2

    def test_in_an_engine(self, model):
        samples = [*self.SAMPLES, Sample(QUESTION, [("toy", LONG)])]
        with Engine(model) as engine, ThreadPoolExecutor(3) as threads:
            found = list(threads.map(lambda sample: engine.ask(Request(sample, NEW)).answer, samples))
        assert found == model.generate(samples, **NEW)
