"""Converting bridges that LAVIS saved, and BERT: into branches, retrievers, or initial weights."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xblip import plugins
from xblip.branch import Branch, BranchConfig, made_folder
from xblip.bridge import TOKENIZER, WEIGHTS
from xblip.checkpoint import Checkpoint
from xblip.errors import BundleError, ConfigError
from xblip.lavis import (
    STAGE_ONE,
    STORED_TWICE,
    Published,
    language_head,
    named,
    published,
    renamed,
    rows,
    sizes,
    skeleton,
    stage_one_heads,
    with_qformer,
)
from xblip.llm import FrozenLLM, LLMConfig
from xblip.loading import LOADING_ERRORS, save_tensors, why_not_loaded
from xblip.qformer import QFormer, QFormerConfig
from xblip.retrieval import Retriever
from xblip.retrieval_bridge import TEMPERATURE

FRESH = "random until trained"


@dataclass
class Wanted:
    """What a conversion is told beside its source.

    Attributes:
      only: name of the one modality to convert; "" for what the source says.
      llm: folder or hub id of the LLM that a branch is for, or that a bundle takes in place of an equal one; "" for none.
      encoder: folder or hub id of its encoder; "" for none.
      tokenizer: folder or hub id of the Q-Former's tokenizer.
      qformer: folder of the converted Q-Former that stands before a projector alone (MiniGPT-4); "" for none.
      cue: text before a branch's soft prompt; None for X-InstructBLIP's where the source has its prefixes,
        and none elsewhere.
    """

    only: str = ""
    llm: str = ""
    encoder: str = ""
    tokenizer: str = "bert-base-uncased"
    qformer: str = ""
    cue: str | None = None


def from_lavis(checkpoint: Checkpoint, found: set[str], folder: Path, wanted: Wanted) -> str:
    """Makes a branch of a bridge in LAVIS's layout, or initial weights where no LLM is given; returns what it made.

    Args:
      checkpoint: in that layout.
      found: its prefixes.
      folder: to write into.
      wanted: which modality, and what the branch is for.

    Raises:
      BundleError: the checkpoint is not whole, or what it needs is not given or does not fit it.
      ConfigError: something is wanted that it has no use for.
    """
    modality, prefix = _chosen(checkpoint, found, wanted)
    names = _modalities()
    for other in found - {prefix}:
        checkpoint.leave_out(f"{other}_", f"of {names.get(other, other)}, which is converted by --only")
    is_stage_one = any(name.startswith(STAGE_ONE) for name in checkpoint.tensors)
    heads = stage_one_heads(checkpoint) if is_stage_one and not wanted.llm else {}
    bridge = published(checkpoint, prefix)
    _check_told(checkpoint.path, bridge.kind, wanted, retrieves=bool(heads))
    if bridge.kind == "frozen_qformer":
        bridge = with_qformer(bridge, wanted.qformer)
    if bridge.settings.get("instruction_aware"):
        known = rows(checkpoint.path, bridge.weights, "qformer.embeddings.word_embeddings.weight")
        bridge.settings["tokenizer"] = _save_tokenizer(wanted.tokenizer, folder, known)
    may_lack = ("projector.",) if is_stage_one else ()
    fresh = checkpoint.check_fit(bridge.weights, skeleton(bridge).state_dict(), what="The bridge", may_lack=may_lack)
    if heads and wanted.encoder:
        return _save_retriever(checkpoint, modality, bridge, heads, folder, wanted)
    checkpoint.fresh.update(dict.fromkeys(fresh, FRESH))
    if not wanted.llm:
        return save_initial(checkpoint, bridge.settings, bridge.weights | heads, folder)
    cue = wanted.cue
    if cue is None:
        cue = f" {plugins.get('modality', modality).cue}" if prefix else ""
    made = _save_branch(checkpoint.path, modality, bridge, folder, wanted, cue=cue)
    return f"{made}, its Q-Former that of {wanted.qformer}" if wanted.qformer else made


def _check_told(path: Path, kind: str, wanted: Wanted, *, retrieves: bool) -> None:
    """Refuses what is told in vain."""
    if kind == "frozen_qformer" and not wanted.llm:
        raise BundleError(f"{path} holds a projector alone: give the LLM that it is for by --llm.")
    if kind != "frozen_qformer" and wanted.qformer:
        raise ConfigError(f"{path} holds the Q-Former of its own bridge: leave --qformer out.")
    if retrieves and wanted.encoder and not wanted.only:
        raise BundleError(f"{path} becomes a retriever of one modality: say which it is for by --only NAME.")
    if not wanted.llm and ((wanted.encoder and not retrieves) or wanted.cue is not None):
        raise ConfigError(
            f"{path} becomes a branch for an LLM: give it by --llm, or leave --encoder and --cue out for initial weights."
        )


def _modalities() -> dict[str, str]:
    """Installed modalities by their prefix."""
    return {plugins.get("modality", name).checkpoint_prefix: name for name in plugins.names("modality")}


def _chosen(checkpoint: Checkpoint, found: set[str], wanted: Wanted) -> tuple[str, str]:
    """The modality to convert, and its prefix; initial weights of a checkpoint without prefixes are no modality's."""
    if wanted.only:
        plugins.get("modality", wanted.only)
    if found == {""}:
        if wanted.llm and not wanted.only:
            raise BundleError(
                f"{checkpoint.path} holds one bridge that names no modality: say which it is for by --only NAME."
            )
        return wanted.only, ""
    known = _modalities()
    chosen = [prefix for prefix in sorted(found & set(known)) if wanted.only in ("", known[prefix])]
    if len(chosen) == 1:
        return known[chosen[0]], chosen[0]
    has = f"{checkpoint.path} holds {', '.join(sorted(found))}"
    if chosen:
        raise BundleError(f"{has}: say which modality to convert by --only NAME.")
    if wanted.only:
        raise BundleError(f"{has}, and nothing of {wanted.only}: choose its own checkpoint.")
    raise BundleError(f"{has}, which no installed modality is called: install the plugin that is.")


def _save_branch(path: Path, modality: str, bridge: Published, folder: Path, wanted: Wanted, *, cue: str) -> str:
    config = _encoder_config(modality, wanted)
    llm = FrozenLLM.from_pretrained(LLMConfig(source=wanted.llm))
    settings = {"kind": bridge.kind, **bridge.settings}
    branch = Branch.build(
        BranchConfig(modality, config=config, bridge=settings, cue=cue, encoder_dtype="auto"), llm_width=llm.width
    )
    for what, width, found, its in (
        ("LLM", bridge.llm_width, f'"{wanted.llm}"', llm.width),
        ("encoder", bridge.encoder_width, f"the one of {modality}", branch.encoder.width),
    ):
        if width not in (0, its):
            raise BundleError(
                f"The bridge in {path} was made for an {what} of width {width}, and {found} has {its}: give the {what} "
                "that it was trained with."
            )
    fresh = {name: value for name, value in branch.bridge.state_dict().items() if name not in bridge.weights}
    weights = {name: value.float() for name, value in bridge.weights.items()}
    branch.bridge.load_state_dict(weights | fresh, strict=True)
    branch.save(folder, llm=llm)
    return f"branch: {modality}"


def _encoder_config(modality: str, wanted: Wanted) -> dict[str, Any]:
    """A modality's settings that name the encoder which is told."""
    known = {field.name for field in fields(plugins.get("modality", modality).Config)}
    if "encoder" in known and not wanted.encoder:
        raise BundleError(f"A branch names its encoder: give the folder of the {modality} encoder by --encoder.")
    config: dict[str, Any] = {"encoder": wanted.encoder} if "encoder" in known else {}
    if "layer" in known:
        config["layer"] = -1  # the checkpoint's layer norm stands in the place of the encoder's own last one
    return config


def _save_retriever(
    checkpoint: Checkpoint, modality: str, bridge: Published, heads: dict[str, Tensor], folder: Path, wanted: Wanted
) -> str:
    writes = any(name.startswith("language_head.") for name in heads)
    width = rows(checkpoint.path, heads, "media_projection.weight", what="The retriever")
    settings = {**bridge.settings, "embedding_width": width, "language_head": writes}
    config = BranchConfig(modality, config=_encoder_config(modality, wanted), bridge=settings, encoder_dtype="auto")
    retriever = Retriever.build(config)
    if bridge.encoder_width != retriever.branch.encoder.width:
        raise BundleError(
            f"The Q-Former in {checkpoint.path} was made for an encoder of width {bridge.encoder_width}, and the one of "
            f"{modality} has {retriever.branch.encoder.width}: give the encoder that it was trained with."
        )
    own = retriever.branch.bridge
    weights = {name: value.float() for name, value in (bridge.weights | heads).items()}
    if not writes:
        weights.pop("temperature", None)
    fresh = checkpoint.check_fit(weights, own.state_dict(), what="The retriever", may_lack=("temperature",))
    checkpoint.fresh.update(dict.fromkeys(fresh, f"{TEMPERATURE}, as at the start of training"))
    own.load_state_dict(own.state_dict() | weights, strict=True)
    retriever.save_pretrained(folder)
    return f"retriever: {modality}"


def _save_tokenizer(source: str, folder: Path, known: int) -> str:
    """Writes BERT's tokenizer with the token `[DEC]` that BLIP-2 added as its beginning of sequence, `known` in all."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except LOADING_ERRORS as cause:
        raise BundleError(
            f'Cannot load the Q-Former\'s tokenizer from "{source}": {why_not_loaded(source, cause)} Give the folder of '
            "bert-base-uncased (tokenizer.json, tokenizer_config.json, vocab.txt) by --tokenizer."
        ) from cause
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    if len(tokenizer) != known:
        raise BundleError(
            f'The Q-Former knows {known} tokens, and "{source}" has {len(tokenizer)} with [DEC]: give the tokenizer that it '
            "was trained with by --tokenizer."
        )
    tokenizer.save_pretrained(folder / TOKENIZER)
    return str(folder / TOKENIZER)


def from_bert(checkpoint: Checkpoint, folder: Path) -> str:
    """Makes initial weights of a `BertModel`.

    The query positions' feed-forward is copied from the text's, as BLIP-2 does; cross-attention is not there.
    """
    head = language_head(checkpoint, "")
    weights = bert_weights(checkpoint)
    settings = sizes(checkpoint.path, weights, what="The BERT")
    vocabulary = rows(checkpoint.path, weights, "qformer.embeddings.word_embeddings.weight", what="The BERT")
    with torch.device("meta"):
        qformer = QFormer(QFormerConfig(encoder_width=1, vocab_size=vocabulary, **settings))
    expected = named("qformer.", qformer.state_dict())
    fresh = checkpoint.check_fit(weights, expected, what="The BERT", may_lack=(".crossattention.",))
    checkpoint.fresh.update(dict.fromkeys([*fresh, "query_tokens", "layer_norm", "projector"], FRESH))
    return save_initial(checkpoint, settings, weights | head, folder)


def bert_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Takes a `BertModel`'s weights by the names of a Q-Former's."""
    start = "bert." if any(name.startswith("bert.") for name in checkpoint.tensors) else ""
    for name in checkpoint.tensors:
        if name.endswith(".position_ids"):
            checkpoint.leave_out(name, "a constant that is computed")
    for unused, why in (
        (f"{start}embeddings.token_type_embeddings.", "a Q-Former reads one text alone"),
        (f"{start}pooler.", "a Q-Former has none"),
        ("cls.", "a head of which no bridge has the like"),
        ("cls.predictions.decoder.", STORED_TWICE),
    ):
        checkpoint.leave_out(unused, why)
    weights = renamed(checkpoint.take(start))
    for name, value in list(weights.items()):
        copied = re.sub(r"^(encoder\.layer\.\d+\.)(intermediate|output)\.", r"\1\2_query.", name)
        weights[copied] = value.clone()
    return named("qformer.", weights)


def save_initial(checkpoint: Checkpoint, settings: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> str:
    """Writes weights that any bridge of those settings may start from."""
    save_tensors({name: value.float() for name, value in weights.items()}, made_folder(folder) / WEIGHTS)
    told = {name: TOKENIZER if name == "tokenizer" else value for name, value in settings.items()}
    Path(folder, "README.md").write_text(
        f"# Initial weights of a bridge\n\nFrom {checkpoint.path.name}: "
        + ", ".join(f"{name} {value}" for name, value in told.items())
        + ". A training config takes them by `init.folder`"
        + (", and the tokenizer they were trained with by `branch.bridge.tokenizer`.\n" if TOKENIZER in told else ".\n")
    )
    return "initial weights"
