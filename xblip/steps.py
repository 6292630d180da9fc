"""Decoding a step at a time over rows that come and go: continuous batching over embeddings.

Rows end at the same column: a shorter one has padding before it. One that joins is padded to the others, or they to it; when
rows leave, columns that are padding to all that stay are cut off.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xblip.kv_cache import begun
from xblip.llm import FrozenLLM
from xblip.media_read import KeysValues
from xblip.prefixes import Beginning, Prompt, lay_out


class Rows:
    """What an LLM has read of B prompts and their answers so far.

    Attributes:
      mask: (B, L), 1 for real positions; each row's end at column L.
      cache: transformers', whose layers hold keys and values (B, heads, L, D_head); a step adds to it.
    """

    def __init__(self, mask: Tensor, cache: Any):
        self.mask = mask
        self.cache = cache

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def num_positions(self) -> int:
        """B times L: what is held, padding and all."""
        return self.mask.numel()

    @property
    def keys_values(self) -> KeysValues:
        return [(layer.keys, layer.values) for layer in self.cache.layers]


class Stepper:
    """Runs one LLM over rows. For an LLM whose prefixes work (`Prefixes.work`): others cannot have rows join."""

    def __init__(self, llm: FrozenLLM):
        self.llm = llm

    @torch.no_grad()
    def read(self, prompts: Sequence[Prompt], past: Beginning | None = None) -> tuple[Rows, Tensor]:
        """Reads prompts.

        Args:
          prompts: B.
          past: what all of them begin with, read before.

        Returns:
          Their rows, and the logits (B, vocabulary) of what comes next, float32.
        """
        batch = lay_out(prompts, past)
        length = 0 if past is None else len(past.units)
        cache = begun(self.llm.model, batch.past, rows=len(prompts))
        return self._run({"inputs_embeds": batch.inputs_embeds[:, length:]}, batch.attention_mask, cache)

    @torch.no_grad()
    def step(self, rows: Rows, tokens: Sequence[int]) -> tuple[Rows, Tensor]:
        """Reads one token more for each row, which must not be used again; returns as `read`."""
        mask = torch.cat([rows.mask, rows.mask.new_ones(len(rows), 1)], 1)
        ids = torch.tensor(tokens, device=self.llm.device)[:, None]
        return self._run({"input_ids": ids}, mask, rows.cache)

    def join(self, parts: Sequence[Rows]) -> Rows:
        """Returns the rows of all parts, those of the first part first."""
        if len(parts) == 1:
            return parts[0]
        length = max(part.mask.shape[1] for part in parts)
        mask = torch.cat([_padded(part.mask, length, 1) for part in parts])
        layers = zip(*(part.keys_values for part in parts), strict=True)
        keys_values = [
            [torch.cat([_padded(own, length, 2) for own in same]) for same in zip(*layer, strict=True)]
            for layer in layers
        ]
        return self._rows(mask, keys_values)

    def keep(self, rows: Rows, places: Sequence[int]) -> Rows:
        """Returns some rows alone, without columns that are padding to all of them."""
        index = torch.tensor(places)  # on the CPU, as layers may lie on several accelerators
        mask = rows.mask[index]
        first = int(mask.any(0).int().argmax())
        return self._rows(mask[:, first:], [[part[index, :, first:] for part in layer] for layer in rows.keys_values])

    def _rows(self, mask: Tensor, keys_values: Sequence[Sequence[Tensor]]) -> Rows:
        return Rows(mask, begun(self.llm.model, keys_values, rows=len(mask)))

    def _run(self, given: dict[str, Tensor], mask: Tensor, cache: Any) -> tuple[Rows, Tensor]:
        new = next(iter(given.values())).shape[1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        output = self.llm.model(
            **given,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self.llm.last_logits_alone,
        )
        return Rows(mask, cache), output.logits[:, -1].float()


def _padded(values: Tensor, length: int, dim: int) -> Tensor:
    """Puts zeros before what stands along a dimension, up to a length."""
    after = values.dim() - 1 - dim
    return F.pad(values, (0, 0) * after + (length - values.shape[dim], 0))
