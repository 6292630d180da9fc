"""Attention of many rows to one beginning that they share: it is read where it lies, not copied for every row.

All rows' queries are one matrix product with the beginning's keys, in the place of one product for each row with its copy;
rows then differ in what comes after it alone. Noticed from outside the model, by what attention it calls, since
transformers' models hand a cache's keys and values on and ask for nothing else.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttendToShared(TorchFunctionMode):
    """Runs scaled dot product attention after `begins` over a beginning and what it is called with.

    Scores of all rows' queries are held at once, as the queries of questions are few.
    """

    def __init__(self) -> None:
        super().__init__()
        self._beginning: tuple[Tensor, Tensor] | None = None

    def begins(self, keys: Tensor, values: Tensor) -> None:
        """Takes keys and values (1, heads, P, D_head) that stand before those of the next call, in every row."""
        self._beginning = keys, values

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and self._beginning:
            (keys, values), self._beginning = self._beginning, None
            return self._attend(keys, values, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        shared_keys: Tensor,
        shared_values: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        rows, heads, _, width = query.shape
        shared_keys, shared_values, key, value = (
            part.repeat_interleave(heads // part.shape[1], 1) for part in (shared_keys, shared_values, key, value)
        )
        query = query * (width**-0.5 if scale is None else scale)
        own = query @ key.mT
        if attn_mask is not None:
            own = _masked(own, attn_mask[..., -key.shape[2] :])
        first = _together(query) @ shared_keys[0].mT
        weights = torch.cat([first, _together(own)], -1).float().softmax(-1).to(query.dtype)
        length = shared_keys.shape[2]
        shared = weights[..., :length] @ shared_values[0]
        return _apart(shared, rows) + _apart(weights[..., length:], rows) @ value


def _together(states: Tensor) -> Tensor:
    """(B, heads, T, D) as (heads, B T, D)."""
    return states.transpose(0, 1).flatten(1, 2)


def _apart(states: Tensor, rows: int) -> Tensor:
    """(heads, B T, D) as (B, heads, T, D)."""
    return states.unflatten(1, (rows, -1)).transpose(0, 1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
