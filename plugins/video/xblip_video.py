"""Videos as a few of their frames, each one segment for a vision encoder of `transformers`, or all one for a video's.

Frames are chosen by their place among all frames, in the middles of equal parts, and read exactly: one file
gives the same pictures in training and in use, and with either reader.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from xblip_video_readers import EXPECTED, READERS, Reader, check_complete, choose

import xblip

if TYPE_CHECKING:
    import PIL.Image


class Video(xblip.Modality):
    """Videos, S = min(num_frames, number of frames) segments in the order in which they are shown.

    An encoder of whole videos (VideoMAE, ViViT, TimeSformer) has one segment, of as many frames as its config says; of
    shorter videos it sees frames several times, as evenly as possible.

    Of T frames, those at floor((i + 1/2) T / S) for i = 0 .. S - 1 are read: the middles of S equal parts. A
    video with fewer frames than asked for gives all of them, none twice. Places are counted in frames, not
    seconds, also where the frame rate varies. Rotation flags are applied; colours are RGB.

    Instead of a file, a list of pictures may be given, or an array or tensor (T, H, W, 3), or (T, H, W) in grey.
    What a picture may be and what it becomes, `Modality.as_picture` tells.
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
    transformers_models = ("InstructBlipVideoForConditionalGeneration",)

    @dataclass
    class Config:
        """Settings of the video modality.

        Attributes:
          encoder: folder or hub id of a `transformers` model of pictures or videos, its processor beside the weights.
          layer: which of the model's `hidden_states` to read, as LLaVA counts them (-2: the last but one); None for its
            last hidden state.
          drop_cls: leaves out [CLS], and register tokens beside it.
          num_frames: frames read of a video, at most; an encoder of whole videos takes as many as its config says.
          reader: "pyav", "decord", or "auto" for the first of these that can be imported.
          max_pixels: pixels of a frame (width times height) above which a video is refused.
          max_seconds: length above which a video file is refused.
          augment: which part of a video `augmented` keeps, and how often it mirrors it.
        """

        encoder: str
        layer: int | None = None
        drop_cls: bool = False
        num_frames: int = 8
        reader: str = "auto"
        max_pixels: int = 100_000_000
        max_seconds: float = 14_400.0
        augment: xblip.Modality.RandomCrop = field(default_factory=xblip.Modality.RandomCrop)

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
          `pixel_values` (S, 3, H, W) float, each frame as the encoder's image processor gives it; of an encoder of whole
          videos (1, T, 3, H, W), as its video processor gives them.

        Raises:
          MediaError: the source is missing, damaged, cut short, too large, too long, or not a video.
          PluginError: no reader can be imported.
          BundleError: the encoder has no processor, or one that gives something else.
        """
        return self._tensors(self._frames(source))

    def augmented(self, source: Any, draw: np.random.Generator) -> dict[str, Tensor]:
        """Reads a random part of one video, the same of all its frames, so that what stands still goes on standing still."""
        frames = list(self._frames(source))
        crop = self.config.augment.drawn(*frames[0].size, draw)
        return self._tensors(map(crop.of, frames))

    def build_encoder(self) -> nn.Module:
        """Loads the model; of a two-tower model (CLIP, SigLIP) its vision part.

        Raises:
          BundleError: it cannot be loaded, or reads neither pictures nor videos.
          ConfigError: it has no such `layer`, or no [CLS] to drop.
        """
        encoder = xblip.TransformersEncoder.from_pretrained(
            self.config.encoder, input_name="pixel_values", layer=self.config.layer, drop_cls=self.config.drop_cls
        )
        takes = encoder.model.main_input_name
        if takes != "pixel_values":
            owner = " (it belongs to the modality audio)" if takes in ("input_values", "input_features") else ""
            raise xblip.BundleError(
                f'The video encoder "{self.config.encoder}" is a {encoder.model.config.model_type} model, which reads '
                f"{takes}{owner}. Choose a VideoMAE, ViViT or TimeSformer, or any encoder of pictures."
            )
        return encoder

    def draw(self, tensors: dict[str, Tensor], weights: np.ndarray) -> Any:
        """Lays heat over the frames as the encoder sees them, side by side; a tubelet's is on each of its frames."""
        if not self._frames_of_encoder:
            frames = self._processor.seen(tensors)
            return self.heat.over_pictures(frames, weights, labels=_numbered(len(frames)))
        frames = xblip.TransformersEncoder.seen(list(tensors["pixel_values"][0]), self._video_processor)
        found = self._tubelets(weights.shape[1], frames)
        if found is None:
            return self.heat.bars(weights)
        special, moments = found
        patches = weights[0, special:]
        last = self._encoder_config.model_type == "timesformer"  # the one whose tokens go through the moments first
        patches = patches.reshape(-1, moments).T if last else patches.reshape(moments, -1)
        patches = patches[np.arange(len(frames)) * moments // len(frames)]
        drawing = self.heat.over_pictures(frames, patches, labels=_numbered(len(frames)))
        drawing.placeless = self.heat.named(special)
        return drawing

    def _tubelets(self, count: int, frames: list[Any]) -> tuple[int, int] | None:
        """How many of so many tokens are special, and for how many moments the rest stand; None if that is not known."""
        tubelet = getattr(self._encoder_config, "tubelet_size", 1)
        moments = len(frames) // (tubelet if isinstance(tubelet, int) else tubelet[0])
        for special in (0, 1):
            grid = self.heat.grid_of((count - special) // moments, *frames[0].size)
            if (count - special) % moments == 0 and grid and not grid[0]:
                return special, moments
        return None

    @classmethod
    def diagnose(cls) -> dict[str, Callable[[], str]]:
        """Needs PyAV, which brings FFmpeg, or decord."""

        def ffmpeg() -> str:
            import av

            return f"{av.ffmpeg_version_info} by {av.__version__}"

        def decord() -> str:
            import decord

            return decord.__version__

        return {"FFmpeg, by PyAV": ffmpeg, "decord": decord}

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

    @property
    def _frames_of_encoder(self) -> int | None:
        """How many frames an encoder of whole videos takes; None for one of pictures."""
        return getattr(self._encoder_config, "num_frames", None)

    @functools.cached_property
    def _encoder_config(self) -> Any:
        from transformers import AutoConfig

        return xblip.TransformersEncoder.read_beside(
            AutoConfig,
            self.config.encoder,
            failure=f'Cannot read what the video encoder "{self.config.encoder}" is',
            expected="the folder of a transformers model, or a hub id that is reachable or already downloaded.",
        )

    @functools.cached_property
    def _video_processor(self):
        from transformers import AutoVideoProcessor

        return xblip.TransformersEncoder.read_beside(
            AutoVideoProcessor,
            self.config.encoder,
            failure=f'Cannot load the processor of the video encoder "{self.config.encoder}"',
            expected="video_preprocessor_config.json or preprocessor_config.json beside its weights: put it there by "
            "save_pretrained.",
        )

    def _frames(self, source: Any) -> "Iterator[PIL.Image.Image]":
        file = xblip.media_file(source, kind=self.name)
        return self._frames_of_file(file) if file else self._frames_of_pictures(source)

    def _tensors(self, frames: "Iterable[PIL.Image.Image]") -> dict[str, Tensor]:
        if self._frames_of_encoder:
            return self._one_segment(list(frames))
        segments = [self._processor(frame) for frame in frames]
        return {name: torch.cat([segment[name] for segment in segments]) for name in segments[0]}

    def _one_segment(self, frames: "list[PIL.Image.Image]") -> dict[str, Tensor]:
        sizes = {frame.size for frame in frames}
        if len(sizes) > 1:
            raise xblip.MediaError(
                f"Cannot read the {self.name}: its pictures are of {len(sizes)} sizes, {min(sizes)} and {max(sizes)} among "
                "them, and an encoder of whole videos takes one. Resize them."
            )
        values = self._video_processor(frames, return_tensors="pt")["pixel_values"]
        return {"pixel_values": values}

    def _counts(self, total: int) -> Counter[int]:
        """Which of `total` frames are read, in order, and how often each is given."""
        if self._frames_of_encoder:
            return Counter(spread(total, self._frames_of_encoder))
        return Counter(middles(total, self.config.num_frames))

    def _frames_of_file(self, file: xblip.MediaFile) -> Iterator["PIL.Image.Image"]:
        import PIL.Image

        reader_class = choose(self.config.reader)
        label = f"{file.label} with {reader_class.name}"
        check_complete(file)
        with file.on_disk() as path, xblip.decoding(label, EXPECTED):
            reader = reader_class(path, label)
            self.check_picture_size(*reader.size, label=label, max_pixels=self.config.max_pixels)
            self._check_length(reader, label)
            counts = self._counts(len(reader.times_s))
            for frame, count in zip(reader.frames(list(counts)), counts.values(), strict=True):
                yield from [PIL.Image.fromarray(frame)] * count

    def _frames_of_pictures(self, source: Any) -> Iterator["PIL.Image.Image"]:
        if isinstance(source, (np.ndarray, Tensor)):
            source = _as_video(source, f"the {self.name} given as {type(source).__name__}")
        elif not isinstance(source, (list, tuple)):
            raise xblip.MediaError(
                f"Cannot read the {self.name} given as {type(source).__name__}: expected a path, bytes, an "
                "open binary file, a list of pictures, or an array or tensor (T, H, W, 3)."
            )
        if len(source) == 0:
            raise xblip.MediaError(f"Cannot read the {self.name}: the list of pictures is empty.")
        for index, count in self._counts(len(source)).items():
            kind = f"frame {index} of the {self.name}"
            yield from [self.as_picture(source[index], kind=kind, max_pixels=self.config.max_pixels)] * count

    def _check_length(self, reader: Reader, label: str) -> None:
        if reader.seconds > self.config.max_seconds:
            raise xblip.MediaError(
                f"Cannot read {label}: it lasts {reader.seconds:.0f} s, more than max_seconds = "
                f"{self.config.max_seconds:g}. Cut it, or raise max_seconds in the modality's config."
            )


def middles(total: int, wanted: int) -> list[int]:
    """Returns the places in the middles of `wanted` equal parts of `total`; all places if they are fewer."""
    return spread(total, min(total, wanted))


def spread(total: int, wanted: int) -> list[int]:
    """Returns the places in the middles of `wanted` equal parts of `total`; some several times if they are fewer."""
    return [(2 * part + 1) * total // (2 * wanted) for part in range(wanted)]


def _numbered(count: int) -> list[str]:
    return [f"frame {number + 1}" for number in range(count)]


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
    """Checks the shape (T, H, W, 3) or (T, H, W) of a video given as an array."""
    pixels = xblip.Modality.as_array(pixels, label)
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
