"""Packing: samples that share a row before the LLM are what they are alone, whatever the architecture."""

import random

import pytest
import torch
from test_likelihood import HEAD_IS_LAST, MODEL_DOES_MORE, WIDER, build, gradient

from xblip.llm import IGNORE, PromptBatch
from xblip.packing import Packing

LENGTHS = [5, 12, 4, 3, 11, 6, 2]
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PACK = {
    "Llama": HEAD_IS_LAST["Llama"],
    "Qwen3": HEAD_IS_LAST["Qwen3, tied"],
    "Gemma 2": MODEL_DOES_MORE["Gemma 2, capped"],
    "Gemma 3": HEAD_IS_LAST["Gemma 3"],
    "Mistral, by a window": ("MistralForCausalLM", {**WIDER, "sliding_window": 4}),
    "GPT-2, learned positions": ("GPT2LMHeadModel", GPT2),
}
PAD = {
    "OPT, which makes a mask of its own": HEAD_IS_LAST["OPT"],
    "Bloom, without positions": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Mamba, a state space": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}


def make_batch(llm, *, know_lengths: bool = True) -> PromptBatch:
    torch.manual_seed(1)
    embeds = torch.randn(len(LENGTHS), max(LENGTHS), llm.width).requires_grad_()
    mask = torch.tensor([[1] * length + [0] * (max(LENGTHS) - length) for length in LENGTHS])
    labels = torch.randint(3, 45, mask.shape).masked_fill(mask == 0, IGNORE)
    labels[:, 1::3] = IGNORE
    return PromptBatch(embeds, mask, labels, LENGTHS if know_lengths else None)


@pytest.mark.parametrize("family", [*PACK, *PAD])
def test_samples_in_one_row_are_what_they_are_padded(family):
    llm = build(*(PACK | PAD)[family])
    packed, padded = make_batch(llm), make_batch(llm, know_lengths=False)
    positions = []
    llm.model.register_forward_pre_hook(
        lambda model, args, given: positions.append(given.get("position_ids")), with_kwargs=True
    )
    values, mask = llm.token_log_likelihoods(packed)
    if family in PACK:
        assert positions[-1].numel() < packed.attention_mask.numel() * 0.7
    else:
        assert positions[-1] is None
    expected, expected_mask = llm.token_log_likelihoods(padded)
    assert positions[-1] is None and torch.equal(mask, expected_mask)
    assert (values - expected).abs().max() <= 1e-5
    ours, theirs = gradient(values, packed), gradient(expected, padded)
    assert (ours - theirs).abs().max() <= 1e-5 * max(theirs.abs().max(), 1)


def test_a_plan_holds_each_sample_once_and_pads_little():
    draw = random.Random(0)
    padded = planned = 0
    for _ in range(50):
        lengths = [33 + draw.randint(5, 60) + draw.randint(3, 40) for _ in range(16)]
        plan = Packing.plan(lengths, 4096)
        assert sorted(sample for row in plan.rows for sample in row) == list(range(16))
        assert max(lengths) <= plan.row_length <= 4 * max(lengths) and plan.is_worth_it
        padded, planned = padded + 16 * max(lengths) - sum(lengths), planned + plan.num_tokens - sum(lengths)
    assert planned < padded / 8


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5]])
def test_what_has_no_padding_is_left_as_it_is(llm, lengths):
    assert not Packing.plan(lengths, 64).is_worth_it


def test_places_are_found_again():
    packing = Packing([[2, 0], [1]], [2, 4, 3])
    embeds = torch.arange(3 * 4, dtype=torch.float32).reshape(3, 4, 1)
    rows, positions = packing.pack(embeds)
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    for sample, length in enumerate(packing.lengths):
        columns = torch.arange(length)
        found = packing.find(torch.full_like(columns, sample), columns)
        assert torch.equal(rows[found], embeds[sample, :length])
