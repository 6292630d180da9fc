"""Checkpoints as LAVIS saves them, of any size, and what its Q-Former computes, in plain torch and by its own names."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from xblip.testing import toy_tokenizer

SMALL = dict(hidden=64, layers=3, inner=96, queries=4, vocabulary=len(toy_tokenizer()) + 1)
"""Sizes for tests that compute, with the toy tokenizer and [DEC]."""
TOY = dict(prefix="toy", width=16, llm_width=32)
"""Of the toy modality and the toy LLM."""


def qformer(
    prefix: str = "", *, width: int, hidden: int = 768, layers: int = 12, inner: int = 3072, queries: int = 32,
    vocabulary: int = 30523, text: bool = True, every: int = 2,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Shapes of query tokens and Q-Former, of which `every` so many layers read features.

    One that reads no text (BLIP-2's second stage) is without its text part.
    """

    def linear(name: str, inputs: int, outputs: int) -> dict:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str, size: int) -> dict:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    def attention(name: str, source: int) -> dict:
        found = linear(f"{name}.self.query", hidden, hidden)
        for part in ("key", "value"):
            found |= linear(f"{name}.self.{part}", source, hidden)
        return found | linear(f"{name}.output.dense", hidden, hidden) | norm(f"{name}.output.LayerNorm", hidden)

    shapes = {"embeddings.position_ids": (1, 512), **norm("embeddings.LayerNorm", hidden)}
    if text:
        shapes |= {"embeddings.word_embeddings.weight": (vocabulary, hidden)}
        shapes |= {"embeddings.position_embeddings.weight": (512, hidden)}
    for number in range(layers):
        layer = f"encoder.layer.{number}"
        shapes |= attention(f"{layer}.attention", hidden)
        if number % every == 0:
            shapes |= attention(f"{layer}.crossattention", width)
        for which in ("", "_query") if text else ("_query",):
            shapes |= linear(f"{layer}.intermediate{which}.dense", hidden, inner)
            shapes |= linear(f"{layer}.output{which}.dense", inner, hidden)
            shapes |= norm(f"{layer}.output{which}.LayerNorm", hidden)
    start = f"{prefix}_" if prefix else ""
    named = {f"{start}Qformer.bert.{name}": shape for name, shape in shapes.items()}
    return named | {f"{start}query_tokens": (1, queries, hidden)}


def around(prefix: str = "", *, width: int, llm_width: int, hidden: int = 768, projector: str = "llm_proj") -> dict:
    """Shapes of the layer norm before a Q-Former and of the projector after it."""
    start, norm = (f"{prefix}_", "ln") if prefix else ("", "ln_vision")
    shapes = {f"{start}{norm}.weight": (width,), f"{start}{norm}.bias": (width,)}
    return shapes | {
        f"{start}{projector}.weight": (llm_width, hidden),
        f"{start}{projector}.bias": (llm_width,),
    }


def bridge(prefix: str = "", *, width: int, llm_width: int, projector: str = "llm_proj", **sizes) -> dict:
    """Shapes of a whole bridge."""
    hidden = sizes.get("hidden", 768)
    own = around(prefix, width=width, llm_width=llm_width, hidden=hidden, projector=projector)
    return qformer(prefix, width=width, **sizes) | own


def linear(prefix: str, *, width: int, llm_width: int, hidden: int = 768, queries: int = 32, tokens: int = 1) -> dict:
    """Shapes of X-InstructBLIP's linear baseline; `hidden` 1 projects all queries together, of `tokens` end to end."""
    inner = (queries, queries * llm_width) if hidden == 1 else (hidden, llm_width)
    return {
        f"{prefix}_projection.weight": (queries * hidden, width * tokens),
        f"{prefix}_projection.bias": (queries * hidden,),
        f"{prefix}_llm_proj.weight": inner[::-1],
        f"{prefix}_llm_proj.bias": inner[1:],
        f"{prefix}_ln.weight": (width,),
        f"{prefix}_ln.bias": (width,),
    }


def values(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of these shapes, layer norms around one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_scale = name.split(".")[-2:][0] in ("LayerNorm", "ln_vision") or "_ln." in name
        made[name] = 1 + 0.2 * noise if is_scale and name.endswith("weight") else 0.2 * noise
        if name.endswith("position_ids"):
            made[name] = torch.arange(512)[None]
    return made


def saved(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """Writes a checkpoint as LAVIS's training loop does."""
    torch.save({"model": dict(weights), "optimizer": {}, "config": {"run": {}}, "scaler": {}, "iters": 5}, path)
    return path


def soft_prompt(
    weights: Mapping[str, Tensor],
    features: Tensor,
    ids: Tensor | None,
    *,
    prefix: str = "",
    projector: str = "llm_proj",
) -> Tensor:
    """What the original computes: features (1, N, W) and token ids (1, T), or None, to a soft prompt (Q, D_llm)."""
    start = f"{prefix}_" if prefix else ""

    def linear(name: str, states: Tensor) -> Tensor:
        return F.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, states: Tensor, eps: float) -> Tensor:
        return F.layer_norm(states, states.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def attend(name: str, states: Tensor, source: Tensor) -> Tensor:
        query, key, value = (
            linear(f"{name}.self.{part}", given).unflatten(-1, (-1, 64)).transpose(1, 2)
            for part, given in (("query", states), ("key", source), ("value", source))
        )
        read = ((query @ key.transpose(-1, -2) / 8).softmax(-1) @ value).transpose(1, 2).flatten(2)
        return norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", read) + states, 1e-12)

    def feed(layer: str, which: str, states: Tensor) -> Tensor:
        inner = linear(f"{layer}.output{which}.dense", F.gelu(linear(f"{layer}.intermediate{which}.dense", states)))
        return norm(f"{layer}.output{which}.LayerNorm", inner + states, 1e-12)

    bert = f"{start}Qformer.bert"
    features = norm(f"{start}ln" if prefix else "ln_vision", features, 1e-5)
    hidden = weights[f"{start}query_tokens"]
    queries = hidden.shape[1]
    if ids is not None:
        words = weights[f"{bert}.embeddings.word_embeddings.weight"][ids]
        places = weights[f"{bert}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        hidden = torch.cat([hidden, words + places], 1)
    hidden = norm(f"{bert}.embeddings.LayerNorm", hidden, 1e-12)
    number = 0
    while f"{bert}.encoder.layer.{number}.attention.self.query.weight" in weights:
        layer = f"{bert}.encoder.layer.{number}"
        hidden = attend(f"{layer}.attention", hidden, hidden)
        media, text = hidden[:, :queries], hidden[:, queries:]
        if f"{layer}.crossattention.self.query.weight" in weights:
            media = attend(f"{layer}.crossattention", media, features)
        hidden = feed(layer, "_query", media)
        if ids is not None:
            hidden = torch.cat([hidden, feed(layer, "", text)], 1)
        number += 1
    return linear(f"{start}{projector}", hidden[0, :queries])
