"""Caches: what they keep within their budget, what they count, and that a value is made once whoever asks."""

import copy
import threading
from concurrent.futures import Future, ThreadPoolExecutor

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


def test_what_is_made_while_all_is_forgotten_is_given_but_not_kept():
    """Weights may have changed since it was begun."""
    cache, started, may_end, old, new = ByteCache(10_000), threading.Event(), threading.Event(), kib(1), kib(1)

    def slow(_):
        started.set()
        assert may_end.wait(10)
        return [old]

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(cache.get_or_make, ["a"], slow)
        assert started.wait(10)
        cache.clear()
        assert cache.get_or_make(["a"], lambda _: [new])[0] is new
        may_end.set()
        assert first.result(10)[0] is old and cache.get("a") is new
        assert cache.counters.entries == 1 and cache.counters.bytes == 1024


def test_a_failure_is_not_kept():
    cache = ByteCache(10_000)
    with pytest.raises(ValueError, match="broken"):
        cache.get_or_make(["a"], lambda _: (_ for _ in ()).throw(ValueError("broken")))
    assert cache.get_or_make(["a"], lambda _: [kib(1)])[0] is cache.get("a")


class OneThatFails:
    """A thread that claims keys, and fails at making them when it may; what it raises is kept in `raised`."""

    def __init__(self, cache, keys, error):
        self.cache, self.keys, self.error = cache, keys, error
        self.started, self.may_fail = threading.Event(), threading.Event()
        self.raised = None
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self.cache.get_or_make(self.keys, self._make)
        except BaseException as error:
            self.raised = error

    def _make(self, places):
        self.started.set()
        assert self.may_fail.wait(10)
        raise self.error

    def __enter__(self):
        self.thread.start()
        assert self.started.wait(10)
        return self

    def __exit__(self, *_):
        self.may_fail.set()
        self.thread.join(10)


class Waited(Future):
    """A future that says when somebody waits for it."""

    begun = threading.Semaphore(0)

    def result(self, timeout=None):
        self.begun.release()
        return super().result(timeout)


@pytest.fixture
def waited(monkeypatch):
    """Counts threads that begin to wait for what another makes."""
    monkeypatch.setattr(Waited, "begun", threading.Semaphore(0))
    monkeypatch.setattr("xblip.caches.Future", Waited)
    return Waited.begun


@pytest.mark.parametrize("error", [ValueError("of another's file"), KeyboardInterrupt(), SystemExit()], ids=repr)
def test_those_who_wait_for_what_fails_make_it_themselves(waited, error):
    cache, made = ByteCache(10_000), []

    def make(places):
        made.append(places)
        return [kib(1) for _ in places]

    with ThreadPoolExecutor(2) as threads, OneThatFails(cache, ["broken", "good"], error) as failing:
        others = [
            threads.submit(cache.get_or_make, ["own", "good"], make),
            threads.submit(cache.get_or_make, ["good"], make),
        ]
        assert all(waited.acquire(timeout=10) for _ in others)
        failing.may_fail.set()
        (_, first), (second,) = (other.result(10) for other in others)
    assert failing.raised is error
    assert first is second is cache.get("good") and cache.get("broken") is None
    assert sorted(made) == [[0], [0]] or sorted(made) == [[0], [1]], "own, then good, by one of the two"
    assert cache.counters.hits + cache.counters.misses == 5 + 1, "one look-up for each key, and the one above"


def test_each_who_waits_hears_of_its_own_failure_alone(waited):
    cache = ByteCache(10_000)

    def fail(places):
        raise ValueError("of one's own")

    with ThreadPoolExecutor(3) as threads, OneThatFails(cache, ["a"], ValueError("another's")) as failing:
        others = [threads.submit(cache.get_or_make, ["a"], fail) for _ in range(3)]
        assert all(waited.acquire(timeout=10) for _ in others)
        failing.may_fail.set()
        for other in others:
            with pytest.raises(ValueError, match="of one's own"):
                other.result(10)
    assert str(failing.raised) == "another's"


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
