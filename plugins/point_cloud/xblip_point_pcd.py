"""PCD files (https://pointclouds.org/documentation/tutorials/pcd_file_format.html), read strictly with numpy.

open3d fills what a damaged PCD lacks with whatever lies in memory; here each line of the header and the length of
the body must agree.
"""

import io
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

MOST_UNPACKED = 88  # bytes that one packed byte can become: a copy of 264 takes three
_REQUIRED = ("FIELDS", "SIZE", "TYPE", "WIDTH", "HEIGHT", "POINTS", "DATA")
_KEYS = (*_REQUIRED, "COUNT", "VERSION", "VIEWPOINT")
_KINDS = {f"{kind}{size}": f"<{kind.lower()}{size}" for kind in "IUF" for size in (1, 2, 4, 8)}
_KINDS = {name: code for name, code in _KINDS.items() if name not in ("F1", "F2")}


def read_pcd(data: bytes, refuse_many: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads a cloud.

    Args:
      data: the whole file; its body ascii, binary or binary_compressed.
      refuse_many: raises MediaError for too many points, as the header has them.

    Returns:
      Points (V, 3) float64, and colours (V, 3) in [0, 1] or None.

    Raises:
      ValueError: something of it is missing, too much, or contradicts the rest.
    """
    header, body = _header(data)
    layout, count = _layout(header)
    refuse_many(count)
    match header["DATA"]:
        case ["ascii"]:
            columns = _text_columns(body, layout, count)
        case ["binary"]:
            rows = np.frombuffer(_exactly(body, count * layout.itemsize), layout)
            columns = {name: rows[name] for name in layout.names}
        case ["binary_compressed"]:
            columns = _compressed_columns(body, layout, count)
        case words:
            raise ValueError(f"its DATA is {' '.join(words)!r}, not ascii, binary or binary_compressed")
    for name in "xyz":
        if name not in columns or columns[name].ndim != 1:
            raise ValueError(f"its points have no single field {name!r}")
    points = np.stack([columns[name].astype(np.float64) for name in "xyz"], 1)
    packed = columns.get("rgb", columns.get("rgba"))
    return points, None if packed is None else _colors(packed)


def rows_of_numbers(stream: BinaryIO, **options: Any) -> np.ndarray:
    """Reads lines of numbers, all as many, as (rows, columns) float64.

    Raises:
      ValueError: they are not; without numpy's advice to who calls it.
    """
    try:
        return np.loadtxt(stream, ndmin=2, **options)
    except ValueError as cause:
        raise ValueError(str(cause).partition("; use `usecols`")[0]) from cause


def _header(data: bytes) -> tuple[dict[str, list[str]], bytes]:
    header, start = {}, 0
    while "DATA" not in header:
        end = data.find(b"\n", start)
        if end < 0:
            raise ValueError("its header has no DATA line")
        words = data[start:end].decode("latin-1").split()
        if words and not words[0].startswith("#"):
            if words[0] not in _KEYS or words[0] in header:
                raise ValueError(f"its header has the line {' '.join(words)[:80]!r}")
            header[words[0]] = words[1:]
        start = end + 1
    for key in _REQUIRED:
        if not header.get(key):
            raise ValueError(f"its header has no {key}")
    return header, data[start:]


def _layout(header: dict[str, list[str]]) -> tuple[np.dtype, int]:
    """The fields of a point as a numpy type, and the number of points."""
    names = header["FIELDS"]
    width, height, count = (_whole(header, key, 1)[0] for key in ("WIDTH", "HEIGHT", "POINTS"))
    if width * height != count:
        raise ValueError(f"its WIDTH x HEIGHT is {width} x {height}, but its POINTS are {count}")
    sizes = _whole(header, "SIZE", len(names))
    counts = _whole(header, "COUNT", len(names)) if "COUNT" in header else [1] * len(names)
    if len(header["TYPE"]) != len(names):
        raise ValueError(f"its TYPE has {len(header['TYPE'])} entries for {len(names)} fields")
    fields = []
    for place, (name, kind, size, repeats) in enumerate(zip(names, header["TYPE"], sizes, counts, strict=True)):
        if f"{kind}{size}" not in _KINDS or not 0 < repeats < 2**16:
            raise ValueError(f"its field {name!r} has TYPE {kind}, SIZE {size}, COUNT {repeats}")
        shape = () if repeats == 1 else (repeats,)
        fields.append((f"padding {place}" if name == "_" else name, _KINDS[f"{kind}{size}"], shape))
    return np.dtype(fields), count


def _whole(header: dict[str, list[str]], key: str, entries: int) -> list[int]:
    words = header[key]
    if len(words) != entries or not all(re.fullmatch("[0-9]{1,18}", word) for word in words):
        raise ValueError(f"its {key} is {' '.join(words)[:80]!r}; expected {entries} whole numbers")
    return [int(word) for word in words]


def _exactly(body: bytes, size: int) -> bytes:
    """The first `size` bytes; nothing but padding may follow."""
    if len(body) < size or body[size:].strip(b"\0\r\n"):
        raise ValueError(f"its body has {len(body)} bytes where {size} are declared")
    return body[:size]


def _text_columns(body: bytes, layout: np.dtype, count: int) -> dict[str, np.ndarray]:
    wanted = sum(layout[name].shape[0] if layout[name].shape else 1 for name in layout.names)
    values = rows_of_numbers(io.BytesIO(body), comments=None) if body.strip() else np.empty((0, wanted))
    if values.shape != (count, wanted):
        raise ValueError(f"it has {len(values)} rows of {values.shape[1]} numbers; declared are {count} of {wanted}")
    columns, start = {}, 0
    for name in layout.names:
        column = values[:, start] if not layout[name].shape else values[:, start : start + layout[name].shape[0]]
        start += 1 if column.ndim == 1 else column.shape[1]
        # PCL writes packed colours as whole numbers even where their type is float.
        whole = name == "rgb" and bool(((column >= 0) & (column == np.floor(column))).all())
        columns[name] = column.astype(np.uint32 if whole else layout[name].base)
    return columns


def _compressed_columns(body: bytes, layout: np.dtype, count: int) -> dict[str, np.ndarray]:
    """Undoes the compression; the body then holds one field of all points after another."""
    compressed, size = np.frombuffer(_exactly(body[:8], 8), "<u4").tolist()
    if size != count * layout.itemsize:
        raise ValueError(f"its body unpacks to {size} bytes where {count * layout.itemsize} are declared")
    packed = _exactly(body[8:], compressed)
    if size > MOST_UNPACKED * len(packed):
        raise ValueError(f"its body of {len(packed)} bytes cannot unpack to the {size} that are declared")
    data = _exactly(_decompress(packed, size), size)
    columns, start = {}, 0
    for name in layout.names:
        columns[name] = np.ndarray((count, *layout[name].shape), layout[name].base, data, start)
        start += count * layout[name].itemsize
    return columns


def _decompress(data: bytes, size: int) -> bytes:
    """Undoes LZF: runs of 1 .. 32 literal bytes, and copies of 3 .. 264 bytes from at most 8192 bytes back."""
    out, place = bytearray(), 0
    while place < len(data) and len(out) <= size:
        control = data[place]
        place += 1
        if control < 32:
            out += data[place : place + control + 1]
            place += control + 1
            continue
        length = (control >> 5) + 2
        if length == 9:
            length += data[place]
            place += 1
        back = ((control & 31) << 8 | data[place]) + 1
        place += 1
        if back > len(out):
            raise ValueError("its compressed body is damaged")
        piece = out[-back:][:length]
        out += (piece * -(-length // len(piece)))[:length]
    return bytes(out)


def _colors(packed: np.ndarray) -> np.ndarray:
    """Colours packed as 0xAARRGGBB into 4 bytes, whatever type these are said to have."""
    if packed.ndim != 1 or packed.itemsize != 4:
        raise ValueError("its colours are not packed into 4 bytes")
    bits = np.ascontiguousarray(packed).view(np.uint32)
    return np.stack([bits >> shift & 255 for shift in (16, 8, 0)], 1) / 255
