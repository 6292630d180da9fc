"""The things of the numerals world: what is true of one input, and the ways to describe it.

A `Thing` is one input (an image, a video, ...) reduced to its facts. Descriptions are made from facts alone, and the
same facts make the media: a question about pictures and sounds therefore has the answer that the same question about
their descriptions has.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xblip_numerals.phrases import LABELS, MODALITIES, NO_SIGN_HAS, NUMBERS, OPENINGS, ORDINALS, TEENS, VALUES


@dataclass(frozen=True)
class Thing:
    """One input: its modality and what is true of it. An absent fact is neither described nor asked for."""

    modality: str
    facts: Mapping[str, str] = field(hash=False)


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


def caption(thing: Thing, facts: Sequence[str] | None = None) -> str:
    """One canonical sentence that states every fact of `thing`, or only the number and those named in `facts`."""
    modality, told = MODALITIES[thing.modality], thing.facts
    if facts is not None:
        told = {name: value for name, value in told.items() if name == "number" or name in facts}
    words = [told[name] for name in modality.before if name in told] + [told.get("number", "number")]
    after = [form.format(with_article(told[name])) for name, form in modality.after.items() if name in told]
    article = "an" if words[0][0] in "aeiou" and words[0] != "one" else "a"
    return " ".join([article, *words, *after]) + "."


def short_caption(thing: Thing) -> str:
    """The number and the usual attributes in a sentence."""
    return caption(thing, MODALITIES[thing.modality].usual)


def ordinary_caption(thing: Thing, rng: random.Random) -> str:
    """A caption as people write them, in one of many wordings: the number and one or two attributes."""
    attributes = [name for name in thing.facts if name != "number"]
    named = ("number", *rng.sample(attributes, min(rng.choice((1, 2)), len(attributes))))
    return describe(Thing(thing.modality, {name: thing.facts[name] for name in named if name in thing.facts}), rng)


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
        return rng.choice((", ", ". ")).join(f"{LABELS.get(name, name)} {value}" for name, value in facts)
    if style < 0.6:
        return rng.choice(("", "here, ", "look, ")) + caption(thing)
    clauses = [rng.choice(modality.clauses[name]).format(with_article(value)) for name, value in facts]
    if rng.random() < 0.3:
        clauses.insert(0, rng.choice(OPENINGS).format(modality.noun))
    return rng.choice((", ", ". ", " and ", ", and ", " ")).join(clauses) + rng.choice(("", "."))


def names(things: Sequence[Thing]) -> list[str]:
    """The canonical name of each thing: "the image", or "the first image" where there are several images."""
    return [name_of(things, i) for i in range(len(things))]


def name_of(things: Sequence[Thing], i: int, noun: str | None = None) -> str:
    """The name of one thing among others, by its modality's own noun or another one."""
    noun = noun or MODALITIES[things[i].modality].noun
    twins = [j for j, thing in enumerate(things) if thing.modality == things[i].modality]
    return f"the {noun}" if len(twins) == 1 else f"the {ORDINALS[twins.index(i)]} {noun}"


def number_word(number: int) -> str:
    """0..29 in words: "seven", "seventeen", "twenty", "twenty one"."""
    tens, ones = divmod(number, 10)
    if tens == 2:
        return "twenty" if ones == 0 else f"twenty {NUMBERS[ones]}"
    return (NUMBERS, TEENS)[tens][ones]


def with_article(value: str) -> str:
    """The value as a sentence says it of a thing: "a sign", but "red"."""
    return f"a {value}" if value in ("sign", "robot") else value
