"""The language against an independent reading of it, and the LLM's training against what it promises."""

import json
import random
import re
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from xblip_numerals import train_llm
from xblip_numerals.contexts import ALL_VALUES, NO_VALUE, ROW_TOKENS, Branch, Context, Sampler, pack
from xblip_numerals.language import (
    ATTRIBUTES,
    KINDS,
    MODALITIES,
    NUMBERS,
    VALUES,
    Thing,
    ask,
    caption,
    chance,
    describe,
    example,
    names,
    number_word,
    possible_kinds,
    random_thing,
    random_things,
    words_of,
)

CELLS = [(kind, count) for count in (1, 2, 3) for kind in KINDS if KINDS[kind].things <= count]
NOUNS = {
    "image": "image", "picture": "image", "video": "video", "clip": "video", "audio": "audio",
    "voice": "audio", "recording": "audio", "point cloud": "point_cloud", "3d shape": "point_cloud",
    "solid": "point_cloud",
}  # fmt: skip
RED_SEVEN = Thing("image", {"number": "seven", "kind": "handwriting", "color": "red", "place": "top"})
LOUD_THREE = Thing("audio", {"number": "three", "loudness": "loud", "sound": "clean"})
LEFT_FIVE = Thing("video", {"number": "five", "color": "blue", "direction": "left"})


def mentioned(things, text):
    """Indices of the things that a question names, read off its words."""
    found = set()
    for ordinal, noun in re.findall(rf"the (?:(first|second|third) )?({'|'.join(NOUNS)}|input)\b", text.lower()):
        nth = ("first", "second", "third").index(ordinal) if ordinal else 0
        alike = [i for i, thing in enumerate(things) if noun == "input" or thing.modality == NOUNS[noun]]
        assert ordinal or len(alike) == 1, f"{text!r} does not tell which {noun}"
        found.add(alike[nth])
    return found


def fact_in(text, allowed):
    """The one fact, as (name, value), that a question speaks of."""
    words = words_of(re.sub(r"(which|the) one", " ", text.lower()))
    words = [NUMBERS[int(word)] if word.isdigit() else word for word in words]
    # "left" and "right" are places and directions.
    moves = {"moving", "moves", "move"} & set(words)
    allowed = [name for name in allowed if name != ("place" if moves else "direction")]
    (fact,) = {(name, word) for word in words for name in allowed if word in VALUES[name]}
    return fact


def true_answer(things, question):
    """The answer worked out from the facts and the words of the question alone."""
    kind, about = question.kind, [things[i] for i in question.about]
    if kind in VALUES:
        return about[0].facts[kind]
    if kind == "describe":
        return caption(about[0])
    numbers = [NUMBERS.index(thing.facts["number"]) for thing in about]
    called = [names(things)[i] for i in question.about]
    if kind.startswith(("check", "which")) or kind == "number_of":
        is_number = kind in ("which_shows", "check_number")
        fact = fact_in(question.text, ["number"] if is_number else ATTRIBUTES)
        holders = [i for i, thing in enumerate(about) if fact in thing.facts.items()]
        if kind.startswith("check"):
            return "yes" if holders else "no"
        (holder,) = holders
        return about[holder].facts["number"] if kind == "number_of" else called[holder]
    if kind.startswith("same"):
        compared = {thing.facts["color" if kind == "same_color" else "number"] for thing in about}
        return "yes" if len(compared) == 1 else "no"
    if kind.startswith("sum"):
        return number_word(sum(numbers))
    if kind == "difference":
        return number_word(max(numbers) - min(numbers))
    best = max(numbers) if kind.startswith("larg") else min(numbers)
    return "neither" if numbers.count(best) > 1 else called[numbers.index(best)]


@pytest.mark.parametrize(("kind", "count"), CELLS)
def test_answers_are_true_and_questions_say_what_they_are_about(kind, count):
    rng = random.Random(f"{kind} {count}")
    for _ in range(60):
        things = random_things(rng, count, kind)
        question = ask(things, rng, kind)
        assert question.answer == true_answer(things, question), (things, question)
        named = mentioned(things, question.text)
        if named:
            assert named == set(question.about)
        else:
            assert len(question.about) == count
        assert question.text[-1] in "?."


@pytest.mark.parametrize("kind", ["check_number", "check_attribute", "same", "same_color", "same_all"])
def test_yes_and_no_are_balanced(kind):
    for count in range(KINDS[kind].things, 4):
        rng = random.Random(count)
        answers = Counter(ask(random_things(rng, count, kind), rng, kind).answer for _ in range(800))
        assert set(answers) == {"yes", "no"}
        assert 0.44 < answers["yes"] / 800 < 0.56


@pytest.mark.parametrize("kind", ["larger", "smaller"])
def test_neither_is_said_of_equal_numbers_and_rarely(kind):
    rng = random.Random(0)
    answers = Counter(ask(random_things(rng, 2, kind), rng, kind).answer for _ in range(1000))
    assert 0 < answers["neither"] < 100
    equal = (Thing("image", {"number": "two"}), Thing("audio", {"number": "two"}))
    assert ask(equal, rng, kind).answer == "neither"


def test_chance_is_the_share_of_the_most_frequent_answer():
    for kind, count in (("number", 1), ("color", 1), ("sum", 2), ("difference", 2), ("sum_all", 3)):
        rng = random.Random(0)
        answers = Counter(ask(random_things(rng, count, kind), rng, kind).answer for _ in range(2000))
        assert answers.most_common(1)[0][1] / 2000 == pytest.approx(chance(kind, count), abs=0.035)
    assert chance("which_is", 2) == 1 / 2
    assert chance("which_is", 3) == 1 / 3


def test_each_kind_has_five_phrasings():
    for kind, wording in KINDS.items():
        assert len({*wording.plain, *wording.named}) >= 5, kind


@pytest.mark.parametrize(
    ("things", "kind", "text"),
    [
        ([RED_SEVEN], "number", "Which number is in the image?"),
        ([LOUD_THREE], "number", "Which number does the audio say?"),
        ([RED_SEVEN], "number", "What number is it?"),
        ([RED_SEVEN], "describe", "Describe the image."),
        ([RED_SEVEN, LOUD_THREE], "larger", "Which number is larger, the image or the audio?"),
        ([LOUD_THREE, RED_SEVEN], "same", "Do they show the same number?"),
        ([RED_SEVEN, LOUD_THREE], "same", "Do the image and the audio show the same number?"),
        ([RED_SEVEN, LOUD_THREE], "sum", "What is the sum?"),
        ([RED_SEVEN, LOUD_THREE, LEFT_FIVE], "sum", "What is the sum of the image and the audio?"),
        ([RED_SEVEN, LOUD_THREE], "which_shows", "Which one shows seven?"),
        ([RED_SEVEN, LOUD_THREE], "which_is", "Which one is red?"),
        ([RED_SEVEN, LOUD_THREE], "which_is", "Which one is loud?"),
        ([RED_SEVEN, LEFT_FIVE], "which_is", "Which one moves left?"),
        ([RED_SEVEN, LEFT_FIVE], "number_of", "Which number has the red one?"),
        ([RED_SEVEN, LEFT_FIVE, LOUD_THREE], "largest", "Which number is the largest?"),
    ],
)
def test_plain_questions_are_asked_literally(things, kind, text):
    rng = random.Random(0)
    assert any(ask(things, rng, kind).text == text for _ in range(3000))


def test_names_count_only_what_occurs_more_than_once():
    assert names([RED_SEVEN, LOUD_THREE, RED_SEVEN]) == ["the first image", "the audio", "the second image"]


def test_numbers_above_twenty_are_two_words():
    assert [number_word(n) for n in (0, 9, 10, 19, 20, 21, 27)] == [
        "zero", "nine", "ten", "nineteen", "twenty", "twenty one", "twenty seven"
    ]  # fmt: skip


@pytest.mark.parametrize("modality", MODALITIES)
def test_descriptions_state_every_fact_and_no_other(modality):
    rng = random.Random(0)
    every_value = {value for values in VALUES.values() for value in values}
    lengths = set()
    for _ in range(300):
        thing = random_thing(rng, modality)
        for text in (describe(thing, rng), caption(thing)):
            assert set(words_of(text)) & every_value == set(thing.facts.values()), (thing, text)
        lengths.add(len(words_of(describe(thing, rng))))
    assert min(lengths) <= 5
    assert max(lengths) >= 15


def test_an_absent_fact_is_not_asked_for():
    bare = [Thing("image", {"number": "two", "kind": "sign"}), Thing("audio", {"number": "four"})]
    assert not {"color", "place", "loudness", "sound", "same_color"} & set(possible_kinds(bare))
    with pytest.raises(ValueError, match="'color' cannot be asked about these things; possible: number, kind"):
        ask(bare, random.Random(0), "color")
    with pytest.raises(ValueError, match="Unknown kind of question 'colour'; known: number"):
        ask(bare, random.Random(0), "colour")
    with pytest.raises(ValueError, match="4 things given; the language speaks of 1 to 3"):
        ask(bare * 2, random.Random(0))


def test_one_seed_gives_one_text():
    def text(seed):
        rng = random.Random(seed)
        things = random_things(rng, 3)
        return [example(things, rng, ask(things, rng)) for _ in range(20)]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_question_tells_the_fact_it_speaks_of():
    things = (RED_SEVEN, LEFT_FIVE)
    rng = random.Random(0)
    for _ in range(50):
        question = ask(things, rng, "number_of")
        name, value = question.fact
        assert name in ATTRIBUTES
        (holder,) = [thing for thing in things if thing.facts.get(name) == value]
        assert question.answer == holder.facts["number"]
    assert ask(things, rng, "sum").fact is None


@pytest.fixture(scope="module")
def tokenizer():
    return train_llm.build_tokenizer()


def test_segments_tokenise_without_unknown_words_and_without_their_neighbours(tokenizer):
    rng = random.Random(0)
    for _ in range(1500):
        things = random_things(rng, rng.randint(1, 3))
        segments, answer = example(things, rng, ask(things, rng))
        segments.append(answer)
        apart = [tokenizer(segment, add_special_tokens=False).input_ids for segment in segments]
        together = [token for ids in apart for token in ids]
        assert tokenizer.unk_token_id not in together
        assert together == tokenizer(" ".join(segments), add_special_tokens=False).input_ids
        assert tokenizer.decode(apart[-1]) == answer


def test_the_tokenizer_adds_only_a_start_and_knows_strangers(tokenizer):
    start, stranger, mark = tokenizer("Zebra?").input_ids
    assert (start, stranger) == (tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert [mark] == tokenizer("?", add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer("A LOUD voice, says one .").input_ids, skip_special_tokens=True) == (
        "a loud voice, says one."
    )


def test_questions_packed_together_are_read_as_if_alone(tokenizer):
    torch.manual_seed(0)
    model = train_llm.build_model(tokenizer).eval()
    sampler = Sampler(tokenizer=tokenizer, seed=0, noisy=False)
    contexts = [sampler.context(count=count, questions=3) for count in (1, 2, 3)]
    packed = train_llm.read_answers(model, pack(contexts, tokenizer.pad_token_id))[0]
    alone = []
    for context in sorted(contexts, key=len, reverse=True):
        for branch in context.branches:
            ids = torch.tensor([context.prefix + branch.asked + branch.answer[:-1]])
            alone.append(model(input_ids=ids).logits[0, -len(branch.answer) :])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_batch_tells_whose_tokens_are_and_what_an_answer_hangs_on(tokenizer):
    sampler = Sampler(tokenizer=tokenizer, seed=0, noisy=False)
    contexts = [sampler.context(count=3, kind=kind) for kind in ("which_shows", "number_of", "sum", "larger")]
    batch = pack(contexts, tokenizer.pad_token_id)
    assert batch.ids.shape[1] == ROW_TOKENS
    told = tokenizer.convert_ids_to_tokens(batch.ids.flatten()[batch.owned].tolist())
    cues = {"image": 0, "video": 1, "audio": 2, "3d": 3}
    starts = [i for i, word in enumerate(told[:-1]) if word in cues and told[i + 1] == ":"]
    assert len(starts) == 12
    for start, end in zip(starts, [*starts[1:], len(told)], strict=True):
        (owner,) = set(map(tuple, batch.owners[start:end].tolist()))
        assert owner[1] == cues[told[start]]
    for i, kind in enumerate(batch.kinds):
        words = tokenizer.convert_ids_to_tokens(batch.targets[batch.question == i].tolist())
        assert words[-1] == "</s>"
        about, chosen = batch.about[i].nonzero().flatten().tolist(), batch.chosen[i].nonzero().flatten().tolist()
        assert len(about) == {"which_shows": 1, "number_of": 1, "sum": 2, "larger": 2}[kind]
        assert len(chosen) == {"which_shows": 1, "number_of": 1, "sum": 2, "larger": 1}[kind]
        assert (batch.value[i] != NO_VALUE) == (kind in ("which_shows", "number_of"))
        if kind == "which_shows":
            (context,) = [context for context in contexts if context.branches[0].kind == kind]
            described = [t for t, owner in zip(context.prefix[1:], context.owners, strict=True) if owner == about[0]]
            assert ALL_VALUES[batch.value[i]] in tokenizer.convert_ids_to_tokens(described)


@pytest.mark.slow
def test_a_short_run_saves_a_model_that_speaks(tmp_path):
    train_llm.main(["--out", str(tmp_path), "--steps", "8", "--threads", "1"])
    table = json.loads((tmp_path / "accuracy.json").read_text())
    assert {(row["kind"], row["things"]) for row in table} == set(CELLS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.max_position_embeddings == 512
    assert 2e6 < model.num_parameters() < 3e6
    prompt = tokenizer("image: a red seven. What number is it? answer:", return_tensors="pt")
    told = model.generate(**prompt)[0, prompt.input_ids.shape[1] :]
    assert 1 <= len(told) <= 16
    # Teacher forcing calls an answer right exactly when greedy decoding would say it.
    *prefix, cue = prompt.input_ids[0].tolist()
    wrong = [*told[:-1].tolist(), (told[-1].item() + 1) % len(tokenizer)]
    branches = [Branch("number", [cue], answer, NO_VALUE, (0,), (0,)) for answer in (told.tolist(), wrong)]
    batch = pack([Context(prefix, [0] * (len(prefix) - 1), [0], branches)], tokenizer.pad_token_id)
    assert train_llm.right_answers(train_llm.read_answers(model, batch)[0], batch) == [True, False]
