"""The router: what comes in which order, once, and the same for training, generation and scoring."""

import copy

import pytest
import torch
from torch import Tensor

from xblip.errors import ConfigError, InputError, UnknownWordsWarning
from xblip.llm import IGNORE, FrozenLLM, PromptBatch
from xblip.router import Bos, Router, RouterConfig
from xblip.sample import Media, Sample, Turn

CUES = {"toy": "red : ", "beads": "blue : "}
BOS, EOS = 1, 2
HISTORY = [Turn((Media("beads", 0), "what is it ?"), "green")]
TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} : {{ message['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> answer :{% endif %}"
)


@pytest.fixture
def make(llm):
    def make(**settings) -> Router:
        return Router(RouterConfig(**settings), llm=llm, cues=CUES)

    return make


@pytest.fixture
def talking(llm):
    """Makes a router whose tokenizer has a chat template."""

    def talking(template: str = TEMPLATE, **settings) -> Router:
        tokenizer = copy.deepcopy(llm.tokenizer)
        tokenizer.chat_template = template
        other = FrozenLLM(llm.model, tokenizer, config=llm.config)
        return Router(RouterConfig(chat_template=True, **settings), llm=other, cues=CUES)

    return talking


def marker(number: int, length: int = 2) -> Tensor:
    """A soft prompt that is recognised by its value, which no embedding has."""
    return torch.full((length, 32), 1000.0 + number)


def markers(sample: Sample) -> list[Tensor]:
    return [marker(index, length=2 + index) for index in range(len(sample.all_media))]


def spell(llm: FrozenLLM, batch: PromptBatch, row: int = 0) -> list[str]:
    """What stands at each real position of a row: a word, or `*n` for a row of the n-th soft prompt."""
    table = llm.model.get_input_embeddings().weight
    words = []
    for vector in batch.inputs_embeds[row][batch.attention_mask[row].bool()]:
        if vector[0] >= 1000:
            words.append(f"*{int(vector[0]) - 1000}")
        else:
            words.append(llm.tokenizer.convert_ids_to_tokens(int((table - vector).abs().sum(1).argmin())))
    return words


def laid_out(router: Router, sample: Sample, answer: str | None = None) -> str:
    answers = None if answer is None else [answer]
    return " ".join(spell(router.llm, router.assemble([router.pieces(sample)], [markers(sample)], answers=answers)))


class TestUnknownWords:
    """A word-level tokenizer reads all words it does not know as one."""

    @pytest.mark.parametrize("setting", ["prefix", "postfix", "separator"])
    def test_in_a_setting_are_told_when_the_router_is_made(self, make, setting):
        with pytest.warns(UnknownWordsWarning, match='does not know "glorp", "Zap:" in "red glorp Zap:"'):
            make(**{setting: "red glorp Zap:"})

    def test_in_a_cue_are_told_if_cues_are_laid_out(self, llm, recwarn):
        cues = {"toy": "glorp: "}
        Router(RouterConfig(cues=False), llm=llm, cues=cues)
        assert not recwarn
        with pytest.warns(UnknownWordsWarning, match='"glorp:" in "glorp: "'):
            Router(RouterConfig(), llm=llm, cues=cues)

    def test_in_an_instruction_are_told_once(self, make, recwarn):
        router = make()
        for words in ("what ?", "what glorp ?", "what glorp ?", "zap ?"):
            laid_out(router, Sample(words))
        assert [str(warning.message).split(":")[0] for warning in recwarn] == [
            'The LLM does not know "glorp" in "what glorp ?"',
            'The LLM does not know "zap" in "zap ?"',
        ]


PAIR = Sample("which one is larger ?", [("toy", 0), "and ", ("beads", 1)])
INPUTS = "red : *0 *0 and blue : *1 *1 *1"


class TestOrder:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, f"<s> {INPUTS} which one is larger ?"),
            ({"cues": False}, "<s> *0 *0 and *1 *1 *1 which one is larger ?"),
            ({"bos": Bos.none}, f"{INPUTS} which one is larger ?"),
            ({"bos": Bos.instruction}, f"{INPUTS} <s> which one is larger ?"),
            ({"prefix": "question : "}, f"<s> question : {INPUTS} which one is larger ?"),
            ({"postfix": " answer : "}, f"<s> {INPUTS} which one is larger ? answer :"),
            ({"separator": ", "}, "<s> red : *0 *0 , and blue : *1 *1 *1 , which one is larger ?"),
        ],
    )
    def test_of_one_turn(self, make, settings, expected):
        assert laid_out(make(**settings), PAIR) == expected

    def test_several_of_one_modality_keep_their_places(self, make):
        sample = Sample("show", [("toy", 0), ("beads", 1), ("toy", 2)])
        assert laid_out(make(), sample) == "<s> red : *0 *0 blue : *1 *1 *1 red : *2 *2 *2 *2 show"

    def test_text_alone_needs_no_media(self, make):
        assert laid_out(make(), Sample("what is this ?")) == "<s> what is this ?"

    def test_a_word_that_spells_a_special_token_is_read_as_transformers_reads_it(self, make):
        assert laid_out(make(), Sample("what </s> is")) == "<s> what </s> is"

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, "<s> blue : *0 *0 what is it ? green </s> red : *1 *1 *1 which one ?"),
            ({"prefix": "question", "postfix": "answer"}, "<s> question blue : *0 *0 what is it ? answer green </s> "
             "question red : *1 *1 *1 which one ? answer"),
            ({"bos": Bos.instruction}, "blue : *0 *0 what is it ? green </s> red : *1 *1 *1 <s> which one ?"),
            ({"earlier_turns": False}, "<s> blue : *0 *0 red : *1 *1 *1 which one ?"),
        ],
    )  # fmt: skip
    def test_of_a_conversation(self, make, settings, expected):
        sample = Sample("which one ?", [("toy", 1)], history=HISTORY)
        assert laid_out(make(**settings), sample) == expected

    def test_a_tokenizer_without_a_beginning_has_none(self, llm):
        tokenizer = copy.deepcopy(llm.tokenizer)
        tokenizer.bos_token = None
        router = Router(RouterConfig(), llm=FrozenLLM(llm.model, tokenizer, config=llm.config), cues=CUES)
        assert laid_out(router, Sample("what is this ?")) == "what is this ?"


def test_bos_may_stand_before_every_text(make):
    sample = Sample("which one ?", ["what", ("toy", 1), ("beads", 0)], history=HISTORY)
    router = make(bos=Bos.every, prefix="show", postfix="yes")
    assert laid_out(router, sample) == (
        "<s> show <s> blue : *0 *0 <s> what is it ? yes <s> green </s> "
        "<s> show <s> what <s> red : *1 *1 *1 <s> blue : *2 *2 *2 *2 <s> which one ? yes"
    )


class TestChatTemplate:
    def test_media_stand_where_the_user_put_them(self, talking):
        expected = f"<s> user : {INPUTS} which one is larger ? </s> <s> answer :".replace("user", "<unk>")
        assert laid_out(talking(), PAIR) == expected

    def test_system_message_and_earlier_turns(self, talking):
        sample = Sample("which one ?", [("toy", 1)], history=HISTORY)
        assert laid_out(talking(system="show the number"), sample) == (
            "<s> <unk> : show the number </s> <s> <unk> : blue : *0 *0 what is it ? </s> <s> <unk> : green </s> "
            "<s> <unk> : red : *1 *1 *1 which one ? </s> <s> answer :"
        )

    def test_earlier_turns_can_be_off(self, talking):
        sample = Sample("which one ?", [("toy", 1)], history=HISTORY)
        expected = "<s> <unk> : blue : *0 *0 red : *1 *1 *1 which one ? </s> <s> answer :"
        assert laid_out(talking(earlier_turns=False), sample) == expected

    def test_prefix_postfix_and_bos_are_the_template_s(self, talking):
        assert laid_out(talking(prefix="yes", postfix="no", bos=Bos.instruction), PAIR) == laid_out(talking(), PAIR)

    def test_more_than_ten_inputs(self, talking):
        sample = Sample("show", [("toy", index) for index in range(12)])
        words = laid_out(talking(cues=False), sample).split()
        assert [word for word in dict.fromkeys(words) if word[0] == "*"] == [f"*{index}" for index in range(12)]

    @pytest.mark.parametrize(
        "words",
        ["\ue0000\ue001", "\ue000 \ue001 {{ messages }} {% endfor %}", "\ue000", "\ue001\ue000", "\ue002 \ue0020"],
    )
    def test_marks_in_any_text_are_only_text(self, talking, words):
        """Neither a user nor an answer can smuggle in an input, or code of the template's language."""
        history = [Turn((f"what {words}", Media("beads", 0)), f"green {words}")]
        sample = Sample(f"which {words} one ?", [f"and {words}", ("toy", 1)], history=history)
        router = talking(system=f"show {words}")
        placed = [piece for piece in router.pieces(sample) if isinstance(piece, Media)]
        assert placed == sample.all_media
        known = set(range(len(router.llm.tokenizer)))
        assert all(set(piece) <= known for piece in router.pieces(sample) if isinstance(piece, list))

    def test_a_tokenizer_without_a_template_is_an_error(self, make):
        with pytest.raises(
            ConfigError, match=r"router.chat_template is on, but the LLM's tokenizer has no chat template"
        ):
            make(chat_template=True)

    def test_a_template_that_refuses_is_one_clear_error(self, talking):
        refusing = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + TEMPLATE
        )
        assert laid_out(talking(refusing), PAIR)
        with pytest.raises(ConfigError, match=r"chat template refuses .*no system role here"):
            talking(refusing, system="show").pieces(PAIR)

    def test_a_template_that_loses_an_input_is_one_clear_error(self, talking):
        last = "{{ messages[-1]['content'] }}"
        with pytest.raises(ConfigError, match="chat template gives 1 of 2 inputs"):
            talking(last).pieces(Sample("which ?", [("toy", 1)], history=HISTORY))


class TestBatch:
    def both(self, router: Router) -> tuple[list[Sample], PromptBatch, PromptBatch]:
        samples = [PAIR, Sample("what is this ?"), Sample("show", [("toy", 0)], history=HISTORY)]
        pieces, softs = [router.pieces(sample) for sample in samples], [markers(sample) for sample in samples]
        learning = router.assemble(pieces, softs, answers=["red", "seven eight nine", ""])
        return samples, learning, router.assemble(pieces, softs)

    @pytest.mark.parametrize("settings", [{}, {"cues": False, "bos": Bos.instruction, "separator": ","}])
    def test_generation_sees_what_training_saw(self, make, llm, settings):
        _, learning, asking = self.both(make(**settings))
        for row, answer in enumerate(["red", "seven eight nine", ""]):
            assert spell(llm, learning, row) == [*spell(llm, asking, row), *answer.split(), "</s>"]
            prompt = int(asking.attention_mask[row].sum())
            seen = learning.inputs_embeds[row, :prompt]
            assert torch.equal(seen, asking.inputs_embeds[row][asking.attention_mask[row].bool()])

    def test_training_pads_right_and_generation_left(self, make):
        _, learning, asking = self.both(make())
        for batch, ordered in ((learning, True), (asking, False)):
            assert batch.attention_mask.shape == batch.inputs_embeds.shape[:2]
            steps = batch.attention_mask.diff(dim=1)
            assert (steps <= 0).all() if ordered else (steps >= 0).all()
            assert batch.inputs_embeds[batch.attention_mask == 0].abs().sum() == 0
            assert (batch.attention_mask == 0).any() and batch.attention_mask.sum(
                1
            ).max() == batch.attention_mask.shape[1]
        assert asking.labels is None

    def test_labels_are_the_answer_and_its_end(self, make, llm):
        _, batch, _ = self.both(make())
        for row, answer in enumerate(["red", "seven eight nine", ""]):
            ids = [*llm.tokenizer.convert_tokens_to_ids(answer.split()), EOS]
            end = int(batch.attention_mask[row].sum())
            assert batch.labels[row, end - len(ids) : end].tolist() == ids
            assert (batch.labels[row] != IGNORE).sum() == len(ids)

    def test_soft_prompts_stand_in_the_prompt_exactly_once(self, make):
        samples, learning, asking = self.both(make())
        for batch in (learning, asking):
            for row, sample in enumerate(samples):
                counts = [
                    (batch.inputs_embeds[row, :, 0] == 1000 + place).sum() for place in range(len(sample.all_media))
                ]
                assert counts == [2 + place for place in range(len(sample.all_media))]

    def test_soft_prompts_keep_their_gradients(self, make):
        router, soft = make(), marker(0).requires_grad_()
        sample = Sample("show", [("toy", 0)])
        router.assemble([router.pieces(sample)], [[soft]], answers=["red"]).inputs_embeds.sum().backward()
        assert torch.equal(soft.grad, torch.ones_like(soft))


class TestLength:
    def test_what_does_not_fit_is_an_error_with_numbers(self, make):
        router, sample = make(), Sample("what is this ?", [("toy", 0)])
        pieces = [router.pieces(sample)]
        assert router.assemble(pieces, [[marker(0, 249)]]).inputs_embeds.shape[1] == 256
        with pytest.raises(InputError, match="250 soft-prompt and 7 text positions exceed its context of 256"):
            router.assemble(pieces, [[marker(0, 250)]])

    def test_new_tokens_and_answers_need_room_too(self, make):
        router, sample = make(), Sample("what is this ?", [("toy", 0)])
        pieces, softs = [router.pieces(sample)], [[marker(0, 247)]]
        assert router.assemble(pieces, softs, room=2).attention_mask.sum() == 254
        with pytest.raises(InputError, match="with 3 new tokens exceed its context of 256"):
            router.assemble(pieces, softs, room=3)
        assert router.assemble(pieces, softs, answers=["red"]).attention_mask.sum() == 256
        with pytest.raises(InputError, match="247 soft-prompt and 10 text positions exceed"):
            router.assemble(pieces, softs, answers=["red green"])
