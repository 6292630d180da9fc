"""Gated feed-forwards of a frozen LLM, which keep a third less for their backward pass.

`down(act(gate(x)) * up(x))`: autograd keeps gate, its activation, and up. The activation is cheap to compute again from the
gate, and these three are most of what a frozen layer keeps, as its weights need no gradients.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn


def keep_less(model: nn.Module) -> None:
    """Changes all feed-forwards of a model that compute what `_forward` does, instruction by instruction (Llama's do)."""
    known = _forward.__code__
    for module in model.modules():
        code = getattr(type(module).forward, "__code__", None)
        if code and (code.co_code, code.co_names) == (known.co_code, known.co_names):
            module.forward = functools.partial(_lean_forward, module)


def _forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _lean_forward(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_GatedProduct.apply(module.gate_proj(x), module.up_proj(x), module.act_fn))


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        (to_gate,) = torch.autograd.grad(activated, gate, upstream * up)
        return to_gate, upstream * activated.detach(), None
