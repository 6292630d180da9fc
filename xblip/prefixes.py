"""How prompts begin, read once by the LLM: keys and values of the positions that a prompt has in common with earlier ones.

A prompt is told by one number for each of its positions, so that two prompts begin alike exactly as far as these numbers do.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xblip import trials
from xblip.caches import ByteCache
from xblip.kv_cache import begun
from xblip.llm import FrozenLLM, PromptBatch
from xblip.media_read import KeysValues
from xblip.weights import WeightVersions


@dataclass(frozen=True)
class Prompt:
    """What the LLM reads of one sample.

    Attributes:
      embeds: (T, D_llm).
      units: (T,) int64, equal where embeddings are: token ids, and numbers below 0 for a soft prompt's positions.
      stable: how many positions from the first no other question would change, up to the last soft prompt among them; fewer
        than T, since the LLM says what comes next only as it reads something.
      goes_on: whether no other question would change any soft prompt, so that the next turn begins with all of this.
    """

    embeds: Tensor
    units: np.ndarray
    stable: int
    goes_on: bool


@dataclass(frozen=True)
class Beginning:
    """The first P positions of a prompt: their units, and keys and values (1, heads, P, D_head) of every layer."""

    units: np.ndarray
    keys_values: KeysValues

    def cut(self, length: int) -> "Beginning":
        """Returns the first `length` positions of it."""
        parts = [tuple(part[:, :, :length] for part in layer) for layer in self.keys_values]
        return Beginning(self.units[:length], parts)


def soft_units(key: bytes, length: int) -> np.ndarray:
    """Numbers the positions of a soft prompt that has this key."""
    start = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
    return -1 - (start + np.arange(length, dtype=np.int64))


class Prefixes:
    """Beginnings of prompts that one LLM has read, with the weights it has."""

    def __init__(self, llm: FrozenLLM, cache: ByteCache):
        self.llm = llm
        self.cache = cache
        self._weights = WeightVersions()

    @functools.cached_property
    def work(self) -> bool:
        """Whether rows that go on from one beginning are to this LLM what they are alone."""
        return trials.goes_on(self.llm)

    def longest(self, units: np.ndarray) -> Beginning | None:
        """Returns the longest beginning of these units that was read, and is not all of them; None if there is none."""
        weights, _ = self._key(units)
        read = [(key, held) for key, held in self.cache.items() if key[0] == weights]
        found = [(_shared(units[:-1], held.units), key, held) for key, held in read]
        length, key, held = max(found, key=lambda entry: entry[0], default=(0, None, None))
        if not length:
            return None
        self.cache.get(key)  # counts as used
        return held.cut(length)

    @torch.no_grad()
    def read(self, prompt: Prompt, length: int) -> Beginning:
        """Reads the first `length` positions of a prompt, those that were not read before."""
        units = prompt.units[:length]

        def make(_: list[int]) -> list[Beginning]:
            known = self.longest(units)
            cache = begun(self.llm.model, known and known.keys_values)
            rest = prompt.embeds[None, cache.get_seq_length() : length]
            self.llm.model(inputs_embeds=rest, past_key_values=cache, use_cache=True, **self.llm.last_logits_alone)
            return [Beginning(units, [(layer.keys, layer.values) for layer in cache.layers])]

        return self.cache.get_or_make([self._key(units)], make)[0]

    def keep(self, units: np.ndarray, keys_values: KeysValues) -> None:
        """Keeps what a prompt with its answer gave; the units of the first P positions are known."""
        length = keys_values[0][0].shape[2]
        self.cache.put(self._key(units[:length]), Beginning(units[:length], keys_values))

    def _key(self, units: np.ndarray) -> tuple[bytes, bytes]:
        """The LLM's weights, and what it read with them."""
        return self._weights.of(self.llm.model), units.tobytes()


def lay_out(prompts: Sequence[Prompt], past: Beginning | None, *, right: bool = False) -> PromptBatch:
    """Makes one batch of prompts.

    Args:
      prompts: B.
      past: what all of them begin with; padding stands after it.
      right: pad on the right, as an encoder-decoder wants it.
    """
    length = 0 if past is None else len(past.units)
    rests = [prompt.embeds[length:] for prompt in prompts]
    side = "right" if right else "left"
    embeds = pad_sequence(rests, batch_first=True, padding_side=side)
    mask = pad_sequence(
        [rest.new_ones(len(rest), dtype=torch.long) for rest in rests], batch_first=True, padding_side=side
    )
    if past is None:
        return PromptBatch(embeds, mask)
    shared = prompts[0].embeds[None, :length].expand(len(prompts), -1, -1)
    embeds, mask = torch.cat([shared, embeds], 1), torch.cat([mask.new_ones(len(prompts), length), mask], 1)
    return PromptBatch(embeds, mask, past=past.keys_values)


def shared_by_all(prompts: Sequence[Prompt]) -> int:
    """How many positions from the first are the same in all prompts, whatever will be asked next."""
    return min(min(prompt.stable, _shared(prompts[0].units, prompt.units)) for prompt in prompts)


def _shared(left: np.ndarray, right: np.ndarray) -> int:
    """How many numbers two arrays have in common from the first on."""
    size = min(len(left), len(right))
    differ = np.flatnonzero(left[:size] != right[:size])
    return int(differ[0]) if len(differ) else size
