"""What is done to the layers of the frozen LLM: computed again, compiled, given faster kernels, spread over processes.

FSDP2 spreads the layers alone: embeddings and head are used outside of the model's forward too. Bridges are small and
stay whole on every process, where DDP averages their gradients; so this works on any device that torch communicates on.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xblip.activations import layers_of
from xblip.errors import ConfigError, suggest
from xblip.llm import FrozenLLM
from xblip.model import XBlip

WISHES = (
    "activation_checkpointing",
    "gradient_checkpointing",
    "liger_kernel_config",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_liger_kernel",
)
"""Training arguments that transformers' Trainer would apply to the whole model, and that are meant for the LLM."""


def apply_wishes(llm: FrozenLLM, wishes: Mapping[str, Any]) -> None:
    """Does to an LLM what `WISHES` among the training arguments ask for.

    Raises:
      ConfigError: the LLM has no layers that this could be done to, or a package is missing.
    """
    if wishes.get("use_liger_kernel"):
        from transformers.integrations.liger import apply_liger_kernel

        try:
            apply_liger_kernel(llm.model, wishes.get("liger_kernel_config"))
        except ImportError as cause:
            raise ConfigError(
                "training.use_liger_kernel needs the package liger-kernel and an accelerator: install it, or leave it out."
            ) from cause
    if wishes.get("activation_checkpointing") or wishes.get("gradient_checkpointing"):
        llm.checkpoint_layers()
    backend, mode = wishes.get("torch_compile_backend"), wishes.get("torch_compile_mode")
    if wishes.get("torch_compile") or backend or mode:
        known = torch._dynamo.list_backends(None)
        if backend and backend not in known:
            raise ConfigError(f'Unknown training.torch_compile_backend "{backend}".{suggest(backend, known)}')
        for layer in _layers(llm, "torch_compile"):
            layer.compile(backend=backend or "inductor", mode=mode, dynamic=True)


def _layers(llm: FrozenLLM, wish: str) -> list[nn.Module]:
    """Returns the layers that an LLM is made of; `wish` is the setting they are needed for.

    Raises:
      ConfigError: transformers does not know its layers.
    """
    layers = layers_of(llm.model)
    if not layers:
        raise ConfigError(
            f"{wish}: transformers does not know the layers of a {type(llm.model).__name__}. Leave it out."
        )
    return layers


def shard_llm(model: XBlip, device: torch.device) -> None:
    """Spreads the layers of a model's LLM over all processes, and puts everything else on `device`.

    Raises:
      ConfigError: there is one process, or transformers does not know the LLM's layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise ConfigError(
            "shard_llm spreads the LLM over several processes, and this run has one: start it by torchrun or accelerate "
            "launch, or leave shard_llm out."
        )
    llm = model.llm.model
    layers = _layers(model.llm, "shard_llm")
    spread = {weight for layer in layers for weight in layer.parameters()}
    whole = {weight for weight in llm.parameters() if weight not in spread}
    for weight in [*whole, *llm.buffers()]:
        weight.data = weight.data.to(device)
    for branch in model.branches.values():
        branch.to(device)
    model.llm.runs_in_parts = False  # all processes must run a layer equally often
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(llm, mesh=mesh, ignored_params=whole)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model has weights that are spread over processes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) for weight in model.parameters())
