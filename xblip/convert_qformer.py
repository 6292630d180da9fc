"""Q-Formers of the original code (LAVIS: BLIP-2 stage 1, InstructBLIP, X-InstructBLIP) and of BERT, as weights of a bridge.

Names are mapped one by one and every weight is accounted for. The original loads with `strict=False` and by substrings,
which left a layer norm of its own 13B model at its initial values, unnoticed.
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from xblip import plugins
from xblip.branch import WEIGHTS, Branch, BranchConfig, made_folder
from xblip.checkpoint import Checkpoint
from xblip.errors import BundleError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.loading import LOADING_ERRORS, first_line

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


@dataclass
class Wanted:
    """What a conversion is told beside its source.

    Attributes:
      only: name of the one modality to convert; "" for what the source says.
      llm: folder or hub id of the LLM that a branch is for, or that a bundle takes in place of an equal one; "" for none.
      encoder: folder or hub id of its encoder; "" for none.
      tokenizer: folder or hub id of the Q-Former's tokenizer.
    """

    only: str = ""
    llm: str = ""
    encoder: str = ""
    tokenizer: str = "bert-base-uncased"


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
        weights[copied] = value.clone()
    return _named("qformer.", weights)


def sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Reads a Q-Former's settings off its weights, whose attention heads are 64 wide as in all published ones.

    Raises:
      BundleError: it is no Q-Former's weights.
    """
    layers = {int(name.split(".")[3]) for name in weights if name.startswith("qformer.encoder.layer.")}
    reading = sorted(
        int(name.split(".")[3]) for name in weights if name.endswith(".crossattention.attention.key.weight")
    )
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


def from_lavis(checkpoint: Checkpoint, found: set[str], folder: Path, wanted: Wanted) -> str:
    """Makes a branch of a Q-Former in LAVIS's layout, or initial weights where no LLM is given."""
    if found == {""} and not wanted.llm:
        return save_initial(checkpoint, bridge_weights(checkpoint, ""), folder)
    known = {plugins.get("modality", name).checkpoint_prefix: name for name in plugins.names("modality")}
    if wanted.only:
        plugins.get("modality", wanted.only)
    names = {known.get(prefix, "") if prefix else wanted.only: prefix for prefix in found}
    chosen = [name for name in names if wanted.only in ("", name)]
    if len(chosen) != 1 or not chosen[0]:
        has = ", ".join(sorted(found - {""})) or "one bridge that names no modality"
        raise BundleError(f"{checkpoint.path} holds {has}: say which modality it is for by --only NAME.")
    prefix = names[chosen[0]]
    for other in found - {prefix}:
        checkpoint.leave_out(f"{other}_", f"of {known.get(other, other)}, which is converted by --only")
    weights = bridge_weights(checkpoint, prefix)
    if not wanted.llm:
        return save_initial(checkpoint, weights, folder)
    return _save_branch(chosen[0], weights, folder, wanted, cue=" " + plugins.get("modality", chosen[0]).cue)


def _save_branch(modality: str, weights: dict[str, Tensor], folder: Path, wanted: Wanted, *, cue: str) -> str:
    has_encoder = "encoder" in {field.name for field in fields(plugins.get("modality", modality).Config)}
    if has_encoder and not wanted.encoder:
        raise BundleError(f"A branch names its encoder: give the folder of the {modality} encoder by --encoder.")
    llm = FrozenLLM.from_pretrained(LLMConfig(source=wanted.llm))
    settings = {"kind": "qformer", "max_segments": 0, "join_segments": False, "features_layer_norm": True}
    settings |= {"tokenizer": "", **sizes(weights)}
    with tempfile.TemporaryDirectory() as staging:
        settings["tokenizer"] = _save_qformer_tokenizer(wanted.tokenizer, Path(staging))
        config = BranchConfig(
            modality, config={"encoder": wanted.encoder} if has_encoder else {}, bridge=settings, cue=cue
        )
        branch = Branch.build(config, llm_width=llm.width)
        _load(branch, weights, wanted)
        branch.save(folder, llm=llm)
    return f"branch: {modality}"


def _load(branch: Branch, weights: dict[str, Tensor], wanted: Wanted) -> None:
    """Loads a bridge's weights, every one, after a look at what commonly does not fit."""
    for name, part, width in (
        ("projector.weight", f'the LLM "{wanted.llm}"', branch.bridge.llm_width),
        ("layer_norm.weight", f'the encoder "{wanted.encoder}"', branch.bridge.encoder_width),
    ):
        if name in weights and weights[name].shape[0] != width:
            raise BundleError(
                f"The checkpoint's bridge was made for a width of {weights[name].shape[0]}, and {part} has {width}: "
                "give the one that it was trained with."
            )
    expected = branch.bridge.state_dict()
    faults = [f"{name} is missing" for name in expected if name not in weights]
    faults += [f"{name} has no place" for name in weights if name not in expected]
    faults += [
        f"{name} has shape {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise BundleError(f"The checkpoint's weights are not a whole bridge: {'; '.join(faults[:3])}{more}.")
    branch.bridge.load_state_dict({name: value.float() for name, value in weights.items()})


def _save_qformer_tokenizer(source: str, folder: Path) -> str:
    """BERT's tokenizer with the token `[DEC]` that BLIP-2 added as its beginning of sequence."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except LOADING_ERRORS as cause:
        raise BundleError(
            f'Cannot load the Q-Former\'s tokenizer from "{source}": {first_line(cause)} Give its folder by --tokenizer.'
        ) from cause
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def save_initial(checkpoint: Checkpoint, weights: dict[str, Tensor], folder: Path) -> str:
    """Writes weights that any bridge of those sizes may start from."""
    from safetensors.torch import save_file

    found = sizes(weights)
    save_file({name: value.float().contiguous() for name, value in weights.items()}, made_folder(folder) / WEIGHTS)
    Path(folder, "README.md").write_text(
        f"# Initial weights of a Q-Former\n\nFrom {checkpoint.path.name}: "
        + ", ".join(f"{name} {value}" for name, value in found.items())
        + ". A training config takes them by `init.folder`.\n"
    )
    return "initial weights"
