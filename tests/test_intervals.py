"""Intervals cover what they should, draw dependent rows together, and compare two systems row by row."""

import math

import numpy as np
import pytest

from xblip.errors import InputError
from xblip.intervals import Figure, difference, measure, sign_test


def figure(values, units=None, combine=None):
    lines = [{"id": str(index), "unit": units[index] if units else ""} for index in range(len(values))]
    return Figure.of(lines, values, combine)


def test_an_interval_is_that_of_theory():
    got = measure(figure([1.0] * 300 + [0.0] * 100), resamples=4000)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert got.value == 0.75 and (got.n, got.units) == (400, 400)
    assert got.low == pytest.approx(0.75 - half, abs=0.006) and got.high == pytest.approx(0.75 + half, abs=0.006)


@pytest.mark.parametrize(("mark", "low", "high"), [(1, 0.6915, 1.0), (0, 0.0, 0.3085)])
def test_all_right_or_none_has_the_exact_interval_of_its_units(mark, low, high):
    """Clopper and Pearson's for ten of ten; rows of one unit count as one trial."""
    rows = [{"id": f"{unit}-{row}", "unit": str(unit)} for unit in range(10) for row in range(3)]
    found = measure(Figure.of(rows, [mark] * 30))
    assert (found.value, found.n, found.units) == (mark, 30, 10)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_equal_seeds_give_equal_intervals_whatever_the_order_of_rows():
    values = np.random.default_rng(0).random(50)
    one = figure(values)
    other = one.on([*reversed(one.ids)])
    assert measure(one, seed=3)[1:3] == pytest.approx(measure(other, seed=3)[1:3])
    assert measure(one, seed=3) != measure(one, seed=4)


def test_rows_of_a_unit_are_drawn_together():
    values = [float(index % 4 < 2) for index in range(400)]
    alone = measure(figure(values))
    pairs = measure(figure(values, [str(index // 2) for index in range(400)]))
    assert pairs.units == 200 and pairs.value == alone.value
    assert (pairs.high - pairs.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(2), rel=0.1)


def test_units_of_different_sizes_count_by_their_rows():
    got = figure([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert got.value == 0.75 and set(got.resampled()) == {0.0, 0.75, 1.0}


def test_a_figure_of_means_is_made_anew_of_every_draw():
    ratio = figure([[1.0, 2.0], [3.0, 2.0]], combine=lambda means: means[..., 0] / means[..., 1])
    assert ratio.value == 1.0 and set(ratio.resampled()) == {0.5, 1.0, 1.5} and ratio.scores == {}
    assert not ratio.is_binary


def test_two_systems_are_compared_on_the_rows_that_both_have():
    first = figure([1.0] * 60 + [0.0] * 40)
    better = figure([1.0] * 70 + [0.0] * 30).on([str(index) for index in range(5, 100)])
    got = difference(first, better)
    assert (got.n, got.p) == (95, sign_test(10, 0))
    assert (got.first, got.second) == (55 / 95, 65 / 95) and got.low > 0
    assert got.difference == pytest.approx(10 / 95) and got.low < got.difference < got.high
    with pytest.raises(InputError, match="no row in common"):
        difference(first, Figure(["x"], ["x"], np.ones((1, 1))))


def test_a_paired_difference_is_narrower_than_two_intervals():
    chance = np.random.default_rng(1)
    hard = chance.random(300)
    first, second = figure(hard), figure(hard + 0.02 + 0.01 * chance.random(300))
    got = difference(first, second)
    assert got.low > 0 and got.high - got.low < 0.01 < measure(first).high - measure(first).low
    assert got.p < 1e-20


def test_a_corpus_figure_has_no_p():
    square = lambda means: means[..., 0] ** 2  # noqa: E731
    assert difference(figure([1.0, 0.0], combine=square), figure([1.0, 1.0], combine=square)).p is None


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (4, 4, 1.0)]
)
def test_the_exact_p(better, worse, p):
    assert sign_test(better, worse) == pytest.approx(p) == sign_test(worse, better)


def test_the_exact_p_of_many_rows():
    assert sign_test(5000, 5000) == 1.0 and sign_test(5200, 4800) == pytest.approx(6.6e-5, rel=0.05)


def test_no_rows_no_figure():
    with pytest.raises(InputError, match="no rows"):
        Figure.of([], [])
