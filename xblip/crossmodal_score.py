"""The figures of the cross-modal report: each way to ask by number of inputs, their modalities and kind of question.

The product of the parts is what inputs read one by one would give: the accuracy of each part, times that of the LLM on
true descriptions of the same questions. Its interval, and that of soft prompts' share in it, has the parts' own
uncertainty in it: they are drawn anew beside the questions.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xblip.eval_task import Line
from xblip.intervals import RESAMPLES, Figure, Measured, difference, measure, percentiles
from xblip.metrics import normalise_answer

SOFT = "soft prompts"
TRUE = "true descriptions"
CHANCE = "chance"
SWAPPED = "order swapped"
BOTH_ORDERS = "alike in both orders"
REPLACED = "inputs replaced"
BEFORE = "replaced, but as before"
SHOWN = (TRUE, SOFT, "people's captions", "own captions", "one input alone", "question alone", CHANCE)
"""What answers questions as they stand, in the order of tables."""
CHECKS = (SWAPPED, BOTH_ORDERS, REPLACED, BEFORE)
"""What answers come to when the inputs are moved or are others."""
SIZES = ("", "one input", "two inputs", "three inputs", "four inputs")


def marks_of(line: Line) -> dict[str, float]:
    """Returns how right a row was answered in each way that it was asked in, from 0 to 1."""
    answers = line["answers"]
    marks = {way: _share_right(given, line["truth"]) for way, given in answers.items() if way in SHOWN}
    if "chance" in line:
        marks[CHANCE] = line["chance"]
    if SWAPPED in answers:
        marks[SWAPPED] = _share_right(answers[SWAPPED], line["swapped_truth"])
        marks[BOTH_ORDERS] = float(marks[SWAPPED] == marks[SOFT])
    if REPLACED in answers:
        marks[REPLACED] = _share_right(answers[REPLACED], line["replaced_truth"])
        if not _normalised(line["truth"]) & _normalised(line["replaced_truth"]):
            marks[BEFORE] = _share_right(answers[REPLACED], line["truth"])
    return marks


def _share_right(answers: Sequence[str], truths: Sequence[str]) -> float:
    right = _normalised(truths)
    return float(np.mean([normalise_answer(answer) in right for answer in answers]))


def _normalised(texts: Sequence[str]) -> set[str]:
    return {normalise_answer(text) for text in texts}


def size_of(line: Line) -> str:
    """How many inputs a row has, in words."""
    count = len(line["inputs"])
    return SIZES[count] if count < len(SIZES) else f"{count} inputs"


def figures_of(lines: Sequence[Line]) -> dict[str, Figure]:
    """Returns a figure for each number of inputs and way to ask: what two runs are compared by too."""
    marked = [(line, marks_of(line)) for line in lines]
    figures = {}
    for size in _sizes(lines):
        for way in (*SHOWN, *CHECKS):
            own = [(line, marks[way]) for line, marks in marked if size_of(line) == size and way in marks]
            if own:
                figures[f"{size}: {way}"] = Figure.of([line for line, _ in own], [mark for _, mark in own])
    return figures


def _sizes(lines: Sequence[Line]) -> list[str]:
    by_count = {len(line["inputs"]): size_of(line) for line in lines}
    return [by_count[count] for count in sorted(by_count, key=lambda count: (count == 1, count))]


class Report:
    """Figures of one run.

    Attributes:
      sizes: in the order of the report, several inputs first.
    """

    def __init__(self, lines: Sequence[Line], *, seed: int = 0, resamples: int = RESAMPLES):
        self.lines, self.seed, self.resamples = list(lines), seed, resamples
        self.marks = {line["id"]: marks_of(line) for line in self.lines}
        self.sizes = _sizes(self.lines)
        self._parts: dict[str, tuple[float, np.ndarray]] = {}
        self._singles: dict[str, list[Line]] = {}
        for line in self.lines:
            if len(line["inputs"]) == 1:
                for name in {line["id"], line.get("part", line["id"])}:
                    self._singles.setdefault(name, []).append(line)

    def told(self) -> dict[str, Any]:
        """Returns all figures as plain values."""
        files = Counter(
            place for _, places in _grouped(self.lines, lambda line: line.get("unit") or line["id"])
            for place in {tuple(given) for line in places for given in line["inputs"]}
        )  # fmt: skip
        told: dict[str, Any] = {
            "rows": len(self.lines),
            "units": len({line.get("unit") or line["id"] for line in self.lines}),
            "files": len(files),
            "files_in_several_units": sum(count > 1 for count in files.values()),
            "resamples": self.resamples,
            "seed": self.seed,
            "sizes": {},
        }
        for size in self.sizes:
            lines = [line for line in self.lines if size_of(line) == size]
            told["sizes"][size] = {
                **self.cut(lines, tests=True),
                "groups": self._each(lines, lambda line: line["group"]),
                "kinds": self._each(lines, lambda line: line["kind"]),
                "cells": {
                    group: {kind: self._brief(found) for kind, found in _grouped(own, lambda line: line["kind"])}
                    for group, own in _grouped(lines, lambda line: line["group"])
                },
                "alone": {group: self._alone(own) for group, own in _grouped(lines, lambda line: line["group"])},
            }
        told["parts"] = {
            part: measure(self._figure(lines, SOFT), seed=self.seed, resamples=self.resamples)._asdict()
            for part, lines in _grouped([line for line in self.lines if "part" in line], lambda line: line["part"])
        }
        return told

    def _each(self, lines: Sequence[Line], key: Callable[[Line], str]) -> dict[str, Any]:
        return {name: self.cut(own) for name, own in _grouped(lines, key)}

    def _figure(self, lines: Sequence[Line], way: str) -> Figure:
        return Figure.of(lines, [self.marks[line["id"]][way] for line in lines])

    def cut(self, lines: Sequence[Line], *, tests: bool = False) -> dict[str, Any]:
        """Returns figures of some rows: of each way, of the product of the parts, and of soft prompts' share in it.

        Args:
          lines: of rows.
          tests: compare each way with soft prompts too, on the rows that were asked in both.
        """
        ways: dict[str, Any] = {}
        for way in (*SHOWN, *CHECKS):
            own = [line for line in lines if way in self.marks[line["id"]]]
            if not own:
                continue
            figure = self._figure(own, way)
            ways[way] = measure(figure, seed=self.seed, resamples=self.resamples)._asdict()
            if tests and way not in (SOFT, BOTH_ORDERS):
                got = difference(figure, self._figure(own, SOFT), seed=self.seed, resamples=self.resamples)
                ways[way]["soft_prompts_more"] = {key: got._asdict()[key] for key in ("difference", "low", "high", "p")}
        return {"rows": len(lines), "ways": ways, **self._product(lines)}

    def _product(self, lines: Sequence[Line]) -> dict[str, Any]:
        whole = [
            line for line in lines
            if line.get("parts") and TRUE in self.marks[line["id"]] and all(p in self._singles for p in line["parts"])
        ]  # fmt: skip
        if not whole:
            return {}
        value, drawn = 0.0, np.zeros(self.resamples)
        for _, cell in _grouped(whole, lambda line: (line["group"], line["kind"])):
            truth = self._figure(cell, TRUE)
            read, read_drawn = 0.0, np.zeros(self.resamples)
            for parts, count in Counter(tuple(line["parts"]) for line in cell).items():
                found = [self._part(part) for part in parts]
                read += count * float(np.prod([part for part, _ in found]))
                read_drawn += count * np.prod([part for _, part in found], axis=0)
            value += truth.value * read / len(whole)
            drawn += truth.resampled(self.seed, self.resamples) * read_drawn / len(whole)
        soft = self._figure(whole, SOFT)
        if not value:
            return {}
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = soft.resampled(self.seed, self.resamples) / drawn
        units = len(set(soft.units))
        return {
            "product": Measured(value, *percentiles(drawn), len(whole), units)._asdict(),
            "ratio": Measured(soft.value / value, *percentiles(ratios[~np.isnan(ratios)]), len(whole), units)._asdict(),
        }

    def _part(self, name: str) -> tuple[float, np.ndarray]:
        """Accuracy of a part, and as often as it is drawn anew."""
        if name not in self._parts:
            figure = self._figure(self._singles[name], SOFT)
            self._parts[name] = figure.value, figure.resampled(self.seed, self.resamples)
        return self._parts[name]

    def _brief(self, lines: Sequence[Line]) -> dict[str, Any]:
        """The means of a few rows."""
        return {
            "rows": len(lines),
            **{
                way: float(np.mean(own))
                for way in SHOWN
                if (own := [self.marks[line["id"]][way] for line in lines if way in self.marks[line["id"]]])
            },
        }

    def _alone(self, lines: Sequence[Line]) -> dict[str, Any]:
        """What inputs of each modality give without the others."""
        found: dict[str, tuple[list[Line], list[float]]] = {}
        for line in lines:
            for (modality, _), answer in zip(line["inputs"], line["answers"].get("one input alone", ()), strict=False):
                own, right = found.setdefault(modality, ([], []))
                own.append({"id": f"{line['id']} {len(own)}", "unit": line.get("unit") or line["id"]})
                right.append(_share_right([answer], line["truth"]))
        return {
            modality: measure(Figure.of(own, right), seed=self.seed, resamples=self.resamples)._asdict()
            for modality, (own, right) in found.items()
        }


def _grouped(lines: Sequence[Line], key: Callable[[Line], Any]) -> list[tuple[Any, list[Line]]]:
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return sorted(groups.items())


def shown(measured: Mapping[str, Any], *, scale: float = 100, digits: int = 1) -> str:
    """Returns a figure with its interval, such as "93.1 (91.0 to 95.2)"."""
    value, low, high = (f"{scale * measured[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
