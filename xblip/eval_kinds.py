"""The core's kinds of tasks over manifests: captions, questions, classification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xblip import hookspecs
from xblip.eval_data import ManifestTask, check_prompt, prompted, read_rows
from xblip.eval_task import EvalRow, Line
from xblip.intervals import Figure
from xblip.metrics import normalise_answer, vqa_score
from xblip.model import XBlip


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
        check_prompt(self.config.prompt, "prompt", words="question")
        rows = []
        for row_id, row in read_rows(self.config.data, modalities):
            people = row.num_answers or self.config.annotators
            truth = {answer: round(share * people) for answer, share in row.answers.items()}
            rows.append(EvalRow(row_id, prompted(row.sample, self.config.prompt, words="question"), truth))
        return rows

    def predict(self, model: XBlip, rows: Sequence[EvalRow]) -> list[Line]:
        answers = model.generate([row.sample for row in rows], **self.config.generation)
        return [{"answer": answer.text} for answer in answers]

    def score(self, lines: Sequence[Line]) -> dict[str, Figure]:
        exact = [line["answer"].strip() in line["truth"] for line in lines]
        normalised = [
            normalise_answer(line["answer"]) in {normalise_answer(answer) for answer in line["truth"]} for line in lines
        ]
        figures = {"normalised": Figure.of(lines, normalised), "exact": Figure.of(lines, exact)}
        if all(sum(line["truth"].values()) >= 4 for line in lines):
            scores = [vqa_score(line["answer"], line["truth"]) for line in lines]
            figures = {"vqa": Figure.of(lines, scores), **figures}
        return figures


@hookspecs.hookimpl
def register_tasks(register) -> None:
    register(QuestionTask)
