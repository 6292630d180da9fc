"""Q-Formers of the original code (LAVIS: BLIP-2 stage 1, InstructBLIP, X-InstructBLIP) and of BERT, as weights of a bridge.

Names are mapped one by one and every weight is accounted for. The original loads with `strict=False` and by substrings,
which left a layer norm of its own 13B model at its initial values, unnoticed.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from xblip.checkpoint import Checkpoint
from xblip.errors import BundleError

PROJECTORS = ("llm_proj", "t5_proj", "opt_proj", "llama_proj")
UNUSED = {
    "Qformer.cls.": "the head of masked language modelling, which no bridge has",
    "vision_proj.": "for contrast with texts",
    "text_proj.": "for contrast with texts",
    "itm_head.": "for matching with texts",
    "temp": "for contrast with texts",
    "llm_model.": "of the LLM, which is given as its own folder",
    "t5_model.": "of the LLM, which is given as its own folder",
    "opt_model.": "of the LLM, which is given as its own folder",
    "llama_model.": "of the LLM, which is given as its own folder",
    "visual_encoder.": "of the encoder, which is given as its own folder",
}
"""What else such checkpoints hold, by prefix."""

_PREFIXED = re.compile(r"^(\w+)_(?:Qformer\.bert\.|query_tokens$|ln\.|llm_proj\.)")
_RENAMED = (
    (".attention.self.", ".attention.attention."),
    (".crossattention.self.", ".crossattention.attention."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
)


def prefixes(checkpoint: Checkpoint) -> set[str]:
    """Returns the modalities' prefixes in a checkpoint of X-InstructBLIP; one without any has `{""}`, others none."""
    found = {match[1] for name in checkpoint.tensors if (match := _PREFIXED.match(name))}
    if found:
        return found
    return {""} if any(name.startswith("Qformer.bert.") for name in checkpoint.tensors) else set()


def bridge_weights(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Takes the weights of one modality's bridge, by our names.

    Args:
      checkpoint: in LAVIS's layout.
      prefix: of the modality, such as "audio"; "" for BLIP-2's and InstructBLIP's.

    Returns:
      `query_tokens`, `layer_norm.*`, `qformer.*`, and `projector.*` where the checkpoint has one.
    """
    start = f"{prefix}_" if prefix else ""
    layer_norm = "ln" if prefix else "ln_vision"
    for unused, why in UNUSED.items():
        checkpoint.leave_out(unused, why)
        checkpoint.leave_out(start + unused, why)
    for name in checkpoint.tensors:
        if name.endswith((".position_ids", ".rotary_emb.inv_freq")):
            checkpoint.leave_out(name, "a constant that is computed")
        elif re.search(r"_encoder\..*\.(running_mean|running_var|num_batches_tracked)$", name):
            checkpoint.leave_out(name, "of the encoder, which is given as its own folder")
    weights = {"query_tokens" + name: value for name, value in checkpoint.take(f"{start}query_tokens").items()}
    weights |= _named("layer_norm.", checkpoint.take(f"{start}{layer_norm}."))
    weights |= _named("qformer.", renamed(checkpoint.take(f"{start}Qformer.bert.")))
    for projector in PROJECTORS:
        weights |= _named("projector.", checkpoint.take(f"{start}{projector}."))
    return weights


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of BERT's layout under the names of our Q-Former, which are transformers'."""
    result = {}
    for name, value in weights.items():
        for old, new in _RENAMED:
            name = name.replace(old, new)
        result[name] = value
    return result


def bert_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Takes a `BertModel`'s weights as initial ones of a Q-Former.

    The query positions' feed-forward is copied from the text's, as BLIP-2 does; cross-attention is not there.
    """
    start = "bert." if any(name.startswith("bert.") for name in checkpoint.tensors) else ""
    for name in checkpoint.tensors:
        if name.endswith(".position_ids"):
            checkpoint.leave_out(name, "a constant that is computed")
    for unused, why in (
        (f"{start}embeddings.token_type_embeddings.", "a Q-Former reads one text alone"),
        (f"{start}pooler.", "a Q-Former has none"),
        ("cls.", "the head of masked language modelling, which no bridge has"),
    ):
        checkpoint.leave_out(unused, why)
    weights = renamed(checkpoint.take(start))
    for name, value in list(weights.items()):
        copied = re.sub(r"^(encoder\.layer\.\d+\.)(intermediate|output)\.", r"\1\2_query.", name)
        weights[copied] = value
    return _named("qformer.", weights)


def sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Reads a Q-Former's settings off its weights, whose attention heads are 64 wide as in all published ones.

    Raises:
      BundleError: it is no Q-Former's weights.
    """
    layers = {int(name.split(".")[3]) for name in weights if name.startswith("qformer.encoder.layer.")}
    reading = sorted(int(name.split(".")[3]) for name in weights if name.endswith(".crossattention.attention.key.weight"))
    try:
        hidden = weights["qformer.encoder.layer.0.attention.attention.query.weight"].shape[0]
        found = {
            "hidden_size": hidden,
            "num_hidden_layers": max(layers) + 1,
            "num_attention_heads": max(1, hidden // 64),
            "intermediate_size": weights["qformer.encoder.layer.0.intermediate_query.dense.weight"].shape[0],
        }
    except (KeyError, ValueError) as cause:
        raise BundleError("These weights are no Q-Former's: its first layer is missing.") from cause
    if len(reading) > 1:
        found["cross_attention_frequency"] = reading[1] - reading[0]
    if "query_tokens" in weights:
        found["num_query_tokens"] = weights["query_tokens"].shape[1]
    return found


def _named(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}
