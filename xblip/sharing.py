"""Parts of bridges that the branches of one model hold once, such as the Q-Former that several modalities were trained with.

They are found by their weights, not by where they come from: a branch's folder stays whole without the others.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from xblip.bridge import Bridge


def share(bridges: Iterable[Bridge]) -> None:
    """Lets bridges of one kind hold their `shared` parts once in memory, where all of their weights are equal.

    Those of skeletons count as equal, since they have no values.
    """
    kept: list[Bridge] = []
    for bridge in bridges:
        same = next((other for other in kept if other.name == bridge.name and _share_weights(bridge, other)), None)
        if same is None:
            kept.append(bridge)
        else:
            for name in bridge.shared:
                setattr(bridge, name, getattr(same, name))


def _share_weights(left: Bridge, right: Bridge) -> bool:
    ours, theirs = (
        {name: weight for name, weight in bridge.named_parameters() if name.split(".")[0] in bridge.shared}
        for bridge in (left, right)
    )
    configs = [[getattr(getattr(bridge, name), "config", None) for name in bridge.shared] for bridge in (left, right)]
    alike = ours.keys() == theirs.keys() and configs[0] == configs[1]
    return alike and all(_are_equal(ours[name], theirs[name]) for name in ours)


def _are_equal(left: Tensor, right: Tensor) -> bool:
    facts = [(weight.dtype, weight.device, weight.requires_grad) for weight in (left, right)]
    return facts[0] == facts[1] and (left.is_meta or torch.equal(left, right))
