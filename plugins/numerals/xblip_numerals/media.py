"""Builds the numerals world on disk: real media files, and a manifest of what is true of each.

Facts are drawn first, every value of every fact equally often, and rendered afterwards: no number goes with a colour, a
place or a voice more than chance would have it. Each row has its own random numbers, so a world does not depend on
how many processes built it (but for synthetic voices, which their library varies by itself).

    python -m xblip_numerals.media --data FOLDER --out FOLDER
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from xblip_numerals.inks import COLORS, PAPERS, read_handwriting
from xblip_numerals.pictures import FRAMES, LEANS, PLACES, SIZES, render_handwriting, render_sign
from xblip_numerals.solids import (
    BODIES,
    HOLES,
    POSES,
    STRETCHES,
    THICKNESSES,
    WIDEST_TURN,
    glyph,
    glyph_names,
    render_solid,
    write_points,
)
from xblip_numerals.sounds import ECHOES, LEVELS_DBFS, SOUNDS, SPEEDS, TIMES, read_take, render_speech
from xblip_numerals.sources import NUMBERS, SPEAKERS, SPLITS, Source, read_sources
from xblip_numerals.videos import DIRECTIONS, GROWTHS, TURNINGS, render_video, write_video
from xblip_numerals.voices import synthesize

MODALITIES = ("image", "video", "audio", "point_cloud")
ROBOT = "robot"
COUNTS = {
    "train": {"image": 12000, "video": 3000, "audio": 9000, "point_cloud": 12000},
    "val": {"image": 800, "video": 400, "audio": 600, "point_cloud": 600},
    "test": {"image": 1000, "video": 500, "audio": 800, "point_cloud": 600},
}
FACTS = {
    "image": {
        "number": NUMBERS,
        "kind": ("handwriting", "sign"),
        "color": COLORS,
        "paper": tuple(PAPERS),
        "place": PLACES,
        "size": tuple(SIZES),
        "lean": tuple(LEANS),
        "frame": FRAMES,
    },
    "video": {
        "number": NUMBERS,
        "color": COLORS,
        "paper": tuple(PAPERS),
        "direction": DIRECTIONS,
        "speed": tuple(SPEEDS),
        "growth": tuple(GROWTHS),
        "turning": TURNINGS,
    },
    "audio": {
        "number": NUMBERS,
        "speaker": (*SPEAKERS, ROBOT),
        "loudness": tuple(LEVELS_DBFS),
        "sound": SOUNDS,
        "speed": tuple(SPEEDS),
        "echo": ECHOES,
        "times": TIMES,
    },
    "point_cloud": {
        "number": NUMBERS,
        "color": COLORS,
        "pose": POSES,
        "thickness": tuple(THICKNESSES),
        "stretch": tuple(STRETCHES),
        "body": BODIES,
        "holes": HOLES,
    },
}
NO_SIGN_HAS = ("paper", "lean")
# What a solid is cut after, which is not a fact of it.
_MADE = {"point_cloud": {"made": ("handwriting",) * 3 + ("glyph",)}}
_SOURCE_KINDS = {"video": "handwriting", "audio": "speech", "point_cloud": "handwriting"}
_SUFFIXES = {
    "image": (".png", ".jpg"),
    "video": (".mp4",),
    "audio": (".wav",),
    "point_cloud": (".ply", ".npy", ".xyz"),
}


@dataclass(frozen=True)
class Plan:
    """What one row is to be, decided before any file is rendered."""

    modality: str
    path: str
    facts: dict[str, str]
    source: Source | None
    split: str
    seed: tuple[int, ...]


def build(data: str | Path, out: str | Path, split: str, counts: dict[str, int], seed: int = 0) -> Path:
    """Renders one split of the world, in parallel when it is large.

    Args:
        data: Folder of the public sets, see `read_sources`.
        out: Folder to write; files lie in one folder a modality.
        split: "train", "val" or "test". Typeset digits are in train alone; synthetic voices, which are a speaker among
            others, are in all, but no voice is in two.
        counts: Modality to how many files.
        seed: Of all random choices.

    Returns:
        Path of `manifest.jsonl`: one row a file with `modality`, `path` (relative to the manifest), `facts`, and
        `source` (the public file, voice or face it was made from, and how). Of a solid also its `turn` in radians.

    Raises:
        SourcesError: The public sets are missing or incomplete.
    """
    out = Path(out)
    sources = read_sources(data, split)
    plans = [part for modality, count in counts.items() for part in plan(modality, count, split, sources, seed)]
    for modality in counts:
        (out / modality).mkdir(parents=True, exist_ok=True)
    work = partial(_write, out=out, babble=sources["speech"])
    # A process takes seconds to start, as long as it takes to render some hundreds of files.
    processes = min(len(os.sched_getaffinity(0)), len(plans) // 500)
    with ProcessPoolExecutor(processes, get_context("spawn")) if processes > 1 else nullcontext() as pool:
        made = pool.map(work, plans, chunksize=16) if pool else map(work, plans)
        rows = list(tqdm(made, total=len(plans), desc=f"render {split}"))
    manifest = out / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def plan(modality: str, count: int, split: str, sources: dict[str, list[Source]], seed: int) -> list[Plan]:
    """Decides facts, maker and source of every file of a modality, all in equal shares."""
    stream = (seed, SPLITS.index(split), MODALITIES.index(modality))
    rng = np.random.default_rng(stream)
    choices = {**FACTS[modality], **_MADE.get(modality, {}), "suffix": _SUFFIXES[modality]}
    drawn = {name: equal_shares(values, count, rng) for name, values in choices.items()}
    decks: dict[tuple[str, str, str], list[Source]] = {}
    plans = []
    for index in range(count):
        facts = {name: values[index] for name, values in drawn.items()}
        suffix, made = facts.pop("suffix"), facts.pop("made", "")
        if facts.get("kind") == "sign":
            facts = {name: value for name, value in facts.items() if name not in NO_SIGN_HAS}
        source = None
        if facts.get("speaker") != ROBOT and not (made == "glyph" and split == "train"):
            key = (facts.get("kind", _SOURCE_KINDS.get(modality)), facts["number"], facts.get("speaker", ""))
            if not decks.get(key):
                of_key = [source for source in sources[key[0]] if (source.number, source.speaker) == key[1:]]
                decks[key] = [of_key[place] for place in rng.permutation(len(of_key))]
            source = decks[key].pop()
        path = f"{modality}/{index:05d}{suffix}"
        plans.append(Plan(modality, path, facts, source, split, (*stream, index)))
    return plans


def equal_shares(values: Sequence, count: int, rng: np.random.Generator) -> list:
    """`count` values in random order, each as often as any other."""
    return [values[place % len(values)] for place in rng.permutation(-(-count // len(values)) * len(values))[:count]]


def _write(plan: Plan, *, out: Path, babble: list[Source]) -> dict:
    """Renders and writes one file; returns its row."""
    rng = np.random.default_rng(plan.seed)
    path, facts, source = out / plan.path, plan.facts, plan.source
    row = {"modality": plan.modality, "path": plan.path, "facts": facts}
    origin = f"{source.kind}:{source.path.name}" if source else ""
    if plan.modality == "image":
        render = render_sign if facts["kind"] == "sign" else render_handwriting
        render(source, facts, rng).save(path, quality=int(rng.integers(80, 96)))
    elif plan.modality == "video":
        write_video(path, *render_video(source, facts, rng))
    elif plan.modality == "audio":
        if source:
            voice = read_take(source)
        else:
            *voice, name = synthesize(facts["number"], rng, plan.split)
            origin = f"espeak:{name}"
        samples, sample_rate_hz = render_speech(voice, facts, babble, rng)
        soundfile.write(path, samples, sample_rate_hz, subtype="PCM_16")
    else:
        if source:
            digit = read_handwriting(source)
        else:
            face = str(rng.choice(glyph_names()))
            digit, origin = glyph(facts["number"], face), f"glyph:{face}"
        row["turn"] = rng.uniform(-WIDEST_TURN, WIDEST_TURN)
        write_points(path, render_solid(digit, facts, row["turn"], rng))
    return {**row, "source": origin}


def main() -> None:
    """Builds all three splits into OUT/train, OUT/val and OUT/test, in the sizes the shipped weights were made with."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", required=True, help="folder of the public sets, with their manifest.jsonl")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual number of files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for split, counts in COUNTS.items():
        scaled = {modality: max(1, round(arguments.scale * count)) for modality, count in counts.items()}
        build(arguments.data, Path(arguments.out) / split, split, scaled, arguments.seed)


if __name__ == "__main__":
    main()
