"""Questions about media: what the bridges learn from, and what the report asks.

A question is thought up for things of text first, with balanced answers, and real media that have the fact it hangs on are
then put in their places. For training only one place holds a file; the other inputs stay descriptions, so that a bridge
learns to be read in any place and among any neighbours while it sees one modality alone.

    python -m xblip_numerals.questions image --world FOLDER --split train --count 50000 --out train.jsonl
"""

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xblip_numerals.candidates import candidates
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import Question, ask, random_things
from xblip_numerals.phrases import MODALITIES, SHARED
from xblip_numerals.things import Thing, describe

MOST_TRIES = 5_000
SEARCHES = ("which_shows", "which_is", "which_is_not", "number_of", "attribute_of")
"""Kinds of question that look for the input with a given value."""
EASY_SHARE = 0.2
"""Of searches that only one of the inputs asked about can be the answer to."""
KEPT_BACK_SHARE = 0.5
"""Of searches that a file is the answer to: those in which the text keeps what is looked for to itself."""
COUNT_WEIGHTS = {1: 4, 2: 4, 3: 3}
"""How often a training question has one, two or three inputs."""
DESCRIBED_SHARE, ALONE_SHARE = 0.25, 0.3
"""Of training questions: those that want a file described, and those that ask of it alone, whatever is beside it."""
ALONE_WEIGHTS = {"number": 3, "check_number": 0.5, "check_attribute": 1, "check_not": 1, "caption": 0.5}
"""How often each question of one thing is asked in that share; an attribute of the file's own is asked for once."""


@dataclass(frozen=True)
class Item:
    """A rendered file and what is true of it."""

    path: Path
    thing: Thing
    source: str


@dataclass
class Shelf:
    """The rendered files of one split, found by modality and by any fact."""

    items: dict[str, list[Item]] = field(default_factory=dict)
    _by_fact: dict[tuple[str, str, str | None], list[Item]] = field(default_factory=dict)

    @classmethod
    def read(cls, world: Path, split: str) -> "Shelf":
        """Reads a split's manifest, as `media.build` wrote it."""
        shelf = cls()
        folder = Path(world, split)
        for line in (folder / "manifest.jsonl").read_text().splitlines():
            row = json.loads(line)
            shelf.add(Item(folder / row["path"], Thing(row["modality"], row["facts"]), row["source"]))
        return shelf

    def add(self, item: Item) -> None:
        """Puts a file on the shelf."""
        modality = item.thing.modality
        self.items.setdefault(modality, []).append(item)
        for fact in MODALITIES[modality].clauses:
            self._by_fact.setdefault((modality, fact, item.thing.facts.get(fact)), []).append(item)

    def match(self, rng: random.Random, thing: Thing, fact: str) -> Item | None:
        """A random file of the thing's modality, and of its value of `fact` if that is one; None if there is none."""
        everything = self.items.get(thing.modality)
        has_fact = fact in MODALITIES[thing.modality].clauses
        found = self._by_fact.get((thing.modality, fact, thing.facts.get(fact))) if has_fact else everything
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

    Raises:
      ValueError: no such question can be asked.
    """
    count = len(modalities) if modalities else count
    for _ in range(MOST_TRIES):
        things, fact = random_things(rng, count, kind, modalities)
        places = range(count) if real is None else [i for i, thing in enumerate(things) if thing.modality == real]
        if real is not None and len(places) > 1:
            places = [rng.choice(places)]
        found = {i: shelf.match(rng, things[i], fact) for i in places}
        if not found or None in found.values():
            continue
        things = [found[i].thing if i in found else thing for i, thing in enumerate(things)]
        if not any(candidates(things, kind, rng, fact)):
            continue  # files have more facts than were drawn for their places, and other ones
        question = ask(things, rng, kind, fact)
        if real is None or set(question.about) & set(found):
            return things, [found.get(i) for i in range(count)], question
    raise ValueError(f"No question of kind {kind!r} can be asked about {modalities or real}.")


def holders(things: Sequence[Thing], question: Question, fact: str) -> list[int]:
    """Which of the inputs that a question is about have a fact."""
    return [i for i in question.about if fact in things[i].facts]


def training_row(rng: random.Random, shelf: Shelf, modality: str, *, root: Path) -> dict:
    """One row of a bridge's training manifest: an input of `modality` among text, a question and its answer.

    With one file among text, which of two is red can be told from the text alone, and a bridge that learns from such
    questions need not tell colors. So where a value is looked for, two inputs have one of that kind; the answer is as
    often a text, which a file must not outbid; and where it is the file, the text often keeps its own to itself.
    """
    count = rng.choices(list(COUNT_WEIGHTS), list(COUNT_WEIGHTS.values()))[0]
    kind = _kind(rng, modality, count)
    answer_is_file = rng.random() < 0.5
    while True:
        things, items, question = question_about(rng, shelf, kind=kind, count=count, real=modality)
        if kind not in SEARCHES:
            break
        is_file = items[question.chosen[0]] is not None
        easy = len(holders(things, question, question.fact)) < 2
        if (is_file and rng.random() < EASY_SHARE) if easy else is_file == answer_is_file:
            break
    # A denial hangs on what the others are.
    keeps = kind in SEARCHES and kind != "which_is_not" and is_file and rng.random() < KEPT_BACK_SHARE
    kept_back = question.fact if keeps else None
    media: list = []
    for thing, item in zip(things, items, strict=True):
        if item is None:
            said = {fact: value for fact, value in thing.facts.items() if fact != kept_back} or thing.facts
            media.append(MODALITIES[thing.modality].cue + describe(Thing(thing.modality, said), rng))
        else:
            media.append([thing.modality, os.path.relpath(item.path, root)])
    return {"media": media, "instruction": question.text, "answer": question.answer}


def _kind(rng: random.Random, modality: str, count: int) -> str:
    """The kind of a training question: one that a file of this modality can decide."""
    share = rng.random()
    if share < DESCRIBED_SHARE:
        return "describe"
    clauses = MODALITIES[modality].clauses
    if count == 1 or share < DESCRIBED_SHARE + ALONE_SHARE:
        weights = {name: 1.0 for name in clauses} | {"above": 0.5, "below": 0.5} | ALONE_WEIGHTS
        return rng.choices(list(weights), list(weights.values()))[0]
    impossible = {"same_attribute", "different_attribute"} if not set(clauses) & set(SHARED) else set()
    return rng.choice([kind for kind, form in KINDS.items() if 1 < form.things <= count and kind not in impossible])


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
