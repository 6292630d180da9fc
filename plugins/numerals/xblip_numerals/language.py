"""The language of the numerals world: from facts to descriptions, questions and answers.

A `Thing` is one input (an image, a video, ...) reduced to its facts. Everything the small LLM reads is made
here from facts alone, and the same facts make the media: a question about pictures and sounds therefore has
the answer that the same question about their descriptions has.

All randomness comes from the `random.Random` that the caller passes.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from xblip_numerals.kinds import KINDS, THE_ONE
from xblip_numerals.phrases import (
    ANSWER_CUE,
    ATTRIBUTES,
    COMPARATIVES,
    FORMS,
    MAX_THINGS,
    MODALITIES,
    NO_SIGN_HAS,
    NUMBERS,
    OPENINGS,
    ORDINALS,
    OVERTURES,
    PLAIN_FORM,
    SHARED,
    SPARE_WORDS,
    TEENS,
    VALUES,
)

# Facts of enough values that one of them is left over, whatever three things have: none may have it.
_COUNTED = tuple(name for name in VALUES if len(VALUES[name]) > MAX_THINGS)
# What each kind that weighs things against each other may weigh.
_WEIGHED = {
    "check_attribute": ATTRIBUTES,
    "check_not": ATTRIBUTES,
    "same_attribute": SHARED,
    "different_attribute": SHARED,
    "which_is": ATTRIBUTES,
    "which_is_not": ATTRIBUTES,
    "number_of": ATTRIBUTES,
    "attribute_of": ATTRIBUTES,
    "count": _COUNTED,
    "describe": ("",),
    "caption": ("",),
    **{name: (name,) for name in VALUES},
}
_SEVERAL = ("same_attribute", "different_attribute", "which_is", "which_is_not", "number_of", "attribute_of")
"""Kinds that need two things with the attribute."""
# Which things share a value: with two of three equal, `ask` has both answers.
_PAIRED = {0: ("",), 1: ("a",), 2: ("aa", "ab"), 3: ("aab", "aba", "baa")}
_PATTERNS = {
    **dict.fromkeys(("same", "different", "same_attribute", "different_attribute"), _PAIRED),
    "same_all": {3: ("aaa", "aaa", "aaa", "aaa", "aab", "aba", "baa", "abc")},
    "which_pair": {3: ("aab", "aba", "baa")},
    "count": {2: ("aa", "ab"), 3: ("aaa", "aaa", "aab", "aba", "baa", "abc")},  # each count is equally likely
}
DRAWN_FOR = (*_PATTERNS, "which_is_not")
"""Questions whose answers are balanced only among things drawn for them."""


@dataclass(frozen=True)
class Thing:
    """One input: its modality and what is true of it. An absent fact is neither described nor asked for."""

    modality: str
    facts: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True)
class Question:
    """A question in words and its one right answer.

    Attributes:
        kind: a key of `KINDS`.
        text: the question.
        answer: the answer.
        about: indices of the things that decide it.
        fact: name of the fact that decides it: "color" in "Which is red?" and in "What number is the red one?"; empty
            for descriptions.
        value: the value of it that the question itself speaks of, "red", or empty.
        told: the fact that the answer states of one thing, "number" in "What number is the red one?", or empty.
        chosen: indices of the things that the answer is about: of the one red thing among those asked about.
    """

    kind: str
    text: str
    answer: str
    about: tuple[int, ...]
    fact: str
    value: str
    told: str
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class _Candidate:
    """A question before it has words; as in `Question`."""

    about: tuple[int, ...]
    answer: str
    fact: str
    value: str = ""
    told: str = ""
    chosen: tuple[int, ...] | None = None


def random_thing(rng: random.Random, modality: str) -> Thing:
    """A thing with every fact that its modality has, each drawn evenly."""
    facts = {name: rng.choice(VALUES[name]) for name in MODALITIES[modality].clauses}
    if facts.get("kind") == "sign":
        facts = {name: value for name, value in facts.items() if name not in NO_SIGN_HAS}
    return Thing(modality, facts)


def partly_told(rng: random.Random, thing: Thing, keep: Sequence[str] = ()) -> Thing:
    """`thing` as a description may know it: half of the time whole, else with any share of its facts.

    A soft prompt tells everything, a person's caption an attribute or two. `keep` names facts that are always told.
    """
    share = 1.0 if rng.random() < 0.5 else rng.random()
    chances = {name: 1.0 if name in keep else max(share, 0.9) if name == "number" else share for name in thing.facts}
    told = {name: value for name, value in thing.facts.items() if rng.random() < chances[name]}
    return Thing(thing.modality, told or dict(thing.facts))


def random_things(rng: random.Random, count: int, kind: str | None = None) -> tuple[tuple[Thing, ...], str | None]:
    """Things of any modalities, partly told, about which `kind` can be asked, with balanced answers.

    Returns:
        The things, and the fact that they were drawn for: what `ask` is to ask of, if answers are to be balanced.
    """
    fact = None
    while True:
        names_of = list(MODALITIES)
        modalities = [rng.choice(names_of) for _ in range(count)]
        if kind is not None:
            # What several modalities share is asked of more.
            weighed = _WEIGHED.get(kind, ("number",))
            fact = rng.choices(weighed, [2 if name in SHARED else 1 for name in weighed])[0]
            having = [name for name in names_of if not fact or fact in MODALITIES[name].clauses]
            those = range(count)
            if kind != "count":
                those = rng.sample(those, rng.randint(min(2, count), count) if kind in _SEVERAL else 1)
            for i in those:
                modalities[i] = rng.choice(having)
        keep = (fact, "number") if kind in ("number_of", "attribute_of") else (fact,)
        things = [partly_told(rng, random_thing(rng, modality), keep) for modality in modalities]
        if kind in _PATTERNS:
            holders = [i for i, thing in enumerate(things) if fact in thing.facts]
            values = rng.sample(VALUES[fact], min(len(VALUES[fact]), MAX_THINGS))
            for i, letter in zip(holders, rng.choice(_PATTERNS[kind].get(len(holders), ("",))), strict=False):
                things[i] = Thing(things[i].modality, {**things[i].facts, fact: values["abc".index(letter)]})
        if kind in ("larger", "smaller") and rng.random() < 0.5:
            if len({thing.facts.get("number") for thing in things}) == 1:
                continue  # "neither" stays rare
        if kind is None or any(_candidates(things, kind, rng, fact)):
            return tuple(things), "number" if kind == "attribute_of" else fact


def caption(thing: Thing, facts: Sequence[str] | None = None) -> str:
    """One canonical sentence that states every fact of `thing`, or only the number and those named in `facts`."""
    modality, told = MODALITIES[thing.modality], thing.facts
    if facts is not None:
        told = {name: value for name, value in told.items() if name == "number" or name in facts}
    words = [told[name] for name in modality.before if name in told] + [told.get("number", "number")]
    after = [form.format(_with_article(told[name])) for name, form in modality.after.items() if name in told]
    article = "an" if words[0][0] in "aeiou" and words[0] != "one" else "a"
    return " ".join([article, *words, *after]) + "."


def short_caption(thing: Thing) -> str:
    """The number and the usual attributes in a sentence."""
    return caption(thing, MODALITIES[thing.modality].usual)


def describe(thing: Thing, rng: random.Random) -> str:
    """Every fact of `thing` in one of many wordings: bare values, labels, the caption, or clauses.

    Lengths vary widely on purpose, from one word to about 50: a soft prompt of any length will stand here.
    """
    modality = MODALITIES[thing.modality]
    facts = rng.sample(sorted(thing.facts.items()), len(thing.facts))
    style = rng.random()
    if style < 0.25:
        return rng.choice((" ", ", ")).join(value for _, value in facts)
    if style < 0.4:
        return rng.choice((", ", ". ")).join(f"{name} {value}" for name, value in facts)
    if style < 0.6:
        return rng.choice(("", "here, ", "look, ")) + caption(thing)
    clauses = [rng.choice(modality.clauses[name]).format(_with_article(value)) for name, value in facts]
    if rng.random() < 0.3:
        clauses.insert(0, rng.choice(OPENINGS).format(modality.noun))
    return rng.choice((", ", ". ", " and ", ", and ", " ")).join(clauses) + rng.choice(("", "."))


def names(things: Sequence[Thing]) -> list[str]:
    """The canonical name of each thing: "the image", or "the first image" where there are several images."""
    return [_name(things, i, MODALITIES[thing.modality].noun) for i, thing in enumerate(things)]


def number_word(number: int) -> str:
    """0..29 in words: "seven", "seventeen", "twenty", "twenty one"."""
    tens, ones = divmod(number, 10)
    if tens == 2:
        return "twenty" if ones == 0 else f"twenty {NUMBERS[ones]}"
    return (NUMBERS, TEENS)[tens][ones]


def possible_kinds(things: Sequence[Thing]) -> list[str]:
    """The kinds of question that these things can answer."""
    rng = random.Random(0)
    return [kind for kind in KINDS if next(_candidates(things, kind, rng), None)]


def chance(kind: str, about: int) -> float:
    """Accuracy of the best answer to the question alone, where `about` things are asked about."""
    if kind in ("which_shows", "which_is", "which_is_not"):
        return 1 / about
    return 1 / (about + 1) if kind == "count" else KINDS[kind].chance


def ask(things: Sequence[Thing], rng: random.Random, kind: str | None = None, fact: str | None = None) -> Question:
    """A question about one to three `things`, decided by `fact` if that is given.

    Where these things allow several answers, yes and no are equally likely, and "neither" is rare.

    Raises:
        ValueError: `kind` is unknown, or cannot be asked about these things.
    """
    if not 1 <= len(things) <= MAX_THINGS:
        raise ValueError(f"{len(things)} things given; the language speaks of 1 to {MAX_THINGS}.")
    if kind is None:
        kind = rng.choice(possible_kinds(things))
    elif kind not in KINDS:
        raise ValueError(f"Unknown kind of question {kind!r}; known: {', '.join(KINDS)}.")
    candidates = list(_candidates(things, kind, rng, fact))
    if not candidates:
        possible = ", ".join(possible_kinds(things))
        raise ValueError(f"{kind!r} cannot be asked about these things; possible: {possible}.")
    # First what is asked of, then the answer: else the one would often give the other away.
    spoken_of = rng.choice(sorted({(candidate.fact, candidate.told) for candidate in candidates}))
    candidates = [candidate for candidate in candidates if (candidate.fact, candidate.told) == spoken_of]
    answers = sorted({candidate.answer for candidate in candidates})
    if set(answers) <= {"yes", "no"}:
        answers = [rng.choice(answers)]
    elif "neither" in answers and len(answers) > 1 and rng.random() < 0.95:
        answers.remove("neither")
    chosen = rng.choice([candidate for candidate in candidates if candidate.answer in answers])
    return Question(
        kind,
        _wording(things, kind, chosen, rng),
        chosen.answer,
        chosen.about,
        chosen.fact,
        chosen.value,
        chosen.told,
        chosen.about if chosen.chosen is None else chosen.chosen,
    )


def example(things: Sequence[Thing], rng: random.Random, question: Question) -> tuple[list[str], str]:
    """The prompt as text segments (cue, description, ..., question, "answer:") and the answer.

    Segments are tokenised one by one, so that a soft prompt can later stand where a description stands.
    """
    segments = []
    for thing in things:
        segments += [MODALITIES[thing.modality].cue, describe(thing, rng)]
    return [*segments, question.text, ANSWER_CUE], question.answer


def words_of(text: str) -> list[str]:
    """Lower-case words and single marks, as the tokenizer splits them."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def vocabulary() -> list[str]:
    """Every word that this language can say, sorted, and some spare ones for a person's own phrasing."""
    text = [ANSWER_CUE, "yes no neither twenty input the a an and 's", *TEENS, *ORDINALS]
    text += [*OVERTURES, *OPENINGS, *SPARE_WORDS, *VALUES, *THE_ONE, *PLAIN_FORM]
    for modality in MODALITIES.values():
        text += [modality.cue, modality.noun, *modality.aliases, *modality.after.values()]
        text += [clause for clauses in modality.clauses.values() for clause in clauses]
    for kind in KINDS.values():
        text += [*kind.plain, *kind.named]
    for words in (*VALUES.values(), *COMPARATIVES.values(), *FORMS.values()):
        text += words
    return sorted({word for line in text for word in words_of(re.sub(r"{.*?}", " ", line))})


def _candidates(
    things: Sequence[Thing], kind: str, rng: random.Random, fact: str | None = None
) -> Iterator[_Candidate]:
    """Every question of this kind, decided by `fact` if given, that these things answer; a "no" has a random value."""
    everything = tuple(range(len(things)))
    wanted = _WEIGHED.get(kind, ("number",)) if fact is None else (fact,)
    if kind in VALUES:
        yield from (_Candidate((i,), value, kind, told=kind) for i, _, value in _facts(things, everything, (kind,)))
    elif kind == "describe":
        yield from (_Candidate((i,), caption(thing), "") for i, thing in enumerate(things))
    elif kind == "caption":
        yield from (_Candidate((i,), short_caption(thing), "") for i, thing in enumerate(things))
    elif kind.startswith("check"):
        right, wrong = ("no", "yes") if kind == "check_not" else ("yes", "no")
        for i, name, value in _facts(things, everything, wanted):
            yield _Candidate((i,), right, name, value)
            yield _Candidate((i,), wrong, name, rng.choice([other for other in VALUES[name] if other != value]))
    elif kind in ("above", "below"):
        for i, name, value in _facts(things, everything, ("number",)):
            yield from _compared_with_numbers(i, name, value, kind)
    elif kind in ("which_shows", "which_is", "which_is_not"):
        for size in range(2, len(things) + 1):
            for group in combinations(everything, size):
                yield from _looked_for(things, group, wanted, denied=kind == "which_is_not")
    elif kind == "number_of":
        for found in _looked_for(things, everything, wanted, easy=True):
            if number := things[found.chosen[0]].facts.get("number"):
                yield replace(found, answer=number, told="number")
    elif kind == "attribute_of":
        for found in _looked_for(things, everything, ("number",), easy=True):
            held = things[found.chosen[0]].facts
            yield from (replace(found, answer=held[name], told=name) for name in ATTRIBUTES if name in held)
    elif kind == "count":
        yield from _counted(things, wanted, rng)
    else:
        yield from _weighed(things, kind, wanted)


def _facts(things: Sequence[Thing], group: Sequence[int], wanted: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    for i in group:
        yield from ((i, name, things[i].facts[name]) for name in wanted if name in things[i].facts)


def _compared_with_numbers(i: int, fact: str, value: str, kind: str) -> Iterator[_Candidate]:
    """Numbers near the thing's own: were they far off, the number asked about would often give the answer."""
    number, up = NUMBERS.index(value), 1 if kind == "above" else -1
    for step in (1, 2, 3):
        for answer, bound in (("yes", number - up * step), ("no", number + up * (step - 1))):
            if 0 < bound < len(NUMBERS) - 1:
                yield _Candidate((i,), answer, fact, NUMBERS[bound])


def _looked_for(
    things: Sequence[Thing], group: Sequence[int], wanted: Sequence[str], *, denied: bool = False, easy: bool = False
) -> Iterator[_Candidate]:
    """The one thing of a group that has a value, or (`denied`) that alone has another one.

    Unless `easy`, all are of modalities that have the fact: which of an image and a voice is loud needs no look.
    A denial needs to know it of all.
    """
    for name in wanted:
        if len(group) < 2 or not (easy or all(name in MODALITIES[things[i].modality].clauses for i in group)):
            continue
        held = [things[i].facts.get(name) for i in group]
        if denied and (None in held or len(set(held)) != 2):
            continue
        for i, value in zip(group, held, strict=True):
            if value is None or held.count(value) != 1:
                continue
            if denied:  # of two, what the other has; of three, what both others have
                value = next(other for other in held if other != value)
                if held.count(value) != len(group) - 1:
                    continue
            yield _Candidate(tuple(group), _called(things, i), name, value, chosen=(i,))


def _counted(things: Sequence[Thing], wanted: Sequence[str], rng: random.Random) -> Iterator[_Candidate]:
    """How many have a value: one that none has as often as each other count, among things drawn for it."""
    for name in wanted:
        held = [thing.facts.get(name) for thing in things]
        if len(things) > 1 and None not in held:
            value = rng.choice(held)
            if rng.random() < 1 / (len(things) + 1):
                value = rng.choice([other for other in VALUES[name] if other not in held])
            chosen = tuple(i for i, other in enumerate(held) if other == value)
            yield _Candidate(tuple(range(len(things))), NUMBERS[len(chosen)], name, value, chosen=chosen)


def _weighed(things: Sequence[Thing], kind: str, wanted: Sequence[str]) -> Iterator[_Candidate]:
    """Questions that weigh a fact of some things against each other."""
    size = KINDS[kind].things
    for name in wanted:
        holders = {i: value for i, _, value in _facts(things, range(len(things)), (name,))}
        if size == 3 and len(holders) < len(things):
            return  # "all three" would be untrue
        for group in combinations(holders, size):
            answer, chosen = _verdict(kind, [holders[i] for i in group])
            if answer or chosen:
                those = tuple(group[place] for place in chosen)
                answer = answer or " and ".join(_called(things, i) for i in those)
                yield _Candidate(group, answer, name, chosen=those or group)


def _verdict(kind: str, values: Sequence[str]) -> tuple[str, Sequence[int]]:
    """The answer to a question that weighs `values` against each other, or the places of those that it names, or neither."""
    if kind.startswith("same"):
        return "yes" if len(set(values)) == 1 else "no", ()
    if kind.startswith("different"):
        return "no" if len(set(values)) == 1 else "yes", ()
    if kind == "which_pair":
        alike = [i for i, value in enumerate(values) if values.count(value) == 2]
        return "", alike
    numbers = [NUMBERS.index(value) for value in values]
    if kind.startswith("sum"):
        return number_word(sum(numbers)), ()
    if kind == "difference":
        return number_word(abs(numbers[0] - numbers[1])), ()
    if kind == "middle":
        return "", [numbers.index(sorted(numbers)[1])] if len(set(numbers)) == 3 else ()
    best = max(numbers) if kind.startswith("larg") else min(numbers)
    if numbers.count(best) == 1:
        return "", [numbers.index(best)]
    return "neither" if len(numbers) == 2 else "", ()


def _wording(things: Sequence[Thing], kind: str, chosen: _Candidate, rng: random.Random) -> str:
    phrasings = KINDS[kind]
    value = str(NUMBERS.index(chosen.value)) if chosen.value in NUMBERS and rng.random() < 0.1 else chosen.value
    if kind == "attribute_of":
        mentions, template = [rng.choice(THE_ONE).format(value)], rng.choice(KINDS[chosen.told].named)
    else:
        # Silence about which things are meant is clear only where no other thing could be meant.
        plain = phrasings.plain if len(chosen.about) == len(things) else ()
        named = phrasings.named if len(chosen.about) <= 2 else ()
        template = rng.choice(plain if plain and (not named or rng.random() < 0.5) else named)
        mentions = [_mention(things, i, rng) for i in rng.sample(chosen.about, len(chosen.about))]
    forms = [form.format(_with_article(value)) for form in FORMS.get(chosen.fact, PLAIN_FORM)[:-1]]
    text = template.format(
        a=mentions[0],
        b=mentions[-1],
        **dict(zip(("v", "does", "doesnt", "do"), forms, strict=True)),
        the=FORMS.get(chosen.fact, PLAIN_FORM)[-1].format(_with_article(value) if chosen.fact == "speaker" else value),
        fact=chosen.fact,
        more=rng.choice(COMPARATIVES.get(kind, ("",))),
    )
    if rng.random() < 0.1:
        text = rng.choice(OVERTURES) + text
    return text[0].upper() + text[1:]


def _mention(things: Sequence[Thing], i: int, rng: random.Random) -> str:
    """One of the ways to refer to a thing: its name, an alias, or its place among all the inputs."""
    modality = MODALITIES[things[i].modality]
    way = rng.random()
    if way < 0.6:
        return _called(things, i)
    if way < 0.85 or len(things) == 1:
        return _name(things, i, rng.choice(modality.aliases))
    return f"the {ORDINALS[i]} input"


def _called(things: Sequence[Thing], i: int) -> str:
    return _name(things, i, MODALITIES[things[i].modality].noun)


def _name(things: Sequence[Thing], i: int, noun: str) -> str:
    twins = [j for j, thing in enumerate(things) if thing.modality == things[i].modality]
    return f"the {noun}" if len(twins) == 1 else f"the {ORDINALS[twins.index(i)]} {noun}"


def _with_article(value: str) -> str:
    return f"a {value}" if value in ("sign", "robot") else value
