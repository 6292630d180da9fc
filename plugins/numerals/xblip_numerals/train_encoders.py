"""Trains the numerals world's small encoders, each on its own modality, to be frozen afterwards.

An encoder learns by telling the facts through a readout that is then thrown away. The readout attends to tokens without
adding positions, as a Q-Former does: what it can tell, the tokens say by themselves, place in the picture included.
The image encoder also sees single frames of videos, which it will read for the video modality.

    python -m xblip_numerals.train_encoders image --world FOLDER --out FOLDER
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import xblip
from xblip_numerals.augment import (
    AUDIO_MEAN,
    AUDIO_STD,
    MEL_BINS,
    turn_points,
    vary_images,
    vary_points,
    vary_spectrograms,
)
from xblip_numerals.media import FACTS
from xblip_numerals.sources import SourcesError

FRAMES_OF_A_VIDEO = 3
NUMBER_WEIGHT = 2.0
_UNKNOWN = -100


@dataclass
class Examples:
    """What one split gives to learn from; a segment is an example.

    Attributes:
      tensors: what the modality loads, (M, ...) each; floats in half precision.
      labels: fact to (M,) index of its value, -100 where the fact is absent.
      origins: (M,) what each was made from, e.g. "sign", "speech", "glyph", or "frame" of a video.
    """

    tensors: dict[str, Tensor]
    labels: dict[str, Tensor]
    origins: list[str]

    def batch(self, rows: Tensor | slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors (floats in single precision) and labels of some rows."""
        tensors = {name: values[rows] for name, values in self.tensors.items()}
        tensors = {name: part.float() if part.is_floating_point() else part for name, part in tensors.items()}
        return tensors, {fact: indices[rows] for fact, indices in self.labels.items()}


class Readout(nn.Module):
    """Tells every fact from an encoder's tokens: one learned query a fact, attention without positions.

    Args:
      width: D_enc.
      facts: fact to the values it may take.
    """

    def __init__(self, width: int, facts: Mapping[str, tuple[str, ...]]):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(0.1 * torch.randn(len(facts), width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.classifiers = nn.ModuleDict({fact: nn.Linear(width, len(values)) for fact, values in facts.items()})

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Takes tokens (M, N, D_enc) and their mask (M, N), True for real ones; returns fact to logits (M, values)."""
        tokens = self.norm(tokens)
        queries = self.queries.expand(len(tokens), -1, -1)
        hidden = None if mask is None else ~mask
        read, _ = self.attention(queries, tokens, tokens, key_padding_mask=hidden, need_weights=False)
        read = self.dropout(read)
        return {fact: classify(read[:, place]) for place, (fact, classify) in enumerate(self.classifiers.items())}


@dataclass(frozen=True)
class Recipe:
    """How one modality's encoder is made.

    Attributes:
      save_fresh: writes an untrained encoder and its processor to a folder, as `save_pretrained` does.
      vary: changes a batch of tensors at random; given its labels too, and how much of the training is done (0 to 1).
      epochs: passes over the training examples.
      batch_size: examples of a step.
      peak_rate: highest learning rate, reached after 15 % of the steps.
      bfloat16: whether the encoder computes in bfloat16, which convolutions gain from and small transformers do not.
    """

    save_fresh: Callable[[Path], None]
    vary: Callable[[dict[str, Tensor], dict[str, Tensor], float], dict[str, Tensor]]
    epochs: int
    batch_size: int
    peak_rate: float
    bfloat16: bool = False


def _fresh_image_encoder(folder: Path) -> None:
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

    config = ResNetConfig(embedding_size=32, hidden_sizes=[48, 96, 128], depths=[2, 2, 2], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=half, image_std=half).save_pretrained(folder)


def _fresh_audio_encoder(folder: Path) -> None:
    """A convolutional network over the spectrogram, which learns from four speakers what an AST of its size does not."""
    from transformers import ASTFeatureExtractor, ResNetConfig, ResNetModel

    config = ResNetConfig(
        num_channels=1, embedding_size=32, hidden_sizes=[48, 96, 128], depths=[1, 1, 2], layer_type="basic"
    )
    ResNetModel(config).save_pretrained(folder)
    spectrogram = {"num_mel_bins": MEL_BINS, "max_length": 160}
    ASTFeatureExtractor(mean=AUDIO_MEAN, std=AUDIO_STD, **spectrogram).save_pretrained(folder)


def _fresh_point_cloud_encoder(folder: Path) -> None:
    """Centres enter through random ridges, steep enough to tell places apart from the first step on."""
    from xblip_point_bert import PointBertConfig, PointBertModel

    config = PointBertConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        num_groups=32,
        group_size=24,
        num_points=512,
        pointnet_sizes=[16, 32, 64],
        group_embedding_size=96,
        position_size=64,
        initializer_range=0.08,
    )
    model = PointBertModel(config)
    nn.init.normal_(model.pos_embed[0].weight, std=3.0)
    nn.init.uniform_(model.pos_embed[0].bias, -3.0, 3.0)
    model.save_pretrained(folder)


def _vary_images(tensors: dict[str, Tensor], labels: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
    is_sign = labels["kind"] == FACTS["image"]["kind"].index("sign")
    varied = vary_images(tensors["pixel_values"], is_sign)
    return {"pixel_values": varied.contiguous(memory_format=torch.channels_last)}


def _vary_spectrograms(tensors: dict[str, Tensor], labels: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
    return dict(zip(("input_values", "num_frames"), vary_spectrograms(**tensors), strict=True))


def _vary_points(tensors: dict[str, Tensor], labels: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
    """Turns clouds ever farther: after nine epochs .84 of the val split are read, and .78 if not."""
    return {"points": vary_points(tensors["points"], math.pi * min(1.0, 0.1 + 2 * progress))}


RECIPES = {
    "image": Recipe(_fresh_image_encoder, _vary_images, epochs=24, batch_size=128, peak_rate=2e-3, bfloat16=True),
    "audio": Recipe(_fresh_audio_encoder, _vary_spectrograms, epochs=36, batch_size=64, peak_rate=1.5e-3),
    "point_cloud": Recipe(_fresh_point_cloud_encoder, _vary_points, epochs=32, batch_size=64, peak_rate=2e-3),
}


def read_examples(world: Path, split: str, name: str, encoder: Path) -> Examples:
    """Loads all files of a modality as the modality's plugin loads them in use; solids to train on are turned to face.

    Args:
      world: folder that `xblip_numerals.media` made.
      split: "train", "val" or "test".
      name: modality. "image" brings `FRAMES_OF_A_VIDEO` frames of every video as well.
      encoder: folder of the encoder, whose processor the plugin uses.

    Raises:
      SourcesError: the world, or files of this modality in it, are missing.
    """
    manifest = world / split / "manifest.jsonl"
    if not manifest.is_file():
        raise SourcesError(
            f"{manifest} does not exist. Build the world first: python -m xblip_numerals.media --data FOLDER --out {world}"
        )
    readers = {name: _modality(name, encoder)}
    if name == "image":
        readers["video"] = _modality("video", encoder, num_frames=FRAMES_OF_A_VIDEO)
    rows = [row for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines())]
    rows = [row for row in rows if row["modality"] in readers]
    if not rows:
        raise SourcesError(f"{manifest} lists no {name} files: build the world with some.")
    parts: list[dict[str, Tensor]] = []
    facts: list[dict[str, str]] = []
    origins: list[str] = []
    for row in tqdm(rows, desc=f"read {split}"):
        part = readers[row["modality"]].load(manifest.parent / row["path"])
        if split == "train" and "turn" in row:
            part["points"] = turn_points(part["points"], torch.tensor([-row["turn"]]))
        parts.append({key: value.half() if value.is_floating_point() else value for key, value in part.items()})
        segments = len(next(iter(part.values())))
        is_frame = row["modality"] == "video"
        facts += [{**row["facts"], "kind": "handwriting"} if is_frame else row["facts"]] * segments
        origins += ["frame" if is_frame else row["source"].split(":")[0]] * segments
    labels = {
        fact: torch.tensor([values.index(given[fact]) if fact in given else _UNKNOWN for given in facts])
        for fact, values in FACTS[name].items()
    }
    return Examples({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, labels, origins)


def train(name: str, *, world: Path, out: Path, epochs: int | None = None, seed: int = 0) -> dict[str, float]:
    """Trains one encoder, saves it in half precision and measures what it saved on the val split.

    Args:
      name: "image", "audio" or "point_cloud".
      world: folder that `xblip_numerals.media` made.
      out: folder to write: model, processor and accuracy.json.
      epochs: passes over the training examples; the recipe's own number when None.
      seed: of weights, order and variation.

    Returns:
      Fact to accuracy, where "number (sign)" counts only things made from signs; also in accuracy.json.

    Raises:
      SourcesError: the world is missing.
    """
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    recipe.save_fresh(out)
    examples = {split: read_examples(world, split, name, out) for split in ("train", "val")}
    encoder = _modality(name, out).build_encoder().float().train()
    readout = Readout(encoder.width, FACTS[name])
    started = time.monotonic()
    _fit(encoder, readout, examples["train"], recipe, epochs or recipe.epochs)
    minutes = (time.monotonic() - started) / 60
    encoder.model.half().save_pretrained(out)
    saved = _modality(name, out).build_encoder().float().eval()
    accuracy = measure(saved, readout.eval(), examples["val"], recipe)
    report = {
        "val": accuracy,
        "parameters": sum(weights.numel() for weights in saved.parameters()),
        "minutes": round(minutes, 1),
    }
    (out / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return accuracy


@torch.no_grad()
def measure(encoder: nn.Module, readout: Readout, examples: Examples, recipe: Recipe) -> dict[str, float]:
    """Accuracy of each fact over the examples that have it, and of the number by what examples were made from."""
    told: dict[str, list[Tensor]] = {fact: [] for fact in examples.labels}
    for rows in torch.arange(len(examples.origins)).split(256):
        tensors, _ = examples.batch(rows)
        for fact, logits in _read(encoder, readout, tensors).items():
            told[fact].append(logits.argmax(1))
    accuracy = {}
    for fact, labels in examples.labels.items():
        right, known = torch.cat(told[fact]) == labels, labels != _UNKNOWN
        accuracy[fact] = _share(right[known])
        for origin in sorted(set(examples.origins)):
            of_origin = torch.tensor([other == origin for other in examples.origins]) & known
            if fact == "number" and 0 < of_origin.sum() < len(right):
                accuracy[f"{fact} ({origin})"] = _share(right[of_origin])
    return accuracy


def _fit(encoder: nn.Module, readout: Readout, examples: Examples, recipe: Recipe, epochs: int) -> None:
    """Trains encoder and readout together: one cycle of the learning rate, smoothed labels.

    Muon trains an encoder's matrices (a transformer's; convolutions have none), AdamW everything else: after nine
    epochs .86 of the val split's solids are read, and .80 with AdamW alone.
    """
    weights = [*encoder.parameters(), *readout.parameters()]
    matrices = [weight for weight in encoder.parameters() if weight.dim() == 2]
    others = [weight for weight in weights if not any(weight is matrix for matrix in matrices)]
    groups = [
        {"params": [weight for weight in others if weight.dim() > 1], "weight_decay": 0.05},
        {"params": [weight for weight in others if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    count = len(examples.origins)
    batches = max(1, count // recipe.batch_size)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.peak_rate, total_steps=epochs * batches, pct_start=0.15, cycle_momentum=index == 0
        )
        for index, optimizer in enumerate(optimizers)
    ]
    with tqdm(total=epochs * batches, desc="train") as bar:
        for epoch in range(epochs):
            for rows in torch.randperm(count)[: batches * recipe.batch_size].chunk(batches):
                tensors, labels = examples.batch(rows)
                tensors = recipe.vary(tensors, labels, epoch / epochs)
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                    logits = _read(encoder, readout, tensors)
                loss = sum(_loss(logits[fact], labels[fact], fact) for fact in labels)
                loss.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}")


def _read(encoder: nn.Module, readout: Readout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fact to logits; encoders give tokens, or tokens and their mask."""
    tokens = encoder(**tensors)
    return readout(*tokens) if isinstance(tokens, tuple) else readout(tokens)


def _loss(logits: Tensor, labels: Tensor, fact: str) -> Tensor:
    """Mean over the examples that have the fact; 0 when none has."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=_UNKNOWN, label_smoothing=0.05, reduction="sum")
    return (NUMBER_WEIGHT if fact == "number" else 1.0) * losses / (labels != _UNKNOWN).sum().clamp(min=1)


def _share(right: Tensor) -> float:
    return round(right.float().mean().item(), 4)


def _modality(name: str, encoder: Path, **settings) -> xblip.Modality:
    """The plugin's modality, with its encoder in a folder."""
    kind = xblip.plugins.get("modality", name)
    return kind(kind.Config(encoder=str(encoder), **settings))


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
    print("val: " + ", ".join(f"{fact} {share:.3f}" for fact, share in accuracy.items()))


if __name__ == "__main__":
    main()
