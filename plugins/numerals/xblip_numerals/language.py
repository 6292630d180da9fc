"""The language of the numerals world: from facts to descriptions, questions and answers.

All randomness comes from the `random.Random` that the caller passes.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from xblip_numerals.candidates import WEIGHED, Candidate, candidates
from xblip_numerals.kinds import KINDS, THE_ONE
from xblip_numerals.phrases import (
    ANSWER_CUE,
    COMPARATIVES,
    FORMS,
    LABELS,
    MAX_THINGS,
    MODALITIES,
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
from xblip_numerals.things import Thing, describe, name_of, partly_told, random_thing, with_article

MOST_TRIES = 5_000
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


def random_things(
    rng: random.Random, count: int, kind: str | None = None, modalities: Sequence[str] | None = None
) -> tuple[tuple[Thing, ...], str | None]:
    """Things, partly told, about which `kind` can be asked, with balanced answers.

    Args:
        rng: all randomness.
        count: how many things.
        kind: of question; any if None.
        modalities: of the things, in order; any if None.

    Returns:
        The things, and the fact that they were drawn for: what `ask` is to ask of, if answers are to be balanced.

    Raises:
        ValueError: `kind` is unknown, or cannot be asked about things of these modalities, or about so few.
    """
    _check(kind)
    # What several modalities share is asked of more.
    weighed = {name: 2 if name in SHARED else 1 for name in WEIGHED.get(kind, ("number",))}
    for _ in range(MOST_TRIES):
        fact = None if kind is None else rng.choices(list(weighed), list(weighed.values()))[0]
        drawn = modalities or _modalities(rng, count, kind, fact)
        keep = (fact, "number") if kind in ("number_of", "attribute_of") else (fact,)
        things = [partly_told(rng, random_thing(rng, modality), keep) for modality in drawn]
        if kind == "attribute_of":
            fact = "number"  # it finds the thing whose attribute is told
        if kind in _PATTERNS:
            things = _patterned(rng, things, kind, fact)
        if kind in ("larger", "smaller") and rng.random() < 0.5:
            if len({thing.facts.get("number") for thing in things}) == 1:
                continue  # "neither" stays rare
        if kind is None or any(candidates(things, kind, rng, fact)):
            return tuple(things), fact
    raise ValueError(f"{kind!r} cannot be asked about {' and '.join(modalities) if modalities else f'{count} things'}.")


def _modalities(rng: random.Random, count: int, kind: str | None, fact: str | None) -> list[str]:
    """Any modalities, but as many as the kind of question needs are of such that have the fact."""
    drawn = rng.choices(list(MODALITIES), k=count)
    having = [name for name, modality in MODALITIES.items() if not fact or fact in modality.clauses]
    needed = count if kind == "count" else rng.randint(min(2, count), count) if kind in _SEVERAL else 1
    for i in rng.sample(range(count), needed):
        drawn[i] = rng.choice(having)
    return drawn


def _patterned(rng: random.Random, things: Sequence[Thing], kind: str, fact: str) -> list[Thing]:
    """The things, with equal and unequal values of the fact in one of the patterns of this kind."""
    patterned = list(things)
    holders = [i for i, thing in enumerate(things) if fact in thing.facts]
    values = rng.sample(VALUES[fact], min(len(VALUES[fact]), MAX_THINGS))
    for i, letter in zip(holders, rng.choice(_PATTERNS[kind].get(len(holders), ("",))), strict=False):
        patterned[i] = Thing(things[i].modality, {**things[i].facts, fact: values["abc".index(letter)]})
    return patterned


def possible_kinds(things: Sequence[Thing]) -> list[str]:
    """The kinds of question that these things can answer."""
    rng = random.Random(0)
    return [kind for kind in KINDS if next(candidates(things, kind, rng), None)]


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
    _check(kind)
    possible = list(candidates(things, kind, rng, fact))
    if not possible:
        raise ValueError(f"{kind!r} cannot be asked about these things; possible: {', '.join(possible_kinds(things))}.")
    # First what is asked of, then the answer: else the one would often give the other away.
    spoken_of = rng.choice(sorted({(candidate.fact, candidate.told) for candidate in possible}))
    possible = [candidate for candidate in possible if (candidate.fact, candidate.told) == spoken_of]
    answers = sorted({candidate.answer for candidate in possible})
    if set(answers) <= {"yes", "no"}:
        answers = [rng.choice(answers)]
    elif "neither" in answers and len(answers) > 1 and rng.random() < 0.95:
        answers.remove("neither")
    chosen = rng.choice([candidate for candidate in possible if candidate.answer in answers])
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
    text += [*OVERTURES, *OPENINGS, *SPARE_WORDS, *VALUES, *LABELS.values(), *THE_ONE, *PLAIN_FORM]
    for modality in MODALITIES.values():
        text += [modality.cue, modality.noun, *modality.aliases, *modality.after.values()]
        text += [clause for clauses in modality.clauses.values() for clause in clauses]
    for kind in KINDS.values():
        text += [*kind.plain, *kind.named]
    for words in (*VALUES.values(), *COMPARATIVES.values(), *FORMS.values()):
        text += words
    return sorted({word for line in text for word in words_of(re.sub(r"{.*?}", " ", line))})


def _check(kind: str | None) -> None:
    if kind is not None and kind not in KINDS:
        raise ValueError(f"Unknown kind of question {kind!r}; known: {', '.join(KINDS)}.")


def _wording(things: Sequence[Thing], kind: str, chosen: Candidate, rng: random.Random) -> str:
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
    forms = [form.format(with_article(value)) for form in FORMS.get(chosen.fact, PLAIN_FORM)[:-1]]
    text = template.format(
        a=mentions[0],
        b=mentions[-1],
        **dict(zip(("v", "does", "doesnt", "do"), forms, strict=True)),
        the=FORMS.get(chosen.fact, PLAIN_FORM)[-1].format(with_article(value) if chosen.fact == "speaker" else value),
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
        return name_of(things, i)
    if way < 0.85 or len(things) == 1:
        return name_of(things, i, rng.choice(modality.aliases))
    return f"the {ORDINALS[i]} input"
