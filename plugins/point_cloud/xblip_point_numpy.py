"""Arrays in .npy and .npz files, whose headers are read here before numpy makes room for what they promise.

numpy's own reader believes a header, and tells of a damaged one in the words of Python's parser.
"""

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

import xblip

MOST_COLUMNS = 6  # of an array: coordinates and colour
LONGEST_HEADER = 10_000  # bytes; numpy's own limit
MAGIC = b"\x93NUMPY"
_HEADERS = {(1, 0): (2, np.lib.format.read_array_header_1_0), (2, 0): (4, np.lib.format.read_array_header_2_0)}


def read_numpy(path: Path, label: str, refuse_many: Callable[[int], None]) -> np.ndarray:
    """Reads an array.

    Args:
      path: of a .npy or .npz file.
      label: how error messages call it.
      refuse_many: raises MediaError for too many points.

    Raises:
      MediaError: there are too many points, or no array that would be meant.
      ValueError: it is damaged.
    """
    if path.suffix.lower() != ".npz":
        with path.open("rb") as stream:
            _check_header(stream, path.stat().st_size, refuse_many)
        return np.array(np.lib.format.open_memmap(path, mode="r"))
    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip archive")
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        name = next(
            (name for name in ("points", "arr_0", *list(members)[: len(members) == 1]) if name in members), None
        )
        if name is None:
            raise xblip.MediaError(
                f"Cannot read {label}: it holds the arrays {', '.join(members)[:200] or '(none)'}. "
                'Expected one called "points" or "arr_0", or a single one.'
            )
        with archive.open(members[name]) as stream:
            _check_header(stream, archive.getinfo(members[name]).file_size, refuse_many)
        with archive.open(members[name]) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def _check_header(stream: BinaryIO, there: int, refuse_many: Callable[[int], None]) -> None:
    """Refuses an array that is larger than it may be, or than its `there` bytes."""
    if stream.read(len(MAGIC)) != MAGIC:
        raise ValueError("its first bytes are of no array")
    version = (*stream.read(2),)
    if version not in _HEADERS:
        raise ValueError(f"its array is of version {'.'.join(map(str, version))}, which plain numbers do not need")
    width, read_header = _HEADERS[version]
    size = stream.read(width)
    length = int.from_bytes(size, "little")
    if len(size) < width or length > LONGEST_HEADER:
        raise ValueError(f"the header of its array claims {length} bytes")
    try:
        shape, _, dtype = read_header(io.BytesIO(size + stream.read(length)))
    except Exception as cause:  # whatever Python's parser makes of it
        raise ValueError("the header of its array is damaged") from cause
    if any(axis < 0 for axis in shape):
        raise ValueError(f"its array has the shape {shape}")
    refuse_many(max(math.prod(shape) // MOST_COLUMNS, shape[0] if shape else 0))
    declared, there = math.prod(shape) * dtype.itemsize, there - stream.tell()
    if declared > there and not dtype.hasobject:
        raise ValueError(f"its array declares {declared} bytes, but {there} are there")
