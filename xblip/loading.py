"""Loading models of `transformers`: what can go wrong, models that are kept to be shared, and skeletons without weights."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from xblip.errors import BundleError

LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError, SafetensorError)
"""What transformers raises for files that are damaged or missing, and for options it does not know."""
FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".yaml", ".yml")
"""Endings of files, which no hub id has."""
_KEPT: ContextVar[dict[str, nn.Module] | None] = ContextVar("_KEPT", default=None)
_SKELETONS: ContextVar[bool] = ContextVar("_SKELETONS", default=False)


@contextmanager
def keeping_models(models: dict[str, nn.Module]) -> Iterator[None]:
    """Lets `kept_models` give this dictionary of models by their source."""
    token = _KEPT.set(models)
    try:
        yield
    finally:
        _KEPT.reset(token)


def kept_models() -> dict[str, nn.Module]:
    """Models that were loaded already, by source; an empty dictionary outside of `keeping_models`."""
    models = _KEPT.get()
    return {} if models is None else models


@contextmanager
def skeletons() -> Iterator[None]:
    """Lets `load_model` and `load_weights` read configs and shapes alone, and build everything on the meta device."""
    token = _SKELETONS.set(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        _SKELETONS.reset(token)


def is_killed_worker(cause: RuntimeError) -> bool:
    """Whether an error is what torch raises when a process of a data loader was killed."""
    return "DataLoader worker" in str(cause)


def load_model(model_class: Any, source: str, config: Any, **options: Any) -> tuple[nn.Module, set[str], set[str]]:
    """Loads a model of transformers.

    Args:
      model_class: an Auto class, or a model's own.
      source: folder or hub id.
      config: of the model there.
      options: passed on to `from_pretrained`.

    Returns:
      The model, the names of its weights that the source lacks, and of those there that it has not.

    Raises:
      LOADING_ERRORS: whatever is wrong there, a weight of another shape than the config says among it.
    """
    if _SKELETONS.get():
        build = getattr(model_class, "from_config", None) or model_class._from_config
        dtype = options.get("dtype", "auto")
        return build(config, **({} if dtype == "auto" else {"dtype": dtype})), set(), set()
    model, info = model_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"], key=str)
        raise ValueError(f"{name} has the shape {tuple(found)}, and config.json says {tuple(expected)}.")
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file; inside of `skeletons` its names and shapes alone.

    Raises:
      SafetensorError: the file is damaged.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    if not _SKELETONS.get():
        return load_file(path)
    with safe_open(path, framework="pt") as tensors:
        return {name: torch.empty(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def snapshot(source: str, what: str, *, advice: str, patterns: Sequence[str] | None = None) -> Path:
    """Downloads a hub id, as far as it is not here already, and returns its folder.

    Args:
      source: of which there is no file or folder.
      what: it should hold, for the message.
      advice: what to do if the hub cannot give it.
      patterns: of the files that are needed; None for all.

    Raises:
      BundleError: it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    missing = f'There is no {what} "{source}": no such file or folder'
    if _looks_like_a_path(source):
        raise BundleError(f"{missing}; relative ones start at {Path.cwd()}.")
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as cause:
        raise BundleError(f"{missing}, and the hub cannot give it ({first_sentence(cause)}). {advice}") from cause


def cached_snapshot(source: str, revision: str | None = None) -> Path | None:
    """Returns where a hub id lies in the local cache, None if it does not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _looks_like_a_path(source: str) -> bool:
    return source.count("/") > 1 or source.startswith((".", "/", "~")) or source.endswith(FILES)


def first_sentence(error: Exception) -> str:
    """The first sentence of what a library says, in one line and without its full stop."""
    return first_line(error).split(". ")[0].removesuffix(".")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, ended by a full stop, for use inside a longer message."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(". !") if lines else type(error).__name__) + "."


def why_not_loaded(source: str, error: BaseException) -> str:
    """Why transformers cannot load a folder or hub id; a path that leads nowhere is called that."""
    if _looks_like_a_path(source) and not os.path.isdir(source):
        return f"no such folder; relative ones start at {Path.cwd()}."
    return first_line(error)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file that others may read as they may any new file; the library keeps it to its owner."""
    file.touch()
    mode = file.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    file.chmod(mode)
