"""Plans of batches: every row in its turn, the same on all processes, and nothing of it depending on what came before."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from xblip.data import Visit
from xblip.errors import ConfigError
from xblip.mixture import WINDOW, BatchPlan, Source, seats, shares_of

MIXED = [Source(50, "image"), Source(7, "image"), Source(20, "audio"), Source(9, "audio")]


def plan(sources=MIXED, **options) -> BatchPlan:
    return BatchPlan(sources, **{"batch_size": 4, "seed": 3, **options})


def epochs(plan: BatchPlan, *numbers: int) -> list[list[Visit]]:
    batches = []
    for number in numbers:
        plan.set_epoch(number)
        batches += plan
    return batches


@pytest.mark.parametrize("lengths", [None, np.arange(50) % 9])
def test_an_epoch_of_one_source_visits_each_row_once_and_fills_its_tail(lengths):
    one = plan([Source(50, lengths=lengths)], group_by_length=lengths is not None)
    assert len(one) == one.steps_per_epoch == 13
    seen = []
    for epoch in range(3):
        batches = epochs(one, epoch)
        assert {len(batch) for batch in batches} == {4} and len(batches) == 13
        visits = [visit for batch in batches for visit in batch]
        assert {visit.epoch for visit in visits} == {epoch}
        counts = Counter(visit.index for visit in visits)
        assert sorted(counts) == list(range(50)) and sum(counts.values()) == 52 and max(counts.values()) == 2
        seen.append(visits)
    assert [visit.index for visit in seen[0]] != [visit.index for visit in seen[1]] != list(range(50))
    if lengths is None:  # the tail is the head of the same permutation
        assert seen[0][50:] == seen[0][:2]


def test_in_a_mixture_positions_go_on_from_epoch_to_epoch():
    batches = epochs(plan(), *range(12))
    for number, source in enumerate(MIXED):
        own = [visit for batch in batches for visit in batch if visit.source == number]
        assert all(left.epoch <= right.epoch for left, right in itertools.pairwise(own))
        for epoch in range(own[-1].epoch):
            rows = [visit.index for visit in own if visit.epoch == epoch]
            assert sorted(set(rows)) == list(range(source.rows)) and len(rows) == -(-source.rows // 4) * 4


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("weights", ["size", "sqrt", "equal", [1, 2, 3, 0.1]])
def test_a_step_is_of_one_group_and_a_micro_batch_of_one_source(weights, accumulation):
    mixed = plan(weights=weights, accumulation=accumulation)
    batches = epochs(mixed, 0, 1, 2)
    assert len(batches) == 3 * len(mixed) == 3 * mixed.steps_per_epoch * accumulation
    assert mixed.steps_per_epoch == -(-86 // (4 * accumulation))
    assert all(len({visit.source for visit in batch}) == 1 for batch in batches)
    groups = [MIXED[batch[0].source].group for batch in batches]
    steps = [set(groups[at : at + accumulation]) for at in range(0, len(groups), accumulation)]
    assert all(len(step) == 1 for step in steps) and len(set(map(frozenset, steps))) == 2
    assert len(set(groups[: len(mixed)])) == 2, "groups are not mixed within an epoch"


@pytest.mark.parametrize("options", [{}, {"accumulation": 2, "weights": "sqrt"}, {"group_by_length": True}], ids=str)
def test_two_processes_share_what_one_does_alone(options):
    sources = [Source(s.rows, s.group, np.arange(s.rows) * 7 % 11) for s in MIXED]
    alone = epochs(plan(sources, batch_size=6, **options), 0, 1, 2)
    ranks = [epochs(plan(sources, batch_size=3, world_size=2, rank=rank, **options), 0, 1, 2) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == alone
    assert all(not set(first) & set(second) for first, second in zip(*ranks, strict=True) if first[0].source == 0)


def test_the_seed_alone_decides():
    assert epochs(plan(), 0, 1) == epochs(plan(), 0, 1) != epochs(plan(seed=4), 0, 1)
    late = epochs(plan(), 1)
    assert late == epochs(plan(), 0, 1)[len(plan()) :]


def test_shares_of_visits_are_as_asked():
    for weights, expected in (("size", [50, 7, 20, 9]), ([3, 1, 0.5, 0.5], [3, 1, 0.5, 0.5])):
        counts = Counter(batch[0].source for batch in epochs(plan(weights=weights), *range(40)))
        got = np.array([counts[source] for source in range(4)])
        assert np.abs(got - np.array(expected) / sum(expected) * got.sum()).max() <= 2


def test_batches_by_length_waste_less_and_stay_random():
    lengths = np.random.default_rng(0).integers(1, 200, 5000)
    spread = {}
    for by_length in (False, True):
        batches = epochs(plan([Source(5000, lengths=lengths)], batch_size=8, group_by_length=by_length), 0)
        taken = [lengths[[visit.index for visit in batch]] for batch in batches]
        spread[by_length] = 1 - np.mean([batch.mean() / batch.max() for batch in taken])
        means = [batch.mean() for batch in taken[:WINDOW]]
        assert not by_length or means != sorted(means)
    assert spread[True] < 0.13 < 0.3 < spread[False]


def test_few_rows_repeat_within_the_tail_alone():
    batches = epochs(plan([Source(3)], batch_size=2, world_size=3, rank=1), 0, 1)
    assert [len(batch) for batch in batches] == [2, 2]
    ranks = [epochs(plan([Source(3)], batch_size=2, world_size=3, rank=rank), 0) for rank in range(3)]
    assert Counter(visit.index for batches in ranks for visit in batches[0]) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("size", [0.8, 0.2]),
        ("sqrt", [2 / 3, 1 / 3]),
        ("equal", [0.5, 0.5]),
        ({"temperature": 2}, [2 / 3, 1 / 3]),
        ({"temperature": 1.0}, [0.8, 0.2]),
        ([1, 3], [0.25, 0.75]),
    ],
)
def test_shares(weights, expected):
    assert np.allclose(shares_of(weights, [400, 100]), expected)


def test_seats_only_grow_and_stay_near_their_shares():
    generator = np.random.default_rng(0)
    for count in (1, 2, 5, 12):
        shares = generator.random(count) ** 3 + 1e-3
        shares /= shares.sum()
        before = seats(shares, 0)
        for total in range(1, 300):
            now = seats(shares, total)
            assert now.sum() == total and (now - before).min() >= 0 and np.abs(now - shares * total).max() < 2
            before = now


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("sqr", 'Unknown weights "sqr" of a mixture. Did you mean "sqrt"'),
        ({"temprature": 2}, r"such as {temperature: 2}, not {'temprature': 2}"),
        ({"temperature": 0}, "by temperature are such as"),
        ([1, 2], r"must be a number above 0 for each of its 4 sources, not \[1, 2\]"),
        ([1, 2, 0, 3], "must be a number above 0"),
        (3, "must be a number above 0"),
    ],
)
def test_weights_that_are_none_are_named(weights, message):
    with pytest.raises(ConfigError, match=message):
        plan(weights=weights)


def test_too_few_rows_for_the_processes_are_named():
    with pytest.raises(ConfigError, match=r"a.jsonl has 3 rows, too few to give each of 4 processes one of its own"):
        plan([Source(3, name="a.jsonl")], world_size=4)
    with pytest.raises(ConfigError, match="There is nothing to mix"):
        plan([])


@pytest.mark.slow
def test_ten_million_rows_take_seconds_not_minutes():
    started = time.monotonic()
    large = plan([Source(10_000_000), Source(1000)], batch_size=64, weights="sqrt", world_size=4, rank=3)
    large.set_epoch(2)
    batches = list(itertools.islice(large, 20_000, 20_200))
    assert len(batches) == 200 and time.monotonic() - started < 10
