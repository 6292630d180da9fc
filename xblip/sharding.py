"""The frozen LLM's layers spread over processes (FSDP2), for an LLM that one device does not hold beside a batch.

Only the layers are spread: embeddings and head are used outside of the model's forward too. Bridges are small and stay
whole on every process, where DDP averages their gradients; so this works on any device that torch can communicate on.
"""

import torch
import torch.distributed as dist
from torch import nn

from xblip.errors import ConfigError
from xblip.model import XBlip


def shard_llm(model: XBlip, device: torch.device) -> None:
    """Spreads the layers of a model's LLM over all processes, and puts everything else on `device`.

    Raises:
      ConfigError: there is one process, or the LLM does not say what its layers are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise ConfigError(
            "shard_llm spreads the LLM over several processes, and this run has one: start it by torchrun or accelerate "
            "launch, or leave shard_llm out."
        )
    llm = model.llm.model
    names = set(llm._no_split_modules or ())
    layers = [part for part in llm.modules() if type(part).__name__ in names]
    if not layers:
        raise ConfigError(f"shard_llm: a {type(llm).__name__} does not say what its layers are. Leave shard_llm out.")
    spread = {weight for layer in layers for weight in layer.parameters()}
    whole = {weight for weight in llm.parameters() if weight not in spread}
    for weight in [*whole, *llm.buffers()]:
        weight.data = weight.data.to(device)
    for branch in model.branches.values():
        branch.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(llm, mesh=mesh, ignored_params=whole)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model has weights that are spread over processes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) for weight in model.parameters())
