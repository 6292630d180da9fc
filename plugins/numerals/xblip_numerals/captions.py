"""Captions of media: what the stages before instruction tuning learn from.

Each file has the canonical sentence about it, which states every fact, and further descriptions in other words and orders.
To evaluate on, the canonical sentence is enough: files that are alike are then told alike, and count as one.

    python -m xblip_numerals.captions image --world FOLDER --split train --out train.jsonl
"""

import argparse
import json
import os
import random
from pathlib import Path

from xblip_numerals.language import MODALITIES, caption, describe
from xblip_numerals.questions import Shelf


def write_captions(shelf: Shelf, modality: str, out: Path, *, wordings: int, seed: int) -> None:
    """Writes a manifest with a row for each file of a modality: `wordings` descriptions beside the canonical one."""
    rng = random.Random(f"{seed} captions {modality}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for item in shelf.items[modality]:
            told = [caption(item.thing), *(describe(item.thing, rng) for _ in range(wordings))]
            said = {"captions": told} if wordings else {"caption": told[0]}
            file.write(json.dumps({modality: os.path.relpath(item.path, out.parent), **said}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modality", choices=list(MODALITIES))
    parser.add_argument("--world", type=Path, required=True, help="folder that xblip_numerals.media wrote")
    parser.add_argument("--split", default="train")
    parser.add_argument("--wordings", type=int, default=3, help="descriptions of each file beside the canonical one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shelf = Shelf.read(arguments.world, arguments.split)
    write_captions(shelf, arguments.modality, arguments.out, wordings=arguments.wordings, seed=arguments.seed)


if __name__ == "__main__":
    main()
