"""What the report asks: parts, the same questions in another order, and about other files."""

import json
import random
from dataclasses import replace

import pytest
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import ask, random_things
from xblip_numerals.questions import Shelf
from xblip_numerals.report_rows import PAIR_KINDS, TRIPLE_KINDS, swapped, write_rows
from xblip_numerals.things import Thing, name_of, names

pytestmark = pytest.mark.slow  # a world is made for them


@pytest.fixture(scope="module")
def rows(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    write_rows(Shelf.read(world, "test"), folder / "rows" / "all.jsonl", count=1, seed=0, blocks=1)
    found = [json.loads(line) for line in (folder / "rows" / "all.jsonl").read_text().splitlines()]
    assert all((folder / "rows" / path).is_file() for row in found for _, path in row["media"])
    return found


def test_rows_ask_all_kinds_of_all_sets_of_modalities(rows):
    asked = {(row["kind"], tuple(sorted(name for name, _ in row["media"]))) for row in rows}
    for kinds, size in ((PAIR_KINDS, 2), (TRIPLE_KINDS, 3)):
        assert {kind for kind, names in asked if len(names) == size} == set(kinds)
    for kind in ("sum", "larger", "which_shows", "attribute_of"):
        assert len([names for asked_kind, names in asked if asked_kind == kind and len(names) == 2]) == 10
    assert len({row["id"] for row in rows}) == len(rows)


def test_parts_are_measured_by_rows_about_one_input(rows):
    measured = {row["part"] for row in rows if len(row["media"]) == 1}
    several = [row for row in rows if len(row["media"]) > 1]
    assert all(row["parts"] for row in several)
    assert {part for row in several for part in row["parts"]} <= measured
    [two] = [row for row in several if row["id"] == "video-audio-sum-0"]
    assert sorted(part.split(":")[1] for part in two["parts"]) == [" number", " number"]


def test_texts_say_of_each_input_what_is_true_of_it(rows):
    for row in rows:
        assert len(row["descriptions"]) == len(row["captions"]) == len(row["media"])
    lengths = [[len(text.split()) for row in rows for text in row[key]] for key in ("captions", "descriptions")]
    assert sum(lengths[0]) < sum(lengths[1]), "people say less than there is"


@pytest.mark.parametrize("kind", [kind for kind, form in KINDS.items() if form.things > 1])
def test_a_question_in_another_order_means_the_same_inputs(kind):
    rng = random.Random(kind)
    for _ in range(40):
        count = max(KINDS[kind].things, rng.choice((2, 3)))
        things, fact = random_things(rng, count, kind)
        question = ask(things, rng, kind, fact)
        order = rng.choice([(1, 0), (0, 1)] if count == 2 else [(2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
        moved = [things[i] for i in order]
        new = swapped(things, question, order)
        said = [name for name in sorted(names(things)) if name in question.answer]
        assert [things[names(things).index(name)] for name in said] or not question.answer.startswith("the ")
        for name in said:
            old = names(things).index(name)
            assert name_of(moved, order.index(old)) in new["answer"]
        back = [order.index(i) for i in range(count)]
        again = swapped(moved, replace(question, text=new["instruction"], answer=new["answer"]), back)
        assert (again["instruction"], again["answer"]) == (question.text, question.answer)


def test_names_of_places_follow_their_inputs():
    things = [Thing("image", {"number": "two"}), Thing("audio", {"number": "six"}), Thing("image", {"number": "nine"})]
    question = ask(things, random.Random(0), "largest")
    text = "Is the first picture the third input, or the second image?"
    new = swapped(things, replace(question, text=text, answer="the second image"), (2, 1, 0))
    assert new["instruction"] == "Is the second picture the first input, or the first image?"
    assert new["answer"] == "the first image"
    pair = replace(question, kind="which_pair", answer="the first image and the audio")
    assert swapped(things, pair, (2, 1, 0))["answer"] == "the audio and the second image", "named in their order"


def test_questions_of_two_units_share_no_file(world, tmp_path):
    write_rows(Shelf.read(world, "test"), tmp_path / "rows.jsonl", count=2, seed=0, blocks=2)
    units = {}
    for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()):
        for media in (row["media"], row.get("replaced", {}).get("media", [])):
            for _, path in media:
                units.setdefault(path, set()).add(row["unit"])
    assert len(units) == 80 and all(len(found) == 1 for found in units.values())


def test_other_files_have_another_answer(rows):
    several = [row for row in rows if len(row["media"]) > 1]
    replaced = [row for row in several if "replaced" in row]
    assert len(replaced) > 0.9 * len(several)
    for row in replaced:
        assert row["replaced"]["answer"] != row["answer"]
        before, after = ([name for name, _ in media] for media in (row["media"], row["replaced"]["media"]))
        assert before == after
