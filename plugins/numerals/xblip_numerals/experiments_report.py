"""What the experiments found: every variant beside the shipped kind of bridge, on the same questions, seeds together."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from xblip import charts
from xblip.crossmodal_page import Section, shown_p, signed
from xblip.crossmodal_score import SOFT, marks_of
from xblip.intervals import Difference, Figure, difference, measure
from xblip.runs import read_lines
from xblip_numerals.experiments import ASKED, BASE, COUNTS, VARIANTS, queries_of

Line = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Mapping[str, tuple[Line, float]]]]
"""By variant, seed and row: what was asked, and how right the answer is."""
CUTS: dict[str, Callable[[Line], bool]] = {
    "number": lambda line: len(line["inputs"]) == 1 and line["kind"] == "number",
    "other facts": lambda line: len(line["inputs"]) == 1 and line["kind"] != "number",
    "two inputs": lambda line: len(line["inputs"]) == 2,
    "three inputs": lambda line: len(line["inputs"]) == 3,
}
"""What a variant is measured by."""
PLOTTED = "two inputs"
SEGMENTS = {"image": 1, "video": 6, "audio": 1, "point_cloud": 1}
"""How often a Q-Former's queries stand in an input's soft prompt."""
TOKENS = {"image": 25, "video": 150, "audio": 28, "point_cloud": 57}
"""What an encoder gives of an input at most, each of which a layer without queries lays before the LLM."""

SHARES = (
    "Right, %: the mean over seeds, and each seed's; every bridge trained as long, on as many rows, with the settings that "
    "suit the shipped one; slots are what the LLM is given of an image, a video, a recording and a point cloud; the plot is "
    f"of {PLOTTED}"
)
UNITS = "in points, with 95 % intervals over blocks of files, and p"
TESTS = f"What each has more than {VARIANTS[BASE].title}, on the seeds that both have, {UNITS}"
AWARE = f"What instruction-aware queries have more than as many static ones, on the seeds that both have, {UNITS}"


def experiment_sections(folder: Path) -> list[Section]:
    """The tables of all experiments that were run; none if none were."""
    runs = {name: found for name in VARIANTS if (found := read_variant(folder, name))}
    if BASE not in runs:
        return []
    tables = [(SHARES, shares_table(runs), charts.dots(plotted(runs))), (TESTS, tests_table(runs), "")]
    aware = aware_table(runs)
    return [("Bridges compared", [*tables, (AWARE, aware, "")] if len(aware) > 1 else tables)]


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
    table = [["bridge", "slots", *CUTS, "seeds"]]
    for name, by_seed in runs.items():
        row = [VARIANTS[name].title, slots_of(name)]
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
    """Each variant's share of one cut, with its interval."""
    rows = {}
    for name, by_seed in runs.items():
        rows[VARIANTS[name].title] = measure(_figure(by_seed, sorted(by_seed), CUTS[PLOTTED]))._asdict()
    return rows


def tests_table(runs: Runs) -> list[list[str]]:
    return _table("bridge", {VARIANTS[name].title: (runs[BASE], runs[name]) for name in runs if name != BASE})


def aware_table(runs: Runs) -> list[list[str]]:
    pairs = {str(count): (f"static-{count}", f"aware-{count}") for count in COUNTS}
    return _table(
        "queries",
        {count: (runs[one], runs[two]) for count, (one, two) in pairs.items() if {one, two} <= set(runs)},
    )


def _table(head: str, pairs: Mapping[str, tuple[Mapping[int, Any], Mapping[int, Any]]]) -> list[list[str]]:
    """What the second of each pair has more than the first."""
    table = [[head, *(text for cut in CUTS for text in (cut, "p"))]]
    for name, (first, second) in pairs.items():
        row = [name]
        for is_in in CUTS.values():
            got = compared(first, second, is_in)
            row += [signed(got._asdict()), shown_p(got.p)]
        table.append(row)
    return table


def compared(first: Mapping[int, Any], second: Mapping[int, Any], is_in: Callable[[Line], bool]) -> Difference:
    """The difference of two variants over the seeds that both have; a row's mark is its mean over these."""
    seeds = sorted(set(first) & set(second))
    return difference(_figure(first, seeds, is_in), _figure(second, seeds, is_in))


def _figure(by_seed: Mapping[int, Any], seeds: Sequence[int], is_in: Callable[[Line], bool]) -> Figure:
    rows = {row: line for row, (line, _) in by_seed[seeds[0]].items() if is_in(line)}
    return Figure.of(list(rows.values()), [mean(by_seed[seed][row][1] for seed in seeds) for row in rows])
