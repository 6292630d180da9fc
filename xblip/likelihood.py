"""Log-likelihoods at labelled positions, without logits anywhere else.

A frozen head's logits are needed only to say how likely the labels are, so they are made for a few positions at a time, and
what remains of each is its likelihood and, for the backward pass, one vector: the gradient to the hidden state. There
is never a tensor of all positions by the vocabulary, forward or backward.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 256
"""Positions whose logits are there at once: 33 MB in float32 for a vocabulary of 32,000."""


class LabelReader:
    """Reads likelihoods where an LLM's hidden states enter its head, of whatever architecture it is.

    Where a model does more to logits than its head does (Gemma 2 caps them, Cohere scales them), it does so itself, with
    the labelled positions alone.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._head_is_last: bool | None = None

    def read(self, run: Callable[[], Any], places: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """Runs the LLM for the likelihoods of labels.

        Args:
          run: calls the model; gives its output.
          places: rows and columns (n,) of the hidden states (B, T, D_llm) that predict.
          targets: the ids (n,) that they predict.

        Returns:
          (n,) float32.
        """
        if self._head_is_last is None:
            return self._try(run, places, targets)
        found: list[Tensor] = []

        def at_labels(head: nn.Module, hidden: Tensor) -> Tensor:
            if not self._head_is_last:
                return hidden[places][None]
            found.append(log_likelihoods(hidden[places], targets.to(hidden.device), head.forward))
            return hidden[:1, :1]

        logits = self._run(run, at_labels)
        return found[0] if found else _log_softmax_at(logits[0], targets.to(logits.device))

    def _try(self, run: Callable[[], Any], places: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """Finds out, by one hidden state with large logits, whether logits are what the head gives."""
        expected: list[Tensor] = []

        def probe(head: nn.Module, hidden: Tensor) -> Tensor:
            state = hidden[:1, :1].detach()
            state = state * (100 / head.forward(state).abs().max())
            expected.append(head.forward(state))
            return state

        with torch.no_grad():
            given = self._run(run, probe).to(expected[0])
        self._head_is_last = bool((given == expected[0]).all())
        return self.read(run, places, targets)

    def _run(self, run: Callable[[], Any], replace: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """Runs the LLM with other hidden states before its head; gives its logits."""
        thread = threading.get_ident()  # others may run the same model meanwhile

        def hook(head: nn.Module, args: tuple) -> tuple | None:
            return (replace(head, args[0]), *args[1:]) if threading.get_ident() == thread else None

        handle = self.model.get_output_embeddings().register_forward_pre_hook(hook)
        try:
            return run().logits
        finally:
            handle.remove()


def log_likelihoods(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the log-likelihoods (n,), float32, of `targets` (n,) by hidden states (n, D_llm), through a frozen head."""
    return _Chunked.apply(hidden, targets, head)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        values = [hidden.new_empty(0, dtype=torch.float32)]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(targets), ROWS):
            part = slice(start, start + ROWS)
            with torch.set_grad_enabled(needs_gradient):
                states = hidden[part].detach().requires_grad_(needs_gradient)
                logits = head(states)
            logs = logits.detach().float().log_softmax(-1)
            wanted = targets[part, None]
            values.append(logs.gather(1, wanted)[:, 0])
            if needs_gradient:
                ascent = logs.exp_().neg_().scatter_add_(1, wanted, torch.ones_like(wanted, dtype=logs.dtype))
                (gradient[part],) = torch.autograd.grad(logits, states, ascent.to(logits.dtype))
        if needs_gradient:
            ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None


def _log_softmax_at(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
