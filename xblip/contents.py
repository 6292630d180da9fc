"""What a source holds, as a key: by its content, so that a changed file is another source and a moved one is not.

A file's content is read once: what is known of it is kept with its size, times and inode, as git does, and while these
are the same it is not read again. Files that changed a moment ago are not kept: a write within the clock's granularity
leaves no trace in any of them.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xblip.errors import InputError, MediaError
from xblip.media import held

KEY_BYTES = 16
COLUMNS = 7
"""Of the table of known files, uint64 each: path's hash, size, mtime_ns, ctime_ns, inode, and both halves of the key."""
SETTLED_SECONDS = 2
"""How old a change must be before a file counts as known; coarse file systems keep times by the second or two."""


class View(NamedTuple):
    """A source as its modality's augmentation drew it once: which source, and the how many-th view of it."""

    source: Any
    number: int


class KnownFiles:
    """Keys of files that were read before.

    Attributes:
      table: (F, 7) uint64, sorted by its first column; see `COLUMNS`.
      fresh: rows that are not in `table` yet, by the path's hash.
    """

    def __init__(self, table: np.ndarray | None = None):
        self.table = np.empty((0, COLUMNS), np.uint64)
        self.fresh: dict[int, tuple[int, ...]] = {}
        self._paths = self.table[:, 0]
        if table is not None:
            self._keep(table)

    def known(self, source: Any) -> bytes | None:
        """Returns a source's key without reading a file; None if one is new here or changed.

        Raises:
          MediaError, InputError: there is no such file, or the source is of no kind that has a key.
        """
        return _content_key(source, self._known_file)

    def key(self, source: Any) -> bytes:
        """Returns the key of what a source holds, 16 bytes of BLAKE2b, reading files if need be.

        Args:
          source: a path, bytes, what can be read (a member of an archive; its `name` may have an ending), an array or a
            tensor, what JSON can hold, or a list of these.

        Raises:
          MediaError: a file cannot be read, or is being written.
          InputError: it is none of these.
        """
        return _content_key(source, self._read_file)

    def _known_file(self, path: str | Path) -> bytes | None:
        return self._find(_path_hash(path), stamp(path))

    def _read_file(self, path: str | Path) -> bytes:
        place, before = _path_hash(path), stamp(path)
        if (found := self._find(place, before)) is not None:
            return found
        key = _file_key(path)
        if stamp(path) != before:
            raise MediaError(f'Cannot read "{path}": it is being written. Wait until that has ended.')
        if time.time_ns() - max(before[1:3]) > SETTLED_SECONDS * 10**9:
            self.fresh[place] = (place, *before, *np.frombuffer(key, np.uint64).tolist())
        return key

    def keys(self, path: str | Path) -> list[bytes]:
        """Returns what a file of that path held, whenever it was read."""
        place = np.uint64(_path_hash(path))
        first, last = np.searchsorted(self._paths, place), np.searchsorted(self._paths, place, side="right")
        return [row.tobytes() for row in self.table[first:last, 5:]]

    def take(self) -> np.ndarray:
        """Returns the fresh rows (n, 7), and forgets them here."""
        rows = np.array(list(self.fresh.values()), np.uint64).reshape(-1, COLUMNS)
        self.fresh = {}
        return rows

    def settle(self) -> np.ndarray:
        """Moves the fresh rows into the table; returns them (n, 7)."""
        rows = self.take()
        self._keep(rows)
        return rows

    def _keep(self, rows: np.ndarray) -> None:
        table = np.concatenate([self.table, rows]) if len(rows) else self.table
        self.table = table[np.argsort(table[:, 0], kind="stable")]
        self._paths = np.ascontiguousarray(self.table[:, 0])

    def _find(self, place: int, stat: tuple[int, ...]) -> bytes | None:
        row = self.fresh.get(place)
        if row is not None and row[1:5] == stat:
            return np.array(row[5:], np.uint64).tobytes()
        index = int(np.searchsorted(self._paths, np.uint64(place)))
        while index < len(self._paths) and self._paths[index] == place:
            if tuple(self.table[index, 1:5].tolist()) == stat:
                return self.table[index, 5:].tobytes()
            index += 1
        return None


def is_file(source: Any) -> bool:
    """Whether a source is a file's path; manifests have no other strings."""
    return isinstance(source, (str, Path))


def files_in(source: Any) -> Iterator[str | Path]:
    """Yields the paths that a source is, or lists."""
    if is_file(source):
        yield source
    elif isinstance(source, (list, tuple)):
        for part in source:
            if not _is_text(part):
                yield from files_in(part)


def _content_key(source: Any, file_key: Callable[[str | Path], bytes | None]) -> bytes | None:
    """Returns the key of a source, as `KnownFiles.key`; None if `file_key` gives none of a path in it."""
    if is_file(source):
        return file_key(source)
    if hasattr(source, "read"):
        return _hash(_person(str(getattr(source, "name", ""))), held(source, kind="source").read())
    if isinstance(source, (bytes, bytearray)):
        return _hash(_person(""), source)
    if isinstance(source, (list, tuple)) and _is_of_parts(source):
        keys = [_part_key(part, file_key) for part in source]
        return None if None in keys else _hash(b"list", b"".join(keys))
    try:
        if isinstance(source, (np.ndarray, Tensor)):
            return _array_key(source)
        return _hash(b"json", json.dumps(source, sort_keys=True, separators=(",", ":")).encode())
    except (TypeError, ValueError, RuntimeError) as cause:  # RuntimeError: torch's, of a tensor without its numbers
        raise InputError(
            f"Features are stored by what a source holds, and a {type(source).__name__} has no bytes to tell: give a file, "
            "bytes, or lists of numbers."
        ) from cause


def _part_key(part: Any, file_key: Callable[[str | Path], bytes | None]) -> bytes | None:
    """Returns the key of a part of a list; a file's knows its name too, since a text may be called like some file."""
    if _is_text(part):
        return _hash(b"json", json.dumps(part).encode())
    key = _content_key(part, file_key)
    if key is None or not is_file(part):
        return key
    return _hash(b"part", key + os.fsencode(os.path.basename(part)))


def _is_text(part: Any) -> bool:
    """Whether a part of a list is a text that names no file."""
    return isinstance(part, str) and not os.path.isfile(os.path.expanduser(part))


def _is_of_parts(source: Any) -> bool:
    """Whether a source or what it lists, however nested, is more than values that JSON writes as they are."""
    if isinstance(source, (list, tuple)):
        return any(map(_is_of_parts, source))
    return not isinstance(source, (int, float, dict, type(None)))


def _array_key(source: np.ndarray | Tensor) -> bytes:
    """Returns the key of an array, which a tensor of the same numbers does not have: modalities may order them otherwise."""
    about = f"{type(source).__name__} {source.dtype} {tuple(source.shape)}"
    if isinstance(source, Tensor):
        source = source.detach().contiguous().flatten().view(torch.uint8).numpy(force=True)
    if isinstance(source, np.ma.MaskedArray) or source.dtype.hasobject:
        raise TypeError("an array that does not hold its numbers")
    return _hash(b"array", about.encode() + source.tobytes())


def view_key(key: bytes, number: int) -> bytes:
    """Returns the key of a view of the source that has this key."""
    return _hash(b"view", key + number.to_bytes(8, "little"))


def stamp(path: str | Path) -> tuple[int, int, int, int]:
    """What changes whenever a file does: its size, times and inode.

    Raises:
      MediaError: there is no such file.
    """
    try:
        found = os.stat(os.path.expanduser(path))
    except (OSError, ValueError) as cause:
        raise MediaError(f'Cannot read "{path}": {getattr(cause, "strerror", None) or cause}.') from cause
    times = found.st_mtime_ns % 2**64, found.st_ctime_ns % 2**64  # a time before 1970 is negative
    return found.st_size, *times, found.st_ino


def describe(source: Any) -> str:
    """How messages call a source: its path, or the beginning of what it is."""
    if isinstance(source, View):
        return f"{describe(source.source)}, view {source.number}"
    return str(source) if is_file(source) else str(getattr(source, "name", None) or f"{source!r:.60}")


def _file_key(path: str | Path) -> bytes:
    person = _person(str(path))
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=KEY_BYTES, person=person)).digest()
    except OSError as cause:
        raise MediaError(f'Cannot read "{path}": {cause.strerror}.') from cause


def _hash(person: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES, person=person).digest()


def _person(name: str) -> bytes:
    """A file's ending: it may say how the same bytes are to be read, so it belongs to the content."""
    return os.path.splitext(name)[1].lower().encode(errors="surrogateescape")[:16]


def _path_hash(path: str | Path) -> int:
    name = os.fsencode(os.path.abspath(os.path.expanduser(path)))
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def flush(path: str | Path) -> None:
    """Makes lasting what was written at a path: a file's content, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
