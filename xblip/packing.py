"""Packing: several samples in one row before the LLM, in the place of padding; and groups of like length, to generate.

Samples of a batch differ in length, and padding is work like any other; so where nothing is generated, short ones share
rows, each with positions and attention of its own. Chosen over grouping samples of like lengths: batches stay as they were
drawn, no micro-batch is larger than another (the one with all long samples would need the most memory), and nothing is
left to pad.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

POSITIONS_PER_STEP = {"cpu": 12, "cuda": 240}
"""What reading the LLM's weights once takes, in positions of a prompt: how many operations a machine does in the time that
it takes to read a weight, over the two that a position needs. (2 cores, float32: 60 GFLOP/s beside 10 GB/s; H100, bfloat16:
800 TFLOP/s beside 3.3 TB/s.)"""


@dataclass
class Packing:
    """Where the samples of a batch lie.

    Attributes:
      rows: of each, the samples in it, in their order.
      lengths: of each sample.
    """

    rows: list[list[int]]
    lengths: Sequence[int]

    @classmethod
    def plan(cls, lengths: Sequence[int], width: int) -> "Packing":
        """Finds rows that are the least work: longer ones leave less to pad, and more to attend to.

        Args:
          lengths: of the samples.
          width: D_llm; a token's work is some 12 D_llm^2 of weights, and 2 D_llm for each position of its row in
            attention, which runs at about a third of the speed.
        """
        plans = [cls._spread(lengths, count) for count in range(1, len(lengths) + 1)]
        return min(plans, key=lambda plan: plan.num_tokens * (2 * width + plan.row_length))

    @classmethod
    def fill(cls, lengths: Sequence[int], positions: int) -> "Packing":
        """Finds rows of about equally many positions, of so many if that leaves little to pad, else of more.

        For attention by `EachAlone`, to which long rows are no more work than short ones.
        """
        most, little = -(-sum(lengths) // positions), 1.1 * sum(lengths)
        plans = (cls._spread(lengths, count) for count in range(most, 0, -1))
        return next(plan for plan in plans if plan.num_tokens <= little)

    @classmethod
    def _spread(cls, lengths: Sequence[int], count: int) -> "Packing":
        """Puts each sample, the longest first, into the row that is the shortest so far."""
        rows: list[list[int]] = [[] for _ in range(count)]
        shortest = [(0, number) for number in range(count)]
        for sample in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            length, number = heapq.heappop(shortest)
            rows[number].append(sample)
            heapq.heappush(shortest, (length + lengths[sample], number))
        return cls(rows, lengths)

    @property
    def row_length(self) -> int:
        return max(sum(self.lengths[sample] for sample in row) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """With what is still padded."""
        return len(self.rows) * self.row_length

    @property
    def is_worth_it(self) -> bool:
        """Whether fewer positions are left than padding alone leaves."""
        return self.num_tokens < len(self.lengths) * max(self.lengths)

    def pack(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Takes right-padded samples (B, T, D); gives rows (R, C, D), and the position (R, C) of each token in its sample.

        Positions that begin again are how transformers' models tell samples apart when there is no attention mask.
        """
        rows = [torch.cat([embeds[sample, : self.lengths[sample]] for sample in row]) for row in self.rows]
        positions = [torch.cat([torch.arange(self.lengths[sample]) for sample in row]) for row in self.rows]
        padded = nn.utils.rnn.pad_sequence(positions, batch_first=True)  # each pad a sample of its own
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), padded.to(embeds.device)

    def find(self, samples: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Gives rows and columns of samples' tokens."""
        row_of, start_of = torch.zeros(2, len(self.lengths), dtype=torch.long)
        for number, row in enumerate(self.rows):
            start = 0
            for sample in row:
                row_of[sample], start_of[sample] = number, start
                start += self.lengths[sample]
        return row_of[samples], start_of[samples] + columns


def groups_of_like_length(lengths: Sequence[int], step: int) -> list[list[int]]:
    """Parts a batch for generation, so that short samples are not padded to the longest where that costs more than it saves.

    Args:
      lengths: of prompts.
      step: of how many positions reading the weights once for each new token is worth, which every group does.

    Returns:
      Indices of each group's samples; samples of a group are neighbours in length.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n: the least cost, and where the last group begins
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        best.append(min((best[start][0] + (stop - start) * longest + step, start) for start in range(stop)))
    groups, stop = [], len(order)
    while stop:
        start = best[stop][1]
        groups.append(order[start:stop])
        stop = start
    return groups


class EachAlone(TorchFunctionMode):
    """Runs attention over one sample at a time in rows that samples share.

    Under the mask that keeps samples apart, their products with each other are computed and thrown away. A CPU, to which a
    call costs little, does without; accelerators have kernels that are quick under a mask, and pay for calls.
    """

    def __init__(self, lengths: Sequence[Sequence[int]]):
        """Takes the lengths of the samples in each row."""
        super().__init__()
        self.lengths = lengths

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and not torch.compiler.is_compiling():
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options) -> Tensor:
        masks = attn_mask.expand(len(query), *attn_mask.shape[1:])
        rows = []
        for row, lengths in enumerate(self.lengths):
            samples = []
            padded = query.shape[2] - sum(lengths)
            for start, stop in itertools.pairwise(itertools.accumulate([0, *lengths, *([padded] if padded else [])])):
                own = slice(start, stop)
                states = (part[row : row + 1, :, own] for part in (query, key, value))
                mask = masks[row : row + 1, :, own, own]
                samples.append(F.scaled_dot_product_attention(*states, attn_mask=mask, **options).transpose(1, 2))
            rows.append(torch.cat(samples, 1))
        return torch.cat(rows).transpose(1, 2)
