"""What the report asks: rows of the cross-modal evaluation over files of the numerals world.

Numbers and attributes of single files give the parts. Questions across inputs are drawn for every kind
and every set of modalities, each with its inputs in another order and with other files in their places. Files are dealt to
blocks first, and a question takes all of its files from one block: blocks share none, so they are the units of intervals.

    python -m xblip_numerals.report_rows --world FOLDER --split test --out rows.jsonl
"""

import argparse
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement, permutations
from pathlib import Path
from typing import Any

from xblip.tables import write_whole
from xblip_numerals.candidates import candidates
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import Question, ask, chance
from xblip_numerals.phrases import MODALITIES, ORDINALS, SHARED, VALUES
from xblip_numerals.questions import Item, Shelf, holders, question_about
from xblip_numerals.things import Thing, caption, name_of, ordinary_caption

Row = dict[str, Any]

PAIR_KINDS = tuple(kind for kind, form in KINDS.items() if form.things == 2)
TRIPLE_KINDS = (
    *(kind for kind, form in KINDS.items() if form.things == 3),
    *("which_shows", "which_is", "which_is_not", "number_of", "attribute_of", "count", "same", "sum"),
)
"""Kinds of question that three inputs are asked: those that need three, and some of those that look for one of several."""
BY_ATTRIBUTE = ("same_attribute", "different_attribute", "which_is", "which_is_not", "number_of")
"""Kinds that hang on an attribute; two of the inputs must have it, or its name would tell which is meant."""
ATTRIBUTES_ASKED = 3
"""Of each file by itself, beside its number."""
BLOCKS = 50
TRIES = 200
"""Draws of other files until the answer is another one."""


def source_of(item: Item) -> str:
    """What the parts tell apart: modality, for images handwriting and signs, for sounds people and synthetic voices."""
    facts = item.thing.facts
    if "kind" in facts:
        return f"{item.thing.modality}, {facts['kind']}"
    if "speaker" in facts:
        return f"{item.thing.modality}, {'robot' if facts['speaker'] == 'robot' else 'person'}"
    return item.thing.modality


def part_of(item: Item, fact: str) -> str:
    """The name of the part that reading a fact of such a file is."""
    return f"{source_of(item)}: {fact}"


def deal(shelf: Shelf, rng: random.Random, blocks: int) -> list[Shelf]:
    """Deals the files to shelves that share none, each modality's evenly."""
    dealt = [Shelf() for _ in range(blocks)]
    for items in shelf.items.values():
        for place, item in enumerate(rng.sample(items, len(items))):
            dealt[place % blocks].add(item)
    return dealt


def single_rows(shelf: Shelf, rng: random.Random, root: Path, *, attributes: int = ATTRIBUTES_ASKED) -> Iterator[Row]:
    """Questions about every file: its number, and so many of its attributes, by turns."""
    seen: Counter[str] = Counter()
    for items in shelf.items.values():
        for item in items:
            place = seen[source_of(item)]
            seen[source_of(item)] += 1
            own = [fact for fact in item.thing.facts if fact != "number"]
            asked = [own[(place + i) % len(own)] for i in range(min(attributes, len(own)))]
            for fact in ("number", *asked):
                question = ask([item.thing], rng, fact)
                row = _row(f"{item.thing.modality}-{item.path.stem}-{fact}", [item], question, rng, root)
                yield {**row, "part": part_of(item, fact)}


def several_rows(
    dealt: Sequence[Shelf], rng: random.Random, root: Path, *, size: int, count: int
) -> Iterator[tuple[int, Row]]:
    """`count` questions of each kind for each multiset of `size` modalities, inputs in random order; each with its block.

    Of three modalities all differ, or two are the same. Each question is of another block, as far as there are any.
    """
    for modalities in combinations_with_replacement(MODALITIES, size):
        if size > 2 and len(set(modalities)) == 1:
            continue
        for kind in PAIR_KINDS if size == 2 else TRIPLE_KINDS:
            if not _can_ask(kind, modalities):
                continue
            for number in range(count):
                if number % len(dealt) == 0:
                    order_of_blocks = rng.sample(range(len(dealt)), len(dealt))
                block = order_of_blocks[number % len(dealt)]
                things, items, question = _question(dealt[block], rng, kind, modalities)
                row = _row(f"{'-'.join(modalities)}-{kind}-{number}", items, question, rng, root)
                row["parts"] = parts_of(things, items, question)
                order = rng.choice(list(permutations(range(size)))[1:])
                row["swapped"] = swapped(things, question, order)
                replaced = _replaced(dealt[block], rng, things, question, root)
                yield block, row | ({"replaced": replaced} if replaced else {})


def parts_of(things: Sequence[Thing], items: Sequence[Item], question: Question) -> list[str]:
    """What must be read for the answer: the fact it hangs on, of all inputs asked about, and what is told of one of them."""
    parts = [part_of(items[i], question.fact) for i in holders(things, question, question.fact)]
    if question.told not in ("", question.fact):
        parts.append(part_of(items[question.chosen[0]], question.told))
    return parts


def swapped(things: Sequence[Thing], question: Question, order: Sequence[int]) -> Row:
    """The question when its inputs stand in another order: names that tell a place change, and nothing else.

    Args:
      things: the inputs.
      question: about them.
      order: for each new place the input that comes there.

    Returns:
      `instruction`, `answer` and `order`, as rows of the evaluation have them.
    """
    moved = [things[i] for i in order]
    names: dict[str, str] = {}
    for new, old in enumerate(order):
        modality = MODALITIES[things[old].modality]
        names[f"the {ORDINALS[old]} input"] = f"the {ORDINALS[new]} input"
        for noun in (modality.noun, *modality.aliases):
            names[name_of(things, old, noun)] = name_of(moved, new, noun)
    return {
        "instruction": _renamed(question.text, names),
        "answer": " and ".join(sorted(_renamed(question.answer, names).split(" and "), key=_place_in(moved)))
        if question.kind == "which_pair"
        else _renamed(question.answer, names),
        "order": list(order),
    }


def _place_in(things: Sequence[Thing]):
    """A key that puts names of things in their order."""
    return [name_of(things, i) for i in range(len(things))].index


def _renamed(text: str, names: Mapping[str, str]) -> str:
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)

    def rename(match: re.Match) -> str:
        new = names[match[0].lower()]
        return new[0].upper() + new[1:] if match[0][0].isupper() else new

    return pattern.sub(rename, text)


def _question(shelf: Shelf, rng: random.Random, kind: str, modalities: Sequence[str]) -> tuple:
    while True:
        things, items, question = question_about(
            rng, shelf, kind=kind, modalities=rng.sample(modalities, len(modalities))
        )
        if kind not in BY_ATTRIBUTE or len(holders(things, question, question.fact)) > 1:
            return things, items, question


def _can_ask(kind: str, modalities: Sequence[str]) -> bool:
    """Whether two of the inputs can have one attribute, where the kind hangs on one."""
    if kind not in BY_ATTRIBUTE:
        return True
    facts = SHARED if kind in ("same_attribute", "different_attribute") else set(VALUES) - {"number"}
    return any(sum(fact in MODALITIES[name].clauses for name in modalities) > 1 for fact in facts)


def _replaced(shelf: Shelf, rng: random.Random, things: Sequence[Thing], question: Question, root: Path) -> Row | None:
    """Other files of the same modalities, about which the same words have another answer; None if none are found."""
    for _ in range(TRIES):
        items = [rng.choice(shelf.items[thing.modality]) for thing in things]
        found = [
            candidate.answer
            for candidate in candidates([item.thing for item in items], question.kind, rng, question.fact)
            if (candidate.about, candidate.value, candidate.told) == (question.about, question.value, question.told)
        ]
        if len(set(found)) == 1 and found[0] != question.answer:
            return {"media": _media(items, root), "answer": found[0]}
    return None


def _row(name: str, items: Sequence[Item], question: Question, rng: random.Random, root: Path) -> Row:
    return {
        "id": name,
        "kind": question.kind,
        "media": _media(items, root),
        "instruction": question.text,
        "answer": question.answer,
        "chance": chance(question.kind, len(question.about)),
        "descriptions": [caption(item.thing) for item in items],
        "captions": [ordinary_caption(item.thing, rng) for item in items],
    }


def _media(items: Sequence[Item], root: Path) -> list[list[str]]:
    return [[item.thing.modality, os.path.relpath(item.path, root)] for item in items]


def write_rows(
    shelf: Shelf, out: Path, *, count: int, seed: int, blocks: int = BLOCKS, attributes: int = ATTRIBUTES_ASKED
) -> None:
    """Writes all rows of the report.

    Args:
      shelf: the files.
      out: JSONL to write.
      count: questions of each kind for each set of modalities.
      seed: of all draws.
      blocks: how many shelves the files are dealt to.
      attributes: of each file that it is asked for by itself.
    """
    rng, root = random.Random(seed), out.parent
    dealt = deal(shelf, rng, blocks)
    rows = [
        (block, row) for block, own in enumerate(dealt) for row in single_rows(own, rng, root, attributes=attributes)
    ]
    for size in (2, 3):
        rows += several_rows(dealt, rng, root, size=size, count=count)
    lines = [json.dumps({**row, "unit": str(block)}) + "\n" for block, row in rows]
    write_whole(out, lambda file: file.write("".join(lines).encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder that xblip_numerals.media wrote")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=20, help="questions per kind and set of modalities")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="which share no file")
    parser.add_argument(
        "--attributes", type=int, default=ATTRIBUTES_ASKED, help="of each file that it is asked for by itself"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("count", "seed", "blocks", "attributes")}
    write_rows(Shelf.read(arguments.world, arguments.split), arguments.out, **options)


if __name__ == "__main__":
    main()
