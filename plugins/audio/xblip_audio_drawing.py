"""Sound drawn with heat where an encoder's tokens lie: over its spectrogram or wave, and on a timeline below.

What is drawn is what the encoder hears, its own spectrogram or samples, as far as they are sound: padding is left out. Each
point takes the token whose middle is nearest, since patches of an AST overlap.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import PIL.Image
import PIL.ImageDraw
from torch import Tensor
from xblip_audio_encoders import Beats, Clap, Family, Spectrograms

import xblip

heat = xblip.Modality.heat
HIGH, BAND, AXIS = 128, 14, 18  # pixels of a spectrogram, of the timeline below it, and of the seconds below that
GAP = 3  # of the timeline's
WIDE, NARROWEST = 720, 240


@dataclass
class Cells:
    """Where tokens lie in a clip.

    Attributes:
      tokens: (bands, moments), which token stands for each, bands from low to high.
      band_of_bin, moment_of_frame: the nearest of them.
      special: tokens before them.
    """

    tokens: np.ndarray
    band_of_bin: np.ndarray
    moment_of_frame: np.ndarray
    special: int = 0


def draw(family: Family, tensors: dict[str, Tensor], weights: np.ndarray) -> "heat.Drawing":
    """Draws the S clips of `Family.clips` below each other, with weights (S, N)."""
    values, real = family.sound(tensors)
    values = (values[:, 0] if values.dim() == 4 else values).float().cpu().numpy()
    frames, bins = values.shape[1:]
    cells = _cells(family, weights.shape[1], frames, bins)
    if cells is None:
        return heat.bars(weights)
    grids = heat.scaled(weights[:, cells.special :])[:, cells.tokens - cells.special]
    whole_s = family.frames.samples(family.frames.most) / family.sampling_rate_hz
    longest = int(real.max())
    clips = [
        _clip(clip[: int(count)], grid, cells, seconds=whole_s * int(count) / frames, share=int(count) / longest)
        for clip, grid, count in zip(values, grids, real, strict=True)
    ]
    labels = [f"clip {number + 1} of {len(clips)}" for number in range(len(clips))] if len(clips) > 1 else None
    bands, moments = cells.tokens.shape
    caption = f"A stripe is one of {moments} moments of a whole clip."
    if bands > 1:
        caption = f"A block is one of {moments} moments of a whole clip and of {bands} bands, low pitches below."
    return heat.Drawing({".png": heat.sheet(clips, labels, columns=1)}, caption, heat.named(cells.special))


def _cells(family: Family, count: int, frames: int, bins: int) -> Cells | None:
    """Finds the places of so many tokens in a clip of so many frames and bins; None if they are of another encoder."""
    config = getattr(family.config, "audio_config", family.config)
    special, moments_first, bands = 0, False, 1
    frame_step, bin_step = None, None
    if isinstance(family, Beats):
        bands, moments_first = config.num_mel_bins // config.patch_size, True
    elif type(family) is Spectrograms:
        special, frame_step, bin_step = 2, config.time_stride, config.frequency_stride
        bands = (config.num_mel_bins - config.patch_size) // bin_step + 1
    elif isinstance(family, Spectrograms):  # a convolutional network's grid has the shape of the spectrogram
        grid = heat.grid_of(count, bins, frames)
        if grid is None or grid[0]:
            return None
        bands, moments_first = grid[2], True
    elif isinstance(family, Clap):
        coarse = config.spec_size // 2 ** (len(config.depths) - 1) // _first(config.patch_stride)
        bands = max(1, coarse // (config.spec_size // config.num_mel_bins))
    if count <= special or (count - special) % bands:
        return None
    moments = (count - special) // bands
    tokens = special + np.arange(count - special)
    tokens = tokens.reshape(moments, bands).T if moments_first else tokens.reshape(bands, moments)
    patch = getattr(config, "patch_size", 1) if frame_step else None
    return Cells(tokens, _nearest(bands, bins, bin_step, patch), _nearest(moments, frames, frame_step, patch), special)


def _nearest(count: int, length: int, step: int | None, size: int | None) -> np.ndarray:
    """Which of `count` patches, `step` apart, is nearest with its middle to each of `length` places; even ones without."""
    step, size = (step, size) if step else (length / count, length / count)
    places = np.arange(length) + 0.5
    return np.floor((places - (size - step) / 2) / step).clip(0, count - 1).astype(int)


def _clip(sound: np.ndarray, grid: np.ndarray, cells: Cells, *, seconds: float, share: float) -> PIL.Image.Image:
    """Draws one clip's sound (frames, bins) with the heat of its cells (bands, moments)."""
    wide = max(NARROWEST, round(WIDE * share))
    moments = cells.moment_of_frame[: len(sound)]
    columns = (np.arange(wide) * len(sound) / wide).astype(int)
    picture = _wave(sound[:, 0], wide) if sound.shape[1] == 1 else _spectrogram(sound, wide)
    rows = cells.band_of_bin[(np.arange(HIGH)[::-1] * sound.shape[1] / HIGH).astype(int)]
    picture = heat.lay_over(picture, grid[rows][:, moments[columns]])
    page = PIL.Image.new("RGB", (wide, HIGH + BAND + AXIS), heat.PAPER)
    page.paste(picture, (0, 0))
    band = PIL.Image.new("RGB", (wide, BAND - GAP), heat.GREY)
    page.paste(heat.lay_over(band, heat.scaled(grid.sum(0))[moments[columns]][None]), (0, HIGH + GAP))
    _axis(page, seconds)
    return page


def _spectrogram(sound: np.ndarray, wide: int) -> PIL.Image.Image:
    """Loud is dark, low pitches below."""
    quiet, loud = np.percentile(sound, (2, 99.5))
    darkness = ((sound - quiet) / max(loud - quiet, 1e-6)).clip(0, 1).T[::-1]
    grey = PIL.Image.fromarray((255 - 190 * darkness).round().astype(np.uint8))
    return grey.resize((wide, HIGH), PIL.Image.Resampling.BILINEAR).convert("RGB")


def _wave(samples: np.ndarray, wide: int) -> PIL.Image.Image:
    """From the least to the largest sample of each column."""
    picture = PIL.Image.new("RGB", (wide, HIGH), heat.PAPER)
    pen = PIL.ImageDraw.Draw(picture)
    loudest = max(float(np.abs(samples).max()), 1e-6)
    edges = np.linspace(0, len(samples), wide + 1).astype(int)
    for column, (start, end) in enumerate(pairwise(edges)):
        part = samples[start : max(end, start + 1)]
        ends = [HIGH / 2 * (1 - 0.95 * float(value) / loudest) for value in (part.max(), part.min())]
        pen.line([(column, ends[0]), (column, ends[1])], (110, 110, 120))
    return picture


def _axis(page: PIL.Image.Image, seconds: float) -> None:
    """Writes seconds below, at round places."""
    pen = PIL.ImageDraw.Draw(page)
    step = next((step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if seconds / step <= 8), 60)
    for number in range(int(seconds / step) + 1):
        left = min(page.width - 1, round(number * step / seconds * page.width))
        top = HIGH + BAND
        pen.line([(left, top), (left, top + 4)], heat.INK)
        heat.write(pen, (left + 2, top + 3), f"{number * step:g} s" if left < page.width - 24 else "")


def _first(value: int | tuple | list) -> int:
    return value if isinstance(value, int) else value[0]
