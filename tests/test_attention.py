"""What bridges say their queries look at is what they multiply values with, whatever the segments and masks."""

import pytest
import torch
import torch.nn.functional as F
from test_bridge import INSTRUCTIONS, WIDTH, features, make_kind
from torch import Tensor

from xblip.modality import Features

READ_APART = {"qformer", "frozen_qformer", "shared_qformer"}
NO_QUERIES = ("linear", "mlp", "pooled_linear")


@pytest.fixture
def paid(monkeypatch) -> list[Tensor]:
    """The weights that `scaled_dot_product_attention` multiplied values with, (M, heads, Q, K) of every call."""
    found: list[Tensor] = []
    read = F.scaled_dot_product_attention

    def watched(queries: Tensor, keys: Tensor, values: Tensor, **options) -> Tensor:
        ones = torch.eye(keys.shape[2]).expand(*keys.shape[:3], -1)
        found.append(read(queries, keys, ones, **options))
        return read(queries, keys, values, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return found


def masked(found: Features) -> Features:
    """Without the last two tokens of its second row."""
    found.mask[1, 3:] = False
    return found


@pytest.mark.parametrize("kind", sorted(READ_APART))
@pytest.mark.parametrize("segments", [(1, 3, 2), (1, 1)])
@torch.no_grad()
def test_a_qformer_says_what_it_looks_at_in_each_segment(kind, segments, llm_folder, paid):
    bridge = make_kind(kind, llm_folder)
    found = masked(features(*segments))
    told = bridge.attention(found, INSTRUCTIONS[: len(segments)])
    paid.clear()
    bridge(found, INSTRUCTIONS[: len(segments)])
    layers = torch.stack([weights for weights in paid if weights.shape[-1] == 5], 1)
    assert [part.shape for part in told] == [(1, 4, 4, count, 5) for count in segments]
    start = 0
    for part, count in zip(told, segments, strict=True):
        assert torch.allclose(part, layers[start : start + count].permute(1, 2, 3, 0, 4), atol=1e-5)
        start += count
    assert torch.allclose(told[0].sum(-1), torch.ones(()), atol=1e-5)
    second = told[0 if segments[0] > 1 else 1][..., 0, :]
    assert (second[..., 3:] == 0).all() and (second[..., :3] > 0).all()


@torch.no_grad()
def test_segments_read_together_share_each_query_s_attention(llm_folder, paid):
    bridge = make_kind("qformer", llm_folder, join_segments=True, max_segments=4)
    found = masked(features(1, 3))
    told = bridge.attention(found, INSTRUCTIONS[:2])
    paid.clear()
    bridge(found, INSTRUCTIONS[:2])
    [layer] = [weights for weights in paid if weights.shape[-1] == 15]
    assert [part.shape for part in told] == [(1, 4, 4, 1, 5), (1, 4, 4, 3, 5)]
    assert torch.allclose(told[0].flatten(-2)[0], layer[0][..., :5], atol=1e-5)
    assert torch.allclose(told[1].flatten(-2)[0], layer[1], atol=1e-5)
    assert torch.allclose(told[1].sum((-1, -2)), torch.ones(()), atol=1e-5) and (told[1][..., 0, 3:] == 0).all()


@torch.no_grad()
def test_an_instruction_changes_what_is_looked_at(llm_folder):
    bridge = make_kind("qformer", llm_folder, num_hidden_layers=3)
    both = Features.join([features(1), features(1)])
    one, other = bridge.attention(both, INSTRUCTIONS[:2])
    assert one.shape == (2, 4, 4, 1, 5) and (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_a_perceiver_says_what_its_latents_look_at_beside_each_other(llm_folder, paid):
    bridge = make_kind("perceiver", llm_folder)
    found = masked(features(1, 3))
    told = bridge.attention(found, INSTRUCTIONS[:2])
    paid.clear()
    bridge(found, INSTRUCTIONS[:2])
    layers = torch.stack(paid, 1)
    assert [part.shape for part in told] == [(2, 2, 3, 1, 5), (2, 2, 3, 3, 5)]
    assert torch.allclose(told[0].flatten(-2), layers[0][..., :5], atol=1e-5)
    assert torch.allclose(told[1].flatten(-2), layers[1][..., :15], atol=1e-5)
    assert (told[1].sum((-1, -2)) < 1).all() and (told[1][..., 0, 3:] == 0).all()


@pytest.mark.parametrize("drop_cls", [False, True])
@torch.no_grad()
def test_a_2d_resampler_says_what_it_looks_at_and_leaves_cls_alone(drop_cls, llm_folder):
    bridge = make_kind("resampler_2d", llm_folder, drop_cls=drop_cls)
    found = features(1, 2, tokens=9 + drop_cls)
    before = bridge(found, INSTRUCTIONS[:2])
    told = bridge.attention(found, INSTRUCTIONS[:2])
    assert [part.shape for part in told] == [(1, 3, 9, count, 9 + drop_cls) for count in (1, 2)]
    assert torch.allclose(told[1].sum(-1), torch.ones(()), atol=1e-5) and (told[1][..., 0] == 0).all() == drop_cls
    looked_at = told[0][0, :, :, 0].mean((0, 1)).argmax()
    changed = features(1, 2, tokens=9 + drop_cls)
    changed.values[0, looked_at] += torch.randn(WIDTH)
    assert (bridge(changed, INSTRUCTIONS[:2])[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", NO_QUERIES)
def test_a_bridge_without_queries_has_nothing_to_tell(kind, llm_folder):
    assert make_kind(kind, llm_folder).attention(features(2), INSTRUCTIONS[:1]) is None
