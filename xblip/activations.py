"""What a frozen LLM keeps of a forward pass for the backward pass, and two ways to keep less.

Weights without gradients ask for little: norms keep their input, attention its four tensors, and a gated feed-forward three
that are wider than all others, one of which is cheap to compute again; that is always done. Running whole layers again
costs a third of the LLM's time, and is asked for.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from xblip.errors import ConfigError


def keep_less(model: nn.Module) -> None:
    """Lets gated feed-forwards keep gate and up alone: all that do what `_forward` does, instruction by instruction."""
    known = _forward.__code__
    for module in model.modules():
        code = getattr(type(module).forward, "__code__", None)
        if code and (code.co_code, code.co_names) == (known.co_code, known.co_names):
            module.__class__ = _lean(type(module))


@functools.cache
def _lean(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass, so that all layers have one `forward`, which torch compiles once."""
    return type(kind.__name__, (kind,), {"forward": _lean_forward})


def _forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _lean_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_GatedProduct.apply(self.gate_proj(x), self.up_proj(x), self.act_fn))


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        (to_gate,) = torch.autograd.grad(activated, gate, upstream * up)
        return to_gate, upstream * activated.detach(), None


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a model of transformers; none if transformers does not know them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def checkpoint_layers(model: nn.Module) -> None:
    """Lets layers keep their inputs alone, and run again for the backward pass.

    transformers' own gradient checkpointing waits for training mode, in which a frozen LLM never is.

    Raises:
      ConfigError: the model has no layers that transformers knows how to run again.
    """
    layers = layers_of(model)
    if not layers:
        raise ConfigError(
            f"A {type(model).__name__} has no layers whose activations can be computed again: leave "
            "gradient_checkpointing out."
        )
    for layer in layers:
        layer.forward = _Checkpointed(layer.forward)


class _Checkpointed:
    """A layer's `forward` that keeps its inputs alone where there will be a backward pass."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward.forward if isinstance(forward, _Checkpointed) else forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
