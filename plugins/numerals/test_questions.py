"""Questions about files: what bridges learn from, and the demo's files, made without any public set."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import soundfile
from PIL import Image
from xblip_numerals import questions
from xblip_numerals.demo_files import QUESTIONS, make_files, make_questions
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import words_of
from xblip_numerals.phrases import MODALITIES, NUMBERS, ORDINALS, SHARED
from xblip_numerals.questions import Item, Shelf, question_about, training_row, write_manifest
from xblip_numerals.strokes import STROKES, draw_digit
from xblip_numerals.things import caption, number_word, random_thing

WORLD = Path("/world")


@pytest.fixture(scope="module")
def shelf():
    """Files that are not there: a question hangs on their facts alone."""
    rng, shelf = random.Random(0), Shelf()
    for modality in MODALITIES:
        for i in range(400):
            shelf.add(Item(WORLD / modality / str(i), random_thing(rng, modality), "nowhere"))
    return shelf


def rows_of(shelf, modality, count):
    rng = random.Random(0)
    return [training_row(rng, shelf, modality, root=WORLD) for _ in range(count)]


def thing_of(shelf, path):
    """The thing that a row's file shows."""
    modality, name = path.split("/")
    return shelf.items[modality][int(name)].thing


@pytest.mark.parametrize("modality", list(MODALITIES))
def test_a_training_row_holds_one_file_of_one_modality(shelf, modality):
    places = set()
    rows = rows_of(shelf, modality, 300)
    for row in rows:
        files = [part for part in row["media"] if not isinstance(part, str)]
        assert [name for name, _ in files] == [modality]
        assert thing_of(shelf, files[0][1]).modality == modality
        places.add((len(row["media"]), row["media"].index(files[0])))
        assert row["answer"] and row["instruction"]
    assert places == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}, "every place among one to three inputs is used"
    answers = {row["answer"] for row in rows}
    assert {"yes", "no"} <= answers and answers & set(NUMBERS)


@pytest.mark.parametrize("modality", list(MODALITIES))
def test_rows_ask_for_every_fact_and_a_fourth_for_all_at_once(shelf, modality):
    rows = rows_of(shelf, modality, 600)
    asked = Counter()
    for row in rows:
        (path,) = (part[1] for part in row["media"] if not isinstance(part, str))
        thing = thing_of(shelf, path)
        asked["describe"] += row["answer"] == caption(thing)
        asked.update(name for name, value in thing.facts.items() if row["answer"] == value)
    assert 0.2 < asked["describe"] / 600 < 0.3
    assert all(asked[name] >= 5 for name in MODALITIES[modality].clauses), asked


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


def test_two_files_of_one_modality_can_be_asked_about(shelf):
    rng = random.Random(1)
    for kind in ("which_is", "which_is_not", "number_of", "attribute_of", "count", "larger"):
        things, items, question = question_about(rng, shelf, kind=kind, modalities=["audio", "audio"])
        assert [item.thing for item in items] == things and question.about == (0, 1)


@pytest.mark.parametrize(("kind", "fact"), [("same", "number"), *(("same_attribute", name) for name in SHARED)])
def test_values_of_files_are_equal_half_of_the_time(shelf, kind, fact):
    rng, answers = random.Random(2), Counter()
    for _ in range(600):
        things, _, question = question_about(rng, shelf, kind=kind, modalities=["image", "video"])
        if question.fact == fact:
            assert (question.answer == "yes") == (things[0].facts[fact] == things[1].facts[fact])
            answers[question.answer] += 1
    if answers:  # pictures have no speed
        assert 0.4 < answers["yes"] / answers.total() < 0.6
    assert bool(answers) == (fact != "speed")


@pytest.mark.parametrize("kind", ["which_shows", "which_is"])
def test_what_is_looked_for_must_be_read_off_the_file(shelf, monkeypatch, kind):
    """If the text beside a file gave the answer away, a bridge would learn to claim any value."""
    monkeypatch.setattr(questions, "_kind", lambda *_: kind)
    monkeypatch.setattr(questions, "COUNT_WEIGHTS", {2: 1})
    is_file, kept_back = [], 0
    for row in rows_of(shelf, "image", 300):
        place = [isinstance(part, list) for part in row["media"]].index(True)
        text = row["media"][1 - place]
        is_file.append(row["answer"] in ("the image", f"the {ORDINALS[place]} image"))
        if kind == "which_shows" and not set(words_of(text)) & set(NUMBERS):
            kept_back += 1
            assert is_file[-1], "a text that keeps its number to itself is never the answer"
    assert 0.4 < sum(is_file) / len(is_file) < 0.6
    assert kept_back > 40 or kind == "which_is"


def test_an_impossible_question_says_so(shelf):
    with pytest.raises(ValueError, match="'direction' can be asked about audio"):
        question_about(random.Random(0), shelf, kind="direction", count=1, real="audio")
    with pytest.raises(ValueError, match="'direction' cannot be asked about audio and image"):
        question_about(random.Random(0), shelf, kind="direction", modalities=["audio", "image"])


def test_a_manifest_of_the_world_is_read(tmp_path):
    make_files(tmp_path / "demo", seed=3)
    shelf = Shelf.read(tmp_path, "demo")
    assert all(len(shelf.items[modality]) == 4 for modality in MODALITIES)
    item = shelf.items["audio"][0]
    assert item.path.is_file() and shelf.match(random.Random(0), item.thing, "number") == item
    assert shelf.match(random.Random(0), item.thing, "") in shelf.items["audio"]


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
    assert sum(path.stat().st_size for path in (tmp_path / "demo").rglob("*") if path.is_file()) < 700_000
