"""The hooks: all that a plugin can offer.

Hooks only register; classes do the work and configs choose them by name. Each hook gets a `register` callback and
returns nothing. A plugin's entry point (group `xblip`) carries the name of the thing it registers, so that the core
finds a thing by name without importing any other plugin.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from xblip.bridge import Bridge
    from xblip.eval_task import EvalTask
    from xblip.modality import Modality

hookspec = pluggy.HookspecMarker("xblip")
hookimpl = pluggy.HookimplMarker("xblip")


@hookspec
def register_modalities(register: "Callable[[type[Modality]], None]") -> None:
    """Offer kinds of input: call `register(MyModality)` with a subclass of `xblip.Modality`."""


@hookspec
def register_bridges(register: "Callable[[type[Bridge]], None]") -> None:
    """Offer ways from features to a soft prompt: call `register(MyBridge)` with a subclass of `xblip.Bridge`."""


@hookspec
def register_models(register: Callable[..., None]) -> None:
    """Offer saved models: call `register(name, folder)` with a bundle's folder, and `examples=manifest` to try it on."""


@hookspec
def register_tasks(register: "Callable[[type[EvalTask]], None]") -> None:
    """Offer kinds of evaluation tasks: call `register(MyTask)` with a subclass of `xblip.evaluate.EvalTask`."""
