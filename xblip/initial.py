"""Initial weights: what a fresh bridge takes from a trained branch or a converted checkpoint, and what it does not.

Only weights of one name and shape are taken, so that another modality's bridge, or BERT, may be started from; what was not
taken is told, since a bridge that silently starts from nothing looks like one that learns slowly.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from xblip.bridge import WEIGHTS, Bridge
from xblip.errors import BundleError

PER_WORD = ("word_embeddings.weight", "language_head.bias")
"""Ends of names of weights that have a row for each word."""


@dataclass
class InitConfig:
    """Where a bridge starts from.

    Attributes:
      folder: of a branch, or what `xblip convert` made of a checkpoint; "" for fresh weights.
      without: parts of names of weights that start afresh all the same, e.g. ["attention", "projector"].
    """

    folder: str = ""
    without: list[str] = field(default_factory=list)


@dataclass
class Taken:
    """What became of initial weights, by name.

    Attributes:
      loaded: taken.
      fresh: the bridge's, which the folder lacks or has in another shape, or that were to start afresh.
      left_out: the folder's, which the bridge has not.
    """

    loaded: list[str]
    fresh: list[str]
    left_out: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} weights taken"]
        lines += [
            f"{what}: {_families(names)}"
            for what, names in (("fresh", self.fresh), ("left out", self.left_out))
            if names
        ]
        return "; ".join(lines)


def initialise(bridge: Bridge, folder: str | Path, *, without: Sequence[str] = ()) -> Taken:
    """Gives a bridge the weights of a folder that fit it.

    Raises:
      BundleError: there are none in the folder, they are damaged, or not one fits.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder, WEIGHTS)
    if not path.is_file():
        raise BundleError(
            f"There are no initial weights in {folder}: it lacks {WEIGHTS}. Give a branch's folder, or one that `xblip "
            "convert` wrote."
        )
    try:
        found = load_file(path)
    except SafetensorError as cause:
        raise BundleError(f"{path} is damaged: {cause}. Copy it again.") from cause
    own = bridge.state_dict()
    wanted = [name for name in found if name in own and not any(part in name for part in without)]
    fitting = {name: value for name in wanted if (value := _fitted(name, found[name], own[name])) is not None}
    if not fitting:
        raise BundleError(f"Not one weight of {path} fits this bridge: it is of other sizes, or of another kind.")
    bridge.load_state_dict(fitting, strict=False)
    return Taken(
        sorted(fitting), [name for name in own if name not in fitting], [name for name in found if name not in own]
    )


def begin_alike(bridges: Iterable[Bridge]) -> None:
    """Lets bridges of one kind begin with equal weights where they may share them (`Bridge.shared`), those that train."""
    first: dict[str, dict[str, Tensor]] = {}
    for bridge in bridges:
        own = {name: weight for name, weight in bridge.named_parameters() if name.split(".")[0] in bridge.shared}
        if own and all(weight.requires_grad for weight in own.values()):
            given = first.setdefault(bridge.name, own)
            if _shapes(given) == _shapes(own):
                bridge.load_state_dict(given, strict=False)


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


def _fitted(name: str, value: Tensor, own: Tensor) -> Tensor | None:
    """A weight as the bridge takes it, None if it cannot; [DEC], a vocabulary's last word, may be in one of both alone."""
    if value.shape == own.shape:
        return value
    if name.endswith(PER_WORD) and value.shape[1:] == own.shape[1:] and abs(len(value) - len(own)) == 1:
        known = min(len(value), len(own))
        return torch.cat([value[:known], own[known:].to(value)])
    return None


def _families(names: Sequence[str]) -> str:
    """Names counted by what they are part of, layers of one network taken together."""
    counted = Counter(".".join(part for part in name.split(".")[:-1] if not part.isdigit()) or name for name in names)
    return ", ".join(f"{family} ({count})" for family, count in counted.items())
