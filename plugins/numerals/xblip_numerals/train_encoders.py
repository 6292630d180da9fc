"""Trains the numerals world's small encoders, to be frozen afterwards.

An encoder learns by telling the facts of its files through a readout that is then thrown away, as labels are the only
teacher that makes something of a minute's training: no bridge, and no language, has a part in it.

    python -m xblip_numerals.train_encoders image --world FOLDER --out FOLDER
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import xblip
from xblip_numerals.encoders import RECIPES, UNKNOWN, Readout, Recipe
from xblip_numerals.examples import Examples, modality_of, read_examples
from xblip_numerals.media import FACTS

NUMBER_WEIGHT = 2.0
SAVES = 6
"""How often a training saves what it has, so that one that is ended early is not lost."""


def train(name: str, *, world: Path, out: Path, epochs: int | None = None, seed: int = 0) -> dict[str, float]:
    """Trains one encoder, saves it in half precision and measures what it saved on the val split.

    Args:
      name: "image", "audio" or "point_cloud".
      world: folder that `xblip_numerals.media` made.
      out: folder to write: model, processor and, when all is done, accuracy.json.
      epochs: passes over the training examples; the recipe's own number when None.
      seed: of weights, order and variation.

    Returns:
      Fact to accuracy, where "number (sign)" counts only things made from signs, and "video speed" is told of videos by
      an encoder that is named after images; also in accuracy.json.

    Raises:
      SourcesError: the world is missing.
    """
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    recipe.save_fresh(out)
    learnt, held_out = (
        {modality: read_examples(world, split, modality, out) for modality in recipe.modalities}
        for split in ("train", "val")
    )
    encoder = modality_of(name, out).build_encoder().float().train()
    if recipe.convolves:
        encoder = encoder.to(memory_format=torch.channels_last)
    readouts = nn.ModuleDict(
        {modality: Readout(encoder.width, FACTS[modality], part.segments) for modality, part in learnt.items()}
    )
    started = time.monotonic()
    epochs = epochs or recipe.epochs
    for epoch in _fit(encoder, readouts, learnt, recipe, epochs):
        if epoch % max(1, epochs // SAVES) == 0 and epoch < epochs:
            copy.deepcopy(encoder.model).half().save_pretrained(out)
            print(f"val after {epoch} epochs:", _told(_measure_all(encoder, readouts, held_out, name)), flush=True)
    minutes = (time.monotonic() - started) / 60
    encoder.model.half().save_pretrained(out)
    saved = modality_of(name, out).build_encoder().float().eval()
    accuracy = _measure_all(saved, readouts, held_out, name)
    some = {modality: part.first(2000) for modality, part in learnt.items()}
    report = {
        "val": accuracy,
        "train": _measure_all(saved, readouts, some, name),
        "parameters": sum(weights.numel() for weights in saved.parameters()),
        "minutes": round(minutes, 1),
    }
    (out / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return accuracy


def _measure_all(
    encoder: nn.Module, readouts: nn.ModuleDict, examples: dict[str, Examples], name: str
) -> dict[str, float]:
    """Accuracy of all facts of all modalities; those of others than the encoder's own bear their modality's name."""
    modes = encoder.training
    encoder.eval(), readouts.eval()
    accuracy = {}
    for modality, part in examples.items():
        for fact, share in measure(encoder, readouts, modality, part).items():
            accuracy[fact if modality == name else f"{modality} {fact}"] = share
    encoder.train(modes), readouts.train(modes)
    return accuracy


@torch.no_grad()
def measure(encoder: nn.Module, readouts: nn.ModuleDict, modality: str, examples: Examples) -> dict[str, float]:
    """Accuracy of each fact over the files that have it, and of the number by what files were made from."""
    told: dict[str, list[Tensor]] = {fact: [] for fact in examples.labels}
    for rows in torch.arange(len(examples)).split(128):
        tensors, _ = examples.batch(rows)
        for fact, logits in _read(encoder, readouts, {modality: tensors})[modality].items():
            told[fact].append(logits.argmax(1))
    accuracy = {}
    for fact, labels in examples.labels.items():
        right, known = torch.cat(told[fact]) == labels, labels != UNKNOWN
        accuracy[fact] = _share(right[known])
        for origin in sorted(set(examples.origins)):
            of_origin = torch.tensor([other == origin for other in examples.origins]) & known
            if fact == "number" and 0 < of_origin.sum() < len(right):
                accuracy[f"{fact} ({origin})"] = _share(right[of_origin])
    return accuracy


def _fit(encoder: nn.Module, readouts: nn.ModuleDict, examples: dict[str, Examples], recipe: Recipe, epochs: int):
    """Trains encoder and readouts together: one cycle of the learning rate, smoothed labels; yields after each epoch.

    Muon trains an encoder's matrices (a transformer's; convolutions have none), AdamW everything else: after nine
    epochs .86 of the first world's solids were read, and .80 with AdamW alone.
    """
    weights = [*encoder.parameters(), *readouts.parameters()]
    matrices = [weight for weight in encoder.parameters() if weight.dim() == 2]
    others = [weight for weight in weights if not any(weight is matrix for matrix in matrices)]
    groups = [
        {"params": [weight for weight in others if weight.dim() > 1], "weight_decay": 0.05},
        {"params": [weight for weight in others if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    steps = max(1, len(next(iter(examples.values()))) // recipe.batch_size)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.peak_rate, total_steps=epochs * steps, pct_start=0.15, cycle_momentum=index == 0
        )
        for index, optimizer in enumerate(optimizers)
    ]
    with tqdm(total=epochs * steps, desc="train", mininterval=10) as bar:
        for epoch in range(epochs):
            orders = {name: torch.randperm(len(part)).tensor_split(steps) for name, part in examples.items()}
            for step in range(steps):
                drawn = {name: part.batch(orders[name][step]) for name, part in examples.items()}
                varied = {name: recipe.vary(*batch, epoch / epochs) for name, batch in drawn.items()}
                tensors = {name: batch for name, (batch, _) in varied.items()}
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.convolves):
                    logits = _read(encoder, readouts, tensors)
                loss = sum(
                    _loss(logits[name][fact], labels[fact], fact)
                    for name, (_, labels) in varied.items()
                    for fact in labels
                )
                loss.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
            yield epoch + 1


def _read(
    encoder: nn.Module, readouts: nn.ModuleDict, batches: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Modality to fact to logits, of tensors (M, S, ...) of each modality; encoders give tokens, or tokens and a mask.

    The encoder reads all modalities at once: batch norm has to see in training the mixture that its averages are of.
    """
    segments = [{key: part.flatten(0, 1) for key, part in tensors.items()} for tensors in batches.values()]
    counts = [len(next(iter(part.values()))) for part in segments]
    joined = {key: torch.cat([part[key] for part in segments]) for key in segments[0]}
    if "pixel_values" in joined:
        joined["pixel_values"] = joined["pixel_values"].contiguous(memory_format=torch.channels_last)
    tokens = encoder(**joined)
    told = tokens if isinstance(tokens, tuple) else (tokens,)
    parts = zip(*(part.split(counts) for part in told), strict=True)
    return {name: readouts[name](*part) for name, part in zip(batches, parts, strict=True)}


def _loss(logits: Tensor, labels: Tensor, fact: str) -> Tensor:
    """Mean over the examples that have the fact; 0 when none has."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=UNKNOWN, label_smoothing=0.05, reduction="sum")
    return (NUMBER_WEIGHT if fact == "number" else 1.0) * losses / (labels != UNKNOWN).sum().clamp(min=1)


def _share(right: Tensor) -> float:
    return round(right.float().mean().item(), 4)


def _told(accuracy: dict[str, float]) -> str:
    return ", ".join(f"{fact} {share:.3f}" for fact, share in accuracy.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modality", choices=tuple(RECIPES))
    parser.add_argument("--world", type=Path, required=True, help="folder made by xblip_numerals.media")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, help="passes over the training files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        accuracy = train(
            arguments.modality,
            world=arguments.world,
            out=arguments.out,
            epochs=arguments.epochs,
            seed=arguments.seed,
        )
    except xblip.XBlipError as error:
        raise SystemExit(f"error: {error}") from None
    print("val:", _told(accuracy))


if __name__ == "__main__":
    main()
