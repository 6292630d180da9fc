"""Varies what the encoders train on: batches of tensors, made different each time they are seen.

Varying tensors costs a hundredth of rendering files anew. Nothing here touches a fact: levels of sound move by less than
loud and quiet lie apart, lengths by less than slow and fast do, solids turn about the vertical axis alone.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

AUDIO_MEAN, AUDIO_STD = -7.0, 5.2
"""Of log-mel energies (natural logarithm) of the training recordings, silence left out; AST's extractor halves the scale."""
MEL_BINS, LOWEST_HZ, HIGHEST_HZ = 32, 20.0, 8000.0
_PAD = -AUDIO_MEAN / (2 * AUDIO_STD)
_NATURAL_PER_DB = math.log(10) / 10


def uniform(low: float, high: float, *shape: int) -> Tensor:
    """Random numbers from `low` to `high`."""
    return torch.empty(shape).uniform_(low, high)


def vary_images(pixel_values: Tensor, is_sign: Tensor, is_mirrored: Tensor) -> Tensor:
    """Turns, scales, shifts, warps and lights pictures; hands more so; all frames of a video alike.

    Args:
      pixel_values: (M, S, 3, H, W) in -1 to 1.
      is_sign: (M,) boolean, hands, which are turned farther. None is shifted by more than .025 of the picture, so that its
        place stays true.
      is_mirrored: (M,) boolean, which are to be mirrored.

    Returns:
      (M, S, 3, H, W).
    """
    count, segments = pixel_values.shape[:2]
    sign = is_sign.float()
    angle = uniform(-1, 1, count) * (4 + 4 * sign) * math.pi / 180
    scale = torch.exp(uniform(-1, 1, count) * 0.06)
    shift = uniform(-1, 1, count, 2) * 0.05
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    flip = torch.where(is_mirrored, -1.0, 1.0)
    affine = torch.stack([cosine * flip, -sine, shift[:, 0], sine * flip, cosine, shift[:, 1]], 1).view(count, 2, 3)
    grid = F.affine_grid(affine, [count, 3, *pixel_values.shape[3:]], align_corners=False)
    grid = (grid + _warps(count, pixel_values.shape[3])).repeat_interleave(segments, 0)
    varied = F.grid_sample(pixel_values.flatten(0, 1), grid, padding_mode="border", align_corners=False)
    varied = varied.unflatten(0, (count, segments))
    light = uniform(0.8, 1.15, count, 1, 1, 1, 1) * uniform(0.94, 1.06, count, 1, 3, 1, 1)
    varied = ((varied + 1) * light - 1 + uniform(-0.1, 0.1, count, 1, 1, 1, 1)).clamp(-1, 1)
    return varied + torch.randn_like(varied) * uniform(0, 0.03, count, 1, 1, 1, 1)


def _warps(count: int, side: int) -> Tensor:
    """Smooth displacements of a picture's pixels, (count, side, side, 2), about .025 of the picture at random places."""
    coarse = torch.randn(count, 2, 7, 7) * uniform(0, 0.05, count, 1, 1, 1)
    return F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def vary_spectrograms(input_values: Tensor, num_frames: Tensor, is_other: Tensor) -> tuple[Tensor, Tensor]:
    """Gives recordings a slightly other speed, microphone and background, some another voice, and hides parts of them.

    The vocal tract's length is varied by stretching the frequency axis in hertz (Jaitly and Hinton, 2013), the
    microphone by a smooth curve over the mel bins; hiding is SpecAugment's (arXiv 1904.08779).

    Args:
      input_values: (M, T, MEL_BINS), as `AUDIO_MEAN` and `AUDIO_STD` normalise them, padded at the end.
      num_frames: (M,) how many frames are real.
      is_other: (M,) boolean, who is to sound like somebody else.

    Returns:
      The same, varied: spectrograms and how many of their frames are real.
    """
    count, length, bins = input_values.shape
    start, speed = uniform(-20, 0, count, 1), torch.exp(uniform(-0.1, 0.1, count, 1))
    time = torch.arange(length) * speed + start
    real = time <= num_frames[:, None] - 0.5
    rows = (2 * time / (length - 1) - 1)[:, :, None].expand(count, length, bins)
    tract = torch.exp(uniform(-1, 1, count, 1) * torch.where(is_other, 0.17, 0.03)[:, None])
    columns = _stretched_bins(tract)[:, None].expand(count, length, bins)
    varied = F.grid_sample(input_values[:, None], torch.stack([columns, rows], 3), align_corners=True)[:, 0]
    energies = varied * 2 * AUDIO_STD + AUDIO_MEAN
    energies = energies + _smooth_curves(count, bins)[:, None]
    before = (time < -0.5)[:, :, None]
    hiss = _hiss(energies)
    hissing = (torch.rand(count, 1, 1) < 0.6) | before
    energies = torch.where(before, hiss, energies).logaddexp(torch.where(hissing, hiss, -math.inf))
    varied = _hide((energies - AUDIO_MEAN) / (2 * AUDIO_STD), num_frames)
    return torch.where(real[:, :, None], varied, _PAD), real.sum(1).clamp(min=1)


def turn_points(points: Tensor, angle: Tensor) -> Tensor:
    """Turns clouds (M, P, 3 or more) about the vertical by angles (M,) in radians, counter-clockwise seen from above."""
    cosine, sine, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([cosine, sine, zero, -sine, cosine, zero, zero, zero, one], 1).view(-1, 3, 3)
    return torch.cat([points[..., :3] @ turn, points[..., 3:]], 2)


def vary_points(points: Tensor, widest: float) -> Tensor:
    """Gives painted clouds (M, P, 6), inside the unit sphere, another shape and another turn about the vertical axis.

    They are sheared and stretched a little, bent by slow waves as another hand would write them, turned by up to `widest`
    radians either way, roughened, normalised again, and lit otherwise.
    """
    count = len(points)
    places, paint = points[..., :3], points[..., 3:]
    places = places @ (torch.eye(3) + 0.06 * torch.randn(count, 3, 3).clamp(-2, 2))
    for frequency in (2.0, 3.0, 4.0):
        waves, phase = frequency * torch.randn(count, 3, 3), uniform(0, 2 * math.pi, count, 1, 3)
        places = places + 0.095 / frequency * torch.sin(places @ waves + phase)
    varied = turn_points(places, uniform(-widest, widest, count)) + torch.randn_like(places) * 0.008
    varied = varied - varied.mean(1, keepdim=True)
    varied = varied / varied.norm(dim=2).amax(1)[:, None, None]
    lit = paint * uniform(0.85, 1.1, count, 1, 1) + uniform(-0.04, 0.04, count, 1, 3)
    return torch.cat([varied, lit.clamp(0, 1)], 2)


def _stretched_bins(factor: Tensor) -> Tensor:
    """Where each mel bin is read from when frequencies are multiplied by `factor` (M, 1): (M, MEL_BINS) in -1 to 1."""
    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (LOWEST_HZ, HIGHEST_HZ))
    hertz = 700 * (torch.exp(torch.linspace(low, high, MEL_BINS + 2)[1:-1] / 1127) - 1)
    place = (1127 * torch.log(1 + hertz * factor / 700) - low) / (high - low) * (MEL_BINS + 1) - 1
    return 2 * place.clamp(0, MEL_BINS - 1) / (MEL_BINS - 1) - 1


def _smooth_curves(count: int, bins: int) -> Tensor:
    """Random sums of the first four cosines over the bins: (count, bins), about 2 dB."""
    order = torch.arange(1, 5)[:, None]
    cosines = torch.cos(order * torch.linspace(0, math.pi, bins)) / order
    return 0.25 * torch.randn(count, 4) @ cosines


def _hiss(energies: Tensor) -> Tensor:
    """Background 28 to 50 dB below the loudest part of each recording, its spectrum slanted: (M, T, bins)."""
    count, _, bins = energies.shape
    loudest = energies.flatten(1).topk(energies[0].numel() // 12).values.mean(1)
    level = loudest - uniform(28, 50, count) * _NATURAL_PER_DB
    slant = torch.randn(count, 1, 1) * torch.linspace(1, -1, bins)
    # The logarithm of noise's energy varies from bin to bin like that of an exponential variable, smoothed by the filters.
    return level[:, None, None] + slant + 0.5 * torch.empty_like(energies).exponential_().clamp(min=0.01).log()


def _hide(spectrograms: Tensor, num_frames: Tensor) -> Tensor:
    """Replaces two stretches of time (at most 6 frames) and two of frequency (at most 4 bins) by the mean."""
    count, length, bins = spectrograms.shape
    mean = spectrograms.mean((1, 2), keepdim=True)
    for size, longest, axis in ((num_frames, 6, 1), (num_frames, 6, 1), (bins, 4, 2), (bins, 4, 2)):
        width = uniform(0, longest, count)
        first = uniform(0, 1, count) * (size - width)
        place = torch.arange(length if axis == 1 else bins)
        hidden = (place >= first[:, None]) & (place < (first + width)[:, None])
        spectrograms = torch.where(hidden.unsqueeze(3 - axis), mean, spectrograms)
    return spectrograms
