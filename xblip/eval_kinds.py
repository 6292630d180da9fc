"""The core's kinds of tasks over manifests: captions, questions, classification.

Prompts are the task's and not the rows': a figure is of one wording, which its config tells.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from xblip import config as configs
from xblip import hookspecs
from xblip.captions import LONGEST, bleu, bleu_counts, cider_d, rouge_l
from xblip.errors import ConfigError, InputError, suggest
from xblip.eval_data import ManifestTask, check_prompt, read_names, read_rows
from xblip.eval_task import EvalRow, Line
from xblip.intervals import Figure
from xblip.metrics import named_in, normalise_answer, vqa_score
from xblip.model import XBlip
from xblip.sample import Media


class CaptionTask(ManifestTask):
    """Descriptions, compared with all that people gave: rows of the same inputs are one row with all their captions."""

    name = "caption"

    @dataclass
    class Config(ManifestTask.Config):
        """Settings.

        Attributes:
          prompt: what asks for a description.
          generation: generation options, e.g. {"max_new_tokens": 80, "num_beams": 5}.
        """

        prompt: str = "a short description"
        generation: dict[str, Any] = field(default_factory=dict)

    def rows(self, modalities: Mapping[str, Any]) -> Sequence[EvalRow]:
        check_prompt(self.config.prompt, "prompt")
        rows: dict[str, EvalRow] = {}
        for row_id, row in read_rows(self.config.data, modalities):
            sample = dataclasses.replace(row.sample, instruction=self.config.prompt)
            first = rows.setdefault(repr(sample.media), EvalRow(row_id, sample, []))
            first.truth.extend(row.answers)
        return list(rows.values())

    def predict(self, model: XBlip, rows: Sequence[EvalRow]) -> list[Line]:
        return _generated(model, rows, self.config.generation)

    def score(self, lines: Sequence[Line]) -> dict[str, Figure]:
        counts = [bleu_counts(line["answer"], line["truth"]) for line in lines]
        answers, truths = [line["answer"] for line in lines], [line["truth"] for line in lines]
        return {
            "CIDEr-D": Figure.of(lines, cider_d(answers, truths)),
            **{f"BLEU-{n}": Figure.of(lines, counts, partial(bleu, size=n)) for n in range(LONGEST, 0, -1)},
            "ROUGE-L": Figure.of(lines, [rouge_l(line["answer"], line["truth"]) for line in lines]),
        }


class QuestionTask(ManifestTask):
    """Questions that are answered freely; all answers of a row count as right."""

    name = "qa"

    @dataclass
    class Config(ManifestTask.Config):
        """Settings.

        Attributes:
          prompt: what is asked, with `{question}` in it.
          generation: generation options, e.g. {"max_new_tokens": 10, "num_beams": 5, "length_penalty": -1}.
          annotators: how many people the weights of answers are shares of, where a row has `weights`.
        """

        prompt: str = "{question}"
        generation: dict[str, Any] = field(default_factory=dict)
        annotators: int = 10

    def rows(self, modalities: Mapping[str, Any]) -> Sequence[EvalRow]:
        check_prompt(self.config.prompt, "prompt", hole="question")
        configs.at_least(self.config, annotators=1)
        rows = []
        for row_id, row in read_rows(self.config.data, modalities):
            if row.sample.instruction is None:
                raise InputError(
                    f"{row.origin}: it has no question. Add it, or measure these rows by another kind of task."
                )
            asked = self.config.prompt.replace("{question}", row.sample.instruction)
            people = row.num_answers or self.config.annotators
            truth = {answer: round(share * people) for answer, share in row.answers.items()}
            rows.append(EvalRow(row_id, dataclasses.replace(row.sample, instruction=asked), truth))
        return rows

    def predict(self, model: XBlip, rows: Sequence[EvalRow]) -> list[Line]:
        return _generated(model, rows, self.config.generation)

    def score(self, lines: Sequence[Line]) -> dict[str, Figure]:
        exact = [line["answer"].strip() in line["truth"] for line in lines]
        normalised = [
            normalise_answer(line["answer"]) in {normalise_answer(answer) for answer in line["truth"]} for line in lines
        ]
        figures = {"normalised": Figure.of(lines, normalised), "exact": Figure.of(lines, exact)}
        if all(sum(line["truth"].values()) >= 4 for line in lines):  # or nobody could reach 1
            scores = [vqa_score(line["answer"], line["truth"]) for line in lines]
            figures = {"VQA": Figure.of(lines, scores), **figures}
        return figures


class ClassificationTask(ManifestTask):
    """Which of some names, two ways: by the likelihood of each name, and by the names in a free answer."""

    name = "classification"

    @dataclass
    class Config(ManifestTask.Config):
        """Settings.

        Attributes:
          prompt: what asks for the name.
          names: those to choose from: a list, or a file with one a line; those that the data has if None.
          answer: the text whose likelihood counts for a name, with `{name}` in it.
          rank: rank the names by likelihood, which reads the prompt once for each of them.
          generate: let the model answer freely.
          generation: generation options of the free answer.
          names_at_once: names that are read at once.
        """

        prompt: str = "what is this?"
        names: Any = None
        answer: str = "{name}"
        rank: bool = True
        generate: bool = True
        generation: dict[str, Any] = field(default_factory=dict)
        names_at_once: int = 128

    def rows(self, modalities: Mapping[str, Any]) -> Sequence[EvalRow]:
        check_prompt(self.config.prompt, "prompt")
        check_prompt(self.config.answer, "answer", hole="name")
        configs.at_least(self.config, names_at_once=1)
        if not (self.config.rank or self.config.generate):
            raise ConfigError("rank and generate are both off: let one of them be true.")
        given = list(read_rows(self.config.data, modalities))
        found = sorted({name for _, row in given for name in row.answers})
        self.names = found if self.config.names is None else read_names(self.config.names)
        for _, row in given:
            if unknown := [name for name in row.answers if name not in self.names]:
                raise InputError(
                    f'{row.origin}: "{unknown[0]}" is none of the {len(self.names)} names.{suggest(unknown[0], self.names)}'
                )
        if len(self.names) < 2:
            raise ConfigError(f'There is one name alone, "{self.names[0]}": give `names` to choose from.')
        return [
            EvalRow(row_id, dataclasses.replace(row.sample, instruction=self.config.prompt), list(row.answers))
            for row_id, row in given
        ]

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "names": self.names}

    def predict(self, model: XBlip, rows: Sequence[EvalRow]) -> list[Line]:
        lines: list[Line] = [{} for _ in rows]
        if self.config.generate:
            for line, made in zip(lines, _generated(model, rows, self.config.generation), strict=True):
                line |= {**made, "named": named_in(made["answer"], self.names)}
        if self.config.rank:
            for line, row in zip(lines, rows, strict=True):
                line |= self._ranked(model, row)
        return lines

    def _ranked(self, model: XBlip, row: EvalRow) -> Line:
        """The likeliest names, five where there are more, by the sum over an answer's tokens and by their mean."""
        answers = [self.config.answer.replace("{name}", name) for name in self.names]
        media = [
            part.with_source(model.branches[part.modality].encode([part.source])) if isinstance(part, Media) else part
            for part in row.sample.media
        ]
        sample = dataclasses.replace(row.sample, media=media)
        sums: list[float] = []
        for start in range(0, len(answers), self.config.names_at_once):
            sums += model.score([sample], answers[start : start + self.config.names_at_once])[0]
        means = [total / model.router.count_answer_tokens(answer) for total, answer in zip(sums, answers, strict=True)]
        return {"ranked": self._best(sums), "ranked_by_mean": self._best(means)}

    def _best(self, scores: Sequence[float]) -> list[str]:
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        return [self.names[place] for place in order[: 5 if len(order) > 5 else 1]]

    def score(self, lines: Sequence[Line]) -> dict[str, Figure]:
        figures = {}
        for key, called in (("ranked", "top-{}"), ("ranked_by_mean", "top-{} by mean")):
            for places in (1, 5) if self.config.rank else ():
                right = [any(name in line["truth"] for name in line[key][:places]) for line in lines]
                if places <= len(lines[0][key]):
                    figures[called.format(places)] = Figure.of(lines, right)
        if self.config.generate:
            right = [len(line["named"]) == 1 and line["named"][0] in line["truth"] for line in lines]
            figures["generated"] = Figure.of(lines, right)
        return figures


def _generated(model: XBlip, rows: Sequence[EvalRow], options: Mapping[str, Any]) -> list[Line]:
    answers = model.generate([row.sample for row in rows], **options)
    return [{"answer": answer.text} for answer in answers]


@hookspecs.hookimpl
def register_tasks(register) -> None:
    for task in (CaptionTask, QuestionTask, ClassificationTask):
        register(task)
