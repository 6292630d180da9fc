"""What can be asked about things, and the one right answer to it: questions before they have words."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from xblip_numerals.kinds import KINDS
from xblip_numerals.phrases import ATTRIBUTES, MAX_THINGS, MODALITIES, NUMBERS, SHARED, VALUES
from xblip_numerals.things import Thing, caption, name_of, number_word, short_caption

# Facts of enough values that one of them is left over, whatever three things have: none may have it.
_COUNTED = tuple(name for name in VALUES if len(VALUES[name]) > MAX_THINGS)
# What each kind that weighs things against each other may weigh.
WEIGHED = {
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


@dataclass(frozen=True)
class Candidate:
    """A question before it has words; as in `Question`."""

    about: tuple[int, ...]
    answer: str
    fact: str
    value: str = ""
    told: str = ""
    chosen: tuple[int, ...] | None = None


def candidates(things: Sequence[Thing], kind: str, rng: random.Random, fact: str | None = None) -> Iterator[Candidate]:
    """Every question of this kind, decided by `fact` if given, that these things answer; a "no" has a random value."""
    everything = tuple(range(len(things)))
    wanted = WEIGHED.get(kind, ("number",)) if fact is None else (fact,)
    if kind in VALUES:
        yield from (Candidate((i,), value, kind, told=kind) for i, _, value in _facts(things, everything, (kind,)))
    elif kind == "describe":
        yield from (Candidate((i,), caption(thing), "") for i, thing in enumerate(things))
    elif kind == "caption":
        yield from (Candidate((i,), short_caption(thing), "") for i, thing in enumerate(things))
    elif kind.startswith("check"):
        right, wrong = ("no", "yes") if kind == "check_not" else ("yes", "no")
        for i, name, value in _facts(things, everything, wanted):
            yield Candidate((i,), right, name, value)
            yield Candidate((i,), wrong, name, rng.choice([other for other in VALUES[name] if other != value]))
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


def _compared_with_numbers(i: int, fact: str, value: str, kind: str) -> Iterator[Candidate]:
    """Numbers near the thing's own: were they far off, the number asked about would often give the answer."""
    number, up = NUMBERS.index(value), 1 if kind == "above" else -1
    for step in (1, 2, 3):
        for answer, bound in (("yes", number - up * step), ("no", number + up * (step - 1))):
            if 0 < bound < len(NUMBERS) - 1:
                yield Candidate((i,), answer, fact, NUMBERS[bound])


def _looked_for(
    things: Sequence[Thing], group: Sequence[int], wanted: Sequence[str], *, denied: bool = False, easy: bool = False
) -> Iterator[Candidate]:
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
            yield Candidate(tuple(group), name_of(things, i), name, value, chosen=(i,))


def _counted(things: Sequence[Thing], wanted: Sequence[str], rng: random.Random) -> Iterator[Candidate]:
    """How many have a value: one that none has as often as each other count, among things drawn for it."""
    for name in wanted:
        held = [thing.facts.get(name) for thing in things]
        if len(things) > 1 and None not in held:
            value = rng.choice(held)
            if rng.random() < 1 / (len(things) + 1):
                value = rng.choice([other for other in VALUES[name] if other not in held])
            chosen = tuple(i for i, other in enumerate(held) if other == value)
            yield Candidate(tuple(range(len(things))), NUMBERS[len(chosen)], name, value, chosen=chosen)


def _weighed(things: Sequence[Thing], kind: str, wanted: Sequence[str]) -> Iterator[Candidate]:
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
                answer = answer or " and ".join(name_of(things, i) for i in those)
                yield Candidate(group, answer, name, chosen=those or group)


def _verdict(kind: str, values: Sequence[str]) -> tuple[str, Sequence[int]]:
    """The answer to a question that weighs `values`, or the places of those that it names; both empty if there is none."""
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
