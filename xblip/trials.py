"""What a language model bears, tried on a few tokens: batches laid out in a way that not every architecture has in mind.

Tried and not looked up by a model's name, for what counts is whether its outputs stay what they are for each row alone.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xblip.kv_cache import begun, begun_together, is_roomy
from xblip.packing import Packing

if TYPE_CHECKING:
    from xblip.llm import FrozenLLM


@torch.no_grad()
def packs(llm: "FrozenLLM") -> bool:
    """Whether samples that share a row are what they are alone."""
    if not _takes_positions(llm):
        return False
    packing = Packing([[0, 1], [2]], [3, 4, 5])
    embeds = llm.embed(range(15)).unflatten(0, (3, 5))
    mask = torch.tensor([[1] * length + [0] * (5 - length) for length in packing.lengths], device=llm.device)
    alone = llm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[mask.bool()]
    places = packing.find(*mask.cpu().nonzero(as_tuple=True))
    rows, positions = packing.pack(embeds)
    packed = llm.model(inputs_embeds=rows, position_ids=positions, use_cache=False).logits[places]
    return _are_close(llm, packed, alone)


@torch.no_grad()
def goes_on(llm: "FrozenLLM") -> bool:
    """Whether rows of different lengths that go on from one beginning are what they are alone."""
    if llm.is_encoder_decoder or not _takes_positions(llm):
        return False
    first = _beginning(llm)
    if not is_roomy(first):
        return False
    embeds = llm.embed(range(8))
    together = _read_rest(llm, begun(llm.model, _keys_values(first), rows=2))
    rows = [torch.cat([embeds[:3], embeds[7:]]), embeds[:6]]
    alone = torch.cat([llm.model(inputs_embeds=row[None], use_cache=False).logits[:, -1] for row in rows])
    return _are_close(llm, together, alone)


@torch.no_grad()
def shares_beginnings(llm: "FrozenLLM") -> bool:
    """Whether rows may go on from one beginning without a copy of it for each; for an LLM that `goes_on`."""
    if getattr(llm.model.config, "_attn_implementation", None) != "sdpa":
        return False
    past = _keys_values(_beginning(llm))
    cache, attention = begun_together(llm.model, past)
    try:
        with attention:
            shared = _read_rest(llm, cache)
    except RuntimeError:  # attention that goes unnoticed meets a mask for more keys than it is given
        return False
    return _are_close(llm, shared, _read_rest(llm, begun(llm.model, past, rows=2)))


def _beginning(llm: "FrozenLLM") -> Any:
    """A cache of three positions."""
    cache = begun(llm.model)
    llm.model(inputs_embeds=llm.embed(range(3))[None], past_key_values=cache, use_cache=True)
    return cache


def _keys_values(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _read_rest(llm: "FrozenLLM", cache: Any) -> Tensor:
    """Logits (2, vocabulary) after rows that go on from three positions: by one, with padding before it, and by three."""
    mask = torch.tensor([[1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]], device=llm.device)
    embeds = llm.embed(range(8))
    rest = torch.stack([torch.cat([embeds[3:5], embeds[7:]]), embeds[3:6]])
    positions = (mask.cumsum(1) - 1)[:, 3:]
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    return llm.model(inputs_embeds=rest, **given).logits[:, -1]


def _takes_positions(llm: "FrozenLLM") -> bool:
    return "position_ids" in inspect.signature(llm.model.forward).parameters


def _are_close(llm: "FrozenLLM", tried: Tensor, right: Tensor) -> bool:
    tried, right = tried.float(), right.float()
    return bool((tried - right).norm() < (1e-3 if llm.dtype is torch.float32 else 0.05) * right.norm())
