"""What a mesh may not do: name other files, which open3d would read wherever they are.

A cloud is known by its own bytes, in caches and by servers that read what strangers send; it must be all in them.
"""

import json
import struct
from typing import Any


def check_gltf(data: bytes) -> None:
    """Refuses a glTF, of text or binary, that is not whole in itself.

    Args:
      data: the whole file.

    Raises:
      ValueError: it is damaged, or names other files.
    """
    text = _json_of(data) if data[:4] == b"glTF" else data
    try:
        document = json.loads(text.decode(), object_pairs_hook=_checked)
    except (json.JSONDecodeError, RecursionError) as cause:
        raise ValueError(f"its JSON is damaged: {getattr(cause, 'msg', 'it is nested too deep')}") from cause
    if not isinstance(document, dict):
        raise ValueError("its JSON is no object")


def without_materials(data: bytes) -> bytes:
    """An OBJ that names no library of materials, which give it no points; other files as they are."""
    return data.replace(b"mtllib", b"#tllib")


def _json_of(data: bytes) -> bytes:
    """The first chunk of a binary glTF (its specification, 4.4)."""
    if len(data) < 20:
        raise ValueError("it ends within its header")
    version, length, size, kind = struct.unpack("<4xIII4s", data[:20])
    if version != 2 or kind != b"JSON":
        raise ValueError("its header is of no glTF 2.0")
    if max(length, 20 + size) > len(data):
        raise ValueError(f"it is cut short: {len(data)} of {max(length, 20 + size)} bytes are there")
    return data[20 : 20 + size]


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One object; what stands in it twice could be read by us and by open3d in two ways."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its JSON says something twice")
    uri = found.get("uri", "data:")
    if not isinstance(uri, str) or not uri.startswith("data:"):
        raise ValueError(f"it names another file, {str(uri)[:80]!r}: pack all into one .glb")
    return found
