"""Caches: what they keep within their budget, what they count, and that a value is made once whoever asks."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from xblip.caches import ByteCache, Caches, bytes_of


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count, 1024, dtype=torch.uint8)


def test_a_value_is_made_once_and_counted():
    cache, made = ByteCache(10_000), []

    def make(places):
        made.append(places)
        return [kib(1) for _ in places]

    first = cache.get_or_make(["a", "b", "a"], make)
    assert first[0] is first[2] and made == [[0, 1]]
    assert cache.get_or_make(["c", "a"], make)[1] is first[0] and made == [[0, 1], [0]]
    counters = cache.counters
    assert (counters.hits, counters.misses, counters.entries, counters.bytes) == (2, 3, 3, 3072)


def test_what_was_not_used_for_longest_goes_first():
    cache = ByteCache(3 * 1024)
    for key in "abc":
        cache.put(key, kib(1))
    assert cache.get("a") is not None
    cache.put("d", kib(1))
    assert [key for key, _ in cache.items()] == ["c", "a", "d"]
    assert cache.counters.evictions == 1 and cache.counters.bytes == 3072
    cache.put("d", kib(2))
    assert [key for key, _ in cache.items()] == ["a", "d"] and cache.counters.bytes == 3072


@pytest.mark.parametrize("budget", [0, 1024])
def test_a_value_above_the_budget_is_given_but_not_kept(budget):
    cache = ByteCache(budget)
    assert cache.get_or_make(["a"], lambda _: [kib(2)])[0].shape == (2, 1024)
    assert cache.counters.entries == cache.counters.bytes == 0 and cache.get("a") is None


@pytest.mark.parametrize(("budget", "left"), [(2048, "bc"), (1500, "c"), (0, "")])
def test_a_lower_budget_makes_room_at_once(budget, left):
    cache = ByteCache(3 * 1024)
    for key in "abc":
        cache.put(key, kib(1))
    cache.budget_bytes = budget
    assert [key for key, _ in cache.items()] == [*left]
    counters = cache.counters
    assert (counters.bytes, counters.evictions) == (1024 * len(left), 3 - len(left))
    cache.put("d", kib(4))
    assert cache.counters.bytes <= cache.budget_bytes == counters.budget_bytes == budget


def test_threads_wait_for_the_one_that_makes():
    cache, started, may_end, made = ByteCache(10_000), threading.Event(), threading.Event(), []

    def slow(places):
        started.set()
        assert may_end.wait(10)
        made.append(places)
        return [kib(1)]

    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(cache.get_or_make, ["a"], slow)
        assert started.wait(10)
        others = [threads.submit(cache.get_or_make, ["a"], slow) for _ in range(7)]
        may_end.set()
        results = [future.result(10)[0] for future in [first, *others]]
    assert all(result is results[0] for result in results) and len(made) == 1
    assert cache.counters.hits == 7 and cache.counters.misses == 1


def test_a_failure_is_not_kept():
    cache = ByteCache(10_000)
    with pytest.raises(ValueError, match="broken"):
        cache.get_or_make(["a"], lambda _: (_ for _ in ()).throw(ValueError("broken")))
    assert cache.get_or_make(["a"], lambda _: [kib(1)])[0] is cache.get("a")


def test_those_who_wait_for_a_failure_hear_of_it():
    cache, started, may_end = ByteCache(10_000), threading.Event(), threading.Event()

    def fail(places):
        started.set()
        assert may_end.wait(10)
        raise ValueError("broken")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.get_or_make, ["a"], fail)
        assert started.wait(10)
        second = threads.submit(cache.get_or_make, ["a"], lambda _: [kib(1)])
        while cache.counters.hits == 0:
            pass
        may_end.set()
        for future in (first, second):
            with pytest.raises(ValueError, match="broken"):
                future.result(10)


def test_two_threads_that_make_what_the_other_wants_do_not_lock_up():
    cache, both = ByteCache(10_000), threading.Barrier(2)

    def make(places):
        both.wait(10)
        return [kib(1) for _ in places]

    def ask(keys):
        cache.get_or_make(keys[:1], make)
        return cache.get_or_make(keys, make)

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(ask, [["a", "b"], ["b", "a"]], timeout=20))
    assert results[0][0] is results[1][1]


def test_bytes_are_those_of_storages():
    whole = kib(4)
    assert bytes_of([whole[:1], whole[1:2], {"a": (whole,)}]) == 4096
    assert bytes_of(("a", 3, None)) == 0


def test_a_copy_begins_empty():
    caches = Caches(features_bytes=5000)
    caches.features.put("a", kib(1))
    other = copy.deepcopy(caches)
    assert other.features.budget_bytes == 5000 and other.counters["features"].entries == 0
    caches.clear()
    assert caches.counters["features"].entries == caches.counters["features"].bytes == 0
