"""Weights as part of a key: what was made with some is not to be taken for what others would make.

Looked at from outside, tensor by tensor, in a fraction of a millisecond; a checksum would read gigabytes for every question.
"""

import os
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class WeightVersions:
    """Tells the weights of modules from what they were when they were looked at before; for many threads."""

    def __init__(self):
        self._lock = Lock()
        self._known: WeakKeyDictionary[nn.Module, tuple[list[tuple], bytes]] = WeakKeyDictionary()

    def of(self, module: nn.Module) -> bytes:
        """Returns 16 bytes that no other module has, and this one only as long as its weights stay as they are.

        A step of training changes them, as do `load_state_dict`, another dtype and another device. What is written through
        `.data`, or in inference mode, does not show.
        """
        weights = [
            (weight.data_ptr(), None if weight.is_inference() else weight._version, weight.dtype, weight.device)
            for part in module.modules()
            for weight in (*part._parameters.values(), *part._buffers.values())
            if weight is not None
        ]
        with self._lock:
            known = self._known.get(module)
            if known is None or known[0] != weights:
                known = self._known[module] = weights, os.urandom(16)
        return known[1]

    def __reduce__(self) -> tuple:
        """A copy begins anew: it is of other modules."""
        return WeightVersions, ()


def _tell_of_fused_steps(optimizer: Optimizer, *_: Any) -> None:
    """Says of weights that they were written: PyTorch's fused kernels, which training takes by default, do not."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version(group["params"])


register_optimizer_step_post_hook(_tell_of_fused_steps)
