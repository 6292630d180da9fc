"""The LLM's keys and values, with room to grow: transformers' own cache copies all that it holds for every new token.

What rows begin with may be shared by them, and is then held once.
"""

import functools
from typing import Any

from torch import Tensor

from xblip.media_read import KeysValues
from xblip.shared_attention import AttendToShared

SPARE = 64
"""Positions that are left free at least, when room is made."""


def begun(model: Any, past: KeysValues | None = None, *, rows: int = 1) -> Any:
    """Makes transformers' cache for a model, each of whose rows begins with `past`, as `PromptBatch` has it."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    cache.layers = [_roomy()() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    for index, parts in enumerate(past or ()):
        cache.update(*(part if len(part) == rows else part.expand(rows, -1, -1, -1) for part in parts), index)
    return cache


def begun_together(model: Any, past: KeysValues) -> tuple[Any, AttendToShared]:
    """Makes a cache for rows that share `past`, and the context in which the model must run; for attention by "sdpa"."""
    from transformers import DynamicCache

    attention = AttendToShared()
    cache = DynamicCache(config=model.config)
    cache.layers = [_sharing()(keys, values, attention) for keys, values in past]
    return cache, attention


def is_roomy(cache: Any) -> bool:
    """Whether all layers of a cache of `begun` keep all positions, and nothing but these."""
    return all(type(layer) is _roomy() for layer in cache.layers)


@functools.cache
def _roomy() -> type:
    """The class of layers; transformers is not imported before one is made."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Keys and values are views of buffers with free positions behind them, made anew when these are used up.

        Who puts other tensors in their place, as beam search does, is noticed: room is then made for these.
        """

        _buffers: tuple[Tensor, Tensor] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start = self.keys.shape[-2] if self.keys.numel() else 0
            end = start + key_states.shape[-2]
            if not self._fits(end):
                self._make_room(key_states, value_states, start, end)
            for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, start:end] = new
            self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
            return self.keys, self.values

        def _fits(self, end: int) -> bool:
            if self._buffers is None or end > self._buffers[0].shape[2]:
                return False
            held = zip((self.keys, self.values), self._buffers, strict=True)
            return all(part.data_ptr() == whole.data_ptr() and len(part) == len(whole) for part, whole in held)

        def _make_room(self, keys: Tensor, values: Tensor, start: int, end: int) -> None:
            room = end + max(SPARE, end // 4)
            buffers = [new.new_empty((*new.shape[:2], room, new.shape[3])) for new in (keys, values)]
            if start:
                for buffer, old in zip(buffers, (self.keys, self.values), strict=True):
                    buffer[:, :, :start] = old
            self._buffers = tuple(buffers)

    return RoomyLayer


@functools.cache
def _sharing() -> type:
    class SharingLayer(_roomy()):
        """Holds what comes after a beginning, and tells attention of the beginning whenever the model asks for keys."""

        def __init__(self, keys: Tensor, values: Tensor, attention: AttendToShared):
            super().__init__()
            self.beginning = keys, values
            self.attention = attention

        def get_seq_length(self) -> int:
            return self.beginning[0].shape[2] + super().get_seq_length()

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.attention.begins(*self.beginning)
            states = map(self.attention.apart, (key_states, value_states))
            return super().update(*states, *args, **kwargs)

    return SharingLayer
