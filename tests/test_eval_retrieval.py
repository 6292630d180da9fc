"""The retrieval task: figures are those of `rank_texts` and `rank_sources`, whole or a row at a time."""

import json

import pytest
from kit import LONG, ONE, THREE, TWO
from test_retrieval import make

from xblip.errors import ConfigError, InputError
from xblip.eval_retrieval import RetrievalTask
from xblip.evaluate import EvalConfig, evaluate

pytestmark = pytest.mark.usefixtures("toys")

ROWS = [
    {"toy": ONE, "captions": ["red", "describe it"]},
    {"toy": LONG, "caption": "what is the larger number ?"},
    {"toy": TWO, "caption": "one two three four five"},
    {"toy": THREE, "caption": "red"},
]
TEXTS = ["red", "describe it", "what is the larger number ?", "one two three four five"]
"""In the order in which rows have them."""


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_figures_are_those_of_ranking_everything(llm_folder, data, tmp_path):
    retriever = make(llm_folder)
    retriever.save_pretrained(tmp_path / "aligned")
    task = {"kind": "retrieval", "data": data, "rerank": 2}
    results = evaluate(EvalConfig(str(tmp_path / "aligned"), {"found": task}, str(tmp_path / "out"), batch_size=3))
    figures = results["found"].figures
    media = [row["toy"] for row in ROWS]
    for judge, rerank in (("ITC", 0), ("ITM", 2)):
        texts = [[place.index for place in places] for places in retriever.rank_texts(media, TEXTS, rerank=rerank)]
        sources = [[place.index for place in places] for places in retriever.rank_sources(media, TEXTS, rerank=rerank)]
        right_texts = [{0, 1}, {2}, {3}, {0}]
        right_media = [{0, 3}, {0}, {1}, {2}]
        for called, found, right in (
            ("texts for media", texts, right_texts),
            ("media for texts", sources, right_media),
        ):
            shares = [bool({places[0]} & own) for places, own in zip(found, right, strict=True)]
            assert figures[f"{called}: recall@1, {judge}"].value == pytest.approx(sum(shares) / 4)
            assert figures[f"{called}: recall@5, {judge}"].value == 1, "there are but four"
    assert next(iter(figures)) == "texts for media: recall@1, ITM"
    assert results["found"].rows == 8


def test_itc_alone(llm_folder, data, tmp_path):
    make(llm_folder).save_pretrained(tmp_path / "aligned")
    task = {"kind": "retrieval", "data": data, "rerank": 0}
    results = evaluate(EvalConfig(str(tmp_path / "aligned"), {"found": task}, str(tmp_path / "out")))
    assert all(name.endswith("ITC") for name in results["found"].figures)


class TestBadInput:
    @pytest.fixture
    def task(self, model):
        modalities = {name: branch.modality for name, branch in model.branches.items()}

        def rows(path, **settings):
            return RetrievalTask(RetrievalTask.Config(path, **settings)).rows(modalities)

        return rows

    def test_several_inputs(self, task, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"media": [["toy", ONE], ["toy", TWO]], "instruction": "?", "answer": "red"}))
        with pytest.raises(InputError, match="line 1: it has 2 inputs: retrieval is of one, and its captions"):
            task(str(path))

    def test_nothing_to_choose_from(self, task, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"toy": ONE, "caption": "red"}))
        with pytest.raises(ConfigError, match="one medium or one caption alone"):
            task(str(path))

    def test_negative_rerank(self, task, data):
        with pytest.raises(ConfigError, match="rerank"):
            task(data, rerank=-1)

    def test_a_model_that_answers(self, model, data):
        task = RetrievalTask(RetrievalTask.Config(data))
        rows = task.rows({name: branch.modality for name, branch in model.branches.items()})
        with pytest.raises(ConfigError, match="Retrieval is a retriever's task"):
            task.predict(model, rows)
