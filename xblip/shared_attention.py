"""Attention of many rows to one beginning that they share: it is read where it lies, not copied for every row.

All rows' queries are one matrix product with the beginning's keys, in the place of one product for each row with its copy;
rows then differ in what comes after it alone. Noticed from outside the model, by what attention it calls, since
transformers' models hand a cache's keys and values on and ask for nothing else.
"""

import contextlib
from collections.abc import Iterator
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
        self._places: Tensor | None = None

    def begins(self, keys: Tensor, values: Tensor) -> None:
        """Takes keys and values (1, heads, P, D_head) that stand before those of the next call, in every row."""
        self._beginning = keys, values

    @contextlib.contextmanager
    def packed(self, places: Tensor) -> Iterator[None]:
        """Lets the model read rows of different lengths in one row, without padding.

        Args:
          places: (B, T) bool, where in the rows the tokens stand that the model is given, in order.
        """
        self._places = places
        try:
            yield
        finally:
            self._places = None

    def apart(self, states: Tensor) -> Tensor:
        """States (1, heads, tokens, D_head) of rows in one row, as those of rows (B, heads, T, D_head); else as they are."""
        if self._places is None:
            return states
        rows = states.new_zeros(*self._places.shape, states.shape[1], states.shape[3])
        rows[self._places] = states[0].transpose(0, 1)
        return rows.transpose(1, 2)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and self._beginning:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        shared, self._beginning = self._beginning, None
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        if self._places is None:
            mask = None if attn_mask is None else attn_mask[..., -key.shape[2] :]
            return _attend(query, key, value, shared, mask)
        before = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
        mask = before & self._places[:, None, None]
        states = _attend(self.apart(query), key, value, shared, mask)
        return states.transpose(1, 2)[self._places].transpose(0, 1)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, shared: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """Attention of scaled queries (B, heads, T, D_head) to what is shared, and to their rows' own."""
    rows, heads = query.shape[:2]
    first, firsts, key, value = (_repeated(part, heads) for part in (*shared, key, value))
    own = query @ key.mT
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else own + mask
    scores = torch.cat([_together(query) @ first[0].mT, _together(own)], -1)
    weights = scores.float().softmax(-1).to(query.dtype)
    length = first.shape[2]
    return _apart(weights[..., :length] @ firsts[0], rows) + _apart(weights[..., length:], rows) @ value


def _repeated(states: Tensor, heads: int) -> Tensor:
    """Keys or values for as many heads as queries have, which may share them."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], 1)


def _together(states: Tensor) -> Tensor:
    """(B, heads, T, D) as (heads, B T, D)."""
    return states.transpose(0, 1).flatten(1, 2)


def _apart(states: Tensor, rows: int) -> Tensor:
    """(heads, B T, D) as (B, heads, T, D)."""
    return states.unflatten(1, (rows, -1)).transpose(0, 1)
