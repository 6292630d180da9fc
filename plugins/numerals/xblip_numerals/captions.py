"""Captions of media: what the stages before instruction tuning learn from, and what soft prompts are held against.

Each file has the canonical sentence about it, which states every fact, and further descriptions in other words and orders.
To evaluate on, the canonical sentence is enough: files that are alike are then told alike, and count as one. `--ordinary`
gives captions as people write them instead: the number and one or two attributes, which cannot answer every question.

    python -m xblip_numerals.captions image --world FOLDER --split train --out train.jsonl
"""

import argparse
import json
import os
import random
from pathlib import Path

from xblip_numerals.phrases import MODALITIES
from xblip_numerals.questions import Shelf
from xblip_numerals.things import caption, describe, ordinary_caption


def write_captions(shelf: Shelf, modality: str, out: Path, *, wordings: int, seed: int, ordinary: bool = False) -> None:
    """Writes a manifest with a row for each file of a modality.

    Args:
      shelf: the files.
      modality: of the files to tell of.
      out: the manifest.
      wordings: how many descriptions beside the canonical sentence; or beside the first ordinary caption.
      seed: of the descriptions.
      ordinary: say only the number and one or two attributes, as people do.
    """
    rng = random.Random(f"{seed} captions {modality}")
    tell = ordinary_caption if ordinary else describe
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for item in shelf.items[modality]:
            first = ordinary_caption(item.thing, rng) if ordinary else caption(item.thing)
            told = [first, *(tell(item.thing, rng) for _ in range(wordings))]
            said = {"captions": told} if wordings else {"caption": told[0]}
            file.write(json.dumps({modality: os.path.relpath(item.path, out.parent), **said}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modality", choices=list(MODALITIES))
    parser.add_argument("--world", type=Path, required=True, help="folder that xblip_numerals.media wrote")
    parser.add_argument("--split", default="train")
    parser.add_argument("--wordings", type=int, default=3, help="descriptions of each file beside the canonical one")
    parser.add_argument("--ordinary", action="store_true", help="name the number and one or two attributes, no more")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shelf = Shelf.read(arguments.world, arguments.split)
    write_captions(
        shelf, arguments.modality, arguments.out,
        wordings=arguments.wordings, seed=arguments.seed, ordinary=arguments.ordinary,
    )  # fmt: skip


if __name__ == "__main__":
    main()
