"""Which input an answer means: a table labelled by hand, and properties that hold whatever the words."""

import json
import re
from pathlib import Path

import pytest

from xblip.answers import choice

TABLE = [json.loads(line) for line in (Path(__file__).parent / "data" / "answers.jsonl").read_text().splitlines()]


def chosen(row, answer=None):
    names, question = row.get("names", ()), row.get("question", "")
    return choice(
        row["answer"] if answer is None else answer, count=row.get("count", 2), names=names, question=question
    )


def test_the_table_has_sixty_answers_of_all_kinds():
    assert len(TABLE) >= 60 and {row["expected"] for row in TABLE} >= {None, 0, 1}
    assert sum("the reference" in row["why"] or "as above" in row["why"] for row in TABLE) >= 6


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["answer"] or "nothing")
def test_an_answer_means_what_a_person_says(row):
    assert chosen(row) == row["expected"], row["why"]


SWAPPED = {"first": "second", "1st": "2nd", "1": "2", "left": "right", "former": "latter", "a": "b", "one": "two"}
WORD = re.compile(rf"(?<![\w'])(?:{'|'.join([*SWAPPED, *SWAPPED.values()])})(?![\w'])")


@pytest.mark.parametrize(
    "answer",
    [
        "the first one", "input 1", "(a)", "the left object is louder", "the former", "option a", "first, not second",
        "the first rather than the second", "neither the first nor the second", "not the first", "a", "1", "1st input",
        "the second is louder than the first", "the first is quiet and the second hums, so the answer is the second",
    ],
)  # fmt: skip
def test_neither_input_is_favoured(answer):
    pairs = SWAPPED | {other: word for word, other in SWAPPED.items() if word != "one"}
    mirrored = WORD.sub(lambda found: pairs[found[0]] if found[0] not in ("one", "two") else found[0], answer)
    one, other = choice(answer), choice(mirrored)
    assert mirrored != answer and (other is None if one is None else other == 1 - one)


def test_names_that_several_inputs_share_tell_nothing():
    assert choice("the Image", names=[["image"], ["sound"]]) == 0
    assert choice("the image", names=[["image"], ["image"]]) is None


def test_what_stands_beside_a_repeated_question_counts():
    question = "Which of the first and the second is louder?"
    assert choice(f"{question} The second.", question=question) == 1
    assert choice(question, question=question) is None
