"""What the encoders learn from: the files of one split, loaded by the plugins that will load them in use.

All of a split is kept in memory, in half precision: a training reads each file some thirty times.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import xblip
from xblip_numerals.augment import turn_points
from xblip_numerals.encoders import UNKNOWN
from xblip_numerals.media import FACTS
from xblip_numerals.sources import SourcesError

FRAMES_OF_A_VIDEO = 4


@dataclass
class Examples:
    """Files of one modality and what is true of them.

    Attributes:
      tensors: what the modality loads, (M, S, ...) each: S segments of M files; floats in half precision.
      labels: fact to (M,) index of its value, `UNKNOWN` where the fact is absent.
      origins: (M,) what each was made from, e.g. "sign", "speech", "espeak" or "glyph".
    """

    tensors: dict[str, Tensor]
    labels: dict[str, Tensor]
    origins: list[str]

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def segments(self) -> int:
        """S."""
        return next(iter(self.tensors.values())).shape[1]

    def first(self, count: int) -> "Examples":
        """The first `count` files, in the manifest's order, which is one of chance."""
        cut = [{name: values[:count] for name, values in part.items()} for part in (self.tensors, self.labels)]
        return Examples(*cut, self.origins[:count])

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors (floats in single precision) and labels of some rows."""
        tensors = {name: values[rows] for name, values in self.tensors.items()}
        tensors = {name: part.float() if part.is_floating_point() else part for name, part in tensors.items()}
        return tensors, {fact: indices[rows] for fact, indices in self.labels.items()}


def read_examples(world: Path, split: str, name: str, encoder: Path) -> Examples:
    """Loads all files of a modality as the modality's plugin loads them in use; solids to train on are turned to face.

    Args:
      world: folder that `xblip_numerals.media` made.
      split: "train", "val" or "test".
      name: modality; of each video, `FRAMES_OF_A_VIDEO` frames are read.
      encoder: folder of the encoder, whose processor the plugin uses.

    Raises:
      SourcesError: the world, or files of this modality in it, are missing.
    """
    manifest = world / split / "manifest.jsonl"
    if not manifest.is_file():
        raise SourcesError(
            f"{manifest} does not exist. Build the world first: python -m xblip_numerals.media --data FOLDER --out {world}"
        )
    modality = modality_of(name, encoder, **({"num_frames": FRAMES_OF_A_VIDEO} if name == "video" else {}))
    rows = [
        row for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()) if row["modality"] == name
    ]
    if not rows:
        raise SourcesError(f"{manifest} lists no {name} files: build the world with some.")
    parts: list[dict[str, Tensor]] = []
    for row in tqdm(rows, desc=f"read {split}", mininterval=5):
        part = modality.load(manifest.parent / row["path"])
        if split == "train" and "turn" in row:
            part["points"] = turn_points(part["points"], torch.tensor([-row["turn"]]))
        parts.append({key: value.half() if value.is_floating_point() else value for key, value in part.items()})
    labels = {fact: _indices([row["facts"] for row in rows], fact, FACTS[name]) for fact in FACTS[name]}
    origins = [row["source"].split(":")[0] for row in rows]
    return Examples({key: torch.stack([part[key] for part in parts]) for key in parts[0]}, labels, origins)


def modality_of(name: str, encoder: Path, **settings) -> xblip.Modality:
    """The plugin's modality, with its encoder in a folder."""
    kind = xblip.plugins.get("modality", name)
    return kind(kind.Config(encoder=str(encoder), **settings))


def _indices(facts: list[dict[str, str]], fact: str, values: Mapping[str, tuple[str, ...]]) -> Tensor:
    """Which value of a fact each thing has: (M,)."""
    return torch.tensor([values[fact].index(given[fact]) if fact in given else UNKNOWN for given in facts])
