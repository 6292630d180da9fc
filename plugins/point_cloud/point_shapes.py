"""Clouds and meshes for the tests, and writers of their formats that share nothing with the readers."""

import json
import struct

import numpy as np

CORNERS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], np.uint16)
RED_TO_BLUE = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]], np.float32)


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3))


def unit(points):
    points = points - points.mean(0)
    return points / np.linalg.norm(points, axis=1).max()


def loaded(modality, source):
    return modality.load(source)["points"][0].numpy()


def ply(points, *, encoding="ascii", kind="float", columns="x y z", faces=(), face_extra=""):
    """A PLY file of rows of numbers and polygons, written independently of the reader."""
    order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[encoding]
    names = columns.split()
    kinds = ["uchar" if name in ("red", "green", "blue") else kind for name in names]
    codes = {"float": "f", "double": "d", "uchar": "B"}
    header = [f"ply\nformat {encoding} 1.0\ncomment caf\u00e9\nelement vertex {len(points)}"]
    header += [f"property {kind} {name}" for kind, name in zip(kinds, names, strict=True)]
    if len(faces):
        header += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
        header += [face_extra] if face_extra else []
    body = b""
    for row in points:
        row = [int(value) if kind == "uchar" else float(value) for kind, value in zip(kinds, row, strict=True)]
        packed = struct.pack(order + "".join(codes[kind] for kind in kinds), *row) if order else None
        body += packed or (" ".join(map(repr, row)) + "\n").encode()
    for face in faces:
        packed = struct.pack(f"{order}B{len(face)}i", len(face), *face) if order else None
        body += packed or (" ".join(map(str, [len(face), *face])) + "\n").encode()
    return "\n".join([*header, "end_header\n"]).encode() + body


def glb(nodes):
    """A binary glTF of coloured tetrahedra, one for each node."""
    colors = np.concatenate([RED_TO_BLUE, np.ones((4, 1), np.float32)], 1)
    data = CORNERS.tobytes() + FACES.tobytes() + colors.tobytes()
    views = [(0, 48), (48, 24), (72, 64)]
    document = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(nodes)))}],
        "nodes": [{"mesh": 0, **node} for node in nodes],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "COLOR_0": 2}, "indices": 1}]}],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": 4,
                "type": "VEC3",
                "min": [0] * 3,
                "max": [1] * 3,
            },
            {"bufferView": 1, "componentType": 5123, "count": 12, "type": "SCALAR"},
            {"bufferView": 2, "componentType": 5126, "count": 4, "type": "VEC4"},
        ],
        "bufferViews": [{"buffer": 0, "byteOffset": start, "byteLength": size} for start, size in views],
        "buffers": [{"byteLength": len(data)}],
    }
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def stl():
    triangles = [struct.pack("<12fH", 0, 0, 0, *CORNERS[face].ravel(), 0) for face in FACES]
    return b"\0" * 80 + struct.pack("<I", len(FACES)) + b"".join(triangles)


def obj(*faces):
    rows = zip(CORNERS.tolist(), RED_TO_BLUE.tolist(), strict=True)
    vertices = "".join(f"v {x} {y} {z} {r} {g} {b}\n" for (x, y, z), (r, g, b) in rows)
    return (vertices + "".join(f"f {' '.join(str(1 + index) for index in face)}\n" for face in faces)).encode()


def off(header="OFF"):
    vertices = "".join(f"{x} {y} {z}\n" for x, y, z in CORNERS)
    return (f"{header}\n# a comment\n4 4 0\n{vertices}" + "".join(f"3 {a} {b} {c}\n" for a, b, c in FACES)).encode()


def pcd(points, data="ascii", rgb=None, kind="F", **changes):
    """A PCD file; `rgb` are packed colours in a field of that kind, `changes` other lines of the header."""
    columns = [column.astype("<f4") for column in np.asarray(points).T]
    columns += [] if rgb is None else [np.array(rgb, "<u4").view("<f4" if kind == "F" else "<u4")]
    names = ["x", "y", "z", "rgb"][: len(columns)]
    header = {"VERSION": "0.7", "FIELDS": " ".join(names), "SIZE": " ".join("4" * len(names))}
    header |= {"TYPE": " ".join(["F", "F", "F", kind][: len(names)]), "COUNT": " ".join("1" * len(names))}
    header |= {"WIDTH": len(points), "HEIGHT": 1, "VIEWPOINT": "0 0 0 1 0 0 0", "POINTS": len(points), "DATA": data}
    lines = [f"{key} {value}" for key, value in (header | changes).items() if value is not None]
    body = {
        "ascii": lambda: "".join(
            " ".join(map(repr, map(float, row))) + "\n" for row in zip(*columns, strict=True)
        ).encode(),
        "binary": lambda: b"".join(value.tobytes() for row in zip(*columns, strict=True) for value in row),
        "binary_compressed": lambda: lzf(b"".join(column.tobytes() for column in columns)),
    }[data]()
    return "\n".join(["# .PCD v0.7 - Point Cloud Data file format", *lines, ""]).encode() + body


def lzf(data):
    """Packs data greedily: a copy where the last three bytes' like was seen, literals elsewhere; with both sizes."""
    out, literals, seen, place = b"", b"", {}, 0
    while place < len(data):
        before, length = seen.get(data[place : place + 3]), 0
        if before is not None and place - before <= 8192 and place + 3 <= len(data):
            length = 3
            while length < 264 and place + length < len(data) and data[before + length] == data[place + length]:
                length += 1
        seen[data[place : place + 3]] = place
        if not length:
            literals, place = literals + data[place : place + 1], place + 1
        if literals and (length or len(literals) == 32 or place == len(data)):
            out, literals = out + bytes([len(literals) - 1]) + literals, b""
        if length:
            back, code = place - before - 1, min(length - 2, 7)
            out += bytes([code << 5 | back >> 8, *[length - 9] * (code == 7), back & 255])
            place += length
    return struct.pack("<II", len(out), len(data)) + out
