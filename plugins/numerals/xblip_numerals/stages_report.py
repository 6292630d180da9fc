"""The report of `xblip_numerals.stages`: tables in Markdown, and a plot for each modality beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from xblip import markdown
from xblip_numerals.language import MODALITIES

RUN = "run.json"
RECALL = "recall.json"
ALONE, BOTH = "nothing", "align and generate"
ALIGNED = {"align": "several", "align-plain": "one"}
"""Folders of the stage align, and in how many wordings captions told it a file."""
WAYS = {
    BOTH: ("align", "generate", "instruct"),
    ALONE: ("instruct",),
    "generate": ("generate", "instruct"),
}
"""What comes before instruct, and the stages of this way."""
COLORS = {BOTH: "tab:blue", ALONE: "tab:gray", "generate": "tab:orange"}
RECALLED = {"texts": "texts for files", "files": "files for texts"}
SHARES = (0.9, 1.0)
"""Of the accuracy that instruct alone ends with: when is it reached?"""


def folder_of(folder: Path, stages: Sequence[str], seed: int) -> Path:
    """Where a modality's run of the last of these stages is; only instruct has seeds."""
    return folder / "-".join([*stages, *([str(seed)] if stages[-1] == "instruct" else [])])


def reached(points: Sequence[Sequence[float]], wanted: float) -> float | None:
    """The step at which a curve of (step, accuracy) is first at `wanted`, by straight lines; None if it never is."""
    for i, (step, accuracy) in enumerate(points):
        if accuracy >= wanted:
            if i == 0:
                return step
            before, lower = points[i - 1]
            return before + (step - before) * (wanted - lower) / (accuracy - lower)
    return None


def write_report(out: Path, report: Path, *, seeds: Sequence[int], rows: int, rerank: int) -> None:
    """Writes `report`, and plots into a folder `stages` beside it.

    Args:
      out: folder of the runs.
      report: Markdown.
      seeds: of the instruct stages.
      rows: questions of each evaluation.
      rerank: of how many files or texts ITM decided.
    """
    results = [Results(modality, out / modality, seeds) for modality in MODALITIES]
    plotted = report.parent / "stages"
    plotted.mkdir(parents=True, exist_ok=True)
    for result in results:
        result.plot(plotted / f"{result.modality}.png")
    shares = [f"{what} to {share:.0%}" for what in ("steps", "seconds") for share in SHARES]
    kinds = [f"{kind}, {judge}" for kind in RECALLED.values() for judge in ("ITC", "with ITM")]
    tables = {
        "accuracy": (
            ["modality", "before instruct", "at step 0", "at the end", *shares],
            [row for result in results for row in result.accuracy_rows()],
        ),
        "costs": (
            [
                "modality",
                "align",
                "generate",
                "instruct",
                "captions right after generate alone",
                "after align and generate",
            ],
            [result.cost_row() for result in results],
        ),
        "recall": (
            ["modality", "wordings", "files", "texts", "chance", *kinds],
            [row for result in results for row in result.recall_rows()],
        ),
    }
    tables["means"] = (
        ["before instruct", *tables["accuracy"][0][2:4], f"steps to {SHARES[0]:.0%}", f"seconds to {SHARES[0]:.0%}"],
        [mean_row(way, results) for way in WAYS],
    )
    run, ends = results[0].runs[ALONE][0], mean(result.end for result in results)
    text = Path(__file__).with_name("stages_template.md").read_text()
    report.write_text(
        text.format(
            batch=run["batch"],
            every=run["accuracy"][-1][0] - run["accuracy"][-2][0],
            seeds=f"; with each of {len(seeds)} seeds, the stages before with one" if len(seeds) > 1 else "",
            rows=rows,
            error=(ends * (1 - ends) / rows) ** 0.5,
            rerank=rerank,
            share=SHARES[0],
            plots=" ".join(f"![{result.name}](stages/{result.modality}.png)" for result in results),
            **{name: markdown.table([table[0], *table[1]]) for name, table in tables.items()},
        )
    )


def mean_row(way: str, results: "Sequence[Results]") -> list[str]:
    """What modalities have in common: means over them."""
    ends = [mean(run["accuracy"][place][1] for result in results for run in result.runs[way]) for place in (0, -1)]
    when = [result.when(way, SHARES[0] * result.end) for result in results]
    reaches = ["–", "–"] if None in when else [f"{mean(numbers):.0f}" for numbers in zip(*when, strict=True)]
    return [way, *(f"{share:.3f}" for share in ends), *reaches]


class Results:
    """What came of one modality's runs.

    Attributes:
      modality: which.
      name: for people.
      runs: of the instruct stage, by what came before, one for each seed.
      before: runs of the stages before, by the same.
      recall: of retrievers, by the wordings that they learnt from.
    """

    def __init__(self, modality: str, folder: Path, seeds: Sequence[int]):
        self.modality = modality
        self.name = modality.replace("_", " ")
        self.runs, self.before = {}, {}
        for way, stages in WAYS.items():
            self.runs[way] = [_read(folder_of(folder, stages, seed) / RUN) for seed in seeds]
            parts = [stages[:number] for number in range(1, len(stages))]
            self.before[way] = [_read(folder_of(folder, part, seeds[0]) / RUN) for part in parts]
        self.recall = {wordings: _read(folder / name / RECALL) for name, wordings in ALIGNED.items()}

    @property
    def end(self) -> float:
        """The accuracy that instruct alone ends with."""
        return mean(run["accuracy"][-1][1] for run in self.runs[ALONE])

    def accuracy_rows(self) -> list[list[str]]:
        rows = []
        for way, runs in self.runs.items():
            first, last = (_shares([run["accuracy"][place][1] for run in runs]) for place in (0, -1))
            found = [self.when(way, share * self.end) or ("–", "–") for share in SHARES]
            steps, seconds = zip(*found, strict=True)
            rows.append([self.name, way, first, last, *(_rounded(number) for number in (*steps, *seconds))])
        return rows

    def cost_row(self) -> list[str]:
        align, generate = self.before[BOTH]
        [alone] = self.before["generate"]
        instruct = [run for runs in self.runs.values() for run in runs]
        took = [f"{run['steps']} steps, {run['seconds']:.0f} s" for run in (align, generate)]
        took.append(f"{instruct[0]['steps']} steps, {mean(run['seconds'] for run in instruct):.0f} s")
        return [self.name, *took, *(f"{run['accuracy'][-1][1]:.3f}" for run in (alone, generate))]

    def recall_rows(self) -> list[list[str]]:
        rows = []
        for wordings, recall in self.recall.items():
            found = [f"{recall[judge][kind]:.3f}" for kind in RECALLED for judge in ("itc", "itm")]
            rows.append(
                [self.name, wordings, str(recall["files"]), str(recall["texts"]), f"{1 / recall['texts']:.3f}", *found]
            )
        return rows

    def plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2, 3), layout="constrained")
        axes = figure.subplots()
        for way, runs in self.runs.items():
            for number, run in enumerate(runs):
                label = None if number else "instruct alone" if way == ALONE else f"after {way}"
                axes.plot(*zip(*run["accuracy"], strict=True), ".-", color=COLORS[way], label=label)
        axes.axhline(SHARES[0] * self.end, color=COLORS[ALONE], linewidth=0.8, linestyle=":")
        axes.set(xlabel="steps of instruct", ylabel="accuracy", title=self.name, ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right", fontsize="small")
        figure.savefig(path, dpi=75)

    def when(self, way: str, wanted: float) -> tuple[float, float] | None:
        """Mean steps until runs reach an accuracy, and seconds, which begin with the stages before; None if one does not."""
        runs = self.runs[way]
        steps = [reached(run["accuracy"], wanted) for run in runs]
        if None in steps:
            return None
        seconds = [step * run["seconds"] / run["steps"] for step, run in zip(steps, runs, strict=True)]
        return mean(steps), sum(run["seconds"] for run in self.before[way]) + mean(seconds)


def _rounded(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:.0f}"


def _shares(values: Sequence[float]) -> str:
    """The mean, and each value if there are several."""
    return f"{mean(values):.3f}" + (f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else "")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
