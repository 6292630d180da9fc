"""Runs of the first stage for tests: models, batches with the negatives that are drawn, and a few steps in any process.

As a script it is one process of several: `python align_run.py RANK WORLD FOLDER`, where FOLDER holds the LLM and gets what
was found.
"""

import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kit import BEADS, LONG, MORE_BEADS, ONE, THREE, TWO, Beads, registered
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from xblip.align import AlignConfig, AlignModel
from xblip.branch import BranchConfig
from xblip.contrast import MomentumConfig
from xblip.modality import Features
from xblip.sample import Sample
from xblip.testing import ToyModality, small_qformer

RATE = 0.005


@dataclass
class Run:
    """A global batch, what is drawn in it, and how it is trained on.

    Attributes:
      modality: its name.
      media: sources.
      texts: captions.
      wrong_media: for each text the medium that is drawn, -1 for none.
      wrong_texts: for each medium the text.
      config: of the stage.
      bridge: other settings.
      steps: of plain gradient descent.
    """

    modality: str
    media: list[Any]
    texts: list[str]
    wrong_media: list[int]
    wrong_texts: list[int]
    config: AlignConfig = field(default_factory=AlignConfig)
    bridge: dict[str, Any] = field(default_factory=dict)
    steps: int = 1


def kept(tokens: int, *counts: int) -> Features:
    """Features of beads as a store gives them, so many real tokens in each segment."""
    generator = torch.Generator().manual_seed(tokens + sum(counts))
    mask = torch.arange(tokens) < torch.tensor(counts)[:, None]
    values = torch.randn(len(counts), tokens, 24, generator=generator)
    return Features(torch.where(mask[..., None], values, 50.0), mask, [len(counts)])


TOYS = ["red", "what is the larger number ?", "describe it", "one two three four five", "red", "blue"]
RUNS = {
    "one pair": Run("toy", [ONE], ["one two three"], [-1], [-1]),
    "two pairs": Run("toy", [ONE, LONG], TOYS[:2], [1, 0], [1, 0]),
    "segments": Run("beads", [BEADS, MORE_BEADS, [[5.0]], [[2.0, 1.0], [3.0]]], TOYS[:4], [1, 2, 1, 0], [2, 0, 1, 2]),
    "joined segments": Run(
        "beads",
        [MORE_BEADS, BEADS],
        ["red", "blue two"],
        [1, 0],
        [1, 0],
        bridge={"join_segments": True, "max_segments": 4},
    ),
    "far": Run("toy", [ONE, LONG, TWO, THREE, THREE + ONE, TWO + TWO], TOYS, [3, 5, 4, 3, 2, 0], [3, 4, 4, 1, 2, 3]),
    "widths": Run(
        "beads",
        [kept(2, 2), kept(2, 1, 2), kept(4, 4), kept(4, 3, 1, 4)],
        ["red", "what is this ?", "one two", "describe"],
        [3, 2, 1, 1],
        [2, 3, 0, 1],
    ),
    "equals": Run("toy", [ONE, ONE, TWO, TWO], ["red", "blue", "one", "Red "], [2, 3, 0, -1], [2, -1, 3, 1]),
    "all equal": Run("toy", [ONE, LONG], ["red", "red"], [-1, -1], [-1, -1]),
    "weights": Run(
        "toy", [ONE, LONG], TOYS[:2], [1, 0], [1, 0], AlignConfig(itc=0.5, itm=0.0, itg=2.0, label_smoothing=0.0)
    ),
    "momentum": Run(
        "beads",
        [BEADS, MORE_BEADS, [[5.0], [1.0]], BEADS],
        ["red", "what is this ?", "one two", "describe"],
        [1, 2, 1, 2],
        [2, 0, 1, 2],
        AlignConfig(momentum=MomentumConfig(decay=0.8, queue_size=6, alpha=0.4, warmup=2)),
        steps=3,
    ),
}
FOR_TWO = ("two pairs", "segments", "far", "widths", "equals", "all equal", "weights", "momentum")
"""Runs whose batches two processes share; the first gives each one pair."""


def make(llm_folder: Path, modality: str = "toy", config: AlignConfig | None = None, **bridge: Any) -> AlignModel:
    """A model with random weights, loud enough for words and media to be heard."""
    settings = small_qformer(llm_folder, embedding_width=12, **bridge)
    with torch.random.fork_rng(), registered(ToyModality, Beads):
        torch.manual_seed(0)
        model = AlignModel.build(BranchConfig(modality, bridge=settings))
        for parameter in model.branch.bridge.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        return AlignModel(model.branch, config).train()


def take_steps(run: Run, llm_folder: Path, *, rank: int = 0, world: int = 1) -> list[tuple[dict, dict]]:
    """Gives losses and gradients of each step, of the whole batch."""
    model = make(llm_folder, run.modality, run.config, **run.bridge)
    own = slice(rank * len(run.media) // world, (rank + 1) * len(run.media) // world)
    samples = [
        Sample("look", [(run.modality, source)], text)
        for source, text in zip(run.media[own], run.texts[own], strict=True)
    ]
    drawn = [torch.tensor(run.wrong_media[own]), torch.tensor(run.wrong_texts[own])] * run.steps
    model.draw_negatives = lambda similarities, equal: drawn.pop(0)
    trained = DistributedDataParallel(model) if world > 1 else model
    found = []
    for _ in range(run.steps):
        losses = trained(samples)
        losses.pop("loss").backward()
        if world > 1:
            for loss in losses.values():
                dist.all_reduce(loss)
                loss /= world
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((losses, {name.removeprefix("branch.bridge."): value for name, value in gradients.items()}))
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0 if weight.grad is None else RATE * weight.grad
        model.zero_grad()
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found = {name: take_steps(RUNS[name], folder / "llm", rank=rank, world=world) for name in FOR_TWO}
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
