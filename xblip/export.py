"""A bundle with one Q-Former branch as a model of `transformers`: InstructBLIP, or BLIP-2 where the Q-Former is static.

The way back from `convert_transformers`: transformers builds the model on the meta device, and every weight is put in its
place by name, so that what cannot be said in transformers is an error and not lost.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xblip.branch import Branch
from xblip.errors import BundleError
from xblip.model import XBlip

MEDIA_TOKEN = "<image>"
"""What transformers' processors of these models call the place of a soft token."""


def to_transformers(model: XBlip, folder: Path) -> str:
    """Writes the model with its processor; returns the class that it became.

    Raises:
      BundleError: it has not one branch alone, or a part that transformers' models lack.
    """
    import transformers

    if len(model.branches) != 1:
        raise BundleError(
            f"transformers has models of one modality, and this bundle has {len(model.branches)} "
            f"({', '.join(model.branches)}): choose one by --only."
        )
    [branch] = model.branches.values()
    _check(branch)
    llm, aware = model.llm, branch.bridge.config.instruction_aware
    name = "InstructBlip" if aware else "Blip2"
    tokenizer = llm.tokenizer
    if MEDIA_TOKEN not in tokenizer.get_vocab():
        raise BundleError(
            f"The LLM's tokenizer lacks the token {MEDIA_TOKEN}, in whose place transformers puts soft tokens: add it, and "
            "a row to the LLM's embeddings, before training."
        )
    config = getattr(transformers, f"{name}Config")(
        vision_config=branch.encoder.module.model.config.to_dict(),
        qformer_config=_qformer_config(branch, vocab_size=len(branch.bridge.tokenizer) if aware else None),
        text_config=llm.model.config.to_dict(),
        num_query_tokens=branch.bridge.config.num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids(MEDIA_TOKEN),
    )
    with torch.device("meta"):
        theirs = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    theirs.load_state_dict(_weights(model, branch, theirs), strict=True, assign=True)
    theirs.generation_config = llm.model.generation_config
    theirs.save_pretrained(folder)
    _processor(branch, tokenizer, f"{name}Processor").save_pretrained(folder)
    return type(theirs).__name__


def _check(branch: Branch) -> None:
    bridge = branch.bridge
    kind = type(getattr(branch.encoder.module, "model", branch.encoder.module)).__name__
    faults = [
        (bridge.name != "qformer", f"its bridge is a {bridge.name}"),
        (kind not in ("InstructBlipVisionModel", "Blip2VisionModel"), f"its encoder is a {kind}"),
        (bridge.name == "qformer" and bridge.config.features_layer_norm, "its bridge has a layer norm of its own"),
        (bridge.name == "qformer" and bridge.config.max_segments > 0, "its bridge has positions of segments"),
    ]
    for is_fault, what in faults:
        if is_fault:
            raise BundleError(
                f"The {branch.modality.name} branch cannot become a model of transformers, since {what}; InstructBLIP and "
                "BLIP-2 have a Q-Former right behind their own vision model."
            )


def _qformer_config(branch: Branch, *, vocab_size: int | None) -> dict[str, Any]:
    bridge = branch.bridge.config
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "cross_attention_frequency",
    )
    sizes = {name: getattr(bridge, name) for name in names}
    sizes |= {"encoder_hidden_size": branch.encoder.width, "layer_norm_eps": 1e-12}
    return sizes | ({"vocab_size": vocab_size} if vocab_size else {})


def _weights(model: XBlip, branch: Branch, theirs: nn.Module) -> dict[str, Tensor]:
    """All weights under their names in transformers, in the LLM's dtype."""
    parts = {
        "vision_model.": branch.encoder.module.model.state_dict(),
        "language_model.": model.llm.model.state_dict(),
        "language_projection.": branch.bridge.projector.state_dict(),
        "qformer.": branch.bridge.qformer.state_dict(),
        "": {"query_tokens": branch.bridge.query_tokens.data},
    }
    weights = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    static = "qformer.layernorm.weight" in theirs.state_dict()
    if static:
        weights = {
            name.replace("qformer.embeddings.layernorm.", "qformer.layernorm."): value
            for name, value in weights.items()
        }
    return {name: value.to(model.llm.dtype) if value.is_floating_point() else value for name, value in weights.items()}


def _processor(branch: Branch, tokenizer: Any, name: str) -> Any:
    import transformers

    images = transformers.AutoImageProcessor.from_pretrained(branch.modality.config.encoder)
    tokenizers = [tokenizer, branch.bridge.tokenizer] if branch.bridge.tokenizer else [tokenizer]
    return getattr(transformers, name)(images, *tokenizers, num_query_tokens=branch.bridge.config.num_query_tokens)
