"""What the experiments found: every variant beside the shipped kind of bridge, on the same questions, seeds together."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from xblip.crossmodal_page import Section, shown_p, signed
from xblip.crossmodal_score import SOFT, marks_of
from xblip.intervals import Difference, Figure, difference
from xblip.runs import read_lines
from xblip_numerals.experiments import ASKED, BASE, VARIANTS

Line = Mapping[str, Any]
CUTS: dict[str, Callable[[Line], bool]] = {
    "number": lambda line: len(line["inputs"]) == 1 and line["kind"] == "number",
    "other facts": lambda line: len(line["inputs"]) == 1 and line["kind"] != "number",
    "two inputs": lambda line: len(line["inputs"]) == 2,
    "three inputs": lambda line: len(line["inputs"]) == 3,
}
"""What a variant is measured by."""


def experiment_sections(folder: Path) -> list[Section]:
    """The tables of all experiments that were run; none if none were."""
    runs = {name: found for name in VARIANTS if (found := read_variant(folder, name))}
    if BASE not in runs:
        return []
    return [("Bridges compared", [(SHARES, shares_table(runs), ""), (TESTS, tests_table(runs), "")])]


SHARES = "Right, %: the mean over seeds, and each seed's; every bridge trained as long on as many rows"
TESTS = (
    f"What each has more than {VARIANTS[BASE].title} on the seeds that both have, in points, with 95 % intervals over "
    "blocks of files, and p"
)


def read_variant(folder: Path, name: str) -> dict[int, dict[str, tuple[Line, float]]]:
    """By seed and row what was asked and how right the answer is."""
    found = {}
    for run in sorted((folder / ASKED).glob(f"{name}-*")):
        seed = run.name.removeprefix(f"{name}-")
        if seed.isdigit() and (run / "results.json").is_file():
            lines = read_lines(run / f"{ASKED}.jsonl")
            found[int(seed)] = {line["id"]: (line, marks_of(line)[SOFT]) for line in lines}
    return found


def shares_table(runs: Mapping[str, Mapping[int, Any]]) -> list[list[str]]:
    table = [["bridge", *CUTS, "seeds"]]
    for name, by_seed in runs.items():
        row = [VARIANTS[name].title]
        for is_in in CUTS.values():
            shares = [mean(mark for line, mark in found.values() if is_in(line)) for found in by_seed.values()]
            row.append(_percent(shares))
        table.append([*row, str(len(by_seed))])
    return table


def _percent(shares: Sequence[float]) -> str:
    each = ", ".join(f"{100 * share:.1f}" for share in shares)
    return f"{100 * mean(shares):.1f}" + (f" ({each})" if len(shares) > 1 else "")


def tests_table(runs: Mapping[str, Mapping[int, Any]]) -> list[list[str]]:
    table = [["bridge", *(text for cut in CUTS for text in (cut, "p"))]]
    for name in runs:
        if name != BASE:
            row = [VARIANTS[name].title]
            for is_in in CUTS.values():
                got = compared(runs[BASE], runs[name], is_in)
                row += [signed(got._asdict()), shown_p(got.p)]
            table.append(row)
    return table


def compared(first: Mapping[int, Any], second: Mapping[int, Any], is_in: Callable[[Line], bool]) -> Difference:
    """The difference of two variants over the seeds that both have; a row's mark is its mean over these."""
    seeds = sorted(set(first) & set(second))

    def figure(runs: Mapping[int, Any]) -> Figure:
        rows = [row for row, (line, _) in runs[seeds[0]].items() if is_in(line)]
        lines = [runs[seeds[0]][row][0] for row in rows]
        return Figure.of(lines, [mean(runs[seed][row][1] for seed in seeds) for row in rows])

    return difference(figure(first), figure(second))
