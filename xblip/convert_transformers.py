"""Models of `transformers` of the BLIP-2 and LLaVA families, taken apart into a bundle.

transformers itself loads the source, so that its knowledge of old names, shards and tied weights is used; the parts then
become an encoder folder, a bridge and an LLM folder.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xblip import plugins
from xblip.branch import Branch, BranchConfig, made_folder
from xblip.checkpoint import Checkpoint
from xblip.errors import BundleError, suggest
from xblip.llm import FrozenLLM, LLMConfig
from xblip.loading import LOADING_ERRORS, first_line, load_model
from xblip.model import XBlip
from xblip.router import Bos

LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}USER: {{ message.content }} "
    "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass
class Parts:
    """A foreign model taken apart.

    Attributes:
      vision: its media encoder, a transformers model.
      bridge: settings of the bridge, `kind` among them.
      weights: of the bridge, by our names.
      encoder: settings of the modality that say how the encoder is used.
      router: how it lays out prompts, beside what its tokenizer says.
      template: a chat template to give its tokenizer, or "".
    """

    vision: nn.Module
    bridge: dict[str, Any]
    weights: dict[str, Tensor]
    encoder: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    template: str = ""


def modality_of(architecture: str) -> str:
    """Returns the name of the installed modality that reads the media of a class of transformers.

    Raises:
      BundleError: none does.
    """
    known: dict[str, str] = {}
    for name in plugins.names("modality"):
        known.update(dict.fromkeys(plugins.get("modality", name).transformers_models, name))
    if architecture not in known:
        raise BundleError(
            f'Models of the class "{architecture or "?"}" cannot be converted.{suggest(architecture, known)} Install '
            "the modality's plugin if it lacks."
        )
    return known[architecture]


def from_transformers(checkpoint: Checkpoint, folder: Path, *, only: str = "", llm: str = "") -> str:
    """Makes a bundle of a model of transformers.

    Args:
      checkpoint: its folder.
      folder: to write into.
      only: the modality that is wanted; "" for the one it has.
      llm: hub id or folder of the same LLM, to be taken from there (a hub id is named, not copied); "" takes the source's.

    Returns:
      What it made.

    Raises:
      BundleError: its class is unknown, it reads another modality, it lacks weights, or a processor or tokenizer beside
        them, or its LLM is not the one that `llm` names.
    """
    modality, model, processor = load_whole(checkpoint, only=only)
    made_folder(folder)
    tokenizer = processor.tokenizer
    reader = _named_llm(model, tokenizer, llm) if llm else _saved_llm(model, tokenizer, folder / "llm")
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        parts = take_apart(model, processor, Path(staging))
        if parts.template and not llm:
            reader.tokenizer.chat_template = parts.template
            reader.tokenizer.save_pretrained(folder / "llm")
        branch = _branch(modality, parts, processor, Path(staging), reader)
        bos = Bos.instruction if reader.begins_with_bos() else Bos.none  # as their processors: after the media
        router = {"cues": False, "bos": bos.value, **parts.router}
        bundle = XBlip(llm=reader, branches={modality: branch}, router=router).eval()
        bundle.save_pretrained(folder)
    checkpoint.taken.update(checkpoint.tensors)
    return f"bundle: {modality}"


def load_whole(checkpoint: Checkpoint, *, only: str) -> tuple[str, nn.Module, Any]:
    """Loads a model of transformers.

    Returns:
      Its modality's name, the model, and the processor beside it.

    Raises:
      BundleError: its class is unknown, it reads another modality than `only`, it lacks weights, or its processor.
    """
    import transformers

    modality = modality_of(checkpoint.architecture)
    if only not in ("", modality):
        raise BundleError(f"{checkpoint.path} reads the modality {modality} alone, not {only}.")
    model_class = getattr(transformers, checkpoint.architecture)
    try:
        config = model_class.config_class.from_pretrained(checkpoint.path)
        model, missing, surplus = load_model(model_class, str(checkpoint.path), config, dtype="auto")
        processor = transformers.AutoProcessor.from_pretrained(checkpoint.path)
    except LOADING_ERRORS as cause:
        raise BundleError(f"Cannot load {checkpoint.path} by transformers: {first_line(cause)}") from cause
    for what, names in (("lacks {} weights", missing), ("holds {} weights too many", surplus)):
        if names:
            raise BundleError(
                f"{checkpoint.path} is not a whole {checkpoint.architecture}: it "
                f"{what.format(len(names))}, among them {min(names)}."
            )
    return modality, model.eval(), processor


def take_apart(model: nn.Module, processor: Any, staging: Path) -> Parts:
    """Finds the parts of a model of transformers by how it is built; `staging` takes the Q-Former's tokenizer."""
    if hasattr(model, "qformer"):
        tokenizer = getattr(processor, "qformer_tokenizer", None)
        known = model.config.qformer_config.vocab_size
        if tokenizer is not None and len(tokenizer) != known:
            raise BundleError(
                f"Its Q-Former knows {known} tokens, and the tokenizer beside it {len(tokenizer)}: save the "
                "processor that belongs to it."
            )
        return qformer_parts(model, tokenizer, staging)
    return _llava_parts(model)


def qformer_parts(model: nn.Module, tokenizer: Any, staging: Path) -> Parts:
    """Finds the parts of a model with a Q-Former; `tokenizer` is the Q-Former's, None for one that reads no texts."""
    config = model.config.qformer_config
    if config.hidden_act != "gelu" or config.layer_norm_eps != 1e-12:
        raise BundleError(f"Its Q-Former has {config.hidden_act} and layer_norm_eps {config.layer_norm_eps}.")
    bridge = {
        "kind": "qformer",
        "instruction_aware": tokenizer is not None,
        "num_query_tokens": model.config.num_query_tokens,
        "features_layer_norm": False,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "cross_attention_frequency": config.cross_attention_frequency,
        "max_segments": 0,
    }
    if tokenizer is not None:
        tokenizer.save_pretrained(staging / "tokenizer")
        bridge |= {"tokenizer": str(staging / "tokenizer"), "max_instruction_tokens": config.max_position_embeddings}
    weights = {"query_tokens": model.query_tokens.data}
    for name, value in model.qformer.state_dict().items():
        weights["qformer." + ("embeddings." if name.startswith("layernorm.") else "") + name] = value
    if hasattr(model, "language_projection"):
        weights |= _prefixed("projector.", model.language_projection.state_dict())
    return Parts(model.vision_model, bridge, weights)


def _llava_parts(model: nn.Module) -> Parts:
    config = model.config
    if not isinstance(config.vision_feature_layer, int) or config.projector_hidden_act != "gelu":
        raise BundleError(
            f"Its projector reads the layers {config.vision_feature_layer} with {config.projector_hidden_act}; expected "
            "one layer and gelu, as in LLaVA-1.5."
        )
    projector = model.model.multi_modal_projector
    weights = {
        f"projector.{place}.{name}": value
        for place, layer in ((0, projector.linear_1), (2, projector.linear_2))
        for name, value in layer.state_dict().items()
    }
    encoder = {"layer": config.vision_feature_layer, "drop_cls": config.vision_feature_select_strategy == "default"}
    router = {"separator": "\n", "chat_template": True}
    return Parts(model.model.vision_tower, {"kind": "mlp"}, weights, encoder, router, LLAVA_TEMPLATE)


def _image_processor(processor: Any) -> Any:
    """What reads one picture or frame; of a processor of videos the same for single frames."""
    from transformers import BlipImageProcessor

    own = getattr(processor, "image_processor", None)
    if own is not None:
        return own
    settings = processor.video_processor.to_dict()
    names = BlipImageProcessor().to_dict().keys() - {"image_processor_type", "processor_class", "data_format", "device"}
    return BlipImageProcessor(**{name: settings[name] for name in names if settings.get(name) is not None})


def _prefixed(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def _language_model(model: nn.Module) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if hasattr(model, "language_model"):
        return model.language_model
    with torch.device("meta"):  # LLaVA keeps its head apart
        language_model = AutoModelForCausalLM.from_config(model.config.text_config)
    weights = _prefixed("model.", model.model.language_model.state_dict())
    weights |= _prefixed("lm_head.", model.lm_head.state_dict())
    language_model.load_state_dict(weights, strict=True, assign=True)
    language_model.generation_config = model.generation_config
    return language_model


def _saved_llm(model: nn.Module, tokenizer: Any, folder: Path) -> FrozenLLM:
    language_model = _language_model(model)
    language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return FrozenLLM(language_model, tokenizer, config=LLMConfig(source=str(folder)))  # not loaded again: it is large


def _named_llm(model: nn.Module, tokenizer: Any, source: str) -> FrozenLLM:
    """Loads the LLM that is to stand for the model's own, after a look whether it is the same."""
    llm = FrozenLLM.from_pretrained(LLMConfig(source=source))
    own, named = _language_model(model).state_dict(), llm.model.state_dict()
    same = own.keys() == named.keys() and all(torch.equal(own[name], named[name]) for name in own)
    if not same or tokenizer.get_vocab() != llm.tokenizer.get_vocab():
        raise BundleError(
            f'The LLM "{source}" is not the one of this model: its {"vocabulary" if same else "weights"} differ. Leave '
            "--llm out to copy the model's own."
        )
    return llm


def _branch(modality: str, parts: Parts, processor: Any, staging: Path, llm: FrozenLLM) -> Branch:
    encoder = staging / "encoder"
    parts.vision.save_pretrained(encoder)
    _image_processor(processor).save_pretrained(encoder)
    config = BranchConfig(
        modality,
        config={"encoder": str(encoder), **parts.encoder},
        bridge=parts.bridge,
        cue="",
        encoder_dtype="auto",
    )
    branch = Branch.build(config, llm_width=llm.width)
    branch.bridge.load_state_dict({name: value.float() for name, value in parts.weights.items()}, strict=True)
    return branch
