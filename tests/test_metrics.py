"""Answers are normalised and scored as VQA's script does, and names are found in answers as whole words."""

import pytest

from xblip.metrics import named_in, normalise_answer, vqa_score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("it's a cat!", "it's cat"),
        ("dont know", "don't know"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("1,000 people", "1000 people"),
        ("3.5", "3.5"),
        ("a.m.", "am"),
        ("black-and-white", "black and white"),
        (" \n", ""),
        ("an apple a day", "apple day"),
        ("one\tanother", "1 another"),
    ],
)
def test_normalising(text, expected):
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_score_of_ten_people(agree, score):
    given = {"The cat": agree, "a dog": 10 - agree} if agree else {"a dog": 10}
    assert vqa_score("cat", {text: count for text, count in given.items() if count}) == pytest.approx(score)


def test_answers_that_are_the_same_once_normalised_add_up():
    assert vqa_score("2", {"two": 1, "Two.": 1, "2": 1, "three": 7}) == pytest.approx(0.9)


def test_names_in_an_answer():
    names = ["dog", "sea lion", "lion", "cat", "two"]
    assert named_in("It is a Sea-Lion.", names) == ["sea lion"]
    assert named_in("a lion and a sea lion", names) == ["sea lion", "lion"]
    assert named_in("catalogue of dogs", names) == []
    assert named_in("2", names) == ["two"]
    assert named_in("dog, dog, dog", names) == ["dog"]
    assert named_in("", names) == []
