"""Bridges that project every feature token alone: the field's baselines (LLaVA), which read no instruction."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xblip.bridge import Bridge
from xblip.config import at_least
from xblip.hookspecs import hookimpl
from xblip.modality import Features


class _TokenwiseBridge(Bridge):
    """Projects every real feature token alone; instructions are ignored."""

    reads_instructions = False

    def __init__(self, config: Any, *, encoder_width: int, llm_width: int):
        super().__init__(config, encoder_width=encoder_width, llm_width=llm_width)
        self.projector = self.build_projector()

    @abstractmethod
    def build_projector(self) -> nn.Module:
        """Builds the module from (..., D_enc) to (..., D_llm)."""

    def forward(self, features: Features, instructions: Sequence[str]) -> list[Tensor]:
        values = features.values.to(next(self.projector.parameters()).dtype)
        return [
            self.projector(part.values[part.mask])
            for part in Features(values, features.mask, features.segments).split()
        ]


class LinearBridge(_TokenwiseBridge):
    """One linear layer per feature token (LLaVA's first projector)."""

    name = "linear"

    def build_projector(self) -> nn.Module:
        return nn.Linear(self.encoder_width, self.llm_width)


class MLPBridge(_TokenwiseBridge):
    """Two linear layers with a GELU between them, per feature token (LLaVA-1.5)."""

    name = "mlp"

    @dataclass
    class Config:
        """`hidden_size`: width between the two layers; 0 means D_llm, as in LLaVA-1.5."""

        hidden_size: int = 0

    def build_projector(self) -> nn.Module:
        at_least(self.config, hidden_size=0)
        hidden = self.config.hidden_size or self.llm_width
        return nn.Sequential(nn.Linear(self.encoder_width, hidden), nn.GELU(), nn.Linear(hidden, self.llm_width))


@hookimpl
def register_bridges(register: Callable[[type[Bridge]], None]) -> None:
    register(LinearBridge)
    register(MLPBridge)
