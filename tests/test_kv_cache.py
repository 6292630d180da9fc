"""Keys and values with room to grow: the same as transformers' own, without a copy for every token."""

import pytest
import torch
from transformers import DynamicCache

from xblip.kv_cache import SPARE, begun, is_roomy


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
