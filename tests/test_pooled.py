"""The pooled linear bridge: both published forms, their sizes, and what each makes of a segment."""

import pytest
import torch

from xblip.errors import InputError
from xblip.modality import Features
from xblip.pooled import PooledLinearBridge


def make(encoder_width: int = 8, llm_width: int = 12, **settings) -> PooledLinearBridge:
    torch.manual_seed(0)
    config = PooledLinearBridge.Config(**settings)
    return PooledLinearBridge(config, encoder_width=encoder_width, llm_width=llm_width)


def features(*segments: int, tokens: int = 4) -> Features:
    values = torch.randn(sum(segments), tokens, 8, generator=torch.Generator().manual_seed(0))
    return Features(values, torch.ones(values.shape[:2], dtype=torch.bool), list(segments))


@pytest.mark.parametrize(
    ("encoder_width", "settings", "parameters"),
    [
        (1408, {}, 37_777_408),
        (768, {}, 22_048_768),
        (512, {}, 15_757_312),
        (1408, {"hidden_size": 1}, 4_370_464),
        (512, {"hidden_size": 1}, 4_341_792),
        (768, {"hidden_size": 1, "flatten_tokens": 256}, 10_616_864),
    ],
)
def test_sizes_are_those_of_the_published_checkpoints(encoder_width, settings, parameters):
    """At an LLM of 7B; the layer norm before them is counted apart."""
    with torch.device("meta"):
        bridge = make(encoder_width, 4096, **settings)
    count = sum(weight.numel() for weight in bridge.parameters())
    assert count - sum(weight.numel() for weight in bridge.layer_norm.parameters()) == parameters
    assert {name.split(".")[0] for name in bridge.state_dict()} == {"layer_norm", "projection", "projector"}


@torch.no_grad()
def test_tokens_are_averaged_and_each_query_is_projected_alone():
    bridge, media = make(num_query_tokens=3, hidden_size=5), features(2, 1)
    media.mask[1, 2:] = False
    softs = bridge(media, ["", ""])
    assert [tuple(soft.shape) for soft in softs] == [(6, 12), (3, 12)]
    mean = bridge.layer_norm(media.values[1, :2]).mean(0)
    assert torch.allclose(softs[0][3:], bridge.projector(bridge.projection(mean).reshape(3, 5)), atol=1e-6)


@torch.no_grad()
def test_one_number_a_query_is_projected_together():
    bridge, media = make(num_query_tokens=3, hidden_size=1), features(1)
    mean = bridge.layer_norm(media.values[0]).mean(0)
    expected = bridge.projector(bridge.projection(mean)).reshape(3, 12)
    assert torch.allclose(bridge(media, [""])[0], expected, atol=1e-6)


@torch.no_grad()
def test_flattened_tokens_keep_their_places():
    bridge, media = make(num_query_tokens=3, hidden_size=1, flatten_tokens=4), features(2)
    media.mask[1, 3] = False
    flat = bridge.layer_norm(media.values[1])
    flat[3] = 0
    expected = bridge.projector(bridge.projection(flat.flatten())).reshape(3, 12)
    assert torch.allclose(bridge(media, [""])[0][3:], expected, atol=1e-6)


def test_another_number_of_tokens_than_it_flattens_is_an_error():
    with pytest.raises(InputError, match=r"have 4 tokens a segment; this bridge reads exactly 6 \(flatten_tokens\)"):
        make(flatten_tokens=6)(features(1), [""])


def test_the_layer_norm_may_be_left_out():
    assert not any(name.startswith("layer_norm") for name in make(features_layer_norm=False).state_dict())
