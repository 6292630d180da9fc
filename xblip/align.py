"""The first stage of training (BLIP-2's): a Q-Former learns to read media as captions tell them, without an LLM.

Three losses share one reading of the media. The contrast (ITC) compares what query tokens have read with all texts of all
processes; matching (ITM) judges pairs, the wrong ones drawn from the nearest; writing (ITG) says the caption from what the
query tokens have kept. The gradients, averaged over processes as DDP does, are those of the whole batch in one process.

What is trained belongs to the branch, which `Retriever` saves: the bridge with its heads and temperature. What momentum
distillation keeps (`AlignModel.momentum`) belongs to training alone and is saved in its checkpoints, by `state_dict`; DDP
need not broadcast these buffers, since all processes compute the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xblip.branch import Branch, BranchConfig, without_half_precision
from xblip.contrast import (
    Embedded,
    Momentum,
    MomentumConfig,
    are_equal,
    cross_entropy,
    embedded,
    key_of_media,
    key_of_text,
    similarities,
)
from xblip.errors import ConfigError, InputError
from xblip.frozen import FrozenEncoder
from xblip.gather import exchange, gather, largest, world
from xblip.media_read import KeysValues, MediaRead, padded, row_table
from xblip.modality import Features
from xblip.retrieval import Retriever
from xblip.retrieval_bridge import RetrievalBridge
from xblip.sample import Sample

TEMPERATURES = (0.001, 0.5)
"""Where the temperature is kept, as in ALBEF."""


@dataclass
class AlignConfig:
    """What the first stage trains for.

    Attributes:
      itc: weight of the contrast.
      itm: weight of matching; 0 leaves it out, and its head as it is.
      itg: weight of writing captions; 0 leaves it out, and its head as it is.
      label_smoothing: of the contrast and of writing.
      keep_tokens: share of the encoder's tokens of each segment that are read while training, drawn anew at every step
        (FLIP); 1 reads all.
      momentum: momentum distillation; none if null.
    """

    itc: float = 1.0
    itm: float = 1.0
    itg: float = 1.0
    label_smoothing: float = 0.1
    keep_tokens: float = 1.0
    momentum: MomentumConfig | None = None


@dataclass
class _Batch:
    """One process's pairs on their way through the losses, and what is known of those of all processes.

    Attributes:
      features: of B media.
      media: these, read for cross-attention.
      text: B captions, tokenized.
      own: B pairs, embedded; L is that of the process with the longest media.
      everyone: all G pairs, whose embeddings are still to be gathered.
      equal: (B, G) whether a pair has the media or the text of another.
      ids: (G, T) tokens of all texts, -1 for padding.
      segments: of all media, G numbers.
      num_tokens: N of the widest features of all processes.
    """

    features: Features
    media: MediaRead
    text: dict[str, Tensor]
    own: Embedded
    everyone: Embedded
    equal: Tensor
    ids: Tensor
    segments: list[int]
    num_tokens: int


class AlignModel(nn.Module):
    """A retriever's branch with the losses of the first stage.

    Attributes:
      branch: with a `RetrievalBridge` that has its language head.
      momentum: what distillation keeps, or None.
    """

    def __init__(self, branch: Branch, config: AlignConfig | None = None):
        super().__init__()
        self.settings = config = config or AlignConfig()
        _check(config)
        if not isinstance(branch.bridge, RetrievalBridge) or not branch.bridge.config.language_head:
            raise ConfigError(
                "The stage align trains a retriever with a language head: set bridge.language_head to true."
            )
        branch.bridge.matching_head.requires_grad_(config.itm > 0)
        branch.bridge.language_head.requires_grad_(config.itg > 0)
        self.branch = branch
        self.momentum = Momentum(branch.bridge, config.momentum) if config.momentum else None

    @classmethod
    def build(cls, branch: BranchConfig, config: AlignConfig | None = None) -> "AlignModel":
        """Builds it with fresh weights; `branch` as for `Retriever.build`.

        Raises:
          PluginError, ConfigError, BundleError: the modality, a setting, or the encoder's files are wrong.
        """
        return cls(cls.build_branch(branch), config)

    @staticmethod
    def build_branch(branch: BranchConfig, *, encoder: FrozenEncoder | None = None) -> Branch:
        """Builds the branch that it trains, with fresh weights; `encoder` as for `Branch.build`."""
        branch = replace(branch, bridge={**branch.bridge, "language_head": True})
        return Retriever.build(branch, encoder=encoder).branch

    def forward(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Computes the losses of B samples, each of one medium, whose answer is its caption.

        Args:
          samples: equally many in every process.

        Returns:
          "loss", which is trained; its parts "itc", "itm", "itg", as far as they have a weight; and "temperature". The
          means of these over the processes are those of the whole batch.

        Raises:
          InputError, MediaError: a sample has other media or no caption, or its media cannot be read.
        """
        pairs = [self._pair(sample, number) for number, sample in enumerate(samples, 1)]
        items = [self.branch.read(source) for source, _ in pairs]
        features = self._thinned(self.branch.encode(items))
        with without_half_precision(features.values.device.type):
            return self._losses(features, items, [caption for _, caption in pairs])

    def _losses(self, features: Features, items: list, captions: list[str]) -> dict[str, Tensor]:
        bridge, config = self.branch.bridge, self.settings
        media = bridge.read_media(features)
        text = bridge.tokenize(captions)
        kept: KeysValues = []
        queries = bridge.embed_queries(bridge.read_queries(media, kept=kept))
        keys = [[key_of_media(item), key_of_text(caption)] for item, caption in zip(items, captions, strict=True)]
        own = embedded(queries, media.rows, bridge.embed_texts(text), torch.tensor(keys, device=queries.device))
        batch = self._gathered(features, media, text, own)
        if self.training:
            with torch.no_grad():
                bridge.temperature.clamp_(*TEMPERATURES)
        contrast, *nearest = self._contrast(batch)
        parts = {"itc": contrast}
        if config.itm:
            parts["itm"] = self._matching(batch, *nearest)
        if config.itg:
            parts["itg"] = self._writing(batch, kept)
        loss = sum(getattr(config, name) * part for name, part in parts.items())
        told = {name: part.detach() for name, part in parts.items()}
        return {"loss": loss, **told, "temperature": bridge.temperature.detach().clone()[0]}

    def draw_negatives(self, similarities: Tensor, equal: Tensor) -> Tensor:
        """Draws for each of B rows one that it is not to match, the nearer the more often.

        Args:
          similarities: (B, G), divided by the temperature.
          equal: (B, G), True for what is never drawn.

        Returns:
          (B,) numbers below G, on the CPU; -1 where all are equal.
        """
        equal = equal.cpu()
        possible = ~equal.all(1)
        drawn = torch.full((len(equal),), -1)
        if possible.any():
            # What is not finite shows in the loss; here it would end the run without one.
            near = similarities.detach().float().cpu().nan_to_num()
            shares = near.masked_fill(equal, -torch.inf)[possible].softmax(-1)
            drawn[possible] = torch.multinomial(shares, 1)[:, 0]
        return drawn

    def _pair(self, sample: Sample, number: int) -> tuple[object, str]:
        """The source of a sample's one medium, and its caption."""
        name, media = self.branch.modality.name, sample.all_media
        if [one.modality for one in media] != [name] or not (sample.answer or "").strip():
            found = ", ".join(one.modality for one in media) or "no input"
            origin = getattr(sample, "origin", "") or f"Sample {number} of the batch"
            raise InputError(
                f"{origin}: the stage align takes one input of the modality {name} and a caption as its answer, not {found} "
                f"and {sample.answer!r:.80}."
            )
        return media[0].source, sample.answer

    def _thinned(self, features: Features) -> Features:
        """Leaves out tokens of each segment at random while training."""
        share = self.settings.keep_tokens
        if not self.training or share == 1:
            return features
        mask = features.mask
        counts = (mask.sum(1) * share).round().clamp(min=1)
        drawn = torch.rand(mask.shape).to(mask.device).masked_fill(~mask, 2.0)
        order = drawn.argsort(1)[:, : int(counts.max())]
        values = features.values.gather(1, order[..., None].expand(-1, -1, features.values.shape[2]))
        return Features(values, torch.arange(order.shape[1], device=mask.device) < counts[:, None], features.segments)

    def _gathered(self, features: Features, media: MediaRead, text: dict[str, Tensor], own: Embedded) -> _Batch:
        """Tells all processes what each needs to know of the others' pairs, beside their embeddings."""
        device = own.keys.device
        length, width, num_tokens = largest(
            own.media.shape[1], text["input_ids"].shape[1], features.values.shape[1], device=device
        )
        own = own._replace(media=padded(own.media, length), real=padded(own.real, length, value=False))
        counts = torch.stack([own.real.sum(1), torch.tensor(features.segments, device=device)], 1)
        facts = gather(torch.cat([own.keys, counts], 1))
        real = torch.arange(length, device=device) < facts[:, 2, None]
        ids = text["input_ids"].masked_fill(text["attention_mask"] == 0, -1)
        return _Batch(
            features=features,
            media=media,
            text=text,
            own=own,
            everyone=Embedded(own.media, real, own.texts, facts[:, :2]),
            equal=are_equal(own.keys, facts[:, :2]),
            ids=gather(padded(ids, width, value=-1)),
            segments=facts[:, 3].tolist(),
            num_tokens=num_tokens,
        )

    def _contrast(self, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        """ITC, and similarities (B, G) of own media with all texts and of own texts with all media, for `_matching`."""
        own, everyone = batch.own, batch.everyone
        temperature, count = self.branch.bridge.temperature, len(everyone.keys)
        if self.momentum is None or not self.training:
            compared = [near / temperature for near in similarities(own, [own.gathered(everyone)])]
            smoothing = self.settings.label_smoothing
            true = _shares(batch.equal)
            targets = [(1 - smoothing) * true + smoothing / count] * 2
        else:
            alpha = self.momentum.follow(self.branch.bridge)
            follower = self.momentum.embed(batch.features, batch.text, own.keys)
            follower = follower._replace(media=padded(follower.media, own.media.shape[1]), real=own.real)
            queue, current = self.momentum.queue(), follower.gathered(everyone)
            compared = [near / temperature for near in similarities(own, [current, queue])]
            true = _shares(are_equal(own.keys, torch.cat([current.keys, queue.keys])))
            soft = [near / temperature.detach() for near in similarities(follower, [current, queue])]
            targets = [alpha * near.softmax(-1) + (1 - alpha) * true for near in soft]
            self.momentum.remember(current)
        loss = sum(cross_entropy(near, wanted) for near, wanted in zip(compared, targets, strict=True)) / 2
        return loss, compared[0][:, :count], compared[1][:, :count]

    def _matching(self, batch: _Batch, of_media: Tensor, of_texts: Tensor) -> Tensor:
        """ITM: each pair with one wrong medium and one wrong text; a pair that all others equal counts by itself."""
        bridge = self.branch.bridge
        wrong_media = self.draw_negatives(of_texts, batch.equal).tolist()
        wrong_texts = self.draw_negatives(of_media, batch.equal).tolist()
        size, start = len(wrong_media), world()[0] * len(wrong_media)
        far = sorted({item for item in wrong_media if item >= 0 and not start <= item < start + size})
        media = batch.media
        fetched = self._fetch(batch, far)
        if fetched:
            media = MediaRead.join([media, bridge.read_media(fetched)])
        place = {start + item: item for item in range(size)} | {item: size + order for order, item in enumerate(far)}
        pairs: list[tuple[int, int, int, float]] = []  # medium, text, whether they match, weight
        for item, (medium, text) in enumerate(zip(wrong_media, wrong_texts, strict=True)):
            found = [(item, start + item, 1)]
            found += [(place[medium], start + item, 0)] if medium >= 0 else []
            found += [(item, text, 0)] if text >= 0 else []
            pairs += [(*pair, 1 / len(found) / size) for pair in found]
        mediums, texts, labels, weights = zip(*pairs, strict=True)
        ids = batch.ids[list(texts)]
        logits = bridge.judge(
            media.chosen(mediums), {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}
        )
        losses = F.cross_entropy(logits.float(), torch.tensor(labels, device=logits.device), reduction="none")
        return (losses * torch.tensor(weights, device=logits.device)).sum()

    def _writing(self, batch: _Batch, kept: KeysValues) -> Tensor:
        """ITG: the captions, said on what the query tokens kept when they read the media; the mean over all tokens."""
        bridge = self.branch.bridge
        logits, labels = bridge.write(kept, batch.media.rows, bridge.to_write(batch.text))
        total = gather(torch.tensor([len(labels)], device=labels.device)).sum().clamp(min=1)
        smoothing = self.settings.label_smoothing
        summed = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        return summed * world()[1] / total

    def _fetch(self, batch: _Batch, far: list[int]) -> Features | None:
        """Gets the features of media that are `far`, in other processes, and gives those processes what they ask for."""
        rank, count = world()
        if count == 1:
            return None
        features, device = batch.features, batch.features.values.device
        size = len(features.segments)
        asked = torch.full((size,), -1)
        asked[: len(far)] = torch.tensor(far, dtype=torch.long)
        asked = gather(asked.to(device)).view(count, size).tolist()
        wanted = [[item - rank * size for item in items if item // size == rank] for items in asked]
        index, real = row_table(features.segments, device)
        order = torch.tensor([item for items in wanted for item in items], dtype=torch.long, device=device)
        rows = index[order][real[order]]
        given = [sum(features.segments[item] for item in items) for items in wanted]
        taken = [sum(batch.segments[item] for item in far if item // size == other) for other in range(count)]
        values = exchange(padded(features.values, batch.num_tokens)[rows], given, taken)
        mask = exchange(padded(features.mask, batch.num_tokens, value=False)[rows], given, taken)
        return Features(values, mask, [batch.segments[item] for item in far]) if far else None


def _shares(equal: Tensor) -> Tensor:
    """Each row's targets, shared by all that it equals."""
    return equal / equal.sum(1, keepdim=True)


def _check(config: AlignConfig) -> None:
    weights = {name: getattr(config, name) for name in ("itc", "itm", "itg")}
    if min(weights.values()) < 0 or not any(weights.values()):
        told = ", ".join(f"{name} {value:g}" for name, value in weights.items())
        raise ConfigError(f"The weights of the losses must be at least 0, and one of them above it, not {told}.")
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(f"label_smoothing must be at least 0 and below 1, not {config.label_smoothing:g}.")
    if not 0 < config.keep_tokens <= 1:
        raise ConfigError(f"keep_tokens must be above 0 and at most 1, not {config.keep_tokens:g}.")
