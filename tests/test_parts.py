"""A batch's likelihood in parts against the same at once, in value and gradient, for many architectures."""

import pytest
import torch
import torch.nn.functional as F
from test_likelihood import HEAD_IS_LAST, MODEL_DOES_MORE, build
from test_likelihood import make_batch as small_batch
from test_packing import LENGTHS, PACK, PAD
from test_packing import make_batch as packed_batch
from torch.overrides import TorchFunctionMode

from xblip import parts
from xblip.llm import FrozenLLM, PromptBatch
from xblip.packing import Packing

POSITIONS = 14
"""Of a part: of the batches here it makes three or four."""


def seen_by(llm: FrozenLLM) -> list[int]:
    """Notes how many positions each call of the model takes, but those that try it out."""
    seen: list[int] = []

    def note(model, args, given):
        if torch.is_grad_enabled():
            seen.append(given["inputs_embeds"][..., 0].numel())

    llm.model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def slope(value: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    return torch.autograd.grad(value * -3, batch.inputs_embeds)[0]


FAMILIES = HEAD_IS_LAST | MODEL_DOES_MORE | PACK | PAD


@pytest.mark.parametrize(
    ("family", "checkpointed"),
    [*((family, False) for family in FAMILIES), *((family, True) for family in ("Llama", "T5", "Gemma 2"))],
)
def test_parts_are_worth_what_the_whole_is(family, checkpointed, monkeypatch):
    monkeypatch.setattr(parts, "POSITIONS_ON_CPU", POSITIONS)
    llm = build(*FAMILIES[family])
    make = packed_batch if family in PACK or family in PAD else small_batch
    whole, divided = make(llm), make(llm)
    values, mask = llm.token_log_likelihoods(whole)
    if checkpointed:
        llm.checkpoint_layers()
    seen = seen_by(llm)
    total, count = llm.log_likelihood(divided)
    assert len(seen) >= 3 and max(seen) <= 2 * POSITIONS, seen
    assert count == mask.sum() and total.dtype == torch.float32
    assert (total - values.sum()).abs() <= 1e-5 * values.sum().abs()
    ours, theirs = slope(total, divided), slope(values.sum(), whole)
    assert (ours - theirs).abs().max() <= 1e-5 * max(theirs.abs().max(), 1)
    assert divided.inputs_embeds.grad is None


class _Noting(TorchFunctionMode):
    """Notes the lengths that attention runs over; entered before `EachAlone`, so that it sees what that makes of a call."""

    def __init__(self):
        super().__init__()
        self.lengths: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and torch.is_grad_enabled():
            self.lengths.add(args[0].shape[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family", PACK)
def test_attention_runs_over_samples_rather_than_rows(family, checkpointed):
    llm = build(*PACK[family])
    if checkpointed:
        llm.checkpoint_layers()
    with _Noting() as attention:
        llm.log_likelihood(packed_batch(llm))
    if family == "Gemma 2":  # by itself: torch's attention cannot cap
        assert not attention.lengths
    elif checkpointed:
        assert min(attention.lengths) > max(LENGTHS)
    else:
        assert attention.lengths == set(LENGTHS)


def test_a_part_keeps_nothing_but_a_gradient():
    llm = build(*PACK["Llama"])
    total, _ = llm.log_likelihood(packed_batch(llm))
    assert [tensor.numel() for tensor in total.grad_fn.saved_tensors] == [sum(LENGTHS) * llm.width]


def test_the_share_of_a_part_is_not_rounded_to_the_precision_of_the_llm():
    llm = build(*PACK["Llama"])
    llm.model.bfloat16()
    batch = packed_batch(llm)
    batch.inputs_embeds = batch.inputs_embeds.detach().bfloat16().requires_grad_()
    total, _ = llm.log_likelihood(batch)
    whole, third = (torch.autograd.grad(total * by, batch.inputs_embeds, retain_graph=True)[0] for by in (1, 1 / 3))
    rounded = (whole.float() / 3).bfloat16()
    assert whole.dtype == torch.bfloat16 and torch.equal(third, rounded)


def test_what_needs_no_gradient_runs_at_once(monkeypatch):
    llm = build(*PACK["Llama"])
    monkeypatch.setattr(parts, "POSITIONS_ON_CPU", POSITIONS)
    expected, _ = llm.token_log_likelihoods(packed_batch(llm))
    calls: list[int] = []
    llm.model.register_forward_pre_hook(lambda *call: calls.append(1))
    with torch.no_grad():
        assert torch.allclose(llm.log_likelihood(packed_batch(llm))[0], expected.sum())
    assert len(calls) == 1


def test_layers_that_processes_share_run_once(monkeypatch):
    llm = build(*PACK["Llama"])
    monkeypatch.setattr(parts, "POSITIONS_ON_CPU", POSITIONS)
    llm.runs_in_parts = False
    batch, seen = packed_batch(llm), seen_by(llm)
    llm.log_likelihood(batch)
    assert len(seen) == 1


class TestPositions:
    def test_half_precision_gradients_wait_for_the_scaled_loss(self):
        cpu, sizes = torch.device("cpu"), {"layers": 2, "width": 8}
        assert parts.positions_at_once(cpu, torch.bfloat16, **sizes) == parts.POSITIONS_ON_CPU
        assert parts.positions_at_once(cpu, torch.float16, **sizes) is None
        with torch.autocast("cpu", torch.float16):
            assert parts.positions_at_once(cpu, torch.float32, **sizes) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert parts.positions_at_once(cpu, torch.float32, **sizes) == parts.POSITIONS_ON_CPU

    def test_small_models_take_more_at_once_on_an_accelerator(self):
        cuda = torch.device("cuda")
        large = parts.positions_at_once(cuda, torch.bfloat16, layers=32, width=4096)
        small = parts.positions_at_once(cuda, torch.bfloat16, layers=30, width=576)
        assert large == 1024 and 4096 < small < 8192


@pytest.mark.parametrize("lengths", [[5] * 16, [90, 3, 3, 3], [7], [40, 39, 38, 1]])
def test_rows_for_samples_one_at_a_time_pad_little(lengths):
    rows = Packing.fill(lengths, 32)
    assert sorted(sample for row in rows.rows for sample in row) == list(range(len(lengths)))
    assert rows.num_tokens <= 1.1 * sum(lengths)


def test_gradients_of_gradients_are_refused_rather_than_wrong():
    llm = build(*PACK["Llama"])
    batch = packed_batch(llm)
    total, _ = llm.log_likelihood(batch)
    (first,) = torch.autograd.grad(total, batch.inputs_embeds, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()
