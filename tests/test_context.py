"""Contexts: the answers of `ask`, with everything that another question does not change done once."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kit import BEADS, LONG, MORE_BEADS, ONE, TWO, FileToy, make_branch, make_model, registered, save_llm, static

from xblip.answer import Answer
from xblip.errors import ConfigError, InputError, MediaError, PluginError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.model import XBlip
from xblip.sample import Media, Sample, Turn

QUESTIONS = ["what is this ?", "is one larger ?", "show the red", "which one is larger , the input or this ?"]
MEDIA = [("toy", LONG), "and", ("beads", MORE_BEADS), ("toy", ONE)]
NEW = {"max_new_tokens": 8}


@pytest.fixture
def model(llm):
    return make_model(llm)


@pytest.fixture(params=["llama", "opt", "bloom", "mistral", "t5"])
def any_model(request, llm_folder, t5_folder, tmp_path):
    """With rotary, learned, and linear-bias positions; with layers that forget; and with an encoder."""
    folder = {"llama": llm_folder, "t5": t5_folder}.get(request.param) or save_llm(request.param, tmp_path)
    return make_model(FrozenLLM.from_pretrained(LLMConfig(source=str(folder), dtype="float32")))


@pytest.fixture
def calls(model, monkeypatch):
    """How often encoders and the parts of bridges ran, by name."""
    counts = {"encode": 0, "read_media": 0, "read_instructions": 0}

    def counted(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for branch in model.branches.values():
        counted(branch, "encode")
        counted(branch.bridge, "read_media")
        counted(branch.bridge, "read_instructions")
    return counts


def test_a_context_answers_as_ask_does(any_model):
    context = any_model.encode(media=MEDIA)
    plain = [any_model.ask(question, media=MEDIA, **NEW) for question in QUESTIONS]
    assert context.ask_many(QUESTIONS, **NEW) == plain
    assert [context.ask(question, **NEW) for question in QUESTIONS] == plain


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.3}])
def test_generation_options_do_what_they_do_in_generate(model, is_static, options):
    model = static(model) if is_static else model
    context = model.encode(media=MEDIA)
    torch.manual_seed(1)
    expected = model.generate([{"instruction": text, "media": MEDIA} for text in QUESTIONS], **NEW, **options)
    torch.manual_seed(1)
    assert context.ask_many(QUESTIONS, **NEW, **options) == expected


@pytest.mark.parametrize(
    "said", [{"cache_implementation": "static"}, {"cache_implementation": "dynamic"}, {"use_cache": False}]
)
def test_an_llm_whose_own_settings_say_how_it_caches_does_so(llm, said, monkeypatch):
    contexts = [make_model(llm).encode(media=MEDIA), static(make_model(llm)).encode(media=MEDIA)]
    expected = [context.ask_many(QUESTIONS, **NEW) for context in contexts]
    for name, value in said.items():
        monkeypatch.setattr(llm.model.generation_config, name, value)
    for context, answers in zip(contexts, expected, strict=True):
        assert context.ask_many(QUESTIONS, **NEW) == answers
        assert context.chat().ask(QUESTIONS[0], **NEW) == answers[0]
        assert make_model(llm).ask(QUESTIONS[0], media=MEDIA, **NEW) == expected[0][0]


def test_an_instruction_aware_prompt_is_kept_by_its_instruction(model):
    context = model.encode(toy=LONG)
    [[first]], [[second]] = (model.soft_prompts([Sample(question, context.media)]) for question in QUESTIONS[:2])
    assert (first - second).abs().max() > 1e-3
    for question, expected in zip(QUESTIONS, (first, second), strict=False):
        for _ in range(2):
            [(prompt, _)] = model.reader.soft_prompts("toy", [context.media[0].source], [question])
            assert torch.allclose(prompt, expected, atol=1e-6)


def test_media_are_encoded_once_and_read_once_for_all_questions(model, calls):
    context = model.encode(media=MEDIA)
    context.ask_many(QUESTIONS[:2], **NEW)
    assert calls == {"encode": 2, "read_media": 3, "read_instructions": calls["read_instructions"]}
    context.ask(QUESTIONS[2], **NEW)
    assert calls["encode"] == 2 and calls["read_media"] == 3
    again = calls["read_instructions"]
    context.ask_many(QUESTIONS[:3], **NEW)
    assert calls["read_instructions"] == again, "soft prompts of these questions are there"
    model.encode(media=MEDIA[::-1]).ask(QUESTIONS[0], **NEW)
    assert calls["encode"] == 2 and calls["read_instructions"] == again


def test_a_static_bridge_makes_one_prompt_and_the_llm_reads_it_once(model, calls):
    context = static(model).encode(media=MEDIA)
    plain = [model.ask(question, media=MEDIA, **NEW) for question in QUESTIONS]
    made = dict(calls)
    assert context.ask_many(QUESTIONS, **NEW) == plain
    assert calls["read_instructions"] - made["read_instructions"] == 2, "once a modality"
    read = model.caches.counters["prefixes"]
    assert read.misses == read.entries == 1
    assert context.ask(QUESTIONS[0], **NEW) == plain[0] and model.caches.counters["prefixes"].hits == 1


def test_one_soft_prompt_may_serve_all_questions(model):
    context = model.encode(media=MEDIA, requery=False)
    fixed = [Media(*part, QUESTIONS[0]) if isinstance(part, tuple) else part for part in MEDIA]
    expected = model.generate([Sample(question, fixed) for question in QUESTIONS], **NEW)
    assert context.ask_many(QUESTIONS, **NEW) == expected
    assert context.ask(QUESTIONS[2], **NEW) == expected[2], "it stays the first question's"
    named = model.encode(media=MEDIA, requery=False, instruction=QUESTIONS[0])
    assert named.ask(QUESTIONS[3], **NEW) == expected[3]
    assert model.caches.counters["prefixes"].entries == 1


def test_caches_do_not_change_answers(llm):
    budgets = [{}, {"features_bytes": 0, "prompts_bytes": 0, "prefixes_bytes": 0}]
    answers = []
    for budget in budgets:
        model = make_model(llm)
        for cache, size in zip(vars(model.caches).values(), budget.values(), strict=False):
            cache.budget_bytes = size
        contexts = [model.encode(media=MEDIA), model.encode(media=MEDIA, requery=False)]
        answers.append([context.ask_many(QUESTIONS, **NEW) for context in contexts for _ in range(2)])
        assert all(part.bytes <= part.budget_bytes for part in model.caches.counters.values())
    assert answers[0] == answers[1]


class TestChat:
    def test_a_chat_that_reads_anew_is_that_of_messages(self, any_model):
        chat = any_model.encode(toy=LONG).chat()
        messages = [{"role": "user", "content": [{"type": "toy", "toy": LONG}, {"type": "text", "text": QUESTIONS[0]}]}]
        for question in QUESTIONS[1:3]:
            answer = chat.ask(messages[-1]["content"][-1]["text"], **NEW)
            assert answer == any_model.chat(messages, **NEW)
            messages.append({"role": "assistant", "content": answer.text})
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})

    def test_a_chat_that_keeps_its_prompt_goes_on_from_what_was_read(self, any_model, monkeypatch):
        chat = any_model.encode(toy=LONG, requery=False).chat()
        media, history = Media("toy", LONG, QUESTIONS[0]), []
        for number, question in enumerate(QUESTIONS[:3]):
            given = [] if number else [media]
            [expected] = any_model.generate([Sample(question, given, None, history)], **NEW)
            answer = chat.ask(question, **NEW)
            assert answer == expected
            history = [*history, Turn((*given, question), answer.text)]
        if any_model.prefixes.work:
            counters = any_model.caches.counters["prefixes"]
            assert counters.hits == 2 and counters.entries == 3, "each turn begins with the one before"

    def test_further_inputs_come_with_a_turn(self, model):
        chat = model.encode(toy=ONE).chat(requery=False)
        first = chat.ask(QUESTIONS[0], **NEW)
        second = chat.ask(QUESTIONS[1], beads=BEADS, **NEW)
        history = [Turn((Media("toy", ONE, QUESTIONS[0]), QUESTIONS[0]), first.text)]
        [expected] = model.generate([Sample(QUESTIONS[1], [Media("beads", BEADS)], None, history)], **NEW)
        assert second == expected and len(chat.turns) == 2

    def test_a_question_that_fails_is_no_turn(self, model):
        chat = model.encode(toy=ONE).chat()
        chat.ask(QUESTIONS[0], **NEW)
        for wrong, error in (
            ({"toy": []}, MediaError),
            ({"tpy": ONE}, PluginError),
            ({"max_new_tokens": 0}, ConfigError),
        ):
            with pytest.raises(error):
                chat.ask(QUESTIONS[1], **wrong)
        assert len(chat.turns) == 1


def test_an_answer_explains_itself(model):
    context = model.encode(media=MEDIA)
    plain = model.ask(QUESTIONS[0], media=MEDIA, **NEW).explain()
    explained = context.ask(QUESTIONS[0], **NEW).explain()
    assert [part.source for part in explained.inputs] == [part.source for part in plain.inputs]
    assert [part.effect for part in explained.inputs] == pytest.approx([part.effect for part in plain.inputs], abs=1e-4)
    assert explained.media[0][1].keys() == plain.media[0][1].keys(), "what was read, to be drawn"


class TestFiles:
    @pytest.fixture
    def file_model(self, llm):
        """A model with a branch that reads files, and what writes one."""
        with registered(FileToy):
            model = XBlip(llm=llm, branches={"file_toy": make_branch(FileToy, llm)}).eval()

        def write(path, numbers):
            path.write_text(" ".join(map(str, numbers)))
            return path

        return model, write

    def test_equal_files_are_encoded_once_and_changed_ones_anew(self, file_model, tmp_path):
        model, write = file_model
        one, same, other = (
            write(tmp_path / "one.txt", ONE),
            write(tmp_path / "same.txt", ONE),
            write(tmp_path / "o.txt", TWO),
        )
        for path in (one, same, other):
            model.encode(file_toy=path)
        counters = model.caches.counters["features"]
        assert (counters.misses, counters.hits) == (2, 1)
        before = model.encode(file_toy=one).ask(QUESTIONS[0], **NEW)
        write(one, TWO)
        after = model.encode(file_toy=one).media[0].source
        assert torch.equal(after.values, model.encode(file_toy=other).media[0].source.values)
        assert before.text and model.caches.counters["features"].misses == 2

    def test_a_changed_file_is_not_explained(self, file_model, tmp_path):
        model, write = file_model
        path = write(tmp_path / "one.txt", ONE)
        answer = model.encode(file_toy=path).ask(QUESTIONS[0], **NEW)
        assert answer.explain().inputs[0].source == str(path)
        write(path, TWO)
        with pytest.raises(InputError, match="has changed since it was encoded"):
            answer.explain()

    def test_a_file_that_changes_while_it_is_read_is_refused(self, file_model, tmp_path, monkeypatch):
        model, write = file_model
        path = write(tmp_path / "one.txt", ONE)
        modality = model.branches["file_toy"].modality
        load = modality.load
        monkeypatch.setattr(modality, "load", lambda source: (load(source), write(path, TWO))[0])
        with pytest.raises(MediaError, match="it changed while it was read"):
            model.encode(file_toy=path)
        assert model.caches.counters["features"].entries == 0


def test_a_trained_bridge_makes_new_prompts(model):
    context = model.encode(toy=LONG)
    before = context.ask(QUESTIONS[0], **NEW)
    entries = model.caches.counters["prompts"].entries
    with torch.no_grad():
        for weight in model.branches["toy"].bridge.parameters():
            weight.add_(torch.randn_like(weight))
    after = context.ask(QUESTIONS[0], **NEW)
    assert after == model.ask(QUESTIONS[0], toy=LONG, **NEW) and after != before
    assert model.caches.counters["prompts"].entries > entries


def test_a_bridge_in_training_keeps_nothing(model):
    context = model.encode(toy=LONG)
    model.train()
    entries = model.caches.counters["prompts"]
    context.ask(QUESTIONS[0], **NEW)
    context.ask(QUESTIONS[0], **NEW)
    assert model.caches.counters["prompts"].hits == entries.hits


def test_sources_of_all_sorts_have_keys_where_they_say_what_they_hold(model):
    reader = model.reader
    tensor = torch.tensor(ONE)
    assert reader.key("toy", tensor) == reader.key("toy", tensor.clone())
    assert reader.key("toy", tensor) != reader.key("toy", tensor.double())
    assert reader.key("toy", ONE) == reader.key("toy", list(ONE)) != reader.key("toy", TWO)
    assert reader.key("toy", tensor) != reader.key("beads", tensor), "another modality reads it otherwise"
    assert reader.key("toy", object()) is None


def test_features_and_tensors_that_were_read_are_sources_too(model):
    branch = model.branches["toy"]
    expected = model.ask(QUESTIONS[0], toy=LONG, **NEW)
    for source in (branch.read(LONG), branch.encode([LONG]), torch.tensor(LONG)):
        assert model.encode(toy=source).ask(QUESTIONS[0], **NEW) == expected
    encoded = model.encode(toy=LONG)
    assert model.encode(media=encoded.media).ask(QUESTIONS[0], **NEW) == expected


def test_threads_may_ask_one_context(model):
    context = model.encode(media=MEDIA)
    expected = context.ask_many(QUESTIONS, **NEW)
    model.caches.clear()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda question: context.ask(question, **NEW), QUESTIONS * 4))
    assert found == expected * 4


def test_a_model_with_full_caches_can_be_copied(model):
    model.encode(toy=LONG).ask(QUESTIONS[0], **NEW)
    other = copy.deepcopy(model)
    assert other.caches.counters["features"].entries == 0
    assert other.encode(toy=LONG).ask(QUESTIONS[0], **NEW) == model.ask(QUESTIONS[0], toy=LONG, **NEW)
    assert model.caches.counters["features"].hits == 0 and other.caches.counters["features"].misses == 1


@pytest.mark.parametrize(
    "ask, error, message",
    [
        (lambda model: model.encode(tpy=ONE), PluginError, 'Unknown modality "tpy". Did you mean "toy"?'),
        (lambda model: model.encode(toy=[]), MediaError, ""),
        (lambda model: model.encode(media="toy"), InputError, "media must be a list"),
        (
            lambda model: model.encode(toy=ONE, instruction="what ?"),
            InputError,
            "give requery=False beside instruction",
        ),
        (lambda model: model.encode(toy=ONE, requery=False, instruction=" "), InputError, "instruction"),
        (lambda model: model.encode(toy=ONE).ask(""), InputError, "instruction"),
        (lambda model: model.encode(toy=ONE).ask_many("what ?"), InputError, 'Expected a list of questions such as ["'),
        (lambda model: model.encode(toy=ONE).ask_many([3]), InputError, ""),
        (lambda model: model.encode(toy=ONE).ask("what ?", max_new_token=3), ConfigError, "max_new_tokens"),
        (lambda model: model.encode(toy=ONE).ask("what ?", num_return_sequences=2), ConfigError, "one answer here"),
        (lambda model: model.encode(toy=ONE).ask("what ? " * 400), InputError, "The prompt is too long for the LLM"),
    ],
)
def test_bad_input_has_one_clear_error(model, ask, error, message):
    with pytest.raises(error) as raised:
        ask(model)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_no_question_has_no_answer(model):
    assert model.encode(toy=ONE).ask_many([]) == []
    assert isinstance(model.encode().ask("what is this ?", **NEW), Answer)
