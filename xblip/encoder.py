"""Frozen networks: the wrapper that keeps them frozen, and encoders that come from `transformers`.

`Frozen` hides its weights from `state_dict` and ignores `train()`, so that neither a checkpoint nor a training loop can
touch them; gradients may still flow through its activations (the LLM needs that), its weights never receive any.
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from xblip.errors import BundleError

LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError, SafetensorError)
"""What transformers raises for files that are damaged or missing, and for options it does not know."""


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

    def __init__(self, module: nn.Module, *, name: str):
        """Wraps `module`; `name` is the modality's, for messages."""
        super().__init__()
        self.module = module
        self.name = name
        self.width = int(module.width)
        self.fingerprint = fingerprint(module)
        self.freeze()

    def takes(self, tensors: dict[str, Any]) -> bool:
        """Whether these are tensors, named as the arguments of the encoder."""
        known = inspect.signature(self.module.forward).parameters
        any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        names = {getattr(self.module, "input_name", name) for name in tensors} if any_name else set(known)
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


class TransformersEncoder(nn.Module):
    """Any `transformers` encoder that maps one tensor to `last_hidden_state`, as a modality's encoder.

    Convolutional models, whose hidden state is (M, D_enc, H, W), give their grid as N = H * W tokens.

    Attributes:
      model: the transformers model.
      width: D_enc, from the model's config.
      input_name: the one tensor it takes, e.g. "pixel_values".
      input_dtype: what that tensor is given in; None for the dtype of the weights.
    """

    def __init__(self, model: nn.Module, *, input_name: str, input_dtype: torch.dtype | None = None):
        super().__init__()
        self.model = model
        self.input_name = input_name
        self.input_dtype = input_dtype
        self.width = _width(model.config)

    @classmethod
    def from_pretrained(
        cls, source: str, *, input_name: str, input_dtype: torch.dtype | None = None
    ) -> "TransformersEncoder":
        """Loads a folder or hub id through `AutoModel`; of a two-tower model (CLIP, SigLIP) its vision part.

        A pooler or a mask for training that the weights lack (as in a classifier's) is set to zero: it is not used, and
        random weights would give the same encoder another fingerprint each time.

        Raises:
          BundleError: nothing can be loaded from `source`, or weights are missing in it.
        """
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
        return cls(tower if tower is not None else model, input_name=input_name, input_dtype=input_dtype)

    @staticmethod
    def image_processor(source: str) -> Callable[[Any], Tensor]:
        """Loads the image processor beside an encoder.

        Returns:
          A function from an RGB picture (PIL) to `pixel_values` (1, 3, H, W).

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
        return _PictureToTensor(processor, source)

    def forward(self, **tensors: Tensor) -> Tensor:
        """Takes (M, ...), returns (M, N, D_enc)."""
        hidden = self.model(**{self.input_name: tensors[self.input_name]}).last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


class _PictureToTensor:
    """An image processor for one picture, its output checked; a class, so that data loaders' workers can take it."""

    def __init__(self, processor: Any, source: str):
        self.processor = processor
        self.source = source

    def __call__(self, picture: Any) -> Tensor:
        values = self.processor(images=picture, return_tensors="pt")["pixel_values"]
        if values.dim() != 4 or values.shape[:2] != (1, 3):
            raise BundleError(
                f'The image processor of "{self.source}" gives pixel_values of shape {tuple(values.shape)}; expected '
                "(1, 3, H, W). Choose an encoder that takes one RGB picture of a fixed size."
            )
        return values


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
