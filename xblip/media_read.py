"""What a Q-Former bridge keeps of media that it has read: all that no instruction changes.

Items are padded in numbers of rows only where they differ, by one table of which rows are whose.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KeysValues = list[tuple[Tensor, Tensor]]


class MediaRead(NamedTuple):
    """Cross-attention of B media, whose rows (segments, unless these are joined) stand one after another.

    Attributes:
      keys_values: (M, heads, N, D_head) each, of every layer that reads media.
      mask: (M, N) boolean, True for real tokens.
      rows: of each item; sums to M.
    """

    keys_values: KeysValues
    mask: Tensor
    rows: list[int]

    def chosen(self, items: Sequence[int]) -> "MediaRead":
        """Returns these items in this order; an item may come more than once."""
        index, real = row_table(self.rows, self.mask.device)
        wanted = torch.tensor(items, device=self.mask.device)
        index = index[wanted][real[wanted]]
        keys_values = [(keys[index], values[index]) for keys, values in self.keys_values]
        return MediaRead(keys_values, self.mask[index], [self.rows[item] for item in items])

    @staticmethod
    def join(parts: "Sequence[MediaRead]") -> "MediaRead":
        """Returns the items of all parts as one, padded in tokens where they differ."""
        if len(parts) == 1:
            return parts[0]
        size = max(part.mask.shape[1] for part in parts)
        keys_values = [
            tuple(torch.cat([padded(part, size, dim=2) for part in same]) for same in zip(*layer, strict=True))
            for layer in zip(*(part.keys_values for part in parts), strict=True)
        ]
        mask = torch.cat([padded(part.mask, size, value=False) for part in parts])
        return MediaRead(keys_values, mask, [count for part in parts for count in part.rows])


def row_table(rows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which rows each item has, (B, max(S)), where items have `rows` one after another; and which of them are real."""
    ends = torch.tensor(rows).cumsum(0)
    order = torch.arange(max(rows)).expand(len(rows), -1)
    real = order < torch.tensor(rows)[:, None]
    index = torch.where(real, order + (ends - torch.tensor(rows))[:, None], 0)
    return index.to(device), real.to(device)


def padded(values: Tensor, size: int, *, dim: int = 1, value: float = 0) -> Tensor:
    """Appends `value` along a dimension up to `size`."""
    after = values.dim() - 1 - dim
    return F.pad(values, (0, 0) * after + (0, size - values.shape[dim]), value=value)
