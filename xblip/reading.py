"""Media read once for many questions: features by what a source holds, soft prompts by features and instruction.

A soft prompt is kept under its instruction where the bridge reads it: of a cache by media alone, an instruction-aware bridge
would give the second question the first one's prompt.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xblip.branch import Branch, without_half_precision
from xblip.bridge import Bridge
from xblip.caches import Caches
from xblip.contents import KnownFiles, describe
from xblip.errors import InputError, MediaError
from xblip.media import held
from xblip.modality import Features
from xblip.sample import Sample, by_modality
from xblip.weights import WeightVersions


class ReadMedia(dict[str, Tensor]):
    """What a modality read of one source, with what tells the source from others.

    Attributes:
      content: of whatever was read; equal if and only if that is.
    """

    def __init__(self, tensors: Mapping[str, Tensor], content: bytes):
        super().__init__(tensors)
        self.content = content


class MediaReader:
    """Reads media for the branches of one model, by its caches."""

    def __init__(self, branches: Mapping[str, Branch], caches: Caches):
        self.branches = branches
        self.caches = caches
        self._files = KnownFiles()
        self._weights = WeightVersions()

    def key(self, name: str, source: Any) -> bytes | None:
        """Returns what tells a source's features from others, by its content; None if an object does not say what it holds.

        Raises:
          MediaError: a file cannot be read.
        """
        if isinstance(source, Features):
            return source.key
        content = self._content(source)
        if content is None:
            return None
        branch = self.branches[name]
        settings = [name, asdict(branch.modality.config), next(branch.bridge.parameters()).dtype]
        return _hash(content, self._weights.of(branch.encoder), json.dumps(settings, default=str).encode())

    @torch.no_grad()
    def encode(self, name: str, sources: Sequence[Any]) -> list[Features]:
        """Gives the frozen features of sources of one modality, each with its key.

        Raises:
          MediaError: one cannot be read, or changed meanwhile.
        """
        sources = [held(source, kind=name) for source in sources]
        found = [self.key(name, source) for source in sources]
        keys = [key or os.urandom(16) for key in found]

        def make(places: list[int]) -> list[Features]:
            items = self.branches[name].encode([sources[place] for place in places]).split()
            for place in places:
                source = sources[place]
                if isinstance(source, (str, Path, list, tuple)) and self.key(name, source) != found[place]:
                    raise MediaError(f'Cannot read "{describe(source)}": it changed while it was read. Ask again.')
            return [replace(_own(item), key=keys[place]) for item, place in zip(items, places, strict=True)]

        return self.caches.features.get_or_make(keys, make)

    def hold(self, sample: Sample) -> Sample:
        """Returns a sample whose open files are held, so that it can be read several times.

        Raises:
          MediaError: one cannot be read.
        """
        return sample.changed(lambda _, part: part.with_source(held(part.source, kind=part.modality)))

    def encoded(self, samples: Sequence[Sample]) -> list[Sample]:
        """Returns samples whose sources are features, those of a modality encoded together."""
        found: dict[tuple[int, int], Features] = {}
        for name, inputs in by_modality(samples).items():
            features = self.encode(name, [part.source for part in inputs])
            found.update(((part.row, part.column), own) for part, own in zip(inputs, features, strict=True))
        return [
            sample.changed(lambda column, part, row=row: part.with_source(found[row, column]))
            for row, sample in enumerate(samples)
        ]

    @torch.no_grad()
    def soft_prompts(
        self, name: str, features: Sequence[Features], instructions: Sequence[str]
    ) -> list[tuple[Tensor, bytes]]:
        """Makes the soft prompts of B items in the light of B instructions.

        Args:
          name: of the modality.
          features: from `encode`; an item may come several times.
          instructions: one for each.

        Returns:
          (L, D_llm) each, with a key that equal ones share.
        """
        bridge = self.branches[name].bridge
        version = self._version(bridge)
        weights = next(bridge.parameters())
        features = [item.to(weights) for item in features]
        asked = instructions if bridge.reads_instructions else [""] * len(features)
        keys = [_hash(item.key, version, text.encode()) for item, text in zip(features, asked, strict=True)]

        def make(places: list[int]) -> list[Tensor]:
            made: dict[int, Tensor] = {}
            for group in _alike([features[place].key for place in places], [features[place] for place in places]):
                turns = list(zip(*([places[index] for index in item] for item in group), strict=True))
                media = self._read(bridge, version, [features[place] for place in turns[0]])
                softs = bridge.read_instructions(media, [asked[place] for turn in turns for place in turn])
                made.update(zip((place for turn in turns for place in turn), map(_own, softs), strict=True))
            return [made[place] for place in places]

        with without_half_precision(features[0].values.device.type):
            return list(zip(self.caches.prompts.get_or_make(keys, make), keys, strict=True))

    def _content(self, source: Any) -> bytes | None:
        if isinstance(source, ReadMedia):
            return source.content
        try:
            return self._files.key(source)
        except InputError:
            return None

    def _read(self, bridge: Bridge, version: bytes, features: Sequence[Features]) -> Any:
        """Does the part of a bridge's work that no instruction changes, as one for all items."""
        keys = [("read", item.key, version) for item in features]

        def make(places: list[int]) -> list[Any]:
            return [bridge.read_media(features[place]) for place in places]

        if not bridge.reads_instructions:
            return bridge.read_media(Features.join(features))
        parts = self.caches.prompts.get_or_make(keys, make)
        return type(parts[0]).join(parts)

    def _version(self, bridge: Bridge) -> bytes:
        """Tells a bridge's weights from what they were before, and from other bridges'; in training it is new each time."""
        return os.urandom(16) if bridge.training else self._weights.of(bridge)


def _alike(keys: Sequence[bytes], features: Sequence[Features]) -> list[list[list[int]]]:
    """Groups places: those of one item together, then items that are asked about equally often and have as many tokens."""
    items: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        items.setdefault(key, []).append(index)
    groups: dict[tuple[int, int], list[list[int]]] = {}
    for places in items.values():
        groups.setdefault((len(places), features[places[0]].values.shape[1]), []).append(places)
    return list(groups.values())


def _own(value: Any) -> Any:
    """Copies what is a view of a batch, so that keeping it does not keep the batch."""
    if isinstance(value, Features):
        return Features(value.values.clone(), value.mask.clone(), value.segments)
    return value.clone()


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
