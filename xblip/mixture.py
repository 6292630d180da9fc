"""Mixtures: which rows of which manifests are in which micro-batch on which process.

A plan is arithmetic on a seed and a step. It reads no data, two plans with one seed agree on every machine, and to go on
after a million steps costs what the first step costs. The unit is the micro-batch of all processes together: it is of
one source, and all those of one step are of one group, so that every process trains the same weights at the same time.

Sources and groups are not drawn by chance but given their shares of an epoch as seats are by Webster's method, and then
shuffled: with shares by size, every row is visited as often as any other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from xblip.data import Visit
from xblip.errors import ConfigError, suggest

WINDOW = 32  # micro-batches within which rows of about one length are put together
BLUR = 16.0
"""Characters by which lengths are blurred before rows are sorted by them. Sorted by bare lengths, rows to be answered by
"yes" and those by "no" are in batches of their own, from which little is learnt; a few tokens of padding cost less."""


@dataclass(frozen=True)
class Source:
    """What a plan knows of a manifest.

    Attributes:
      rows: their number.
      group: what trains on it, its modality; steps never mix groups.
      lengths: of each row, if batches are to hold rows of about one length.
      name: for messages.
    """

    rows: int
    group: str = ""
    lengths: Sequence[int] | np.ndarray | None = field(default=None, repr=False)
    name: str = "a source"


class BatchPlan(Sampler[list[Visit]]):
    """The micro-batches of one process, epoch by epoch; a batch sampler for torch's data loader.

    Attributes:
      steps_per_epoch: optimiser steps in which as many rows are visited as all sources have.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        seed: int,
        weights: Any = "size",
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        group_by_length: bool = False,
    ):
        """Makes the plan.

        Args:
          sources: what is mixed.
          batch_size: rows of a micro-batch on one process.
          seed: of everything here.
          weights: how often a source is visited: by "size", by its root "sqrt" (X-InstructBLIP), "equal", by
            {"temperature": t}, the size to the power of 1/t, or a number for each.
          accumulation: micro-batches of one step.
          world_size: number of processes.
          rank: which of them this is.
          group_by_length: put rows of about one length together, within windows of a few dozen micro-batches.

        Raises:
          ConfigError: no sources, weights that are none, or fewer rows than processes.
        """
        super().__init__()
        self.sources = list(sources)
        for source in self.sources:
            if source.rows < world_size:
                raise ConfigError(
                    f"{source.name} has {source.rows} rows, too few to give each of {world_size} processes one of its "
                    "own: use fewer processes, or leave it out."
                )
        shares = shares_of(weights, [source.rows for source in self.sources])
        self.seed, self.rank, self.batch_size, self.accumulation = seed, rank, batch_size, accumulation
        self.unit = batch_size * world_size
        total = sum(source.rows for source in self.sources)
        self.steps_per_epoch = -(-total // (self.unit * accumulation))
        self._turns = Turns(
            shares,
            [source.group for source in self.sources],
            steps=self.steps_per_epoch,
            accumulation=accumulation,
            seed=seed,
        )
        self._by_length = group_by_length
        assert not group_by_length or all(source.lengths is not None for source in self.sources)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}
        self.epoch = 0

    def __len__(self) -> int:
        """Returns the micro-batches of a whole epoch."""
        return self.steps_per_epoch * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch `iter` will give."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Visit]]:
        order, places = self._turns.of(self.epoch)
        for source, place in zip(order.tolist(), places.tolist(), strict=True):
            epoch, rows = self._rows(source, place)
            mine = rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            yield [Visit(source, row, epoch) for row in mine.tolist()]

    def _rows(self, source: int, place: int) -> tuple[int, np.ndarray]:
        """The epoch of a source and the rows of all processes, of its micro-batch number `place`.

        An epoch is a permutation; its last micro-batch is filled from the permutation's head.
        """
        rows = self.sources[source].rows
        per_epoch = -(-rows // self.unit)
        epoch, batch = divmod(place, per_epoch)
        if self._orders.get(source, (-1,))[0] != epoch:
            generator = np.random.default_rng([self.seed, 1, source, epoch])
            self._orders[source] = epoch, generator.permutation(np.arange(rows, dtype=np.uint32))
        order = self._orders[source][1]
        if not self._by_length:
            return epoch, order[np.arange(batch * self.unit, (batch + 1) * self.unit) % rows]
        window = batch // WINDOW
        if self._windows.get(source, ((-1, -1),))[0] != (epoch, window):
            self._windows[source] = (epoch, window), self._sorted(source, epoch, window, per_epoch)
        return epoch, self._windows[source][1][batch - window * WINDOW]

    def _sorted(self, source: int, epoch: int, window: int, per_epoch: int) -> np.ndarray:
        """The micro-batches of a window, (batches, rows): rows of about one length together, batches shuffled."""
        first, last = window * WINDOW, min((window + 1) * WINDOW, per_epoch)
        order = self._orders[source][1]
        batches = order[np.arange(first * self.unit, last * self.unit) % len(order)].reshape(-1, self.unit)
        full = min(last, len(order) // self.unit) - first  # a filled batch stays as it is: sorted, it may repeat a row
        rows = batches[:full].ravel()
        generator = np.random.default_rng([self.seed, 2, source, epoch, window])
        lengths = np.asarray(self.sources[source].lengths)[rows] + generator.uniform(0, BLUR, len(rows))
        batches[:full] = rows[np.argsort(lengths)].reshape(-1, self.unit)
        return generator.permutation(batches)


class Turns:
    """Which source each micro-batch is of, epoch by epoch: each gets its share, in an order drawn anew."""

    def __init__(self, shares: np.ndarray, groups: Sequence[str], *, steps: int, accumulation: int, seed: int):
        """Keeps how often each source has its turn, in epochs of `steps` steps of `accumulation` micro-batches."""
        self.steps, self.accumulation, self.seed = steps, accumulation, seed
        self._groups = [[k for k, name in enumerate(groups) if name == group] for group in dict.fromkeys(groups)]
        self._shares = [shares[group] / shares[group].sum() for group in self._groups]
        self._group_shares = np.array([shares[group].sum() for group in self._groups])
        self._sources = len(shares)

    def of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each micro-batch its source, and how many of that source came before since the beginning."""
        generator = np.random.default_rng([self.seed, 0, epoch])
        done = [seats(self._group_shares, self.steps * (epoch + more)) for more in (0, 1)]
        groups = generator.permutation(np.repeat(np.arange(len(self._groups)), done[1] - done[0]))
        order = np.empty((self.steps, self.accumulation), np.int64)
        before = np.zeros(self._sources, np.int64)
        for number, group in enumerate(self._groups):
            counts = [seats(self._shares[number], steps[number] * self.accumulation) for steps in done]
            before[group] = counts[0]
            own = generator.permutation(np.repeat(group, counts[1] - counts[0]))
            order[groups == number] = own.reshape(-1, self.accumulation)
        order = order.ravel()
        places = np.empty_like(order)
        for source in range(self._sources):
            own = order == source
            places[own] = before[source] + np.arange(own.sum())
        return order, places


def shares_of(weights: Any, sizes: Sequence[int]) -> np.ndarray:
    """Returns the share of visits of each source.

    Args:
      weights: as `BatchPlan` takes them.
      sizes: rows of each source.

    Raises:
      ConfigError: `weights` are none of these.
    """
    if not sizes:
        raise ConfigError("There is nothing to mix: name at least one manifest.")
    counts = np.asarray(sizes, float)
    if isinstance(weights, str):
        powers = {"size": 1.0, "sqrt": 0.5, "equal": 0.0}
        if weights not in powers:
            raise ConfigError(f'Unknown weights "{weights}" of a mixture.{suggest(weights, powers)}')
        found = counts ** powers[weights]
    elif isinstance(weights, Mapping):
        if list(weights) != ["temperature"] or not _positive(weights["temperature"]):
            raise ConfigError(
                f"Weights of a mixture by temperature are such as {{temperature: 2}}, not {dict(weights)}."
            )
        found = counts ** (1 / weights["temperature"])
    else:
        if not isinstance(weights, Sequence) or len(weights) != len(sizes) or not all(map(_positive, weights)):
            raise ConfigError(
                f"Weights of a mixture must be a number above 0 for each of its {len(sizes)} sources, not {weights!r:.80}."
            )
        found = np.asarray(weights, float)
    return found / found.sum()


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def seats(shares: np.ndarray, total: int) -> np.ndarray:
    """Divides `total` seats by Webster's method: never fewer seats for anybody when there is one more to divide."""
    counts = np.maximum(np.floor(shares * total).astype(np.int64) - len(shares), 0)
    for _ in range(int(total - counts.sum())):
        counts[np.argmax(shares / (2 * counts + 1))] += 1
    return counts
