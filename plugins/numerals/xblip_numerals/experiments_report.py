"""What the experiments found: every variant beside the shipped kind of bridge, on the same questions, seeds together."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from xblip import charts
from xblip.crossmodal_page import Section, difference_cells
from xblip.crossmodal_score import SOFT, marks_of
from xblip.intervals import Difference, Figure, difference, measure
from xblip.runs import read_lines
from xblip_numerals.experiments import ASKED, BASE, COUNTS, VARIANTS, queries_of

Line = Mapping[str, Any]
Rows = Mapping[str, tuple[Line, float]]
"""By row what was asked, and how right the answer is."""
Run = Mapping[int | None, Rows]
"""By seed; None is that of what has one run alone."""
Runs = Mapping[str, Run]
CUTS: dict[str, Callable[[Line], bool]] = {
    "number": lambda line: len(line["inputs"]) == 1 and line["kind"] == "number",
    "other facts": lambda line: len(line["inputs"]) == 1 and line["kind"] != "number",
    "two inputs": lambda line: len(line["inputs"]) == 2,
    "three inputs": lambda line: len(line["inputs"]) == 3,
}
"""What a variant is measured by."""
PLOTTED = "two inputs"
SHIPPED, CAPTIONS = "the shipped model", "people's captions"
"""What the report's own run says on the same questions: way of asking by title."""
WAYS = {SHIPPED: SOFT, CAPTIONS: CAPTIONS}
SEGMENTS = {"image": 1, "video": 6, "audio": 1, "point_cloud": 1}
"""How often a Q-Former's queries stand in an input's soft prompt."""
TOKENS = {"image": 25, "video": 150, "audio": 28, "point_cloud": 57}
"""What an encoder gives of an input at most, each of which a layer without queries lays before the LLM."""

SHARES = (
    "Right, %\nThe mean over seeds, and each seed's. Every bridge was trained as long, on as many rows, with the "
    f"settings that suit {SHIPPED}'s, which have twice the queries and more training. Slots are what the LLM is "
    f"given of an image, a video, a recording and a point cloud; {CAPTIONS} need no bridge. The plot is of "
    f"{PLOTTED}, with 95 % intervals over blocks of files. The questions of xblip augment are about what one caption "
    "holds of one file, two facts or three, and none is about several inputs."
)
UNITS = (
    "In points, the mean over the seeds that both have. Intervals and p are over blocks of files for these seeds "
    "alone; another seed may differ by more than another set of files, so each seed's difference stands beside."
)
TESTS = f"What each has more than {VARIANTS[BASE].title}\n{UNITS}"
AWARE = f"What instruction-aware queries have more than as many static ones\n{UNITS}"


def experiment_sections(folder: Path, asked: Path | None = None) -> list[Section]:
    """The tables of all experiments that were run; none if none were.

    Args:
      folder: of the experiments.
      asked: predictions of the report's own run, which stand beside; None leaves them out.
    """
    runs: dict[str, Run] = {title_of(name): found for name in VARIANTS if (found := read_variant(folder, name))}
    if title_of(BASE) not in runs:
        return []
    if asked:
        lines = read_lines(asked)
        runs |= {
            title: {None: {line["id"]: (line, marks_of(line)[way]) for line in lines}} for title, way in WAYS.items()
        }
    tables = [(SHARES, shares_table(runs), charts.dots(plotted(runs))), (TESTS, tests_table(runs), "")]
    aware = aware_table(runs)
    return [("Bridges compared", [*tables, (AWARE, aware, "")] if len(aware) > 1 else tables)]


def title_of(name: str) -> str:
    return VARIANTS[name].title


def read_variant(folder: Path, name: str) -> dict[int, dict[str, tuple[Line, float]]]:
    """By seed and row what was asked and how right the answer is."""
    found = {}
    for run in sorted((folder / ASKED).glob(f"{name}-*")):
        seed = run.name.removeprefix(f"{name}-")
        if seed.isdigit() and (run / "results.json").is_file():
            lines = read_lines(run / f"{ASKED}.jsonl")
            found[int(seed)] = {line["id"]: (line, marks_of(line)[SOFT]) for line in lines}
    return found


def shares_table(runs: Runs) -> list[list[str]]:
    slots = {title_of(name): slots_of(name) for name in VARIANTS}
    table = [["bridge", "slots", *CUTS, "seeds"]]
    for title, by_seed in runs.items():
        row = [title, slots.get(title, "–")]
        for is_in in CUTS.values():
            shares = [mean(mark for line, mark in found.values() if is_in(line)) for found in by_seed.values()]
            row.append(_percent(shares))
        table.append([*row, str(len(by_seed))])
    return table


def slots_of(name: str) -> str:
    """How long the soft prompts of an input of each modality are."""
    queries = queries_of(VARIANTS[name])
    slots = [queries * segments for segments in SEGMENTS.values()] if queries else TOKENS.values()
    return ", ".join(map(str, slots))


def _percent(shares: Sequence[float]) -> str:
    each = ", ".join(f"{100 * share:.1f}" for share in shares)
    return f"{100 * mean(shares):.1f}" + (f" ({each})" if len(shares) > 1 else "")


def plotted(runs: Runs) -> dict[str, Mapping[str, float]]:
    """Each one's share of one cut, with its interval."""
    return {title: measure(_figure(list(run.values()), CUTS[PLOTTED]))._asdict() for title, run in runs.items()}


def tests_table(runs: Runs) -> list[list[str]]:
    base = runs[title_of(BASE)]
    return _table("bridge", {title: (base, run) for title, run in runs.items() if run is not base})


def aware_table(runs: Runs) -> list[list[str]]:
    pairs = {str(count): (title_of(f"static-{count}"), title_of(f"aware-{count}")) for count in COUNTS}
    return _table(
        "queries",
        {count: (runs[one], runs[two]) for count, (one, two) in pairs.items() if {one, two} <= set(runs)},
    )


def _table(head: str, pairs: Mapping[str, tuple[Run, Run]]) -> list[list[str]]:
    """What the second of each pair has more than the first, cut by cut."""
    table = [["of", head, "more", "95 %", "p", "each seed"]]
    for cut, is_in in CUTS.items():
        for name, (first, second) in pairs.items():
            rows = matched(first, second)
            each = [f"{100 * compared([pair], is_in).difference:+.1f}" for pair in rows]
            table.append([cut, name, *difference_cells(compared(rows, is_in)._asdict()), ", ".join(each)])
    return table


def matched(first: Run, second: Run) -> list[tuple[Rows, Rows]]:
    """The rows of two, seed by seed where both have the same, else each of the one beside each of the other."""
    both = [(first[seed], second[seed]) for seed in first if seed in second]
    return both or list(itertools.product(first.values(), second.values()))


def compared(pairs: Sequence[tuple[Rows, Rows]], is_in: Callable[[Line], bool]) -> Difference:
    """What the second of each pair has more; a row's mark is its mean over the pairs."""
    return difference(*(_figure(side, is_in) for side in zip(*pairs, strict=True)))


def _figure(runs: Sequence[Rows], is_in: Callable[[Line], bool]) -> Figure:
    rows = {row: line for row, (line, _) in runs[0].items() if is_in(line)}
    return Figure.of(list(rows.values()), [mean(run[row][1] for run in runs) for row in rows])
