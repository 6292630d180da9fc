"""What training costs: floating-point operations and bytes of each part, by formulas from shapes alone.

Operations are those of matrix products and convolutions, 2·m·k·n each, as torch's FlopCounterMode counts them; norms,
softmax, and what no product does (sampling of points, media) are left out, and attention is counted whole, without what
a causal mask saves. The LLM and the Q-Former have formulas, since their work changes with the lengths of a batch. Encoders
are any plugin's: theirs is counted once, by running them.

Letters beside those of `xblip.modality`: a row is what the Q-Former reads at once, a position is one of the LLM's.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xblip.bridge import Bridge, QFormerBridge
from xblip.llm import FrozenLLM
from xblip.modality import Features

FEATURE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4
"""Of the one scale of each token that is stored in int8."""
WEIGHT_BYTES = 4
"""Of a number that trains: bridges train in float32, and so are their gradients and AdamW's two states."""
BYTES_OF_TRAINING = 3 * WEIGHT_BYTES
"""Of each number that trains, beside itself: its gradient and AdamW's two states."""
CROSS_ATTENTION = {"EncDecAttention", "encoder_attn", "crossattention", "cross_attn"}
KEYS_VALUES = {"k", "v", "k_proj", "v_proj", "key", "value"}
"""What transformers' encoder-decoders call cross-attention, and the parts of it that read the prompt."""


class Flops(NamedTuple):
    """FLOPs of a part: its forward pass, its backward pass, and the forward pass that checkpointing does again."""

    forward: float
    backward: float = 0.0
    again: float = 0.0


class Products(NamedTuple):
    """FLOPs of products with weights, and of those of activations with each other (attention)."""

    weights: float
    attention: float

    def flops(self, *, trained: bool) -> Flops:
        """Backward, a product gives one gradient for each factor that needs one; frozen weights need none."""
        return Flops(self.weights + self.attention, (2 if trained else 1) * self.weights + 2 * self.attention)


@dataclass(frozen=True)
class LLMCost:
    """Sizes of a frozen LLM.

    Attributes:
      weights: weights of matrices that each position of a prompt passes; of a mixture of experts the active ones.
      attention: widths of keys and values, over all layers; a query costs 2 FLOPs of each for every position it sees.
      vocabulary: weights of the output head, which labelled positions alone pass.
      answer_weights, answer_attention: the same of an encoder-decoder's decoder, which answers alone pass; else 0.
      cross_weights, cross_attention: of its cross-attention, which reads the prompt; else 0.
      layers, width: of the part that reads prompts.
      ends: of `weights` and `answer_weights`, those of each layer's last matrix. Checkpointing need not pass them again:
        the gradient of a frozen matrix takes nothing that the forward pass gave.
    """

    weights: float
    attention: float
    vocabulary: float
    layers: int
    width: int
    ends: tuple[float, float]
    answer_weights: float = 0.0
    answer_attention: float = 0.0
    cross_weights: float = 0.0
    cross_attention: float = 0.0

    @classmethod
    def of(cls, llm: FrozenLLM) -> "LLMCost":
        """Reads the sizes of an LLM, which may be a skeleton, quantised or sharded."""
        model, config = llm.model, llm.model.config.get_text_config()
        vocabulary = llm.width * model.get_input_embeddings().num_embeddings
        heads = 2 * config.num_attention_heads * _head_width(config)
        layers = config.num_hidden_layers
        if not llm.is_encoder_decoder:
            weights = _matrix_weights(model.get_decoder(), config)
            return cls(sum(weights.values()), layers * heads, vocabulary, layers, llm.width, (_ends(weights), 0.0))
        reader = _matrix_weights(model.get_encoder(), config)
        weights = _matrix_weights(model.get_decoder(), config)
        cross = sum(count for name, count in weights.items() if _reads_prompt(name))
        answering = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", layers)
        return cls(
            sum(reader.values()),
            layers * heads,
            vocabulary,
            layers,
            llm.width,
            (_ends(reader), _ends(weights)),
            answer_weights=sum(weights.values()) - cross,
            answer_attention=answering * heads,
            cross_weights=cross,
            cross_attention=answering * heads,
        )

    def flops(self, positions: Sequence[int], labels: int, *, checkpointing: bool = False) -> Flops:
        """A step's, all but the output head's.

        Args:
          positions: real ones of each sample; of an encoder-decoder those of its prompt.
          labels: of all samples, taken as spread evenly where an encoder-decoder's attention depends on it.
          checkpointing: layers run forward once more in the backward pass.
        """
        all_positions, each = sum(positions), labels / len(positions)
        weights = (self.weights + self.cross_weights) * all_positions + self.answer_weights * labels
        attention = self.attention * sum(count**2 for count in positions)
        attention += self.answer_attention * labels * each + self.cross_attention * all_positions * each
        done = Products(2 * weights, 2 * attention).flops(trained=False)
        spared = 2 * (self.ends[0] * all_positions + self.ends[1] * labels)
        return done._replace(again=done.forward - spared) if checkpointing else done

    def activation_bytes(self, positions: int, whole: float, *, itemsize: int = 2) -> float:
        """Bytes that checkpointing keeps: the input of every layer, and one layer of `whole`, what is kept without it."""
        return self.layers * positions * self.width * itemsize + whole / self.layers


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _reads_prompt(name: str) -> bool:
    words = set(name.split("."))
    return bool(words & CROSS_ATTENTION and words & KEYS_VALUES)


def _matrix_weights(network: nn.Module, config: Any) -> dict[str, float]:
    """By module, the weights that one position passes. Of experts, kept as one tensor of three dimensions, the active."""
    found: dict[str, float] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):  # quantised ones too, whose weights are packed
            found[name] = module.in_features * module.out_features
        elif not isinstance(module, (nn.Embedding, nn.LayerNorm)):
            for weight in module.parameters(recurse=False):
                if weight.dim() == 2:
                    found[name] = found.get(name, 0) + weight.numel()
                elif weight.dim() == 3 and (active := getattr(config, "num_experts_per_tok", None)):
                    found[name] = found.get(name, 0) + weight.numel() * active / weight.shape[0]
    return found


def _ends(weights: dict[str, float]) -> float:
    """Of the last matrix of each layer; layers are what has a number in its name."""
    last = {layer[0]: count for name, count in weights.items() if (layer := re.search(r"\d+", name))}
    return sum(last.values())


@dataclass(frozen=True)
class QFormerCost:
    """Sizes of a Q-Former bridge that trains.

    Attributes:
      queries, width, inner, layers: Q, D_q, and those of its feed-forwards and of its depth.
      readers: layers that read the features.
      encoder_width, llm_width: D_enc, D_llm.
      vocabulary: words it knows; 0 for a static one.
      joins_segments: one row reads all segments of an item.
      features_train: something before keys and values trains (a norm, positions), so that gradients go that far.
    """

    queries: int
    width: int
    inner: int
    layers: int
    readers: int
    encoder_width: int
    llm_width: int
    vocabulary: int
    joins_segments: bool
    features_train: bool

    @classmethod
    def of(cls, bridge: QFormerBridge) -> "QFormerCost":
        """Reads the sizes of a bridge."""
        config, own = bridge.config, bridge.qformer.config
        return cls(
            queries=config.num_query_tokens,
            width=own.hidden_size,
            inner=own.intermediate_size,
            layers=own.num_hidden_layers,
            readers=len(range(0, own.num_hidden_layers, own.cross_attention_frequency)),
            encoder_width=own.encoder_width,
            llm_width=bridge.llm_width,
            vocabulary=own.vocab_size,
            joins_segments=config.join_segments,
            features_train=bool(config.features_layer_norm or config.max_segments),
        )

    def keys_values(self, rows: float, tokens: float) -> float:
        """FLOPs of cross-attention's keys and values, which no instruction changes."""
        return 2 * rows * tokens * self.readers * 2 * self.encoder_width * self.width

    def reading(self, rows: float, tokens: float, text: int, *, queries: int | None = None, seen: int = 0) -> Products:
        """What rows of queries and text cost, keys and values of the features left out.

        Args:
          rows: read at once.
          tokens: N of each.
          text: words beside the queries.
          queries: other than Q: 0 for text alone.
          seen: positions kept from an earlier pass, which these attend to.
        """
        count = self.queries if queries is None else queries
        both, square = count + text, self.width**2
        weights = self.layers * both * (4 * square + 2 * self.width * self.inner) + self.readers * count * 2 * square
        pairs = self.layers * both * (both + seen) + self.readers * count * tokens
        return Products(2 * rows * weights, 2 * rows * pairs * 2 * self.width)

    def flops(self, *, segments: int, tokens: int, text: int, samples: int) -> Flops:
        """A step's, of media that no pass has read before; arguments as those of `step_flops`."""
        rows = samples if self.joins_segments else segments
        each = tokens * segments / rows
        reading = self.reading(rows, each, text if self.vocabulary else 0).flops(trained=True)
        projector = 2 * rows * self.queries * self.width * self.llm_width
        media = self.keys_values(rows, each)
        return Flops(
            reading.forward + projector + media,
            reading.backward + 2 * projector + (2 if self.features_train else 1) * media,
        )

    def align_flops(self, *, segments: int, tokens: int, text: int, samples: int) -> Flops:
        """A step of BLIP-2's first stage: queries, text, three matched pairs, and captions over the queries' keys."""
        rows = samples if self.joins_segments else segments
        each, pairs = tokens * segments / rows, 3 * rows
        passes = [
            self.reading(rows, each, 0),
            self.reading(samples, 0, text, queries=0),
            self.reading(pairs, each, text),
            self.reading(samples, 0, text, queries=0, seen=self.queries),
            Products(2 * samples * text * self.width * self.vocabulary, 0),
        ]
        done = [part.flops(trained=True) for part in passes]
        media = self.keys_values(rows, each)
        return Flops(
            sum(part.forward for part in done) + media,
            sum(part.backward for part in done) + (2 if self.features_train else 1) * media,
        )


@dataclass(frozen=True)
class CountedCost:
    """Any other bridge: what one segment costs, counted once at the length of features that it was tried on."""

    segment: Flops

    def flops(self, *, segments: int, **lengths: int) -> Flops:
        """A step's."""
        return Flops(*(segments * part for part in self.segment))


def bridge_cost(bridge: Bridge, features: Features, instruction: str = "a") -> QFormerCost | CountedCost:
    """What a bridge costs; one that has no formula reads `features` of one item once, where it is."""
    if type(bridge) is QFormerBridge:
        return QFormerCost.of(bridge)
    rows, trained = len(features.values), [weight for weight in bridge.parameters() if weight.requires_grad]
    soft: list[Tensor] = []
    with torch.enable_grad():
        forward = count_flops(lambda: soft.extend(bridge(features, [instruction])))
        backward = count_flops(lambda: torch.autograd.grad(soft[0].sum(), trained, allow_unused=True))
    return CountedCost(Flops(forward / rows, backward / rows))


@dataclass(frozen=True)
class Costs:
    """A branch before an LLM.

    Attributes:
      encoder: forward FLOPs of one segment; encoders are frozen.
      bridge, llm: see there.
    """

    encoder: float
    bridge: QFormerCost | CountedCost
    llm: LLMCost


def costs_of(
    encode: Callable[[], Features], bridge: Bridge, llm: FrozenLLM, *, instruction: str = "a"
) -> tuple[Costs, Features]:
    """Costs of a branch before an LLM, found by encoding one item where the encoder is.

    Args:
      encode: gives the item's features; what it does is counted, which is nothing where they are stored.
      bridge, llm: of the model.
      instruction: for bridges that have no formula.

    Returns:
      The costs, and the features.
    """
    found: list[Features] = []
    encoding = count_flops(lambda: found.append(encode()))
    (features,) = found
    return Costs(encoding / len(features.values), bridge_cost(bridge, features, instruction), LLMCost.of(llm)), features


def step_flops(
    costs: Costs,
    *,
    segments: int,
    tokens: int,
    text: int,
    positions: Sequence[int],
    labels: int,
    stored: bool = False,
    checkpointing: bool = False,
) -> dict[str, Flops]:
    """FLOPs of one training step that no correct step can do without: no padding, logits at labels alone.

    Args:
      costs: of what trains.
      segments: of all samples.
      tokens: N of a segment.
      text: tokens of an instruction for the Q-Former.
      positions: the LLM's real ones of each sample, the answer's among them; an encoder-decoder's without.
      labels: of all samples.
      stored: features are read, and the encoder does nothing.
      checkpointing: the LLM's layers run forward once more in the backward pass.

    Returns:
      By part: "encoder", "bridge", "LLM", "logits". Sum them by `total`.
    """
    logits = Products(2 * labels * costs.llm.vocabulary, 0)
    return {
        "encoder": Flops(0.0 if stored else segments * costs.encoder),
        "bridge": costs.bridge.flops(segments=segments, tokens=tokens, text=text, samples=len(positions)),
        "LLM": costs.llm.flops(positions, labels, checkpointing=checkpointing),
        "logits": logits.flops(trained=False),
    }


def total(flops: dict[str, Flops], *, again: bool = True) -> float:
    """All FLOPs of a step; utilisation (MFU) is told without those that checkpointing does again."""
    return sum(part.forward + part.backward + (part.again if again else 0) for part in flops.values())


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of what `run` does, on any device, by torch's counter."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    # Fused kernels for the CPU are not known to the counter; attention of plain products is.
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()


class _NoModules(nullcontext):
    """Tells the counter nothing of modules: its own tracker hooks into autograd, where some networks make it fail."""

    parents = ("Global",)

    def __exit__(self, *error: object) -> None:
        """Also without the arguments, which the counter leaves out."""


def stored_bytes(segments: int, tokens: int, width: int, dtype: str) -> int:
    """Bytes of one item's stored features."""
    scales = SCALE_BYTES if dtype == "int8" else 0
    return segments * tokens * (width * FEATURE_BYTES[dtype] + scales)


def checkpoint_bytes(trained: int) -> int:
    """Bytes of a checkpoint: the bridge and AdamW's two states; of the LLM and the encoder nothing is written."""
    return 3 * WEIGHT_BYTES * trained


def all_reduce_bytes(trained: int, processes: int) -> float:
    """Bytes that each process sends (and receives) for the bridge's gradients, once per step, by a ring."""
    return 2 * (processes - 1) / processes * WEIGHT_BYTES * trained


def all_gather_bytes(weight_bytes: int, processes: int) -> float:
    """Bytes that each process receives per micro-batch of a sharded LLM: its weights, forward and again backward."""
    return 2 * (processes - 1) / processes * weight_bytes
