"""Resamplers: learned queries that read features by cross-attention alone, without an ear for the instruction.

`perceiver` is Flamingo's, which reads all segments of an item at once; `resampler_2d` is Qwen-VL's, which knows where
on its grid a token lies. Parts are named as in the published code (OpenFlamingo's and Qwen-VL's), so that weights map.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xblip.bridge import Bridge, SegmentPositions, join_segments, split_attention
from xblip.config import at_least
from xblip.errors import ConfigError, InputError
from xblip.hookspecs import hookimpl
from xblip.modality import Features
from xblip.qformer import attention_weights


class PerceiverBridge(Bridge):
    """Flamingo's resampler, and a linear projector: Q soft tokens of an item, however many segments it has."""

    name = "perceiver"
    reads_instructions = False

    @dataclass
    class Config:
        """Settings of the perceiver; sizes default to Flamingo's.

        Attributes:
          num_latents: Q, the learned inputs and so the soft tokens per item.
          num_layers: each has one cross-attention and one feed-forward.
          head_width: of an attention head.
          ff_mult: width of the feed-forward, in widths of the features.
          max_segments: learned positions of segments (Flamingo's time embeddings); 0 for none.
        """

        num_latents: int = 64
        num_layers: int = 6
        num_attention_heads: int = 8
        head_width: int = 64
        ff_mult: int = 4
        max_segments: int = 0

    def __init__(self, config: Config, *, encoder_width: int, llm_width: int):
        super().__init__(config, encoder_width=encoder_width, llm_width=llm_width)
        at_least(config, num_latents=1, num_layers=1, num_attention_heads=1, head_width=1, ff_mult=1, max_segments=0)
        if config.max_segments:
            self.segment_positions = SegmentPositions(config.max_segments, encoder_width)
        self.latents = nn.Parameter(torch.randn(config.num_latents, encoder_width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _PerceiverAttention(encoder_width, config.num_attention_heads, config.head_width),
                    _feed_forward(encoder_width, config.ff_mult * encoder_width),
                ]
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(encoder_width)
        self.projector = nn.Linear(encoder_width, llm_width)

    def forward(self, features: Features, instructions: Sequence[str]) -> list[Tensor]:
        return list(self.projector(self.norm(self._read(features))))

    def attention(self, features: Features, instructions: Sequence[str]) -> list[Tensor]:
        """Sums to less than 1: latents attend to each other in the same softmax, and that share is not here."""
        layers: list[Tensor] = []
        self._read(features, layers)
        return split_attention(torch.stack(layers, 1), features)

    def _read(self, features: Features, weights: list[Tensor] | None = None) -> Tensor:
        """Returns the latents (B, Q, width); adds to `weights` what each layer's attend to, (B, heads, Q, K)."""
        values = features.values.to(self.latents.dtype)
        if self.config.max_segments:
            values = self.segment_positions(values, features.segments)
        values, mask = join_segments(values, features.mask, features.segments)
        latents = self.latents.expand(len(values), -1, -1)
        for attention, feed_forward in self.layers:
            if weights is not None:
                weights.append(attention.weights(values, mask, latents))
            latents = latents + attention(values, mask, latents)
            latents = latents + feed_forward(latents)
        return latents


class _PerceiverAttention(nn.Module):
    """Latents attend to the media and to each other, in one softmax."""

    def __init__(self, width: int, num_heads: int, head_width: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, num_heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * num_heads * head_width, bias=False)
        self.to_out = nn.Linear(num_heads * head_width, width, bias=False)

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, media: Tensor, mask: Tensor, latents: Tensor) -> Tensor:
        """Reads media (B, K, width), of which mask (B, K) says what is real, into latents (B, Q, width)."""
        queries, keys, values, mask = self._parts(media, mask, latents)
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.to_out(read.transpose(1, 2).flatten(2))

    def weights(self, media: Tensor, mask: Tensor, latents: Tensor) -> Tensor:
        """The attention (B, heads, Q, K) that `forward` pays to media."""
        queries, keys, _, mask = self._parts(media, mask, latents)
        return attention_weights(queries, keys, mask)[..., : media.shape[1]]

    def _parts(self, media: Tensor, mask: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, and what may be attended to."""
        latents = self.norm_latents(latents)
        keys, values = self.to_kv(torch.cat([self.norm_media(media), latents], 1)).chunk(2, -1)
        mask = F.pad(mask, (0, latents.shape[1]), value=True)[:, None, None, :]
        return self._heads(self.to_q(latents)), self._heads(keys), self._heads(values), mask


def _feed_forward(width: int, inner_width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, inner_width, bias=False),
        nn.GELU(),
        nn.Linear(inner_width, width, bias=False),
    )


class Resampler2DBridge(Bridge):
    """Qwen-VL's resampler: one cross-attention from learned queries to a square grid of tokens, Q of a segment."""

    name = "resampler_2d"
    reads_instructions = False

    @dataclass
    class Config:
        """Settings of the 2-D resampler; sizes default to Qwen-VL's.

        Attributes:
          num_query_tokens: Q, soft tokens per segment; a square number, since queries lie on a grid too.
          head_width: of an attention head; D_llm is a multiple of it.
          drop_cls: the first token is no part of the grid (the CLS token of a CLIP or ViT) and is left out.
        """

        num_query_tokens: int = 256
        head_width: int = 128
        drop_cls: bool = False

    def __init__(self, config: Config, *, encoder_width: int, llm_width: int):
        super().__init__(config, encoder_width=encoder_width, llm_width=llm_width)
        at_least(config, num_query_tokens=1, head_width=1)
        if math.isqrt(config.num_query_tokens) ** 2 != config.num_query_tokens:
            raise ConfigError(f"num_query_tokens must be a square number such as 256, not {config.num_query_tokens}.")
        if llm_width % config.head_width or llm_width % 4:
            raise ConfigError(
                f"The LLM's width ({llm_width}) must be a multiple of head_width ({config.head_width}) and of 4: "
                "choose another head_width, or another kind of bridge."
            )
        side = math.isqrt(config.num_query_tokens)
        self.register_buffer("positions", grid_positions(side, llm_width), persistent=False)
        self.query = nn.Parameter(torch.empty(config.num_query_tokens, llm_width))
        plain = encoder_width == llm_width
        self.kv_proj = nn.Identity() if plain else nn.Linear(encoder_width, llm_width, bias=False)
        self.attn = nn.MultiheadAttention(llm_width, llm_width // config.head_width, batch_first=True)
        self.ln_q = nn.LayerNorm(llm_width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(llm_width, eps=1e-6)
        self.ln_post = nn.LayerNorm(llm_width, eps=1e-6)
        self.projector = nn.Linear(llm_width, llm_width, bias=False)
        for weight in (self.query, *(self.kv_proj.parameters())):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.normal_(self.projector.weight, std=llm_width**-0.5)

    def forward(self, features: Features, instructions: Sequence[str]) -> list[Tensor]:
        read, _ = self._read(features, need_weights=False)
        soft = self.projector(self.ln_post(read))
        return [part.flatten(0, 1) for part in soft.split(features.segments)]

    def attention(self, features: Features, instructions: Sequence[str]) -> list[Tensor]:
        _, weights = self._read(features, need_weights=True)
        weights = F.pad(weights.float(), (int(self.config.drop_cls), 0))
        return split_attention(weights[:, None], features)

    def _read(self, features: Features, *, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Returns what the queries read, (M, Q, D_llm), and what they attend to, (M, heads, Q, N) without [CLS]."""
        first = int(self.config.drop_cls)
        values, mask = features.values[:, first:].to(self.query.dtype), features.mask[:, first:]
        side = math.isqrt(values.shape[1])
        if side == 0 or side**2 != values.shape[1]:
            raise InputError(
                f"The features have {values.shape[1]} tokens a segment, which are no square grid: set drop_cls if the "
                "first of them is a CLS token, or choose another kind of bridge."
            )
        values = self.ln_kv(self.kv_proj(values))
        queries = (self.ln_q(self.query) + self.positions).expand(len(values), -1, -1)
        keys = values + _resized(self.positions, side)
        return self.attn(
            queries, keys, values, key_padding_mask=~mask, need_weights=need_weights, average_attn_weights=False
        )


def grid_positions(side: int, width: int) -> Tensor:
    """Sinusoidal positions (side * side, width) of a grid, row by row: half the width says the column, half the row."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], -1).float()
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)


def _resized(positions: Tensor, side: int) -> Tensor:
    """Positions of the queries' grid for a grid of another side, interpolated as Qwen-VL does."""
    own = math.isqrt(len(positions))
    if side == own:
        return positions
    grid = positions.float().unflatten(0, (own, own)).permute(2, 0, 1)[None]
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


@hookimpl
def register_bridges(register: Callable[[type[Bridge]], None]) -> None:
    register(PerceiverBridge)
    register(Resampler2DBridge)
