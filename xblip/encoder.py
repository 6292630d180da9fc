"""Frozen networks: the wrapper that keeps them frozen, and encoders that come from `transformers`.

`Frozen` hides its weights from `state_dict` and ignores `train()`, so that neither a checkpoint nor a training loop can
touch them; gradients may still flow through its activations (the LLM needs that), its weights never receive any.
"""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from xblip.errors import BundleError, ConfigError

LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError, SafetensorError)
"""What transformers raises for files that are damaged or missing, and for options it does not know."""
SPECIAL_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""Parameters of transformers' vision models that stand before the patches."""
_LOADED: ContextVar[dict[str, nn.Module] | None] = ContextVar("_LOADED", default=None)
"""While `Encoders` builds one, the models that were loaded, by their source."""


class Frozen(nn.Module):
    """Base of modules that never train: eval mode for ever, no gradients kept, absent from checkpoints."""

    def freeze(self) -> None:
        """Freezes all weights below; call it at the end of a subclass' constructor."""
        self.requires_grad_(False)
        super().train(False)
        self.register_load_state_dict_post_hook(_expect_nothing)

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in eval mode whatever `mode` says."""
        return self

    def state_dict(self, *args, destination: dict | None = None, prefix: str = "", keep_vars: bool = False) -> dict:
        """Is empty: what is frozen is saved by reference or copied as files, never inside a checkpoint."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        self._prefix = prefix
        super()._load_from_state_dict(state_dict, prefix, *args)


def _expect_nothing(frozen: Frozen, keys) -> None:
    """Takes what is frozen off the missing keys, so that a checkpoint without it loads with `strict=True`."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(frozen._prefix)]


class FrozenEncoder(Frozen):
    """A plugin's encoder, frozen, with its output checked.

    Attributes:
      width: D_enc.
      fingerprint: identifies architecture and weights, whatever dtype they are later cast to.
    """

    def __init__(self, module: nn.Module, *, name: str, known_as: str | None = None):
        """Wraps `module`; `name` is the modality's, for messages; `known_as` its fingerprint, if it was cast since."""
        super().__init__()
        self.module = module
        self.name = name
        self.width = int(module.width)
        self.fingerprint = known_as or fingerprint(module)
        self.freeze()

    def takes(self, tensors: dict[str, Any]) -> bool:
        """Whether these are tensors, named as the arguments of the encoder."""
        known = inspect.signature(self.module.forward).parameters
        any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        names = set(getattr(self.module, "input_names", tensors) if any_name else known)
        return bool(tensors) and set(tensors) <= names and all(isinstance(part, Tensor) for part in tensors.values())

    @torch.no_grad()
    def forward(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features (M, N, D_enc) and their boolean mask (M, N).

        Args:
          tensors: of M rows; floats among them are cast to the encoder's `input_dtype` where it has one, and else to
            that of its weights.

        Raises:
          BundleError: the encoder's output has not that shape.
        """
        dtype = getattr(self.module, "input_dtype", None) or _dtype(self.module)
        output = self.module(
            **{name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        )
        values, mask = output if isinstance(output, tuple) else (output, None)
        rows = next(iter(tensors.values())).shape[0]
        if values.dim() != 3 or values.shape[0] != rows or values.shape[2] != self.width:
            raise BundleError(
                f'The encoder of "{self.name}" returned features of shape {tuple(values.shape)}; '
                f"expected ({rows}, N, {self.width}): one row a segment, its `width` last."
            )
        if mask is None:
            mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        if mask.shape != values.shape[:2]:
            raise BundleError(
                f'The encoder of "{self.name}" returned a mask of shape {tuple(mask.shape)}; expected '
                f"{tuple(values.shape[:2])}, True for each real token of its features."
            )
        return values, mask.bool()


class Encoders:
    """Frozen encoders, each held once: a source named twice is loaded once, and equal encoders are kept once."""

    def __init__(self):
        self._loaded: dict[torch.dtype, dict[str, nn.Module]] = {}
        self._built: list[FrozenEncoder] = []
        self._kept: dict[tuple, FrozenEncoder] = {}

    def build(self, make: Callable[[], nn.Module], *, name: str, dtype: torch.dtype) -> FrozenEncoder:
        """Freezes what `make` builds, in `dtype`; gives an earlier one if its weights and settings are the same."""
        with _loading_into(self._loaded.setdefault(dtype, {})):
            module = make()
        weights, others = _weights(module), [(known, _weights(known.module)) for known in self._built]
        twin = next((known for known, held in others if held == weights), None)
        if twin is None and any(set(held.values()) & set(weights.values()) for _, held in others):
            module = make()  # holds weights that were cast already, and a fingerprint is of weights as stored
        frozen = FrozenEncoder(module, name=name, known_as=twin and twin.fingerprint).to(dtype)
        self._built.append(frozen)
        return self._kept.setdefault((frozen.fingerprint, dtype, _settings(module)), frozen)


@contextmanager
def _loading_into(loaded: dict[str, nn.Module]) -> Iterator[None]:
    token = _LOADED.set(loaded)
    try:
        yield
    finally:
        _LOADED.reset(token)


def _weights(module: nn.Module) -> dict[str, int]:
    """Which tensors a network holds, by name; equal for two that share them all."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: id(tensor) for name, tensor in named}


def _settings(module: nn.Module) -> str:
    """What makes a network behave as it does beside its weights: its parts' classes and plain attributes."""
    return repr(
        [
            (name, type(part), {key: value for key, value in vars(part).items() if _is_setting(key, value)})
            for name, part in module.named_modules()
        ]
    )


def _is_setting(key: str, value: Any) -> bool:
    """Whether an attribute is a plain value; transformers also notes where a model came from, which is none."""
    return isinstance(value, (str, float, int, tuple)) and key != "name_or_path"


class TransformersEncoder(nn.Module):
    """Any `transformers` encoder with a `last_hidden_state`, as a modality's encoder.

    Convolutional models, whose hidden state is (M, D_enc, H, W), give their grid as N = H * W tokens. Models that take
    pictures of any size as padded patches (SigLIP 2 NaFlex) give a mask, False for the padding.

    Attributes:
      model: the transformers model.
      width: D_enc, from the model's config.
      input_names: the tensors it takes: `input_name`, e.g. "pixel_values", and others that the model cannot do without.
      input_dtype: what floats are given in; None for the dtype of the weights.
      layer: which of transformers' `hidden_states` are the tokens; None for `last_hidden_state`.
      num_dropped: tokens left out before the patches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_name: str,
        input_dtype: torch.dtype | None = None,
        layer: int | None = None,
        drop_cls: bool = False,
    ):
        """Wraps a model; see `from_pretrained` for the arguments."""
        super().__init__()
        self.model = model
        self.input_names = (input_name, *_required(model, input_name))
        self.input_dtype = input_dtype
        self.width = _width(model.config)
        self.layer = _checked_layer(layer, model.config)
        self.num_dropped = _count_special_tokens(model) if drop_cls else 0

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        input_name: str,
        input_dtype: torch.dtype | None = None,
        layer: int | None = None,
        drop_cls: bool = False,
    ) -> "TransformersEncoder":
        """Loads a folder or hub id through `AutoModel`; of a two-tower model (CLIP, SigLIP) its vision part.

        A pooler or a mask for training that the weights lack (as in a classifier's) is set to zero: it is not used, and
        random weights would give the same encoder another fingerprint each time. Other branches may hold the same
        model: wrap it, but do not change it.

        Args:
          source: folder or hub id.
          input_name: the tensor that holds the media.
          input_dtype: what floats are given in; None for the dtype of the weights.
          layer: index into `hidden_states`, as LLaVA's `vision_feature_layer` counts them: 0 the embeddings, -1 the last
            layer's output before any final norm, -2 the one before. None for `last_hidden_state`, after that norm.
          drop_cls: leaves out the tokens that are no patches: [CLS], and register and distillation tokens beside it.

        Raises:
          BundleError: nothing can be loaded from `source`, or weights are missing in it.
          ConfigError: the model has no such layer, or no [CLS] token to drop.
        """
        loaded = _LOADED.get()
        place = os.path.realpath(source) if os.path.isdir(source) else source
        model = _load(source) if loaded is None or place not in loaded else loaded[place]
        if loaded is not None:
            loaded[place] = model
        return cls(model, input_name=input_name, input_dtype=input_dtype, layer=layer, drop_cls=drop_cls)

    @staticmethod
    def image_processor(source: str) -> Callable[[Any], dict[str, Tensor]]:
        """Loads the image processor beside an encoder.

        Returns:
          A function from an RGB picture (PIL) to what the encoder takes: `pixel_values` (1, 3, H, W), or, of an encoder
          for any size, patches (1, P, C) with `pixel_attention_mask` and `spatial_shapes`.

        Raises:
          BundleError: there is none; the function raises it if the processor gives another shape.
        """
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(source)
        except LOADING_ERRORS as cause:
            raise BundleError(
                f'Cannot load the image processor of "{source}": {first_line(cause)} Expected '
                "preprocessor_config.json beside the encoder's weights: put it there by save_pretrained."
            ) from cause
        return _PictureToTensors(processor, source)

    def forward(self, **tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Takes (M, ...), returns (M, N, D_enc), with a mask (M, N) where the tensors hold one."""
        options = {} if self.layer is None else {"output_hidden_states": True}
        try:
            if set(tensors) != set(self.input_names):
                raise ValueError(f"it takes {', '.join(self.input_names)}, not {', '.join(tensors)}")
            output = self.model(**tensors, **options)
        except ValueError as cause:
            raise BundleError(
                f"A {self.model.config.model_type} encoder cannot read what the processor beside it gives: "
                f"{first_line(cause)} Save the processor that belongs to it there."
            ) from cause
        hidden = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden[:, self.num_dropped :]
        mask = tensors.get("pixel_attention_mask")
        return hidden if mask is None else (hidden, mask)


class _PictureToTensors:
    """An image processor for one picture, its output checked; a class, so that data loaders' workers can take it."""

    def __init__(self, processor: Any, source: str):
        self.processor = processor
        self.source = source

    def __call__(self, picture: Any) -> dict[str, Tensor]:
        output = self.processor(images=picture, return_tensors="pt")
        if {"pixel_attention_mask", "spatial_shapes"} <= set(output):
            return {name: output[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
        values = output["pixel_values"]
        if values.dim() != 4 or values.shape[:2] != (1, 3):
            raise BundleError(
                f'The image processor of "{self.source}" gives pixel_values of shape {tuple(values.shape)}; expected '
                "(1, 3, H, W). Choose an encoder that takes one RGB picture."
            )
        return {"pixel_values": values}


def _load(source: str) -> nn.Module:
    """Loads what `TransformersEncoder.from_pretrained` says."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
        model, info = _model_class(config).from_pretrained(source, dtype="auto", output_loading_info=True)
    except LOADING_ERRORS as cause:
        raise BundleError(
            f'Cannot load an encoder from "{source}": {why_not_loaded(source, cause)} '
            "Expected the folder of a transformers model, or a hub id that is reachable or already downloaded."
        ) from cause
    missing = set(info["missing_keys"])
    unused = {name for name in missing if {"pooler", "masked_spec_embed"} & set(name.split("."))}
    if missing - unused:
        raise BundleError(
            f'The encoder "{source}" lacks {len(missing - unused)} weights, among them {min(missing - unused)}: '
            f"they are not a {type(model).__name__}'s. Save the model again with save_pretrained."
        )
    for name in unused:
        model.get_parameter(name).data.zero_()
    tower = getattr(model, "vision_model", None) if hasattr(config, "vision_config") else None
    return tower if tower is not None else model


def _model_class(config) -> type:
    """AutoModel, or the class a config names where AutoModel knows none for it (InstructBLIP's vision model)."""
    import transformers

    if type(config) in transformers.MODEL_MAPPING:
        return transformers.AutoModel
    return getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)


def _dtype(module: nn.Module) -> torch.dtype | None:
    """Dtype of the first floating weights; None where a module has none, and tensors pass as they are."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), None)


def _width(config) -> int:
    """D_enc by a config of transformers: `hidden_size`, or the last of `hidden_sizes` of a convolutional model."""
    width = (getattr(config, "hidden_sizes", None) or [getattr(config, "hidden_size", None)])[-1]
    if not isinstance(width, int):
        raise BundleError(
            f"A {config.model_type} model does not say how wide its features are (hidden_size): choose another encoder."
        )
    return width


def _required(model: nn.Module, input_name: str) -> list[str]:
    """Tensors that a model cannot do without, beside its `input_name`."""
    known = inspect.signature(model.forward).parameters.values()
    named = [part.name for part in known if part.default is part.empty and part.kind is part.POSITIONAL_OR_KEYWORD]
    return [name for name in named if name != input_name]


def _checked_layer(layer: int | None, config) -> int | None:
    """Checks that a model has that layer, and that it is as wide as the last."""
    count = getattr(config, "num_hidden_layers", None) if not getattr(config, "hidden_sizes", None) else None
    if layer is not None and (count is None or not -count - 1 <= layer <= count):
        has = "no layers of one width: leave it out" if count is None else f"{count}: give {-count - 1} to {count}"
        raise ConfigError(f"There is no layer {layer} to take features from: a {config.model_type} model has {has}.")
    return layer


def _count_special_tokens(model: nn.Module) -> int:
    """How many tokens stand before the patches, by the parameters (..., tokens, D_enc) or (D_enc,) that make them."""
    shapes = [
        (1, *weight.shape)[-2] for name, weight in model.named_parameters() if name.split(".")[-1] in SPECIAL_TOKENS
    ]
    count = sum(shapes) + (model.config.model_type == "dinov3_convnext")  # whose [CLS] is the mean of its patches
    if not count:
        raise ConfigError(f"drop_cls cannot be: a {model.config.model_type} model has no [CLS] token. Leave it out.")
    return count


def fingerprint(module: nn.Module) -> str:
    """Identifies a network by its tensors' names, shapes and values, 16 hexadecimal digits.

    Large tensors contribute 512 evenly spaced values each, so that gigabytes take no time; any training changes them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 512)
        values = flat[::step].cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, ended by a full stop, for use inside a longer message."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(". ") if lines else type(error).__name__) + "."


def why_not_loaded(source: str, error: BaseException) -> str:
    """Why transformers cannot load a folder or hub id; a path that leads nowhere is called that."""
    looks_like_a_path = source.count("/") > 1 or source.startswith((".", "/"))
    if looks_like_a_path and not os.path.isdir(source):
        return f"no such folder; relative ones start at {Path.cwd()}."
    return first_line(error)
