"""Bridges: from frozen features to a soft prompt, the only part of a branch that trains.

The Q-Former bridge is the default. A bridge returns one tensor per item, unpadded, since items differ in their number of
segments and only the router knows the order they go in.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xblip.config import at_least
from xblip.errors import BundleError, ConfigError, InputError
from xblip.hookspecs import hookimpl
from xblip.loading import LOADING_ERRORS, load_weights, why_not_loaded
from xblip.media_read import KeysValues, MediaRead
from xblip.modality import Features
from xblip.qformer import QFormer, QFormerConfig

TOKENIZER = "tokenizer"
"""Folder of the instructions' tokenizer in a branch's folder."""
WEIGHTS = "bridge.safetensors"
"""The bridge's weights in a branch's folder."""


class Bridge(nn.Module, ABC):
    """Turns features into soft prompts. Subclass it, name it, register it by `register_bridges`.

    Class attributes:
      name: what configs call it.
      Config: dataclass of its settings.
      shared: parts that the branches of one model hold once where they are equal, see `xblip.sharing`.
    """

    name: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()

    @dataclass
    class Config:
        """No settings."""

    def __init__(self, config: Any, *, encoder_width: int, llm_width: int):
        """Builds the bridge with fresh weights; a subclass calls this first.

        Args:
          config: an instance of `Config`.
          encoder_width: D_enc of the features.
          llm_width: D_llm of the soft prompt.
        """
        super().__init__()
        self.config = config
        self.encoder_width = encoder_width
        self.llm_width = llm_width

    @abstractmethod
    def forward(self, features: Features, instructions: Sequence[str]) -> list[Tensor]:
        """Makes the soft prompts.

        Args:
          features: of B items.
          instructions: B strings, what each item is read for; a bridge may ignore them.

        Returns:
          B tensors (L, D_llm); L may differ from item to item.
        """

    @property
    def reads_instructions(self) -> bool:
        """Whether another instruction may give another soft prompt; False lets a prompt serve all questions."""
        return True

    def read_media(self, features: Features) -> Any:
        """Does the part of the work that no instruction changes, to be kept and reused; by default none.

        Returns:
          What `read_instructions` needs of the items, with a function `join` that makes one of several, as `Features` has.
        """
        return features

    def read_instructions(self, media: Any, instructions: Sequence[str]) -> list[Tensor]:
        """Finishes what `read_media` began.

        Args:
          media: of B items.
          instructions: B, or a multiple: the first B are for one item each, so are the next B, and so on.

        Returns:
          A soft prompt (L, D_llm) for every instruction.
        """
        turns = len(instructions) // len(media.segments)
        return self(Features.join([media] * turns), instructions)

    def attention(self, features: Features, instructions: Sequence[str]) -> list[Tensor] | None:
        """Tells what queries look at, for `xblip.explain`; a bridge without cross-attention has nothing to tell.

        Args:
          features, instructions: as for `forward`.

        Returns:
          B tensors (layers, heads, Q, S, N) on the CPU, shares of each query's attention that the encoder's tokens get: they
          sum to 1 over N where segments are read one by one, over S and N where they are read together; or None.
        """
        return None

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """Writes what the bridge needs beside its weights (a tokenizer) into the branch's folder.

        Returns:
          The settings that name what was written, relative to `folder`; most bridges have none.
        """
        return {}

    @classmethod
    def resolve(cls, config: Any, folder: Path) -> Any:
        """Returns `config` with paths that `save_assets` made relative to `folder` made absolute."""
        return config


class SegmentPositions(nn.Embedding):
    """Learned positions of segments, added to their features, so that their order is knowable."""

    def __init__(self, max_segments: int, width: int):
        super().__init__(max_segments, width)
        nn.init.normal_(self.weight, std=0.5)

    def forward(self, values: Tensor, segments: list[int]) -> Tensor:
        """Adds to each segment of values (M, N, width) its position among the segments of its item.

        Raises:
          InputError: an item has more segments than there are positions.
        """
        if max(segments) > self.num_embeddings:
            raise InputError(
                f"An input has {max(segments)} segments; this bridge has positions for {self.num_embeddings} "
                "(max_segments). Sample fewer, or train a bridge with more."
            )
        order = torch.cat([torch.arange(count, device=values.device) for count in segments])
        return values + super().forward(order)[:, None, :]


def join_segments(values: Tensor, mask: Tensor, segments: list[int]) -> tuple[Tensor, Tensor]:
    """Lays the tokens of all segments of an item into one row: (B, max(S) * N, D), padded, and its mask."""
    joined = [part.flatten(0, 1) for part in values.split(segments)]
    masks = [part.flatten() for part in mask.split(segments)]
    return nn.utils.rnn.pad_sequence(joined, batch_first=True), nn.utils.rnn.pad_sequence(masks, batch_first=True)


def split_attention(weights: Tensor, features: Features) -> list[Tensor]:
    """Makes what `Bridge.attention` returns of weights by row, (M or B, layers, heads, Q, tokens of a row, padded)."""
    if len(weights) == len(features.values):
        return [part.permute(1, 2, 3, 0, 4).cpu() for part in weights.split(features.segments)]
    counts = zip(weights, features.segments, strict=True)
    tokens = features.values.shape[1]
    return [row[..., : count * tokens].unflatten(-1, (count, tokens)).cpu() for row, count in counts]


class QFormerBridge(Bridge):
    """Layer norm, Q-Former, linear projector (InstructBLIP, X-InstructBLIP; static: BLIP-2).

    Each segment is read on its own in the light of its own item's instruction, giving S * Q soft tokens in the order of
    segments; `join_segments` reads all segments of an item in one pass, giving Q.
    """

    name = "qformer"

    @dataclass
    class Config:
        """Settings of the Q-Former bridge; sizes default to BLIP-2's (BERT-base).

        Attributes:
          instruction_aware: the Q-Former reads the instruction too; False is BLIP-2's static Q-Former.
          tokenizer: folder or hub id of the tokenizer of instructions; needed when instruction_aware.
          max_instruction_tokens: longer instructions lose their beginning, as in X-InstructBLIP.
          num_query_tokens: Q, soft tokens per segment.
          features_layer_norm: a trainable layer norm on the features; False when the encoder ends in its own.
          max_segments: learned positions of segments, so that their order is knowable; 0 for none.
          join_segments: one pass reads all segments of an item.
        """

        instruction_aware: bool = True
        tokenizer: str = "bert-base-uncased"
        max_instruction_tokens: int = 128
        num_query_tokens: int = 32
        features_layer_norm: bool = True
        max_segments: int = 0
        join_segments: bool = False
        hidden_size: int = 768
        num_hidden_layers: int = 12
        num_attention_heads: int = 12
        intermediate_size: int = 3072
        cross_attention_frequency: int = 2
        dropout: float = 0.1

    def __init__(self, config: Config, *, encoder_width: int, llm_width: int):
        super().__init__(config, encoder_width=encoder_width, llm_width=llm_width)
        at_least(
            config,
            max_instruction_tokens=1,
            num_query_tokens=1,
            max_segments=0,
            hidden_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=1,
            cross_attention_frequency=1,
        )
        if not 0 <= config.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, not {config.dropout:g}.")
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(
                f"A Q-Former's hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads "
                f"({config.num_attention_heads})."
            )
        positions = QFormerConfig.max_position_embeddings
        if config.max_instruction_tokens > positions:
            raise ConfigError(
                f"max_instruction_tokens ({config.max_instruction_tokens}) must be at most {positions}, the Q-Former's "
                "positions for text."
            )
        self.tokenizer = self.load_tokenizer(config.tokenizer) if config.instruction_aware else None
        self.layer_norm = nn.LayerNorm(encoder_width, eps=1e-5) if config.features_layer_norm else nn.Identity()
        if config.max_segments:
            self.segment_positions = SegmentPositions(config.max_segments, encoder_width)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.hidden_size).normal_(std=0.02))
        self.qformer = QFormer(
            QFormerConfig(
                encoder_width=encoder_width,
                vocab_size=len(self.tokenizer) if self.tokenizer else 0,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                cross_attention_frequency=config.cross_attention_frequency,
                dropout=config.dropout,
            )
        )
        self.build_heads(config, llm_width)

    def load_tokenizer(self, source: str):
        """Loads the tokenizer of the texts that the Q-Former reads."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source, truncation_side="left")
        except LOADING_ERRORS as cause:
            raise BundleError(
                f'Cannot load the Q-Former\'s tokenizer from "{source}": {why_not_loaded(source, cause)} '
                "Expected a folder with a tokenizer, or a hub id that is reachable or already downloaded."
            ) from cause
        tokenizer.padding_side = "right"
        return tokenizer

    def build_heads(self, config: Config, llm_width: int) -> None:
        """Builds what follows the Q-Former; it is built last."""
        self.projector = nn.Linear(config.hidden_size, llm_width)

    @property
    def reads_instructions(self) -> bool:
        return self.tokenizer is not None

    def normed(self, values: Tensor) -> Tensor:
        """Brings features (M, N, D_enc) to what the Q-Former reads."""
        return self.layer_norm(values.to(self.query_tokens.dtype))

    def read_media(self, features: Features) -> MediaRead:
        values = self.normed(features.values)
        if self.config.max_segments:
            values = self.segment_positions(values, features.segments)
        mask, rows = features.mask, features.segments
        if self.config.join_segments:
            values, mask = join_segments(values, mask, rows)
            rows = [1] * len(rows)
        return MediaRead(self.qformer.read_media(values), mask, rows)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Gives `input_ids` and `attention_mask` (B, T) of texts, cut to `max_instruction_tokens`."""
        encoded = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.config.max_instruction_tokens,
            return_tensors="pt",
        ).to(self.query_tokens.device)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def read_queries(
        self,
        media: MediaRead,
        text: Mapping[str, Tensor] | None = None,
        *,
        kept: KeysValues | None = None,
        attention: list[Tensor] | None = None,
    ) -> Tensor:
        """Lets the query tokens read media, (M, Q, D_q), in the light of B texts from `tokenize` where there are some.

        Or of a multiple of B, and then of as many times M rows. `kept` and `attention` are those of `QFormer.forward`.
        """
        keys_values, mask, rows = media
        texts = 0 if text is None else len(text["input_ids"])
        counts = torch.tensor(rows * max(texts // len(rows), 1), device=mask.device)
        size = sum(rows) * max(texts // len(rows), 1)
        text = {name: part.repeat_interleave(counts, 0, output_size=size) for name, part in (text or {}).items()}
        queries = self.qformer(self.query_tokens, keys_values, media_mask=mask, kept=kept, attention=attention, **text)
        return queries[:, : self.config.num_query_tokens]

    def read_instructions(self, media: MediaRead, instructions: Sequence[str]) -> list[Tensor]:
        turns = len(instructions) // len(media.rows)
        if self.tokenizer is None:
            soft = [part.flatten(0, 1) for part in self.projector(self.read_queries(media)).split(media.rows)]
            return soft * turns
        soft = self.projector(self.read_queries(media, self.tokenize(instructions)))
        return [part.flatten(0, 1) for part in soft.split(media.rows * turns)]

    def forward(self, features: Features, instructions: Sequence[str]) -> list[Tensor]:
        return self.read_instructions(self.read_media(features), instructions)

    def attention(self, features: Features, instructions: Sequence[str]) -> list[Tensor]:
        layers: list[Tensor] = []
        media = self.read_media(features)
        self.read_queries(media, None if self.tokenizer is None else self.tokenize(instructions), attention=layers)
        return split_attention(torch.stack(layers, 1), features)

    def save_assets(self, folder: Path) -> dict[str, Any]:
        if self.tokenizer is None:
            return {}
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        return {"tokenizer": TOKENIZER}

    @classmethod
    def resolve(cls, config: Config, folder: Path) -> Config:
        if config.instruction_aware and config.tokenizer == TOKENIZER:
            if not (folder / TOKENIZER).is_dir():
                raise BundleError(f"It lacks its folder {TOKENIZER}: copy it again, whole.")
            config.tokenizer = str(folder / TOKENIZER)
        return config


def load_bridge(
    bridge: Bridge, folder: str | Path, *, without: Callable[[str], bool] | None = None, what: str = "branch"
) -> None:
    """Loads a bridge's weights; every key must be there, and no other. A skeleton's are compared by name and shape.

    Args:
      bridge: to load into.
      folder: of a branch.
      without: tells by its name whether a weight stays as it is, whatever the folder holds; None loads all.
      what: what the folder holds, for messages; its file of settings is called so too.

    Raises:
      BundleError: the file is missing or damaged, or its keys or shapes are another bridge's.
    """
    from safetensors import SafetensorError

    path = Path(folder, WEIGHTS)
    if not path.is_file():
        raise BundleError(f"The {what} in {folder} lacks its weights, {WEIGHTS}.")
    try:
        loaded = load_weights(path)
        if not loaded and next(bridge.parameters()).is_meta:
            return  # an empty file stands in for weights that are not here
        if without:
            kept = {name: value for name, value in bridge.state_dict().items() if without(name)}
            loaded = kept | {name: value for name, value in loaded.items() if not without(name)}
        bridge.load_state_dict(loaded, strict=True)
    except SafetensorError as cause:
        raise BundleError(f"{path} is damaged: {cause}. Copy it again, or train the {what} again.") from cause
    except RuntimeError as cause:
        lines = [line.strip() for line in str(cause).splitlines()[1:4]]
        settings = "the settings of this bridge" if without else f"its {what}.yaml"
        raise BundleError(f"{path} does not fit {settings}: {' '.join(lines)}") from cause


@hookimpl
def register_bridges(register: Callable[[type[Bridge]], None]) -> None:
    """The bridges that come with xblip, through the same door as any plugin's."""
    register(QFormerBridge)
