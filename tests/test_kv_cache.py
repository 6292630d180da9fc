"""Keys and values with room to grow: the same as transformers' own, without a copy for every token."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from xblip import trials
from xblip.kv_cache import SPARE, begun, begun_together, is_roomy
from xblip.llm import FrozenLLM


def states(length, rows=2):
    return torch.randn(rows, 3, length, 4), torch.randn(rows, 3, length, 4)


def assert_same(ours, theirs):
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(own.keys, other.keys) and torch.equal(own.values, other.values)
        assert own.get_seq_length() == other.get_seq_length()


@pytest.mark.parametrize("lengths", [[5, 1, 1, 1], [1] * (SPARE + 3), [3, 2 * SPARE, 1, 1], [7, 4 * SPARE, 40, 1]])
def test_it_holds_what_transformers_own_holds(llm, lengths):
    ours, theirs = begun(llm.model), DynamicCache(config=llm.model.config)
    for length in lengths:
        for layer in range(len(ours.layers)):
            parts = states(length)
            got = ours.update(*parts, layer)
            assert all(torch.equal(own, other) for own, other in zip(got, theirs.update(*parts, layer), strict=True))
    assert_same(ours, theirs)


def test_a_token_is_written_behind_the_others_without_a_copy(llm):
    cache = begun(llm.model)
    cache.update(*states(10), 0)
    place = cache.layers[0].keys.data_ptr()
    for _ in range(SPARE):
        cache.update(*states(1), 0)
        assert cache.layers[0].keys.data_ptr() == place
    cache.update(*states(1), 0)
    assert cache.layers[0].keys.data_ptr() != place, "room was used up, and made anew"


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop"])
def test_what_others_do_to_it_is_noticed(llm, change):
    given = {"batch_repeat_interleave": 3, "crop": -2}.get(change, torch.tensor([1, 0, 1]))
    ours, theirs = begun(llm.model), DynamicCache(config=llm.model.config)
    rows = 6 if change == "batch_repeat_interleave" else 2 if change == "crop" else 3
    parts, new = [states(5) for _ in ours.layers], [states(1, rows) for _ in ours.layers]
    for cache in (ours, theirs):
        for layer, part in enumerate(parts):
            cache.update(*part, layer)
        getattr(cache, change)(given)
        for layer, part in enumerate(new):
            cache.update(*part, layer)
    assert_same(ours, theirs)


def test_rows_begin_with_one_past(llm):
    past = [states(4, rows=1) for _ in begun(llm.model).layers]
    cache = begun(llm.model, past, rows=3)
    assert cache.layers[0].keys.shape == (3, 3, 4, 4) and is_roomy(cache)
    cache.update(*states(1, rows=3), 0)
    assert torch.equal(cache.layers[0].keys[1, :, :4], past[0][0][0])
    assert past[0][0].shape == (1, 3, 4, 4), "the past itself is not written into"


def read(model, cache, embeds, mask):
    positions = (mask.cumsum(1) - 1)[:, -embeds.shape[1] :]
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    return model(inputs_embeds=embeds, **given).logits[:, -1]


def make_llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **options)).eval()


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (1, 4, 2), (1, 1, 1)])
@torch.no_grad()
def test_a_shared_beginning_is_attended_to_as_its_copies_are(options, lengths):
    model, longest = make_llama(**options), max(lengths)
    first = begun(model)
    model(inputs_embeds=torch.randn(1, 5, 32), past_key_values=first, use_cache=True)
    past = [(layer.keys, layer.values) for layer in first.layers]
    cache, attention = begun_together(model, past)
    copied = begun(model, past, rows=3)
    mask = torch.tensor([[1] * 5 + [0] * (longest - length) + [1] * length for length in lengths])
    embeds = torch.randn(3, longest, 32)
    for _ in range(3):
        with attention:
            shared = read(model, cache, embeds, mask)
        assert torch.allclose(shared, read(model, copied, embeds, mask), atol=1e-5)
        mask, embeds = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1), torch.randn(3, 1, 32)
    assert cache.get_seq_length() == copied.get_seq_length() == 5 + longest + 2
    assert cache.layers[0].keys.shape[2] == longest + 2, "the beginning is not copied"
    assert all(torch.equal(*pair) for pair in zip(past[0], cache.layers[0].beginning, strict=True))


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2}])
@torch.no_grad()
def test_rows_that_share_a_beginning_are_read_without_padding(options):
    model = make_llama(**options)
    first = begun(model)
    model(inputs_embeds=torch.randn(1, 5, 32), past_key_values=first, use_cache=True)
    past = [(layer.keys, layer.values) for layer in first.layers]
    cache, attention = begun_together(model, past)
    places = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]]).bool()
    mask = torch.cat([torch.ones(4, 5, dtype=torch.long), places, torch.ones(4, 1)], 1).long()
    embeds, positions = torch.randn(4, 4, 32), mask.cumsum(1) - 1
    with attention, attention.packed(places):
        model(
            inputs_embeds=embeds[:, :-1][places][None],
            position_ids=positions[:, 5:-1][places][None],
            past_key_values=cache,
            use_cache=True,
        )
    with attention:
        packed = read(model, cache, embeds[:, -1:], mask)
    assert torch.allclose(packed, read(model, begun(model, past, rows=4), embeds, mask), atol=1e-5)


@pytest.mark.parametrize("attention, shares", [("sdpa", True), ("eager", False)])
def test_whether_beginnings_are_shared_is_tried(llm, attention, shares):
    own = FrozenLLM(make_llama(attn_implementation=attention), llm.tokenizer, config=llm.config)
    assert trials.goes_on(own) and trials.shares_beginnings(own) is shares


def test_a_model_that_calls_other_attention_does_not_share(llm, monkeypatch):
    own = FrozenLLM(make_llama(), llm.tokenizer, config=llm.config)
    monkeypatch.setattr("xblip.shared_attention.AttendToShared.begins", lambda *_: None)
    assert not trials.shares_beginnings(own)
