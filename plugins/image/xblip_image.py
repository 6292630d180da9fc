"""Still pictures: files, PIL images, arrays and tensors, as a vision encoder of `transformers` takes them.

Every source first becomes an upright 8-bit RGB picture, and that goes through the image processor saved
beside the encoder.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

import xblip

READERS = {"input_values": "audio", "input_features": "audio", "pixel_values_videos": "video"}
"""Which modality reads what an encoder takes."""


class Image(xblip.Modality):
    """Pictures as one segment each; what a source may be and what it becomes, `Modality.as_picture` tells."""

    name = "image"
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
    mime_types = (
        "image/png",
        "image/jpeg",
        "image/webp",
        "image/gif",
        "image/bmp",
        "image/tiff",
        "image/x-portable-anymap",
        "image/avif",
    )

    transformers_models = (
        "InstructBlipForConditionalGeneration",
        "Blip2ForConditionalGeneration",
        "Blip2ForImageTextRetrieval",
        "LlavaForConditionalGeneration",
    )

    @dataclass
    class Config:
        """Settings of the image modality.

        Attributes:
          encoder: folder or hub id of a `transformers` vision model, its image processor beside the weights.
          layer: which of the model's `hidden_states` to read, as LLaVA counts them (-2: the last but one); None for its
            last hidden state.
          drop_cls: leaves out [CLS], and register tokens beside it.
          max_pixels: pixels (width times height) above which a picture is refused: by its header, before
            decoding.
          augment: which part of a picture `augmented` keeps, and how often it mirrors it.
        """

        encoder: str
        layer: int | None = None
        drop_cls: bool = False
        max_pixels: int = 100_000_000
        augment: xblip.Modality.RandomCrop = field(default_factory=xblip.Modality.RandomCrop)

    def load(self, source: Any) -> dict[str, Tensor]:
        """Reads one picture.

        Args:
          source: path, bytes, open binary file, PIL image, numpy array or torch tensor.

        Returns:
          `pixel_values` (1, 3, H, W) float, exactly what the encoder's image processor gives for the picture; of one
          for pictures of any size (SigLIP 2 NaFlex) patches, their mask, and the shape of their grid.

        Raises:
          MediaError: the source is missing, damaged, too large, too thin, or not a picture.
          BundleError: the encoder has no image processor, or one that gives something else.
        """
        picture = self.as_picture(source, kind=self.name, max_pixels=self.config.max_pixels)
        return self._processor(picture)

    def augmented(self, source: Any, draw: np.random.Generator) -> dict[str, Tensor]:
        """Reads a random part of one picture, which the encoder's image processor resizes and normalises as any other."""
        picture = self.as_picture(source, kind=self.name, max_pixels=self.config.max_pixels)
        return self._processor(self.config.augment.drawn(*picture.size, draw).of(picture))

    def build_encoder(self) -> nn.Module:
        """Loads the vision model; of a two-tower model (CLIP, SigLIP) its vision part.

        Raises:
          BundleError: it cannot be loaded, or reads something else than pictures.
          ConfigError: it has no such `layer`, or no [CLS] to drop.
        """
        encoder = xblip.TransformersEncoder.from_pretrained(
            self.config.encoder, input_name="pixel_values", layer=self.config.layer, drop_cls=self.config.drop_cls
        )
        config, takes = encoder.model.config, encoder.model.main_input_name
        if takes != "pixel_values" or hasattr(config, "num_frames"):
            owner = READERS.get(takes, "video" if takes == "pixel_values" else "that reads these")
            raise xblip.BundleError(
                f'The image encoder "{self.config.encoder}" is a {config.model_type} model, which does not read '
                f"pictures but {'videos' if owner == 'video' else takes}: it belongs to the modality {owner}. "
                "Choose an encoder of pictures."
            )
        return encoder

    def draw(self, tensors: dict[str, Tensor], weights: np.ndarray) -> Any:
        """Lays heat over the picture as the encoder sees it, cropped and small as that may be."""
        rows_columns = tensors.get(
            "spatial_shapes"
        )  # of an encoder for any size, whose tokens may be padding at the end
        grid = None if rows_columns is None else (0, *rows_columns[0].tolist())
        return self.heat.over_pictures(self._processor.seen(tensors), weights, grid=grid)

    @classmethod
    def convert_encoder(cls, checkpoint: Any, folder: Path) -> bool:
        """Converts EVA-CLIP-g, of its own file or a LAVIS checkpoint; use it with `layer: -1`, as it has no final norm.

        Raises:
          BundleError: weights are missing, or of other shapes.
        """
        from xblip_image_convert import convert

        return convert(checkpoint, folder)

    @classmethod
    def diagnose(cls) -> dict[str, Callable[[], str]]:
        """Needs Pillow."""

        def pillow() -> str:
            import PIL

            return PIL.__version__

        return {"Pillow": pillow}

    @classmethod
    def example(cls, folder: Path) -> xblip.Example:
        """Makes a tiny ViT with its processor, two pictures, and broken ones."""
        import PIL.Image
        from transformers import ViTConfig, ViTImageProcessor, ViTModel

        encoder, png, jpeg, text = (folder / name for name in ("encoder", "ramp.png", "noise.jpg", "text.png"))
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(encoder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(encoder)
        ramp = np.linspace(0, 255, 40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8)
        PIL.Image.fromarray(ramp).save(png)
        PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(jpeg)
        text.write_text("not a picture")
        return xblip.Example(
            config={"encoder": str(encoder)},
            sources=[png, jpeg],
            broken=[
                text,
                jpeg.read_bytes()[:-400],
                np.zeros((5, 7, 2), np.uint8),
                np.full((4, 4), np.nan),
                7,
            ],
        )

    @functools.cached_property
    def _processor(self):
        return xblip.TransformersEncoder.image_processor(self.config.encoder)


@xblip.hookimpl
def register_modalities(register) -> None:
    """Offers `image`."""
    register(Image)
