"""Contrast of media with texts (ITC): embeddings compared, what of a batch counts as equal, and momentum distillation.

A pair is no negative of another that has an equal text or equal media: captions repeat, and files have several.
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xblip.errors import ConfigError
from xblip.gather import gather, gather_with_gradient
from xblip.media_read import padded, row_table
from xblip.modality import Features
from xblip.retrieval_bridge import RetrievalBridge

SAMPLED = 4096
"""Values of a tensor that tell it from others, evenly spaced."""


class Embedded(NamedTuple):
    """Pairs of one medium and one text in one space, and what tells whether they are equal to others.

    Attributes:
      media: (B, L, W), L embeddings each, padded.
      real: (B, L) boolean, False for padding.
      texts: (B, W).
      keys: (B, 2) of media and texts.
    """

    media: Tensor
    real: Tensor
    texts: Tensor
    keys: Tensor

    def gathered(self, everyone: "Embedded") -> "Embedded":
        """Those of all processes, with gradient if there is one; masks and keys of `everyone` are known already."""
        flat = torch.cat([self.media.flatten(1), self.texts], dim=1)
        flat = gather_with_gradient(flat) if flat.requires_grad else gather(flat)
        width = self.texts.shape[1]
        media = flat[:, :-width].unflatten(1, self.media.shape[1:])
        return everyone._replace(media=media, texts=flat[:, -width:])


def embedded(queries: Tensor, rows: list[int], texts: Tensor, keys: Tensor) -> Embedded:
    """Lays embeddings (M, Q, W) of media of so many `rows` side by side; in float32."""
    index, real = row_table(rows, queries.device)
    real = real.repeat_interleave(queries.shape[1], 1)
    return Embedded(queries.float()[index].flatten(1, 2), real, texts.float(), keys)


def similarities(own: Embedded, others: Iterable[Embedded]) -> tuple[Tensor, Tensor]:
    """Cosines of own media with all texts, and of own texts with all media: (B, G) each, of the nearest query token."""
    others = list(others)
    with torch.autocast(own.media.device.type, enabled=False):
        of_media = [_nearest(own.media, own.real, other.texts) for other in others]
        of_texts = [_nearest(other.media, other.real, own.texts).T for other in others]
    return torch.cat(of_media, 1), torch.cat(of_texts, 1)


def _nearest(media: Tensor, real: Tensor, texts: Tensor) -> Tensor:
    return (media @ texts.T).masked_fill(~real[..., None], -torch.inf).amax(1)


def are_equal(own: Tensor, others: Tensor) -> Tensor:
    """Whether pairs have equal media or equal texts, by their keys (B, 2) and (G, 2): (B, G)."""
    return (own[:, None] == others[None]).any(-1)


def cross_entropy(similarity: Tensor, targets: Tensor) -> Tensor:
    """Of the shares that are wanted (B, G), the mean over B."""
    return -(F.log_softmax(similarity, -1) * targets).sum(-1).mean()


def key_of_text(text: str) -> int:
    """A number that texts share if they differ in space and case alone."""
    return _number(text.casefold().split())


def key_of_media(item: Features | Mapping[str, Tensor]) -> int:
    """A number that media share whose tensors are equal, as far as `SAMPLED` values tell."""
    tensors = {"values": item.values, "mask": item.mask} if isinstance(item, Features) else item
    return _number(_print(name, tensors[name]) for name in sorted(tensors))


def _print(name: str, tensor: Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, flat.numel() // SAMPLED)].cpu().contiguous()
    return f"{name} {tuple(tensor.shape)} {flat.view(torch.uint8).numpy().tobytes().hex()}"


def _number(words: Iterable[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), signed=True)


@dataclass
class MomentumConfig:
    """Momentum distillation (ALBEF, BLIP), for captions that say little of their media, or that fit others too.

    Attributes:
      decay: share of itself that the momentum bridge keeps at every step.
      queue_size: pairs of earlier steps that are negatives too; each takes 4 * W bytes for its text and for each of its
        query tokens, 33 KB at BLIP-2's sizes.
      alpha: share of the targets that the momentum bridge gives; the rest are the true ones, without label smoothing.
      warmup: steps over which alpha grows from 0.
    """

    decay: float = 0.995
    queue_size: int = 4096
    alpha: float = 0.4
    warmup: int = 0


class Momentum(nn.Module):
    """A bridge that follows the one that trains, without dropout, and a queue of what it has made of earlier pairs.

    All of it is needed to go on with training, and none of it later.
    """

    def __init__(self, bridge: RetrievalBridge, config: MomentumConfig):
        super().__init__()
        for name, most in (("decay", 1), ("alpha", 1), ("queue_size", None), ("warmup", None)):
            value = getattr(config, name)
            if value < 0 or (most is not None and value > most):
                wanted = "at least 0" if most is None else f"between 0 and {most}"
                raise ConfigError(f"momentum.{name} must be {wanted}, not {value:g}.")
        self.config = config
        self.bridge = copy.deepcopy(bridge).requires_grad_(False)
        for part in ("matching_head", "language_head", "temperature"):
            delattr(self.bridge, part)
        self.train(False)
        size, width = config.queue_size, bridge.config.embedding_width
        self.register_buffer("media", torch.zeros(size, bridge.config.num_query_tokens, width))
        self.register_buffer("real", torch.zeros(size, bridge.config.num_query_tokens, dtype=torch.bool))
        self.register_buffer("texts", torch.zeros(size, width))
        self.register_buffer("keys", torch.zeros(size, 2, dtype=torch.long))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("pairs", torch.tensor(0))

    def train(self, mode: bool = True) -> "Momentum":
        """Stays in eval mode whatever `mode` says."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, bridge: RetrievalBridge) -> float:
        """Moves towards the bridge that trains, at first all the way; returns the share that targets take from here."""
        weights, steps = dict(bridge.named_parameters()), int(self.steps)
        for name, own in self.bridge.named_parameters():
            own.lerp_(weights[name], 1 - self.config.decay if steps else 1.0)
        self.steps += 1
        return self.config.alpha * (min(1.0, steps / self.config.warmup) if self.config.warmup else 1.0)

    @torch.no_grad()
    def embed(self, features: Features, text: Mapping[str, Tensor], keys: Tensor) -> Embedded:
        """Gives pairs as this bridge sees them."""
        media = self.bridge.read_media(features)
        queries = self.bridge.embed_queries(self.bridge.read_queries(media))
        return embedded(queries, media.rows, self.bridge.embed_texts(text), keys)

    def queue(self) -> Embedded:
        """Pairs of earlier steps, as many as there are; a copy, since backward needs them after `remember`."""
        count = min(int(self.pairs), self.config.queue_size)
        return Embedded(*(part[:count].clone() for part in (self.media, self.real, self.texts, self.keys)))

    @torch.no_grad()
    def remember(self, pairs: Embedded) -> None:
        """Puts the pairs of a step into the queue, in the place of the oldest."""
        size = self.config.queue_size
        pairs = Embedded(*(part[len(part) - min(size, len(part)) :] for part in pairs))
        length = max(self.media.shape[1], pairs.media.shape[1])
        self.media, self.real = padded(self.media, length), padded(self.real, length, value=False)
        places = (int(self.pairs) + torch.arange(len(pairs.keys), device=self.keys.device)) % max(size, 1)
        self.media[places] = padded(pairs.media, length)
        self.real[places] = padded(pairs.real, length, value=False)
        self.texts[places], self.keys[places] = pairs.texts, pairs.keys
        self.pairs += len(pairs.keys)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args) -> None:
        for name in ("media", "real"):  # as long as the longest media that it has met
            if f"{prefix}{name}" in state_dict:
                size = state_dict[f"{prefix}{name}"].shape[1]
                setattr(self, name, padded(getattr(self, name)[:, :size], size, value=0))
        super()._load_from_state_dict(state_dict, prefix, *args)
