"""Frozen networks: the wrapper that keeps them frozen, and the encoders of a model, each held once.

`Frozen` hides its weights from `state_dict` and ignores `train()`, so that neither a checkpoint nor a training loop can
touch them; gradients may still flow through its activations (the LLM needs that), its weights never receive any.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xblip.errors import BundleError
from xblip.loading import keeping_models


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

    @property
    def num_parameters(self) -> int:
        """How many weights it has."""
        return sum(parameter.numel() for parameter in self.parameters())

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
        self._loaded: dict[torch.dtype | None, dict[str, nn.Module]] = {}
        self._built: list[FrozenEncoder] = []
        self._kept: dict[tuple, FrozenEncoder] = {}

    def build(self, make: Callable[[], nn.Module], *, name: str, dtype: torch.dtype | None) -> FrozenEncoder:
        """Freezes what `make` builds, in `dtype` (None: as stored); gives an earlier one of equal weights and settings."""
        with keeping_models(self._loaded.setdefault(dtype, {})):
            module = make()
        weights, others = _weights(module), [(known, _weights(known.module)) for known in self._built]
        twin = next((known for known, held in others if held == weights), None)
        if twin is None and any(set(held.values()) & set(weights.values()) for _, held in others):
            module = make()  # holds weights that were cast already, and a fingerprint is of weights as stored
        frozen = FrozenEncoder(module, name=name, known_as=twin and twin.fingerprint)
        frozen = frozen if dtype is None else frozen.to(dtype)
        self._built.append(frozen)
        return self._kept.setdefault((frozen.fingerprint, dtype or _dtype(module), _settings(module)), frozen)


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


def _dtype(module: nn.Module) -> torch.dtype | None:
    """Dtype of the first floating weights; None where a module has none, and tensors pass as they are."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), None)


def fingerprint(module: nn.Module) -> str:
    """Identifies a network by its tensors' names, shapes and values, 16 hexadecimal digits.

    Large tensors contribute 512 evenly spaced values each, so that gigabytes take no time; any training changes them.
    Those of a skeleton have no values: which memory they would share tells two skeletons apart.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta:
            digest.update(str(tensor.untyped_storage()._cdata).encode())
            continue
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 512)
        values = flat[::step].cpu()
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers reads of a folder; others may lie there too."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return sorted(folder.glob("model.safetensors"))
    return sorted(folder / name for name in set(json.loads(index.read_text())["weight_map"].values()))


def fingerprint_of_files(files: list[Path]) -> str:
    """Like `fingerprint`, from safetensors files: names, shapes and up to 512 values of every tensor's first row."""
    from safetensors import safe_open

    entries = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                piece = tensors.get_slice(name)
                shape = piece.get_shape()
                values = piece[:1] if shape else tensors.get_tensor(name)
                flat = values.reshape(-1)[:512].contiguous()
                entries.append((name, tuple(shape), flat.view(torch.uint8).numpy().tobytes()))
    digest = hashlib.sha256()
    for name, shape, data in sorted(entries):
        digest.update(f"{name} {shape}".encode() + data)
    return digest.hexdigest()
