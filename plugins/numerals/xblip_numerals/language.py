"""The language of the numerals world: from facts to descriptions, questions and answers.

A `Thing` is one input (an image, a video, ...) reduced to its facts. Everything the small LLM reads is made
here from facts alone, and the same facts make the media: a question about pictures and sounds therefore has
the answer that the same question about their descriptions has.

All randomness comes from the `random.Random` that the caller passes.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from xblip_numerals.kinds import KINDS
from xblip_numerals.phrases import (
    ANSWER_CUE,
    ATTRIBUTES,
    COMPARATIVES,
    FORMS,
    MAX_THINGS,
    MODALITIES,
    NUMBERS,
    OPENINGS,
    ORDINALS,
    OVERTURES,
    SPARE_WORDS,
    TEENS,
    VALUES,
)

# Which things share a value: yes and no are equally likely; with two of three equal, `ask` has both.
_PATTERNS = {
    0: ("",),
    1: ("a",),
    2: ("aa", "ab"),
    3: ("aab", "aba", "baa"),
    "same_all": ("aaa", "aaa", "aaa", "aaa", "aab", "aba", "baa", "abc"),
}


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
        fact: the fact that the question itself speaks of, by name and value: ("color", "red") in "Which is red?".
    """

    kind: str
    text: str
    answer: str
    about: tuple[int, ...]
    fact: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Candidate:
    """A question before it has words: what decides it, its answer, and the value it speaks of."""

    about: tuple[int, ...]
    answer: str
    value: str = ""
    attribute: str = "number"


def random_thing(rng: random.Random, modality: str) -> Thing:
    """A thing with random facts: a sign has no place and may have no color; any attribute may be missing."""
    facts = {name: rng.choice(VALUES[name]) for name in MODALITIES[modality].clauses}
    if facts.get("kind") == "sign":
        del facts["place"]
    for name in [name for name in facts if name not in ("number", "kind")]:
        if rng.random() < (0.3 if facts.get("kind") == "sign" else 0.03):
            del facts[name]
    return Thing(modality, facts)


def random_things(rng: random.Random, count: int, kind: str | None = None) -> tuple[Thing, ...]:
    """Things of any modalities about which `kind` can be asked, with balanced answers.

    Equality of numbers (`same`, `same_all`) and of colors (`same_color`) holds half of the time. For
    questions that tell things apart by an attribute, most draws hold two things of one modality: else the
    modality alone would often answer.
    """
    while True:
        modalities = [rng.choice(tuple(MODALITIES)) for _ in range(count)]
        if kind in ("which_is", "number_of") and rng.random() < 0.6:
            one, other = rng.sample(range(count), 2)
            modalities[other] = modalities[one]
        things = [random_thing(rng, modality) for modality in modalities]
        if kind in ("same", "same_all", "same_color"):
            fact = "color" if kind == "same_color" else "number"
            holders = [i for i, thing in enumerate(things) if fact in thing.facts]
            values = rng.sample(VALUES[fact], MAX_THINGS)
            pattern = rng.choice(_PATTERNS[kind if kind == "same_all" else len(holders)])
            for i, letter in zip(holders, pattern, strict=False):
                things[i] = Thing(things[i].modality, {**things[i].facts, fact: values["abc".index(letter)]})
        if kind in ("larger", "smaller") and rng.random() < 0.5:
            if len({thing.facts["number"] for thing in things}) == 1:
                continue  # "neither" stays rare
        if kind is None or kind in possible_kinds(things):
            return tuple(things)


def caption(thing: Thing) -> str:
    """One canonical sentence that states every fact of `thing`."""
    fact = thing.facts.get
    number = fact("number", "number")
    if thing.modality == "audio":
        return _sentence(_noun_phrase(fact("loudness"), fact("sound"), "voice"), f"says {number}")
    if fact("kind") == "sign":
        return _sentence(f"a sign of {number}", fact("color") and f"on a {fact('color')} page")
    return _sentence(
        _noun_phrase(fact("color"), fact("thickness"), fact("pose"), number),
        fact("kind") and f"in {fact('kind')}",
        fact("place") and f"at the {fact('place')}",
        fact("direction") and f"moving {fact('direction')}",
    )


def describe(thing: Thing, rng: random.Random) -> str:
    """Every fact of `thing` in one of many wordings: bare values, labels, the caption, or clauses.

    Lengths vary widely on purpose, from one word to about 30: a soft prompt of any length will stand here.
    """
    modality = MODALITIES[thing.modality]
    facts = rng.sample(sorted(thing.facts.items()), len(thing.facts))
    style = rng.random()
    if style < 0.2:
        return rng.choice((" ", ", ")).join(value for _, value in facts)
    if style < 0.35:
        return rng.choice((", ", ". ")).join(f"{name} {value}" for name, value in facts)
    if style < 0.5:
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


def chance(kind: str, count: int) -> float:
    """Accuracy of the best constant answer to `kind` among `count` things."""
    return 1 / count if kind in ("which_shows", "which_is") else KINDS[kind].chance


def ask(things: Sequence[Thing], rng: random.Random, kind: str | None = None) -> Question:
    """A question about one to three `things`.

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
    candidates = list(_candidates(things, kind, rng))
    if not candidates:
        possible = ", ".join(possible_kinds(things))
        raise ValueError(f"{kind!r} cannot be asked about these things; possible: {possible}.")
    answers = sorted({candidate.answer for candidate in candidates})
    if set(answers) <= {"yes", "no"}:
        answers = [rng.choice(answers)]
    elif "neither" in answers and len(answers) > 1 and rng.random() < 0.95:
        answers.remove("neither")
    chosen = rng.choice([candidate for candidate in candidates if candidate.answer in answers])
    fact = (chosen.attribute, chosen.value) if chosen.value else None
    return Question(kind, _wording(things, kind, chosen, rng), chosen.answer, chosen.about, fact)


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
    text = [ANSWER_CUE, "yes no neither twenty input the 's", *TEENS, *ORDINALS]
    text += [*OVERTURES, *OPENINGS, *SPARE_WORDS, *VALUES]
    for modality in MODALITIES.values():
        text += [modality.cue, modality.noun, *modality.aliases]
        text += [clause for clauses in modality.clauses.values() for clause in clauses]
    for kind in KINDS.values():
        text += [*kind.plain, *kind.named]
    for words in (*VALUES.values(), *COMPARATIVES.values(), *FORMS.values()):
        text += words
    for name, modality in MODALITIES.items():  # captions have words of their own
        text += [caption(Thing(name, {fact: VALUES[fact][-1] for fact in modality.clauses}))]
    text += [caption(Thing("image", {"kind": "handwriting"})), "a an"]
    return sorted({word for line in text for word in words_of(re.sub(r"{.*?}", " ", line))})


def _candidates(things: Sequence[Thing], kind: str, rng: random.Random) -> Iterator[_Candidate]:
    """Every question of this kind that these things answer; for a "no", the wrong value is drawn."""
    called = names(things)
    everything = tuple(range(len(things)))
    if kind in VALUES:
        yield from (_Candidate((i,), value) for i, _, value in _facts(things, everything, (kind,)))
    elif kind == "describe":
        yield from (_Candidate((i,), caption(thing)) for i, thing in enumerate(things))
    elif kind in ("check_number", "check_attribute"):
        wanted = ("number",) if kind == "check_number" else ATTRIBUTES
        for i, name, value in _facts(things, everything, wanted):
            yield _Candidate((i,), "yes", value, name)
            wrong = rng.choice([other for other in VALUES[name] if other != value])
            yield _Candidate((i,), "no", wrong, name)
    elif kind in ("which_shows", "which_is", "number_of"):
        groups = [everything] if len(things) > 1 else []
        if len(things) > 2 and kind != "number_of":
            groups += combinations(everything, 2)
        for group in groups:
            facts = list(_facts(things, group, ("number",) if kind == "which_shows" else ATTRIBUTES))
            for i, name, value in facts:
                if [fact[1:] for fact in facts].count((name, value)) == 1:
                    answer = things[i].facts.get("number") if kind == "number_of" else called[i]
                    if answer:
                        yield _Candidate(group, answer, value, name)
    else:
        fact = "color" if kind == "same_color" else "number"
        holders = {i: value for i, _, value in _facts(things, everything, (fact,))}
        size = KINDS[kind].things
        if size == 3 and len(holders) < len(things):
            return  # "all three" would be untrue
        for group in combinations(holders, size):
            answer = _verdict(kind, [holders[i] for i in group], [called[i] for i in group])
            if answer:
                yield _Candidate(group, answer)


def _verdict(kind: str, values: Sequence[str], called: Sequence[str]) -> str | None:
    """The answer to a question that weighs `values` against each other; None where there is none."""
    if kind in ("same", "same_all", "same_color"):
        return "yes" if len(set(values)) == 1 else "no"
    numbers = [NUMBERS.index(value) for value in values]
    if kind in ("sum", "sum_all"):
        return number_word(sum(numbers))
    if kind == "difference":
        return number_word(abs(numbers[0] - numbers[1]))
    best = max(numbers) if kind in ("larger", "largest") else min(numbers)
    if numbers.count(best) == 1:
        return called[numbers.index(best)]
    return "neither" if len(numbers) == 2 else None


def _facts(things: Sequence[Thing], group: Sequence[int], wanted: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    for i in group:
        yield from ((i, name, things[i].facts[name]) for name in wanted if name in things[i].facts)


def _wording(things: Sequence[Thing], kind: str, chosen: _Candidate, rng: random.Random) -> str:
    phrasings = KINDS[kind]
    # Silence about which things are meant is clear only where no other thing could be meant.
    plain = phrasings.plain if len(chosen.about) == len(things) else ()
    named = phrasings.named if len(chosen.about) <= 2 else ()
    template = rng.choice(plain if plain and (not named or rng.random() < 0.5) else named)
    mentions = [_mention(things, i, rng) for i in rng.sample(chosen.about, len(chosen.about))]
    value = chosen.value
    if value in NUMBERS and rng.random() < 0.1:
        value = str(NUMBERS.index(value))
    state, does, the = FORMS.get(chosen.attribute, FORMS["color"])
    text = template.format(
        a=mentions[0],
        b=mentions[-1],
        v=state.format(_with_article(value)),
        does=does.format(_with_article(value)),
        the=the.format(value),
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
        return _name(things, i, modality.noun)
    if way < 0.85 or len(things) == 1:
        return _name(things, i, rng.choice(modality.aliases))
    return f"the {ORDINALS[i]} input"


def _name(things: Sequence[Thing], i: int, noun: str) -> str:
    twins = [j for j, thing in enumerate(things) if thing.modality == things[i].modality]
    return f"the {noun}" if len(twins) == 1 else f"the {ORDINALS[twins.index(i)]} {noun}"


def _with_article(value: str) -> str:
    return "a sign" if value == "sign" else value


def _noun_phrase(*words: str | None) -> str:
    said = [word for word in words if word]
    return " ".join(["an" if said[0] == "eight" else "a", *said])


def _sentence(*parts: str | None) -> str:
    return " ".join(part for part in parts if part) + "."
