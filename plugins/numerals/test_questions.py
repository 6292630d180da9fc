"""Questions about files: what bridges learn from, and the demo's files, made without any public set."""

import json
import random

import pytest
import soundfile
from PIL import Image
from xblip_numerals.demo_files import QUESTIONS, make_files, make_questions
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import MODALITIES, number_word
from xblip_numerals.phrases import NUMBERS, ORDINALS, VALUES
from xblip_numerals.questions import Shelf, question_about, training_row, write_manifest
from xblip_numerals.strokes import STROKES, draw_digit


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A split of our own pen strokes and synthetic voices, ten files a modality."""
    world = tmp_path_factory.mktemp("world")
    make_files(world / "demo", seed=3, files_per_modality=10)
    return world


@pytest.fixture(scope="module")
def shelf(world):
    return Shelf.read(world, "demo")


@pytest.mark.parametrize("modality", list(MODALITIES))
def test_a_training_row_holds_one_file_of_one_modality(shelf, world, modality):
    rng = random.Random(0)
    rows = [training_row(rng, shelf, modality, root=world) for _ in range(300)]
    places = set()
    for row in rows:
        files = [part for part in row["media"] if not isinstance(part, str)]
        assert [name for name, _ in files] == [modality]
        assert (world / files[0][1]).is_file()
        places.add((len(row["media"]), row["media"].index(files[0])))
        assert row["answer"] and row["instruction"]
    assert places == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}, "every place among one to three inputs is used"
    answers = {row["answer"] for row in rows}
    assert {"yes", "no"} <= answers and answers & set(NUMBERS)


def test_a_manifest_is_the_same_for_the_same_seed(shelf, tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_manifest(shelf, "audio", 40, tmp_path / f"{name}.jsonl", seed=seed)
        texts.append((tmp_path / f"{name}.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_question_about_files_has_their_answer(shelf):
    rng = random.Random(1)
    for _ in range(200):
        things, items, question = question_about(rng, shelf, kind="sum", modalities=["audio", "point_cloud"])
        assert [thing.modality for thing in things] == ["audio", "point_cloud"]
        assert all(item.thing.facts == thing.facts for item, thing in zip(items, things, strict=True))
        assert question.answer == number_word(sum(NUMBERS.index(thing.facts["number"]) for thing in things))


def test_equal_numbers_are_as_frequent_as_others(shelf):
    rng = random.Random(2)
    asked = [question_about(rng, shelf, kind="same", modalities=["image", "video"])[2] for _ in range(300)]
    assert 0.4 < sum(question.answer == "yes" for question in asked) / 300 < 0.6


@pytest.mark.slow
def test_a_color_looked_for_must_be_read_off_the_file(shelf, tmp_path):
    """If the text beside a file gave the answer away, a bridge would learn to claim any color."""
    rng = random.Random(3)
    is_file = []
    for _ in range(4000):
        row = training_row(rng, shelf, "image", root=tmp_path)
        if len(row["media"]) == 2 and row["answer"].startswith("the ") and "number" not in row["instruction"]:
            place = [isinstance(part, list) for part in row["media"]].index(True)
            text = row["media"][1 - place]
            colors = [color for color in VALUES["color"] if f" {color}" in row["instruction"]]
            if colors and text.startswith("image") and not any(color in text for color in VALUES["color"]):
                is_file.append(row["answer"] == f"the {ORDINALS[place]} image")
    assert len(is_file) > 15 and 0.3 < sum(is_file) / len(is_file) < 0.7, is_file


@pytest.mark.slow
def test_an_impossible_question_says_so(shelf):
    with pytest.raises(ValueError, match="'direction' can be asked about"):
        question_about(random.Random(0), shelf, kind="direction", count=1, real="audio")


def test_strokes_draw_every_number_a_little_differently():
    import numpy as np

    assert tuple(STROKES) == NUMBERS
    for number in NUMBERS:
        rng = np.random.default_rng(0)
        first, second = draw_digit(number, rng), draw_digit(number, rng)
        assert first.size == (28, 28) and first.mode == "L" and first.tobytes() != second.tobytes()
        assert 0.05 < np.asarray(first).mean() / 255 < 0.35


def test_demo_files_are_real_files_of_all_kinds_and_the_questions_hold(tmp_path):
    make_files(tmp_path / "demo", seed=0)
    make_questions(tmp_path / "demo", seed=0)
    questions = json.loads((tmp_path / "demo/questions.json").read_text())
    assert len(questions) == len(QUESTIONS) >= 12
    assert {len(row["media"]) for row in questions} == {1, 2, 3}
    assert {name for row in questions for name, _ in row["media"]} == set(MODALITIES)
    assert all(kind in KINDS for kind, _ in QUESTIONS)
    for path in (tmp_path / "demo/image").iterdir():
        assert Image.open(path).mode == "RGB"
    for path in (tmp_path / "demo/audio").iterdir():
        assert soundfile.info(path).frames > 1000
    assert sum(path.stat().st_size for path in (tmp_path / "demo").rglob("*") if path.is_file()) < 500_000
