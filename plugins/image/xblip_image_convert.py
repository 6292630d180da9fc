"""EVA-CLIP-g from its own file (`eva_vit_g.pth`) or a LAVIS checkpoint, as a `transformers` folder.

The original ends after its last block, while `Blip2VisionModel` adds a layer norm: that one is written as the identity,
and the setting `layer: -1` reads what comes before it.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PREFIXES = ("visual_encoder.", "")
MARKS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.0.mlp.fc1.weight")
UNUSED = ("norm.", "fc_norm.", "head.")
DEPTH = 39  # BLIP-2 reads the output of the last block but one, and files may hold the last one too
HEAD_WIDTH = 88
IMAGE_SIZE = 224
NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def convert(checkpoint: Any, folder: Path) -> bool:
    """Writes the EVA-CLIP of a checkpoint and its processor; see `Modality.convert_encoder` for the arguments.

    Position embeddings of another resolution than 224 x 224 are interpolated, as the original does.
    """
    from transformers import Blip2VisionConfig, Blip2VisionModel, BlipImageProcessor

    held = checkpoint.tensors
    prefix = next((prefix for prefix in PREFIXES if all(prefix + mark in held for mark in MARKS)), None)
    if prefix is None:
        return False
    for part in UNUSED:
        checkpoint.leave_out(prefix + part, "the encoder ends before its final norm and head")
    numbers = {int(found[1]) for name in held if (found := re.match(re.escape(prefix) + r"blocks\.(\d+)\.", name))}
    for number in numbers - set(range(DEPTH)):
        checkpoint.leave_out(f"{prefix}blocks.{number}.", f"the encoder uses its first {DEPTH} blocks")
    weights = checkpoint.take(prefix)
    width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=min(DEPTH, max(numbers) + 1),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=IMAGE_SIZE,
        patch_size=patch_size,
    )
    with torch.device("meta"):
        model = Blip2VisionModel(config)
    dtype = weights["patch_embed.proj.weight"].dtype
    named = {name: value.to(dtype) for name, value in _renamed(weights, IMAGE_SIZE // patch_size).items()}
    last = {"post_layernorm.weight": torch.ones(width, dtype=dtype)}
    last |= {"post_layernorm.bias": torch.zeros(width, dtype=dtype)}
    checkpoint.check_fit(named | last, model.state_dict(), what="The EVA-CLIP-g")
    model.load_state_dict(named | last, assign=True)
    checkpoint.fresh.update(dict.fromkeys(last, "scales by 1 and shifts by 0; `layer: -1` reads what comes before it"))
    model.save_pretrained(folder)
    BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return True


def _renamed(weights: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """The tensors under the names of transformers, positions fitted to a grid, biases of q, k and v joined."""
    weights = dict(weights)
    weights["pos_embed"] = fitted(weights["pos_embed"], grid)
    blocks = [name.removesuffix("q_bias") for name in weights if name.endswith(".attn.q_bias")]
    for block in (block for block in blocks if f"{block}v_bias" in weights):
        query, value = weights.pop(f"{block}q_bias"), weights.pop(f"{block}v_bias")
        weights[f"{block}qkv.bias"] = torch.cat([query, torch.zeros_like(value), value])
    for pattern, name in NAMES:
        weights = {re.sub(pattern, name, old): value for old, value in weights.items()}
    return weights


def fitted(positions: Tensor, grid: int) -> Tensor:
    """Interpolates position embeddings (1, 1 + side * side, D) bicubically to (1, 1 + grid * grid, D)."""
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    patches = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), patches.flatten(2).transpose(1, 2)], 1)
