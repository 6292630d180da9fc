"""Tensors of all processes of a run, which a contrast with negatives from everywhere needs.

Every function is called by all processes at the same point of a step. Without a process group there is one process, and
nothing is sent.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(values: Tensor) -> Tensor:
    """All processes' (B, ...) end to end, (W * B, ...), without gradient; B and the other sizes are equal everywhere."""
    _, count = world()
    values = values.detach()
    if count == 1:
        return values
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(count)]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def gather_with_gradient(values: Tensor) -> Tensor:
    """As `gather`, but the gradient of each process's own part is the sum of what all processes' losses make of it.

    After DDP has averaged gradients they are those of the mean of all losses, as if one process had the whole batch.
    """
    return values if world()[1] == 1 else _Gather.apply(values)


def largest(*sizes: int, device: torch.device) -> list[int]:
    """The largest of each size in all processes."""
    if world()[1] == 1:
        return list(sizes)
    found = torch.tensor(sizes, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def exchange(values: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
    """Sends rows to other processes, and gives the rows that they send here, without gradient.

    Args:
      values: (sum(given), ...), the rows for each process end to end.
      given: how many rows each process gets.
      taken: how many rows come from each process.

    Returns:
      (sum(taken), ...).
    """
    received = values.new_empty(sum(taken), *values.shape[1:])
    dist.all_to_all_single(received, values.detach().contiguous(), list(taken), list(given))
    return received


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return gather(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        rank, count = world()
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed.chunk(count)[rank]
