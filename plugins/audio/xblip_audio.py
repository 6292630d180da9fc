"""The modality "audio": sound, cut into clips, each encoded by a network that the encoder's folder holds.

Clips are windows as long as the encoder's, one after another, the last one padded and masked: no sound is
squeezed or cut to a fixed length. What the encoders are and how each is given its clips stands in
`xblip_audio_encoders`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from xblip_audio_encoders import FAMILIES, Family, SpectrogramPictures
from xblip_audio_files import read_file, refuse_long
from xblip_audio_masks import Masks

import xblip

LOUDEST = 10  # samples beyond it cannot be meant as [-1, 1]; decoders of lossy formats overshoot 1 a little
MAX_FILTER_SIZE = 2**26  # weights of the filter that changes the sampling rate: 256 MiB
MAX_CHANNELS = 64


class Audio(xblip.Modality):
    """Sound. Each clip as long as the encoder's window (10.24 s for published ASTs) is a segment."""

    name = "audio"
    suffixes = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aiff", ".wma")
    mime_types = ("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg", "audio/mp4", "audio/aac", "audio/webm")
    bridge = {"max_segments": 32}

    @dataclass
    class Config:
        """Settings; sampling rate, features and the clips' length come from the encoder's folder.

        Attributes:
          encoder: folder or hub id of an AST, BEATs, CLAP, HuBERT, wav2vec 2.0 or Whisper with its feature extractor,
            or of a convolutional network over pictures of one channel with an ASTFeatureExtractor beside it.
          max_clips: clips at most; of longer sound so many are taken, spread evenly over all of it.
          max_seconds: longer sound is refused.
          augment: what `augmented` hides of each clip.
        """

        encoder: str
        max_clips: int = 8
        max_seconds: float = 3600.0
        augment: Masks = field(default_factory=Masks)

    def load(self, source: Any) -> dict[str, Tensor]:
        """Reads one sound.

        Args:
          source: a file (path, bytes, open file), or a tuple (samples, sample_rate_hz) of an array or tensor
            of shape (samples,) or (channels, samples), float in [-1, 1] or int16. Channels are averaged.

        Returns:
          What the encoder reads of S clips: for an AST "input_values" (S, max_length, mel bins), float32 log-mel
          spectrograms, normalised and padded, and "num_frames" (S,), how many of their frames are real.

        Raises:
          MediaError: the source is damaged, empty, too long, holds NaN or infinity, or is not of these kinds.
          PluginError: torchaudio or the decoder cannot be imported.
          BundleError: the encoder's folder cannot be read.
          ConfigError: `max_clips` cannot be.
        """
        if self.config.max_clips < 1:
            raise xblip.ConfigError(f"max_clips of a sound must be at least 1, not {self.config.max_clips}.")
        with np.errstate(invalid="ignore"):  # what is not finite is refused below
            samples, rate_hz, label = self._read(source)
        if not len(samples):
            raise xblip.MediaError(f"Cannot read {label}: it holds no samples. Expected at least one.")
        broken = int((~np.isfinite(samples)).sum())
        if broken:
            raise xblip.MediaError(
                f"Cannot read {label}: {broken} of its {len(samples)} samples are NaN or infinite. Give finite ones."
            )
        loudest = np.abs(samples).max()
        if loudest > LOUDEST:
            raise xblip.MediaError(
                f"Cannot read {label}: its samples reach {loudest:g}. Expected floats in [-1, 1]: divide 16-bit values "
                "by 32768."
            )
        samples = samples.astype(np.float32)
        samples = resample(samples, rate_hz, self._family.sampling_rate_hz, label)
        return self._family.clips(samples, self.config.max_clips)

    def augmented(self, source: Any, draw: np.random.Generator) -> dict[str, Tensor]:
        """Reads one sound, and hides moments and bands of what the encoder hears, as SpecAugment does."""
        tensors = self.load(source)
        self.config.augment.hide(*self._family.sound(tensors), draw)
        return tensors

    def build_encoder(self) -> nn.Module:
        """Loads the encoder: what `load` gave, of M clips, to tokens (M, N, D_enc) and their mask."""
        import xblip_beats  # noqa: F401  makes it known to transformers

        loaded = xblip.TransformersEncoder.from_pretrained(self.config.encoder, input_name="input_values")
        return self._family.encoder(loaded.model, self.config.encoder)

    def draw(self, tensors: dict[str, Tensor], weights: np.ndarray) -> Any:
        """Lays heat over the spectrogram of each clip, or over its wave, with a timeline below."""
        from xblip_audio_drawing import draw

        return draw(self._family, tensors, weights)

    @classmethod
    def convert_encoder(cls, checkpoint: Any, folder: Path) -> bool:
        """Writes a published BEATs as a folder."""
        from xblip_beats_convert import convert_beats

        return convert_beats(checkpoint, folder)

    @classmethod
    def diagnose(cls) -> dict[str, Callable[[], str]]:
        """Needs torchaudio for features, and soundfile and PyAV's FFmpeg to decode."""

        def libsndfile() -> str:
            import soundfile

            return f"{soundfile.__libsndfile_version__} by {soundfile.__version__}"

        def ffmpeg() -> str:
            import av

            return f"{av.ffmpeg_version_info} by {av.__version__}"

        return {
            "torchaudio": lambda: import_torchaudio().__version__,
            "libsndfile, by soundfile": libsndfile,
            "FFmpeg, by PyAV": ffmpeg,
        }

    @classmethod
    def example(cls, folder: Path) -> xblip.Example:
        """Makes a tiny AST with its extractor, a short and a long sound, and broken ones."""
        import soundfile
        from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

        encoder, long, text = (folder / name for name in ("encoder", "long.wav", "text.wav"))
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        spectrogram = {"num_mel_bins": 32, "max_length": 64}
        ASTModel(ASTConfig(time_stride=8, frequency_stride=16, **sizes, **spectrogram)).save_pretrained(encoder)
        ASTFeatureExtractor(**spectrogram).save_pretrained(encoder)
        seconds = np.arange(32000) / 16000
        soundfile.write(long, 0.5 * np.sin(2 * np.pi * 440 * seconds), 16000)
        text.write_text("not a sound")
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4000).astype(np.float32)
        return xblip.Example(
            config={"encoder": str(encoder)},
            sources=[long, (noise, 8000)],
            broken=[text, long.read_bytes()[:-100], noise, (noise, 0), (noise[:0], 8000), (noise * np.nan, 8000), 7],
        )

    def _read(self, source: Any) -> tuple[np.ndarray, int, str]:
        file = xblip.media_file(source, kind=self.name)
        if file:
            return *read_file(file, max_seconds=self.config.max_seconds), file.label
        label = f"the {self.name} given as {type(source).__name__}"
        if not (isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], (np.ndarray, Tensor))):
            raise xblip.MediaError(
                f"Cannot read {label}: expected a file (path, bytes, open file), or a tuple (samples, "
                "sample_rate_hz) of an array or tensor and its sampling rate, e.g. (samples, 16000)."
            )
        samples, rate_hz = source
        if isinstance(rate_hz, bool) or not isinstance(rate_hz, (int, np.integer)) or rate_hz < 1:
            raise xblip.MediaError(
                f"Cannot read {label}: its sampling rate is {rate_hz!r}. Expected a whole number of hertz, e.g. 16000."
            )
        samples = mono(samples, label)
        refuse_long(len(samples) / rate_hz, label, self.config.max_seconds)
        return samples, int(rate_hz), label

    @cached_property
    def _family(self) -> Family:
        """What the encoder's folder holds, by its config and its feature extractor."""
        import_torchaudio()
        import xblip_beats  # noqa: F401  makes it known to transformers
        from transformers import AutoConfig, AutoFeatureExtractor

        source = self.config.encoder
        read = xblip.TransformersEncoder.read_beside
        config = read(
            AutoConfig,
            source,
            failure=f'Cannot load an encoder from "{source}"',
            expected="the folder of a transformers model, or a hub id that is reachable or already downloaded.",
        )
        extractor = read(
            AutoFeatureExtractor,
            source,
            failure=f'Cannot load the feature extractor of the audio encoder "{source}"',
            expected="preprocessor_config.json beside its weights: put it there by save_pretrained.",
        )
        known = (family for family in FAMILIES if config.model_type in family.model_types)
        family = next(known, SpectrogramPictures)
        if type(extractor).__name__ != family.extractor_name:
            raise xblip.BundleError(
                f'The feature extractor of the audio encoder "{source}" is a {type(extractor).__name__}. '
                f"Expected {family.extractor_name}, the one of {config.model_type} models: save it there."
            )
        return family(extractor, config)


def mono(samples: np.ndarray | Tensor, label: str) -> np.ndarray:
    """Averages the channels of samples (N,) or (channels, N) to (N,) floats.

    Raises:
      MediaError: another shape or dtype.
    """
    samples = xblip.Modality.as_array(samples, label)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 0 < samples.shape[0] <= MAX_CHANNELS):
        raise xblip.MediaError(
            f"Cannot read {label}: its samples have shape {samples.shape}. Expected (samples,), or (channels, samples) "
            f"of at most {MAX_CHANNELS} channels: transpose (samples, channels)."
        )
    if samples.dtype.kind == "i" and samples.dtype.itemsize == 2:  # of either byte order
        samples = samples / np.float32(2**15)
    if samples.dtype.kind != "f":
        raise xblip.MediaError(
            f"Cannot read {label}: its samples are {samples.dtype}. Expected floats in [-1, 1] or int16."
        )
    return np.atleast_2d(samples).mean(0)


def resample(samples: np.ndarray, rate_hz: int, wanted_hz: int, label: str) -> np.ndarray:
    """Brings samples (N,) to another sampling rate by torchaudio's windowed sinc filter.

    Raises:
      MediaError: the two rates have so little in common that the filter would not fit into memory.
    """
    if rate_hz == wanted_hz:
        return samples
    common = gcd(rate_hz, wanted_hz)
    if (rate_hz // common) * (wanted_hz // common) > MAX_FILTER_SIZE:
        raise xblip.MediaError(
            f"Cannot read {label}: its sampling rate of {rate_hz} Hz cannot be brought to {wanted_hz} Hz. Convert "
            "it to a common one, e.g. 44100 Hz."
        )
    functional = import_torchaudio().functional
    return functional.resample(torch.from_numpy(samples), rate_hz, wanted_hz).numpy()


def import_torchaudio():
    """Imports torchaudio, whose wheels load only beside the torch they were built for.

    Raises:
      PluginError: it cannot be imported.
    """
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError) as cause:
        built_for = (
            f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU, beside which no build for CUDA loads"
        )
        raise xblip.PluginError(
            "The modality audio needs torchaudio, which cannot be imported here "
            f"({(str(cause).strip().splitlines() or [type(cause).__name__])[0]}). Install the torchaudio that was "
            f"built for torch {torch.__version__} ({built_for}); other modalities work without it."
        ) from cause
    return torchaudio


@xblip.hookimpl
def register_modalities(register):
    """Offers the modality."""
    register(Audio)
