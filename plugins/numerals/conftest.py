"""The public sets in small, a world made of them, and what the build leaves for trainings."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf
from PIL import Image
from xblip_numerals import BUNDLE
from xblip_numerals.captions import write_captions
from xblip_numerals.media import MODALITIES, build
from xblip_numerals.questions import Shelf, training_row
from xblip_numerals.solids import glyph, glyph_names
from xblip_numerals.sources import NUMBERS, SPEAKERS, SPLITS, Source, read_sources

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Public sets in small: font digits for handwriting, striped pictures for ten students' hands, hummed notes."""
    folder = tmp_path_factory.mktemp("sets")
    rows = []
    for kind in ("handwriting", "signs", "speech"):
        (folder / kind).mkdir()
    for index in range(400):
        digit = glyph(NUMBERS[index % 10], glyph_names()[index % 16])
        digit.thumbnail((20, 20))
        page = Image.new("L", (28, 28))
        page.paste(digit, ((28 - digit.width) // 2, (28 - digit.height) // 2))
        page.save(folder / f"handwriting/{index:05d}.png")
        rows.append({"file": f"handwriting/{index:05d}.png", "number": index % 10, "source": "mnist-t10k"})
    for index in range(100):
        stripes = np.full((100, 100, 3), 150, np.uint8)
        stripes[:, :: 2 + index % 10] = 90
        name = f"signs/{index % 10}_IMG_{1000 + index}.jpg"
        Image.fromarray(stripes).save(folder / name)
        rows.append({"file": name, "number": index % 10, "source": "sign-language-digits"})
    seconds = np.arange(3200) / 8000
    for speaker in SPEAKERS:
        for take in (3, 41, 45):
            for number in range(10):
                name = f"speech/{number}_{speaker}_{take}.wav"
                tone = np.sin(2 * np.pi * (200 + 40 * number) * seconds) * np.hanning(len(seconds))
                soundfile.write(folder / name, 0.4 * tone, 8000)
                rows.append({"file": name, "number": number, "source": "fsdd", "speaker": speaker})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def sources(data) -> dict[str, list[Source]]:
    return read_sources(data, "train")


@pytest.fixture(scope="session")
def world(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for split in SPLITS:
        build(data, folder / split, split, dict.fromkeys(MODALITIES, 20))
    return folder


@pytest.fixture(scope="session")
def shelf(world) -> Shelf:
    """Twenty files a modality."""
    return Shelf.read(world, "train")


@pytest.fixture
def parts(shelf, tmp_path, monkeypatch) -> Path:
    """What the build leaves for the stages, with the shipped LLM and encoders; features are not yet stored."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "llm").symlink_to(BUNDLE / "llm")
    for folder in ("encoders", "questions"):
        (tmp_path / folder).mkdir()
    for name in MODALITIES:
        encoder = OmegaConf.load(BUNDLE / name / "branch.yaml").config.encoder
        (tmp_path / "encoders" / name).symlink_to((BUNDLE / name / encoder).resolve())
        for rows, wordings in (("worded", 3), ("train", 0), ("val", 0), ("test", 0)):
            write_captions(shelf, name, tmp_path / "captions" / f"{name}-{rows}.jsonl", wordings=wordings, seed=0)
        rng = random.Random(0)
        asked = [json.dumps(training_row(rng, shelf, name, root=tmp_path / "questions")) + "\n" for _ in range(8)]
        for split in ("train", "val"):
            (tmp_path / "questions" / f"{name}-{split}.jsonl").write_text("".join(asked))
    return tmp_path
