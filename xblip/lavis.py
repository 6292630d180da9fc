"""Bridges in the layout of LAVIS (BLIP-2, InstructBLIP, X-InstructBLIP, MiniGPT-4): found, renamed and compared.

Names are mapped one by one and every weight is accounted for. The original loads with `strict=False` and by substrings,
which left a layer norm of its own 13B model at its initial values, unnoticed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xblip import plugins
from xblip.bridge import WEIGHTS, Bridge
from xblip.checkpoint import Checkpoint, read
from xblip.errors import BundleError
from xblip.qformer_bridges import is_text_part

SHARED = "shared"
"""Prefix of a Q-Former that reads for several modalities."""
PROJECTORS = ("llm_proj", "t5_proj", "opt_proj", "llama_proj")
STAGE_ONE = ("itm_head.", "vision_proj.", "text_proj.")
"""What BLIP-2 has before it knows an LLM, and therefore without a projector."""
HEADS = {"vision_proj.": "media_projection.", "text_proj.": "text_projection.", "itm_head.": "matching_head."}
"""Of these, what ours are called."""
STORED_TWICE = "the embeddings of words and their bias, stored once more"
UNUSED = {
    "Qformer.cls.": "the head that writes texts, which only retrievers have",
    "Qformer.cls.predictions.decoder.": STORED_TWICE,
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

_PREFIXED = re.compile(r"^(\w+?)_(?:Qformer\.bert\.|query_tokens$|ln\.|llm_proj\.|encoder_projection\.)")
_RENAMED = (
    (".attention.self.", ".attention.attention."),
    (".crossattention.self.", ".crossattention.attention."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
)


@dataclass
class Published:
    """One bridge of a checkpoint, as ours.

    Attributes:
      kind: of bridge.
      settings: of that kind, as far as shapes tell them; a Q-Former that reads text needs its tokenizer beside.
      weights: by our names.
      encoder_width: D_enc, 0 where no shape tells it.
      llm_width: D_llm, 0 where there is no projector.
    """

    kind: str
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    encoder_width: int
    llm_width: int


def prefixes(checkpoint: Checkpoint) -> set[str]:
    """Returns the modalities' prefixes in a checkpoint of X-InstructBLIP; one without any has `{""}`, others none."""
    found = {match[1] for name in checkpoint.tensors if (match := _PREFIXED.match(name))}
    if found:
        return found - {SHARED}
    starts = ("Qformer.bert.", *(f"{projector}." for projector in PROJECTORS))
    return {""} if any(name.startswith(starts) for name in checkpoint.tensors) else set()


def published(checkpoint: Checkpoint, prefix: str) -> Published:
    """Takes the bridge of one modality, and leaves out what is no bridge's.

    Args:
      checkpoint: in LAVIS's layout.
      prefix: of the modality; "" for a checkpoint of one that names none.

    Raises:
      BundleError: a weight that tells its sizes is missing, or its LLM was trained with it.
    """
    start = f"{prefix}_" if prefix else ""
    _leave_out_others(checkpoint, start)
    held = checkpoint.tensors
    weights = named("layer_norm.", checkpoint.take(f"{start}ln." if prefix else "ln_vision."))
    for projector in PROJECTORS:
        weights |= named("projector.", checkpoint.take(f"{start}{projector}."))
    if f"{start}projection.weight" in held:
        weights |= named("projection.", checkpoint.take(f"{start}projection."))
        return _pooled(checkpoint.path, weights)
    if not prefix and not any(name.startswith("Qformer.") for name in held):
        return Published("frozen_qformer", {}, weights, 0, rows(checkpoint.path, weights, "projector.bias"))
    owner, kind = start, "qformer"
    if f"{start}encoder_projection.weight" in held:
        owner, kind = f"{SHARED}_", "shared_qformer"
        weights |= named("encoder_projection.", checkpoint.take(f"{start}encoder_projection."))
        for alias in ("Qformer.", "query_tokens"):
            checkpoint.leave_out(start + alias, "is the shared one, stored once more")
    weights |= named("query_tokens", checkpoint.take(f"{owner}query_tokens"))
    weights |= named("qformer.", renamed(checkpoint.take(f"{owner}Qformer.bert.")))
    settings = {"max_segments": 0, "join_segments": False, "features_layer_norm": True}
    settings |= {"instruction_aware": any(is_text_part(name) for name in weights), **sizes(checkpoint.path, weights)}
    if kind == "shared_qformer":
        settings["shared_width"] = rows(checkpoint.path, weights, "encoder_projection.bias")
    encoder_width = rows(checkpoint.path, weights, "layer_norm.weight")
    llm_width = rows(checkpoint.path, weights, "projector.bias") if "projector.bias" in weights else 0
    return Published(kind, settings, weights, encoder_width, llm_width)


def stage_one_heads(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Takes what BLIP-2's first stage has beside its Q-Former, by the names of a `RetrievalBridge`; call it first."""
    heads = language_head(checkpoint, "Qformer.")
    for theirs, ours in HEADS.items():
        heads |= named(ours, checkpoint.take(theirs))
    if "temp" in checkpoint.tensors:
        heads["temperature"] = checkpoint.take("temp")[""].reshape(1)
    return heads


def language_head(checkpoint: Checkpoint, start: str) -> dict[str, Tensor]:
    """Takes BERT's head of language modelling from under `start`, if it is whole and ends in the embeddings of words."""
    head, words = f"{start}cls.predictions.", f"{start}bert.embeddings.word_embeddings.weight"
    tensors = checkpoint.tensors
    decoder = tensors.get(f"{head}decoder.weight")
    if decoder is not None and (words not in tensors or not torch.equal(decoder, tensors[words])):
        return {}
    names = {"transform.dense.": "dense.", "transform.LayerNorm.": "layer_norm.", "bias": "bias"}
    wanted = {f"{head}{name}{part}" for name in names for part in (("weight", "bias") if name[-1] == "." else ("",))}
    if not wanted <= set(tensors):
        return {}
    return {
        f"language_head.{ours}{rest}": value
        for theirs, ours in names.items()
        for rest, value in checkpoint.take(head + theirs).items()
    }


def _leave_out_others(checkpoint: Checkpoint, start: str) -> None:
    if trained := sorted(name for name in checkpoint.tensors if ".lora_" in name):
        raise BundleError(
            f"{checkpoint.path} holds LoRA weights of its LLM, among them {trained[0]}: its bridge speaks to an LLM that "
            "was trained with it, and would be read wrongly by a frozen one. Choose a checkpoint without LoRA."
        )
    for unused, why in UNUSED.items():
        checkpoint.leave_out(unused, why)
        checkpoint.leave_out(start + unused, why)
    for name in set(checkpoint.tensors) - set(checkpoint.left_out):
        if name.endswith((".position_ids", ".rotary_emb.inv_freq")):
            checkpoint.leave_out(name, "a constant that is computed")
        elif re.search(r"_encoder\..*\.(running_mean|running_var|num_batches_tracked)$", name):
            checkpoint.leave_out(name, "of the encoder, which is given as its own folder")


def with_qformer(projector: Published, folder: str) -> Published:
    """Puts the Q-Former of a folder that `xblip convert` wrote before a projector alone; its text part is not used.

    Raises:
      BundleError: there is none.
    """
    path = Path(folder, WEIGHTS)
    if not folder or not path.is_file():
        at_hand = f"{folder} lacks {WEIGHTS}" if folder else "none is given"
        raise BundleError(
            f"A projector alone, as MiniGPT-4's, needs the Q-Former that stands before it, and {at_hand}: convert BLIP-2's "
            "checkpoint first, and give its folder by --qformer."
        )
    held = read(path).tensors
    own = ("layer_norm.", "query_tokens", "qformer.")
    kept = [name for name in held if name.startswith(own) and not is_text_part(name)]
    weights = {name: held[name] for name in kept} | projector.weights
    settings = {"max_segments": 0, "join_segments": False, "features_layer_norm": True}
    settings |= {"instruction_aware": False, **sizes(path, weights)}
    encoder_width = rows(path, weights, "layer_norm.weight")
    return Published(projector.kind, settings, weights, encoder_width, projector.llm_width)


def _pooled(path: Path, weights: dict[str, Tensor]) -> Published:
    """X-InstructBLIP's linear baseline: of one number a query where its layers meet in as many as there are queries."""
    width = rows(path, weights, "layer_norm.weight")
    outputs, inputs = weights["projection.weight"].shape
    outer = rows(path, weights, "projector.weight")
    between = weights["projector.weight"].shape[1]
    hidden, queries = (1, between) if outputs == between else (between, outputs // between)
    settings = {"num_query_tokens": queries, "hidden_size": hidden}
    settings["flatten_tokens"] = 0 if inputs == width else inputs // width
    return Published("pooled_linear", settings, weights, width, outer // queries if hidden == 1 else outer)


def sizes(path: Path, weights: Mapping[str, Tensor], *, what: str = "The bridge") -> dict[str, int]:
    """Reads a Q-Former's settings off its weights, whose attention heads are 64 wide as in all published ones.

    Raises:
      BundleError: a weight that tells them is missing.
    """
    layers = {int(name.split(".")[3]) for name in weights if name.startswith("qformer.encoder.layer.")}
    reading = sorted(
        int(name.split(".")[3]) for name in weights if name.endswith(".crossattention.attention.key.weight")
    )
    hidden = rows(path, weights, "qformer.encoder.layer.0.attention.attention.query.weight", what=what)
    found = {
        "hidden_size": hidden,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": rows(path, weights, "qformer.encoder.layer.0.intermediate_query.dense.weight", what=what),
    }
    if len(reading) > 1:
        found["cross_attention_frequency"] = reading[1] - reading[0]
    if "query_tokens" in weights:
        found["num_query_tokens"] = weights["query_tokens"].shape[1]
    return found


def skeleton(bridge: Published) -> Bridge:
    """Builds the bridge that has these weights: all shapes, no values."""
    bridge_class = plugins.get("bridge", bridge.kind)
    settings = bridge_class.Config(**bridge.settings)
    with torch.device("meta"):
        return bridge_class(settings, encoder_width=bridge.encoder_width, llm_width=bridge.llm_width or 1)


def rows(path: Path, weights: Mapping[str, Tensor], name: str, *, what: str = "The bridge") -> int:
    """The first size of a weight that must be there."""
    if name not in weights:
        raise BundleError(
            f"{what} in {path} is not whole, or another version's: {name} is missing. Copy it again, or choose a "
            "published one."
        )
    return weights[name].shape[0]


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of BERT's layout under the names of our Q-Former, which are transformers'."""
    result = {}
    for name, value in weights.items():
        for old, new in _RENAMED:
            name = name.replace(old, new)
        result[name] = value
    return result


def named(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with `prefix` before their names."""
    return {prefix + name: value for name, value in weights.items()}
