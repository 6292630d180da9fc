"""Caches with a budget in bytes, safe under threads: what was made once for a question is there for the next.

A value is made by one thread and the others wait for it: a film that a hundred callers send at once is encoded once.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class CacheCounters:
    """What a cache has done.

    Attributes:
      hits: values that were there, or that another thread was making.
      misses: values that were made.
      evictions: values that made room for others.
      entries, bytes: what it holds now.
      budget_bytes: what it may hold.
    """

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    budget_bytes: int


class ByteCache:
    """Values by key, those not used for longest going first; a value above the budget is not kept at all."""

    def __init__(self, budget_bytes: int):
        self._lock = threading.Lock()
        self._budget_bytes = budget_bytes
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._making: dict[Hashable, Future] = {}
        self._bytes = self._hits = self._misses = self._evictions = 0

    @property
    def budget_bytes(self) -> int:
        """What it may hold; where it is set lower, values go at once."""
        return self._budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, budget_bytes: int) -> None:
        with self._lock:
            self._budget_bytes = budget_bytes
            self._make_room()

    def get_or_make(self, keys: Sequence[Hashable], make: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
        """Returns the values of keys, made all at once where they are missing.

        What another thread fails to make is made here: it may have failed at other keys that it made together with these.

        Args:
          keys: of the values wanted; a key may come twice.
          make: takes places in `keys`, each of another key, and returns their values.

        Raises:
          Whatever `make` raises here; nothing is kept of it then.
        """
        wanted: dict[Hashable, int] = {}
        for place, key in enumerate(keys):
            wanted.setdefault(key, place)
        with self._lock:
            self._hits += len(keys) - len(wanted)
        values: dict[Hashable, Any] = {}
        while wanted:
            found, others, own = self._claim(wanted)
            values |= found
            if own:
                values |= self._make(own, make)
            for key, future in others.items():
                with contextlib.suppress(CancelledError):
                    values[key] = future.result()
            wanted = {key: place for key, place in wanted.items() if key not in values}
            with self._lock:
                self._hits -= len(wanted)
        return [values[key] for key in keys]

    def _claim(
        self, wanted: dict[Hashable, int]
    ) -> tuple[dict[Hashable, Any], dict[Hashable, Future], dict[Hashable, tuple[int, Future]]]:
        """Returns the values that are there, what others are making, and the places of keys that are to be made here, each
        with what others wait by."""
        found, others, own = {}, {}, {}
        with self._lock:
            for key, place in wanted.items():
                if key in self._held:
                    self._held.move_to_end(key)
                    found[key] = self._held[key][0]
                elif key in self._making:
                    others[key] = self._making[key]
                else:
                    self._making[key] = Future()
                    own[key] = place, self._making[key]
            self._hits += len(found) + len(others)
            self._misses += len(own)
        return found, others, own

    def _make(
        self, own: dict[Hashable, tuple[int, Future]], make: Callable[[list[int]], Sequence[Any]]
    ) -> dict[Hashable, Any]:
        """Makes what was claimed; whoever waits for it is given it, or left to make it."""
        try:
            values = list(make([place for place, _ in own.values()]))
            assert len(values) == len(own)
        except BaseException:
            with self._lock:
                for key, (_, future) in own.items():
                    self._release(key, future)
                    future.cancel()
            raise
        with self._lock:
            for (key, (_, future)), value in zip(own.items(), values, strict=True):
                if self._release(key, future):
                    self._keep(key, value)
                future.set_result(value)
        return dict(zip(own, values, strict=True))

    def _release(self, key: Hashable, future: Future) -> bool:
        """Takes back a claim; returns whether it stood, since `clear` takes all."""
        stood = self._making.get(key) is future
        if stood:
            del self._making[key]
        return stood

    def get(self, key: Hashable) -> Any:
        """Returns a value that is there, or None."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            self._hits += 1
            return self._held[key][0]

    def put(self, key: Hashable, value: Any) -> None:
        """Keeps a value in the place of an earlier one."""
        with self._lock:
            self._keep(key, value)

    def _keep(self, key: Hashable, value: Any) -> None:
        size = bytes_of(value)
        if key in self._held:
            self._bytes -= self._held.pop(key)[1]
        if size <= self._budget_bytes:
            self._held[key] = value, size
            self._bytes += size
            self._make_room()

    def _make_room(self) -> None:
        while self._bytes > self._budget_bytes:
            _, (_, freed) = self._held.popitem(last=False)
            self._bytes -= freed
            self._evictions += 1

    def items(self) -> list[tuple[Hashable, Any]]:
        """Returns what is held, the least used first; looking is no use."""
        with self._lock:
            return [(key, value) for key, (value, _) in self._held.items()]

    def __reduce__(self) -> tuple:
        """A copy begins empty: what is held may be gigabytes, and is of this process."""
        return ByteCache, (self._budget_bytes,)

    def clear(self) -> None:
        """Forgets all values, and keeps none of what is being made; the counters go on."""
        with self._lock:
            self._held.clear()
            self._making.clear()
            self._bytes = 0

    @property
    def counters(self) -> CacheCounters:
        with self._lock:
            return CacheCounters(
                self._hits, self._misses, self._evictions, len(self._held), self._bytes, self._budget_bytes
            )


class Caches:
    """What a model keeps between questions, each kind with a budget of its own.

    Attributes:
      features: what encoders gave, by the source's content, the modality's settings and the encoder's weights.
      prompts: what bridges read of features (cross-attention's keys and values), and soft prompts: by the features, the
        bridge's weights and, if the bridge reads it, the instruction.
      prefixes: the LLM's keys and values of how prompts begin, by what is in them.
    """

    def __init__(self, *, features_bytes: int = 2**30, prompts_bytes: int = 2**30, prefixes_bytes: int = 2**30):
        """Makes empty caches; a budget of 0 keeps nothing."""
        self.features = ByteCache(features_bytes)
        self.prompts = ByteCache(prompts_bytes)
        self.prefixes = ByteCache(prefixes_bytes)

    @property
    def counters(self) -> dict[str, CacheCounters]:
        """By the cache's name."""
        return {name: cache.counters for name, cache in vars(self).items()}

    def clear(self) -> None:
        for cache in vars(self).values():
            cache.clear()


def bytes_of(value: Any) -> int:
    """How much the tensors in a value hold, found in lists, tuples, dictionaries and objects' attributes.

    A view counts with all of what it is a view of, since that is what stays in memory; each storage counts once.
    """
    storages: dict[int, int] = {}
    _collect(value, storages)
    return sum(storages.values())


def _collect(value: Any, storages: dict[int, int]) -> None:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, (list, tuple)):
        for part in value:
            _collect(part, storages)
    elif isinstance(value, dict):
        _collect(list(value.values()), storages)
    elif hasattr(value, "__dict__"):
        _collect(list(vars(value).values()), storages)
