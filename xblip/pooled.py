"""The pooled linear bridge: a segment's tokens become one vector, and two linear layers make its soft tokens of that.

It is the baseline that X-InstructBLIP compares its Q-Formers with, in both forms that were published: `hidden_size` 768
and 1. One vector says little of a picture; take `linear` or `mlp` for a strong baseline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from xblip.bridge import Bridge
from xblip.config import at_least
from xblip.errors import InputError
from xblip.hookspecs import hookimpl
from xblip.modality import Features


class PooledLinearBridge(Bridge):
    """Layer norm, pooling, linear layer to Q tokens, linear projector; instructions are ignored.

    Parts are named as in X-InstructBLIP: `layer_norm` (`{m}_ln`), `projection` (`{m}_projection`) and `projector`
    (`{m}_llm_proj`).
    """

    name = "pooled_linear"
    reads_instructions = False

    @dataclass
    class Config:
        """Settings of the pooled linear bridge.

        Attributes:
          num_query_tokens: Q, soft tokens per segment.
          hidden_size: width of a token between the layers (768: Q tokens of which each is projected alone); 1 gives Q
            numbers, projected together.
          flatten_tokens: lay so many tokens of a segment end to end in place of their mean (256 for BEATs with
            hidden_size 1); 0 takes the mean.
          features_layer_norm: a trainable layer norm on the features.
        """

        num_query_tokens: int = 32
        hidden_size: int = 768
        flatten_tokens: int = 0
        features_layer_norm: bool = True

    def __init__(self, config: Config, *, encoder_width: int, llm_width: int):
        super().__init__(config, encoder_width=encoder_width, llm_width=llm_width)
        at_least(config, num_query_tokens=1, hidden_size=1, flatten_tokens=0)
        queries, hidden = config.num_query_tokens, config.hidden_size
        self.layer_norm = nn.LayerNorm(encoder_width, eps=1e-5) if config.features_layer_norm else nn.Identity()
        self.projection = nn.Linear(encoder_width * max(config.flatten_tokens, 1), queries * hidden)
        self.projector = nn.Linear(queries, queries * llm_width) if hidden == 1 else nn.Linear(hidden, llm_width)

    def forward(self, features: Features, instructions: Sequence[str]) -> list[Tensor]:
        mask = features.mask[..., None]
        values = self.layer_norm(features.values.to(self.projection.weight.dtype)).masked_fill(~mask, 0)
        if self.config.flatten_tokens:
            if values.shape[1] != self.config.flatten_tokens:
                raise InputError(
                    f"The features have {values.shape[1]} tokens a segment; this bridge reads exactly "
                    f"{self.config.flatten_tokens} (flatten_tokens). Train one for this encoder."
                )
            pooled = values.flatten(1)
        else:
            pooled = values.sum(1) / mask.sum(1)
        hidden = self.projection(pooled)
        if self.config.hidden_size > 1:
            hidden = hidden.unflatten(-1, (self.config.num_query_tokens, -1))
        soft = self.projector(hidden).reshape(len(hidden), -1, self.llm_width)
        return [part.flatten(0, 1) for part in soft.split(features.segments)]


@hookimpl
def register_bridges(register: Callable[[type[Bridge]], None]) -> None:
    register(PooledLinearBridge)
