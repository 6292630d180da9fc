"""A bundle with one Q-Former branch as a model of `transformers`: InstructBLIP, or BLIP-2 where the Q-Former is static.

The way back from `convert_transformers`: transformers builds the model on the meta device, and every weight is put in its
place by name, so that what cannot be said in transformers is an error and not lost.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xblip.branch import Branch, made_folder
from xblip.errors import BundleError
from xblip.model import XBlip
from xblip.router import Router
from xblip.sample import Media, Sample

MEDIA_TOKEN = "<image>"
"""What transformers' processors of these models call the place of a soft token."""


def to_transformers(model: XBlip, folder: Path, *, only: str = "") -> tuple[str, list[str]]:
    """Writes a branch with its LLM and processor.

    Args:
      model: the bundle.
      folder: to write into.
      only: the branch's modality; "" if there is one branch alone.

    Returns:
      The class that it became, and what differs there.

    Raises:
      BundleError: there is no such branch, more than one to choose from, or a part that transformers' models lack.
    """
    import transformers

    if (len(model.branches) != 1 and not only) or (only and only not in model.branches):
        raise BundleError(
            f"transformers has models of one modality, and this bundle has {len(model.branches)} branches "
            f"({', '.join(model.branches)}): choose one of them by --only."
        )
    branch = model.branches[only or next(iter(model.branches))]
    name = _family(branch)
    llm, tokenizer = model.llm, model.llm.tokenizer
    if MEDIA_TOKEN not in tokenizer.get_vocab():
        raise BundleError(
            f"The LLM's tokenizer lacks the token {MEDIA_TOKEN}, in whose place transformers puts soft tokens: add it, and "
            "a row to the LLM's embeddings, before training."
        )
    vision = getattr(transformers, f"{name}VisionConfig")
    config = getattr(transformers, f"{name}Config")(
        vision_config={**branch.encoder.module.model.config.to_dict(), "model_type": vision.model_type},
        qformer_config=_qformer_config(branch, vocab_size=len(branch.bridge.tokenizer or ())),
        text_config=llm.model.config.to_dict(),
        num_query_tokens=branch.bridge.config.num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids(MEDIA_TOKEN),
    )
    with torch.device("meta"):
        theirs = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    theirs.load_state_dict(_weights(model, branch, theirs), strict=True, assign=True)
    theirs.tie_weights()
    theirs.generation_config = llm.model.generation_config
    theirs.save_pretrained(made_folder(folder))
    _processor(branch, tokenizer, f"{name}Processor").save_pretrained(folder)
    return type(theirs).__name__, _differences(model.router, branch)


def _family(branch: Branch) -> str:
    """Tells which family a branch can join; features must come out of the end of the vision model that both have."""
    bridge, encoder = branch.bridge, branch.encoder.module
    _refuse(branch, bridge.name != "qformer", f"its bridge is of the kind {bridge.name}")
    family = "InstructBlip" if bridge.config.instruction_aware else "Blip2"
    goal = f"{family}ForConditionalGeneration"
    _refuse(branch, goal not in branch.modality.transformers_models, f"{goal} does not read its media")
    _refuse(branch, bridge.config.max_segments > 0, "its bridge has positions of segments")
    kind = type(getattr(encoder, "model", encoder)).__name__
    _refuse(branch, kind not in ("InstructBlipVisionModel", "Blip2VisionModel"), f"its encoder is a {kind}")
    own_norm = bridge.config.features_layer_norm
    at_end = encoder.layer in (None, -1) and encoder.num_dropped == 0 and own_norm == (encoder.layer == -1)
    _refuse(branch, not at_end, "between its encoder's last layer and its Q-Former stands not one layer norm")
    return family


def _refuse(branch: Branch, is_fault: bool, what: str) -> None:
    if is_fault:
        raise BundleError(
            f"The {branch.modality.name} branch cannot become a model of transformers, since {what}; InstructBLIP and "
            "BLIP-2 have a Q-Former behind the final norm of their own vision model."
        )


def _differences(router: Router, branch: Branch) -> list[str]:
    """What a user of the written model must know."""
    notes = []
    media, instruction = Media(branch.modality.name, None), "INSTRUCTION"
    bos = [router.llm.tokenizer.bos_token_id] if router.llm.begins_with_bos() else []
    end = router.llm.prompt_end()
    laid = [piece for piece in router.pieces(Sample(instruction, [media])) if piece != ""]
    if laid != [media, *bos, instruction, *end]:
        decode = router.llm.tokenizer.decode
        shown = [MEDIA_TOKEN if part is media else part if isinstance(part, str) else decode(part) for part in laid]
        notes.append(
            "transformers' processor gives the media and then the text, and nothing else; lay out input_ids as this "
            f"model's prompts are: {''.join(shown)!r}"
        )
    if branch.bridge.config.features_layer_norm:
        notes.append("the layer norm before the Q-Former counts with an epsilon of 1e-6 there, and of 1e-5 here")
    return notes


def _qformer_config(branch: Branch, *, vocab_size: int) -> dict[str, Any]:
    bridge = branch.bridge.config
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size cross_attention_frequency".split()
    sizes = {name: getattr(bridge, name) for name in names}
    sizes |= {"encoder_hidden_size": branch.encoder.width, "layer_norm_eps": 1e-12}
    return sizes | ({"vocab_size": vocab_size} if vocab_size else {})


def _weights(model: XBlip, branch: Branch, theirs: nn.Module) -> dict[str, Tensor]:
    """All weights under their names in transformers, in the LLM's dtype."""
    vision = branch.encoder.module.model.state_dict()
    if branch.bridge.config.features_layer_norm:
        vision |= {f"post_layernorm.{name}": value for name, value in branch.bridge.layer_norm.state_dict().items()}
    parts = {
        "vision_model.": vision,
        "language_model.": model.llm.model.state_dict(),
        "language_projection.": branch.bridge.projector.state_dict(),
        "qformer.": branch.bridge.qformer.state_dict(),
        "": {"query_tokens": branch.bridge.query_tokens.data},
    }
    weights = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    if "qformer.layernorm.weight" in theirs.state_dict():  # BLIP-2's place of the same
        ours, place = "qformer.embeddings.layernorm.", "qformer.layernorm."
        weights = {name.replace(ours, place): value for name, value in weights.items()}
    return {name: value.to(model.llm.dtype) if value.is_floating_point() else value for name, value in weights.items()}


def _processor(branch: Branch, tokenizer: Any, name: str) -> Any:
    import transformers

    images = transformers.AutoImageProcessor.from_pretrained(branch.modality.config.encoder)
    tokenizers = [tokenizer, branch.bridge.tokenizer] if branch.bridge.tokenizer else [tokenizer]
    return getattr(transformers, name)(images, *tokenizers, num_query_tokens=branch.bridge.config.num_query_tokens)
