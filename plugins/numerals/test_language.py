"""The language against an independent reading of it: answers are true, questions say what they mean, chance is as stated."""

import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import ask, chance, example, possible_kinds, random_things, vocabulary, words_of
from xblip_numerals.phrases import ATTRIBUTES, MODALITIES, NUMBERS, SHARED, VALUES
from xblip_numerals.things import (
    Thing,
    caption,
    describe,
    names,
    number_word,
    ordinary_caption,
    partly_told,
    random_thing,
    short_caption,
)

CELLS = [(kind, count) for count in (1, 2, 3) for kind in KINDS if KINDS[kind].things <= count]
NOUNS = {
    "image": "image", "picture": "image", "video": "video", "clip": "video", "audio": "audio",
    "voice": "audio", "recording": "audio", "point cloud": "point_cloud", "3d shape": "point_cloud",
    "object": "point_cloud",
}  # fmt: skip
RED_SEVEN = Thing("image", {"number": "seven", "kind": "handwriting", "color": "red", "place": "top", "paper": "dark"})
LOUD_THREE = Thing("audio", {"number": "three", "loudness": "loud", "sound": "clean", "speed": "fast"})
LEFT_FIVE = Thing("video", {"number": "five", "color": "blue", "direction": "left", "speed": "slow", "paper": "dark"})
UP_FIVE = Thing("video", {"number": "five", "color": "red", "direction": "up", "speed": "fast"})


def mentioned(things, text):
    """Indices of the things that a question names, read off its words."""
    found = set()
    for ordinal, noun in re.findall(rf"the (?:(first|second|third) )?({'|'.join(NOUNS)}|input)\b", text.lower()):
        nth = ("first", "second", "third").index(ordinal) if ordinal else 0
        alike = [i for i, thing in enumerate(things) if noun == "input" or thing.modality == NOUNS[noun]]
        if noun == "input" and not ordinal:
            continue  # "the input that shows three"
        assert ordinal or len(alike) == 1, f"{text!r} does not tell which {noun}"
        found.add(alike[nth])
    return found


def value_in(text, fact):
    """The one value of a fact that a question speaks of."""
    words = words_of(re.sub(r"(which|the|tell me which) one\b", " ", text.lower()))
    words = [NUMBERS[int(word)] if word.isdigit() else word for word in words]
    (value,) = {word for word in words if word in VALUES[fact]}
    return value


def spoken_attribute(text):
    """The attributes that a question names by name."""
    return {name for name in SHARED if name in words_of(text)}


def true_answer(things, question):
    """The answer worked out from the facts and the words of the question alone."""
    kind, about, fact = question.kind, [things[i] for i in question.about], question.fact
    if kind in VALUES:
        return about[0].facts[kind]
    if kind in ("describe", "caption"):
        return caption(about[0]) if kind == "describe" else short_caption(about[0])
    called = [names(things)[i] for i in question.about]
    held = [thing.facts.get(fact) for thing in about]
    if kind.startswith("check") or kind in ("above", "below"):
        value, (own,) = value_in(question.text, fact), held
        above = NUMBERS.index(own) - NUMBERS.index(value) if fact == "number" else 0
        truth = {"above": above > 0, "below": above < 0, "check_not": own != value}.get(kind, own == value)
        return "yes" if truth else "no"
    if kind in ("which_shows", "which_is", "which_is_not", "number_of", "attribute_of", "count"):
        value = value_in(question.text, fact)
        right = [i for i, own in enumerate(held) if (own == value) != (kind == "which_is_not")]
        if kind == "count":
            return NUMBERS[len(right)]
        (one,) = right
        told = {"number_of": "number", "attribute_of": question.told}.get(kind)
        return about[one].facts[told] if told else called[one]
    if kind in ("same", "same_all", "different", "same_attribute", "different_attribute"):
        assert spoken_attribute(question.text) == ({fact} if "attribute" in kind else set())
        return "yes" if (len(set(held)) == 1) == kind.startswith("same") else "no"
    if kind == "which_pair":
        return " and ".join(name for name, own in zip(called, held, strict=True) if held.count(own) == 2)
    numbers = [NUMBERS.index(own) for own in held]
    if kind.startswith("sum"):
        return number_word(sum(numbers))
    if kind == "difference":
        return number_word(max(numbers) - min(numbers))
    best = {"l": max(numbers), "s": min(numbers), "m": sorted(numbers)[len(numbers) // 2]}[kind[0]]
    return "neither" if numbers.count(best) > 1 else called[numbers.index(best)]


@pytest.mark.parametrize(("kind", "count"), CELLS)
def test_answers_are_true_and_questions_say_what_they_are_about(kind, count):
    rng = random.Random(f"{kind} {count}")
    for _ in range(60):
        things, fact = random_things(rng, count, kind)
        question = ask(things, rng, kind, fact)
        assert question.answer == true_answer(things, question), (things, question)
        named = mentioned(things, question.text)
        if named:
            assert named == set(question.about)
        else:
            assert len(question.about) == count
        assert question.text[-1] in "?."
        for i in question.chosen:
            assert i in question.about
            assert question.told not in VALUES or question.answer == things[i].facts[question.told]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), CELLS)
def test_the_question_alone_gives_no_more_than_its_stated_chance(kind, count):
    """The best guess from all that a question says: its fact, its value, and which inputs it names."""
    rng = random.Random(f"{kind} {count}")
    draws = 1500
    groups, stated = defaultdict(Counter), 0.0
    for _ in range(draws):
        things, fact = random_things(rng, count, kind)
        question = ask(things, rng, kind, fact)
        stated += chance(kind, len(question.about)) / draws
        # An answer that names inputs is told by their places among those asked about.
        called = [names(things)[i] for i in question.about]
        answer = " ".join(
            str(called.index(name)) if name in called else name for name in question.answer.split(" and ")
        )
        groups[question.fact, question.told, question.value, len(question.about)][answer] += 1
    constant = sum(groups.values(), Counter()).most_common(1)[0][1] / draws
    # The best of k guesses looks better than it is by about sqrt(k / draws), since groups are small.
    luck = 0.5 * (len(groups) / draws) ** 0.5 + 0.04
    best = sum(group.most_common(1)[0][1] for group in groups.values()) / draws
    assert constant <= stated + 0.05, (constant, stated)
    assert best <= stated + luck, (best, stated)
    if stated and kind != "attribute_of":
        assert best >= stated - 0.05, f"chance is stated as {stated}, and is {best}"


def test_there_are_enough_kinds_and_each_has_five_phrasings():
    assert len(KINDS) >= 45
    for kind, wording in KINDS.items():
        if kind != "attribute_of":  # it is phrased as each attribute is
            assert len({*wording.plain, *wording.named}) >= 5, kind


@pytest.mark.parametrize("kind", ["larger", "smaller"])
def test_neither_is_said_of_equal_numbers_and_rarely(kind):
    rng = random.Random(0)
    answers = Counter(ask(random_things(rng, 2, kind)[0], rng, kind).answer for _ in range(1000))
    assert 0 < answers["neither"] < 100
    equal = (Thing("image", {"number": "two"}), Thing("audio", {"number": "two"}))
    assert ask(equal, rng, kind).answer == "neither"


@pytest.mark.parametrize(
    ("things", "kind", "text", "answer"),
    [
        ([RED_SEVEN], "number", "Which number is in the image?", "seven"),
        ([LOUD_THREE], "number", "Which number does the audio say?", "three"),
        ([RED_SEVEN], "describe", "Describe the image.", "a red seven as handwriting on dark paper at the top."),
        ([RED_SEVEN], "caption", "Give a short caption of the image.", "a red seven at the top."),
        ([RED_SEVEN], "check_not", "Is it not red?", "no"),
        ([LEFT_FIVE], "check_not", "Is it true that it does not move left?", "no"),
        ([LEFT_FIVE], "above", "Is it more than four?", "yes"),
        ([LEFT_FIVE], "below", "Is it less than four?", "no"),
        ([RED_SEVEN, LOUD_THREE], "larger", "Which number is larger, the image or the audio?", "the image"),
        ([LOUD_THREE, RED_SEVEN], "same", "Do they show the same number?", "no"),
        ([LOUD_THREE, RED_SEVEN], "different", "Do they show different numbers?", "yes"),
        ([RED_SEVEN, LOUD_THREE, LEFT_FIVE], "sum", "What is the sum of the image and the audio?", "ten"),
        ([RED_SEVEN, LEFT_FIVE], "same_attribute", "Do they have the same paper?", "yes"),
        ([LOUD_THREE, LEFT_FIVE], "different_attribute", "Do they differ in speed?", "yes"),
        ([RED_SEVEN, LOUD_THREE], "which_shows", "Which one shows seven?", "the image"),
        ([RED_SEVEN, LEFT_FIVE], "which_is", "Which one is red?", "the image"),
        ([LEFT_FIVE, UP_FIVE], "which_is", "Which one moves left?", "the first video"),
        ([RED_SEVEN, LEFT_FIVE], "which_is_not", "Which one is not red?", "the video"),
        ([RED_SEVEN, LEFT_FIVE], "number_of", "What number is the red one?", "seven"),
        ([RED_SEVEN, LOUD_THREE], "number_of", "What number is the loud one?", "three"),
        ([RED_SEVEN, LOUD_THREE], "attribute_of", "How fast is the one that shows three?", "fast"),
        ([RED_SEVEN, LEFT_FIVE, UP_FIVE], "count", "How many of them are red?", "two"),
        ([LEFT_FIVE, RED_SEVEN, Thing("audio", {"number": "five"})], "which_pair", "Which two show the same number?",
         "the video and the audio"),
        ([RED_SEVEN, LEFT_FIVE, LOUD_THREE], "middle", "Which number is in the middle?", "the video"),
        ([RED_SEVEN, LEFT_FIVE, LOUD_THREE], "largest", "Which number is the largest?", "the image"),
    ],
)  # fmt: skip
def test_plain_questions_are_asked_literally(things, kind, text, answer):
    rng = random.Random(0)
    asked = (ask(things, rng, kind) for _ in range(6000))
    assert next(question.answer for question in asked if question.text == text) == answer


def test_a_question_that_modalities_alone_answer_is_not_asked():
    assert "which_is" not in possible_kinds([LOUD_THREE, Thing("image", {"number": "two", "frame": "bare"})])


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
        thing = partly_told(rng, random_thing(rng, modality))
        for text in (describe(thing, rng), caption(thing)):
            assert set(words_of(text)) & every_value == set(thing.facts.values()), (thing, text)
        lengths.add(len(words_of(describe(thing, rng))))
    assert min(lengths) <= 4
    assert max(lengths) >= 30


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_thing_has_at_least_five_attributes_and_a_caption_names_one_or_two(modality):
    rng = random.Random(0)
    things = [random_thing(rng, modality) for _ in range(200)]
    assert max(len(thing.facts) for thing in things) >= 6
    told = Counter()
    for thing in things:
        words = words_of(ordinary_caption(thing, rng))
        assert thing.facts["number"] in words
        told[sum(value in words for name, value in thing.facts.items() if name != "number")] += 1
    assert set(told) == {1, 2}
    assert (
        caption(things[0], ())
        == f"{'an' if things[0].facts['number'] == 'eight' else 'a'} {things[0].facts['number']}."
    )


def test_a_hand_has_no_ink_on_paper():
    rng = random.Random(0)
    signs = [thing for thing in (random_thing(rng, "image") for _ in range(100)) if thing.facts["kind"] == "sign"]
    assert signs and all(set(sign.facts) == {"number", "kind", "color", "place", "size", "frame"} for sign in signs)


def test_things_are_told_whole_half_of_the_time_and_what_must_be_told_is():
    rng = random.Random(0)
    things = [partly_told(rng, random_thing(rng, "video"), keep=("growth",)) for _ in range(1000)]
    assert 0.45 < sum(len(thing.facts) == 7 for thing in things) / 1000 < 0.65
    assert all("growth" in thing.facts for thing in things)
    assert 10 < sum("number" not in thing.facts for thing in things) < 100


def test_an_absent_fact_is_not_asked_for():
    bare = [Thing("image", {"number": "two", "kind": "sign"}), Thing("audio", {"number": "four"})]
    assert not {"color", "place", "loudness", "sound", "same_attribute"} & set(possible_kinds(bare))
    with pytest.raises(ValueError, match="'color' cannot be asked about these things; possible: number, kind"):
        ask(bare, random.Random(0), "color")
    with pytest.raises(ValueError, match="Unknown kind of question 'colour'; known: number"):
        ask(bare, random.Random(0), "colour")
    with pytest.raises(ValueError, match="Unknown kind of question 'colour'; known: number"):
        random_things(random.Random(0), 1, "colour")
    with pytest.raises(ValueError, match="4 things given; the language speaks of 1 to 3"):
        ask(bare * 2, random.Random(0))
    with pytest.raises(ValueError, match="'pose' cannot be asked about image and audio"):
        random_things(random.Random(0), 2, "pose", ["image", "audio"])


def test_modalities_can_be_given():
    things, fact = random_things(random.Random(0), 2, "which_is", ["audio", "audio"])
    assert [thing.modality for thing in things] == ["audio", "audio"] and fact in MODALITIES["audio"].clauses


def test_one_seed_gives_one_text():
    def text(seed):
        rng = random.Random(seed)
        things, _ = random_things(rng, 3)
        return [example(things, rng, ask(things, rng)) for _ in range(20)]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_every_attribute_can_be_looked_for_and_told():
    rng = random.Random(0)
    looked_for, told = set(), set()
    for _ in range(1500):
        things, fact = random_things(rng, 2, "number_of")
        looked_for.add(ask(things, rng, "number_of", fact).fact)
        things, fact = random_things(rng, 2, "attribute_of")
        told.add(ask(things, rng, "attribute_of", fact).told)
    assert looked_for == told == set(ATTRIBUTES)


def test_the_readme_names_every_kind():
    readme = (Path(__file__).parent / "README.md").read_text()
    table = readme[readme.index("## What is asked") : readme.index("Answers are balanced")]
    named = set(re.findall(r"`(\w+)`", table))
    assert named <= set(KINDS) and set(KINDS) - set(ATTRIBUTES) <= named
    assert f"There are {len(KINDS)} kinds" in readme


def test_the_vocabulary_is_small():
    assert 250 < len(vocabulary()) < 350
