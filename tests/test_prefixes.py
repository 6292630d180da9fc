"""How prompts begin: what the LLM has read of one is used for another exactly where it would read the same."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kit import BEADS, LONG, ONE, make_model, save_llm, static

from xblip.engine import Engine
from xblip.llm import FrozenLLM, LLMConfig
from xblip.requests import Request
from xblip.sample import Sample
from xblip.weights import WeightVersions

QUESTION = "what is this ?"
NEW = {"max_new_tokens": 8}


@pytest.fixture(params=["llama", "opt"])
def model(request, llm_folder, tmp_path):
    """Static bridges before an LLM with rotary or with learned positions, which goes on from what it has read."""
    folder = llm_folder if request.param == "llama" else save_llm(request.param, tmp_path)
    model = static(make_model(FrozenLLM.from_pretrained(LLMConfig(source=str(folder), dtype="float32"))))
    assert model.prefixes.work
    return model


def test_threads_that_look_at_weights_at_once_see_the_same(monkeypatch):
    """Else the second would say of the first one's source that it changed while it was read."""
    urandom, module, versions = os.urandom, torch.nn.Linear(2, 2), WeightVersions()
    monkeypatch.setattr(os, "urandom", lambda count: (time.sleep(0.05), urandom(count))[1])
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(versions.of, [module] * 4))) == 1


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


def add_noise(model):
    with torch.no_grad():
        for weight in model.llm.parameters():
            weight.add_(0.3 * torch.randn_like(weight))


def load_others(model):
    torch.manual_seed(1)
    weights = model.llm.model.state_dict()
    model.llm.model.load_state_dict({name: value + 0.3 * torch.randn_like(value) for name, value in weights.items()})


def replace_them(model):
    for module in model.llm.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(weight + 0.3 * torch.randn_like(weight), requires_grad=False))


def step(model, **options):
    optimizer = torch.optim.AdamW(model.llm.parameters(), lr=0.3, **options)
    for weight in model.llm.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()


CHANGES = {
    "edited": add_noise,
    "loaded": load_others,
    "replaced": replace_them,
    "trained": lambda model: step(model, foreach=False),
    "trained together": lambda model: step(model, foreach=True),
    "trained as one": lambda model: step(model, fused=True),
    "cast": lambda model: model.double(),
    "cast_down": lambda model: model.llm.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
class TestAnLLMThatChanges:
    def test_reads_anew_what_it_goes_on_from(self, model, change):
        context = model.encode(toy=LONG, beads=BEADS)
        before = context.ask(QUESTION, **NEW)
        assert context.ask(QUESTION, **NEW) == before and model.caches.counters["prefixes"].misses == 1
        change(model)
        assert context.ask(QUESTION, **NEW) == model.ask(QUESTION, toy=LONG, beads=BEADS, **NEW)
        assert context.ask(QUESTION, **NEW).token_ids and model.caches.counters["prefixes"].misses == 2

    def test_reads_a_conversation_from_its_beginning(self, model, change):
        chats = [model.encode(toy=LONG).chat() for _ in range(2)]
        first = [chat.ask(QUESTION, **NEW) for chat in chats]
        change(model)
        found = chats[0].ask("and this ?", **NEW)
        model.caches.clear()
        assert found == chats[1].ask("and this ?", **NEW) and first[0] == first[1]
