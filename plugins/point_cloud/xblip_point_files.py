"""Files of point clouds and meshes, read into one `Shape`.

What holds plain clouds (.ply, .pcd, .xyz, .npy, .npz) is read here with numpy: it is quick, needs no open3d and
notices every missing byte. All other formats are left to open3d, in a process of its own
(`xblip_point_open3d` says why).
"""

import functools
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from xblip_point_gltf import check_gltf, without_materials
from xblip_point_numpy import read_numpy
from xblip_point_pcd import read_pcd, rows_of_numbers
from xblip_point_process import OPEN3D

import xblip

SUFFIXES = (".ply", ".pcd", ".xyz", ".obj", ".off", ".stl", ".glb", ".gltf", ".npy", ".npz")
CANNOT_IMPORT = 3  # exit status of xblip_point_open3d

_MAGIC = {
    b"ply": ".ply",
    b"\x93NUMPY": ".npy",
    b"PK\x03\x04": ".npz",
    b"glTF": ".glb",
    b"# .PCD": ".pcd",
    b"VERSION": ".pcd",
    b"OFF": ".off",
    b"COFF": ".off",
    b"solid": ".stl",
}
_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_PLY_ENCODINGS = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}


@dataclass
class Shape:
    """A cloud, or a mesh if it has triangles.

    Attributes:
      points: (V, 3) float64.
      colors: (V, 3) in [0, 1], or None.
      triangles: (F, 3) indices of points, or None.
    """

    points: np.ndarray
    colors: np.ndarray | None = None
    triangles: np.ndarray | None = None


def read_file(file: xblip.MediaFile, *, max_points: int, timeout_seconds: float) -> Shape:
    """Reads a file by its suffix; bytes and files without a known suffix by their first bytes.

    Args:
      file: the file.
      max_points: more points, vertices or triangles are refused, where the header tells before they are read.
      timeout_seconds: when to give up on open3d.

    Raises:
      MediaError: the file is damaged, of another format or too large.
      PluginError: its format needs open3d, which cannot be imported.
    """
    suffix = file.suffix if file.suffix in SUFFIXES else _recognise(file)
    refuse_many = functools.partial(_refuse_many, label=file.label, max_points=max_points)
    with xblip.decoding(file.label, f"a whole {suffix} file of a point cloud or mesh"):
        if suffix == ".ply":
            with file.open() as stream:
                return _read_ply(stream.read(), refuse_many)
        if suffix == ".pcd":
            with file.open() as stream:
                return Shape(*read_pcd(stream.read(), refuse_many))
        if suffix == ".xyz":
            with file.open() as stream:
                return from_array(rows_of_numbers(stream), file.label)
        if suffix in (".npy", ".npz"):
            with file.on_disk(suffix) as path:
                return from_array(read_numpy(path, file.label, refuse_many), file.label)
        return _read_with_open3d(_whole_in_itself(file, suffix), file.label, timeout_seconds)


def from_array(array: np.ndarray, label: str) -> Shape:
    """Takes (N, 3) coordinates, or (N, 6) with colour in [0, 1].

    Raises:
      MediaError: another shape, or no real numbers.
    """
    if array.ndim != 2 or array.shape[1] not in (3, 6):
        transposed = array.ndim == 2 and array.shape[0] in (3, 6)
        raise xblip.MediaError(
            f"Cannot read {label}: it has shape {array.shape}. Expected one cloud of shape (points, 3), or "
            f"(points, 6) with red, green, blue{': transpose it' if transposed else ''}."
        )
    if array.dtype.kind not in "fiu":
        raise xblip.MediaError(f"Cannot read {label}: it holds {array.dtype} values. Expected real numbers.")
    array = array.astype(np.float64)
    return Shape(array[:, :3], array[:, 3:] if array.shape[1] == 6 else None)


def check(shape: Shape, label: str, max_points: int) -> None:
    """Refuses shapes that nothing can be computed from.

    Raises:
      MediaError: no or too many points, NaN or infinity, colours outside [0, 1], triangles of vertices that
        are not there.
    """
    points, colors, triangles = shape.points, shape.colors, shape.triangles
    many = max(len(points), 0 if triangles is None else len(triangles))
    _refuse_many(many, label=label, max_points=max_points)
    if not len(points):
        raise xblip.MediaError(f"Cannot read {label}: it holds no points. Expected at least one.")
    finite = np.isfinite(points).all(1) & (True if colors is None else np.isfinite(colors).all(1))
    if not finite.all():
        raise xblip.MediaError(
            f"Cannot read {label}: {(~finite).sum()} of its {len(points)} points are NaN or infinite. Remove "
            "them first."
        )
    if colors is not None and (colors.min() < -1e-6 or colors.max() > 1 + 1e-6):
        raise xblip.MediaError(
            f"Cannot read {label}: its colours range from {colors.min():g} to {colors.max():g}. Expected "
            "values in [0, 1]: divide 0..255 by 255, and leave out columns that are no colour."
        )
    if triangles is not None and not (0 <= triangles.min() <= triangles.max() < len(points)):
        raise xblip.MediaError(
            f"Cannot read {label}: it is damaged, its faces name vertices that do not exist (there are {len(points)})."
        )


def _recognise(file: xblip.MediaFile) -> str:
    """Tells the format from the first bytes, as far as it has any of its own."""
    with file.open() as stream:
        start = stream.read(84)
        size = stream.seek(0, 2)
    for magic, suffix in _MAGIC.items():
        if start.startswith(magic):
            return suffix
    if len(start) == 84 and size == 84 + 50 * int.from_bytes(start[80:], "little"):
        return ".stl"
    ending = f'"{file.suffix}" is not a known ending' if file.suffix else "it has no ending that names its format"
    raise xblip.MediaError(
        f"Cannot read {file.label}: {ending}, and its first bytes tell none. Give the path of a file that "
        f"ends in {', '.join(SUFFIXES)}."
    )


def _refuse_many(count: int, *, label: str, max_points: int) -> None:
    if count > max_points:
        raise xblip.MediaError(
            f"Cannot read {label}: it has {count} or more points, vertices or triangles; at most "
            f"{max_points} are read. Thin it, or raise max_points."
        )


def open3d_version() -> str:
    """Imports open3d in a process of its own and returns its version.

    Raises:
      PluginError: it cannot be imported.
    """
    program = "from xblip_point_open3d import import_open3d; print(import_open3d().__version__)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=Path(__file__).parent)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise xblip.PluginError(f"{reason.rstrip('.')}. Install open3d-cpu (Linux on x86-64) or open3d.")
    return done.stdout.strip().splitlines()[-1]


def _whole_in_itself(file: xblip.MediaFile, suffix: str) -> xblip.MediaFile:
    """The file as open3d is to have it, which tells formats by endings and follows what a file names."""
    with file.open() as stream:
        data = stream.read()
    if suffix in (".gltf", ".glb"):
        check_gltf(data)
    return xblip.MediaFile(label=file.label, data=without_materials(data), name=f"mesh{suffix}")


def _read_with_open3d(file: xblip.MediaFile, label: str, timeout_seconds: float) -> Shape:
    with tempfile.TemporaryDirectory() as folder, file.on_disk(file.suffix) as path:
        result = Path(folder, "result.npz")
        try:
            ended = OPEN3D.read(path, result, timeout_seconds=timeout_seconds)
        except TimeoutError as cause:
            raise xblip.MediaError(
                f"Cannot read {label}: open3d did not finish within {timeout_seconds:g} seconds. The file is "
                "damaged, or timeout_seconds must be raised."
            ) from cause
        reason = ended.reason or "open3d gave no reason"
        if ended.status == CANNOT_IMPORT:
            raise xblip.PluginError(
                f"Cannot read {label}: its format needs open3d, which cannot be imported here ({reason}). "
                "Install open3d-cpu (Linux on x86-64) or open3d, or convert the file to .ply."
            )
        if ended.status:
            raise ValueError(reason if ended.status > 0 else f"open3d crashed on it, signal {-ended.status}")
        with np.load(result, allow_pickle=False) as arrays:
            points, colors, triangles = arrays["points"], arrays["colors"], arrays["triangles"]
    return Shape(
        points.astype(np.float64),
        colors.astype(np.float64) if len(colors) else None,
        triangles.astype(np.int64) if len(triangles) else None,
    )


@dataclass
class _Property:
    """A column of a PLY element: numpy type codes of its values and, of a list, of its length."""

    name: str
    kind: str
    length: str = ""


@dataclass
class _Element:
    name: str
    count: int
    properties: list[_Property]


def _read_ply(data: bytes, refuse_many: Callable[[int], None]) -> Shape:
    """Reads a PLY file; an ASCII body becomes the binary one of the same layout, all of it 8-byte floats."""
    end = re.search(rb"end_header[ \t]*\r?\n", data)
    if not data.startswith(b"ply") or not end:
        raise ValueError("it has no PLY header")
    encoding, elements = _ply_header(data[: end.start()].decode("latin-1"))
    body = memoryview(data)[end.end() :]
    if encoding == "ascii":
        body = np.array(bytes(body).split(), "<f8").data.cast("B")
    shape, offset = Shape(np.empty((0, 3))), 0
    for element in elements:
        refuse_many(element.count)
        rows, offset = _ply_rows(body, offset, element, encoding)
        if element.name == "vertex":
            shape.points = np.stack([_column(rows, axis) for axis in "xyz"], 1)
            if {"red", "green", "blue"} <= rows.keys():
                kind = {column.name: column.kind for column in element.properties}["red"]
                scale = 1 if kind.startswith("f") else np.iinfo(kind).max
                shape.colors = np.stack([_column(rows, name) for name in ("red", "green", "blue")], 1) / scale
        elif element.name == "face":
            shape.triangles = _triangulate(rows.get("vertex_indices", rows.get("vertex_index", [])), refuse_many)
    return shape


def _ply_header(text: str) -> tuple[str, list[_Element]]:
    encoding, elements = "", []
    for words in (line.split() for line in text.splitlines()):
        match words:
            case ["format", name, _] if name in _PLY_ENCODINGS:
                encoding = name
            case ["element", name, count] if re.fullmatch("[0-9]{1,18}", count):
                elements.append(_Element(name, int(count), []))
            case ["property", "list", length, kind, name] if elements and {length, kind} <= _PLY_TYPES.keys():
                elements[-1].properties.append(_Property(name, _PLY_TYPES[kind], _PLY_TYPES[length]))
            case ["property", kind, name] if elements and kind in _PLY_TYPES:
                elements[-1].properties.append(_Property(name, _PLY_TYPES[kind]))
            case ["ply"] | ["comment" | "obj_info", *_] | []:
                pass
            case _:
                raise ValueError(f"its header has the line {' '.join(words)[:80]!r}")
    if not encoding:
        raise ValueError("its header has no format line")
    return encoding, elements


def _ply_rows(body: memoryview, offset: int, element: _Element, encoding: str) -> tuple[dict, int]:
    """Reads one element: its columns by name (lists of unequal lengths as lists of arrays), and its end."""
    names = [column.name for column in element.properties]
    if not element.count:
        return dict.fromkeys(names, np.empty(0)), offset
    row = _ply_row(body, offset, element, encoding)
    lists = [f"{column.name} length" for column in element.properties if column.length]
    if len(body) - offset >= element.count * row.itemsize:
        table = np.frombuffer(body, row, element.count, offset)
        if all((table[length] == table[length][0]).all() for length in lists):
            return {name: table[name] for name in names}, offset + table.nbytes
    elif not lists:
        raise _too_short(element)
    rows = []
    for _ in range(element.count):
        row = _ply_row(body, offset, element, encoding)
        rows.append(np.frombuffer(body, row, 1, offset)[0])
        offset += row.itemsize
    return {name: [row[name] for row in rows] for name in names}, offset


def _ply_row(body: memoryview, offset: int, element: _Element, encoding: str) -> np.dtype:
    """The layout of the row at `offset`, which the lengths of its lists decide."""
    order = _PLY_ENCODINGS[encoding]
    fields, end = [], offset
    for column in element.properties:
        kind, length = ("f8", "f8") if encoding == "ascii" else (column.kind, column.length)
        if not column.length:
            fields.append((column.name, order + kind))
            continue
        start, end = end, end + int(length[1])
        if end > len(body):
            raise _too_short(element)
        count = _whole(np.frombuffer(body, order + length, 1, start), "lengths of lists")[0]
        if count < 0:
            raise ValueError(f"a list of its element {element.name!r} has length {count}")
        fields += [(f"{column.name} length", order + length), (column.name, order + kind, (count,))]
        end += count * int(kind[1])
    row = _row_type(tuple(fields))
    if offset + row.itemsize > len(body):
        raise _too_short(element)
    return row


@functools.lru_cache(maxsize=64)
def _row_type(fields: tuple) -> np.dtype:
    return np.dtype(list(fields))


def _too_short(element: _Element) -> ValueError:
    return ValueError(f"it ends before all of the {element.count} rows of its element {element.name!r}")


def _whole(values: np.ndarray, what: str) -> np.ndarray:
    """Numbers, which are floats where they come from text, as integers."""
    if values.dtype.kind == "f" and (values % 1 != 0).any():
        raise ValueError(f"its {what} are not all whole numbers")
    return values.astype(np.int64)


def _column(rows: dict, name: str) -> np.ndarray:
    if name not in rows:
        raise ValueError(f"its vertices have no property {name!r}")
    return np.asarray(rows[name], np.float64)


def _triangulate(polygons: np.ndarray | list[np.ndarray], refuse_many: Callable[[int], None]) -> np.ndarray | None:
    """Cuts polygons, (F, K) or F arrays of indices, into fans of triangles."""
    if isinstance(polygons, list):
        by_size = defaultdict(list)
        for polygon in polygons:
            by_size[len(polygon)].append(polygon)
        groups = [np.stack(alike) for alike in by_size.values()]
    else:
        groups = [polygons] if polygons.ndim == 2 else []
    groups = [group for group in groups if group.shape[1] > 2]
    refuse_many(sum(len(group) * (group.shape[1] - 2) for group in groups))
    fans = [_fan(group) for group in groups]
    return _whole(np.concatenate(fans), "vertex indices") if fans else None


def _fan(polygons: np.ndarray) -> np.ndarray:
    """Cuts polygons (F, K) of as many corners each into triangles (F * (K - 2), 3), all first ones first."""
    first = np.broadcast_to(polygons[:, :1], polygons[:, 2:].shape)
    return np.stack([first, polygons[:, 1:-1], polygons[:, 2:]], -1).transpose(1, 0, 2).reshape(-1, 3)
