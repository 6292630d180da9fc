"""SpecAugment (arXiv 1904.08779): moments and bands of a sound are hidden from the encoder at random.

What is hidden becomes the mean of the clip, not zero: encoders count loudness from zeros of their own, and to CLAP's a
zero is the loudest that there is.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

import xblip


@dataclass
class Masks:
    """What is hidden of each clip; the widths are those that AST was trained with (arXiv 2104.01778).

    Attributes:
      times: how many spans of time are hidden.
      time_share: how long such a span is at most, as a share of the clip's sound; all lengths up to it are alike likely.
      bands: how many bands of frequency are hidden; an encoder of samples (wav2vec 2.0, HuBERT) has none.
      band_share: how wide such a band is at most, as a share of the encoder's.
    """

    times: int = 1
    time_share: float = 0.19
    bands: int = 1
    band_share: float = 0.375

    def __post_init__(self):
        """Raises `ConfigError` for what cannot be."""
        for name in ("times", "bands"):
            if getattr(self, name) < 0:
                raise xblip.ConfigError(f"augment.{name} of a sound must be 0 or more, not {getattr(self, name)}.")
        for name in ("time_share", "band_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise xblip.ConfigError(
                    f"augment.{name} of a sound must be a share from 0 to 1, not {getattr(self, name):g}."
                )

    def hide(self, values: Tensor, real: Tensor, draw: np.random.Generator) -> None:
        """Changes values (S, ..., frames, bins) in place, of whose frames the first `real` (S,) are sound."""
        for clip, count in zip(values, real.tolist(), strict=True):
            sound = clip[..., :count, :]
            mean = sound.mean()
            for _ in range(self.times):
                start, end = span(count, self.time_share, draw)
                sound[..., start:end, :] = mean
            for _ in range(self.bands if values.shape[-1] > 1 else 0):
                start, end = span(values.shape[-1], self.band_share, draw)
                sound[..., start:end] = mean


def span(count: int, share: float, draw: np.random.Generator) -> tuple[int, int]:
    """Draws a span of at most `share` of `count` places: where it starts, and ends."""
    length = int(draw.integers(int(share * count) + 1))
    start = int(draw.integers(count - length + 1))
    return start, start + length
