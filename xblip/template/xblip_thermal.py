"""The modality `thermal`: pictures of temperature, and the frozen encoder that reads them.

`load` keeps degrees Celsius; the encoder alone scales them, because it alone knows what it was trained on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xblip
from torch import Tensor, nn


class Thermal(xblip.Modality):
    """Reads temperatures of shape (height, width) in degrees Celsius: .npy files, arrays and tensors."""

    name = "thermal"
    suffixes = (".npy",)

    @dataclass
    class Config:
        """`size`: pixels a side that every picture is brought to; `width`: D_enc of the encoder."""

        size: int = 32
        width: int = 64

    def load(self, source: Any) -> dict[str, Tensor]:
        """Returns `celsius` (1, size, size); the first dimension counts segments, and a picture is one."""
        label = f"the {self.name} given as {type(source).__name__}"
        if file := xblip.media_file(source, kind=self.name):
            label = file.label
            with file.open() as stream, xblip.decoding(label, "a .npy file"):
                source = np.lib.format.read_array(stream, allow_pickle=False)
        with xblip.decoding(label, "an array of numbers"):
            celsius = torch.as_tensor(np.asarray(source, dtype=np.float32))
        bad = int((~celsius.isfinite()).sum())
        if celsius.dim() != 2 or celsius.numel() == 0 or bad:
            raise xblip.MediaError(
                f"Cannot read {label}: expected finite temperatures of shape (height, width); its shape is "
                f"{tuple(celsius.shape)}, and {bad} of its values are NaN or infinite."
            )
        size = (self.config.size, self.config.size)
        return {"celsius": nn.functional.interpolate(celsius[None, None], size, mode="bilinear", antialias=True)[0]}

    def build_encoder(self) -> nn.Module:
        return PatchEncoder(self.config.width)

    def draw(self, tensors: dict[str, Tensor], weights: np.ndarray) -> Any:
        """Shows where the tokens lie, for `xblip ask --explain`: patches of the picture, in which warm is bright."""
        from PIL import Image

        celsius = tensors["celsius"][0].numpy()
        brightness = (255 * self.heat.scaled(celsius - celsius.min())).astype(np.uint8)
        return self.heat.over_pictures([Image.fromarray(brightness)], weights)

    @classmethod
    def example(cls, folder: Path) -> xblip.Example:
        """Two pictures that differ, and what must be refused: text, half a file, colour, no pixels, NaN."""
        file, text = folder / "warm.npy", folder / "text.npy"
        np.save(file, np.random.default_rng(0).uniform(15, 40, (48, 64)))
        text.write_text("not an array")
        return xblip.Example(
            config={"width": 16},
            sources=[file, np.linspace(-10, 10, 300).reshape(15, 20)],
            broken=[text, file.read_bytes()[:-80], np.zeros((4, 4, 3)), np.zeros((0, 4)), np.full((4, 4), np.nan)],
        )


class PatchEncoder(nn.Module):
    """Fixed random features of 8 x 8 patches: an example, to be replaced by an encoder that has learned something."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Conv2d(1, width, kernel_size=8, stride=8)

    def forward(self, celsius: Tensor) -> Tensor:
        """Takes (M, size, size), returns (M, N, D_enc): one token a patch."""
        scaled = (celsius[:, None] - 20) / 20
        return self.embed(scaled.to(self.embed.weight.dtype)).flatten(2).transpose(1, 2)


@xblip.hookimpl
def register_modalities(register) -> None:
    """Offers `thermal`; the entry point in pyproject.toml leads here."""
    register(Thermal)
