"""The core's kinds of tasks: what is asked, and what answers are worth."""

import json
from dataclasses import replace

import pytest
from kit import BEADS, ONE, TWO

from xblip.errors import ConfigError, InputError
from xblip.eval_kinds import CaptionTask, ClassificationTask, QuestionTask
from xblip.intervals import measure
from xblip.model import XBlip


@pytest.fixture
def write(tmp_path):
    def written(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return written


@pytest.fixture
def modalities(model):
    return {name: branch.modality for name, branch in model.branches.items()}


def answer_by(monkeypatch, answers):
    """Lets a model say these, one after another."""
    left = iter(answers)

    def generate(self, samples, **options):
        return [type("Answer", (), {"text": next(left)}) for _ in samples]

    monkeypatch.setattr(XBlip, "generate", generate)


def scored(task, model, modalities):
    rows = task.rows(modalities)
    predicted = task.predict(model, rows)
    lines = [{"id": row.id, "truth": row.truth, **line} for row, line in zip(rows, predicted, strict=True)]
    return {name: figure.value for name, figure in task.score(json.loads(json.dumps(lines))).items()}


class TestCaptions:
    def test_rows_of_the_same_inputs_are_one_with_all_their_captions(self, write, modalities):
        rows = [
            {"toy": ONE, "caption": "a red dog"},
            {"toy": TWO, "caption": ["two cats", "cats"]},
            {"toy": ONE, "caption": "the dog"},
        ]
        task = CaptionTask(CaptionTask.Config(write(rows), prompt="describe it"))
        made = task.rows(modalities)
        assert [(row.id, row.truth) for row in made] == [("0", ["a red dog", "the dog"]), ("1", ["two cats", "cats"])]
        assert {row.sample.instruction for row in made} == {"describe it"}

    def test_figures(self, write, modalities, model, monkeypatch):
        rows = [{"toy": ONE, "caption": "a red dog runs home"}, {"toy": TWO, "caption": "two blue cats sleep here"}]
        answer_by(monkeypatch, ["A red dog runs home.", "dogs"])
        got = scored(CaptionTask(CaptionTask.Config(write(rows))), model, modalities)
        assert list(got) == ["CIDEr-D", "BLEU-4", "BLEU-3", "BLEU-2", "BLEU-1", "ROUGE-L"]
        assert got["CIDEr-D"] == pytest.approx(5.0) and got["ROUGE-L"] == pytest.approx(0.5)

    def test_a_corpus_figure_has_an_interval(self, write, modalities, model, monkeypatch):
        rows = [{"toy": [float(n)] * 4, "caption": "a red dog runs home"} for n in range(20)]
        answer_by(monkeypatch, ["a red dog runs home", "a red dog"] * 10)
        task = CaptionTask(CaptionTask.Config(write(rows)))
        rows = task.rows(modalities)
        lines = [
            {"id": row.id, "truth": row.truth, **line}
            for row, line in zip(rows, task.predict(model, rows), strict=True)
        ]
        got = measure(task.score(lines)["BLEU-1"])
        assert got.low < got.value < got.high <= 1


class TestQuestions:
    def test_the_question_stands_in_the_prompt(self, write, modalities):
        rows = [{"toy": ONE, "question": "what is it ?", "answer": "a dog"}]
        task = QuestionTask(QuestionTask.Config(write(rows), prompt="question: {question} answer:"))
        assert task.rows(modalities)[0].sample.instruction == "question: what is it ? answer:"

    def test_ten_people_s_answers_are_counted(self, write, modalities, model, monkeypatch):
        listed = {"toy": ONE, "question": "what ?", "answers": ["cat"] * 2 + ["dog"] * 8}
        weighed = {"toy": TWO, "question": "what ?", "answers": ["cat", "dog"], "weights": [0.2, 0.8]}
        answer_by(monkeypatch, ["The cat.", "The cat."])
        task = QuestionTask(QuestionTask.Config(write([listed, weighed])))
        assert [row.truth for row in task.rows(modalities)] == [{"cat": 2, "dog": 8}] * 2
        assert scored(task, model, modalities) == {"VQA": pytest.approx(0.6), "normalised": 1.0, "exact": 0.0}

    def test_few_people_s_answers_have_no_soft_score(self, write, modalities, model, monkeypatch):
        answer_by(monkeypatch, ["two", "no"])
        rows = [{"toy": ONE, "question": "what ?", "answers": ["2", "3"]}] * 2
        got = scored(QuestionTask(QuestionTask.Config(write(rows))), model, modalities)
        assert got == {"normalised": 0.5, "exact": 0.0}

    def test_rows_without_question_or_answer_are_told(self, write, modalities):
        with pytest.raises(InputError, match="line 1: it has no question"):
            QuestionTask(QuestionTask.Config(write([{"toy": ONE, "caption": "a dog"}]))).rows(modalities)
        with pytest.raises(InputError, match="line 1: it has no answer"):
            QuestionTask(QuestionTask.Config(write([{"toy": ONE, "question": "what ?"}]))).rows(modalities)


class TestClassification:
    ROWS = (
        {"toy": ONE, "label": "red"},
        {"beads": BEADS, "label": "green"},
        {"toy": TWO, "label": "blue"},
    )

    def test_both_rankings_are_the_model_s_scores(self, write, modalities, model, monkeypatch):
        answer_by(monkeypatch, ["Red!", "red or green", "the blue one"])
        config = ClassificationTask.Config(write(self.ROWS), names=["red", "green", "blue", "one two three"])
        task = ClassificationTask(replace(config, answer="this is {name}", names_at_once=3))
        rows = task.rows(modalities)
        lines = task.predict(model, rows)
        answers = [f"this is {name}" for name in config.names]
        sums = model.score([row.sample for row in rows], answers)
        means = model.score([row.sample for row in rows], answers, length_normalised=True)
        for line, own, mean in zip(lines, sums, means, strict=True):
            assert line["ranked"] == [config.names[own.index(max(own))]]
            assert line["ranked_by_mean"] == [config.names[mean.index(max(mean))]]
        assert [line["named"] for line in lines] == [["red"], ["red", "green"], ["blue"]]

    def test_figures(self, write, modalities, model, monkeypatch):
        answer_by(monkeypatch, ["Red!", "red or green", "blue"])
        task = ClassificationTask(ClassificationTask.Config(write(self.ROWS)))
        got = scored(task, model, modalities)
        assert task.names == ["blue", "green", "red"]
        assert list(got) == ["top-1", "top-1 by mean", "generated"] and got["generated"] == pytest.approx(2 / 3)

    def test_five_places_of_more_names(self, write, modalities, model, tmp_path):
        (tmp_path / "names.txt").write_text("red\nblue\ngreen\n\none\ntwo\nthree\nfour\n")
        config = ClassificationTask.Config(write(self.ROWS), names=str(tmp_path / "names.txt"), generate=False)
        got = scored(ClassificationTask(config), model, modalities)
        assert list(got) == ["top-1", "top-5", "top-1 by mean", "top-5 by mean"]
        assert got["top-5"] >= got["top-1"]

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"names": ["red", "blue"]}, InputError, 'line 2: "green" is none of the 2 names'),
            ({"names": ["red", "red"]}, ConfigError, 'names has "red" twice'),
            ({"names": [1]}, ConfigError, "names must be a list of names"),
            ({"names": "no-such.txt"}, ConfigError, 'Cannot read the names in "no-such.txt"'),
            ({"answer": "it"}, ConfigError, 'answer is "it": it must hold {name} once'),
            ({"prompt": "what {name}"}, ConfigError, "must hold words without braces"),
            ({"rank": False, "generate": False}, ConfigError, "rank and generate are both off"),
            ({"names_at_once": 0}, ConfigError, "names_at_once must be at least 1"),
        ],
    )
    def test_mistakes(self, settings, error, message, write, modalities):
        with pytest.raises(error, match=message):
            ClassificationTask(ClassificationTask.Config(write(self.ROWS), **settings)).rows(modalities)

    def test_one_name_is_no_choice(self, write, modalities):
        with pytest.raises(ConfigError, match='There is one name alone, "red"'):
            ClassificationTask(ClassificationTask.Config(write(self.ROWS[:1]))).rows(modalities)
