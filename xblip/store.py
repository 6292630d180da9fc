"""A feature store: what a frozen encoder makes of each source, computed once and read back by memory map.

A folder with `store.yaml`, which says of which encoder, and shards (see `xblip.shards`). Items are found by what a
source holds, never by its path alone, so a changed file has no features here instead of old ones. A process compares an
item with its checksum when it first reads it: that costs about what a disk takes to read it, and far less than a step.
"""

import hashlib
import json
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from xblip import config as configs
from xblip.contents import COLUMNS, KEY_BYTES, KnownFiles, View, describe, is_file, view_key
from xblip.errors import BundleError, ConfigError, MediaError, suggest
from xblip.modality import Features
from xblip.provenance import FORMAT, StoreFacts, differences
from xblip.shards import (
    CHECKSUM_BYTES,
    DTYPES,
    SUFFIX,
    Packed,
    Shard,
    Tables,
    pack,
    replacing,
    shards_in,
    unpack,
    write_shard,
)

FILE = "store.yaml"
SKIPPED = "skipped.jsonl"
MAX_MAPPED = 128
"""Shards that a process maps at once, each with an open file; the one that was not read for longest goes first."""
NO_FILES = np.empty((0, COLUMNS), np.uint64)


class Skip(NamedTuple):
    """A source that could not be encoded: what it is, its key ("" if it cannot be read) in hexadecimal, and why."""

    source: str
    key: str
    reason: str


class FeatureStore:
    """Stored features, found by their sources. Processes may share one, or each open its own.

    Attributes:
      folder: where it lies.
      facts: what it holds.
      files: what is known of files' contents.
      torn: shards that a crash has left incomplete; what was in them is not in the store.
      skipped: why `xblip precompute` could not encode a source, by its key.
    """

    def __init__(self, folder: Path, facts: StoreFacts):
        """Reads the index; see `open` and `create`."""
        self.folder = folder
        self.facts = facts
        self.shards: list[Shard] = []
        self.torn: list[Path] = []
        tables: list[Tables] = []
        for path in shards_in(folder):
            try:
                shard, table = Shard.open(path)
            except (ValueError, KeyError):
                self.torn.append(path)
                continue
            if (shard.encoder, shard.dtype) != (facts.encoder.fingerprint, facts.dtype):
                raise BundleError(f"{path} is not of the store it lies in: move it to its own, or delete it.")
            self.shards.append(shard)
            tables.append(table)
        self.skipped = {bytes.fromhex(skip.key): skip.reason for skip in read_skipped(folder)}
        self.files = KnownFiles(np.concatenate([NO_FILES, *(table.files for table in tables)]))
        self._index(tables)
        self._mapped: OrderedDict[int, mmap.mmap] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureStore":
        """Opens a store for reading; `~` in its folder is the user's.

        Raises:
          BundleError, ConfigError: there is none, or its files are damaged or of another version.
        """
        folder = os.path.expanduser(folder)
        path = Path(folder, FILE)
        if not path.is_file():
            raise BundleError(
                f"There is no feature store in {folder}: it lacks {FILE}. Make one: xblip precompute CONFIG --to {folder}"
            )
        saved = configs.load_yaml(path)
        if saved.get("format") != FORMAT:
            raise BundleError(
                f"{path} is of format {saved.get('format')!r}, and this version of xblip reads {FORMAT}: run xblip "
                "precompute into another folder."
            )
        return cls(Path(folder), configs.build(StoreFacts, saved, where=str(path)))

    @classmethod
    def create(cls, folder: str | Path, facts: StoreFacts) -> "FeatureStore":
        """Opens the store of these facts in a folder that is there; made if it is not there.

        Raises:
          BundleError: the folder holds features of something else, or cannot be written.
          ConfigError: unknown dtype.
        """
        if facts.dtype not in DTYPES:
            raise ConfigError(f'Features cannot be stored as "{facts.dtype}".{suggest(facts.dtype, DTYPES)}')
        path = Path(folder, FILE)
        if not path.is_file():
            with replacing(path) as file:
                file.write(OmegaConf.to_yaml(configs.plain(facts)).encode())
        store = cls.open(folder)
        if differ := differences(facts, store.facts):
            raise BundleError(f"{folder} holds other features: {'; '.join(differ)}. Give another folder.")
        return store

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what a process maps: another maps what it reads itself."""
        return {**vars(self), "_mapped": OrderedDict()}

    def key(self, source: Any) -> bytes:
        """Returns the key of a source; a file that is not known here is read.

        Raises:
          MediaError, InputError: it cannot be read, or is of no kind that has a key.
        """
        if isinstance(source, View):
            return view_key(self.key(source.source), source.number)
        return self.files.key(source)

    def features(self, source: Any) -> Features:
        """Reads the features of one source: of that content, not of that name.

        Returns:
          One item, in the stored dtype; int8 as float32.

        Raises:
          MediaError: the source cannot be read, or the encoder could not when the store was made.
          BundleError: it is not in the store, it changed since it was put there, or its features are damaged.
        """
        key = self.key(source)
        place = self._find(key)
        if place is None:
            raise self._missing(source, key)
        item = self._read(place) if self._compared[place] else self._intact(place)
        if item is None:
            shard = self.shards[self._shard_of[place]].path
            raise BundleError(
                f'The features of "{describe(source)}" in {shard} are damaged. Run xblip precompute CONFIG --to '
                f"{self.folder} --verify, which names all damaged shards; delete these, and run xblip precompute again."
            )
        self._compared[place] = True
        return unpack(item, self.facts.dtype)

    def views(self, source: Any) -> list[View]:
        """Returns the views of a source that is learnt from, as this store names them."""
        return [View(source, number) for number in range(self.facts.views.count)]

    def view(self, source: Any, draw: np.random.Generator) -> Features:
        """Reads the features of one of a source's views; raises as `features`."""
        return self.features(View(source, int(draw.integers(self.facts.views.count))))

    def check(self, sources: Iterable[Any]) -> None:
        """Checks that all sources are in the store, and remembers the files it had to read for it.

        Those that were skipped as broken when the store was made are let pass: reading them will tell.

        Raises:
          BundleError: some are not; the message names the first, and says how many.
          InputError: one is of a kind that has no key.
        """
        missing, first = 0, None
        for source in sources:
            try:
                key = self.key(source)
            except MediaError:
                continue
            if key not in self and key not in self.skipped:
                missing, first = missing + 1, first or self._missing(source, key)
        if os.access(self.folder, os.W_OK):
            self.remember(self.files.settle())
        if first:
            raise BundleError(f"{missing} of this run's sources have no stored features. {first}")

    def holds(self, source: Any) -> bool:
        """Whether the features of a source are here, as far as it is known without reading a file."""
        plain = source.source if isinstance(source, View) else source
        try:
            key = None if hasattr(plain, "read") else self.files.known(plain)
        except MediaError:
            return False
        return key is not None and (view_key(key, source.number) if isinstance(source, View) else key) in self

    def remember(self, files: np.ndarray) -> None:
        """Keeps rows of known files (n, 7) for those who open the store later."""
        with StoreWriter(self.folder, self.facts, name="files") as writer:
            writer.files.append(files)

    def content_digest(self) -> str:
        """Identifies what is in the store, in whatever shards and order."""
        digest = hashlib.blake2b(f"{self.facts.encoder.fingerprint} {self.facts.dtype}".encode(), digest_size=16)
        digest.update(np.concatenate([self._keys.view(np.uint8), self._checksums], axis=1))
        return digest.hexdigest()

    def damaged(self) -> Iterator[Path | None]:
        """Reads all features; yields, for each, the shard if it does not hold what was written, else None."""
        for place in np.argsort(self._shard_of, kind="stable"):
            yield self.shards[self._shard_of[place]].path if self._intact(place) is None else None

    def _index(self, tables: list[Tables]) -> None:
        """Sorts all items by key; of those stored twice one stays."""
        keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *(table.keys for table in tables)]).view(np.uint64)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        repeated = np.zeros(len(keys), np.bool_)
        repeated[1:] = (keys[order[1:]] == keys[order[:-1]]).all(1)
        order = order[~repeated]
        self._keys = keys[order]
        self._heads = np.ascontiguousarray(self._keys[:, 0])
        self._shard_of = np.repeat(np.arange(len(tables)), [len(table.keys) for table in tables])[order]
        self._items = np.concatenate([np.empty((0, 3), np.int64), *(table.items for table in tables)])[order]
        none = np.empty((0, CHECKSUM_BYTES), np.uint8)
        self._checksums = np.concatenate([none, *(table.checksums for table in tables)])[order]
        self._compared = np.zeros(len(order), np.bool_)

    def _find(self, key: bytes) -> int | None:
        head, tail = np.frombuffer(key, np.uint64)
        index = int(np.searchsorted(self._heads, head))
        while index < len(self._heads) and self._heads[index] == head:
            if self._keys[index, 1] == tail:
                return index
            index += 1
        return None

    def _read(self, place: int) -> Packed:
        number = int(self._shard_of[place])
        shard = self.shards[number]
        mapped = self._mapped.get(number)
        if mapped is None:
            if len(self._mapped) >= MAX_MAPPED:
                self._mapped.popitem(last=False)
            mapped = self._mapped[number] = shard.map()
        self._mapped.move_to_end(number)
        return shard.read(mapped, self._items[place])

    def _intact(self, place: int) -> Packed | None:
        """Reads an item; None if it is not what was written, or does not lie where the table says."""
        try:
            item = self._read(place)
        except (ValueError, OverflowError):
            return None
        return item if item.checksum() == self._checksums[place].tobytes() else None

    def _missing(self, source: Any, key: bytes) -> BundleError | MediaError:
        if key in self.skipped:
            return MediaError(f"{self.skipped[key]} (as xblip precompute found)")
        plain = source.source if isinstance(source, View) else source
        changed = is_file(plain) and any(held in self for held in self.files.keys(plain) if held != self.key(plain))
        what = "changed since its features were stored" if changed else "is not in the feature store"
        views = f" --views {self.facts.views.count}" if self.facts.views.count else ""
        return BundleError(
            f'"{describe(source)}" {what} in {self.folder}: run xblip precompute CONFIG --to {self.folder}{views} again, '
            "which adds what is missing."
        )


class StoreWriter:
    """Adds to a store. Any number may write at once, in any number of processes, since each names its shards.

    Attributes:
      files: rows of known files that go into the next shard.
      num_written: items that are in complete shards.
      num_added: items that were added.
      bytes_added: what these take.
    """

    def __init__(
        self,
        folder: str | Path,
        facts: StoreFacts,
        *,
        name: str = "features-00000",
        shard_bytes: int = 2**28,
        flush_seconds: float = 300,
    ):
        """Nothing is written until a shard is full, or its first item old.

        Args:
          folder: of the store.
          facts: the store's.
          name: shards begin with it; what makes them unique is added.
          shard_bytes: of features in a shard.
          flush_seconds: what a killed run loses at most.
        """
        self.folder = Path(folder)
        self.facts = facts
        self.name = f"{name}-{os.urandom(3).hex()}"
        self.shard_bytes = shard_bytes
        self.flush_seconds = flush_seconds
        self.files: list[np.ndarray] = []
        self.num_written = 0
        self.num_added = 0
        self.bytes_added = 0
        self._items: dict[bytes, Packed] = {}
        self._bytes = 0
        self._shards = 0
        self._since = time.monotonic()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Writes what is left, unless it was writing that failed."""
        if not isinstance(error, BundleError):
            self.flush()

    def add(self, key: bytes, features: Features) -> None:
        """Adds one item.

        Raises:
          MediaError: its features are not finite.
          ConfigError: they do not fit into the store's dtype.
          BundleError: a shard cannot be written.
        """
        item = pack(features, self.facts.dtype)
        self._items[key] = item
        self.num_added += 1
        self.bytes_added += item.nbytes
        self._bytes += item.nbytes
        if self._bytes >= self.shard_bytes or time.monotonic() - self._since >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what was added as a shard.

        Raises:
          BundleError: it cannot be written.
        """
        if self._items or any(map(len, self.files)):
            write_shard(
                self.folder / f"{self.name}-{self._shards:05d}{SUFFIX}",
                list(self._items),
                list(self._items.values()),
                np.concatenate([NO_FILES, *self.files]),
                width=self.facts.encoder.width,
                dtype=self.facts.dtype,
                encoder=self.facts.encoder.fingerprint,
            )
            self.num_written += len(self._items)
            self._shards += 1
        self.files, self._items, self._bytes, self._since = [], {}, 0, time.monotonic()


def read_skipped(folder: Path) -> list[Skip]:
    """Reads what could not be encoded; a last line that was cut counts as not written.

    Raises:
      BundleError: the file holds something else.
    """
    path = folder / SKIPPED
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else (), 1):
        try:
            skip = Skip(**json.loads(line))
            bytes.fromhex(skip.key)
        except (ValueError, TypeError) as cause:
            if not line.endswith(b"\n"):
                break
            raise BundleError(
                f"{path}, line {number}, is not what xblip precompute writes. Delete the file: the next xblip precompute "
                "writes it anew."
            ) from cause
        found.append(skip)
    return found
