"""Builds the numerals world on disk: real media files, and a manifest of what is true of each.

Facts are drawn first, every value of every fact equally often, and rendered afterwards: no number goes with a colour, a
place or a voice more than chance would have it. Each row has its own random numbers, so a world does not depend on
how many processes built it (but for synthetic voices, which their library varies by itself).

    python -m xblip_numerals.media --data FOLDER --out FOLDER
"""

import argparse
import json
import os
import shutil
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

from xblip_numerals.pictures import (
    COLORS,
    DIRECTIONS,
    PLACES,
    render_handwriting,
    render_sign,
    render_video,
    write_video,
)
from xblip_numerals.solids import (
    POSES,
    THICKNESSES,
    glyph,
    glyph_names,
    read_handwriting,
    render_solid,
    write_points,
)
from xblip_numerals.sounds import LEVELS_DBFS, SOUNDS, raw_facts, read_take, render_speech, synthesize
from xblip_numerals.sources import NUMBERS, SPLITS, Source, read_sources

MODALITIES = ("image", "video", "audio", "point_cloud")
COUNTS = {
    "train": {"image": 6000, "video": 3000, "audio": 8000, "point_cloud": 5600},
    "val": {"image": 400, "video": 300, "audio": 300, "point_cloud": 300},
    "test": {"image": 800, "video": 400, "audio": 600, "point_cloud": 400},
}
FACTS = {
    "image": {"number": NUMBERS, "kind": ("handwriting", "sign"), "color": COLORS, "place": PLACES},
    "video": {"number": NUMBERS, "color": COLORS, "direction": DIRECTIONS},
    "audio": {"number": NUMBERS, "loudness": tuple(LEVELS_DBFS), "sound": SOUNDS},
    "point_cloud": {"number": NUMBERS, "pose": POSES, "thickness": tuple(THICKNESSES)},
}
# Shares other than equal ones, and how a thing is made, which is not a fact of it.
_SHARES = {
    "image": {"kind": ("handwriting",) * 3 + ("sign",) * 2, "made": ("rendered",) * 9 + ("raw",)},
    "video": {"made": ("rendered",)},
    "audio": {"made": ("rendered",) * 9 + ("synthetic",) * 8 + ("raw",) * 3},
    "point_cloud": {"made": ("handwriting",) * 2 + ("glyph",)},
}
_SOURCE_KINDS = {"image": "handwriting", "video": "handwriting", "audio": "speech", "point_cloud": "handwriting"}
_SUFFIXES = {
    "image": (".png", ".jpg"),
    "video": (".mp4",),
    "audio": (".wav",),
    "point_cloud": (".ply", ".npy", ".xyz"),
}


@dataclass(frozen=True)
class _Plan:
    """What one row is to be, decided before any file is rendered."""

    modality: str
    path: str
    facts: dict[str, str]
    made: str
    source: Source
    seed: tuple[int, ...]


def build(data: str | Path, out: str | Path, split: str, counts: dict[str, int], seed: int = 0) -> Path:
    """Renders one split of the world, in parallel when it is large.

    Args:
        data: Folder of the public sets, see `read_sources`.
        out: Folder to write; files lie in one folder a modality.
        split: "train", "val" or "test". Synthetic voices and typeset digits are in train alone: val and test are people's.
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
    plans = [plan for modality, count in counts.items() for plan in _plan(modality, count, split, sources, seed)]
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


def _plan(modality: str, count: int, split: str, sources: dict[str, list[Source]], seed: int) -> list[_Plan]:
    """Decides facts, maker and source of every file of a modality, all in equal shares."""
    stream = (seed, SPLITS.index(split), MODALITIES.index(modality))
    rng = np.random.default_rng(stream)
    choices = {**FACTS[modality], **_SHARES[modality]}
    drawn = {name: _equal_shares(values, count, rng) for name, values in choices.items()}
    suffixes = _equal_shares(_SUFFIXES[modality], count, rng)
    pages = _equal_shares((True, False), count, rng)
    decks: dict[tuple[str, str], list[Source]] = {}
    plans = []
    for index in range(count):
        facts = {name: values[index] for name, values in drawn.items()}
        made = facts.pop("made")
        suffix = suffixes[index]
        if modality == "image" and facts["kind"] == "sign":
            del facts["place"]
            made = "rendered"
            if not pages[index]:
                del facts["color"]
        elif modality == "image" and made == "raw":
            facts.update(color="white", place="center")
            suffix = ".png"
        if made in ("synthetic", "glyph") and split != "train":
            made = "rendered"
        key = (facts.get("kind", _SOURCE_KINDS[modality]), facts["number"])
        if not decks.get(key):
            of_number = [source for source in sources[key[0]] if source.number == key[1]]
            decks[key] = [of_number[place] for place in rng.permutation(len(of_number))]
        path = f"{modality}/{index:05d}{suffix}"
        plans.append(_Plan(modality, path, facts, made, decks[key].pop(), (*stream, index)))
    return plans


def _equal_shares(values: Sequence, count: int, rng: np.random.Generator) -> list:
    """`count` values in random order, each as often as any other."""
    return [values[place % len(values)] for place in rng.permutation(-(-count // len(values)) * len(values))[:count]]


def _write(plan: _Plan, *, out: Path, babble: list[Source]) -> dict:
    """Renders and writes one file; returns its row."""
    rng = np.random.default_rng(plan.seed)
    path = out / plan.path
    row = {"modality": plan.modality, "path": plan.path}
    origin, facts = f"{plan.source.kind}:{plan.source.path.name}", plan.facts
    if plan.modality == "audio":
        origin, facts = _write_audio(plan, path, babble, rng)
    elif plan.made == "raw":
        shutil.copyfile(plan.source.path, path)
    elif plan.modality == "image":
        render = render_sign if facts["kind"] == "sign" else render_handwriting
        render(plan.source, facts, rng).save(path, quality=int(rng.integers(75, 96)))
    elif plan.modality == "video":
        write_video(path, *render_video(plan.source, facts, rng))
    else:
        digit = read_handwriting(plan.source)
        if plan.made == "glyph":
            face = str(rng.choice(glyph_names()))
            digit, origin = glyph(facts["number"], face), f"glyph:{face}"
        turn = rng.uniform(0, 2 * np.pi)
        write_points(path, render_solid(digit, facts, turn, rng))
        row["turn"] = turn
    return {**row, "facts": facts, "source": origin}


def _write_audio(plan: _Plan, path: Path, babble: list[Source], rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """Writes a recording as it is, or a human or synthetic voice rendered anew; returns its origin and facts."""
    origin = f"speech:{plan.source.path.name}"
    if plan.made == "raw":
        shutil.copyfile(plan.source.path, path)
        return origin, {"number": plan.facts["number"], **raw_facts(read_take(plan.source)[0])}
    voice = read_take(plan.source)
    if plan.made == "synthetic":
        samples, sample_rate_hz, name = synthesize(plan.facts["number"], rng)
        voice, origin = (samples, sample_rate_hz), f"espeak:{name}"
    samples, sample_rate_hz = render_speech(voice, plan.facts, babble, rng)
    soundfile.write(path, samples, sample_rate_hz, subtype="PCM_16")
    return origin, plan.facts


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
