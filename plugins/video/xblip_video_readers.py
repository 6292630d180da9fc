"""Reading exact frames out of video files, by PyAV or by decord behind one small interface.

Frames are named by their place in the order of showing, and a reader gives exactly those or fails: a
neighbour would silently turn one video into another. PyAV therefore seeks by presentation time and checks
what it lands on; decord, whose seeking misses frames in several kinds of file (measured: HEVC with open GOPs,
AVI with B-frames), is read from the start.
"""

import bisect
import contextlib
import functools
import importlib
import itertools
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import xblip

EXPECTED = "an MP4, MOV, WebM, MKV or AVI video"
FAULT_TOLERANCE = 1e-6
"""Share of frames decord may replace by a neighbour before it fails: none, but 0 switches its check off."""

MOST_FRAMES = 10_000_000
"""Frames that decord is let promise itself memory for: two days at 60 a second."""


class Reader(ABC):
    """One video file.

    Attributes:
      name: how configs and errors call the reader.
      package: what must be importable.
      size: (width, height) of the frames as stored, in pixels.
      times_s: when each frame is shown, in seconds from the first one; its length is the number of frames.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    size: tuple[int, int]

    @abstractmethod
    def __init__(self, path: Path, label: str):
        """Opens the file; `label` is how errors call it. Reads headers, or with decord the first frame."""

    @property
    @abstractmethod
    def seconds(self) -> float:
        """How long the video is, from its header where the reader can see it."""

    @property
    @abstractmethod
    def times_s(self) -> Sequence[float]:
        """See the class. Goes through the whole file on first use, without decoding where possible."""

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the frames (H, W, 3) uint8 RGB, upright, at these ascending indices."""


@dataclass
class _Index:
    """When frames are shown, and keyframes shown and decoded, in ticks of the time base, ascending."""

    presentation: list[int]
    keyframes: list[tuple[int, int]]


class PyavReader(Reader):
    """Reads with PyAV, which brings a current FFmpeg; seeks, so that of long videos little is decoded.

    Attributes:
      header_seconds, rate: length and mean frames a second by the header, or None.
    """

    name = "pyav"
    package = "av"

    def __init__(self, path: Path, label: str):
        self._path = path
        self._label = label
        with self._open() as (container, stream):
            self.size = (stream.codec_context.width, stream.codec_context.height)
            self.header_seconds = None if container.duration is None else container.duration / 1e6
            self._time_base = stream.time_base
            self.rate = stream.average_rate
            # AVI has no presentation times; VP8's hidden frames look like any other until decoded.
            self._must_count = container.format.name == "avi" or stream.codec_context.name == "vp8"

    @property
    def seconds(self) -> float:
        return self.header_seconds if self.header_seconds is not None else self.times_s[-1]

    @functools.cached_property
    def times_s(self) -> Sequence[float]:
        ticks = self._index.presentation if self._index else self._decoded_ticks()
        if not ticks:
            raise ValueError("no frame can be decoded")
        if None not in ticks and all(left < right for left, right in itertools.pairwise(ticks)):
            return [float((tick - ticks[0]) * self._time_base) for tick in ticks]
        return [float(number / self.rate) for number in range(len(ticks))]

    def _decoded_ticks(self) -> list[int | None]:
        with self._open() as (container, stream):
            return [frame.pts for frame in container.decode(stream)]

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        with self._open() as (container, stream):
            find = self._seek if self._index else self._count
            for index, frame in find(container, stream, indices):
                if frame is None:
                    raise ValueError(f"frame {index} of {len(self.times_s)} cannot be decoded")
                # One thread: a pool of FFmpeg's would not survive the fork of a dataloader, and hang it.
                yield _upright(frame.to_ndarray(format="rgb24", threads=1), frame)

    def _seek(self, container: Any, stream: Any, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yields each index with its frame, or with None where that is missing."""
        starts = [presentation for presentation, _ in self._index.keyframes]
        decoder, position = container.decode(stream), None
        for index in indices:
            wanted = self._index.presentation[index]
            place = bisect.bisect_right(starts, wanted) - 1
            if place >= 0 and (position is None or starts[place] > position):
                container.seek(self._index.keyframes[place][1], stream=stream)
                decoder = container.decode(stream)
            frame = next((frame for frame in decoder if frame.pts is None or frame.pts >= wanted), None)
            yield index, frame if frame is not None and frame.pts == wanted else None
            position = wanted

    def _count(self, container: Any, stream: Any, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        decoder = enumerate(container.decode(stream))
        for index in indices:
            yield index, next((frame for number, frame in decoder if number == index), None)

    @functools.cached_property
    def _index(self) -> _Index | None:
        """The file's index from its packets, or None where these do not tell which frames are shown when."""
        if self._must_count:
            return None
        packets, broken = [], 0
        with self._open() as (container, stream):
            for packet in container.demux(stream):
                if packet.pts is not None or packet.size:
                    is_shown = packet.size > 0 and not packet.is_discard
                    packets.append((packet.pts, packet.dts, packet.is_keyframe, is_shown))
                    broken += packet.is_corrupt
            promised = max(len(stream.index_entries), len(packets))
        if len(packets) - broken < promised:
            raise ValueError(f"it is cut short: {len(packets) - broken} of {promised} frames are there")
        times = [pts for pts, _, _, is_shown in packets if is_shown]
        if None in times or len(set(times)) < len(times):
            return None
        keyframes = [
            (pts, pts if dts is None else dts) for pts, dts, is_key, _ in packets if is_key and pts is not None
        ]
        return _Index(sorted(times), sorted(keyframes))

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        import av
        from av.stream import Disposition

        path, options = str(self._path.absolute()), {"protocol_whitelist": "file"}
        with av.open(path, options=options, metadata_errors="replace") as container:  # a title may be in Latin-1
            covers = Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & covers]
            if not streams:
                raise xblip.MediaError(f"Cannot read {self._label}: it has no video stream. Expected {EXPECTED}.")
            if streams[0].codec_context is None:
                raise xblip.MediaError(f"Cannot read {self._label}: its codec is unknown. Convert it to H.264.")
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]


class DecordReader(Reader):
    """Reads with decord 0.6 of 2021: no AV1; turns frames as MP4 and MOV say, not as MKV; never mirrors."""

    name = "decord"
    package = "decord"

    def __init__(self, path: Path, label: str):
        self._path = path
        self._label = label
        self._refuse_absurd_header()
        reader = self._open()
        height, width, _ = self._next(reader, 0).asnumpy().shape
        self.size = (width, height)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        if np.any(np.diff(starts) <= 0):  # an AVI's B-frames: decord reports nonsense there
            starts = np.arange(len(reader)) / reader.get_avg_fps()
        self._times_s = (starts - starts[0]).tolist()

    def _refuse_absurd_header(self) -> None:
        """Reads the header with PyAV first: where decord lacks the memory for all frames promised, it aborts Python."""
        try:
            header = PyavReader(self._path, self._label)
        except ImportError:
            return
        promised = (header.header_seconds or 0) * (header.rate or 0)
        if promised > MOST_FRAMES:
            raise ValueError(f"its header promises {float(promised):.0f} frames")

    @property
    def seconds(self) -> float:
        return self.times_s[-1]

    @property
    def times_s(self) -> Sequence[float]:
        return self._times_s

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        reader, wanted = self._open(), set(indices)
        for number in range(max(indices) + 1):
            frame = self._next(reader, number)
            if number in wanted:
                yield frame.asnumpy()

    def _open(self) -> Any:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        try:
            return decord.VideoReader(
                str(self._path.absolute()), ctx=decord.cpu(0), num_threads=1, fault_tol=FAULT_TOLERANCE
            )
        except (decord.DECORDError, RuntimeError, AssertionError) as cause:
            if "cannot find video stream" not in str(cause):
                raise ValueError("decord cannot open it") from cause
            raise xblip.MediaError(
                f"Cannot read {self._label}: it has no video stream, or one of a codec that decord does not "
                f"know. Expected {EXPECTED}; reader: pyav knows more codecs."
            ) from cause

    def _next(self, reader: Any, number: int) -> Any:
        from decord import DECORDError, DECORDLimitReachedError

        try:
            frame = reader.next()
        except (DECORDError, DECORDLimitReachedError, StopIteration) as cause:
            raise ValueError(f"decoding fails at or after frame {number} of {len(reader)}") from cause
        if frame.shape[2] != 3:  # it takes the padding of narrow rows for channels
            raise xblip.MediaError(
                f"Cannot read {self._label}: decord misreads frames {frame.shape[1]} pixels wide. Choose reader: pyav."
            )
        return frame


READERS = {reader.name: reader for reader in (PyavReader, DecordReader)}


def choose(name: str) -> type[Reader]:
    """Returns the reader of that name; for "auto" the first that can be imported, PyAV before decord.

    A file that one reader cannot decode is not tried with the other: the error names the reader that failed.

    Raises:
      PluginError: its package cannot be imported.
    """
    candidates = list(READERS.values()) if name == "auto" else [READERS[name]]
    faults = []
    for reader in candidates:
        try:
            importlib.import_module(reader.package)
        except (ImportError, OSError, RuntimeError) as cause:
            faults.append(f"{reader.package}: {cause}")
        else:
            return reader
    raise xblip.PluginError(
        f"No video reader for reader: {name} can be imported ({'; '.join(faults)}). "
        f"Install one: pip install {' or '.join(reader.package for reader in candidates)}."
    )


def check_complete(file: xblip.MediaFile) -> None:
    """Checks by the file's own headers what container it is and that nothing of it is missing.

    WebM and MKV written by a live recorder do not know their length; they pass.

    Raises:
      MediaError: it is no MP4, MOV, WebM, MKV or AVI, or it is shorter than it says.
    """
    with xblip.decoding(file.label, EXPECTED):
        promised = file.declared_bytes()
    if promised is None:
        raise xblip.MediaError(f"Cannot read {file.label}: it is of another format. Expected {EXPECTED}.")
    if promised > file.size:
        raise xblip.MediaError(
            f"Cannot read {file.label}: it is cut short, {file.size} of at least {promised} bytes are there. Copy it "
            "again."
        )


def _upright(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """Applies the display matrix that phones write, rounded to quarter turns and mirrors.

    The matrix a b u, c d v, x y w maps (x, y) to (ax + cy, bx + dy) (FFmpeg, libavutil/display.h).
    """
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return pixels
    a, b, _, c, d = struct.unpack("<5i", matrix[:20])
    if abs(b) > abs(a):
        pixels, right_to_left, upside_down = pixels.swapaxes(0, 1), c < 0, b < 0
    else:
        right_to_left, upside_down = a < 0, d < 0
    return np.ascontiguousarray(pixels[:: -1 if upside_down else 1, :: -1 if right_to_left else 1])
