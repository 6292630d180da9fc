"""Published BEATs checkpoints ({"cfg": ..., "model": ...}), written as folders that `xblip_beats` reads.

Every setting that shapes the network is taken from the file's `cfg` and none is guessed: a model of the same tensors
computes something else when, for example, its `deep_norm` differs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from xblip_beats import BeatsConfig, BeatsFeatureExtractor, BeatsModel

import xblip

SIZES = {
    "encoder_embed_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "input_patch_size": "patch_size",
    "embed_dim": "patch_embedding_size",
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_distance",
}
"""Published settings, and what they are called in `BeatsConfig`."""
EXPECTED = {
    "deep_norm": True,
    "layer_norm_first": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "activation_fn": "gelu",
    "conv_bias": False,
}
"""Settings that `BeatsModel` knows in one value."""
ADVICE = (
    "Expected a published BEATs (microsoft/unilm), such as BEATs_iter3_plus_AS2M.pt; its tokenizers are not encoders."
)
WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def convert_beats(checkpoint: Any, folder: Path) -> bool:
    """Writes model.safetensors, config.json and preprocessor_config.json.

    Args:
      checkpoint: the file, as `Modality.convert_encoder` gets it.
      folder: to write into.

    Returns:
      Whether it is a BEATs.

    Raises:
      BundleError: it is one, but weights are missing, unknown or of other shapes, or its settings are not known.
    """
    if "patch_embedding.weight" not in checkpoint.tensors and "input_patch_size" not in _settings(checkpoint):
        return False
    config = _config(checkpoint)
    checkpoint.leave_out("predictor.", "classifies sounds, which an encoder does not")
    for place in range(1, config.num_hidden_layers):
        prefix = f"encoder.layers.{place}.self_attn.relative_attention_bias."
        checkpoint.leave_out(prefix, "is the first layer's, stored once more")
    tensors = {_renamed(name): tensor for name, tensor in checkpoint.take().items()}
    with torch.device("meta"):
        model = BeatsModel(config)
    checkpoint.check_fit(tensors, model.state_dict(), what="The BEATs", advice=ADVICE)
    model.load_state_dict(tensors, assign=True)
    model.save_pretrained(folder)
    BeatsFeatureExtractor().save_pretrained(folder)
    return True


def _settings(checkpoint: Any) -> Mapping[str, Any]:
    settings = checkpoint.config.get("cfg")
    return settings if isinstance(settings, Mapping) else {}


def _config(checkpoint: Any) -> BeatsConfig:
    settings = _settings(checkpoint)
    if missing := sorted({*SIZES, *EXPECTED} - set(settings)):
        raise _wrong(checkpoint, f"lacks {len(missing)} settings of a BEATs in its cfg, among them {missing[0]}")
    for name, value in EXPECTED.items():
        if settings[name] != value:
            raise _wrong(checkpoint, f"is a BEATs with {name} {settings[name]!r}, of which only {value!r} is known")
    try:
        return BeatsConfig(**{ours: settings[name] for name, ours in SIZES.items()})
    except ValueError as cause:
        raise _wrong(checkpoint, f"has settings that cannot be: {str(cause).strip().rstrip('.')}") from cause


def _renamed(name: str) -> str:
    """The published name in terms of torch's newer weight norm."""
    return re.sub(r"(?<=^encoder\.pos_conv\.0\.)weight_[gv]$", lambda match: WEIGHT_NORM[match[0]], name)


def _wrong(checkpoint: Any, what: str) -> xblip.BundleError:
    return xblip.BundleError(f"{checkpoint.path} {what}. {ADVICE}")
