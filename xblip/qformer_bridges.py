"""Q-Former bridges whose Q-Former comes from another branch: kept as it is, or shared by several modalities.

What is taken is copied into the branch, so that its folder stays whole without the one it came from; that costs disk,
never memory, since branches of one model hold equal shared parts once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from xblip.bridge import TOKENIZER, WEIGHTS, Bridge, QFormerBridge, load_bridge
from xblip.config import at_least
from xblip.errors import BundleError, ConfigError
from xblip.hookspecs import hookimpl
from xblip.modality import Features

_TEXT = re.compile(r"^qformer\.(embeddings\.(word|position)_embeddings|encoder\.layer\.\d+\.(intermediate|output))\.")


def is_text_part(name: str) -> bool:
    """Whether a weight of a Q-Former bridge serves texts alone, so that one without instructions does not have it."""
    return bool(_TEXT.match(name))


class _TakenQFormerBridge(QFormerBridge):
    """Takes all but its own parts from the branch that `config.qformer` names, with that branch's tokenizer.

    Class attributes:
      own: parts that are never taken, and always train.
    """

    own: ClassVar[tuple[str, ...]]

    @dataclass
    class Config(QFormerBridge.Config):
        """`qformer`: folder of a branch."""

        qformer: str = ""

    def __init__(self, config: Config, *, encoder_width: int, llm_width: int):
        if config.qformer and not Path(config.qformer, WEIGHTS).is_file():
            raise BundleError(
                f'There is no branch in "{config.qformer}" to take a Q-Former from: it lacks {WEIGHTS}. Let '
                "bridge.qformer name a folder that training or conversion wrote."
            )
        if config.qformer and config.instruction_aware:
            config.tokenizer = str(Path(config.qformer, TOKENIZER))
        super().__init__(config, encoder_width=encoder_width, llm_width=llm_width)
        if config.qformer:
            load_bridge(self, config.qformer, without=self._is_not_taken)

    def _is_not_taken(self, name: str) -> bool:
        return name.split(".")[0] in self.own or (not self.config.instruction_aware and is_text_part(name))

    @property
    def is_frozen(self) -> bool:
        """Whether all but the own parts stay as they are."""
        return bool(self.config.qformer)

    def freeze(self) -> None:
        """Freezes what is to be frozen; call it at the end of a subclass' constructor."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not self.is_frozen or name.split(".")[0] in self.own)
        self.train(self.training)

    def train(self, mode: bool = True) -> "_TakenQFormerBridge":
        """Leaves what is frozen in eval mode whatever `mode` says."""
        super().train(mode)
        for name, part in self.named_children():
            if self.is_frozen and name not in self.own:
                part.eval()
        return self

    def save_assets(self, folder: Path) -> dict[str, Any]:
        return {**super().save_assets(folder), "qformer": ""}


class FrozenQFormerBridge(_TakenQFormerBridge):
    """Layer norm, queries and Q-Former that never train, and one linear layer that does (MiniGPT-4)."""

    name = "frozen_qformer"
    own = ("projector",)

    @dataclass
    class Config(_TakenQFormerBridge.Config):
        """Those of `qformer`, static unless told otherwise.

        Attributes:
          qformer: folder of the branch that everything but the projector comes from (a static Q-Former leaves its text part
            there); a saved branch has its own copy.
        """

        instruction_aware: bool = False

    def __init__(self, config: Config, *, encoder_width: int, llm_width: int):
        super().__init__(config, encoder_width=encoder_width, llm_width=llm_width)
        self.is_random = not config.qformer
        self.register_load_state_dict_post_hook(_is_no_more_random)
        self.freeze()

    @property
    def is_frozen(self) -> bool:
        return True

    def read_media(self, features: Features) -> Any:
        if self.training and self.is_random:
            raise ConfigError(
                "A frozen Q-Former with random weights would stay so: let bridge.qformer name the folder of the branch "
                "that it comes from."
            )
        return super().read_media(features)


def _is_no_more_random(bridge: FrozenQFormerBridge, keys: Any) -> None:
    bridge.is_random = False


class SharedQFormerBridge(_TakenQFormerBridge):
    """One Q-Former for several modalities, each with its own layer norm and linear layer before it (X-InstructBLIP).

    Branches are trained apart and saved whole. The first trains the Q-Former; others name its folder by `qformer` and
    leave the Q-Former as it is. A model whose branches have equal Q-Formers holds one, which trains for all of them.
    """

    name = "shared_qformer"
    own = ("layer_norm", "encoder_projection", "segment_positions", "projector")
    shared = ("query_tokens", "qformer")

    @dataclass
    class Config(_TakenQFormerBridge.Config):
        """Those of `qformer`.

        Attributes:
          qformer: folder of the branch whose Q-Former and queries this one reads with, without training them; "" trains
            them too.
          shared_width: of the features that the Q-Former reads, the same for all modalities.
        """

        shared_width: int = 512

    def __init__(self, config: Config, *, encoder_width: int, llm_width: int):
        at_least(config, shared_width=1)
        super().__init__(config, encoder_width=config.shared_width, llm_width=llm_width)
        self.encoder_width = encoder_width
        self.layer_norm = nn.LayerNorm(encoder_width, eps=1e-5) if config.features_layer_norm else nn.Identity()
        self.encoder_projection = nn.Linear(encoder_width, config.shared_width)
        self.freeze()

    def normed(self, values: Tensor) -> Tensor:
        return self.encoder_projection(super().normed(values))


@hookimpl
def register_bridges(register: Callable[[type[Bridge]], None]) -> None:
    register(FrozenQFormerBridge)
    register(SharedQFormerBridge)
