"""Media-text retrieval: one modality and texts in one space, and whether a text describes a source (BLIP-2's first stage).

There is no LLM. A Q-Former with three heads of its own gives the contrast of media with texts (ITC), which read apart and
so can be kept, and their match (ITM), for which the query tokens read the media in the light of the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xblip
from xblip import config as configs
from xblip.branch import Branch, BranchConfig, made_folder, read_parts
from xblip.bridge import QFormerBridge
from xblip.bundle import copy_folder
from xblip.config import at_least
from xblip.errors import BundleError, ConfigError, InputError
from xblip.loading import snapshot
from xblip.modality import Features

FILE = "retriever.yaml"
ENCODER = "encoder"


class RetrievalBridge(QFormerBridge):
    """A Q-Former bridge that ends in heads for retrieval, where others make a soft prompt for an LLM.

    All segments of a source count alike: their query tokens are laid side by side.
    """

    @dataclass
    class Config(QFormerBridge.Config):
        """Those of `qformer`; of texts longer than `max_instruction_tokens` the beginning is read.

        Attributes:
          embedding_width: of the space that media and texts share; BLIP-2's.
        """

        embedding_width: int = 256

    def __init__(self, config: Config, *, encoder_width: int, llm_width: int = 0):
        at_least(config, embedding_width=1)
        if not config.instruction_aware:
            raise ConfigError("A retriever's Q-Former reads texts: leave out instruction_aware, or set it to true.")
        super().__init__(config, encoder_width=encoder_width, llm_width=llm_width)
        self.tokenizer.truncation_side = "right"

    def build_heads(self, config: Config, llm_width: int) -> None:
        self.media_projection = nn.Linear(config.hidden_size, config.embedding_width)
        self.text_projection = nn.Linear(config.hidden_size, config.embedding_width)
        self.matching_head = nn.Linear(config.hidden_size, 2)

    def embed_media(self, features: Features) -> list[Tensor]:
        """Gives B tensors (L, W), an embedding of length 1 for each query token of each segment."""
        media = self.read_media(features)
        embeddings = F.normalize(self.media_projection(self.read_queries(media)), dim=-1)
        return [part.flatten(0, 1) for part in embeddings.split(media[2])]

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Gives embeddings (T, W) of length 1, of what the first token of each text has read."""
        read = self.qformer.read_text(**self.tokenize(texts))
        return F.normalize(self.text_projection(read[:, 0]), dim=-1)

    def forward(self, features: Features, texts: Sequence[str]) -> Tensor:
        """Gives logits (B, 2) of B pairs, that the text does not and that it does describe: the mean over query tokens."""
        media = self.read_media(features)
        logits = self.matching_head(self.read_queries(media, texts))
        return torch.stack([part.mean((0, 1)) for part in logits.split(media[2])])


class Retriever(nn.Module):
    """Finds texts for media and media for texts.

    Attributes:
      branch: the modality with its frozen encoder and a `RetrievalBridge`.
    """

    def __init__(self, branch: Branch):
        super().__init__()
        self.branch = branch

    @classmethod
    def build(cls, config: BranchConfig) -> "Retriever":
        """Builds a retriever with fresh weights beside its encoder; `config.bridge` is a `RetrievalBridge.Config`'s.

        Raises:
          PluginError, ConfigError, BundleError: the modality, a setting, or the encoder's files are wrong.
        """
        kind = config.bridge.get("kind", RetrievalBridge.name)
        if kind != RetrievalBridge.name:
            raise ConfigError(
                f'A retriever reads by a Q-Former: bridge.kind must be "{RetrievalBridge.name}", not {kind!r}.'
            )
        config = replace(config, bridge={**config.bridge, "kind": kind})
        return cls(Branch.build(config, llm_width=0, bridge_class=RetrievalBridge))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Retriever":
        """Loads a folder that `save_pretrained` or `xblip convert` wrote, or a hub id.

        Raises:
          BundleError: there is no retriever, or it is damaged, or its encoder is another one.
        """
        if not Path(folder).exists():
            folder = snapshot(str(folder), "retriever", advice="Give a folder that save_pretrained wrote.")
        file = Path(folder, FILE)
        if not file.is_file():
            raise BundleError(
                f"There is no retriever in {file.parent.resolve()}: it lacks {FILE}. Give a folder that "
                "`xblip convert` or save_pretrained wrote."
            )
        return cls(Branch.load_parts(file, *read_parts(file), llm_width=0, bridge_class=RetrievalBridge)).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder with the encoder (named if it is on a hub), the Q-Former with its heads, and its tokenizer.

        Raises:
          BundleError: nothing can be written there.
        """
        folder = made_folder(folder)
        encoder = self.branch.encoder_folder
        if encoder is not None:
            copy_folder(encoder, folder / ENCODER)
        parts = self.branch.save_parts(folder, encoder=ENCODER)
        configs.save_yaml(folder / FILE, {**parts, "xblip": xblip.__version__})
        Path(folder, "README.md").write_text(_card(self.branch))

    @torch.no_grad()
    def similarity(self, sources: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Compares every source with every text (ITC).

        Args:
          sources: of B media, whatever the modality reads; or `Features`, from `branch.encode`.
          texts: T.

        Returns:
          Cosine similarities (B, T), of each text with that query token of the source which is nearest to it.

        Raises:
          InputError, MediaError: there are none, a text has no words, or a source cannot be read.
        """
        _check(texts)
        wanted = self.branch.bridge.embed_texts(texts)
        media = self.branch.bridge.embed_media(self.branch.encode(sources))
        return torch.stack([(part @ wanted.T).amax(0) for part in media])

    @torch.no_grad()
    def match(self, sources: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Judges pairs of one source and one text (ITM); slower than `similarity`, and more exact.

        Args:
          sources: of B media, as for `similarity`.
          texts: B.

        Returns:
          Probabilities (B,) that text i describes source i.

        Raises:
          InputError, MediaError: as `similarity`; or there are not as many texts as sources.
        """
        _check(texts)
        features = self.branch.encode(sources)
        if len(features.segments) != len(texts):
            raise InputError(
                f"{len(features.segments)} sources and {len(texts)} texts are no pairs: give one text for each source; "
                "`similarity` compares all with all."
            )
        return self.branch.bridge(features, texts).softmax(-1)[:, 1]


def _check(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise InputError(f"Expected a list of at least one text, not {texts!r:.80}.")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"A text is {text!r:.80}: expected words that may describe a source.")


def _card(branch: Branch) -> str:
    name = branch.modality.name
    total = sum(parameter.numel() for parameter in branch.bridge.parameters())
    return (
        f"---\nlibrary_name: xblip\ntags: [xblip, {name}, retrieval]\n---\n\n# xblip retriever: {name}\n\n"
        f"A Q-Former of {total:,} parameters with heads for retrieval, on a frozen encoder with fingerprint "
        f"`{branch.encoder.fingerprint}`. A training config starts a branch from it by `init.folder`.\n\n"
        "```python\nfrom xblip.retrieval import Retriever\n\n"
        'retriever = Retriever.from_pretrained("this folder")\n'
        'retriever.similarity(["a file", "another"], ["a text", "another"])\n```\n'
    )
