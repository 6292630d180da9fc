"""Makes the demo's files and questions, without any of the public sets, so that they may be shipped.

Digits are our own pen strokes and voices are synthetic; both go through the renderers that make the world. The numbers stand
in the files' names, which the guides use; all other facts are drawn, and so are the questions: nothing is chosen
by whether the model answers it.

    python -m xblip_numerals.demo_files --out FOLDER
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from xblip_numerals.inks import read_handwriting
from xblip_numerals.media import FACTS, ROBOT, equal_shares
from xblip_numerals.pictures import render_handwriting
from xblip_numerals.questions import Shelf, question_about
from xblip_numerals.solids import WIDEST_TURN, render_solid, write_points
from xblip_numerals.sounds import render_speech
from xblip_numerals.sources import Source
from xblip_numerals.strokes import draw_digit
from xblip_numerals.videos import render_video, write_video
from xblip_numerals.voices import synthesize

FILES = {
    "image": ("six.png", "nine.jpg", "zero.png", "two.jpg"),
    "video": ("zero.mp4", "seven.mp4", "five.mp4", "one.mp4"),
    "audio": ("nine.wav", "eight.wav", "four.wav", "three.wav"),
    "point_cloud": ("eight.ply", "six.obj", "four.npy", "seven.xyz"),
}
FIXED = {"image": {"kind": "handwriting"}, "audio": {"speaker": ROBOT}}
"""Facts that are not drawn: a hand cannot be drawn by us, nor a person's voice made."""
QUESTIONS = [  # kind, modalities of the inputs
    ("number", ["image"]),
    ("loudness", ["audio"]),
    ("direction", ["video"]),
    ("describe", ["point_cloud"]),
    ("larger", ["image", "audio"]),
    ("sum", ["video", "point_cloud"]),
    ("same", ["audio", "point_cloud"]),
    ("same_attribute", ["image", "video"]),
    ("difference", ["image", "point_cloud"]),
    ("which_is", ["video", "point_cloud"]),
    ("attribute_of", ["image", "audio"]),
    ("largest", ["image", "video", "audio"]),
    ("sum_all", ["audio", "video", "point_cloud"]),
    ("count", ["image", "video", "point_cloud"]),
]


def make_files(out: Path, *, seed: int) -> None:
    """Writes files of all four modalities and their `manifest.jsonl`, as `media.build` does for a split."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for place, (modality, names) in enumerate(FILES.items()):
            rng = np.random.default_rng((seed, place))
            babble = _takes(Path(folder), rng) if modality == "audio" else []
            (out / modality).mkdir(parents=True, exist_ok=True)
            drawn = {fact: equal_shares(values, len(names), rng) for fact, values in FACTS[modality].items()}
            for index, name in enumerate(names):
                number = Path(name).stem
                facts = {
                    **{fact: values[index] for fact, values in drawn.items()},
                    **FIXED.get(modality, {}),
                    "number": number,
                }
                drawing = Path(folder, f"{modality}-{index}.png")
                draw_digit(number, rng).save(drawing)
                digit = Source(drawing, "handwriting", number, index)
                _write(out / modality / name, modality, facts, digit, babble, rng)
                path = f"{modality}/{name}"
                rows.append({"modality": modality, "path": path, "facts": facts, "source": "made by this plugin"})
    Path(out, "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
        turn = rng.uniform(-WIDEST_TURN, WIDEST_TURN)
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
