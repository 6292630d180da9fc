"""BEATs: the transformer over patches of a spectrogram that encodes sound, as a transformers model.

Layers and parameter names follow BEATs (arXiv 2212.09058) as published in microsoft/unilm, so that a published file's
tensors keep their names (`xblip_beats_convert` reads it). One thing differs: the mask of frames becomes the mask of
tokens patch by patch, where the published code cuts it into as many equal pieces as there are tokens, as though they lay
one behind the other in time, and so takes the upper bands of the last moment for padding.

Shape letters: M clips, L frames, F bands of a patch's height, T moments of a patch's length, N = T * F tokens, D width,
H heads.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_outputs import BaseModelOutput


class BeatsConfig(PreTrainedConfig):
    """Sizes of a `BeatsModel` and the preparation it expects; defaults are those of the published BEATs.

    Attributes:
      hidden_size: width of the tokens, D.
      num_hidden_layers: transformer blocks.
      num_attention_heads: heads of each block, H.
      intermediate_size: width inside the blocks' MLP.
      patch_size: frames and mel bins of a patch.
      patch_embedding_size: width of a patch's embedding before it is projected to `hidden_size`.
      num_mel_bins: of the spectrogram.
      max_length: frames of a clip, 5.12 seconds.
      num_conv_pos_embeddings: tokens that the convolution which tells them apart by place reaches over.
      num_conv_pos_embedding_groups: of that convolution.
      num_buckets: into which distances between two tokens are sorted, half of them for either direction.
      max_distance: from here on all distances share a bucket.
      layer_norm_eps: of all layer norms.
      initializer_range: standard deviation of fresh weights.
    """

    model_type = "beats"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    patch_size: int = 16
    patch_embedding_size: int = 512
    num_mel_bins: int = 128
    max_length: int = 512
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, unit in (
            ("hidden_size", "num_attention_heads"),
            ("hidden_size", "num_conv_pos_embedding_groups"),
            ("max_length", "patch_size"),
            ("num_mel_bins", "patch_size"),
        ):
            if getattr(self, name) % getattr(self, unit):
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of {unit} {getattr(self, unit)}.")


class BeatsFeatureExtractor(SequenceFeatureExtractor):
    """Makes the spectrograms that BEATs was trained on.

    Kaldi's log-mel filter banks of frames of 25 ms, one each 10 ms, of samples scaled to 16 bits, normalised by the mean
    and standard deviation of AudioSet. Padding is zero after that, as in X-InstructBLIP.
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        num_mel_bins: int = 128,
        max_length: int = 512,
        mean: float = 15.41663,
        std: float = 6.55582,
        **kwargs: Any,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.num_mel_bins = num_mel_bins
        self.max_length = max_length
        self.mean = mean
        self.std = std

    def __call__(self, raw_speech: list[np.ndarray], *, sampling_rate: int, return_tensors: str = "pt") -> BatchFeature:
        """Extracts features.

        Args:
          raw_speech: M clips of samples (n,) in [-1, 1], each of 25 ms at least.
          sampling_rate: of theirs, in hertz.

        Returns:
          "input_values" (M, max_length, mel bins) float32, longer clips cut; "attention_mask" (M, max_length), 1 for
          frames of sound.

        Raises:
          ValueError: another sampling rate.
        """
        from torchaudio.compliance import kaldi

        if sampling_rate != self.sampling_rate:
            raise ValueError(f"The sound is sampled at {sampling_rate} Hz; expected {self.sampling_rate} Hz.")
        values = torch.zeros(len(raw_speech), self.max_length, self.num_mel_bins)
        mask = torch.zeros(len(raw_speech), self.max_length, dtype=torch.long)
        for row, samples in enumerate(raw_speech):
            waveform = torch.from_numpy(np.asarray(samples, np.float32))[None] * 2**15
            bank = kaldi.fbank(waveform, num_mel_bins=self.num_mel_bins, sample_frequency=self.sampling_rate)
            bank = (bank[: self.max_length] - self.mean) / (2 * self.std)
            values[row, : len(bank)] = bank
            mask[row, : len(bank)] = 1
        return BatchFeature({"input_values": values, "attention_mask": mask}, tensor_type=return_tensors)


def relative_buckets(count: int, *, num_buckets: int, max_distance: int) -> Tensor:
    """Sorts the distances between `count` tokens into buckets: exactly where near, by their logarithm where far.

    Returns:
      (count, count), for each token that attends (a row) the bucket of each that it attends to (a column).
    """
    places = torch.arange(count)
    offsets = places[None] - places[:, None]
    half = num_buckets // 2
    exact = half // 2
    distances = offsets.abs()
    scale = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (scale * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distances < exact, distances, far) + half * (offsets > 0)


class Attention(nn.Module):
    """Self-attention; the first layer's holds what all layers add by the distance of two tokens."""

    def __init__(self, config: BeatsConfig, *, is_first: bool):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.grep_linear = nn.Linear(width // self.num_heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))
        if is_first:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, self.num_heads)

    def forward(self, tokens: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Takes tokens (M, N, D), `bias` (H, N, N) and `mask` (M, N), returns (M, N, D).

        What a token asks for gates how much the distances count for it.
        """
        query, key, value = (
            project(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        first, second = self.grep_linear(query).unflatten(3, (2, 4)).sum(4).sigmoid().chunk(2, 3)
        bias = (first * (second * self.grep_a - 1) + 2) * bias
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
        heads = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out_proj(heads.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One post-norm block; by DeepNorm the residual weighs more, the deeper the encoder."""

    def __init__(self, config: BeatsConfig, *, is_first: bool):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.alpha = (2 * config.num_hidden_layers) ** 0.25
        self.self_attn = Attention(config, is_first=is_first)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, tokens: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        tokens = self.self_attn_layer_norm(self.alpha * tokens + self.self_attn(tokens, bias, mask))
        return self.final_layer_norm(self.alpha * tokens + self.fc2(functional.gelu(self.fc1(tokens))))


class Encoder(nn.Module):
    """The blocks, and the convolution before them that tells tokens apart by their place."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        width, reach = config.hidden_size, config.num_conv_pos_embeddings
        conv = nn.Conv1d(width, width, reach, padding=reach // 2, groups=config.num_conv_pos_embedding_groups)
        self.pos_conv = nn.Sequential(parametrizations.weight_norm(conv, dim=2), nn.GELU())
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config, is_first=not place) for place in range(config.num_hidden_layers))

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Takes tokens (M, N, D) and `mask` (M, N), True for those that are attended to; returns (M, N, D)."""
        if mask is not None:
            tokens = tokens * mask[:, :, None]
        count = tokens.shape[1]
        tokens = self.layer_norm(tokens + self.pos_conv(tokens.transpose(1, 2))[:, :, :count].transpose(1, 2))
        buckets = relative_buckets(
            count, num_buckets=self.config.num_buckets, max_distance=self.config.max_distance
        ).to(tokens.device)
        bias = self.layers[0].self_attn.relative_attention_bias(buckets).permute(2, 0, 1)
        for layer in self.layers:
            tokens = layer(tokens, bias, mask)
        return tokens


class BeatsModel(PreTrainedModel):
    """Encodes spectrograms into one token per patch.

    A fresh encoder's folder is made by `save_pretrained` of this and of a `BeatsFeatureExtractor`.
    """

    config_class = BeatsConfig
    base_model_prefix = "beats"
    main_input_name = "input_values"
    _no_split_modules = ["Layer"]

    def __init__(self, config: BeatsConfig):
        super().__init__(config)
        self.patch_embedding = nn.Conv2d(
            1, config.patch_embedding_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.layer_norm = nn.LayerNorm(config.patch_embedding_size, eps=config.layer_norm_eps)
        self.post_extract_proj = nn.Linear(config.patch_embedding_size, config.hidden_size)
        self.encoder = Encoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not parametrize.is_parametrized(module):
            super()._init_weights(module)
        if isinstance(module, Attention):
            initialization.ones_(module.grep_a)

    def token_mask(self, attention_mask: Tensor) -> Tensor:
        """Which tokens are real, by which frames (M, L) are: (M, N), False where a patch's frames are all padding."""
        bands = self.config.num_mel_bins // self.config.patch_size
        moments = attention_mask.bool().unflatten(1, (-1, self.config.patch_size)).any(2)
        return moments.repeat_interleave(bands, 1)

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None, **_) -> BaseModelOutput:
        """Encodes a batch of spectrograms.

        Args:
          input_values: (M, L, mel bins); L is a multiple of `patch_size`.
          attention_mask: (M, L), true for real frames, of which each clip has one at least; None if all are.

        Returns:
          `last_hidden_state` (M, N, D), moment by moment, the bands of a moment from low to high.
        """
        patches = self.patch_embedding(input_values[:, None]).flatten(2).transpose(1, 2)
        tokens = self.post_extract_proj(self.layer_norm(patches))
        mask = None if attention_mask is None else self.token_mask(attention_mask)
        return BaseModelOutput(last_hidden_state=self.encoder(tokens, mask))


AutoConfig.register(BeatsConfig.model_type, BeatsConfig, exist_ok=True)
AutoModel.register(BeatsConfig, BeatsModel, exist_ok=True)
AutoFeatureExtractor.register(BeatsConfig, BeatsFeatureExtractor, exist_ok=True)
