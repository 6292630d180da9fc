"""Resamplers against other implementations of them: Idefics' perceiver, and Qwen-VL's resampler written out."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from xblip.errors import ConfigError, InputError
from xblip.modality import Features
from xblip.resamplers import PerceiverBridge, Resampler2DBridge, grid_positions

WIDTH, LLM_WIDTH = 8, 16


def features(*segments: int, tokens: int = 5) -> Features:
    values = torch.randn(sum(segments), tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    return Features(values, torch.ones(values.shape[:2], dtype=torch.bool), list(segments))


def loud(bridge: nn.Module) -> nn.Module:
    """Random weights everywhere, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    for weight in bridge.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator)
    return bridge.eval()


def perceiver(**settings) -> PerceiverBridge:
    settings = {"num_latents": 3, "num_layers": 2, "num_attention_heads": 2, "head_width": 6} | settings
    return loud(PerceiverBridge(PerceiverBridge.Config(**settings), encoder_width=WIDTH, llm_width=LLM_WIDTH))


def resampler(encoder_width: int = WIDTH, **settings) -> Resampler2DBridge:
    config = Resampler2DBridge.Config(**{"num_query_tokens": 9, "head_width": 4} | settings)
    return loud(Resampler2DBridge(config, encoder_width=encoder_width, llm_width=LLM_WIDTH))


class TestPerceiver:
    @torch.no_grad()
    def test_it_equals_transformers_perceiver(self):
        """Idefics' has ReLU for Flamingo's GELU and one weight each for keys and values, and is else the same."""
        ours = perceiver()
        config = IdeficsConfig(vision_config={"embed_dim": WIDTH}, use_resampler=True)
        theirs = IdeficsPerceiverResampler(config, embed_dim=WIDTH, depth=2, n_heads=2, head_dim=6, n_latents=3)
        weights = {"latents": ours.latents, "layer_norm.weight": ours.norm.weight, "layer_norm.bias": ours.norm.bias}
        names = {
            "0.context_layer_norm": "0.norm_media",
            "0.latents_layer_norm": "0.norm_latents",
            "0.q_proj": "0.to_q",
            "0.output_proj": "0.to_out",
            "1.ln": "1.0",
            "1.fc": "1.1",
            "1.c_proj": "1.3",
        }
        state = ours.state_dict()
        for layer in range(2):
            for their_name, name in names.items():
                for kind in ("weight", "bias"):
                    if f"layers.{layer}.{name}.{kind}" in state:
                        weights[f"blocks.{layer}.{their_name}.{kind}"] = state[f"layers.{layer}.{name}.{kind}"]
            keys, values = state[f"layers.{layer}.0.to_kv.weight"].chunk(2)
            weights |= {f"blocks.{layer}.0.k_proj.weight": keys, f"blocks.{layer}.0.v_proj.weight": values}
        theirs.load_state_dict(weights, strict=True)
        for block in theirs.blocks:
            block[1].act = nn.GELU()
        media = features(2)
        expected = ours.projector(theirs(media.values.flatten(0, 1)[None])[0])
        assert torch.allclose(ours(media, [""])[0], expected, atol=1e-5)

    @torch.no_grad()
    def test_an_item_gives_q_tokens_that_depend_on_all_its_segments(self):
        bridge, media = perceiver(), features(3, 1)
        softs = bridge(media, ["", ""])
        assert [tuple(soft.shape) for soft in softs] == [(3, LLM_WIDTH)] * 2
        for segment in range(3):
            changed = Features(media.values.clone(), media.mask, media.segments)
            changed.values[segment] *= torch.linspace(-3, 3, WIDTH)
            after = bridge(changed, ["", ""])
            assert (after[0] - softs[0]).abs().max() > 1e-3
            assert torch.allclose(after[1], softs[1], atol=1e-6)

    @pytest.mark.parametrize(("max_segments", "knows"), [(0, False), (3, True)])
    @torch.no_grad()
    def test_the_order_of_segments_is_knowable_only_with_positions(self, max_segments, knows):
        bridge, media = perceiver(max_segments=max_segments), features(3)
        turned = Features(media.values.flip(0), media.mask, [3])
        difference = (bridge(media, [""])[0] - bridge(turned, [""])[0]).abs().max()
        assert (difference > 1e-3) == knows

    def test_more_segments_than_positions_is_an_error_with_numbers(self):
        with pytest.raises(InputError, match=r"has 5 segments; this bridge has positions for 4 \(max_segments\)"):
            perceiver(max_segments=4)(features(1, 5), ["", ""])


def qwen(bridge: Resampler2DBridge, values: torch.Tensor) -> torch.Tensor:
    """Qwen-VL's Resampler, ln_post and proj, as published, on a grid of features (N, D_enc)."""

    def waves(width: int, positions: np.ndarray) -> np.ndarray:
        angles = np.einsum("m,d->md", positions.reshape(-1), 1 / 10000 ** (np.arange(width // 2) / (width / 2)))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    side, target = math.isqrt(len(bridge.query)), math.isqrt(len(values))
    grid = np.meshgrid(np.arange(side), np.arange(side))
    table = np.concatenate([waves(LLM_WIDTH // 2, grid[0]), waves(LLM_WIDTH // 2, grid[1])], axis=1)
    table = torch.from_numpy(table).float()
    keys_table = table
    if target != side:
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        keys_table = F.interpolate(square, size=(target, target), mode="bicubic", align_corners=False)
        keys_table = keys_table.permute(0, 2, 3, 1).flatten(0, 2)
    x = F.layer_norm(bridge.kv_proj(values), (LLM_WIDTH,), bridge.ln_kv.weight, bridge.ln_kv.bias, 1e-6)
    q = F.layer_norm(bridge.query, (LLM_WIDTH,), bridge.ln_q.weight, bridge.ln_q.bias, 1e-6) + table
    weights, biases = bridge.attn.in_proj_weight.chunk(3), bridge.attn.in_proj_bias.chunk(3)
    projected = [
        F.linear(part, weight, bias) for part, weight, bias in zip((q, x + keys_table, x), weights, biases, strict=True)
    ]
    q, k, v = (part.unflatten(-1, (-1, bridge.config.head_width)).transpose(0, 1) for part in projected)
    read = ((q @ k.transpose(1, 2)) / math.sqrt(bridge.config.head_width)).softmax(-1) @ v
    out = F.linear(read.transpose(0, 1).flatten(1), bridge.attn.out_proj.weight, bridge.attn.out_proj.bias)
    out = F.layer_norm(out, (LLM_WIDTH,), bridge.ln_post.weight, bridge.ln_post.bias, 1e-6)
    return out @ bridge.projector.weight.T


class TestResampler2D:
    @pytest.mark.parametrize("tokens", [9, 25, 4])
    @torch.no_grad()
    def test_it_equals_the_published_one(self, tokens):
        bridge, media = resampler(), features(2, 1, tokens=tokens)
        softs = bridge(media, ["", ""])
        assert [tuple(soft.shape) for soft in softs] == [(18, LLM_WIDTH), (9, LLM_WIDTH)]
        assert torch.allclose(torch.cat(softs), torch.cat([qwen(bridge, row) for row in media.values]), atol=1e-5)

    def test_features_as_wide_as_the_llm_need_no_projection(self):
        assert not any(name.startswith("kv_proj") for name in resampler(LLM_WIDTH).state_dict())

    def test_positions_are_computed_never_saved(self):
        assert {name.split(".")[0] for name in resampler().state_dict()} == {
            "query", "kv_proj", "attn", "ln_q", "ln_kv", "ln_post", "projector",
        }  # fmt: skip
        assert grid_positions(4, 12).unique(dim=0).shape == (16, 12)

    @torch.no_grad()
    def test_the_grid_matters(self):
        bridge, media = resampler(), features(1, tokens=9)
        turned = Features(media.values.flip(1), media.mask, [1])
        assert (bridge(media, [""])[0] - bridge(turned, [""])[0]).abs().max() > 1e-3

    @torch.no_grad()
    def test_the_cls_token_is_dropped(self):
        media = features(1, tokens=10)
        grid = Features(media.values[:, 1:], media.mask[:, 1:], [1])
        assert torch.equal(resampler(drop_cls=True)(media, [""])[0], resampler()(grid, [""])[0])

    @pytest.mark.parametrize(("settings", "tokens"), [({}, 10), ({"drop_cls": True}, 9), ({"drop_cls": True}, 1)])
    def test_tokens_that_are_no_grid_are_an_error(self, settings, tokens):
        left = tokens - len(settings)
        with pytest.raises(InputError, match=f"have {left} tokens a segment, which are no square grid: set drop_cls"):
            resampler(**settings)(features(1, tokens=tokens), [""])

    def test_queries_that_are_no_grid_are_refused(self):
        with pytest.raises(ConfigError, match="num_query_tokens must be a square number such as 256, not 10"):
            resampler(num_query_tokens=10)

    def test_a_head_width_that_does_not_divide_the_llm_s_is_refused(self):
        with pytest.raises(ConfigError, match=r"width \(16\) must be a multiple of head_width \(5\) and of 4"):
            resampler(head_width=5)

    def test_full_size_has_the_published_parameters(self):
        """Qwen-VL: queries 256 x 4096, kv 1664 -> 4096, four 4096 x 4096 with biases, two norms; then norm and proj."""
        with torch.device("meta"):
            bridge = Resampler2DBridge(Resampler2DBridge.Config(), encoder_width=1664, llm_width=4096)
        own = 256 * 4096 + 1664 * 4096 + 4 * 4096 * 4096 + 4 * 4096 + 2 * 2 * 4096
        assert sum(weight.numel() for weight in bridge.parameters()) == own + 2 * 4096 + 4096 * 4096
