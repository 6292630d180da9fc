"""The encoders of sound: how each is given its clips, and which of its tokens hear real sound.

The encoder's folder decides: its config says which model it is, and the feature extractor beside it must be that
model's own, so that sampling rate, mel bins and normalisation cannot differ from what its weights were trained on. A
clip is as long as the encoder's window; a token is real if the stretch of time that it stands for holds real sound.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import xblip

FRAME_MS, SHIFT_MS = 25, 10  # Kaldi's defaults, which the extractors of AST and BEATs keep
WAVEFORM_SECONDS = 10  # wav2vec 2.0 and HuBERT have no window; most of their training was on less than 16 s


@dataclass(frozen=True)
class Frames:
    """How an encoder counts sound.

    Attributes:
      size: samples of a frame.
      shift: samples from the start of a frame to that of the next.
      most: frames of a whole clip.
      keeps_rest: whether samples behind the last whole frame are one more frame.
    """

    size: int
    shift: int
    most: int
    keeps_rest: bool = True

    def cut(self, samples: np.ndarray, max_clips: int) -> tuple[list[np.ndarray], Tensor]:
        """Cuts samples (N,) into clips that meet without sharing or missing a frame.

        Returns:
          At most `max_clips` clips, spread evenly over all of the sound, and how many frames each has (S,).
        """
        rest = max(0, len(samples) - self.size)
        total = 1 + (-(-rest // self.shift) if self.keeps_rest else rest // self.shift)
        count = -(-total // self.most)
        kept = min(count, max_clips)
        firsts = [(2 * place + 1) * count // (2 * kept) * self.most for place in range(kept)]
        length = self.samples(self.most)
        clips = [samples[first * self.shift : first * self.shift + length] for first in firsts]
        return clips, torch.tensor([min(self.most, total - first) for first in firsts])

    def samples(self, count: Any) -> Any:
        """How many samples that many frames cover."""
        return (count - 1) * self.shift + self.size

    def filled(self, clips: list[np.ndarray], counts: Tensor) -> list[np.ndarray]:
        """Pads clips with silence, each to the end of its last frame."""
        missing = [max(0, self.samples(int(count)) - len(clip)) for clip, count in zip(clips, counts, strict=True)]
        return [np.pad(clip, (0, silence)) for clip, silence in zip(clips, missing, strict=True)]


def heard(count: int, real: Tensor, whole: int) -> Tensor:
    """Which of `count` tokens, even over a clip of length `whole`, start before its sound ends at `real` (M,)."""
    return torch.arange(count, device=real.device) * whole < real[:, None] * count


class Family(ABC):
    """One kind of encoder; a subclass says what differs.

    Class attributes:
      model_types: of transformers' configs.
      extractor_name: the class of the feature extractor that belongs to it.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    extractor_name: ClassVar[str] = "ASTFeatureExtractor"
    frames: Frames

    def __init__(self, extractor: Any, config: Any):
        """Takes the feature extractor and the model's config."""
        self.extractor, self.config = extractor, config

    @property
    def sampling_rate_hz(self) -> int:
        """What sound must be brought to."""
        return self.extractor.sampling_rate

    @abstractmethod
    def clips(self, samples: np.ndarray, max_clips: int) -> dict[str, Tensor]:
        """Turns samples (N,) at the encoder's rate into the encoder's tensors."""

    @abstractmethod
    def sound(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns what the encoder hears of S clips, among these tensors, and how much of it is sound.

        Returns:
          A view (S, ..., frames, bins) into the tensors, and how many frames of each are sound (S,).
        """

    @abstractmethod
    def encoder(self, model: nn.Module, source: str) -> nn.Module:
        """Makes the encoder of a loaded model; `source` names it in messages.

        Raises:
          BundleError: the feature extractor beside it is not the one that belongs to it.
        """

    def _extract(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        return dict(self.extractor(clips, sampling_rate=self.sampling_rate_hz, return_tensors="pt"))

    def _share(self, tensors: dict[str, Tensor], count: int) -> Tensor:
        """How many of `count` frames of a window hold some of the samples that are sound."""
        return -(-tensors["num_samples"] * count // self.frames.most)

    def _check(self, takes: str, makes: str, source: str) -> None:
        if takes != makes:
            raise xblip.BundleError(
                f'The audio encoder "{source}" takes {takes}, but the feature extractor beside it makes {makes}. Save '
                "the extractor that belongs to it."
            )


class Spectrograms(Family):
    """AST: Kaldi's log-mel spectrograms of a fixed number of frames."""

    model_types = ("audio-spectrogram-transformer",)

    def __init__(self, extractor: Any, config: Any):
        super().__init__(extractor, config)
        size, shift = (extractor.sampling_rate * length_ms // 1000 for length_ms in (FRAME_MS, SHIFT_MS))
        self.frames = Frames(size, shift, extractor.max_length, keeps_rest=False)

    def clips(self, samples: np.ndarray, max_clips: int) -> dict[str, Tensor]:
        clips, counts = self.frames.cut(samples, max_clips)
        return {**self._extract(self.frames.filled(clips, counts)), "num_frames": counts}

    def sound(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tensors["input_values"], tensors["num_frames"]

    def encoder(self, model: nn.Module, source: str) -> nn.Module:
        self._check_sizes(model.config, source)
        return SpectrogramEncoder(model, input_name="input_values")

    def _check_sizes(self, config: Any, source: str) -> None:
        sizes = [f"{part.max_length} frames of {part.num_mel_bins} mel bins" for part in (config, self.extractor)]
        self._check(*sizes, source)


class SpectrogramPictures(Spectrograms):
    """Convolutional networks over AST's spectrograms; every model that no other family knows is tried as one."""

    model_types = ()

    def encoder(self, model: nn.Module, source: str) -> nn.Module:
        if getattr(model.config, "num_channels", None) != 1 or model.main_input_name != "pixel_values":
            known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
            raise xblip.BundleError(
                f'The audio encoder "{source}" is a {model.config.model_type} model. Expected {known}, or a '
                "convolutional network over pictures of one channel, such as a ResNet with num_channels=1."
            )
        return SpectrogramPictureEncoder(model)


class Beats(Spectrograms):
    """BEATs: spectrograms as AST's, of another loudness and normalisation, and a rest of less than 10 ms kept."""

    model_types = ("beats",)
    extractor_name = "BeatsFeatureExtractor"

    def __init__(self, extractor: Any, config: Any):
        super().__init__(extractor, config)
        self.frames = Frames(self.frames.size, self.frames.shift, extractor.max_length)

    def clips(self, samples: np.ndarray, max_clips: int) -> dict[str, Tensor]:
        return self._extract(self.frames.filled(*self.frames.cut(samples, max_clips)))

    def sound(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tensors["input_values"], tensors["attention_mask"].sum(1)

    def encoder(self, model: nn.Module, source: str) -> nn.Module:
        self._check_sizes(model.config, source)
        return BeatsEncoder(model, input_name="input_values")


class Clap(Family):
    """CLAP's audio part: windows of 10 seconds at 48 kHz; shorter sound is repeated, as it was in training."""

    model_types = ("clap", "clap_audio_model")
    extractor_name = "ClapFeatureExtractor"

    def __init__(self, extractor: Any, config: Any):
        super().__init__(extractor, config)
        self.frames = Frames(1, 1, extractor.nb_max_samples)

    def clips(self, samples: np.ndarray, max_clips: int) -> dict[str, Tensor]:
        """Gives each clip to the extractor alone: it marks one of several, by chance, as longer than the window."""
        clips, counts = self.frames.cut(samples, max_clips)
        parts = [self._extract([clip]) for clip in clips]
        repeated = {
            "repeat": torch.full_like(counts, self.frames.most),
            "repeatpad": self.frames.most // counts * counts,
        }
        return {
            "input_features": torch.cat([part["input_features"] for part in parts]).float(),
            "is_longer": torch.cat([part["is_longer"] for part in parts]),
            "num_samples": repeated.get(self.extractor.padding, counts),
        }

    def sound(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tensors["input_features"], self._share(tensors, tensors["input_features"].shape[-2])

    def encoder(self, model: nn.Module, source: str) -> nn.Module:
        model = getattr(model, "audio_model", model)
        config, extractor = model.config, self.extractor
        takes = f"{config.num_mel_bins} mel bins {'with' if config.enable_fusion else 'without'} fusion"
        makes = f"{extractor.feature_size} mel bins {'with' if extractor.truncation == 'fusion' else 'without'} fusion"
        self._check(takes, makes, source)
        return ClapEncoder(model, self.frames.most)


class Whisper(Family):
    """Whisper's encoder: log-mel spectrograms of windows of 30 seconds."""

    model_types = ("whisper",)
    extractor_name = "WhisperFeatureExtractor"

    def __init__(self, extractor: Any, config: Any):
        super().__init__(extractor, config)
        self.frames = Frames(1, 1, extractor.n_samples)

    def clips(self, samples: np.ndarray, max_clips: int) -> dict[str, Tensor]:
        clips, counts = self.frames.cut(samples, max_clips)
        return {**self._extract(clips), "num_samples": counts}

    def sound(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        values = tensors["input_features"].transpose(1, 2)
        return values, self._share(tensors, values.shape[1])

    def encoder(self, model: nn.Module, source: str) -> nn.Module:
        config, extractor = model.config, self.extractor
        takes = f"{2 * config.max_source_positions} frames of {config.num_mel_bins} mel bins"
        self._check(takes, f"{extractor.nb_max_frames} frames of {extractor.feature_size} mel bins", source)
        return WhisperEncoder(model.encoder, self.frames.most)


class Waveforms(Family):
    """wav2vec 2.0 and HuBERT, which hear the samples themselves; a frame is what one token hears of them."""

    model_types = ("hubert", "wav2vec2")
    extractor_name = "Wav2Vec2FeatureExtractor"

    def __init__(self, extractor: Any, config: Any):
        super().__init__(extractor, config)
        size = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            size = (size - 1) * stride + kernel
        shift = prod(config.conv_stride)
        self.frames = Frames(size, shift, WAVEFORM_SECONDS * extractor.sampling_rate // shift)

    def clips(self, samples: np.ndarray, max_clips: int) -> dict[str, Tensor]:
        """Normalises each clip before it is padded with zeros."""
        clips, counts = self.frames.cut(samples, max_clips)
        length = self.frames.samples(self.frames.most)
        values = [self._extract([clip])["input_values"][0] for clip in clips]
        padded = [nn.functional.pad(value, (0, length - len(value))) for value in values]
        return {"input_values": torch.stack(padded).float(), "num_frames": counts}

    def sound(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A frame is a sample here, with a single bin."""
        return tensors["input_values"][..., None], self.frames.samples(tensors["num_frames"])

    def encoder(self, model: nn.Module, source: str) -> nn.Module:
        return WaveformEncoder(model, self.frames)


FAMILIES = (Spectrograms, Beats, Clap, Whisper, Waveforms)


class SpectrogramEncoder(xblip.TransformersEncoder):
    """An AST, with a mask of the tokens that hear real frames.

    The AST itself attends to padding as well, as it did when it was trained; the mask is for what reads its
    tokens.
    """

    def forward(self, input_values: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes spectrograms.

        Args:
          input_values: (M, frames, mel bins).
          num_frames: (M,) how many frames of each are real.

        Returns: Tokens (M, 2 + F * T, D_enc): [CLS], the distillation token, then patches, frequency by
          frequency; and their mask (M, 2 + F * T), False for patches of padding alone.
        """
        config = self.model.config
        tokens = super().forward(input_values=input_values)
        starts = torch.arange(0, config.max_length - config.patch_size + 1, config.time_stride, device=tokens.device)
        bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        patches = (starts < num_frames[:, None]).repeat(1, bands)
        return tokens, torch.cat([patches.new_ones(len(patches), 2), patches], 1)


class SpectrogramPictureEncoder(xblip.TransformersEncoder):
    """A convolutional network that reads a spectrogram as a grey picture, time downwards.

    Small networks learn speech from far fewer recordings this way than an AST does.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model, input_name="pixel_values")

    def forward(self, input_values: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes spectrograms.

        Args:
          input_values: (M, frames, mel bins).
          num_frames: (M,) how many frames of each are real.

        Returns: Tokens (M, T * F, D_enc), moment by moment; and their mask (M, T * F), False where a moment begins
          after the last real frame.
        """
        hidden = self.model(pixel_values=input_values[:, None]).last_hidden_state
        if hidden.dim() != 4:
            raise xblip.BundleError(
                f"The audio encoder, a {self.model.config.model_type} model, gives no grid of features "
                f"({tuple(hidden.shape)}). Expected a convolutional network, such as a ResNet."
            )
        moments, bands = hidden.shape[2:]
        mask = heard(moments, num_frames, input_values.shape[1]).repeat_interleave(bands, 1)
        return hidden.flatten(2).transpose(1, 2), mask


class BeatsEncoder(xblip.TransformersEncoder):
    """A BEATs, which does not attend to padding."""

    def forward(self, input_values: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Takes spectrograms (M, frames, mel bins) and which frames are real, returns tokens and their mask."""
        tokens = self.model(input_values, attention_mask=attention_mask).last_hidden_state
        return tokens, self.model.token_mask(attention_mask)


class ClapEncoder(xblip.TransformersEncoder):
    """The audio part of a CLAP; it attends to padding, as it did when it was trained."""

    def __init__(self, model: nn.Module, window: int):
        super().__init__(model, input_name="input_features")
        self.width = model.audio_encoder.num_features
        self.window = window

    def forward(self, input_features: Tensor, is_longer: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes spectrograms.

        Args:
          input_features: (M, 1 or with fusion 4, frames, mel bins).
          is_longer: (M, 1), as CLAP's extractor says it of each clip alone.
          num_samples: (M,) how many samples of each window are sound.

        Returns: Tokens (M, F * T, D_enc), frequency by frequency, and their mask.
        """
        hidden = self.model(input_features=input_features, is_longer=is_longer).last_hidden_state
        bands, moments = hidden.shape[2:]
        return hidden.flatten(2).transpose(1, 2), heard(moments, num_samples, self.window).repeat(1, bands)


class WhisperEncoder(xblip.TransformersEncoder):
    """The encoder of a Whisper; it attends to padding, as it did when it was trained."""

    def __init__(self, model: nn.Module, window: int):
        super().__init__(model, input_name="input_features")
        self.window = window

    def forward(self, input_features: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Takes spectrograms (M, mel bins, frames) and how many samples are sound, returns tokens and their mask."""
        tokens = super().forward(input_features=input_features)
        return tokens, heard(tokens.shape[1], num_samples, self.window)


class WaveformEncoder(xblip.TransformersEncoder):
    """A wav2vec 2.0 or HuBERT.

    Those that normalise by group were trained without a mask: as transformers asks for, they get padding of zeros and
    no mask, and attend to padding.
    """

    def __init__(self, model: nn.Module, frames: Frames):
        super().__init__(model, input_name="input_values")
        self.frames = frames

    def forward(self, input_values: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Takes samples (M, N) and how many frames of them are real, returns tokens and their mask."""
        mask = None
        if self.model.config.feat_extract_norm == "layer":
            places = torch.arange(input_values.shape[1], device=input_values.device)
            mask = (places < self.frames.samples(num_frames)[:, None]).long()
        tokens = self.model(input_values, attention_mask=mask).last_hidden_state
        return tokens, heard(tokens.shape[1], num_frames, self.frames.most)
