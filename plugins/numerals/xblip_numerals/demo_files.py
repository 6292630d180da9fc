"""Makes the demo's files and questions, without any of the public sets, so that they may be shipped.

Digits are our own pen strokes and voices are synthetic; both go through the renderers that make the world. Facts are drawn
at random, and so are the questions: nothing is chosen by whether the model answers it.

    python -m xblip_numerals.demo_files --out FOLDER
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from xblip_numerals.language import MODALITIES, random_thing
from xblip_numerals.phrases import NUMBERS
from xblip_numerals.pictures import render_handwriting, render_video, write_video
from xblip_numerals.questions import Shelf, question_about
from xblip_numerals.solids import read_handwriting, render_solid, write_points
from xblip_numerals.sounds import render_speech, synthesize
from xblip_numerals.sources import Source
from xblip_numerals.strokes import draw_digit

FILES_PER_MODALITY = 4
SUFFIXES = {
    "image": (".png", ".jpg"),
    "video": (".mp4",),
    "audio": (".wav",),
    "point_cloud": (".ply", ".obj", ".npy", ".xyz"),
}
QUESTIONS = [  # kind, modalities of the inputs
    ("number", ["image"]),
    ("loudness", ["audio"]),
    ("direction", ["video"]),
    ("describe", ["point_cloud"]),
    ("larger", ["image", "audio"]),
    ("sum", ["video", "point_cloud"]),
    ("same", ["audio", "point_cloud"]),
    ("same_color", ["image", "video"]),
    ("difference", ["image", "point_cloud"]),
    ("which_shows", ["video", "audio"]),
    ("largest", ["image", "video", "audio"]),
    ("sum_all", ["audio", "video", "point_cloud"]),
    ("smallest", ["point_cloud", "image", "audio"]),
    ("same_all", ["video", "image", "point_cloud"]),
]


def make_files(out: Path, *, seed: int, files_per_modality: int = FILES_PER_MODALITY) -> None:
    """Writes files of all four modalities and their `manifest.jsonl`, as `media.build` does for a split."""
    rng = np.random.default_rng(seed)
    facts_rng = random.Random(seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        babble = _takes(Path(folder), rng)
        for modality in MODALITIES:
            (out / modality).mkdir(parents=True, exist_ok=True)
            for index, number in enumerate(facts_rng.sample(NUMBERS, files_per_modality)):
                facts = {**_full_facts(facts_rng, modality), "number": number}
                path = f"{modality}/{number}{SUFFIXES[modality][index % len(SUFFIXES[modality])]}"
                drawing = Path(folder, f"{modality}-{index}.png")
                draw_digit(number, rng).save(drawing)
                digit = Source(drawing, "handwriting", number, index)
                _write(out / path, modality, facts, digit, babble, rng)
                rows.append({"modality": modality, "path": path, "facts": facts, "source": "made by this plugin"})
    Path(out, "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _full_facts(rng: random.Random, modality: str) -> dict[str, str]:
    """Facts of a thing with none left out; images are handwriting, since a hand cannot be drawn."""
    while True:
        facts = dict(random_thing(rng, modality).facts)
        if set(facts) == set(MODALITIES[modality].clauses) and facts.get("kind") != "sign":
            return facts


def _takes(folder: Path, rng: np.random.Generator) -> list[Source]:
    """A few synthetic voices on disk, for babble."""
    takes = []
    for index, number in enumerate(("four", "nine", "two")):
        samples, sample_rate_hz, _ = synthesize(number, rng)
        path = folder / f"{index}.wav"
        soundfile.write(path, samples, sample_rate_hz)
        takes.append(Source(path, "speech", number, index))
    return takes


def _write(
    path: Path, modality: str, facts: dict[str, str], digit: Source, babble: list[Source], rng: np.random.Generator
) -> None:
    if modality == "image":
        render_handwriting(digit, facts, rng).save(path)
    elif modality == "video":
        write_video(path, *render_video(digit, facts, rng))
    elif modality == "audio":
        samples, sample_rate_hz, _ = synthesize(facts["number"], rng)
        samples, sample_rate_hz = render_speech((samples, sample_rate_hz), facts, babble, rng)
        soundfile.write(path, samples, sample_rate_hz, subtype="PCM_16")
    else:
        turn = rng.uniform(0, 2 * np.pi)
        write_points(path, render_solid(read_handwriting(digit), facts, turn, rng))


def make_questions(folder: Path, *, seed: int) -> None:
    """Writes `questions.json`, one question for every entry of `QUESTIONS`, about the files beside it."""
    rng = random.Random(seed)
    shelf = Shelf.read(folder.parent, folder.name)
    rows = []
    for kind, modalities in QUESTIONS:
        _, items, question = question_about(rng, shelf, kind=kind, modalities=modalities)
        media = [[item.thing.modality, str(item.path.relative_to(folder))] for item in items]
        rows.append({"question": question.text, "media": media, "answer": question.answer})
    Path(folder, "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_files(arguments.out, seed=arguments.seed)
    make_questions(arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
