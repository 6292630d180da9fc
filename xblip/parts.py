"""The likelihood of a batch by a frozen LLM, at the memory of a part of the batch.

No weight asks for a gradient, and what a batch is worth is a sum over its tokens: so the gradient to what the LLM reads can
be taken within the forward pass, a few rows at a time, and what one part keeps for it is let go before the next part runs.
No product is computed twice.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xblip.packing import EachAlone

POSITIONS_ON_CPU = 768
"""Of a part: 512 took 5 % more time, and 1024 no less (D_llm 384)."""
POSITIONS = 1024
"""Of a part elsewhere, at least: three times what an H100 computes in the time of reading the weights."""
BYTES = 2**31
"""What a part may keep elsewhere, though it be more positions: small models pay for many calls."""
NUMBERS_OF_A_LAYER = 12
"""That a layer keeps for each position, in units of D_llm: inputs of two norms, four of attention, two wide ones."""


@dataclass
class Rows:
    """A batch as an LLM reads it.

    Attributes:
      embeds: (R, C, D_llm).
      others: what else the model is given, by name, each (R, ...).
      places: rows and columns (n,) of the hidden states that predict.
      targets: the ids (n,) that they predict.
      lengths: of the samples in each row, if attention is to run over one sample at a time.
    """

    embeds: Tensor
    others: dict[str, Tensor]
    places: tuple[Tensor, Tensor]
    targets: Tensor
    lengths: list[list[int]] | None = None

    def parts(self, positions: int) -> Iterator[tuple[slice, "Rows"]]:
        """Divides the rows into parts of about equally many, and of so many positions at most if no row is longer."""
        most = max(1, positions // self.embeds.shape[1])
        count = -(-len(self.embeds) // most)
        bounds = [round(number * len(self.embeds) / count) for number in range(count + 1)]
        for start, stop in itertools.pairwise(bounds):
            yield slice(start, stop), self._part(slice(start, stop))

    def _part(self, own: slice) -> "Rows":
        rows, columns = self.places
        here = (rows >= own.start) & (rows < own.stop)
        others = {name: value[own] for name, value in self.others.items()}
        places = rows[here] - own.start, columns[here]
        return Rows(self.embeds[own], others, places, self.targets[here], self.lengths and self.lengths[own])


def positions_at_once(device: torch.device, dtype: torch.dtype, *, layers: int, width: int) -> int | None:
    """Returns how many positions a part has; None for all of the batch, where gradients are float16.

    Those are only safe from vanishing under a loss that is scaled up, which is known after the forward pass.

    Args:
      device, dtype: of the LLM; under autocast its dtype counts.
      layers: of the LLM.
      width: D_llm.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype is torch.float16:
        return None
    if device.type == "cpu":
        return POSITIONS_ON_CPU
    return max(POSITIONS, BYTES // (NUMBERS_OF_A_LAYER * width * max(layers, 1) * dtype.itemsize))


def sum_in_parts(rows: Rows, positions: int, read: Callable[[Rows], Tensor]) -> Tensor:
    """Sums what `read` says of rows, holding the activations of one part.

    Args:
      rows: whose embeddings want a gradient.
      positions: of a part.
      read: gives numbers of a part, which do not depend on other parts.

    Returns:
      A scalar, float32.
    """
    return _Sum.apply(rows.embeds, rows, positions, read)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeds: Tensor, rows: Rows, positions: int, read: Callable[[Rows], Tensor]) -> Tensor:
        gradient, total = torch.empty_like(embeds), embeds.new_zeros((), dtype=torch.float32)
        for place, part in rows.parts(positions):
            inputs = part.embeds.detach().requires_grad_()
            with torch.enable_grad(), EachAlone(part.lengths) if part.lengths else contextlib.nullcontext():
                value = read(dataclasses.replace(part, embeds=inputs)).sum()
            with torch.autocast(embeds.device.type, enabled=False):
                (gradient[place],) = torch.autograd.grad(value, inputs)
            total += value.detach().to(total)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream).to(gradient.dtype), None, None, None
