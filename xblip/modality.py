"""What a plugin author writes: a `Modality`, which reads media and builds a frozen encoder.

Segments stay flat. A modality turns one source into tensors whose first dimension is S, its segments (frames, clips; 1
for stills); the core concatenates the segments of a whole batch to M = sum(S) rows before the encoder. Encoders are
therefore plain modules from (M, ...) to (M, N, D_enc), nobody computes on padding, and items of different lengths share
a batch.

Shape letters of the code base: B batch, S segments of one item, M segments of a batch, N encoder tokens, Q query
tokens, T text tokens, D_enc / D_q / D_llm widths.
"""

import contextlib
import io
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from xblip.errors import MediaError, PluginError, XBlipError


class Modality(ABC):
    """One kind of input. Subclass it, name it, and register the class by `register_modalities`.

    Class attributes:
      name: identifier used everywhere (Python, configs, command line); equals the entry point's name.
      cue: short text before the soft prompt; "<name>: " unless set.
      suffixes: file endings, lower case with dot, that people have.
      mime_types: of those files.
      bridge: defaults of this modality's bridge that differ from the bridge's own, e.g. {"max_segments": 16}.
      Config: dataclass of the modality's settings. If the encoder comes from files, its folder or hub id stands in
        a field called `encoder`; the core then copies that folder into bundles.
    """

    name: ClassVar[str]
    cue: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    mime_types: ClassVar[tuple[str, ...]] = ()
    bridge: ClassVar[Mapping[str, Any]] = {}

    @dataclass
    class Config:
        """No settings."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls) and "cue" not in vars(cls):
            cls.cue = f"{cls.name}: "

    def __init__(self, config: Any = None):
        """Keeps `config`, an instance of `Config` (defaults when None). Does nothing heavy."""
        self.config = self.Config() if config is None else config

    @abstractmethod
    def load(self, source: Any) -> dict[str, Tensor]:
        """Reads one source.

        Args:
          source: a path, bytes, an open binary file, or an object of the modality's own kind (array, PIL image, ...).
            `media_file` tells files from objects and reports missing or empty ones.

        Returns:
          Keyword arguments of the encoder; each tensor's first dimension is S, equal for all of them and >= 1.

        Raises:
          MediaError: the source cannot be read, or is not what this modality accepts.
        """

    @abstractmethod
    def build_encoder(self) -> nn.Module:
        """Builds the encoder with its weights, in the dtype they are stored in.

        Returns:
          A module with an attribute `width` (D_enc) whose `forward(**tensors)` takes the tensors of `load` with M rows
          and returns features (M, N, D_enc), or features and a boolean mask (M, N) that is True for real tokens.
          Floats come in the dtype of its weights, or in that of its attribute `input_dtype` if it has one.
        """

    @staticmethod
    def as_array(source: np.ndarray | Tensor, label: str) -> np.ndarray:
        """Gives an array or tensor as a plain numpy array; floats that numpy lacks, such as bfloat16, as float32.

        Args:
          source: what the user gave.
          label: how error messages call it.

        Raises:
          MediaError: its values are masked, or not there as numbers: a sparse, quantised or meta tensor.
        """
        if isinstance(source, np.ma.MaskedArray):
            raise MediaError(f"Cannot read {label}: it is a masked array. Fill in or leave out its masked values.")
        if isinstance(source, np.ndarray):
            return np.asarray(source)
        try:
            return (source.float() if source.is_floating_point() and source.itemsize < 4 else source).numpy(force=True)
        except (RuntimeError, TypeError) as cause:
            raise MediaError(
                f"Cannot read {label}: numpy cannot take it ({str(source.layout).removeprefix('torch.')}, "
                f"{source.dtype}, on {source.device}). Expected a dense tensor of plain numbers."
            ) from cause

    @classmethod
    def example(cls, folder: Path) -> "Example":
        """Makes something small to try the modality on: what `xblip check` and the contract suite work with.

        Args:
          folder: an empty folder to write a tiny encoder and media files into.
        """
        raise PluginError(
            f'The modality "{cls.name}" offers no example to check it with: implement the class method '
            "example(folder), returning xblip.Example(config=..., sources=[one, another], broken=[...])."
        )


@dataclass
class Example:
    """Material for checking a modality.

    Attributes:
      config: settings of its `Config`, for a tiny encoder.
      sources: at least two good sources that differ, in their first segment already.
      broken: sources that must be refused: damaged files, wrong shapes.
    """

    config: dict[str, Any]
    sources: list[Any]
    broken: list[Any]


@dataclass
class Features:
    """Frozen features of the B items of one modality in a batch.

    Attributes:
      values: (M, N, D_enc), the segments of all items one after another.
      mask: (M, N) boolean, True for real tokens.
      segments: S of each item; sums to M.
    """

    values: Tensor
    mask: Tensor
    segments: list[int]

    def split(self) -> "list[Features]":
        """Returns one `Features` per item."""
        parts = zip(self.values.split(self.segments), self.mask.split(self.segments), self.segments, strict=True)
        return [Features(values, mask, [count]) for values, mask, count in parts]

    @staticmethod
    def join(parts: "Sequence[Features]") -> "Features":
        """Returns the items of all parts as one; the inverse of `split`. N and D_enc must agree."""
        return Features(
            torch.cat([part.values for part in parts]),
            torch.cat([part.mask for part in parts]),
            [count for part in parts for count in part.segments],
        )


def collate(items: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[int]]:
    """Concatenates the segments of several loaded items.

    Args:
      items: results of `Modality.load`.

    Returns:
      The encoder's tensors with M rows, and S of each item.

    Raises:
      MediaError: items disagree about their tensors' names or shapes, or an item's tensors about S.
    """
    for item in items:
        shapes = {name: tuple(tensor.shape) for name, tensor in item.items()}
        counts = {shape[:1] for shape in shapes.values()}
        if len(counts) != 1 or counts <= {(), (0,)}:
            raise MediaError(f"A modality loaded tensors that disagree about the number of segments: {shapes}.")
        first = {name: tuple(tensor.shape)[1:] for name, tensor in items[0].items()}
        if {name: shape[1:] for name, shape in shapes.items()} != first:
            raise MediaError(
                f"A modality loaded items of different shapes, {shapes} beside {first}: it must bring every segment "
                "to one shape (resize, or pad and mask)."
            )
    segments = [next(iter(item.values())).shape[0] for item in items]
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}, segments


@dataclass(frozen=True)
class MediaFile:
    """A source that is a file: a path, bytes, or an open binary file.

    Attributes:
      label: how error messages call it.
      path: where it lies, or None if it came as bytes.
      data: its bytes, or None if it has a path.
    """

    label: str
    path: Path | None = None
    data: bytes | None = None

    @property
    def suffix(self) -> str:
        """The file's ending in lower case with its dot; "" when it has none or came as bytes."""
        return self.path.suffix.lower() if self.path else ""

    def open(self) -> BinaryIO:
        """Opens it for reading."""
        return self.path.open("rb") if self.path else io.BytesIO(self.data)

    @contextlib.contextmanager
    def on_disk(self, suffix: str = "") -> Iterator[Path]:
        """Gives a path to it, for libraries that read nothing else; `suffix` is for sources that came as bytes."""
        if self.path:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"media{suffix}")
            path.write_bytes(self.data)
            yield path


def media_file(source: Any, *, kind: str) -> MediaFile | None:
    """Tells files from objects.

    Args:
      source: whatever the user gave.
      kind: the modality's name, for messages.

    Returns:
      The file, or None when `source` is an object (array, tensor, PIL image, list).

    Raises:
      MediaError: the file is missing, a folder, unreadable or empty, or a URL.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, label = bytes(source), f"the {kind} given as bytes"
    elif hasattr(source, "read"):
        label = f"the {kind} given as an open file"
        data = _contents(source, label)
    elif isinstance(source, (str, os.PathLike)):
        return _file_at(source, kind)
    else:
        return None
    if not data:
        raise MediaError(f"Cannot read {label}: it is empty.")
    return MediaFile(label=label, data=data)


def _contents(source: BinaryIO, label: str) -> bytes:
    try:
        data = source.read()
    except Exception as cause:
        raise MediaError(f"Cannot read {label}: {cause}. Open it for reading in binary mode ('rb').") from cause
    if isinstance(data, str):
        raise MediaError(f"Cannot read {label}: it is open as text. Open it in binary mode ('rb').")
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise MediaError(f"Cannot read {label}: its read() gives {type(data).__name__}. Expected bytes.")
    return bytes(data)


def _file_at(source: str | os.PathLike, kind: str) -> MediaFile:
    label = f"{kind} {os.fspath(source)!r}"
    if str(source).startswith(("http://", "https://")):
        raise MediaError(f"Cannot read {label}: URLs are not fetched. Download it and give the file's path.")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise MediaError(f"Cannot read {label}: it is a folder. Give the path of one file.")
        if not path.exists():
            raise MediaError(f"Cannot read {label}: no such file. Check the path; relative ones start at {Path.cwd()}.")
        if not path.is_file():
            raise MediaError(f"Cannot read {label}: it is a pipe, socket or device. Give the path of a regular file.")
        if path.stat().st_size == 0:
            raise MediaError(f"Cannot read {label}: the file is empty.")
        with path.open("rb"):
            pass
    except (OSError, ValueError, RuntimeError) as cause:  # RuntimeError: no such user in "~user"
        raise MediaError(f"Cannot read {label}: {cause}.") from cause
    return MediaFile(label=label, path=path)


@contextlib.contextmanager
def decoding(label: str, expected: str) -> Iterator[None]:
    """Turns whatever a decoding library raises inside the block into one clear `MediaError`.

    Args:
      label: what is being read, e.g. `MediaFile.label`.
      expected: the formats that would have been right.
    """
    try:
        yield
    except XBlipError:
        raise
    except MemoryError as cause:
        raise MediaError(
            f"Cannot read {label}: it asks for more memory than there is, so it is damaged or too large. "
            f"Expected {expected}."
        ) from cause
    except Exception as cause:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise MediaError(
            f"Cannot read {label}: it is damaged or of another format ({reason}). Expected {expected}."
        ) from cause
