"""Videos as a few of their frames, each one segment for a vision encoder of `transformers`.

Frames are chosen by their place among all frames, in the middles of equal parts, and read exactly: one file
gives the same pictures in training and in use, and with either reader.
"""

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from xblip_video_readers import EXPECTED, READERS, Reader, check_complete, choose

import xblip

if TYPE_CHECKING:
    import PIL.Image

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
PICTURE = f"a picture ({', '.join(PICTURES)})"
MAX_ASPECT_RATIO = 200
"""Long side over short side of a frame, as in Qwen2-VL's image processor: processors that bring the short
side to a fixed size would blow up a thin strip."""


class Video(xblip.Modality):
    """Videos, S = min(num_frames, number of frames) segments in the order in which they are shown.

    Of T frames, those at floor((i + 1/2) T / S) for i = 0 .. S - 1 are read: the middles of S equal parts. A
    video with fewer frames than asked for gives all of them, none twice. Places are counted in frames, not
    seconds, also where the frame rate varies. Rotation flags are applied; colours are RGB.

    Instead of a file, pictures may be given:
      - a list of PIL images, paths, bytes or open files of pictures, uint8 arrays (H, W, 3) or (H, W);
      - a uint8 array or tensor (T, H, W, 3), or (T, H, W) in grey.
    EXIF orientation is applied to them and transparency is laid on white.
    """

    name = "video"
    suffixes = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
    mime_types = (
        "video/mp4",
        "video/x-m4v",
        "video/quicktime",
        "video/webm",
        "video/x-matroska",
        "video/x-msvideo",
    )
    bridge = {"max_segments": 32}

    @dataclass
    class Config:
        """Settings of the video modality.

        Attributes:
          encoder: folder or hub id of a `transformers` vision model, its image processor beside the weights.
          num_frames: frames read of a video, at most.
          reader: "pyav", "decord", or "auto" for the first of these that can be imported.
          max_pixels: pixels of a frame (width times height) above which a video is refused.
          max_seconds: length above which a video file is refused.
        """

        encoder: str
        num_frames: int = 8
        reader: str = "auto"
        max_pixels: int = 100_000_000
        max_seconds: float = 14_400.0

    def __init__(self, config: Any = None):
        """Keeps `config`.

        Raises:
          ConfigError: `num_frames` or `reader` cannot be.
        """
        super().__init__(config)
        if self.config.num_frames < 1:
            raise xblip.ConfigError(f"num_frames of a video must be at least 1, not {self.config.num_frames}.")
        if self.config.reader not in ("auto", *READERS):
            known = ", ".join(("auto", *READERS))
            raise xblip.ConfigError(f'No video reader is called "{self.config.reader}". Known: {known}.')

    def load(self, source: Any) -> dict[str, Tensor]:
        """Reads one video.

        Args:
          source: path, bytes, open binary file, list of pictures, array or tensor; the class has the rules.

        Returns:
          `pixel_values` (S, 3, H, W) float, each frame as the encoder's image processor gives it.

        Raises:
          MediaError: the source is missing, damaged, cut short, too large, too long, or not a video.
          PluginError: no reader can be imported.
          BundleError: the encoder has no image processor, or one that gives something else.
        """
        file = xblip.media_file(source, kind=self.name)
        frames = self._frames_of_file(file) if file else self._frames_of_pictures(source)
        return {"pixel_values": torch.cat([self._processor(frame) for frame in frames])}

    def build_encoder(self) -> nn.Module:
        """Loads the vision model; of a two-tower model (CLIP, SigLIP) its vision part."""
        return xblip.TransformersEncoder.from_pretrained(self.config.encoder, input_name="pixel_values")

    @classmethod
    def example(cls, folder: Path) -> xblip.Example:
        """Makes a tiny ViT with its processor, two videos, and broken ones."""
        from transformers import ViTConfig, ViTImageProcessor, ViTModel

        encoder, text = folder / "encoder", folder / "text.mp4"
        falling, rising = folder / "falling.mp4", folder / "rising.mp4"
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(encoder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(encoder)
        bars = np.zeros((12, 48, 64, 3), np.uint8)
        for number, frame in enumerate(bars):
            frame[4 * number : 4 * number + 4] = (255, 160, 0)
        _write_video(falling, bars)
        _write_video(rising, bars[::-1])
        text.write_text("not a video")
        return xblip.Example(
            config={"encoder": str(encoder), "num_frames": 4},
            sources=[falling, rising],
            broken=[text, falling.read_bytes()[:-200], bars.astype(float), [], 7],
        )

    @functools.cached_property
    def _processor(self):
        return xblip.TransformersEncoder.image_processor(self.config.encoder)

    def _frames_of_file(self, file: xblip.MediaFile) -> Iterator["PIL.Image.Image"]:
        import PIL.Image

        reader_class = choose(self.config.reader)
        label = f"{file.label} with {reader_class.name}"
        with file.on_disk() as path:
            check_complete(path, file.label)
            with xblip.decoding(label, EXPECTED):
                reader = reader_class(path, label)
                self._check_size(*reader.size, label)
                self._check_length(reader, label)
                for frame in reader.frames(middles(len(reader.times_s), self.config.num_frames)):
                    yield PIL.Image.fromarray(frame)

    def _frames_of_pictures(self, source: Any) -> Iterator["PIL.Image.Image"]:
        if isinstance(source, (np.ndarray, Tensor)):
            source = _as_video(source, f"the {self.name} given as {type(source).__name__}")
        elif not isinstance(source, (list, tuple)):
            raise xblip.MediaError(
                f"Cannot read the {self.name} given as {type(source).__name__}: expected a path, bytes, an "
                "open binary file, a list of pictures, or a uint8 array or tensor (T, H, W, 3)."
            )
        if len(source) == 0:
            raise xblip.MediaError(f"Cannot read the {self.name}: the list of pictures is empty.")
        for index in middles(len(source), self.config.num_frames):
            yield self._picture(source[index], f"frame {index} of the {self.name}")

    def _picture(self, frame: Any, label: str) -> "PIL.Image.Image":
        import PIL.Image

        file = xblip.media_file(frame, kind=label)
        if file:
            with file.open() as stream, xblip.decoding(file.label, PICTURE), _without_pillow_limit:
                return self._upright_rgb(PIL.Image.open(stream, formats=PICTURES), file.label)
        if isinstance(frame, PIL.Image.Image):
            with xblip.decoding(label, "a picture"):
                return self._upright_rgb(frame, label)
        pixels = self.as_array(frame, label) if isinstance(frame, (np.ndarray, Tensor)) else frame
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            given = f"{type(frame).__name__} {getattr(frame, 'dtype', '')}".strip()
            raise xblip.MediaError(
                f"Cannot read {label}: it is {given}; expected a PIL image, a picture file, or a uint8 array."
            )
        if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
            raise xblip.MediaError(f"Cannot read {label}: its shape is {pixels.shape}; expected (H, W, 3) or (H, W).")
        return self._upright_rgb(PIL.Image.fromarray(np.ascontiguousarray(pixels)), label)

    def _upright_rgb(self, picture: "PIL.Image.Image", label: str) -> "PIL.Image.Image":
        import PIL.Image

        self._check_size(*picture.size, label)
        picture.load()
        if picture.mode.startswith("I") or picture.mode == "F":
            raise xblip.MediaError(
                f'Cannot read {label}: its pixels have more than 8 bits (mode "{picture.mode}"). Convert it to 8 bits.'
            )
        picture = _turned(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")

    def _check_size(self, width: int, height: int, label: str) -> None:
        if width * height == 0:
            raise xblip.MediaError(f"Cannot read {label}: it has no pixels ({width} x {height}).")
        if width * height > self.config.max_pixels:
            raise xblip.MediaError(
                f"Cannot read {label}: frames of {width} x {height} are more than max_pixels = "
                f"{self.config.max_pixels}. Shrink them, or raise max_pixels in the modality's config."
            )
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise xblip.MediaError(
                f"Cannot read {label}: frames of {width} x {height} are too thin; one side may be at most "
                f"{MAX_ASPECT_RATIO} times the other. Crop them."
            )

    def _check_length(self, reader: Reader, label: str) -> None:
        if reader.seconds > self.config.max_seconds:
            raise xblip.MediaError(
                f"Cannot read {label}: it lasts {reader.seconds:.0f} s, more than max_seconds = "
                f"{self.config.max_seconds:g}. Cut it, or raise max_seconds in the modality's config."
            )


class _LiftedPillowLimit:
    """Leaves `max_pixels` the only limit: Pillow's own warns and fails at sizes of its own choosing.

    That limit is a global of Pillow which threads share: the first one in lifts it, the last puts it back.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._users = 0
        self._kept: int | None = None

    def __enter__(self) -> None:
        import PIL.Image

        with self._lock:
            if self._users == 0:
                self._kept, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
            self._users += 1

    def __exit__(self, *_) -> None:
        import PIL.Image

        with self._lock:
            self._users -= 1
            if self._users == 0:
                PIL.Image.MAX_IMAGE_PIXELS = self._kept


_without_pillow_limit = _LiftedPillowLimit()


def _turned(picture: "PIL.Image.Image") -> "PIL.Image.Image":
    """Applies the EXIF orientation; where EXIF is unreadable, the picture stays as it is stored."""
    import PIL.ExifTags
    import PIL.Image

    try:
        orientation = picture.getexif().get(PIL.ExifTags.Base.Orientation)
    except Exception:  # of what kind depends on the damage; the pixels do not need it
        return picture
    method = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_270,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_90,
    }.get(orientation)
    return picture if method is None else picture.transpose(method)


def middles(total: int, wanted: int) -> list[int]:
    """Returns the places in the middles of `wanted` equal parts of `total`; all places if they are fewer."""
    count = min(total, wanted)
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]


def _write_video(path: Path, frames: np.ndarray) -> None:
    """Writes (T, H, W, 3) uint8 RGB as H.264, 10 frames a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode(None))


def _as_video(pixels: np.ndarray | Tensor, label: str) -> np.ndarray:
    """Checks the shape (T, H, W, 3) or (T, H, W) and the dtype of a video given as an array."""
    pixels = xblip.Modality.as_array(pixels, label)
    if pixels.dtype != np.uint8:
        raise xblip.MediaError(
            f"Cannot read {label}: its dtype is {pixels.dtype}; expected uint8, 0..255. Convert it, e.g. "
            "(255 * video).round() for values in [0, 1]."
        )
    is_colour = pixels.ndim == 4 and pixels.shape[3] == 3
    # (H, W, 3) is far likelier to be one picture than a grey video three pixels wide.
    is_grey = pixels.ndim == 3 and pixels.shape[2] not in (3, 4)
    if pixels.size == 0 or not (is_colour or is_grey):
        raise xblip.MediaError(
            f"Cannot read {label}: its shape is {pixels.shape}; expected (T, H, W, 3), or (T, H, W) in grey, "
            "with at least one frame. Bring channels last; put a single picture into a list."
        )
    return pixels


@xblip.hookimpl
def register_modalities(register) -> None:
    """Offers `video`."""
    register(Video)
