"""Figures with their uncertainty: bootstrap intervals, and paired comparisons of two systems.

Any figure here is a function of means over rows (accuracy: of the mean itself; BLEU: of mean counts), so that drawing
rows anew only weighs each row's own numbers, and nothing is scored twice.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from xblip.errors import InputError

RESAMPLES = 2000
LEVEL = 0.95

Combine = Callable[[np.ndarray], np.ndarray]
"""Makes figures (...) of mean statistics (..., K)."""


@dataclass(frozen=True)
class Figure:
    """A number over rows, with what it is made of.

    Attributes:
      ids: (n) of the rows.
      units: (n) what each row belongs to: rows of one unit, such as one question asked in two orders, are drawn together.
      statistics: (n, K), each row's numbers.
      combine: what makes the figure of their means; None where K is 1 and the mean is the figure.
    """

    ids: Sequence[str]
    units: Sequence[str]
    statistics: np.ndarray
    combine: Combine | None = None

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]], statistics: Any, combine: Combine | None = None) -> "Figure":
        """Makes a figure over lines of predictions, of a number (n,) or of numbers (n, K) for each.

        Raises:
          InputError: there are no lines.
        """
        if not lines:
            raise InputError("There are no rows to make a figure of.")
        statistics = np.asarray(statistics, dtype=np.float64).reshape(len(lines), -1)
        ids = [line["id"] for line in lines]
        return cls(ids, [line.get("unit") or line["id"] for line in lines], statistics, combine)

    @property
    def value(self) -> float:
        return float(self._of_means(self.statistics.mean(0)))

    @property
    def scores(self) -> dict[str, float]:
        """Each row's own score, by id; none where the figure is no mean of such."""
        return {} if self.combine else dict(zip(self.ids, self.statistics[:, 0].tolist(), strict=True))

    @property
    def is_binary(self) -> bool:
        """Whether each row is right or wrong."""
        return self.combine is None and bool(np.isin(self.statistics, (0.0, 1.0)).all())

    def _of_means(self, means: np.ndarray) -> np.ndarray:
        return self.combine(means) if self.combine else means[..., 0]

    def on(self, ids: Sequence[str]) -> "Figure":
        """Returns the figure over some of its rows, in this order."""
        places = {row: place for place, row in enumerate(self.ids)}
        chosen = [places[row] for row in ids]
        return Figure(list(ids), [self.units[place] for place in chosen], self.statistics[chosen], self.combine)

    def by_unit(self) -> tuple[list[str], np.ndarray]:
        """Returns the units, and the sums of their rows' statistics with their number of rows last, (U, K + 1)."""
        names = list(dict.fromkeys(self.units))
        places = {name: place for place, name in enumerate(names)}
        sums = np.zeros((len(names), self.statistics.shape[1] + 1))
        np.add.at(sums, [places[unit] for unit in self.units], np.c_[self.statistics, np.ones(len(self.ids))])
        return names, sums

    def resampled(self, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
        """Returns the figure of units drawn anew with replacement, (resamples,); for equal units the same draws."""
        names, sums = self.by_unit()
        order = np.argsort(names, kind="stable")
        sums = sums[order]
        key = hashlib.blake2b("\0".join(sorted(names)).encode(errors="backslashreplace"), digest_size=8).digest()
        chance = np.random.default_rng([seed, int.from_bytes(key, "big")])
        drawn = np.empty((resamples, sums.shape[1]))
        for number in range(resamples):
            weights = np.bincount(chance.integers(0, len(sums), len(sums)), minlength=len(sums))
            drawn[number] = weights @ sums
        return self._of_means(drawn[:, :-1] / drawn[:, -1:])


class Measured(NamedTuple):
    """A figure's value and its 95 % interval, over n rows of so many units."""

    value: float
    low: float
    high: float
    n: int
    units: int


class Difference(NamedTuple):
    """What another system's figure is more, with its 95 % interval, on n rows that both have.

    Attributes:
      p: two-sided, exact: McNemar's where rows are right or wrong, the sign test over units else; None where units have no
        score of their own.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float | None
    n: int
    units: int


def measure(figure: Figure, *, seed: int = 0, resamples: int = RESAMPLES) -> Measured:
    """Returns a figure with its percentile bootstrap interval; equal seeds give equal intervals.

    Where all rows are right, or none, every draw is the same: the interval is then the exact one (Clopper and Pearson) of
    as many trials as there are units.
    """
    units = len(set(figure.units))
    low, high = percentiles(figure.resampled(seed, resamples))
    if figure.is_binary and figure.value in (0.0, 1.0):
        least = ((1 - LEVEL) / 2) ** (1 / units)
        low, high = (least, 1.0) if figure.value else (0.0, 1 - least)
    return Measured(figure.value, low, high, len(figure.ids), units)


def difference(first: Figure, second: Figure, *, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Compares two systems, or two ways of asking one, on the rows that both figures have.

    Raises:
      InputError: they have no row in common.
    """
    there = set(second.ids)
    common = [row for row in first.ids if row in there]
    if not common:
        raise InputError("The two have no row in common: there is nothing to compare them on.")
    first, second = first.on(common), second.on(common)
    second = Figure(second.ids, first.units, second.statistics, second.combine)
    low, high = percentiles(second.resampled(seed, resamples) - first.resampled(seed, resamples))
    p = None
    if first.combine is None and second.combine is None:
        change = (second.by_unit()[1] - first.by_unit()[1])[:, 0].round(12)
        p = sign_test(int((change > 0).sum()), int((change < 0).sum()))
    units = len(set(first.units))
    return Difference(
        first.value, second.value, second.value - first.value, low, high, p, len(common), units
    )  # fmt: skip


def sign_test(better: int, worse: int) -> float:
    """Returns the two-sided exact p of so many changes for the better and the worse; of 0/1 scores it is McNemar's."""
    changed = better + worse
    few = range(min(better, worse) + 1)
    logs = [math.lgamma(changed + 1) - math.lgamma(k + 1) - math.lgamma(changed - k + 1) for k in few]
    tail = math.fsum(math.exp(log - changed * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Returns the ends of the interval that holds the middle 95 % of resampled figures."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
