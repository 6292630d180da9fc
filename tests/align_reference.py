"""BLIP-2's first stage in plain torch: one item after another, explicit masks, no padding, float64. Nothing of ours."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass
class Pair:
    """A medium and its caption.

    Attributes:
      segments: features (N, D_enc) of each, real tokens alone.
      ids: of the caption.
      written: of the caption as it is written, `[DEC]` first.
      medium: what media are equal by.
      caption: what captions are equal by.
      joined: all segments are read in one pass.
    """

    segments: list[Tensor]
    ids: list[int]
    written: list[int]
    medium: object
    caption: object
    joined: bool = False

    def equals(self, other: "Pair") -> bool:
        return self.medium == other.medium or self.caption == other.caption


def trainable(state: Weights) -> Weights:
    return {name: value.detach().double().clone().requires_grad_() for name, value in state.items()}


def linear(weights: Weights, name: str, states: Tensor) -> Tensor:
    return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, states: Tensor, eps: float = 1e-12) -> Tensor:
    centred = states - states.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(weights: Weights, name: str, states: Tensor, source: Tensor, sees: Tensor, heads: int) -> Tensor:
    query, key, value = (
        linear(weights, f"{name}.attention.{part}", given)
        for part, given in (("query", states), ("key", source), ("value", source))
    )
    width = query.shape[1] // heads
    read = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        scores = query[:, own] @ key[:, own].T / width**0.5
        read.append(scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value[:, own])
    out = linear(weights, f"{name}.output.dense", torch.cat(read, 1))
    return norm(weights, f"{name}.output.LayerNorm", out + states)


def feed(weights: Weights, layer: str, which: str, states: Tensor) -> Tensor:
    inner = F.gelu(linear(weights, f"{layer}.intermediate{which}.dense", states))
    out = linear(weights, f"{layer}.output{which}.dense", inner)
    return norm(weights, f"{layer}.output{which}.LayerNorm", out + states)


def qformer(weights: Weights, segments: list[Tensor], ids: list[int], sees: Tensor, heads: int) -> Tensor:
    """All positions at once: the query tokens of each segment, then the text; `sees` (n, n) says who sees whom."""
    start = "qformer.embeddings"
    parts = [weights["query_tokens"][0] for _ in segments]
    if ids:
        words = torch.stack([weights[f"{start}.word_embeddings.weight"][number] for number in ids])
        parts.append(words + weights[f"{start}.position_embeddings.weight"][: len(ids)])
    hidden = norm(weights, f"{start}.layernorm", torch.cat(parts))
    size = weights["query_tokens"].shape[1]
    border = size * len(segments)
    layers = {int(name.split(".")[3]) for name in weights if name.startswith("qformer.encoder.layer.")}
    for number in sorted(layers):
        layer = f"qformer.encoder.layer.{number}"
        hidden = attend(weights, f"{layer}.attention", hidden, hidden, sees, heads)
        media, text = hidden[:border], hidden[border:]
        if f"{layer}.crossattention.attention.key.weight" in weights and segments:
            read = []
            for place, features in enumerate(segments):
                everything = torch.ones(size, len(features), dtype=torch.bool)
                own = media[place * size : (place + 1) * size]
                read.append(attend(weights, f"{layer}.crossattention", own, features, everything, heads))
            media = torch.cat(read)
        parts = ([feed(weights, layer, "_query", media)] if segments else []) + (
            [feed(weights, layer, "", text)] if ids else []
        )
        hidden = torch.cat(parts)
    return hidden


def normed(weights: Weights, pair: Pair) -> list[Tensor]:
    """Features as the Q-Former reads them."""
    read = [norm(weights, "layer_norm", features.double(), 1e-5) for features in pair.segments]
    if "segment_positions.weight" in weights:
        read = [features + weights["segment_positions.weight"][place] for place, features in enumerate(read)]
    return [torch.cat(read)] if pair.joined else read


def unit(states: Tensor) -> Tensor:
    return states / states.square().sum(-1, keepdim=True).sqrt()


def embed(weights: Weights, pair: Pair, heads: int) -> tuple[Tensor, Tensor]:
    """Embeddings of the query tokens of all segments, (L, W), and of the caption, (W,)."""
    size = weights["query_tokens"].shape[1]
    queries = [
        qformer(weights, [features], [], torch.ones(size, size, dtype=torch.bool), heads)
        for features in normed(weights, pair)
    ]
    count = len(pair.ids)
    text = qformer(weights, [], pair.ids, torch.ones(count, count, dtype=torch.bool), heads)
    return unit(linear(weights, "media_projection", torch.cat(queries))), unit(
        linear(weights, "text_projection", text[0])
    )


def itc(weights: Weights, pairs: list[Pair], heads: int, smoothing: float) -> Tensor:
    seen = [embed(weights, pair, heads) for pair in pairs]
    total, count = 0, len(pairs)
    for own in range(count):
        of_media = [(seen[own][0] @ seen[other][1]).max() / weights["temperature"][0] for other in range(count)]
        of_text = [(seen[other][0] @ seen[own][1]).max() / weights["temperature"][0] for other in range(count)]
        equal = [pairs[own].equals(pairs[other]) for other in range(count)]
        for scores in (of_media, of_text):
            logarithms = torch.log_softmax(torch.stack(scores), 0)
            for other in range(count):
                wanted = (1 - smoothing) * equal[other] / sum(equal) + smoothing / count
                total = total - wanted * logarithms[other] / (2 * count)
    return total


def match(weights: Weights, pair: Pair, ids: list[int], heads: int) -> Tensor:
    """Logits (2,) of a medium and a text that see each other."""
    size = weights["query_tokens"].shape[1]
    count = size + len(ids)
    logits = []
    for features in normed(weights, pair):
        read = qformer(weights, [features], ids, torch.ones(count, count, dtype=torch.bool), heads)
        logits += list(linear(weights, "matching_head", read[:size]))
    return torch.stack(logits).mean(0)


def itm(weights: Weights, pairs: list[Pair], heads: int, wrong_media: list[int], wrong_texts: list[int]) -> Tensor:
    """-1 stands for no negative; a pair's own judgements count as much as any other pair's."""
    total = 0
    for own, pair in enumerate(pairs):
        judged = [-torch.log_softmax(match(weights, pair, pair.ids, heads), 0)[1]]
        if wrong_media[own] >= 0:
            judged.append(-torch.log_softmax(match(weights, pairs[wrong_media[own]], pair.ids, heads), 0)[0])
        if wrong_texts[own] >= 0:
            judged.append(-torch.log_softmax(match(weights, pair, pairs[wrong_texts[own]].ids, heads), 0)[0])
        total = total + sum(judged) / len(judged) / len(pairs)
    return total


def itg(weights: Weights, pairs: list[Pair], heads: int, smoothing: float) -> Tensor:
    size = weights["query_tokens"].shape[1]
    total, labels = 0, 0
    for pair in pairs:
        segments = normed(weights, pair)
        border = size * len(segments)
        count = border + len(pair.written)
        sees = torch.zeros(count, count, dtype=torch.bool)
        for position in range(count):
            for other in range(count):
                if position < border:
                    sees[position, other] = other < border and position // size == other // size
                else:
                    sees[position, other] = other < border or other <= position
        hidden = qformer(weights, segments, pair.written, sees, heads)[border:]
        for place in range(len(pair.written) - 1):
            state = F.gelu(linear(weights, "language_head.dense", hidden[place]))
            state = norm(weights, "language_head.layer_norm", state)
            logits = weights["qformer.embeddings.word_embeddings.weight"] @ state + weights["language_head.bias"]
            logarithms = torch.log_softmax(logits, 0)
            total = total - (1 - smoothing) * logarithms[pair.written[place + 1]] - smoothing * logarithms.mean()
            labels += 1
    return total / max(labels, 1)


class Momentum:
    """Weights that follow, and a queue of the last `size` pairs with their embeddings."""

    def __init__(self, weights: Weights, *, decay: float, size: int, alpha: float, warmup: int):
        self.weights = {name: value.detach().clone() for name, value in weights.items()}
        self.decay, self.size, self.alpha, self.warmup = decay, size, alpha, warmup
        self.queue: list[tuple[Pair, Tensor, Tensor]] = []
        self.steps = 0

    def itc(self, weights: Weights, pairs: list[Pair], heads: int) -> Tensor:
        for name, value in weights.items():
            self.weights[name] = self.decay * self.weights[name] + (1 - self.decay) * value.detach()
        alpha = self.alpha * min(1, self.steps / self.warmup) if self.warmup else self.alpha
        self.steps += 1
        current = [(pair, *embed(self.weights, pair, heads)) for pair in pairs]
        others = current + self.queue
        total = 0
        for own, pair in enumerate(pairs):
            media, text = embed(weights, pair, heads)
            equal = torch.tensor([float(pair.equals(other)) for other, _, _ in others])
            for mine, slow in (
                (
                    [(media @ other[2]).max() for other in others],
                    [(current[own][1] @ other[2]).max() for other in others],
                ),
                (
                    [(other[1] @ text).max() for other in others],
                    [(other[1] @ current[own][2]).max() for other in others],
                ),
            ):
                soft = torch.softmax(torch.stack(slow) / weights["temperature"][0].detach(), 0)
                wanted = alpha * soft + (1 - alpha) * equal / equal.sum()
                logarithms = torch.log_softmax(torch.stack(mine) / weights["temperature"][0], 0)
                total = total - (wanted * logarithms).sum() / (2 * len(pairs))
        self.queue = (self.queue + current)[-self.size :] if self.size else []
        return total
