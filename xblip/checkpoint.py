"""Foreign checkpoints: the tensors and the config of a model that another framework saved.

Read by safetensors, or by torch with `weights_only=True`: a pickle that would run code is refused, not trusted. Files
are mapped into memory, so that naming a checkpoint of gigabytes costs nothing.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from xblip.errors import BundleError, some_of
from xblip.loading import first_sentence, snapshot

INDEX = "model.safetensors.index.json"
HARMLESS = [argparse.Namespace]
"""Classes that published checkpoints pickle beside their tensors, and that hold values alone."""
NESTED = ("model", "state_dict", "module")
"""Keys under which training loops put the weights."""
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Of the files of a hub id that are read."""
OFFLINE = (
    "Offline: download it elsewhere (config.json, *.safetensors and the tokenizer's and processor's files), and give its "
    "folder."
)
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What torch raises for files that are damaged."""


@dataclass
class Checkpoint:
    """A checkpoint, and which of its tensors a conversion has taken.

    Attributes:
      path: its folder or file.
      tensors: by name; those of a folder are read when asked for.
      config: of a transformers folder its config.json, of a file what lies beside the weights in it.
      taken: names that were taken so far.
      left_out: names that were left out, with the reason.
      fresh: names of what was written that it lacks, with what they are instead.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The transformers class that saved it, or ""."""
        return next(iter(self.config.get("architectures") or []), "")

    def take(self, prefix: str = "") -> dict[str, Tensor]:
        """Takes all tensors whose name starts with `prefix`, which is cut off; missing ones are the caller's to miss."""
        names = [name for name in self.tensors if name.startswith(prefix) and name not in self.left_out]
        self.taken.update(names)
        return {name.removeprefix(prefix): self.tensors[name] for name in names}

    def leave_out(self, prefix: str, why: str) -> None:
        """Leaves out all tensors whose name starts with `prefix` and that were not taken."""
        names = [name for name in self.tensors if name.startswith(prefix) and name not in self.taken]
        self.left_out.update(dict.fromkeys(names, why))

    def check_all_used(self) -> None:
        """Raises BundleError for tensors that were neither taken nor left out."""
        forgotten = sorted(set(self.tensors) - self.taken - set(self.left_out))
        if forgotten:
            raise BundleError(
                f"{self.path} holds {len(forgotten)} weights that have no place here, among them {forgotten[0]}: it is "
                "not what it was taken for, or another version of it."
            )

    def check_fit(
        self,
        weights: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
        *,
        what: str,
        advice: str = "Copy it again, or choose a published one.",
        may_lack: Sequence[str] = (),
    ) -> list[str]:
        """Compares weights that were taken with the names and shapes that are expected.

        Args:
          weights: to fit.
          expected: to be filled, on any device.
          what: they are said to be, for the message.
          advice: what to do if they are not.
          may_lack: parts of names that the checkpoint does not know, and that start afresh.

        Returns:
          The names that start afresh.

        Raises:
          BundleError: another name is missing, one is too many, or a shape differs.
        """
        fresh = [name for name in expected if name not in weights and any(part in name for part in may_lack)]
        faults = [f"{name} is missing" for name in expected if name not in weights and name not in fresh]
        faults += [f"{name} has no place" for name in weights if name not in expected]
        faults += [
            f"{name} has shape {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
            for name, value in weights.items()
            if name in expected and value.shape != expected[name].shape
        ]
        if faults:
            told = some_of(faults, between="; ")
            raise BundleError(f"{what} in {self.path} is not whole, or another version's: {told}. {advice}")
        return fresh


class _Folder(Mapping):
    """The tensors of a folder's safetensors files, each read when asked for."""

    def __init__(self, places: dict[str, Path]):
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._places[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read(source: str | Path) -> Checkpoint:
    """Reads a transformers folder or hub id, or a file of weights (.safetensors, .pth, .pt, .bin).

    Raises:
      BundleError: there is none, it is damaged, a part of it is missing, or reading it would run code.
    """
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        path = snapshot(str(source), "checkpoint", advice=OFFLINE, patterns=PATTERNS)
    return _read_folder(path)


def _read_folder(folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise BundleError(f"{folder} holds no transformers model: it lacks config.json. Give the model's own folder.")
    config = _json(folder / "config.json")
    files = [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        places = _json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise BundleError(f"{folder / INDEX} is damaged: it places no weights. Copy it again.")
        files = sorted({folder / name for name in places.values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BundleError(
            f"{folder} lacks {len(missing)} of its {len(files)} files of weights, among them {missing[0]}. Download it "
            "again, whole; weights in other formats than safetensors are to be converted by transformers first."
        )
    places = {name: file for file in files for name in _names(file)}
    return Checkpoint(folder, _Folder(places), config)


def _read_file(path: Path) -> Checkpoint:
    if path.suffix == ".safetensors":
        return Checkpoint(path, _Folder(dict.fromkeys(_names(path), path)))
    _check_start(path)
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (*DAMAGE, UnpicklingError) as cause:
        if code := re.search(r"GLOBAL (\S+)", str(cause)):
            raise BundleError(
                f"{path} is not read: it holds {code[1]} beside tensors and plain values, and reading that would run its "
                "code. Have its state_dict saved alone by someone who trusts it."
            ) from cause
        raise BundleError(
            f"{path} is damaged, or not saved by torch: {first_sentence(cause)}. Copy or download it again, whole."
        ) from cause
    return _unpacked(path, content)


def _unpacked(path: Path, content: Any) -> Checkpoint:
    """Finds the weights in what torch.load gave; the rest becomes the config."""
    config: dict[str, Any] = {}
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((name for name in NESTED if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        config.update({name: value for name, value in content.items() if name != inner})
        content = content[inner]
    tensors = content if isinstance(content, Mapping) else {}
    tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BundleError(f"{path} holds no weights: expected tensors by name, or under {', '.join(NESTED)}.")
    return Checkpoint(path, tensors, config)


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    _check_start(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as cause:
        raise BundleError(f"{file} is damaged: {first_sentence(cause)}. Copy or download it again, whole.") from cause


def _check_start(file: Path) -> None:
    """Refuses what is no file of weights at first sight: an empty one, and text."""
    with file.open("rb") as opened:
        start = opened.read(40)
    if not start:
        raise BundleError(f"{file} is empty. Copy or download it again, whole.")
    if start.isascii() and (text := " ".join(start.decode().split())).isprintable():
        raise BundleError(
            f'{file} is text, not weights: it begins with "{text}". A page of an error or a pointer of git-lfs may stand in '
            "its place: download it again."
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as cause:
        raise BundleError(f"{file} is damaged: {first_sentence(cause)}. Copy it again.") from cause
    if not isinstance(content, dict):
        raise BundleError(f"{file} is damaged: it holds no settings. Copy it again.")
    return content


def _is_zip(path: Path) -> bool:
    """Whether torch saved it in its format since 1.6, which can be mapped into memory."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
