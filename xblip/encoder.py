"""Encoders that come from `transformers`, as modalities use them, with the processors beside them."""

import inspect
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xblip.errors import BundleError, ConfigError
from xblip.loading import LOADING_ERRORS, first_line, kept_models, load_model, why_not_loaded

SPECIAL_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""Parameters of transformers' vision models that stand before the patches."""


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
        models = kept_models()
        place = os.path.realpath(source) if os.path.isdir(source) else source
        if place not in models:
            models[place] = _load(source)
        return cls(models[place], input_name=input_name, input_dtype=input_dtype, layer=layer, drop_cls=drop_cls)

    @staticmethod
    def image_processor(source: str) -> Callable[[Any], dict[str, Tensor]]:
        """Loads the image processor beside an encoder.

        Returns:
          A function from an RGB picture (PIL) to what the encoder takes: `pixel_values` (1, 3, H, W), or, of an encoder
          for any size, patches (1, P, C) with `pixel_attention_mask` and `spatial_shapes`. Its method `seen` gives the
          pictures (PIL) that an encoder sees in such tensors.

        Raises:
          BundleError: there is none; the function raises it if the processor gives another shape.
        """
        from transformers import AutoImageProcessor

        processor = TransformersEncoder.read_beside(
            AutoImageProcessor,
            source,
            failure=f'Cannot load the image processor of "{source}"',
            expected="preprocessor_config.json beside the encoder's weights: put it there by save_pretrained.",
        )
        return _PictureToTensors(processor, source)

    @staticmethod
    def seen(values: Sequence[Tensor], processor: Any) -> list[Any]:
        """Makes pictures (PIL) of what a processor of transformers made of them, each (3, H, W) or grey (1, H, W)."""
        import PIL.Image

        normalised = getattr(processor, "do_normalize", False)
        mean, std = (
            torch.tensor(getattr(processor, name) if normalised else plain).reshape(-1, 1, 1)
            for name, plain in (("image_mean", 0.0), ("image_std", 1.0))
        )
        factor = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1.0
        least = -1.0 if 1 / 200 < factor < 1 else 0.0  # ViViT's 1 / 127.5 goes with values from -1 on
        pixels = [((part.float().cpu() * std + mean - least) / factor).round().clip(0, 255).byte() for part in values]
        return [PIL.Image.fromarray(part.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()) for part in pixels]

    @staticmethod
    def read_beside(auto_class: Any, source: str, *, failure: str, expected: str) -> Any:
        """Reads a config or processor that lies beside an encoder's weights, by an Auto class of transformers.

        Raises:
          BundleError: it cannot be read; the message is `failure`, the reason, and what was `expected`.
        """
        try:
            return auto_class.from_pretrained(source)
        except LOADING_ERRORS as cause:
            raise BundleError(f"{failure}: {first_line(cause)} Expected {expected}") from cause

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

    def seen(self, tensors: dict[str, Tensor]) -> list[Any]:
        """Gives the S pictures (PIL) that an encoder sees in what this made: resized and cropped, normalisation undone."""
        values = tensors["pixel_values"].float()
        if "spatial_shapes" in tensors:
            side = math.isqrt(values.shape[-1] // 3)
            grids = zip(values, tensors["spatial_shapes"].tolist(), strict=True)
            parts = [patches[: rows * columns].unflatten(0, (rows, columns)) for patches, (rows, columns) in grids]
            squares = [part.unflatten(-1, (side, side, 3)) for part in parts]
            values = [part.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2) for part in squares]
        return TransformersEncoder.seen(list(values), self.processor)


def _load(source: str) -> nn.Module:
    """Loads what `TransformersEncoder.from_pretrained` says."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
        model, missing, _ = load_model(_model_class(config), source, config, dtype="auto")
    except LOADING_ERRORS as cause:
        raise BundleError(
            f'Cannot load an encoder from "{source}": {why_not_loaded(source, cause)} '
            "Expected the folder of a transformers model, or a hub id that is reachable or already downloaded."
        ) from cause
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
