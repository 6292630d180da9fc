"""Questions about media: what the bridges learn from, and what the report asks.

A question is thought up for things of text first, with balanced answers, and real media of the right number (and colour,
where colours are compared) are then put in their places. For training only one place holds a file; the other inputs stay
descriptions, so that a bridge learns to be read in any place and among any neighbours while it sees one modality alone.

    python -m xblip_numerals.questions image --world FOLDER --split train --count 50000 --out train.jsonl
"""

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xblip_numerals.kinds import KINDS
from xblip_numerals.language import MODALITIES, Question, Thing, ask, describe, possible_kinds, random_things
from xblip_numerals.phrases import VALUES

MOST_TRIES = 20_000
SEARCHES = ("which_shows", "which_is", "number_of")
"""Kinds of question that look for the input with a given value."""
EASY_SHARE = 0.2
"""Of searches that only one of the inputs asked about can be the answer to."""
COUNT_WEIGHTS = {1: 4, 2: 4, 3: 3}
"""How often a training question has one, two or three inputs."""


@dataclass(frozen=True)
class Item:
    """A rendered file and what is true of it."""

    path: Path
    thing: Thing
    source: str


@dataclass
class Shelf:
    """The rendered files of one split, found by modality, number and colour."""

    items: dict[str, list[Item]] = field(default_factory=dict)
    _by_facts: dict[tuple, list[Item]] = field(default_factory=dict)

    @classmethod
    def read(cls, world: Path, split: str) -> "Shelf":
        """Reads a split's manifest, as `media.build` wrote it."""
        shelf = cls()
        folder = Path(world, split)
        for line in (folder / "manifest.jsonl").read_text().splitlines():
            row = json.loads(line)
            item = Item(folder / row["path"], Thing(row["modality"], row["facts"]), row["source"])
            shelf.items.setdefault(row["modality"], []).append(item)
            facts = item.thing.facts
            for key in ((facts["number"],), (facts["number"], facts.get("color"))):
                shelf._by_facts.setdefault((row["modality"], *key), []).append(item)
        return shelf

    def match(self, rng: random.Random, thing: Thing, *, color: bool) -> Item | None:
        """A random file of the thing's modality and number, and of its colour if asked for; None if there is none."""
        key = (thing.modality, thing.facts["number"])
        found = self._by_facts.get((*key, thing.facts.get("color")) if color else key)
        return rng.choice(found) if found else None


def question_about(
    rng: random.Random, shelf: Shelf, *, kind: str, modalities: Sequence[str] | None = None, count: int | None = None,
    real: str | None = None,
) -> tuple[list[Thing], list[Item | None], Question]:  # fmt: skip
    """Thinks up a question of a kind, with files in its places.

    Args:
      rng: all randomness.
      shelf: the files.
      kind: of question.
      modalities: of the inputs, in order; or None for `count` inputs of any.
      count: how many inputs, if modalities are not given.
      real: the one modality whose files may be used, once, in a place that the question is about; the other inputs
        stay descriptions. None puts a file in every place.

    Returns:
      The things, the file of each (None for a description), and the question.
    """
    count = len(modalities) if modalities else count
    for _ in range(MOST_TRIES):
        things = list(random_things(rng, count, kind))
        if modalities and [thing.modality for thing in things] != list(modalities):
            continue
        places = list(range(count)) if real is None else [i for i, t in enumerate(things) if t.modality == real]
        if real is not None:
            places = rng.sample(places, min(1, len(places)))
        found = {i: shelf.match(rng, things[i], color=kind == "same_color") for i in places}
        if not found or None in found.values():
            continue
        things = [found[i].thing if i in found else thing for i, thing in enumerate(things)]
        if kind not in possible_kinds(things):
            continue
        question = ask(things, rng, kind)
        if real is None or set(question.about) & set(found):
            return things, [found.get(i) for i in range(count)], question
    raise ValueError(f"No question of kind {kind!r} can be asked about {modalities or real}.")


def holders(things: Sequence[Thing], question: Question, fact: str) -> list[int]:
    """Which of the inputs that a question is about have a fact."""
    return [i for i in question.about if fact in things[i].facts]


def training_row(rng: random.Random, shelf: Shelf, modality: str, *, root: Path) -> dict:
    """One row of a bridge's training manifest: an input of `modality` among text, a question and its answer.

    With one file among text, which of two is red can be told from the text: the file is, if the text is not. A bridge
    that learns from such questions need not tell colors. So where a value is looked for, two inputs have one of that
    kind, and the text often keeps its own to itself.
    """
    count = rng.choices(list(COUNT_WEIGHTS), list(COUNT_WEIGHTS.values()))[0]
    clauses = MODALITIES[modality].clauses
    impossible = {*VALUES, "same_color"} - {*clauses, *(["same_color"] if "color" in clauses else [])}
    kinds = [kind for kind, form in KINDS.items() if form.things <= count and kind not in impossible]
    if count == 1:
        kinds.append("number")
    kind = rng.choice(kinds)
    while True:
        things, items, question = question_about(rng, shelf, kind=kind, count=count, real=modality)
        looked_for = question.fact[0] if kind in SEARCHES else None
        if looked_for is None or len(holders(things, question, looked_for)) > 1 or rng.random() < EASY_SHARE:
            break
    kept_back = looked_for if rng.random() < 0.5 else None
    media: list = []
    for thing, item in zip(things, items, strict=True):
        if item is None:
            said = {fact: value for fact, value in thing.facts.items() if fact != kept_back}
            media.append(MODALITIES[thing.modality].cue + describe(Thing(thing.modality, said), rng))
        else:
            media.append([thing.modality, os.path.relpath(item.path, root)])
    return {"media": media, "instruction": question.text, "answer": question.answer}


def write_manifest(shelf: Shelf, modality: str, count: int, out: Path, *, seed: int) -> None:
    """Writes a bridge's manifest of `count` rows."""
    rng = random.Random(f"{seed} {modality}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for _ in range(count):
            file.write(json.dumps(training_row(rng, shelf, modality, root=out.parent)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modality", choices=list(MODALITIES))
    parser.add_argument("--world", type=Path, required=True, help="folder that xblip_numerals.media wrote")
    parser.add_argument("--split", default="train")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shelf = Shelf.read(arguments.world, arguments.split)
    write_manifest(shelf, arguments.modality, arguments.count, arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
