"""The report of `xblip_numerals.stages`: tables in Markdown, and a plot for each modality beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from xblip_numerals.language import MODALITIES
from xblip_numerals.report import markdown_table

RUN = "run.json"
RECALL = "recall.json"
ALONE, AFTER = "instruct alone", "instruct"
COLORS = {ALONE: "tab:gray", AFTER: "tab:blue"}
LABELS = {ALONE: "instruct alone", AFTER: "after align and generate"}
RECALLED = {"texts": "texts for files", "files": "files for texts"}
SHARES = (0.9, 1.0)
"""Of the accuracy that instruct alone ends with: when is it reached?"""


def folders(folder: Path, seed: int) -> dict[str, Path]:
    """Where a modality's runs are; all seeds share the stages before instruct."""
    return {
        "align": folder / "align",
        "generate": folder / "generate",
        AFTER: folder / f"instruct-{seed}",
        ALONE: folder / f"alone-{seed}",
    }


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
            ["modality", "instruct", "accuracy at its end", *shares],
            [row for result in results for row in result.accuracy_rows()],
        ),
        "costs": (
            ["modality", "align", "generate", "instruct", "the first two, in steps of instruct",
             "captions right after generate", "questions right at step 0", "so from nothing"],
            [result.cost_row() for result in results],
        ),
        "recall": (
            ["modality", "files", "texts", "chance", *kinds],
            [result.recall_row() for result in results],
        ),
    }  # fmt: skip
    run = results[0].runs[ALONE][0]
    text = Path(__file__).with_name("stages_template.md").read_text()
    report.write_text(
        text.format(
            batch=run["batch"],
            every=run["accuracy"][-1][0] - run["accuracy"][-2][0],
            seeds=f"; with each of {len(seeds)} seeds, the stages before with one" if len(seeds) > 1 else "",
            rows=rows,
            rerank=rerank,
            share=SHARES[0],
            plots=" ".join(f"![{result.name}](stages/{result.modality}.png)" for result in results),
            **{name: markdown_table(*table) for name, table in tables.items()},
        )
    )


class Results:
    """What came of one modality's runs.

    Attributes:
      modality: which.
      name: for people.
      runs: of the instruct stage, by `ALONE` and `AFTER`, one for each seed.
      before: seconds of the stages before, by the same.
    """

    def __init__(self, modality: str, folder: Path, seeds: Sequence[int]):
        self.modality = modality
        self.name = modality.replace("_", " ")
        self.runs = {way: [_read(folders(folder, seed)[way] / RUN) for seed in seeds] for way in LABELS}
        at = folders(folder, seeds[0])
        self.align, self.generate = _read(at["align"] / RUN), _read(at["generate"] / RUN)
        self.recall = _read(at["align"] / RECALL)
        self.before = {ALONE: 0.0, AFTER: self.align["seconds"] + self.generate["seconds"]}

    @property
    def end(self) -> float:
        """The accuracy that instruct alone ends with."""
        return mean(run["accuracy"][-1][1] for run in self.runs[ALONE])

    def accuracy_rows(self) -> list[list[str]]:
        rows = []
        for way, label in LABELS.items():
            last = [run["accuracy"][-1][1] for run in self.runs[way]]
            steps, seconds = zip(*(self._when(way, share * self.end) for share in SHARES), strict=True)
            rows.append([self.name, label, _shares(last), *steps, *seconds])
        return rows

    def cost_row(self) -> list[str]:
        instruct = self.runs[ALONE][0]
        each = mean(run["seconds"] / run["steps"] for runs in self.runs.values() for run in runs)
        took = [f"{run['steps']} steps, {run['seconds']:.0f} s" for run in (self.align, self.generate)]
        first = [f"{mean(run['accuracy'][0][1] for run in self.runs[way]):.3f}" for way in (AFTER, ALONE)]
        captions = f"{self.generate['accuracy'][-1][1]:.3f}"
        took.append(f"{instruct['steps']} steps, {instruct['steps'] * each:.0f} s")
        return [self.name, *took, f"{self.before[AFTER] / each:.0f}", captions, *first]

    def recall_row(self) -> list[str]:
        found = [f"{self.recall[judge][kind]:.3f}" for kind in RECALLED for judge in ("itc", "itm")]
        texts = self.recall["texts"]
        return [self.name, str(self.recall["files"]), str(texts), f"{1 / texts:.3f}", *found]

    def plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2, 3), layout="constrained")
        axes = figure.subplots()
        for way, label in LABELS.items():
            for number, run in enumerate(self.runs[way]):
                axes.plot(*zip(*run["accuracy"], strict=True), ".-", color=COLORS[way], label=None if number else label)
        axes.axhline(SHARES[0] * self.end, color=COLORS[ALONE], linewidth=0.8, linestyle=":")
        axes.set(xlabel="steps of instruct", ylabel="accuracy", title=self.name, ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path, dpi=75)

    def _when(self, way: str, wanted: float) -> tuple[str, str]:
        """Mean steps until runs reach an accuracy, and seconds, which begin with those of the stages before."""
        runs = self.runs[way]
        steps = [reached(run["accuracy"], wanted) for run in runs]
        if None in steps:
            return "–", "–"
        seconds = [step * run["seconds"] / run["steps"] for step, run in zip(steps, runs, strict=True)]
        return f"{mean(steps):.0f}", f"{self.before[way] + mean(seconds):.0f}"


def _shares(values: Sequence[float]) -> str:
    """The mean, and each value if there are several."""
    return f"{mean(values):.3f}" + (f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else "")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
