"""The shipped model answers, its report is met on files made anew, and nothing about it is stale or too large."""

import json
import re
from pathlib import Path

import pytest
from xblip_numerals import BUNDLE
from xblip_numerals.demo import FOLDER, main
from xblip_numerals.experiments_report import SEGMENTS, TOKENS
from xblip_numerals.language import MODALITIES
from xblip_numerals.media import build
from xblip_numerals.questions import Shelf
from xblip_numerals.report import SOURCES, evaluate_bundle, readme_table, write_report
from xblip_numerals.report_rows import write_rows

import xblip

ROOT = Path(__file__).parents[2]
SETS = ROOT.parent / "shared" / "data" / "numerals"
MOST_BYTES = 25_000_000
FILES = {"image": 80, "video": 40, "audio": 60, "point_cloud": 60}


@pytest.fixture(scope="module")
def model():
    return xblip.load("numerals")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The report's figures on files of the test split made with another seed than the report's."""
    if not SETS.is_dir():
        pytest.skip("the public sets are not here")
    world, work = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("work")
    build(SETS, world / "test", "test", FILES, seed=7)
    write_rows(Shelf.read(world, "test"), work / "rows.jsonl", count=1, seed=7, blocks=4)
    return evaluate_bundle("numerals", world, work, split="test", count=1, seed=7)


def test_weights_are_small_and_hold_no_pickle():
    files = [path for path in BUNDLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".yaml", ".md", ".jinja"}


def test_the_card_names_what_it_was_trained_on():
    card = (BUNDLE / "README.md").read_text()
    for source, licence in (("MNIST", "CC BY-SA 3.0"), ("Free Spoken Digit", "CC BY-SA 4.0"), ("Sign", "Apache-2.0")):
        assert source in card and licence in card


@pytest.mark.slow
def test_the_demo_answers_most_of_its_questions(capsys, tmp_path):
    for _ in range(2):  # the second page takes the place of the first
        main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    page = tmp_path / "explanation" / "index.html"
    assert f"With pictures: {page}" in printed and page.is_file() and "effect in nats" in printed
    right, count = map(int, re.search(r"(\d+) of (\d+) answers equal the truth", printed).groups())
    assert count >= 12 and right >= 0.7 * count, printed
    used = {modality for row in json.loads((FOLDER / "questions.json").read_text()) for modality, _ in row["media"]}
    assert used == set(MODALITIES)


@pytest.mark.slow
def test_unseen_files_are_read(told):
    for source in SOURCES:
        assert told["parts"][f"{source}: number"]["value"] >= 0.8, source


@pytest.mark.slow
@pytest.mark.parametrize("size", ["two inputs", "three inputs"])
def test_unseen_files_are_compared_and_the_files_matter(told, size):
    shares = {way: found["value"] for way, found in told["sizes"][size]["ways"].items()}
    assert shares["soft prompts"] >= 0.8
    assert shares["one input alone"] <= shares["soft prompts"] - 0.2
    assert shares["alike in both orders"] >= 0.9 and shares["inputs replaced"] >= 0.75


@pytest.mark.slow
def test_the_report_is_text_and_a_page(told, tmp_path):
    write_report(told, tmp_path / "REPORT.md")
    text, page = (tmp_path / "REPORT.md").read_text(), (tmp_path / "REPORT.html").read_text()
    for words in ("the number alone: hand sign", "share of the product of the parts", "soft prompts answer"):
        assert words in text and words in page
    assert json.loads((tmp_path / "REPORT.json").read_text()) == told


def test_a_batch_of_all_kinds_gives_what_each_sample_gives_alone(model):
    rows = json.loads((FOLDER / "questions.json").read_text())[:8]
    samples = [xblip.Sample(row["question"], [(name, FOLDER / file) for name, file in row["media"]]) for row in rows]
    answers = [[row["answer"]] for row in rows]
    together = model.score(samples, answers)
    alone = [model.score([sample], [right])[0] for sample, right in zip(samples, answers, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.slow
def test_encoders_give_as_many_tokens_as_the_report_says(model):
    files = [json.loads(text) for text in (FOLDER / "manifest.jsonl").read_text().splitlines()]
    for modality, most in TOKENS.items():
        branch = model.branches[modality]
        shapes = [
            branch.encode([branch.modality.load(str(FOLDER / file["path"]))]).values.shape[:2]
            for file in files
            if file["modality"] == modality
        ]
        assert {segments for segments, _ in shapes} == {SEGMENTS[modality]}
        assert {segments * tokens for segments, tokens in shapes} == {most}


def test_the_readme_shows_the_report():
    figures = json.loads((ROOT / "plugins" / "numerals" / "REPORT.json").read_text())
    assert readme_table(figures) in (ROOT / "README.md").read_text()
