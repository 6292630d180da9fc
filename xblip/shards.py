"""Shards of stored features: files that are complete or not there, mapped into memory and read item by item.

A shard is a safetensors file, so that other tools can read it. Its small tables stand before the features, and an index
of a store is nothing but the tables of its shards: there is no second place that could say otherwise. It is written
under another name, flushed to disk and renamed, so that one whose writer was killed is never taken for a shard.
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xblip.contents import COLUMNS, KEY_BYTES, flush
from xblip.errors import BundleError, ConfigError, MediaError
from xblip.modality import Features

SUFFIX = ".safetensors"
PARTIAL = ".partial"
NAMED = re.compile(rf"(features-\d+|files)-[0-9a-f]{{6}}-\d+{re.escape(SUFFIX)}")
"""How `xblip.store.StoreWriter` names shards; a file of another name is none, whatever its ending."""
CHECKSUM_BYTES = 8
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16, "int8": np.int8}
"""How features may be stored, and what numpy holds them as; it lacks bfloat16."""
NAMES = {
    np.dtype(np.uint8): "U8", np.dtype(np.int8): "I8", np.dtype(np.bool_): "BOOL", np.dtype(np.int16): "BF16",
    np.dtype(np.float16): "F16", np.dtype(np.float32): "F32", np.dtype(np.int64): "I64", np.dtype(np.uint64): "U64",
}  # fmt: skip
"""Of numpy's dtypes in a safetensors header."""


class Packed(NamedTuple):
    """An item's features as they are stored.

    Attributes:
      shape: segments S and tokens N.
      values: (S * N, D_enc) in the stored dtype.
      scales: (S * N,) float32 that int8 values are multiplied by; empty for other dtypes.
      mask: (S * N,) boolean.
    """

    shape: tuple[int, int]
    values: np.ndarray
    scales: np.ndarray
    mask: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the item, mask and tables included."""
        return self.values.nbytes + self.scales.nbytes + self.mask.nbytes + KEY_BYTES + 24 + CHECKSUM_BYTES

    def checksum(self) -> bytes:
        """Of everything that the item holds."""
        digest = hashlib.blake2b(np.array(self.shape, np.int64).tobytes(), digest_size=CHECKSUM_BYTES)
        for part in (self.values, self.scales, self.mask):
            digest.update(np.ascontiguousarray(part).view(np.uint8))
        return digest.digest()


def pack(features: Features, dtype: str) -> Packed:
    """Makes of one item's features what is stored.

    int8 has a scale for each token, the largest of its absolute values / 127, so that a value is off by half a scale at
    most.

    Raises:
      MediaError: some are not finite.
      ConfigError: they are too large for float16.
    """
    values = features.values.detach().cpu().flatten(0, 1)
    largest = max(map(abs, values.float().aminmax())).item()  # a tenth of the time of isfinite; keeps NaN too
    if not largest < float("inf"):
        raise MediaError("The encoder gives features that are not finite.")
    scales = np.empty(0, np.float32)
    if dtype == "int8":
        values = values.float()
        limits = values.abs().amax(1)
        quantised = (values * (127 / limits.clamp_min(1e-30))[:, None]).round_().clamp_(-127, 127)
        stored, scales = quantised.to(torch.int8).numpy(), (limits / 127).numpy()
    else:
        kind = getattr(torch, dtype)
        if largest > torch.finfo(kind).max:
            raise ConfigError(
                f"Features of up to {largest:.3g} do not fit into {dtype}: store them as bfloat16 or float32."
            )
        cast = values.to(kind)
        stored = (cast.view(torch.int16) if dtype == "bfloat16" else cast).numpy()
    mask = features.mask.detach().cpu().flatten().numpy()
    return Packed(tuple(features.values.shape[:2]), np.ascontiguousarray(stored), scales, np.ascontiguousarray(mask))


def unpack(item: Packed, dtype: str) -> Features:
    """The inverse of `pack`, in the stored dtype; int8 gives float32. `item` must be no view of a file."""
    values = torch.from_numpy(item.values)
    if dtype == "int8":
        values = values.float() * torch.from_numpy(item.scales)[:, None]
    elif dtype == "bfloat16":
        values = values.view(torch.bfloat16)
    segments, tokens = item.shape
    mask: Tensor = torch.from_numpy(item.mask).view(segments, tokens)
    return Features(values.view(segments, tokens, -1), mask, [segments])


class Tables(NamedTuple):
    """What a shard says of its items.

    Attributes:
      keys: (n, 16) bytes.
      items: (n, 3) int64: first row of its tokens, segments S, tokens N.
      checksums: (n, 8) bytes.
      files: (f, 7) known files; see `xblip.contents`.
    """

    keys: np.ndarray
    items: np.ndarray
    checksums: np.ndarray
    files: np.ndarray


TABLES = {"keys": np.uint8, "items": np.int64, "checksums": np.uint8, "files": np.uint64}
"""Names of `Tables` in a shard, and what they hold."""


class Shard:
    """A complete shard.

    Attributes:
      path: of its file.
      encoder: fingerprint of the encoder whose features it holds.
      dtype: that they are stored in.
    """

    def __init__(self, path: Path, *, encoder: str, dtype: str, places: dict[str, tuple[int, tuple[int, ...]]]):
        """Keeps what `open` read; `places` are offset and shape of each part of the file."""
        self.path = path
        self.encoder = encoder
        self.dtype = dtype
        self._places = places

    @classmethod
    def open(cls, path: Path) -> tuple["Shard", Tables]:
        """Reads what a shard is, and the tables of its items, which may be dropped.

        Raises:
          ValueError, KeyError: it is torn.
        """
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= 1 << 20:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            said, start = header.pop("__metadata__"), 8 + length
            ends = {name: start + part["data_offsets"][1] for name, part in header.items()}
            if os.fstat(file.fileno()).st_size != max(ends.values()):
                raise ValueError(f"it should have {max(ends.values())} bytes")
            head = file.read(max(ends[name] for name in TABLES) - start)
        places = {name: (start + part["data_offsets"][0], tuple(part["shape"])) for name, part in header.items()}
        tables = [
            np.frombuffer(head, dtype, int(np.prod(places[name][1])), places[name][0] - start).reshape(places[name][1])
            for name, dtype in TABLES.items()
        ]
        return cls(path, encoder=said["encoder"], dtype=said["dtype"], places=places), Tables(*tables)

    def map(self) -> mmap.mmap:
        """Maps the file into memory; nothing of it is read yet."""
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, mapped: mmap.mmap, item: Sequence[int]) -> Packed:
        """Copies one item, a row of `Tables.items`, out of the mapped file."""
        row, segments, tokens = map(int, item)
        count = segments * tokens
        width = self._places["values"][1][1]
        values = self._part(mapped, "values", DTYPES[self.dtype], row * width, count * width).reshape(count, width)
        scales = self._part(mapped, "scales", np.float32, row, count if self.dtype == "int8" else 0)
        masked = "mask" in self._places
        mask = self._part(mapped, "mask", np.bool_, row, count) if masked else np.ones(count, np.bool_)
        return Packed((segments, tokens), values, scales, mask)

    def _part(self, mapped: mmap.mmap, name: str, dtype: type, first: int, count: int) -> np.ndarray:
        if not count:
            return np.empty(0, dtype)
        place = self._places[name][0] + first * np.dtype(dtype).itemsize
        return np.frombuffer(mapped, dtype, count, place).copy()


def write_shard(
    path: Path,
    keys: Sequence[bytes],
    items: Sequence[Packed],
    files: np.ndarray,
    *,
    width: int,
    dtype: str,
    encoder: str,
) -> None:
    """Writes a shard; when it returns, the shard is on disk.

    Args:
      path: of the shard.
      keys: of the items.
      items: at least one, or else `files` must have rows.
      files: (f, 7) known files.
      width: D_enc.
      dtype: of `DTYPES`.
      encoder: its fingerprint.

    Raises:
      BundleError: it cannot be written, such as on a full disk; nothing is left of it.
    """
    sizes = [len(item.values) for item in items]
    count, rows = len(items), sum(sizes)
    table = [(first, *item.shape) for first, item in zip(np.cumsum([0, *sizes]), items, strict=False)]
    checksums = b"".join(item.checksum() for item in items)
    # The tables first, which are read together; then by width, so that all is aligned.
    parts: dict[str, tuple[type, tuple[int, ...], Sequence[np.ndarray]]] = {
        "keys": (np.uint8, (count, KEY_BYTES), [np.frombuffer(b"".join(keys), np.uint8)]),
        "checksums": (np.uint8, (count, CHECKSUM_BYTES), [np.frombuffer(checksums, np.uint8)]),
        "items": (np.int64, (count, 3), [np.array(table, np.int64)]),
        "files": (np.uint64, (len(files), COLUMNS), [files]),
    }
    if dtype == "int8":
        parts["scales"] = (np.float32, (rows,), [item.scales for item in items])
    parts["values"] = (DTYPES[dtype], (rows, width), [item.values for item in items])
    if not all(item.mask.all() for item in items):
        parts["mask"] = (np.bool_, (rows,), [item.mask for item in items])
    with replacing(path) as file:
        file.write(_header(parts, {"encoder": encoder, "dtype": dtype}))
        for _, _, arrays in parts.values():
            for array in arrays:
                file.write(np.ascontiguousarray(array).data)


def shards_in(folder: Path) -> list[Path]:
    """Returns the files of a folder that are shards by their names."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if NAMED.fullmatch(path.name))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes the place of `path` once it is whole and on disk, and not before.

    Raises:
      BundleError: it cannot be written, such as on a full disk; nothing is left of it.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        flush(path.parent)
    except OSError as cause:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise BundleError(
            f"Cannot write {path}: {cause.strerror}. What was complete is kept: make room, and run the same command again."
        ) from cause


def _header(parts: dict[str, tuple[type, tuple[int, ...], Sequence[np.ndarray]]], said: dict[str, str]) -> bytes:
    """The beginning of a safetensors file: its length, and what lies where; padded so that what follows is aligned."""
    header: dict[str, object] = {"__metadata__": said}
    place = 0
    for name, (dtype, shape, _) in parts.items():
        end = place + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": shape, "data_offsets": (place, end)}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
