"""Still pictures: whatever users give as one becomes an upright 8-bit RGB picture.

One road for all sources, so that a path, its bytes and its pixels cannot give an encoder different tensors.
"""

import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from xblip.errors import ConfigError, MediaError
from xblip.media import as_array, decoding, media_file

if TYPE_CHECKING:
    import PIL.Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
EXPECTED = "a PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF image"
MAX_ASPECT_RATIO = 200
"""Long side over short side, as in Qwen2-VL's image processor: processors that bring the short side to a fixed size
would blow up a thin strip."""


@dataclass
class RandomCrop:
    """How a part of a picture is drawn, which then goes to an encoder's own processor in the place of the whole.

    With a processor that squeezes pictures to a square, the defaults are BLIP-2's random resized crop, but for flips: it
    mirrors every other picture, which makes every text wrong that says left, right, or what is written in it.

    Attributes:
      scale: least and most of the picture's area that is kept.
      ratio: least and most width over height of what is kept.
      flip: how often it is mirrored, from 0 (never) to 1.
    """

    scale: list[float] = field(default_factory=lambda: [0.5, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    flip: float = 0.0

    def __post_init__(self):
        """Raises `ConfigError` for what cannot be."""
        for name, most in (("scale", 1.0), ("ratio", math.inf)):
            values = getattr(self, name)
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
                raise ConfigError(
                    f"augment.{name} must be the least and the most, above 0{' and at most 1' if most == 1 else ''}, such "
                    f"as [0.5, 1.0], not {list(values)}."
                )
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"augment.flip must be a share of pictures from 0 to 1, not {self.flip:g}.")

    def drawn(self, width: int, height: int, draw: np.random.Generator) -> "Crop":
        """Draws as torchvision's `RandomResizedCrop` does: ten times, then the largest part from the middle that fits."""
        for _ in range(10):
            area = width * height * draw.uniform(*self.scale)
            ratio = math.exp(draw.uniform(*map(math.log, self.ratio)))
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left, top = draw.integers(width - wide + 1), draw.integers(height - high + 1)
                break
        else:
            least, most = self.ratio
            wide, high = min(width, max(1, round(height * most))), min(height, max(1, round(width / least)))
            left, top = (width - wide) // 2, (height - high) // 2
        return Crop(left / width, top / height, (left + wide) / width, (top + high) / height, draw.random() < self.flip)


class Crop(NamedTuple):
    """A part of a picture: its edges as shares of width and height, and whether it is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool

    def of(self, picture: "PIL.Image.Image") -> "PIL.Image.Image":
        """Returns that part of a picture."""
        import PIL.Image

        width, height = picture.size
        left, top = min(width - 1, round(self.left * width)), min(height - 1, round(self.top * height))
        right, bottom = max(left + 1, round(self.right * width)), max(top + 1, round(self.bottom * height))
        part = picture.crop((left, top, right, bottom))
        return part.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else part


def as_picture(source: Any, *, kind: str, max_pixels: int) -> "PIL.Image.Image":
    """Gives a picture as PIL image of mode RGB.

    What every source becomes:
      - EXIF orientation is applied.
      - Transparency is laid on white.
      - Of a moving picture (GIF, WebP, TIFF pages) only the first frame is read.
      - 16-bit grey is scaled to 8 bit by 255/65535; PIL's mode "I" counts as 16 bit.
      - Arrays and tensors are (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4 (grey, RGB, RGBA). Where both orders
        would fit, numpy arrays have their channels last and torch tensors first, as pictures of those libraries do.
      - Their values are uint8, uint16, bool, or floats in [0, 1].

    Args:
      source: path, bytes, open binary file, PIL image, numpy array or torch tensor.
      kind: what it is, for messages.
      max_pixels: pixels (width times height) above which it is refused: by its header, before decoding.

    Raises:
      MediaError: the source is missing, damaged, too large, too thin, or not a picture.
    """
    import PIL.Image

    file = media_file(source, kind=kind)
    if file:
        with file.open() as stream, decoding(file.label, EXPECTED), _without_pillow_limit:
            return _upright_rgb(_opened(stream), file.label, max_pixels)
    label = f"the {kind} given as {type(source).__name__}"
    if isinstance(source, PIL.Image.Image):
        with decoding(label, EXPECTED), _without_pillow_limit:
            return _upright_rgb(source, label, max_pixels)
    if isinstance(source, (np.ndarray, Tensor)):
        return _upright_rgb(_from_pixels(source, label), label, max_pixels)
    raise MediaError(
        f"Cannot read {label}: expected a path, bytes, an open binary file, a PIL image, a numpy array or a torch "
        "tensor."
    )


def check_size(width: int, height: int, *, label: str, max_pixels: int) -> None:
    """Raises MediaError for a picture without pixels, with more than `max_pixels`, or as thin as a thread.

    Args:
      width, height: in pixels.
      label: how error messages call it.
      max_pixels: a setting of that name in the modality's config.
    """
    if width * height == 0:
        raise MediaError(f"Cannot read {label}: it has no pixels ({width} x {height}). Expected at least one.")
    if width * height > max_pixels:
        raise MediaError(
            f"Cannot read {label}: {width} x {height} is more than max_pixels = {max_pixels}. Shrink it, or raise "
            "max_pixels in the modality's config."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise MediaError(
            f"Cannot read {label}: {width} x {height} is too thin; one side may be at most {MAX_ASPECT_RATIO} times "
            "the other. Crop it."
        )


def _opened(stream: BinaryIO) -> "PIL.Image.Image":
    import PIL.Image

    try:
        return PIL.Image.open(stream, formats=FORMATS)
    except PIL.UnidentifiedImageError as cause:
        raise ValueError("its beginning is of no such picture") from cause


def _upright_rgb(picture: "PIL.Image.Image", label: str, max_pixels: int) -> "PIL.Image.Image":
    import PIL.Image

    check_size(*picture.size, label=label, max_pixels=max_pixels)
    picture.load()
    picture = _turned(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values, transparent = np.asarray(picture), picture.info.get("transparency")
        picture = PIL.Image.fromarray(_eight_bit(_sixteen_bit(values, label), label))
        if transparent is not None:  # the one shade of grey that a PNG declares so
            picture.putalpha(PIL.Image.fromarray(_eight_bit(values != transparent, label)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture)
    return picture.convert("RGB")


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


def _from_pixels(pixels: np.ndarray | Tensor, label: str) -> "PIL.Image.Image":
    """Turns an array or tensor into a PIL image of mode L, RGB or RGBA."""
    import PIL.Image

    channel_axes = (0, 2) if isinstance(pixels, Tensor) else (2, 0)
    pixels = as_array(pixels, label)
    if pixels.ndim == 3:
        axis = next((axis for axis in channel_axes if pixels.shape[axis] in (1, 3, 4)), None)
        pixels = pixels if axis is None else np.moveaxis(pixels, axis, 2)
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))) or pixels.size == 0:
        raise MediaError(
            f"Cannot read {label}: its shape is {pixels.shape}; expected (H, W), (H, W, C) or (C, H, W) with "
            "C = 1, 3 or 4 and at least one pixel."
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return PIL.Image.fromarray(np.ascontiguousarray(_eight_bit(pixels, label)))


def _sixteen_bit(values: np.ndarray, label: str) -> np.ndarray:
    """Narrows PIL's mode "I", 32-bit integers that hold 16-bit grey; leaves other arrays as they are."""
    if values.dtype != np.int32:
        return values
    if values.min() < 0 or values.max() > 65535:
        raise MediaError(
            f'Cannot read {label}: mode "I" is read as 16-bit grey, and its values go from {values.min()} to '
            f"{values.max()}. Scale them to 0..65535."
        )
    return values.astype(np.uint16)


def _eight_bit(values: np.ndarray, label: str) -> np.ndarray:
    """Scales uint16, bool and floats in [0, 1] to uint8, rounding to nearest."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind != "f":
        raise MediaError(
            f"Cannot read {label}: its dtype is {values.dtype}; expected uint8, uint16, bool, or floats in "
            "[0, 1]. Convert it, e.g. to uint8 if its values are 0..255."
        )
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise MediaError(
            f"Cannot read {label}: {bad} of its {values.size} values are NaN or infinite. Give finite ones."
        )
    if values.min() < 0 or values.max() > 1:
        raise MediaError(
            f"Cannot read {label}: float values must lie in [0, 1]; these go from {values.min():g} to "
            f"{values.max():g}. Divide 0..255 by 255, or convert to uint8."
        )
    return np.rint(values * 255).astype(np.uint8)
