"""Media-text retrieval: one modality and texts in one space, and whether a text describes a source (BLIP-2's first stage).

There is no LLM. A Q-Former with three heads of its own gives the contrast of media with texts (ITC), which read apart and
so can be kept, and their match (ITM), for which the query tokens read the media in the light of the text. Ranking does
both: all are compared, and the nearest are judged. What only training needs (`xblip.align`) is there where it is asked for.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import xblip
from xblip import config as configs
from xblip.branch import Branch, BranchConfig, made_folder, read_parts
from xblip.bundle import copy_folder
from xblip.errors import BundleError, ConfigError, InputError
from xblip.frozen import FrozenEncoder
from xblip.loading import snapshot
from xblip.modality import Features
from xblip.retrieval_bridge import RetrievalBridge

FILE = "retriever.yaml"
ENCODER = "encoder"
BATCH = 64
"""Sources, or pairs of a source and a text, that ranking reads at once."""


class Ranked(NamedTuple):
    """One place in a ranking.

    Attributes:
      index: of the text or source.
      score: what it is ranked by: similarity and match together.
      similarity: ITC, the cosine.
      match: ITM, the logit that the text describes the source; None where it was not judged.
    """

    index: int
    score: float
    similarity: float
    match: float | None


class Retriever(nn.Module):
    """Finds texts for media and media for texts.

    Attributes:
      branch: the modality with its frozen encoder and a `RetrievalBridge`.
    """

    def __init__(self, branch: Branch):
        super().__init__()
        self.branch = branch

    @classmethod
    def build(cls, config: BranchConfig, *, encoder: FrozenEncoder | None = None) -> "Retriever":
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
        return cls(Branch.build(config, llm_width=0, bridge_class=RetrievalBridge, encoder=encoder))

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
                "`xblip train` wrote in the stage align, or `xblip convert`, or save_pretrained."
            )
        return cls(Branch.load_parts(file, *read_parts(file), llm_width=0, bridge_class=RetrievalBridge)).eval()

    def save_pretrained(self, folder: str | Path, *, with_encoder: bool = True) -> None:
        """Writes a folder with the Q-Former, its heads and its tokenizer.

        Args:
          folder: made if missing.
          with_encoder: copy the encoder there too, unless it is on a hub; if not, it is named by its place.

        Raises:
          BundleError: nothing can be written there.
        """
        folder = made_folder(folder)
        encoder = self.branch.encoder_folder
        if with_encoder and encoder is not None:
            copy_folder(encoder, folder / ENCODER)
        parts = self.branch.save_parts(folder, encoder=ENCODER if with_encoder else None)
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

    @torch.no_grad()
    def rank_texts(
        self, sources: Sequence[Any], texts: Sequence[str], *, top_k: int = 10, rerank: int = 128
    ) -> list[list[Ranked]]:
        """Finds for each source the texts that describe it best: all by ITC, the nearest of these by ITM too (BLIP-2).

        Args:
          sources: of B media, as for `similarity`.
          texts: T, each once.
          top_k: how many places are returned.
          rerank: of how many, the nearest by similarity, the match is added to it; they stand before all others. 0 for
            none.

        Returns:
          For each source its texts, the best first.

        Raises:
          InputError, MediaError: as `similarity`; or one of both numbers is too small.
        """
        return Gallery(self, sources, texts).texts_for(None, top_k=top_k, rerank=rerank)

    @torch.no_grad()
    def rank_sources(
        self, sources: Sequence[Any], texts: Sequence[str], *, top_k: int = 10, rerank: int = 128
    ) -> list[list[Ranked]]:
        """Finds for each text the sources that it describes best; otherwise as `rank_texts`."""
        return Gallery(self, sources, texts).sources_for(None, top_k=top_k, rerank=rerank)


class Gallery:
    """Media and texts that are compared by ITC once, so that they can be ranked a part at a time.

    Attributes:
      texts: T.
      similarity: (B, T), as `Retriever.similarity` gives it.
    """

    @torch.no_grad()
    def __init__(self, retriever: Retriever, sources: Sequence[Any], texts: Sequence[str]):
        """Compares all with all.

        Args:
          retriever: that compares.
          sources: of B media, as for `Retriever.similarity`.
          texts: T, each once.

        Raises:
          InputError, MediaError: as `Retriever.similarity`.
        """
        _check(texts)
        self.branch, self.texts = retriever.branch, list(texts)
        bridge = self.branch.bridge
        self._features = [own for part in _parts(sources) or [sources] for own in self.branch.encode(part).split()]
        wanted = torch.cat([bridge.embed_texts(part) for part in _parts(self.texts)])
        media = [bridge.embed_media(Features.join(part)) for part in _parts(self._features)]
        self.similarity = torch.stack([(own @ wanted.T).amax(0) for part in media for own in part])

    def texts_for(self, sources: Sequence[int] | None, *, top_k: int = 10, rerank: int = 128) -> list[list[Ranked]]:
        """Ranks all texts for some sources, by their places, or for all of them (None); as `Retriever.rank_texts`."""
        return self._ranked(sources, top_k, rerank, of_texts=True)

    def sources_for(self, texts: Sequence[int] | None, *, top_k: int = 10, rerank: int = 128) -> list[list[Ranked]]:
        """Ranks all sources for some texts, by their places, or for all of them (None)."""
        return self._ranked(texts, top_k, rerank, of_texts=False)

    @torch.no_grad()
    def _ranked(self, asked: Sequence[int] | None, top_k: int, rerank: int, *, of_texts: bool) -> list[list[Ranked]]:
        if top_k < 1 or rerank < 0:
            raise InputError(f"top_k must be at least 1 and rerank at least 0, not {top_k} and {rerank}.")
        nearest = self.similarity if of_texts else self.similarity.T
        asked = range(len(nearest)) if asked is None else asked
        nearest = nearest[list(asked)]
        judged = nearest.topk(min(rerank, nearest.shape[1])).indices
        pairs = [(place, other) for place, others in zip(asked, judged.tolist(), strict=True) for other in others]
        match = self._matches(sorted(pairs if of_texts else [pair[::-1] for pair in pairs]))
        ranking = []
        for place, row in zip(asked, nearest.tolist(), strict=True):
            found = []
            for index, near in enumerate(row):
                matched = match.get((place, index) if of_texts else (index, place))
                found.append(Ranked(index, near + (matched or 0.0), near, matched))
            ranking.append(sorted(found, key=lambda entry: (entry.match is None, -entry.score))[:top_k])
        return ranking

    def _matches(self, pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """What ITM makes of pairs of a source and a text, those of one source side by side."""
        bridge, match = self.branch.bridge, {}
        for part in _parts(pairs):
            own = sorted({source for source, _ in part})
            media = bridge.read_media(Features.join([self._features[source] for source in own]))
            media = media.chosen([own.index(source) for source, _ in part])
            logits = bridge.judge(media, bridge.tokenize([self.texts[text] for _, text in part]))
            match.update(zip(part, logits[:, 1].tolist(), strict=True))
        return match


def _parts(things: Sequence[Any]) -> list[Sequence[Any]]:
    return [things[start : start + BATCH] for start in range(0, len(things), BATCH)]


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
