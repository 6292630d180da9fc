"""Explanations of the shipped model point at the input that was asked about, whatever stands beside it and in what order."""

import json
import random
from pathlib import Path

import pytest
from xblip_numerals.demo import FOLDER

import xblip

QUESTIONS = ("Which number is in the {}?", "Which digit is in the {}?", "What number is the {}?")
CASES = 40


@pytest.fixture(scope="module")
def model():
    return xblip.load("numerals")


@pytest.fixture(scope="module")
def files() -> dict[str, list[tuple[Path, str]]]:
    """The demo's files with their numbers, by modality."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for line in (FOLDER / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["modality"], []).append((FOLDER / row["path"], row["facts"]["number"]))
    return found


def asked_about(model, files, modality: str, draw: random.Random):
    """A question about the number of one input among two to four of different modalities; its explanation, and the truth."""
    others = draw.sample([name for name in files if name != modality], draw.randint(1, 3))
    chosen = {name: draw.choice(files[name]) for name in draw.sample([modality, *others], len(others) + 1)}
    question = draw.choice(QUESTIONS).format(modality.replace("_", " "))
    media = [(name, file) for name, (file, _) in chosen.items()]
    return model.ask(question, media=media, do_sample=False).explain(), chosen[modality][1]


@pytest.mark.slow
def test_a_right_answer_is_owed_to_the_input_that_was_asked_about(model, files):
    """Where the model answers with the number of another input, as it sometimes does, an explanation points at that one."""
    every, right = {}, {}
    for modality in files:
        draw = random.Random(modality)
        for _ in range(CASES):
            explanation, truth = asked_about(model, files, modality, draw)
            points = explanation.strongest().modality == modality
            every.setdefault(modality, []).append(points)
            if explanation.answer.strip(".") == truth:
                right.setdefault(modality, []).append(points)
    for name, found in (("all answers", every), ("right answers", right)):
        print(name, {modality: f"{sum(points)} of {len(points)}" for modality, points in found.items()})
    assert len(right) >= 4 and min(len(points) for points in right.values()) >= CASES / 2
    assert min(sum(points) / len(points) for points in right.values()) >= 0.95
    assert sum(every["audio"]) >= 0.95 * CASES


def test_one_case_of_each_modality(model, files):
    for modality in files:
        explanation, _ = asked_about(model, files, modality, random.Random(1))
        assert explanation.strongest().modality == modality, explanation
        assert explanation.strongest().share > 0.5
