"""The report: what the numerals model answers on unseen files, beside what it should be compared with.

Every question is asked in several ways: with soft prompts; with the true descriptions in their place (what the LLM could
reach at best); with the captions that the model itself gives of each input (the caption baseline); with one of its inputs
alone; and without any. Figures that speak against the idea stand in the same tables.

    python -m xblip_numerals.report --bundle FOLDER --world FOLDER --out REPORT.md
"""

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

import xblip
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import Question, ask, chance, words_of
from xblip_numerals.phrases import MODALITIES, SHARED, VALUES
from xblip_numerals.questions import Item, Shelf, holders, question_about
from xblip_numerals.things import Thing, caption

BATCH = 128
NAMES = list(MODALITIES)
WAYS = (
    "chance",
    "soft prompts",
    "captions",
    "true descriptions",
    "one input alone",
    "no input",
    "product of the parts",
)
"""What is reported of every question across inputs."""
READ_ALONE = {
    "image, handwriting": "handwriting",
    "image, sign": "hand sign",
    "audio": "speech",
    "video": "video",
    "point_cloud": "point cloud",
}
"""What the single-input table tells apart, and how the README calls it."""
PAIR_KINDS = [kind for kind, form in KINDS.items() if form.things == 2]
TRIPLE_KINDS = [kind for kind, form in KINDS.items() if form.things == 3]
TRIPLE_KINDS += ["which_shows", "which_is", "number_of", "attribute_of", "count"]
BY_ATTRIBUTE = ("same_attribute", "different_attribute", "which_is", "which_is_not", "number_of")
"""Kinds that hang on an attribute; at least two of the inputs asked about must have it, or its name tells which is meant."""


@dataclass(frozen=True)
class Case:
    """A question about files."""

    things: list[Thing]
    items: list[Item]
    question: Question


@dataclass
class Tally:
    """Right answers out of how many; or what is expected of them."""

    right: float = 0
    count: int = 0

    def add(self, right: float) -> None:
        self.right += right
        self.count += 1

    @property
    def share(self) -> float:
        return self.right / self.count if self.count else math.nan

    def __str__(self) -> str:
        return f"{self.share:.3f}" if self.count else "–"


class Reader:
    """Asks the model; encodes each file once."""

    def __init__(self, model: xblip.XBlip):
        self.model = model
        self._features: dict[Path, xblip.Features] = {}
        self._captions: dict[Path, str] = {}

    def encode(self, items: Iterable[Item]) -> None:
        """Keeps the frozen features of files."""
        by_modality = defaultdict(dict)
        for item in items:
            if item.path not in self._features:
                by_modality[item.thing.modality][item.path] = item
        for modality, found in by_modality.items():
            paths = list(found)
            for start in tqdm(range(0, len(paths), BATCH), desc=f"encode {modality}"):
                part = paths[start : start + BATCH]
                for path, features in zip(part, self.model.branches[modality].encode(part).split(), strict=True):
                    self._features[path] = features

    def describe(self, items: Iterable[Item]) -> None:
        """Keeps the model's own caption of each file."""
        items = list({item.path: item for item in items if item.path not in self._captions}.values())
        samples = [
            xblip.Sample(f"Describe the {MODALITIES[item.thing.modality].noun}.", [self.soft(item)]) for item in items
        ]
        for item, text in zip(items, self.answers(samples, "describe"), strict=True):
            self._captions[item.path] = text

    def soft(self, item: Item) -> tuple[str, xblip.Features]:
        """The file itself, as an input."""
        return item.thing.modality, self._features[item.path]

    def captioned(self, item: Item) -> str:
        """The model's caption of the file, as text in its place."""
        return MODALITIES[item.thing.modality].cue + self._captions[item.path]

    def answers(self, samples: Sequence[xblip.Sample], label: str) -> list[str]:
        """Asks in batches of prompts of like length; greedy."""
        order = sorted(range(len(samples)), key=lambda i: (len(samples[i].media), len(samples[i].instruction)))
        texts: list[str] = [""] * len(samples)
        for start in tqdm(range(0, len(order), BATCH), desc=label):
            part = order[start : start + BATCH]
            for i, answer in zip(part, self.model.generate([samples[i] for i in part], do_sample=False), strict=True):
                texts[i] = answer.text
        return texts

    def judge(self, cases: Sequence[Case], inputs: Callable[[Case], list], label: str) -> list[bool]:
        """Asks every case with the inputs that `inputs` gives it; says which answers are right."""
        samples = [xblip.Sample(case.question.text, inputs(case)) for case in cases]
        return [
            words_of(text) == words_of(case.question.answer)
            for text, case in zip(self.answers(samples, label), cases, strict=True)
        ]


def described(case: Case) -> list[str]:
    """The true descriptions in place of the files."""
    return [MODALITIES[thing.modality].cue + caption(thing) for thing in case.things]


def source_of(item: Item) -> str:
    """What the single-input table tells apart: modality, and for images handwriting and signs."""
    kind = item.thing.facts.get("kind")
    return f"{item.thing.modality}, {kind}" if kind else item.thing.modality


def single_cases(shelf: Shelf, rng: random.Random) -> dict[tuple[str, str], list[Case]]:
    """One question for every fact of every file."""
    cases = defaultdict(list)
    for items in shelf.items.values():
        for item in items:
            for fact in item.thing.facts:
                cases[source_of(item), fact].append(Case([item.thing], [item], ask([item.thing], rng, fact)))
    return cases


def several_cases(
    shelf: Shelf, rng: random.Random, *, size: int, kinds: Sequence[str], count: int
) -> dict[tuple[str, str], list[Case]]:
    """`count` questions of each kind for each set of modalities, in random order of inputs."""
    cases = {}
    for modalities in combinations(NAMES, size):
        for kind in kinds:
            shared = [fact for fact in SHARED if sum(fact in MODALITIES[name].clauses for name in modalities) > 1]
            if kind in BY_ATTRIBUTE and not shared:
                continue
            made: list[Case] = []
            while len(made) < count:
                case = Case(*question_about(rng, shelf, kind=kind, modalities=rng.sample(modalities, size)))
                if kind not in BY_ATTRIBUTE or len(holders(case.things, case.question, case.question.fact)) > 1:
                    made.append(case)
            cases[" + ".join(modalities), kind] = made
    return cases


def expected_share(case: Case, singles: dict[tuple[str, str], Tally], truth: float) -> float:
    """What the parts reach together: each input asked about read alone, times the LLM on true descriptions."""
    question, share = case.question, truth
    for i in holders(case.things, question, question.fact):
        share *= singles[source_of(case.items[i]), question.fact].share
    if question.told not in ("", question.fact):  # then of the one thing found, another fact is told
        share *= singles[source_of(case.items[question.chosen[0]]), question.told].share
    return share


def several_report(reader: Reader, cases: dict[tuple[str, str], list[Case]], singles: dict) -> tuple[dict, dict]:
    """Asks every case in every way.

    Returns:
      Tallies by kind and way, and by set of modalities and way; the ways `chance` and `product of the parts` hold sums of
      what the best constant answer and `expected_share` reach.
    """
    flat = [(names, kind, case) for (names, kind), found in cases.items() for case in found]
    only = [case for _, _, case in flat]
    alone = random.Random(0)
    ways: dict[str, Callable[[Case], list]] = {
        "soft prompts": lambda case: [reader.soft(item) for item in case.items],
        "true descriptions": described,
        "captions": lambda case: [reader.captioned(item) for item in case.items],
        "one input alone": lambda case: [reader.soft(alone.choice(case.items))],
        "no input": lambda case: [],
    }
    by_kind: dict = defaultdict(lambda: defaultdict(Tally))
    by_names: dict = defaultdict(lambda: defaultdict(Tally))
    for way, inputs in ways.items():
        for (names, kind, _), right in zip(flat, reader.judge(only, inputs, way), strict=True):
            by_kind[kind][way].add(right)
            by_names[names][way].add(right)
    for names, kind, case in flat:
        shares = {
            "chance": chance(kind, len(case.question.about)),
            "product of the parts": expected_share(case, singles, by_kind[kind]["true descriptions"].share),
        }
        for tallies in (by_kind[kind], by_names[names]):
            for way, share in shares.items():
                tallies[way].add(share)
    return by_kind, by_names


def position_report(reader: Reader, shelf: Shelf, rng: random.Random, count: int) -> dict[tuple[str, int], Tally]:
    """Numbers read by place in the prompt, among two other inputs."""
    cases = [
        Case(*question_about(rng, shelf, kind="number", modalities=rng.sample(names, 3)))
        for names in combinations(NAMES, 3)
        for _ in range(3 * count)
    ]
    judged = reader.judge(cases, lambda case: [reader.soft(item) for item in case.items], "by place")
    tallies: dict[tuple[str, int], Tally] = defaultdict(Tally)
    for case, right in zip(cases, judged, strict=True):
        place = case.question.about[0]
        tallies[case.things[place].modality, place].add(right)
    return tallies


def _counted(tally: Tally | None) -> str:
    """A share and of how many; a dash where the input has no such fact."""
    return f"{tally} ({tally.count})" if tally else "–"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _several_table(tallies_by_row: dict, *, floor: float, first: str) -> str:
    """A table of ways to ask, and how far soft prompts reach what the parts do."""
    rows = []
    for name, tallies in tallies_by_row.items():
        expected = tallies["product of the parts"].share
        ratio = tallies["soft prompts"].share / expected if expected else math.nan
        verdict = f"{ratio:.2f}" if ratio >= floor else f"{ratio:.2f} (below)"
        shown = [str(tallies[way]) for way in WAYS]
        rows.append([name.replace("_", " "), *shown, verdict, tallies["soft prompts"].count])
    return markdown_table([first, *WAYS, f"ratio (at least {floor})", "n"], rows)


def readme_table(figures: dict) -> str:
    """The README's tables, from the content of the report's JSON file."""
    numbers = {source: figures["single"][f"{source}: number"] for source in READ_ALONE}
    alone = markdown_table(
        ["the number of one input", *READ_ALONE.values()],
        [["right", *(f"{right / count:.3f}" for right, count in numbers.values())],
         ["n", *(count for _, count in numbers.values())]],
    )  # fmt: skip
    rows = []
    for table, label in (("pairs", "two modalities"), ("triples", "three modalities")):
        sums = {way: [sum(column) for column in zip(*(ways[way] for ways in figures[table].values()), strict=True)]
                for way in WAYS}  # fmt: skip
        rows.append([label, *(f"{right / count:.3f}" for right, count in sums.values()), sums["chance"][1]])
    return f"{alone}\n\n{markdown_table(['questions across', *WAYS, 'n'], rows)}"


def write_report(model: xblip.XBlip, world: Path, out: Path, *, split: str, count: int, seed: int) -> None:
    """Asks everything and writes the report in Markdown, with the figures as JSON beside it."""
    rng = random.Random(seed)
    shelf = Shelf.read(world, split)
    reader = Reader(model)
    everything = [item for items in shelf.items.values() for item in items]
    reader.encode(everything)
    reader.describe(everything)
    singles: dict[tuple[str, str], Tally] = defaultdict(Tally)
    cases = single_cases(shelf, rng)
    flat = [(key, case) for key, found in cases.items() for case in found]
    judged = reader.judge([case for _, case in flat], lambda case: [reader.soft(case.items[0])], "single inputs")
    for (key, _), right in zip(flat, judged, strict=True):
        singles[key].add(right)
    pairs = several_report(reader, several_cases(shelf, rng, size=2, kinds=PAIR_KINDS, count=count), singles)
    triples = several_report(reader, several_cases(shelf, rng, size=3, kinds=TRIPLE_KINDS, count=count), singles)
    places = position_report(reader, shelf, rng, count)

    facts = list(VALUES)
    sources = sorted({source for source, _ in singles})
    single_rows = [[fact, *(_counted(singles.get((source, fact))) for source in sources)] for fact in facts]
    place_rows = [[name, *(_counted(places[name, place]) for place in range(3))] for name in NAMES]
    text = (
        Path(__file__)
        .with_name("report_template.md")
        .read_text()
        .format(
            split=split,
            singles=markdown_table(["fact", *sources], single_rows),
            pairs=_several_table(pairs[0], floor=0.90, first="question"),
            pair_names=_several_table(pairs[1], floor=0.90, first="inputs"),
            triples=_several_table(triples[0], floor=0.75, first="question"),
            triple_names=_several_table(triples[1], floor=0.75, first="inputs"),
            places=markdown_table(["number of the", "first place", "second place", "third place"], place_rows),
        )
    )
    out.write_text(text)
    figures = {
        "single": {f"{source}: {fact}": [tally.right, tally.count] for (source, fact), tally in singles.items()},
        **{
            name: {kind: {way: [t.right, t.count] for way, t in tallies.items()} for kind, tallies in table.items()}
            for name, table in (
                ("pairs", pairs[0]), ("pairs by inputs", pairs[1]), ("triples", triples[0]),
                ("triples by inputs", triples[1]),
            )
        },
    }  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True, help="name or folder of the model")
    parser.add_argument("--world", type=Path, required=True, help="folder that xblip_numerals.media wrote")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=100, help="questions per kind and set of modalities")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_report(
        xblip.load(arguments.bundle), arguments.world, arguments.out,
        split=arguments.split, count=arguments.count, seed=arguments.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
