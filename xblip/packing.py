"""Packing: several samples in one row before the LLM, in the place of padding.

Samples of a batch differ in length, and padding is work like any other; so short ones share rows, each with positions and
attention of its own. Chosen over grouping samples of like lengths: batches stay as they were drawn, no micro-batch is
larger than another (the one with all long samples would need the most memory), and nothing is left to pad.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
