"""Converts the PointBERT of ULIP and ULIP-2 (arXiv 2212.05171, 2305.08275) from their published checkpoints.

Sizes are read off the weights. What weights do not tell is what all published ones share: 512 groups of 32 points,
heads of 64, and clouds of 8192 points, or of 10000 where they have colour.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xblip_point_bert import PointBertConfig, PointBertModel

import xblip

ENCODER = "point_encoder."
PROJECTION = "pc_projection"
OTHERS = {"sa1.": "PointNet++", "local_grouper_list.": "PointMLP", "encoder.encoder.": "PointNeXt"}
"""Point encoders that ULIP was published with beside PointBERT, by the start of names in them."""
HEAD_SIZE = 64
NUM_POINTS = {3: 8192, 6: 10_000}
"""By the channels of a point."""
ADVICE = "Choose one of ULIP's or ULIP-2's checkpoints of PointBERT"


def convert(checkpoint: Any, folder: Path) -> bool:
    """Writes the point encoder of ULIP as a `PointBertModel` that gives group tokens and keeps the projection.

    Args:
      checkpoint: `xblip.checkpoint.Checkpoint`; its other parts (image and text towers) are left out.
      folder: where to write.

    Returns:
      Whether it has a point encoder.

    Raises:
      BundleError: the point encoder is another than PointBERT, or has weights too few, too many or of other shapes.
    """
    roots = {
        name.partition(ENCODER)[0] for name in checkpoint.tensors if name.startswith((ENCODER, f"module.{ENCODER}"))
    }
    if not roots:
        return False
    root = roots.pop()
    weights = checkpoint.take(root + ENCODER)
    for start, other in OTHERS.items():
        if any(name.startswith(start) for name in weights):
            raise xblip.BundleError(
                f"The point encoder in {checkpoint.path} looks like {other}, which cannot be converted. {ADVICE}."
            )
    weights |= {PROJECTION + rest: tensor for rest, tensor in checkpoint.take(root + PROJECTION).items()}
    model = _model(checkpoint, weights)
    for family in {name.removeprefix(root).split(".")[0] for name in set(checkpoint.tensors) - checkpoint.taken}:
        checkpoint.leave_out(root + family, f"{family} is a part of ULIP beside its point encoder")
    model.config.output = "groups"
    model.save_pretrained(folder)
    return True


def _model(checkpoint: Any, weights: dict[str, Tensor]) -> PointBertModel:
    """Builds the model around weights by their published names, each of which must fit."""
    try:
        config = _config(weights)
    except ValueError as cause:
        raise xblip.BundleError(f"The point encoder in {checkpoint.path} is not ULIP's: {cause} {ADVICE}.") from cause
    with torch.device("meta"):
        model = PointBertModel(config)
    expected = {_published(name): tensor for name, tensor in model.state_dict().items()}
    checkpoint.check_fit(weights, expected, what="ULIP's PointBERT", advice=f"{ADVICE}; or download it again.")
    model.load_state_dict({name: weights[_published(name)] for name in model.state_dict()}, assign=True)
    return model


def _config(weights: dict[str, Tensor]) -> PointBertConfig:
    """Reads sizes off the weights; those of missing ones are ULIP's."""
    usual = PointBertConfig()
    counts = {name: tensor.numel() for name, tensor in weights.items()}
    width = counts.get("norm.weight", usual.hidden_size)
    first, second, third = usual.pointnet_sizes
    first = counts.get("encoder.first_conv.0.bias", first)
    channels = counts.get("encoder.first_conv.0.weight", first * usual.in_channels) // first
    return PointBertConfig(
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in weights if name.startswith("blocks.blocks.")}),
        num_attention_heads=max(1, width // HEAD_SIZE),
        intermediate_size=counts.get("blocks.blocks.0.mlp.fc1.bias", 4 * width),
        in_channels=channels,
        num_points=NUM_POINTS.get(channels, usual.num_points),
        pointnet_sizes=(
            first,
            counts.get("encoder.first_conv.3.bias", second),
            counts.get("encoder.second_conv.0.bias", third),
        ),
        group_embedding_size=counts.get("encoder.second_conv.3.bias", usual.group_embedding_size),
        position_size=counts.get("pos_embed.0.bias", usual.position_size),
        output="pooled",
        projection_size=counts[PROJECTION] // (2 * width) if PROJECTION in counts else None,
    )


def _published(name: str) -> str:
    """What ULIP calls a weight of a `PointBertModel`."""
    return f"blocks.{name}" if name.startswith("blocks.") else name
